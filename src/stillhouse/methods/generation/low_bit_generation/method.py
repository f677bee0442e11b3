"""Generators of few bits: models of image tokens (and, to compare, diffusion models) quantised to 2 to 8 bits and
distilled from themselves in full precision, with TopKLD.

paper: Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models
venue: arXiv 2025
arxiv: 2501.06218
task: class-conditional images
family: weight quantisation
use when: a generator of images has to be stored or computed in 3 or 4 bits, or you ask which kind loses less by it
needs: images with classes; tokenizer and generator are trained first

A tokenizer (means of patches, or a small convolutional VQ) turns images into codes: one grid, predicted token by
token, or `tokenizer.scales`, residuals predicted a grid at a time from coarse to fine, as VAR does. A transformer with
adaptive layer norm learns them in full precision and is the teacher. Its copy gets the linear layers of its blocks on a
grid: `quantise.weights` int2 … int8, uint2 … (from the minimum) or floating point such as e2m1, with a scale for each
output or each `group` of inputs; `quantise.activations` puts each token's inputs on a grid too. The gradient passes
straight through the grid, scales follow the weights, and `objectives` (topkld, gkd, ce, …) read the teacher's logits on
the data's codes. `objectives: null` leaves the rounding alone: to the nearest, or `rounding: gptq`; `smooth` moves the
range of activations into weights first (SmoothQuant). With `diffusion` the generator is a diffusion transformer, whose
distillation is the mean square error of noise predictions.

Figures: on unseen sequences NLL, forward KL to the teacher and how often both have the same most probable token; of
samples, the Frechet distance to the training images in the features of a `probe` (a classifier trained first), the
share that the probe puts into their class, and how far they lie from the teacher's samples of the same draws. Total
bits count b a quantised weight, 16 a scale and 16 for everything else; compute bits are multiply-adds times both
factors' bits. `scaling` does this for a family of widths and fits log Frechet = a + c log2(total bits) to each kind of
rows: distilled, rounded to the same format, rounded to the next.

Reconstructed, as no official code was found: which layers stay in full precision (embeddings, head, norms and the
adaptive layer norm's; see quantise.include and exclude), that scales follow the weights, and all rates. OmniQuant, a
baseline of the paper, is not here. The published tokenizer and weights of VAR are not read.
Its recipes bear the name of the loss: topkld and topkld_scaling.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.config.specs import Objectives, OptimizerSpec, Spec, TrainSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.errors import UserError
from stillhouse.evaluation.cost import parameters
from stillhouse.functional import diffusion
from stillhouse.generation.config import GenerationConfig, Prompts
from stillhouse.generation.judging import PROBE, Probe
from stillhouse.generation.product import real_samples, write_grids
from stillhouse.methods.generation.low_bit_generation.forms import (
    DiffusionSpec,
    ImageTokens,
    LabelledImages,
    NoisePrediction,
    TokenLoader,
    denoising_figures,
    token_figures,
    trajectory_gap,
)
from stillhouse.methods.generation.low_bit_generation.grids import (
    GroupLevels,
    add_input_grids,
    chosen_layers,
    gptq,
    group_of,
    inputs_of,
    multiply_bits,
    number_format,
    smooth,
    total_bits,
)
from stillhouse.methods.generation.low_bit_generation.network import GeneratorSpec, SamplerSpec
from stillhouse.methods.generation.low_bit_generation.product import Blueprint, LowBitGenerator, drawn_images
from stillhouse.methods.generation.low_bit_generation.tokenizer import ImageTokenizer, TokenizerSpec
from stillhouse.nn import quantise
from stillhouse.nn.quantise import Levels
from stillhouse.randomness import key as keys
from stillhouse.randomness import keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import evaluating, to_device
from stillhouse.tasks.classification import Classification

SHOWN = 8  # prompts of the report, and images of each
GAP_PROMPTS = 20
UNSEEN_BATCH = 64  # sequences, whose logits of all tokens are there at once


# ---- the recipe ------------------------------------------------------------------------------------------------------


class QuantiseSpec(Spec):
    """What is put on which grid."""

    weights: str | None = Field(
        "int3", description="int2 … int8, uint2 … uint8, or eEmM such as e2m1; null: as they are."
    )
    group: int | None = Field(None, ge=1, description="Inputs that share a scale; default: all of an output.")
    activations: int | None = Field(None, ge=2, le=8, description="Bits of layers' inputs, a scale a token.")
    rounding: Literal["nearest", "gptq"] = Field(
        "nearest", description="Of the teacher's weights, before distillation."
    )
    smooth: float | None = Field(
        None, gt=0, lt=1, description="Move the inputs' range into the weights to this power (SmoothQuant: 0.5)."
    )
    calibration: int = Field(256, ge=1, description="Training images that gptq and smooth look at.")
    include: list[str] = Field(
        default_factory=lambda: [r"^blocks\."], description="Regular expressions: linear layers that are quantised."
    )
    exclude: list[str] = Field(
        default_factory=lambda: [r"\.ada$", r"\.modulation$"], description="Of these, those that are not."
    )


class ScalingSpec(Spec):
    """A family of widths, each rounded and distilled to one format, and rounded to another."""

    widths: list[int] = Field(min_length=2, description="Of the generator.")
    weights: str = Field("int3", description="The format that is distilled, and rounded too.")
    above: str = Field("int4", description="The next format, which is rounded.")


class Config(GenerationConfig):
    tokenizer: TokenizerSpec = Field(default_factory=TokenizerSpec)
    generator: GeneratorSpec = Field(default_factory=GeneratorSpec)
    diffusion: DiffusionSpec | None = Field(None, description="A diffusion model in the place of one of tokens.")
    label_drop: float = Field(0.1, ge=0, lt=1, description="Share of the samples whose class is hidden in training.")
    teach: TrainSpec = Field(
        default_factory=lambda: TrainSpec(epochs=40, batch_size=64, optimizer=OptimizerSpec(name="adamw", lr=2e-3)),
        description="How the generator is trained in full precision.",
    )
    quantise: QuantiseSpec | None = Field(
        default_factory=QuantiseSpec, description="null: the generator in full precision is the product."
    )
    objectives: Objectives | None = Field(
        default_factory=lambda: ["topkld"],
        validate_default=True,
        description="Losses of the quantised model of tokens; null: it is not trained (nor is a diffusion model).",
    )
    train: TrainSpec = Field(
        default_factory=lambda: TrainSpec(epochs=15, batch_size=64, optimizer=OptimizerSpec(name="adamw", lr=3e-4)),
        description="How the quantised model is trained; weight decay is of what is not quantised.",
    )
    sampler: SamplerSpec = Field(default_factory=SamplerSpec)
    scaling: ScalingSpec | None = Field(None, description="Also fit scaling curves.")

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.quantise is not None and self.quantise.weights is not None:
            number_format(self.quantise.weights)
        if self.scaling is not None:
            number_format(self.scaling.weights), number_format(self.scaling.above)
            if self.objectives is None or self.quantise is None:
                raise ValueError(
                    "scaling compares distilled generators with rounded ones: it needs quantise and objectives"
                )
        return self


TOKENIZER = Stage("tokenizer", "learn the codes of images (shared)")
GENERATOR = Stage("generator", "train the generator in full precision (shared)")
STUDENT = Stage("student", "train the quantised generator")
SCALING = Stage("scaling", "quantise and train a family of widths")


class LowBitGeneration(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        blueprint = _blueprint(config, run)
        with torch.device("meta"):  # which costs nothing, however large it is
            network, _ = blueprint.networks()
        count = sum(p.numel() for p in network.parameters())
        per_epoch = len(run.loader(config.data, "train", config.teach.batch_size, train=True))
        stages = [] if config.diffusion is not None else [TOKENIZER.filled(steps=config.tokenizer.steps)]
        name = f"{config.generator.depth} blocks of width {config.generator.width}, {count / 1e6:.2f} M parameters"
        stages += [GENERATOR.filled(steps=config.teach.epochs * per_epoch, models={"generator": name}), PROBE]
        if config.quantise is not None:
            chosen = _chosen(network, config.quantise)
            does = f"{STUDENT.does}: {len(chosen)} layers in {config.quantise.weights or 'full precision'}"
            per_epoch = len(run.loader(config.data, "train", config.train.batch_size, train=True))
            steps = None if config.objectives is None else config.train.epochs * per_epoch
            stages.append(STUDENT.filled(does=does, steps=steps))
        if config.scaling is not None:
            stages.append(SCALING)
        return stages

    def run(self, config: Config, run: Run) -> LowBitGenerator:
        world = World(config, run)
        teacher = world.teacher(config.generator)
        if config.quantise is None:
            return world.product(teacher, teacher, {}, {})
        student, figures = world.student(teacher, config.generator, config.quantise, config.objectives, STUDENT)
        codes = quantise.detach(student)
        if config.scaling is not None:
            figures |= world.scaling(config.scaling)
        return world.product(student, teacher, codes, figures)


# ---- the procedure ---------------------------------------------------------------------------------------------------


class QuantisedDistillation(Distillation):
    """A distillation whose weight decay leaves quantised weights alone."""

    def param_groups(self) -> list[dict[str, Any]]:
        first, *others = super().param_groups()
        return [*_groups(self.student), *others] if first["params"] else others


class QuantisedDenoising(NoisePrediction):
    """The same of a denoiser."""

    def param_groups(self) -> list[dict[str, Any]]:
        return _groups(self.student)


def _groups(student: nn.Module) -> list[dict[str, Any]]:
    quantised = {id(weight) for _, weight in quantise.attached(student).values()}
    every = [p for p in student.parameters() if p.requires_grad]
    on_grid, others = ([p for p in every if (id(p) in quantised) == which] for which in (True, False))
    return [g for g in ({"params": on_grid, "weight_decay": 0.0}, {"params": others}) if g["params"]]


def _blueprint(config: Config, run: Run) -> Blueprint:
    bundle = run.data(config.data, Classification)
    task = bundle.task
    if len(task.input_shape) != 3 or not task.mean:
        raise UserError(f"Images are generated, but samples of '{config.data.name}' have the shape {task.input_shape}.")
    return Blueprint(
        generator=config.generator,
        tokenizer=None if config.diffusion is not None else config.tokenizer,
        diffusion=config.diffusion,
        sampler=config.sampler,
        shape=task.input_shape,
        prompts=list(Prompts.read(config.prompts, bundle.classes).names),
        mean=task.mean,
        std=task.std,
    )


def _chosen(network: nn.Module, spec: QuantiseSpec) -> list[str]:
    names = chosen_layers(network, spec.include, spec.exclude)
    for name in names:
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        group_of(layer, name, spec.group)
    return names


class World:
    """What a run's generators share: data, tokenizer, probe."""

    def __init__(self, config: Config, run: Run) -> None:
        self.config, self.run, self.blueprint = config, run, _blueprint(config, run)
        self.data = {
            "data": run.data(config.data).fingerprint,
            "augment": config.data.model_dump(mode="json", include={"augment", "image_size"}),
        }
        self.prompts = Prompts.read(config.prompts, run.data(config.data).classes)
        self.probe = Probe(run, config)
        self.tokenizer = None if config.diffusion is not None else self._tokenizer()

    # ---- in full precision -------------------------------------------------------------------------------------------

    def _tokenizer(self) -> ImageTokenizer:
        config, run, spec = self.config, self.run, self.config.tokenizer

        def make() -> dict[str, Tensor]:
            with run.seeded(0):
                tokenizer = self._new_tokenizer().to(run.device)
                loader = run.loader(config.data, "train", spec.batch_size, train=True)
                stream = _stream(loader)
                learned = [p for p in tokenizer.parameters() if p.requires_grad]
                optimizer = torch.optim.Adam(learned, spec.lr) if learned else None

                def step(i: int) -> dict[str, Tensor]:
                    x = stream(i).to(run.device)
                    terms, codes, rows = tokenizer.loss(x, spec.commitment)
                    if optimizer is not None:
                        optimizer.zero_grad()
                        torch.stack(list(terms.values())).sum().backward()
                        optimizer.step()
                    tokenizer.follow(codes, rows, spec.decay)
                    return {name: term.detach() for name, term in terms.items()}

                state: dict[str, Any] = {"tokenizer": tokenizer}
                run.loop(TOKENIZER, state if optimizer is None else {**state, "optimizer": optimizer}, step, spec.steps)
            return state_on_cpu(tokenizer)

        held = run.stage(TOKENIZER, make, {**self.data, "tokenizer": spec})
        tokenizer = self._new_tokenizer()
        tokenizer.load_state_dict(held)
        return tokenizer.to(run.device).eval().requires_grad_(False)

    def _new_tokenizer(self) -> ImageTokenizer:
        with keyed("tokenizer"):
            return ImageTokenizer(self.config.tokenizer, self.blueprint.shape)

    def network(self, spec: GeneratorSpec) -> nn.Module:
        """A new generator, initialised by torch's generator."""
        if self.tokenizer is None:
            return self.blueprint.model_copy(update={"generator": spec}).networks()[0]
        return spec.build(self.tokenizer, len(self.blueprint.prompts))

    def batches(self, spec: TrainSpec) -> LabelledImages:
        """The training batches of a generator."""
        loader = self.run.loader(self.config.data, "train", spec.batch_size, train=True)
        return self._labelled(loader, self.config.label_drop)

    def unseen(self) -> LabelledImages:
        """Unseen images, with their classes."""
        spec, split = self.run.judging_data()
        loader = self.run.loader(spec, split, min(self.config.train.batch_size, UNSEEN_BATCH))
        return self._labelled(loader, 0.0)

    def _labelled(self, loader: Any, drop: float) -> LabelledImages:
        if self.tokenizer is None:
            return LabelledImages(loader, self.prompts, drop)
        return TokenLoader(loader, self.prompts, drop, self.tokenizer, self.run.device)

    def teacher(self, spec: GeneratorSpec) -> nn.Module:
        """The generator in full precision, trained once for all recipes that quantise it."""
        config, run = self.config, self.run

        def make() -> dict[str, Tensor]:
            with run.seeded(0):
                with keyed("generator", 0):
                    network = self.network(spec)
                module = self._module(network, None, [objective_from_spec("ce")])
                run.fit(GENERATOR, module, self.batches(config.teach), config.teach)
                _close(module)
            return state_on_cpu(network)

        uses = {
            **self.data,
            "generator": spec,
            "tokenizer": self.tokenizer,
            "diffusion": None
            if config.diffusion is None
            else config.diffusion.model_dump(include={"patch", "schedule"}),
            "teach": config.teach,
            "label_drop": config.label_drop,
        }
        held = run.stage(GENERATOR, make, uses)
        network = self.network(spec)
        network.load_state_dict(held)
        return network.to(run.device).eval().requires_grad_(False)

    def _module(self, student: nn.Module, teacher: nn.Module | None, objectives: Sequence[Any]) -> Any:
        diffused = self.config.diffusion
        if diffused is not None:
            return QuantisedDenoising(student, diffusion.schedule(diffused.schedule), teacher)
        source = None if teacher is None else FrozenTeacher(teacher, task=ImageTokens())
        return QuantisedDistillation(student, source, objectives, seed=self.run.seed, task=ImageTokens())

    # ---- quantised ---------------------------------------------------------------------------------------------------

    def student(
        self, teacher: nn.Module, spec: GeneratorSpec, grid: QuantiseSpec, objectives: Objectives | None, stage: Any
    ) -> tuple[nn.Module, dict[str, float]]:
        """The quantised generator, with its levels attached; and figures of its bits and its training."""
        run, config = self.run, self.config
        student = self.network(spec)
        student.load_state_dict(teacher.state_dict())
        student.to(run.device)
        bits = self.put_on_grid(student, grid)
        figures = {**self.bits(student, grid, bits), "train_seconds": 0.0}
        if objectives is not None:
            noise = config.diffusion is not None and config.diffusion.target == "noise"
            module = self._module(student, None if noise else teacher, [objective_from_spec(o) for o in objectives])
            fitted = run.fit(stage, module, self.batches(config.train), config.train)
            _close(module)
            figures["train_seconds"] = fitted.seconds
        return student.to(run.device).eval(), figures

    def put_on_grid(self, network: nn.Module, spec: QuantiseSpec) -> dict[str, tuple[int, int]]:
        """Quantise a generator in place; (bits, numbers of its scales) of each quantised parameter by name."""
        names = _chosen(network, spec)
        if spec.activations is not None or spec.smooth is not None:
            add_input_grids(network, names, spec.activations)
        if spec.smooth is not None:
            seen = self.calibrated(network, names, spec.calibration)
            smooth(network, names, {n: x.abs().amax(0) for n, x in seen.items()}, spec.smooth)
        if spec.weights is None:
            return {}
        kind = number_format(spec.weights)
        levels: dict[str, Levels] = {}
        bits: dict[str, tuple[int, int]] = {}
        for name in names:
            layer = network.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            group = group_of(layer, name, spec.group)
            given: tuple[Tensor, Tensor] | None = None
            if spec.rounding == "gptq":  # layer by layer, each on what the rounded ones before it give
                x = self.calibrated(network, [name], spec.calibration)[name]
                rounded, scale, offset = gptq(layer.weight, x, kind, group)
                given = (scale, offset)
                with torch.no_grad():
                    layer.weight.copy_(rounded)
            levels[f"{name}.weight"] = GroupLevels(kind, group, given)
            groups = layer.weight.numel() // group
            bits[f"{name}.weight"] = (kind.bits, groups if kind.symmetric else 2 * groups)
        quantise.attach(network, levels)
        return bits

    def calibrated(self, network: nn.Module, names: Sequence[str], count: int) -> dict[str, Tensor]:
        """What layers are given, (n, D) by name, for some training images."""
        loader = self._labelled(self.run.loader(self.config.data, "train", min(count, 64)), 0.0)
        with evaluating(network), inputs_of(network, names) as found, keyed("calibration"):
            for number, batch in enumerate(loader.batches(0, 0, 1)):
                if number * loader.batch_size >= count:
                    break
                self._called(network, to_device(batch, self.run.device))
        return {name: torch.cat(rows) for name, rows in found.items()}

    def _called(self, network: nn.Module, batch: Any) -> Tensor:
        inputs = batch["input"]
        if self.config.diffusion is not None:
            schedule = diffusion.schedule(self.config.diffusion.schedule)
            t = torch.randint(schedule.steps, (len(inputs["x"]),)).to(self.run.device)
            noise = torch.randn(inputs["x"].shape).to(self.run.device)
            inputs = {"x": schedule.add_noise(inputs["x"], noise, t), "t": t, "label": inputs["label"]}
        found: Tensor = network(**inputs)
        return found

    def bits(self, network: nn.Module, spec: QuantiseSpec, bits: Mapping[str, tuple[int, int]]) -> dict[str, float]:
        """`total_bits`, and `compute_bits` of a forward pass over one image's linear layers."""
        length = self.tokenizer.length if self.tokenizer is not None else _tokens(network)
        plain = {n.replace(".parametrizations.weight.original", ".weight"): p for n, p in network.named_parameters()}
        total = total_bits(plain, bits)
        linear = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
        work = {n: m.in_features * m.out_features * (length if f"{n}.weight" in bits else 1) for n, m in linear.items()}
        low = sum(w for n, w in work.items() if f"{n}.weight" in bits)
        weights = number_format(spec.weights).bits if spec.weights is not None else 16
        macs = float(sum(work.values()))
        compute = multiply_bits(macs, low / macs, weights, spec.activations or 16)
        return {"total_bits": float(total), "compute_bits": compute}

    # ---- figures -----------------------------------------------------------------------------------------------------

    def compared(self, student: nn.Module, teacher: nn.Module) -> dict[str, float]:
        """Student and teacher on unseen data and on samples of the same draws."""
        device = self.run.device
        if self.config.diffusion is not None:
            schedule = diffusion.schedule(self.config.diffusion.schedule)
            figures = denoising_figures(student, teacher, self.unseen(), schedule, device)
        else:
            figures = token_figures(student, teacher, self.unseen(), device)
        mine, theirs = (self.samples(network, 16, keys("gap"), GAP_PROMPTS) for network in (student, teacher))
        return {**figures, "sample_gap": trajectory_gap(mine, theirs)}

    def samples(self, network: nn.Module, count: int, seed: int, prompts: int | None = None) -> Tensor:
        """(prompts, count, C, H, W) images that a network of this family draws, of all prompts or the first ones."""
        every = len(self.blueprint.prompts)
        number = every if prompts is None else min(prompts, every)
        return samples_of(self.blueprint, network, self.tokenizer, number, count, self.run.device, seed)

    def judged(self, network: nn.Module) -> dict[str, float]:
        """What the probe sees in samples."""
        judge = self.config.judge
        return self.probe.figures(self.samples(network, judge.samples, judge.seed))

    def scaling(self, spec: ScalingSpec) -> dict[str, float]:
        """How far, in log Frechet at equal total bits, the line of distilled generators lies below those of rounded
        ones: of the same format (`lift_same`) and of the next (`lift_level`; above 0: the law is lifted by a level)."""
        config, rows = self.config, {"distilled": spec.weights, "same": spec.weights, "level": spec.above}
        points: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
        number = 0
        for width in spec.widths:
            size = config.generator.model_copy(update={"width": width})
            teacher = self.teacher(size)
            for row, weights in rows.items():
                assert config.quantise is not None
                grid = config.quantise.model_copy(update={"weights": weights})
                found = self._point(f"{SCALING}.{number}", teacher, size, grid, row == "distilled")
                points[row].append((math.log2(found["total_bits"]), math.log(max(found["frechet"], 1e-8))))
                number += 1
        self.run.record["scaling"] = points
        lines = {row: fitted_line(found) for row, found in points.items()}
        places = [x for x, _ in points["distilled"] + points["level"]]
        mine = [lines["distilled"](x) for x in places]
        return {
            f"lift_{row}": sum(lines[row](x) - y for x, y in zip(places, mine)) / len(places)
            for row in ("same", "level")
        }

    def _point(
        self, name: str, teacher: nn.Module, size: GeneratorSpec, grid: QuantiseSpec, distilled: bool
    ) -> dict[str, float]:
        """Bits and Frechet distance of one generator of the family, stored."""
        config, run = self.config, self.run
        objectives = config.objectives if distilled else None

        def make() -> dict[str, float]:
            student, figures = self.student(teacher, size, grid, objectives, SCALING)
            quantise.detach(student)
            with evaluating(student):
                return {**figures, **self.judged(student)}

        uses = {
            **self.data,
            "teacher": teacher,
            "size": size,
            "tokenizer": self.tokenizer,
            "diffusion": config.diffusion,
            "grid": grid,
            "objectives": None if objectives is None else [o.model_dump(mode="json") for o in objectives],
            "train": config.train if distilled else None,
            "label_drop": config.label_drop,
            "sampler": config.sampler,
            "judge": config.judge,
            "probe": config.probe.model_dump(mode="json", exclude={"train"}),
            "probe_train": config.probe.train,
            "seed": run.seed if distilled else 0,
        }
        found: dict[str, float] = run.stage(name, make, uses)
        return found

    def product(
        self, student: nn.Module, teacher: nn.Module, codes: dict[str, Any], figures: dict[str, float]
    ) -> LowBitGenerator:
        """What is kept, with its pictures and what must be measured while the teacher is there."""
        config = self.config
        with evaluating(student):
            figures = {**figures, **self.compared(student, teacher)}
            theirs = self.judged(teacher)
            figures |= {f"{name}_teacher": theirs[name] for name in ("frechet", "prompt_accuracy")}
            figures["frechet_ratio"] = self.judged(student)["frechet"] / max(theirs["frechet"], 1e-8)
            networks = {"student": student, "teacher": teacher}
            shown = {name: self.samples(n, SHOWN, keys("shown"), SHOWN) for name, n in networks.items()}
        real = real_samples(self.run, config.data, self.prompts)[:SHOWN]
        first = Prompts(self.prompts.names[:SHOWN], self.prompts.of_class)
        write_grids(self.run, self.blueprint.look, first, {"truth": real, **shown})
        self.probe.close()
        grid = config.quantise
        grids = grid is not None and (grid.activations is not None or grid.smooth is not None)
        blueprint = self.blueprint.model_copy(
            update={
                "inputs": chosen_layers(student, grid.include, grid.exclude) if grid is not None and grids else [],
                "input_bits": None if grid is None else grid.activations,
            }
        )
        tokenizer = None if self.tokenizer is None else copy.deepcopy(self.tokenizer).cpu()
        count = len(blueprint.prompts)
        kept = blueprint.networks()[0] if tokenizer is None else config.generator.build(tokenizer, count)
        add_input_grids(kept, blueprint.inputs, blueprint.input_bits)
        kept.load_state_dict(state_on_cpu(student))
        return LowBitGenerator(kept.eval(), tokenizer, blueprint, codes, figures)


def _tokens(network: nn.Module) -> int:
    grid = network.grid
    assert isinstance(grid, tuple)
    return int(grid[0] * grid[1] * grid[2])


def _stream(loader: Any) -> Any:
    """Step -> the images of its batch."""
    state: dict[str, Any] = {"at": -1, "batches": None}

    def images(i: int) -> Tensor:
        if state["at"] != i:
            state["batches"] = loader.batches(*divmod(i, len(loader)))
        state["at"] = i + 1
        found: Tensor = next(state["batches"])["input"]
        return found

    return images


def _close(module: Any) -> None:
    if isinstance(module, Distillation):
        module.close()


def fitted_line(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """The line of least squares through points (x, y); level where all have one x."""
    x, y = (sum(values) / len(points) for values in zip(*points))
    spread = sum((a - x) ** 2 for a, _ in points)
    slope = sum((a - x) * (b - y) for a, b in points) / spread if spread else 0.0
    return lambda at: y + slope * (at - x)


# ---- judging ---------------------------------------------------------------------------------------------------------


def samples_of(
    blueprint: Blueprint,
    network: nn.Module,
    tokenizer: ImageTokenizer | None,
    prompts: int,
    count: int,
    device: torch.device,
    seed: int,
) -> Tensor:
    """(prompts, count, C, H, W) images of the first prompts, on the CPU."""
    label = torch.arange(prompts, device=device).repeat_interleave(count)
    return drawn_images(blueprint, network, tokenizer, label, seed).cpu().unflatten(0, (prompts, count))


@evaluates(LowBitGenerator.kind)
def evaluate(product: LowBitGenerator, run: Run) -> dict[str, float]:
    """Figures of a run's generator: what the probe sees in its samples, and its parameters."""
    config = run.config
    assert isinstance(config, Config)
    probe = Probe(run, config)
    network, tokenizer = product.module.to(run.device), product.tokenizer
    if tokenizer is not None:
        tokenizer.to(run.device)
    try:
        number, judge = len(product.blueprint.prompts), config.judge
        samples = samples_of(product.blueprint, network, tokenizer, number, judge.samples, run.device, judge.seed)
        found = probe.figures(samples)
    finally:
        probe.close()
    return {**found, "probe_accuracy": probe.accuracy, "parameters": float(parameters(network))}

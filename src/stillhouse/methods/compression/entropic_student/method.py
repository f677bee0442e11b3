"""Entropic Student: cut a trained network in two, and learn a small encoder whose strings of bytes tell the rest of the
network what it needs.

paper: Supervised Compression for Resource-Constrained Edge Computing Systems
venue: WACV 2022
arxiv: 2108.11898
task: any
family: split computing
use when: a weak device shall send few bytes to a server that runs most of the network
needs: a trained network of convolutions, whose first part is a chain; the extra `codec`

The first part of the teacher is replaced by an encoder (convolutions with GDN) whose latents are coded under a learned
factorised prior, and a decoder. Stage 1 trains these three alone: the summed squared distances of the decoder's output,
and of what the frozen rest makes of it, to the teacher's features, plus beta times the bits. Then the prior becomes
integer tables, encoder and prior are fixed, and stage 2 trains decoder and rest by `objectives` on latents rounded
about the medians. (The released stage 2 rounds without the medians, which its coder subtracts; its frozen batch norm
may still move in stage 1, here it does not.) The strings are of a range coder (`constriction`; the released code has
rANS); a symbol outside its table follows in groups of four bits. Sums are over a batch, as published, so that beta
multiplies the bits of the whole batch. `stillhouse export RUN --to split` writes the device's half, the server's half
and the tables, which `python -m stillhouse.methods.compression.entropic_student SPLIT IMAGE` runs one after the other.
Baselines: `codec: jpeg` (the teacher on images coded as JPEG, whose bytes are counted without headers and tables),
`codec: quantised` (the same encoder and decoder without prior, latents in `rate.bits` bits), and `learn: labels` (the
whole network on labels and bits alone). `start` takes encoder, prior and decoder of another run, so that one encoder
serves several networks of one first part, and trains stage 2 alone. Networks of segmentation and detection are cut
alike; stage 2 of a detector has its `own` losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, MethodConfig, ModelSpec, Objectives, OptimizerSpec, Spec, Teacher, TrainSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Objective, Progress
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.errors import UserError
from stillhouse.evaluation import cost
from stillhouse.files import atomic_write
from stillhouse.functional.precision import full_precision
from stillhouse.methods.compression.entropic_student.deployment import write_halves
from stillhouse.methods.compression.entropic_student.network import (
    Bottleneck,
    JpegInput,
    LearnedCode,
    Split,
    cut,
)
from stillhouse.methods.compression.entropic_student.prior import FactorisedPrior
from stillhouse.methods.distillation import describe
from stillhouse.models import load_weights
from stillhouse.models.anatomy import stages
from stillhouse.randomness import keyed
from stillhouse.runs import network_files
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.judging import check_groups
from stillhouse.runs.judging import evaluate as evaluate_student
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, load_product, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, Signals, to_device
from stillhouse.tasks.base import Task

CALIBRATION = 4  # batches of training images by which the range of quantised latents is found
TABLES = "tables.safetensors"


# ---- losses ----------------------------------------------------------------------------------------------------------


@full_precision
def distortion(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared distance of features, summed over samples, channels and space; the teacher's are constants."""
    return F.mse_loss(student, teacher.detach(), reduction="sum")


class FeatureDistortion(Objective):
    """`distortion` at each of some modules, added up.

    Args:
        modules: their names, the same in both networks.
    """

    name = "distortion"

    def __init__(self, modules: list[str]) -> None:
        super().__init__()
        self.modules_compared = tuple(modules)
        self.needs = frozenset(f"{side}.tap:{m}" for side in ("student", "teacher") for m in modules)

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        terms = [distortion(student.taps[m], teacher.taps[m]) for m in self.modules_compared]
        return {"loss": torch.stack(terms).sum()}


class Rate(Objective):
    """The bits of a batch.

    Args:
        prior: the module that gives (B,) bits.
        mean: over the batch; else their sum.
    """

    name = "bits"

    def __init__(self, prior: str, mean: bool = False) -> None:
        super().__init__()
        self.prior, self.mean = prior, mean
        self.needs = frozenset({f"student.tap:{prior}"})

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        bits = student.taps[self.prior]
        return {"loss": bits.mean() if self.mean else bits.sum()}


class QuantileLoss(Objective):
    """The prior's auxiliary loss, which moves its quantiles and nothing else. The prior is the student's.

    Args:
        prior: whose it is.
    """

    name = "quantiles"
    needs = frozenset()

    def __init__(self, prior: FactorisedPrior) -> None:
        super().__init__()
        self._prior = (prior,)

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"loss": self._prior[0].auxiliary_loss()}


# ---- the recipe ------------------------------------------------------------------------------------------------------


class RateSpec(Spec):
    """How many bytes are spent, in each codec."""

    beta: float = Field(0.08, gt=0, description="learned: weight of the bits; more of it makes fewer bytes.")
    label_beta: float = Field(
        1e-3, gt=0, description="The same where the network learns labels, whose loss is smaller."
    )
    bits: int = Field(8, ge=1, le=8, description="quantised: of each number of the latents.")
    channels: int | None = Field(None, ge=1, description="quantised: of the latents; null: as many as `channels`.")
    quality: int = Field(50, ge=1, le=95, description="jpeg: its quality.")


class Config(MethodConfig):
    data: Data
    teacher: Teacher = Field(description="The trained network, which is cut.")
    split: str = Field("stage:1", description="Where: the module whose output the decoder gives, or the first stage.")
    channels: int = Field(24, ge=1, description="C of the latents.")
    codec: Literal["learned", "quantised", "jpeg"] = "learned"
    rate: RateSpec = Field(default_factory=RateSpec)
    learn: Literal["features", "labels"] = Field(
        "features",
        description="features: stage 1 imitates the teacher's; labels: the whole network learns labels and bits alone.",
    )
    start: str | None = Field(
        None,
        description="A run's folder whose encoder, prior and decoder are taken, so that one encoder serves several "
        "networks; stage 1 is left out.",
    )
    features: list[str] | None = Field(
        None, description="Modules whose outputs are compared; null: the split and the stages after it."
    )
    train: TrainSpec = Field(
        default_factory=lambda: TrainSpec(optimizer=OptimizerSpec(name="adam", lr=1e-3)), description="Stage 1."
    )
    objectives: Objectives = Field(
        default_factory=lambda: [{"name": "ce", "weight": 0.5}, {"name": "kd", "weight": 0.5, "temperature": 1.0}],
        validate_default=True,
        description="The losses of stage 2.",
    )
    finetune: TrainSpec | None = Field(
        default_factory=lambda: TrainSpec(optimizer=OptimizerSpec(lr=1e-3, weight_decay=5e-4)),
        description="Stage 2, of the decoder and what follows; null: stage 1 alone.",
    )
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])


TEACHER = Stage("teacher", "train the teacher (shared)")
BOTTLENECK = Stage("bottleneck", "train encoder, code and decoder (shared)")
STUDENT = Stage("student", "train the decoder and what follows on coded latents")


class EntropicStudent(Method[Config]):
    """The paper's two stages, or stage 2 alone behind the encoder of another run."""

    def plan(self, config: Config, run: Run) -> list[Stage]:
        check_groups(run.data(config.data).task, config.evaluate)
        out, spec = [], config.teacher
        network = run.model(spec.network, config.data, "teacher", spec.seed or 0)
        if spec.train is not None and spec.checkpoint is None:
            named = {"teacher": describe(spec.network.model, network)}
            steps = spec.train.epochs * len(
                run.loader(spec.data or config.data, "train", spec.train.batch_size, train=True)
            )
            out.append(TEACHER.filled(models=named, steps=steps))
        if config.codec == "jpeg":
            return out
        split = self.split(config, run, network)
        if config.start is not None:
            stored(config.start, split, run.data(config.data).task)
            return [*out, *self.last(config, run)]
        taps = {f"feature {i}": name for i, name in enumerate(self.features(config, network, split), 1)}
        out.append(BOTTLENECK.filled(taps=taps, steps=self.steps(config, config.train, run)))
        return [*out, *self.last(config, run)]

    def last(self, config: Config, run: Run) -> list[Stage]:
        """Stage 2, where there is one."""
        spec = config.finetune
        return [] if spec is None else [STUDENT.filled(steps=self.steps(config, spec, run))]

    def run(self, config: Config, run: Run) -> SplitStudent:
        teacher = run.teacher("teacher", config.teacher, config.data)
        if not isinstance(teacher, FrozenTeacher):
            raise UserError("entropic_student: the teacher must be one network, which is cut in two.")
        run.record["weights"] = {"teacher": teacher.fingerprint()}
        network = run.model(config.teacher.network, config.data)
        network.load_state_dict(teacher.model.state_dict())
        task = run.data(config.data).task
        if config.codec == "jpeg":
            coded = JpegInput(network, task, config.rate.quality)
            return SplitStudent(coded, config.teacher.network, task, quality=config.rate.quality)
        split = self.split(config, run, network)
        figures: dict[str, float] = {}
        names = self.features(config, network, split) if config.start is None else []
        with keyed("bottleneck", run.seed):
            bottleneck = split.applied(network)
        if config.start is None:
            figures = self.stage_one(config, run, teacher, network, split, names)
        else:
            given = stored(config.start, split, task)
            bottleneck.load_state_dict(given.state_dict())
            bottleneck.code.restore(given.code.extra_tensors())
        bottleneck.freeze()
        if config.finetune is not None:
            network.requires_grad_(True)
            bottleneck.freeze()
            objectives = [objective_from_spec(o) for o in config.objectives]
            module = Distillation(network, teacher, objectives, seed=run.seed, task=task)
            figures["finetune_seconds"] = self.fitted(STUDENT, module, config.finetune, config, run)
        return SplitStudent(network, config.teacher.network, task, figures, split=split)

    def split(self, config: Config, run: Run, network: nn.Module) -> Split:
        """Where and how the teacher's network is cut."""
        batch = next(iter(run.loader(config.data, "train", 2)))
        at = stages(network)[0] if config.split == "stage:1" else config.split
        channels = config.channels if config.codec == "learned" else config.rate.channels or config.channels
        device = next(network.parameters()).device
        task = run.data(config.data).task
        return cut(network, at, task, to_device(batch, device), channels, config.codec, config.rate.bits)

    @staticmethod
    def features(config: Config, network: nn.Module, split: Split) -> list[str]:
        """Modules whose outputs stage 1 compares."""
        if config.features is not None or config.learn == "labels":
            return config.features or []
        found = stages(network)
        if split.at not in found:
            raise UserError(
                f"split: '{split.at}' is none of the network's stages ({', '.join(found)}); name in `features` "
                "the modules to compare."
            )
        return found[found.index(split.at) :]

    def stage_one(
        self, config: Config, run: Run, teacher: FrozenTeacher, network: nn.Module, split: Split, names: list[str]
    ) -> dict[str, float]:
        """Train encoder, code and decoder in place, and make the tables; the figures."""
        bottleneck = network.get_submodule(split.at)
        assert isinstance(bottleneck, Bottleneck)
        learned, labels = isinstance(bottleneck.code, LearnedCode), config.learn == "labels"
        beta, task = config.rate.label_beta if labels else config.rate.beta, run.data(config.data).task

        def make() -> dict[str, Any]:
            network.requires_grad_(labels)
            bottleneck.requires_grad_(True)
            bottleneck.rated = learned
            losses: list[Any] = [(FeatureDistortion(names), 1.0)]
            if labels:
                losses = [objective_from_spec(o) for o in task.supervised]
            if isinstance(bottleneck.code, LearnedCode):
                losses.append((Rate(f"{split.at}.code.prior", mean=labels), beta))
                losses.append((QuantileLoss(bottleneck.code.prior), 1.0))
            module = Distillation(network, None if labels else teacher, losses, seed=run.seed, task=task)
            seconds = self.fitted(BOTTLENECK, module, config.train, config, run)
            bottleneck.code.settle(self.latents(config, run, bottleneck))
            tables = bottleneck.code.extra_tensors()
            return {"weights": state_on_cpu(network), "tables": tables, "figures": {"train_seconds": seconds}}

        uses = {
            "teacher": teacher,
            "data": run.data(config.data),
            "augment": config.data.model_dump(mode="json", include={"augment", "mixup", "cutmix", "image_size"}),
            "split": split,
            "compared": names,
            "learn": config.learn,
            "spent": beta if learned else config.rate.bits,
            "train": config.train,
            "seed": run.seed,
        }
        held = run.stage(BOTTLENECK, make, uses)
        network.load_state_dict(held["weights"])
        bottleneck.code.restore(held["tables"])
        return dict(held["figures"])

    @staticmethod
    @torch.no_grad()
    def latents(config: Config, run: Run, bottleneck: Bottleneck) -> Tensor:
        """Latents of some training images, without augmentation."""
        device = next(bottleneck.parameters()).device
        batches = zip(range(CALIBRATION), run.loader(config.data, "train"))
        return torch.cat([bottleneck.encoder(to_device(batch, device)["input"]) for _, batch in batches])

    @staticmethod
    def steps(config: Config, spec: TrainSpec, run: Run) -> int:
        """Batches of a training."""
        return spec.epochs * len(run.loader(config.data, "train", spec.batch_size, train=True))

    @staticmethod
    def fitted(stage: Stage, module: Distillation, spec: TrainSpec, config: Config, run: Run) -> float:
        """Fit a module on the recipe's data; the seconds it took."""
        loader = run.loader(config.data, "train", spec.batch_size, train=True)
        done = run.fit(
            stage, module, loader, spec, evaluate=run.validating(config.data), splits=run.splits(config.data)
        )
        module.close()
        return done.seconds


def stored(folder: str, split: Split, task: Task) -> Bottleneck:
    """The encoder, code and decoder of another run. Raises `UserError` where they do not fit."""
    product = load_product(folder)
    if not isinstance(product, SplitStudent) or product.split is None:
        raise UserError(f"start: '{folder}' holds no network that was cut, but a product of kind '{product.kind}'.")
    for what in ("codec", "images", "channels", "stride", "features"):
        mine, theirs = getattr(split, what), getattr(product.split, what)
        if mine != theirs:
            raise UserError(f"start: the encoder in '{folder}' has {what} {theirs}, but here it must be {mine}.")
    if product.task.normalisation != task.normalisation:
        raise UserError(
            f"start: the encoder in '{folder}' saw images that were normalised otherwise; a device has one."
        )
    bottleneck = product.bottleneck
    assert isinstance(bottleneck, Bottleneck)
    return bottleneck


# ---- the product -----------------------------------------------------------------------------------------------------


@dataclass
class SplitStudent(Student):
    """A network that is cut in two, or the baseline on JPEG.

    Attributes:
        split: how it was cut; None for JPEG.
        quality: of JPEG; None where it is cut.
    """

    kind: ClassVar[str] = "stillhouse.methods.compression.entropic_student:SplitStudent"
    formats: ClassVar[Mapping[str, str]] = {"split": "split", **network_files.FORMATS}
    split: Split | None = None
    quality: int | None = None

    @property
    def bottleneck(self) -> Bottleneck | JpegInput:
        """What makes strings of images."""
        found = self.module if self.split is None else self.module.get_submodule(self.split.at)
        assert isinstance(found, Bottleneck | JpegInput)
        return found

    def extras(self) -> dict[str, Any]:
        return {"jpeg": self.quality} if self.split is None else {"split": self.split.model_dump(mode="json")}

    def write_weights(self, folder: Path) -> None:
        super().write_weights(folder)
        if isinstance(self.bottleneck, Bottleneck) and isinstance(self.bottleneck.code, LearnedCode):
            from safetensors.torch import save_file

            with atomic_write(folder / TABLES) as temporary:
                save_file(self.bottleneck.code.extra_tensors(), str(temporary))

    @classmethod
    def rebuilt(cls, meta: Mapping[str, Any], spec: ModelSpec, task: Task, folder: Path) -> SplitStudent:
        from safetensors.torch import load_file

        module = task.build(spec)
        if "split" not in meta:
            coded = JpegInput(module, task, meta["jpeg"])
            load_weights(coded, task.weights_file(folder), owner=f"model {spec.model}")
            return cls(coded.eval(), spec, task, quality=meta["jpeg"])
        split = Split.model_validate(meta["split"])
        bottleneck = split.applied(module)
        load_weights(module, task.weights_file(folder), owner=f"model {spec.model}")
        if isinstance(bottleneck.code, LearnedCode):
            bottleneck.code.restore(load_file(str(folder / TABLES)))
        bottleneck.freeze()
        return cls(module.eval(), spec, task, split=split)

    def export(self, to: str, path: Path) -> list[str]:
        if to != "split":
            return super().export(to, path)
        if self.split is None:
            raise UserError("A network on JPEG images is not cut, so it has no halves; export it as another format.")
        return write_halves(self.module, self.split, self.task, path)


@evaluates(SplitStudent.kind)
@torch.no_grad()
def evaluate(product: SplitStudent, run: Run) -> dict[str, float]:
    """The figures of its task; `bytes_per_image` of its strings on the same images (of JPEG without headers and tables)
    and `ideal_bytes` by the prior; with `cost`, `encode_ms` of one image and `device_parameters`."""
    figures = evaluate_student(product, run)
    bottleneck, loader = product.bottleneck, run.loader(*run.judging_data())
    device = next(product.module.parameters()).device
    count = sent = ideal = 0.0
    batch: Batch = {}
    for batch in loader:
        batch = to_device(batch, device)
        images = batch["input"]
        count += len(images)
        sent += sum(bottleneck.length(string) for string in bottleneck.encode(images))
        if isinstance(bottleneck, Bottleneck):
            code = bottleneck.code
            ideal += code.bits(code.values(code.symbols(bottleneck.encoder(images)))).sum().item() / 8
    figures["bytes_per_image"] = sent / count
    if isinstance(bottleneck, Bottleneck):
        figures["ideal_bytes"] = ideal / count
    if "cost" in getattr(run.config, "evaluate", ["cost"]):
        one = batch["input"][:1]
        figures["encode_ms"] = 1000 * cost.times_in_turns({"encode": lambda: bottleneck.encode(one)}, device)["encode"]
        if isinstance(bottleneck, Bottleneck):
            figures["device_parameters"] = cost.parameters(bottleneck.encoder)
    return figures

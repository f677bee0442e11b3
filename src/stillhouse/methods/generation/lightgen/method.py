"""LightGen: a small generator of images from captions, trained on a large one's images, then taught by preference what
they lack.

paper: LightGen: Efficient Image Generation through Knowledge Distillation and Direct Preference Optimization
venue: arXiv 2025
arxiv: 2503.08619
task: images from captions
family: data distillation, preference
use when: a generator is there (or several, or their images) and a small one is wanted, trained in hours, not months
needs: images with captions; generators are trained first, or their images are the data

1. Teachers (`teachers`, any number of denoisers) draw `synthetic.images` images of the captions that the student may
see. With `teachers: []` the data's own images are the synthetic ones.
2. The student learns them from nothing: a masked autoencoder of continuous tokens (at least 70 % masked), whose decoder
reads the caption by cross-attention, and a diffusion head that draws each token; text is left out in a tenth of the
samples. Weights are averaged, and the average is used.
3. Direct preference optimisation against what synthetic images lack, detail and places: of each caption, a real image
is preferred to one that the student drew. Both are judged by the error of the head's noise, with one mask, step and
noise for both images and for the student and its frozen copy: -log sigmoid(-beta/2 ((e_w - r_w) - (e_l - r_l))), and
`anchor` times the plain loss on the real image.

The captions are the data's class names; `captions.unseen` of them are shown to nobody. Figures: what a probe sees in
samples of all captions, and of the unseen ones (…_unseen); of captions about places, whether both things are there and
stand as wanted; `high_frequency_ratio`, the power of fine detail over that of real images. `dpo.objective: positives`
spends the same steps on the real images alone.

Preference training was not released: its loss is Diffusion-DPO's, a reconstruction, and so are its rates and the
anchor. Images are their own latents here: no autoencoder is trained, and the paper's (of Stable Diffusion 3.5) is not
read. Text features are computed once by a frozen encoder: fixed word vectors, or a model (`text.model: hf:…`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from stillhouse.config.specs import OptimizerSpec, Spec, TrainSpec
from stillhouse.data.dataset import BatchKey
from stillhouse.data.loader import Loader
from stillhouse.data.source import find_root
from stillhouse.errors import UserError
from stillhouse.evaluation.cost import parameters
from stillhouse.functional.diffusion import sample
from stillhouse.functional.pictures import normalise, unnormalise
from stillhouse.generation.config import DenoiserSpec, GenerationConfig, Prompts
from stillhouse.generation.config import SamplerSpec as TeacherSampling
from stillhouse.generation.denoising import base_model, base_stage
from stillhouse.generation.judging import PROBE, Probe
from stillhouse.generation.product import real_samples, write_grids
from stillhouse.methods.generation.lightgen.captions import (
    CaptionsSpec,
    TextSpec,
    embedded,
    high_frequency,
    place_figures,
)
from stillhouse.methods.generation.lightgen.network import (
    MaskedGenerator,
    NetworkSpec,
    SamplingSpec,
    drawn_ratio,
)
from stillhouse.methods.generation.lightgen.product import Blueprint, CaptionGenerator, drawn
from stillhouse.randomness import generator, keyed, uniforms
from stillhouse.randomness import key as keys
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch
from stillhouse.tasks.classification import Classification
from stillhouse.training.context import Progress
from stillhouse.training.module import TrainingModule

# ---- mathematics -----------------------------------------------------------------------------------------------------


def preference_loss(
    student_won: Tensor, reference_won: Tensor, student_lost: Tensor, reference_lost: Tensor, beta: float
) -> Tensor:
    """-log sigmoid(-beta/2 ((e_w - r_w) - (e_l - r_l))) of errors (B,), mean over pairs: log 2 where student and
    reference agree. Diffusion-DPO (Wallace et al., arXiv 2311.12908)."""
    won, lost = student_won.float() - reference_won.float(), student_lost.float() - reference_lost.float()
    return -F.logsigmoid(-beta / 2 * (won - lost)).mean()


# ---- the recipe ------------------------------------------------------------------------------------------------------


class SyntheticSpec(Spec):
    """What teachers draw."""

    images: int = Field(3000, ge=1, description="Over all captions that the student sees, and all teachers.")
    sampler: TeacherSampling = Field(default_factory=lambda: TeacherSampling(steps=20, guidance=2.0))
    batch: int = Field(256, ge=1, description="Images at once.")


class DPOSpec(Spec):
    """The second stage."""

    objective: Literal["dpo", "positives"] = Field(
        "dpo", description="dpo; or positives: as many steps of plain training on the real images."
    )
    pairs: int = Field(1000, ge=1, description="Pairs of a real and a drawn image of one caption.")
    beta: float = Field(200.0, gt=0)
    anchor: float = Field(0.1, ge=0, description="Weight of the plain loss on the real image.")
    train: TrainSpec = Field(
        default_factory=lambda: TrainSpec(
            epochs=10,
            batch_size=64,
            clip=3.0,
            eval_every=0,
            optimizer=OptimizerSpec(name="adamw", lr=1e-4, weight_decay=0.0),
        )
    )


class Config(GenerationConfig):
    teachers: list[DenoiserSpec] = Field(
        default_factory=lambda: [DenoiserSpec(model="stillhouse:dit")],
        description="Generators whose images the student learns; none: the data's.",
    )
    synthetic: SyntheticSpec = Field(default_factory=SyntheticSpec)
    captions: CaptionsSpec = Field(default_factory=CaptionsSpec)
    text: TextSpec = Field(default_factory=TextSpec)
    network: NetworkSpec = Field(default_factory=NetworkSpec)
    text_drop: float = Field(0.1, ge=0, lt=1, description="Share of the samples that are trained without text.")
    flip: bool = Field(False, description="Mirror images at random; not for captions about left and right.")
    train: TrainSpec = Field(
        default_factory=lambda: TrainSpec(
            epochs=40,
            batch_size=64,
            clip=3.0,
            ema=0.995,
            eval_every=0,
            optimizer=OptimizerSpec(name="adamw", lr=1e-3, weight_decay=0.02, decay="matrices", betas=[0.9, 0.95]),
        ),
        description="How the student learns the synthetic images.",
    )
    dpo: DPOSpec | None = Field(default_factory=DPOSpec, description="null: the first stage alone.")
    sampling: SamplingSpec = Field(default_factory=SamplingSpec)


TEACHER = Stage("base", "train the generators (stored, shared)")
SYNTHETIC = Stage("synthetic", "draw their images (stored, shared)")
STUDENT = Stage("student", "train the student on these images (stored, shared)")
PAIRS = Stage("pairs", "draw the student's images of captions with a real one")
DPO = Stage("dpo", "prefer real images to the student's")


# ---- training --------------------------------------------------------------------------------------------------------


class CaptionedImages:
    """Images with the numbers of their captions, in memory.

    Args:
        images: (n, C, H, W) uint8.
        labels: (n,).
        mean, std: of images in [0, 1], per channel.
        flip: mirror at random.
        others: name -> (n, C, H, W) uint8, further images of each sample.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        flip: bool = False,
        others: dict[str, Tensor] | None = None,
    ) -> None:
        self.images, self._labels, self.mean, self.std, self.flip = images, labels, mean, std, flip
        self.others = others or {}

    def __len__(self) -> int:
        return len(self.images)

    def labels(self) -> Tensor:
        """(n,) in index order."""
        return self._labels

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """A process's share of a batch: `input` (B, C, H, W), `label` and `index` (B,), and the others by name."""
        own = key.indices[key.start : key.stop]
        index = torch.from_numpy(own)
        mirrored = self.flip & (uniforms(keys(seed, "augment", key.epoch), own, 1)[:, 0] < 0.5)
        out = {name: self._seen(images[index], mirrored) for name, images in self.others.items()}
        return {"input": self._seen(self.images[index], mirrored), "label": self._labels[index], "index": index, **out}

    def _seen(self, images: Tensor, mirrored: np.ndarray) -> Tensor:
        x = normalise(images, self.mean, self.std)
        where = torch.from_numpy(mirrored)[:, None, None, None] if self.flip else None
        return x if where is None else torch.where(where, x.flip(-1), x)


class MaskedTraining(TrainingModule):
    """The first stage.

    Args:
        student: the generator.
        texts: (P, M, Dt) features of the captions.
        drop: share of the samples without text.
    """

    def __init__(self, student: MaskedGenerator, texts: Tensor, drop: float) -> None:
        super().__init__()
        self.student, self.drop = student, drop
        self.register_buffer("texts", texts, persistent=False)

    def condition(self, label: Tensor, drop: bool = True) -> Tensor:
        """What the student reads of captions (B,), some left out."""
        assert isinstance(self.texts, Tensor) and isinstance(self.student, MaskedGenerator)
        dropped = torch.rand(len(label), device=label.device) < self.drop if drop else None
        return self.student.condition(self.texts[label], dropped)

    def plain(self, x: Tensor, label: Tensor) -> Tensor:
        """The loss of images (B, C, H, W)."""
        assert isinstance(self.student, MaskedGenerator)
        network = self.student
        draws, masked = network.draws(_tokens(network, x), drawn_ratio(network.spec.least_masked))
        return network.loss(x, self.condition(label), draws, masked)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"loss": self.plain(batch["input"], batch["label"])}


class PreferenceTraining(MaskedTraining):
    """The second stage: `input` is preferred to `lost`, of the same caption.

    Args:
        student, texts: as before.
        spec: the loss.
    """

    def __init__(self, student: MaskedGenerator, texts: Tensor, drop: float, spec: DPOSpec) -> None:
        super().__init__(student, texts, drop)
        self.spec = spec
        self._reference = [copy.deepcopy(student).eval().requires_grad_(False)]  # out of the module tree

    def build(self, batch: Batch) -> None:
        self._reference[0].to(next(self.student.parameters()).device)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        assert isinstance(self.student, MaskedGenerator) and isinstance(self.texts, Tensor)
        student, reference = self.student, self._reference[0]
        won, lost, label = batch["input"], batch["lost"], batch["label"]
        if self.spec.objective == "positives":
            return {"loss": self.plain(won, label)}
        draws, masked = student.draws(_tokens(student, won), drawn_ratio(student.spec.least_masked))
        text = self.texts[label]
        student.eval()  # dropout off: both networks must be asked alike
        condition = student.condition(text)
        mine = [student.noise_error(x, condition, draws, masked) for x in (won, lost)]
        with torch.no_grad():
            condition = reference.condition(text)
            theirs = [reference.noise_error(x, condition, draws, masked) for x in (won, lost)]
        student.train()
        pair = preference_loss(mine[0], theirs[0], mine[1], theirs[1], self.spec.beta)
        terms = {"pair": pair, "won": mine[0].mean() - theirs[0].mean(), "lost": mine[1].mean() - theirs[1].mean()}
        loss = pair
        if self.spec.anchor:
            terms["anchor"] = self.plain(won, label)
            loss = loss + self.spec.anchor * terms["anchor"]
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}


def _tokens(network: MaskedGenerator, x: Tensor) -> Tensor:
    """A tensor shaped as the tokens of images."""
    return x.new_empty(len(x), network.length, network.head.channels)


# ---- the procedure ---------------------------------------------------------------------------------------------------


class LightGen(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        blueprint, _ = _blueprint(config, run)
        seen, _ = config.captions.split(len(blueprint.captions))
        if not seen:
            raise UserError("captions.unseen leaves no caption that the student sees.")
        stages = [base_stage(run, spec, config.data, TEACHER) for spec in config.teachers[:1]]
        if config.teachers:
            stages.append(SYNTHETIC.filled(does=f"draw {config.synthetic.images} images of {len(seen)} captions"))
        with torch.device("meta"):  # which costs nothing, however large it is
            count = parameters(blueprint.build())
        per_epoch = _count(config, run, seen) // config.train.batch_size
        name = f"masked generator of {count / 1e6:.2f} M parameters"
        stages += [PROBE, STUDENT.filled(steps=config.train.epochs * per_epoch, models={"student": name})]
        if config.dpo is not None:
            steps = config.dpo.train.epochs * (config.dpo.pairs // config.dpo.train.batch_size)
            stages += [PAIRS, DPO.filled(steps=steps)]
        return stages

    def run(self, config: Config, run: Run) -> CaptionGenerator:
        blueprint, texts = _blueprint(config, run)
        texts = texts.to(run.device)
        prompts = Prompts.read(config.prompts, run.data(config.data).classes)
        seen, _ = config.captions.split(len(blueprint.captions))
        student, figures = trained_student(config, run, blueprint, texts, prompts, seen)
        if config.dpo is not None:
            pairs = preference_pairs(config, run, blueprint, texts, prompts, seen, student)
            module = PreferenceTraining(student, texts, config.text_drop, config.dpo)
            loader = Loader(pairs, config.dpo.train.batch_size, seed=run.seed, shuffle=True, drop_last=True)
            figures["dpo_seconds"] = run.fit(DPO, module, loader, config.dpo.train).seconds
        kept = copy.deepcopy(student).cpu().eval().requires_grad_(True)
        product = CaptionGenerator(kept, blueprint, texts.cpu(), figures)
        _show(config, run, product, prompts)
        return product


def _blueprint(config: Config, run: Run) -> tuple[Blueprint, Tensor]:
    bundle = run.data(config.data, Classification)
    task = bundle.task
    shape = task.input_shape
    if len(shape) != 3 or shape[1] != shape[2] or not task.mean:
        raise UserError(f"Square images are generated, but samples of '{config.data.name}' have the shape {shape}.")
    captions = list(Prompts.read(config.prompts, bundle.classes).names)
    texts = embedded(captions, config.text, find_root(config.data, run.data_root))
    blueprint = Blueprint(
        network=config.network,
        sampling=config.sampling,
        text=config.text,
        text_width=texts.shape[-1],
        captions=captions,
        shape=shape,
        mean=task.mean,
        std=task.std,
    )
    return blueprint, texts


def _count(config: Config, run: Run, seen: Sequence[int]) -> int:
    return config.synthetic.images if config.teachers else len(run.data(config.data).dataset("train", train=True))


def synthetic_images(
    config: Config, run: Run, blueprint: Blueprint, prompts: Prompts, seen: Sequence[int]
) -> CaptionedImages:
    """What the teachers draw, evenly over the captions seen and the teachers."""
    spec = config.synthetic
    mean, std = blueprint.mean, blueprint.std
    per_teacher = [len(part) for part in np.array_split(np.arange(spec.images), len(config.teachers))]
    images, labels = [], []
    for number, (teacher, count) in enumerate(zip(config.teachers, per_teacher)):
        stage = Stage(TEACHER.name if number == 0 else f"{TEACHER.name}.{number}", TEACHER.does)
        denoiser = base_model(run, teacher, config.data, prompts, stage)
        label = torch.tensor(seen).repeat(-(-count // len(seen)))[:count]

        def make(denoiser: Any = denoiser, label: Tensor = label, number: int = number) -> dict[str, Tensor]:
            sampler = spec.sampler.build(denoiser.schedule, denoiser.predicts)
            parts = []
            for i, some in enumerate(label.split(spec.batch)):
                draw = generator("synthetic", number, i)
                noise = torch.randn(len(some), *blueprint.shape, generator=draw).to(run.device)
                denoise = denoiser.denoise(some.to(run.device), spec.sampler.guidance)
                with keyed("synthetic", number, i):
                    x = sample(denoise, sampler, sampler.start(noise))
                parts.append(unnormalise(x.float(), mean, std).cpu())
            return {"images": torch.cat(parts)}

        uses = {"teacher": denoiser.module, "labels": label, "synthetic": spec, "schedule": teacher.schedule}
        images.append(run.stage(f"{SYNTHETIC}.{number}", make, uses)["images"])
        labels.append(label)
    return CaptionedImages(torch.cat(images), torch.cat(labels), mean, std, config.flip)


def trained_student(
    config: Config, run: Run, blueprint: Blueprint, texts: Tensor, prompts: Prompts, seen: Sequence[int]
) -> tuple[MaskedGenerator, dict[str, float]]:
    """The student after the first stage, stored for every second one."""
    data: Any = None
    if config.teachers:
        data = synthetic_images(config, run, blueprint, prompts, seen)
        loader = Loader(data, config.train.batch_size, seed=run.seed, shuffle=True, drop_last=True)
    else:
        loader = run.loader(config.data, "train", config.train.batch_size, train=True)

    def make() -> dict[str, Any]:
        with keyed("student", run.seed):
            network = blueprint.build()
        fitted = run.fit(STUDENT, MaskedTraining(network, texts, config.text_drop), loader, config.train)
        return {"weights": state_on_cpu(network), "figures": {"train_seconds": fitted.seconds}}

    uses = {
        "images": run.data(config.data).fingerprint if data is None else data.images,
        "labels": None if data is None else data.labels(),
        "network": config.network,
        "texts": texts,
        "train": config.train,
        "drop": [config.text_drop, config.flip],
        "seed": run.seed,
    }
    held = run.stage(STUDENT, make, uses)
    network = blueprint.build()
    network.load_state_dict(held["weights"])
    return network.to(run.device), dict(held["figures"])


def preference_pairs(
    config: Config,
    run: Run,
    blueprint: Blueprint,
    texts: Tensor,
    prompts: Prompts,
    seen: Sequence[int],
    student: MaskedGenerator,
) -> CaptionedImages:
    """Real images of captions that the student sees, each with one that it draws."""
    spec, wanted = config.dpo, set(seen)
    assert spec is not None
    real, labels, count = [], [], 0
    for batch in run.loader(config.data, "train"):
        label = prompts.labels(batch["label"])
        chosen = torch.tensor([int(c) in wanted for c in label])
        real.append(unnormalise(batch["input"][chosen], blueprint.mean, blueprint.std))
        labels.append(label[chosen])
        count += len(labels[-1])
    order = torch.randperm(count, generator=generator("pairs"))[: spec.pairs]
    won, label = torch.cat(real)[order], torch.cat(labels)[order]
    if len(won) < spec.train.batch_size:
        raise UserError(f"dpo: {len(won)} real images have a caption that the student sees, fewer than a batch.")

    def make() -> dict[str, Tensor]:
        parts = []
        for i, some in enumerate(label.split(config.synthetic.batch)):
            x = drawn(student, texts[some].to(run.device), config.sampling, "pairs", run.seed, i)
            parts.append(unnormalise(x.float(), blueprint.mean, blueprint.std).cpu())
        return {"images": torch.cat(parts)}

    uses = {"student": student, "texts": texts, "labels": label, "sampling": config.sampling, "seed": run.seed}
    lost = run.stage(PAIRS, make, uses)["images"]
    return CaptionedImages(won, label, blueprint.mean, blueprint.std, config.flip, {"lost": lost})


# ---- judging ---------------------------------------------------------------------------------------------------------


def _show(config: Config, run: Run, product: CaptionGenerator, prompts: Prompts) -> None:
    """Rows of samples of the first captions, for the report."""
    module = product.module.to(run.device)
    shown = [
        drawn(module, t.expand(8, -1, -1).to(run.device), config.sampling, "show", i)
        for i, t in enumerate(product.texts[:8])
    ]
    real = real_samples(run, config.data, prompts)[:8]
    first = Prompts(prompts.names[:8], prompts.of_class)
    write_grids(run, product.blueprint.look, first, {"truth": real, "student": torch.stack(shown).cpu()})
    module.cpu()


@evaluates(CaptionGenerator.kind)
def evaluate(product: CaptionGenerator, run: Run) -> dict[str, float]:
    """Figures of a run's generator: what the probe sees in samples of all captions, those of captions about places, the
    same of unseen captions, and how much fine detail there is."""
    config = run.config
    assert isinstance(config, Config)
    probe, names = Probe(run, config), product.blueprint.captions
    module, count = product.module.to(run.device), config.judge.samples
    label = torch.arange(len(names)).repeat_interleave(count)
    try:
        parts = []
        for i, some in enumerate(label.split(config.judge.batch)):
            text = product.texts[some].to(run.device)
            parts.append(drawn(module, text, config.sampling, "judge", config.judge.seed, i).cpu())
        pictures = unnormalise(torch.cat(parts), product.blueprint.mean, product.blueprint.std)
        samples = normalise(pictures, product.blueprint.mean, product.blueprint.std)
        figures = probe.figures(samples.unflatten(0, (len(names), count)))
        found = probe.prompts.labels(probe.see(samples).classes)
        real = torch.cat([batch["input"] for batch in islice(run.loader(config.data, "train"), 16)])
    finally:
        probe.close()
    figures["high_frequency_ratio"] = high_frequency(samples) / high_frequency(real[:4096])
    figures["high_frequency_gap"] = abs(figures["high_frequency_ratio"] - 1)
    wanted, seen = [names[i] for i in label.tolist()], [names[i] if i >= 0 else "" for i in found.tolist()]
    figures |= place_figures(wanted, seen)
    unseen = set(config.captions.split(len(names))[1])
    rows = [i for i, n in enumerate(label.tolist()) if n in unseen]
    if rows:
        right = (found == label)[rows]
        figures["prompt_accuracy_unseen"] = float(right.double().mean())
        places = place_figures([wanted[i] for i in rows], [seen[i] for i in rows])
        figures |= {f"{name}_unseen": value for name, value in places.items()}
    return {**figures, "probe_accuracy": probe.accuracy, "parameters": float(parameters(module))}

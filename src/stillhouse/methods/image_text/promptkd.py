"""PromptKD: a small CLIP learns a domain from images without labels, by prompts in its image half and a projector that
points at the class vectors of a large teacher.

paper: PromptKD: Unsupervised Prompt Distillation for Vision-Language Models
venue: CVPR 2024
arxiv: 2403.02781
task: classification by class names
family: logits, prompts
use when: a CLIP is to be adapted to a domain whose images have no labels, and a larger one knows the domain better
needs: a CLIP as the student, a teacher that embeds images and texts, images of the domain of all classes

The class vectors of the teacher are computed once and stored with the student, whose text half is not used. Deep visual
prompts are put after the patches (without positions), and again before each of the first `depth` layers; a projector
(linear, batch norm, ReLU, linear) maps the student's embedding, not yet normalised, to the teacher's width. The loss is
`kd_weight` * T^2 * KL of the class probabilities; `reduction: numel` divides by images times classes as the released
code does, hence its weight of 1000, so that the rate depends on the number of classes; `batchmean` divides by images.
No labels, no other loss; the student's own weights and scale do not move. With `adapt` the teacher is adapted first,
with prompts in both halves (PromptSRC: cross-entropy on few labelled images of base classes, L1 distances of prompted
from unprompted text and image embeddings, KL of their scores, and a Gaussian-weighted mean of the prompts over epochs);
that needs a CLIP of transformers or stillhouse:clip. Without it the teacher is as it comes, which the card calls an
acceptable minimum. `adapt.data` from another data set is the cross-data form. Images of the classes in `new` are used
without labels, so that this is transductive: inductive methods see none of them. Figures: accuracy over all classes;
base and new classes each among themselves, and their harmonic mean; the same accuracy of the teacher and of the student
before. The last weights are the product, or the best by train.best, on data of your choice; the released code chooses
on base test images. Baselines: `source: self` (the student's own zero-shot answers are its labels), `prompts: 0` (the
projector alone), `projector: false` (prompts alone, for equal widths), `vectors: student` (its own texts). The captions
of its recipe are written from class labels and masks: what its networks learn is class names, not language.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, DataSpec, MethodConfig, ModelSpec, Spec, Teacher, TrainSpec
from stillhouse.data import Loader
from stillhouse.data.split import balanced
from stillhouse.data.subset import Subset
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError, unknown
from stillhouse.evaluation.image_text import base_and_new
from stillhouse.functional.pictures import renormalise
from stillhouse.functional.precision import full_precision
from stillhouse.models.clip import Clip, as_clip, shape_of
from stillhouse.models.image_text import prompt_ids, prompt_words
from stillhouse.models.weights import load_weights
from stillhouse.nn.clip import ImageEncoder
from stillhouse.randomness import keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.judging import check_groups, evaluate
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, Signals, evaluating, to_device
from stillhouse.tasks.base import Task
from stillhouse.tasks.classification import Classification
from stillhouse.tasks.image_text import ImageText
from stillhouse.training.context import Context, Progress
from stillhouse.training.module import TrainingModule

Reduction = Literal["numel", "batchmean"]
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]

# ---- the mathematics -------------------------------------------------------------------------------------------------


@full_precision
def prompt_distillation_loss(
    student: Tensor, teacher: Tensor, weight: float = 1000.0, temperature: float = 1.0, reduction: Reduction = "numel"
) -> Tensor:
    """weight * T^2 * KL(teacher || student) of logits (B, C), over images and classes (numel) or images (batchmean)."""
    mine, theirs = (z.log_softmax(-1) for z in (student / temperature, teacher.detach() / temperature))
    total = F.kl_div(mine, theirs, reduction="sum", log_target=True) * temperature**2
    return weight * total / (student.numel() if reduction == "numel" else len(student))


def projector(width: int, dim: int) -> nn.Sequential:
    """From the student's embedding (B, width) to the teacher's (B, dim)."""
    return nn.Sequential(nn.Linear(width, dim), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, dim))


class PromptedStudent(nn.Module):
    """An image half of CLIP with deep prompts and a projector, classified by stored class vectors.

    Args:
        image: the image half, which is not trained.
        vectors: (C, d) unit class vectors, in the order of the classes.
        scale: what cosines are multiplied by.
        depth, tokens: how many layers have prompts, and how many each.
        project: whether there is a projector; without one the widths must be equal.
        given, own: normalisation of the images that come, and of those that the image half was trained on.

    Raises:
        UserError: more prompted layers than there are, or widths that differ without a projector.
    """

    vectors: Tensor
    scale: Tensor

    def __init__(
        self,
        image: ImageEncoder,
        vectors: Tensor,
        scale: float,
        depth: int = 9,
        tokens: int = 4,
        project: bool = True,
        given: Normalisation = ((), ()),
        own: Normalisation = ((), ()),
    ) -> None:
        super().__init__()
        width, layers = image.encoder.shape.width, len(image.encoder.layers)
        depth = depth if tokens else 0
        if depth > layers:
            raise UserError(f"promptkd: depth is {depth}, but the student's image half has {layers} layers.")
        dim = image.projection.out_features
        if not project and dim != vectors.shape[1]:
            raise UserError(
                f"promptkd: without a projector the student embeds into {dim} dimensions, but the class vectors have "
                f"{vectors.shape[1]}."
            )
        self.image, self._given, self._own = image, given, own
        self.prompts = nn.ParameterList(0.02 * torch.randn(tokens, width) for _ in range(depth))
        self.project: nn.Module = projector(dim, vectors.shape[1]) if project else nn.Identity()
        self.register_buffer("vectors", vectors)
        self.register_buffer("scale", torch.tensor(float(scale)))
        image.requires_grad_(False)

    def train(self, mode: bool = True) -> PromptedStudent:
        """As `nn.Module.train`; the image half stays in evaluation mode."""
        super().train(mode)
        self.image.eval()
        return self

    def embed(self, images: Tensor) -> Tensor:
        """(B, d) unit embeddings in the teacher's space."""
        x = renormalise(images, self._given, self._own)
        return F.normalize(self.project(self.image(x, prompts=list(self.prompts))), dim=-1)

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * self.embed(images) @ self.vectors.T


class PromptTraining(TrainingModule):
    """Distillation of class probabilities on images without labels.

    Args:
        student: with its prompts.
        teacher: gives `logits` over the same classes; None: the student's own answers without prompts are its labels.
        weight, temperature, reduction: of the loss.
    """

    student: PromptedStudent

    def __init__(
        self,
        student: PromptedStudent,
        teacher: Any,
        weight: float = 1000.0,
        temperature: float = 1.0,
        reduction: Reduction = "numel",
    ) -> None:
        super().__init__()
        self.student, self._teacher = student, [teacher]
        self._loss = (weight, temperature, reduction)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        images = batch["input"]
        logits = self.student(images)
        if self._teacher[0] is not None:
            theirs = self._teacher[0]({"input": images}).require("logits")
            return {"loss": prompt_distillation_loss(logits, theirs, *self._loss)}
        with torch.no_grad():
            plain = F.normalize(self.student.image(renormalise(images, self.student._given, self.student._own)), dim=-1)
            label = (plain @ self.student.vectors.T).argmax(-1)
        return {"loss": F.cross_entropy(logits, label)}

    def read_student(self, batch: Batch) -> Signals:
        return Signals(logits=self.student(batch["input"]))


# ---- the teacher's own prompts (PromptSRC) ---------------------------------------------------------------------------


class PromptedTeacher(nn.Module):
    """A CLIP with deep prompts in both halves, for a list of classes.

    Args:
        clip: the network, which is not trained.
        task: its tokenizer.
        names: of the classes.
        depth, tokens: how many layers have prompts, and how many each.
    """

    ids: Tensor
    ends: Tensor

    def __init__(self, clip: Clip, task: ImageText, names: Sequence[str], depth: int, tokens: int) -> None:
        super().__init__()
        self.clip, self.tokens = clip.requires_grad_(False), tokens
        for name, encoder in clip.encoders.items():
            if depth > len(encoder.layers):
                raise UserError(
                    f"promptkd: adapt.depth is {depth}, but the teacher's {name} half has {len(encoder.layers)}."
                )
        self.visual = nn.ParameterList(0.02 * torch.randn(tokens, clip.image.encoder.shape.width) for _ in range(depth))
        width = clip.text.encoder.shape.width
        self.text = nn.ParameterList(0.02 * torch.randn(tokens, width) for _ in range(depth))
        if depth:
            with torch.no_grad():
                self.text[0].copy_(clip.text.tokens(prompt_words(task.tokenizer, tokens)))
        ids, ends = prompt_ids(task.tokenizer, names, tokens, task.context)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("ends", ends, persistent=False)

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.clip.logit_scale

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        found: Tensor = self.clip.image(pixel_values, prompts=list(self.visual))
        return found

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.clip.get_text_features(input_ids, attention_mask)

    def vectors(self) -> Tensor:
        """(C, d) unit class vectors under the prompts."""
        embedded = self.clip.text.tokens(self.ids)
        return F.normalize(self.clip.text.from_embedded(embedded, self.ends, prompts=list(self.text)), dim=-1)


class AdaptTraining(TrainingModule):
    """PromptSRC: few labelled images of base classes, and consistency with the network without prompts.

    Args:
        student: the prompted teacher.
        plain: (C, d) unit class vectors without prompts.
        text_weight, image_weight: of the L1 distances.
        mean, std: of the Gaussian by which the prompts of the epochs are averaged, in epochs.
    """

    student: PromptedTeacher
    plain: Tensor

    def __init__(
        self,
        student: PromptedTeacher,
        plain: Tensor,
        text_weight: float = 25.0,
        image_weight: float = 10.0,
        mean: float = 15.0,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("plain", plain)
        self._weights, self._gaussian = (text_weight, image_weight), (mean, std)
        for i, p in enumerate(self._prompts()):
            self.register_buffer(f"sum{i}", torch.zeros_like(p))
        self.register_buffer("total", torch.zeros(()))

    def _prompts(self) -> list[nn.Parameter]:
        return [*self.student.visual, *self.student.text]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        images, labels = batch["input"], batch["label"]
        net = self.student
        vectors, scale = net.vectors(), net.logit_scale.exp()
        image = F.normalize(net.get_image_features(images), dim=-1)
        with torch.no_grad():
            still = F.normalize(net.clip.get_image_features(images), dim=-1)
            theirs = (scale * still @ self.plain.T).log_softmax(-1)
        logits = scale * image @ vectors.T
        terms = {
            "ce": F.cross_entropy(logits, labels),
            "text": self._weights[0] * F.l1_loss(vectors, self.plain),
            "image": self._weights[1] * F.l1_loss(image, still),
            "scores": F.kl_div(logits.log_softmax(-1), theirs, reduction="sum", log_target=True) / logits.numel(),
        }
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def begin_epoch(self, ctx: Context) -> None:
        if ctx.progress.epoch:
            self._take(ctx.progress.epoch)

    @torch.no_grad()
    def _take(self, epoch: int) -> None:
        """Add the prompts after `epoch` epochs to the weighted mean."""
        mean, std = self._gaussian
        weight = math.exp(-((epoch - mean) ** 2) / (2 * std**2)) + 1e-12
        for i, p in enumerate(self._prompts()):
            self.get_buffer(f"sum{i}").add_(p, alpha=weight)
        self.get_buffer("total").add_(weight)

    @torch.no_grad()
    def finish(self, epochs: int) -> None:
        """Put the weighted mean into the prompts."""
        self._take(epochs)
        for i, p in enumerate(self._prompts()):
            p.copy_(self.get_buffer(f"sum{i}") / self.get_buffer("total"))


# ---- the recipe ------------------------------------------------------------------------------------------------------


class Adapt(Spec):
    """How the teacher is adapted to the domain with prompts, on labelled images of base classes."""

    data: Data | None = Field(None, description="Labelled images; default: those of the domain.")
    shots: int = Field(16, ge=1, description="Labelled images a class.")
    depth: int = Field(9, ge=1)
    tokens: int = Field(4, ge=1)
    text_weight: float = Field(25.0, ge=0)
    image_weight: float = Field(10.0, ge=0)
    mean: float = Field(0.75, ge=0, le=1, description="Where the Gaussian over epochs has its middle, a share of them.")
    std: float = Field(0.05, gt=0, description="Its width, likewise.")
    train: TrainSpec = Field(default_factory=TrainSpec)


class Config(MethodConfig):
    data: Data = Field(description="Images of the domain; their labels are read by figures alone.")
    new: list[str] = Field(default_factory=list, description="Classes, by name, of which the teacher saw no labels.")
    teacher: Teacher
    student: Teacher = Field(description="A CLIP, trained or published, whose image half is adapted.")
    adapt: Adapt | None = None
    source: Literal["teacher", "self"] = "teacher"
    vectors: Literal["teacher", "student"] = Field("teacher", description="Whose class vectors are used.")
    depth: int = Field(9, ge=0, description="Layers with prompts.")
    prompts: int = Field(4, ge=0, description="Prompts of each.")
    projector: bool = True
    kd_weight: float = Field(1000.0, gt=0)
    temperature: float = Field(1.0, gt=0)
    reduction: Reduction = "numel"
    train: TrainSpec = Field(default_factory=TrainSpec)
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])

    @model_validator(mode="after")
    def _something_learns(self) -> Config:
        if not self.projector and not (self.prompts and self.depth):
            raise ValueError("without prompts and without projector there is nothing to learn")
        if self.source == "self" and (self.projector or self.vectors == "teacher"):
            raise ValueError("source: self needs vectors: student and projector: false")
        return self


NETWORKS = Stage("teacher", "train the teacher and the student's CLIP (stored, shared)")
ADAPT = Stage("adapt", "adapt the teacher with prompts in both halves (stored, shared)")
STUDENT = Stage("student", "train prompts and projector on images without labels")


class PromptKD(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data, Classification)
        check_groups(bundle.task, config.evaluate)
        _ids(config.new, bundle.classes)
        stages = [NETWORKS] if config.teacher.train or config.student.train else []
        if config.adapt is not None:
            stages.append(ADAPT)
        steps = config.train.epochs * len(run.loader(config.data, "train", config.train.batch_size, train=True))
        return [*stages, STUDENT.filled(steps=steps)]

    def run(self, config: Config, run: Run) -> PromptedProduct:
        bundle = run.data(config.data, Classification)
        names = bundle.classes
        teacher = run.teacher("teacher", config.teacher, config.data)
        if not isinstance(teacher, FrozenTeacher) or not isinstance(teacher.task, ImageText):
            raise UserError("promptkd: the teacher must embed images and texts: give it data such as captions:cifar10.")
        if config.adapt is not None:
            teacher = self.adapted(config, config.adapt, run, teacher, names)
        assert isinstance(teacher.task, ImageText) and teacher.task.vectors is not None
        owner = config.student.data or config.data
        its = run.data(owner, ImageText).task
        clip = as_clip(run.network("student", config.student, config.data)).to(run.device)
        own = its.class_vectors(clip, names)
        vectors = teacher.task.vectors if config.vectors == "teacher" else own
        scale = clip.logit_scale.exp().item()
        facts = (bundle.task.normalisation, its.normalisation)
        with keyed("prompts", run.seed):
            student = PromptedStudent(
                clip.image, vectors.cpu(), scale, config.depth, config.prompts, config.projector, *facts
            )
        source = teacher if config.source == "teacher" else None
        module = PromptTraining(student, source, config.kd_weight, config.temperature, config.reduction)
        teacher.to(run.device)
        teacher.attach(set(), {"input": torch.zeros(2, *bundle.input_shape, device=run.device)}, student)
        loader = run.loader(config.data, "train", config.train.batch_size, train=True)
        fitted = run.fit(str(STUDENT), module, loader, config.train, evaluate=run.validating(config.data))
        figures = {"train_seconds": fitted.seconds}
        figures |= self.compared(config, run, student, teacher, own)
        run.record["weights"] = {"teacher": teacher.fingerprint()}
        shape = PromptShape(
            depth=len(student.prompts),
            tokens=config.prompts,
            project=config.projector,
            dim=vectors.shape[1],
            given=bundle.task.normalisation,
            own=its.normalisation,
        )
        plain = run.student(
            student.eval(), ModelSpec(model="stillhouse:clip", options=clip.options), config.data, figures
        )
        return PromptedProduct(plain.module, plain.model, plain.task, plain.figures, shape)

    def compared(
        self, config: Config, run: Run, student: PromptedStudent, teacher: FrozenTeacher, own: Tensor
    ) -> dict[str, float]:
        """Accuracy on base and on new classes, and over all of them that of the teacher and of the student before."""
        student = student.to(run.device)
        new = _ids(config.new, run.data(config.data).classes)
        rows: dict[str, list[Tensor]] = {"student": [], "teacher": [], "before": [], "label": []}
        spec, split = run.judging_data()
        with evaluating(student):
            for batch in run.loader(spec, split):
                batch = to_device(batch, run.device)
                x = batch["input"]
                plain = F.normalize(student.image(renormalise(x, student._given, student._own)), dim=-1)
                rows["student"].append(student(x))
                rows["teacher"].append(teacher({"input": x}).require("logits"))
                rows["before"].append(plain @ own.to(x.device).T)
                rows["label"].append(batch["label"])
        found = {k: torch.cat(v).cpu() for k, v in rows.items()}
        label = found["label"]
        out = {}
        for name in ("teacher", "before"):
            out[f"accuracy_{name}"] = float((found[name].argmax(-1) == label).double().mean())
        if new:
            out |= base_and_new(found["student"], label, new)
            for name in ("teacher", "before"):
                out[f"accuracy_new_{name}"] = base_and_new(found[name], label, new)["accuracy_new"]
        return out

    def adapted(
        self, config: Config, adapt: Adapt, run: Run, teacher: FrozenTeacher, names: list[str]
    ) -> FrozenTeacher:
        """The teacher with prompts, trained on few labelled images of base classes, with class vectors for all."""
        assert isinstance(teacher.task, ImageText)
        clip, task = as_clip(teacher.model).to(run.device), teacher.task
        spec = adapt.data or config.data
        labelled = run.data(spec, Classification)
        base = [c for c in labelled.classes if c not in config.new]
        prepare = teacher.readers()[0].prepare

        def make() -> dict[str, Any]:
            with keyed("adapt", run.seed):
                net = PromptedTeacher(clip, task, base, adapt.depth, adapt.tokens)
            plain = task.class_vectors(clip, base)
            epochs = adapt.train.epochs
            gaussian = (adapt.mean * epochs, max(adapt.std * epochs, 0.5))
            module = AdaptTraining(net, plain, adapt.text_weight, adapt.image_weight, *gaussian)
            loader = few_shots(labelled, spec, adapt, base, run.seed, prepare)
            run.fit(str(ADAPT), module, loader, adapt.train)
            module.finish(epochs)
            prompts = {k: v for k, v in state_on_cpu(net).items() if not k.startswith("clip.")}
            return {"prompts": prompts}

        uses = {
            "teacher": teacher,
            "data": labelled,
            "augment": spec.model_dump(mode="json", include={"augment", "image_size"}),
            "adapt": adapt,
            "base": base,
            "seed": run.seed,
        }
        found = run.stage(ADAPT, make, uses)
        net = PromptedTeacher(clip, task, names, adapt.depth, adapt.tokens)
        net.load_state_dict(found["prompts"], strict=False)
        net.to(run.device)
        with evaluating(net):
            vectors = net.vectors()
        return FrozenTeacher(net, task=replace(task, vectors=vectors), prepare=prepare)


class _Prepared:
    """A data set whose labels are those of chosen classes, and whose images are another network's."""

    def __init__(self, dataset: Any, ids: list[int], prepare: Any) -> None:
        self._dataset, self._prepare = dataset, prepare
        self._new = torch.full((max(ids) + 1,), -1)
        self._new[ids] = torch.arange(len(ids))

    def __len__(self) -> int:
        return len(self._dataset)

    def labels(self) -> Tensor:
        return self._new[self._dataset.labels()]

    def batch(self, key: Any, seed: int) -> Batch:
        batch = self._dataset.batch(key, seed)
        batch = {**batch, "label": self._new[batch["label"]]}
        return batch if self._prepare is None else self._prepare(batch)


def few_shots(bundle: Any, spec: DataSpec, adapt: Adapt, base: list[str], seed: int, prepare: Any) -> Loader:
    """Training batches of `shots` images of each base class, the same for a seed of the data, as the teacher sees
    them."""
    dataset = bundle.dataset("train", train=True)
    labels = dataset.labels().numpy()
    ids = [bundle.classes.index(c) for c in base]
    inside = np.flatnonzero(np.isin(labels, ids))
    chosen = inside[balanced(labels[inside], min(adapt.shots * len(ids), len(inside)), spec.seed, "shots")]
    few = _Prepared(Subset(dataset, chosen), ids, prepare)
    return Loader(few, min(adapt.train.batch_size, len(chosen)), seed=seed, shuffle=True, drop_last=True)


def _ids(new: Sequence[str], classes: Sequence[str]) -> list[int]:
    wrong = next((n for n in new if n not in classes), None)
    if wrong is not None:
        raise unknown("class in new,", wrong, list(classes))
    return [list(classes).index(n) for n in new]


# ---- the product -----------------------------------------------------------------------------------------------------


class PromptShape(Spec):
    """How a product's student is built again."""

    depth: int = 0
    tokens: int = 0
    project: bool = True
    dim: int = 1
    given: Normalisation = ((), ())
    own: Normalisation = ((), ())


@dataclass
class PromptedProduct(Student):
    """An image half of CLIP with prompts, a projector and class vectors.

    Attributes:
        shape: how it is built again.
    """

    kind: ClassVar[str] = "stillhouse.methods.image_text.promptkd:PromptedProduct"
    shape: PromptShape = field(default_factory=PromptShape)

    def extras(self) -> dict[str, Any]:
        return {"prompts": self.shape.model_dump(mode="json")}

    @classmethod
    def rebuilt(cls, meta: Mapping[str, Any], spec: ModelSpec, task: Task, folder: Path) -> PromptedProduct:
        assert isinstance(task, Classification)
        shape, options = PromptShape.model_validate(meta["prompts"]), spec.options
        vision = {k: v for k, v in options["vision"].items() if k != "patch"}
        channels, size = task.input_shape[0], task.input_shape[1]
        image = ImageEncoder(shape_of(vision, "vision"), size, options["vision"]["patch"], options["dim"], channels)
        vectors = torch.zeros(len(task.classes), shape.dim)
        module = PromptedStudent(image, vectors, 1.0, shape.depth, shape.tokens, shape.project, shape.given, shape.own)
        load_weights(module, task.weights_file(folder), owner=f"model {spec.model}")
        return cls(module.eval(), spec, task, shape=shape)


evaluates(PromptedProduct.kind)(evaluate)

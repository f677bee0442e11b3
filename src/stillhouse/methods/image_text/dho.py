"""DHO: a student with one head for few labels and another for a vision-language teacher, mixed when it is used.

paper: Simple yet Effective Semi-supervised Knowledge Distillation from Vision-Language Models via Dual-Head
    Optimization
venue: preprint 2025
arxiv: 2505.07675
task: classification
family: logits, semi-supervised
use when: few images are labelled, many are not, and a teacher knows the classes by name but is often wrong
needs: a teacher of class probabilities (one that embeds images and texts knows classes by their names), labelled and
    unlabelled images, and a validation split for the search

The head of the labels sees only labels, the head of the teacher only the teacher; the backbone gets both gradients. The
loss is ce_weight * CE of the labelled images + kd_weight * (KL of the labelled + KL of the unlabelled batch, each with
its own mean, at temperature 2 times its square). Labelled and unlabelled images go through the student in one forward
pass, so that batch normalisation sees both (`joint: false` is the released script for small data sets, which makes
two). An epoch is one pass over the longer of the two streams; the other is cycled. The answer is alpha * softmax(CE
head) + (1 - alpha) * softmax(KD head / beta); alpha and beta are searched on the validation split after each judged
epoch, where there is one, and are 0.5 each without. (The released ImageNet script searches on test data; this does
not.) With `embedder` in the place of `student`, the student is the image half of a network that embeds images and
texts: then the heads begin as its own class vectors, and the teacher's head reads the unit embedding times 100, its
bias times 100 too. `heads: single` is the baseline with both losses on one head. Figures: the accuracy of each head
alone, alpha and beta, and `gradient_cosine`, the mean cosine over training between the gradients of the two losses by
the features of the labelled images. Not offered: the few-shot teacher of Tip-Adapter-F; and the paper's low-shot
schedule, whose two chained schedulers let the rate rise again at the end, is a warm-up and a cosine here. The captions
of its recipe are written from class labels and masks: what its networks learn is class names, not language.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, MethodConfig, Model, ModelSpec, Spec, Teacher, TrainSpec
from stillhouse.data import Loader
from stillhouse.errors import UserError
from stillhouse.functional.labels import check_range
from stillhouse.functional.precision import full_precision
from stillhouse.methods.distillation import describe
from stillhouse.models.backbone import backbone
from stillhouse.models.image_text import ImageTower, image_tower, text_features
from stillhouse.models.tokenizer import texts_padded
from stillhouse.models.weights import load_weights
from stillhouse.randomness import keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.judging import check_groups, evaluate
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, Signals, evaluating, to_device
from stillhouse.tasks.base import Task
from stillhouse.tasks.classification import Classification
from stillhouse.tasks.image_text import ImageText
from stillhouse.training.context import Progress
from stillhouse.training.module import TrainingModule

ALPHAS = tuple(i / 20 for i in range(21))
BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)
UNSEARCHED = (0.5, 0.5)
"""alpha and beta without a validation split."""


# ---- the losses ------------------------------------------------------------------------------------------------------


@full_precision
def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """KL divergence from the teacher's class probabilities, mean over the batch, times the squared temperature.

    Args:
        student: logits (B, C).
        teacher: log-probabilities (B, C) at the temperature; detached.
    """
    mine = F.log_softmax(student / temperature, dim=-1)
    return F.kl_div(mine, teacher.detach(), reduction="batchmean", log_target=True) * temperature**2


@full_precision
def supervised_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the labelled batch, (B, C) and (B,); 0 without samples.

    Raises:
        UserError: a label that is no class.
    """
    if labels.device.type == "cpu":
        check_range("dho", labels, logits.shape[-1])
    return F.cross_entropy(logits, labels) if len(labels) else logits.sum() * 0


def mixture(ce: Tensor, kd: Tensor, alpha: float | Tensor, beta: float | Tensor) -> Tensor:
    """Class probabilities alpha * softmax(ce) + (1 - alpha) * softmax(kd / beta) of logits (B, C)."""
    return alpha * ce.softmax(-1) + (1 - alpha) * (kd / beta).softmax(-1)


def search_mixture(ce: Tensor, kd: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """The best accuracy (a fraction) on labelled samples, with the alpha and beta that reach it: the first of those
    that are equally good, beta in the outer loop.

    Args:
        ce, kd: logits (N, C) of the two heads.
        labels: (N,).
    """
    best = (-1.0, *UNSEARCHED)
    for beta in BETAS:
        for alpha in ALPHAS:
            accuracy = float((mixture(ce, kd, alpha, beta).argmax(-1) == labels).double().mean())
            if accuracy > best[0]:
                best = (accuracy, alpha, beta)
    return best


# ---- the student -----------------------------------------------------------------------------------------------------


class DualHead(nn.Module):
    """A backbone with a head for labels and a head for the teacher; called, it gives the logarithm of their mixture.

    Args:
        features: images to (B, D).
        width: D.
        classes: C.
        single: one head for both.
        unit_scale: of a student that embeds images: the teacher's head reads the unit embedding, and its output is
            multiplied by this; None: both heads are plain.

    Attributes:
        alpha, beta: of the mixture, (), buffers.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(
        self, features: nn.Module, width: int, classes: int, single: bool = False, unit_scale: float | None = None
    ) -> None:
        super().__init__()
        self.features, self.unit_scale = features, unit_scale
        self.ce = nn.Linear(width, classes)
        self.kd: nn.Linear | None = None if single else nn.Linear(width, classes)
        self.register_buffer("alpha", torch.tensor(UNSEARCHED[0]))
        self.register_buffer("beta", torch.tensor(UNSEARCHED[1]))

    def start_from(self, vectors: Tensor) -> None:
        """Begin both heads as class vectors (C, D), without bias."""
        with torch.no_grad():
            for head in (self.ce, self.kd):
                if head is not None:
                    head.weight.copy_(vectors)
                    head.bias.zero_()

    def logits(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) of the head for labels and of that for the teacher, of features (B, D)."""
        ce = self.ce(h)
        if self.kd is None:
            return ce, ce
        if self.unit_scale is None:
            return ce, self.kd(h)
        return ce, self.unit_scale * self.kd(F.normalize(h, dim=-1))

    def forward(self, images: Tensor) -> Tensor:
        ce, kd = (x.float() for x in self.logits(self.features(images)))
        return ce if self.kd is None else mixture(ce, kd, self.alpha, self.beta).clamp_min(1e-30).log()


class DualHeadTraining(TrainingModule):
    """Both losses on batches that carry unlabelled images. The teacher stays outside the module tree.

    Args:
        student: with its heads.
        teacher: of class probabilities.
        ce_weight, kd_weight, temperature: see the recipe.
        joint: one forward pass for labelled and unlabelled images.
        answers: of images without augmentation, the teacher's log-probabilities at the temperature by sample index, of
            the labelled (N, C) and of the unlabelled (M, C); None: it is asked at every step.
    """

    student: DualHead
    conflict: Tensor

    def __init__(
        self,
        student: DualHead,
        teacher: Any,
        ce_weight: float = 0.5,
        kd_weight: float = 0.5,
        temperature: float = 2.0,
        joint: bool = True,
        answers: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._answers = answers
        self.student, self._teacher = student, [teacher]
        self.ce_weight, self.kd_weight, self.temperature, self.joint = ce_weight, kd_weight, temperature, joint
        self.register_buffer("conflict", torch.zeros(2))  # sum of the cosines, and of how many steps

    @property
    def teachers(self) -> Mapping[str, Any]:
        return {"teacher": self._teacher[0]}

    def build(self, batch: Batch) -> None:
        device = next(self.student.parameters()).device
        probe = {"input": batch["input"][:2].to(device)}
        teacher = self._teacher[0].to(device)
        teacher.attach(set(), probe, self.student)
        theirs = teacher(probe).log_probs(self.temperature).shape[-1]
        if theirs != self.student.ce.out_features:
            raise UserError(f"dho: the teacher has {theirs} classes and the student {self.student.ce.out_features}.")

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        own, others, labels = batch["input"], batch["unlabelled"]["input"], batch["label"]
        images, count = torch.cat([own, others]), len(own)
        targets = self._targets(batch, images)
        if self.joint:
            h = self.student.features(images)
        else:
            h = torch.cat([self.student.features(x) for x in (own, others)])
        ce, kd = self.student.logits(h)
        terms = {"ce": supervised_loss(ce[:count], labels)}
        labelled = distillation_loss(kd[:count], targets[:count], self.temperature)
        terms["kd"] = labelled
        if len(others):
            terms["kd"] = labelled + distillation_loss(kd[count:], targets[count:], self.temperature)
        if self.training and h.requires_grad and self.ce_weight and self.kd_weight:
            terms["gradient_cosine"] = self._measured(h, terms["ce"], labelled)
        return {"loss": self.ce_weight * terms["ce"] + self.kd_weight * terms["kd"], **terms}

    def _targets(self, batch: Batch, images: Tensor) -> Tensor:
        if self._answers is not None:
            own, others = (a.to(images.device) for a in self._answers)
            self._answers = own, others
            return torch.cat([own[batch["index"]], others[batch["unlabelled"]["index"]]])
        found: Tensor = self._teacher[0]({"input": images}).log_probs(self.temperature)
        return found

    def _measured(self, h: Tensor, ce: Tensor, kd: Tensor) -> Tensor:
        """The cosine between the gradients of both losses of the labelled images by the features."""
        first, second = (torch.autograd.grad(loss, h, retain_graph=True)[0].flatten().float() for loss in (ce, kd))
        cosine = F.cosine_similarity(first, second, dim=0)
        self.conflict += torch.stack([cosine, torch.ones_like(cosine)])
        return cosine

    def read_student(self, batch: Batch) -> Signals:
        return Signals(logits=self.student(batch["input"]))


# ---- the recipe ------------------------------------------------------------------------------------------------------


class Config(MethodConfig):
    data: Data = Field(description="Labelled images (`size`), unlabelled ones, and `val` for the search.")
    teacher: Teacher = Field(
        description="Whom the KD head learns from: a classifier, or a network that embeds images and texts, which is "
        "given the names of the classes."
    )
    student: Model | None = Field(None, description="The student's backbone: any classifier, whose last layer goes.")
    embedder: Teacher | None = Field(
        None,
        description="In place of `student`: a network that embeds images and texts, with its data; its image half is "
        "the student.",
    )
    heads: Literal["dual", "single"] = Field("dual", description="single: both losses on one head, the baseline.")
    ce_weight: float = Field(0.5, ge=0)
    kd_weight: float = Field(0.5, ge=0)
    temperature: float = Field(2.0, gt=0)
    unit_scale: float = Field(100.0, gt=0, description="embedder: what the teacher's head is multiplied by.")
    joint: bool = Field(True, description="Labelled and unlabelled images in one forward pass.")
    teacher_once: bool = Field(
        False, description="Ask the teacher once for each image, not at every step; needs data.augment: plain."
    )
    train: TrainSpec = Field(default_factory=TrainSpec)
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])

    @model_validator(mode="after")
    def _one_student(self) -> Config:
        if (self.student is None) == (self.embedder is None):
            raise ValueError("give exactly one of student and embedder")
        if not self.ce_weight and not self.kd_weight:
            raise ValueError("ce_weight and kd_weight are both 0: there is nothing to learn from")
        if self.teacher_once and self.data.augment != "plain":
            raise ValueError("teacher_once needs data.augment: plain, as the teacher sees the student's crop")
        return self


TEACHER = Stage("teacher", "train the teacher (stored, shared)")
STUDENT = Stage("student", "train both heads on labelled and unlabelled images")


class DHO(Method[Config]):
    unlabelled = True

    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data, Classification)
        check_groups(bundle.task, config.evaluate)
        trained = [t for t in (config.teacher, config.embedder) if t is not None and t.train is not None]
        teachers = [TEACHER.filled(models={"teacher": str(t.model)}) for t in trained]
        models = {}
        if config.student is not None:
            models["student"] = describe(config.student.model, run.backbone(config.student, config.data))
        steps = config.train.epochs * len(run.streams(config.data, config.train.batch_size))
        return [*teachers, STUDENT.filled(models=models, steps=steps)]

    def run(self, config: Config, run: Run) -> DualHeadStudent:
        teacher = run.teacher("teacher", config.teacher, config.data)
        student, spec = self.student(config, run)
        loader = run.streams(config.data, config.train.batch_size)
        answers = asked_once(teacher, loader, config.temperature, run.device) if config.teacher_once else None
        module = DualHeadTraining(
            student, teacher, config.ce_weight, config.kd_weight, config.temperature, config.joint, answers
        )
        check = run.validation(config.data)
        if config.train.best is not None and check is None:
            raise UserError("train.best needs data to judge by: set data.val to a share above 0.")
        searched = None if check is None else lambda model, device: settle(model, config, check, device)
        fitted = run.fit("student", module, loader, config.train, evaluate=searched)
        if check is None:
            fix_mixture(student, config)
        elif config.train.best is None:
            settle(student, config, check, run.device)
        figures = {"train_seconds": fitted.seconds, **self.measured(config, run, module)}
        run.record["weights"] = {"teacher": teacher.fingerprint()}
        plain = run.student(student, spec, config.data, figures)
        shape = HeadsShape(
            single=config.heads == "single",
            unit_scale=config.unit_scale if config.embedder is not None else None,
            tower=config.embedder is not None,
        )
        return DualHeadStudent(plain.module, plain.model, plain.task, plain.figures, shape)

    def student(self, config: Config, run: Run) -> tuple[DualHead, ModelSpec]:
        """The student with its heads, and the spec of its network."""
        bundle = run.data(config.data, Classification)
        single, classes = config.heads == "single", bundle.num_classes
        if config.student is not None:
            spec, features = config.student, run.backbone(config.student, config.data)
            with keyed("heads", run.seed):
                return DualHead(features, features.width, classes, single), spec
        assert config.embedder is not None
        spec, owner = config.embedder.network, config.embedder.data or config.data
        task = run.data(owner, ImageText).task
        network = run.network("embedder", config.embedder, config.data)
        vectors = raw_vectors(network, task, bundle.classes)
        tower = ImageTower(network, torch.zeros(1, *bundle.input_shape))
        student = DualHead(tower, tower.width, classes, single, config.unit_scale)
        student.start_from(vectors)
        return student, spec

    def measured(self, config: Config, run: Run, module: DualHeadTraining) -> dict[str, float]:
        """alpha and beta, the accuracy of each head alone, and the conflict of the gradients."""
        student, found = module.student, {}
        if config.heads == "dual":
            found = {"alpha": float(student.alpha), "beta": float(student.beta)}
            data, split = run.judging_data()
            ce, kd, labels = collected(student, run.loader(data, split), run.device)
            for name, logits in (("ce", ce), ("kd", kd)):
                found[f"accuracy_{name}_head"] = float((logits.argmax(-1) == labels).double().mean())
        total, steps = module.conflict.tolist()
        return {**found, "gradient_cosine": total / steps} if steps else found


def raw_vectors(network: nn.Module, task: ImageText, names: list[str]) -> Tensor:
    """(C, D) class vectors of a student's own text half: of each class the mean over the templates, not normalised."""
    device = next(network.parameters()).device
    rows = []
    with evaluating(network):
        for name in names:
            texts = [t.format(name.replace("_", " ")) for t in task.templates]
            tokens = {k: v.to(device) for k, v in texts_padded(task.tokenizer, texts, task.context).items()}
            rows.append(text_features(network, tokens).mean(0))
    return torch.stack(rows)


def asked_once(teacher: Any, streams: Any, temperature: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """The teacher's log-probabilities of all labelled and of all unlabelled images, by sample index."""
    teacher.to(device)
    tables = []
    for stream in (streams.labelled, streams.unlabelled):
        rows = []
        for batch in Loader(stream.dataset, 256):
            batch = to_device({"input": batch["input"]}, device)
            teacher.attach(set(), batch, None)
            rows.append(teacher(batch).log_probs(temperature).cpu())
        tables.append(torch.cat(rows))
    return tables[0], tables[1]


@torch.no_grad()
def collected(student: DualHead, loader: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, C) of both heads, and labels (N,), of a whole loader, on the host."""
    rows: list[tuple[Tensor, ...]] = []
    with evaluating(student):
        for batch in loader:
            batch = to_device(batch, device)
            ce, kd = student.logits(student.features(batch["input"]))
            rows.append((ce.float().cpu(), kd.float().cpu(), batch["label"].cpu()))
    ce, kd, labels = (torch.cat(column) for column in zip(*rows))
    return ce, kd, labels


def fix_mixture(student: Any, config: Config) -> bool:
    """Set alpha where there is nothing to search: a head that does not learn has no say. Whether that is so."""
    fixed = None if config.ce_weight and config.kd_weight else float(bool(config.ce_weight))
    if fixed is not None:
        student.alpha.fill_(fixed)
        student.beta.fill_(1.0)
    return fixed is not None or config.heads == "single"


def settle(model: Any, config: Config, check: Any, device: torch.device) -> dict[str, float]:
    """Search alpha and beta on validation data, set them in the student, and give the accuracy there."""
    student = getattr(model, "module", model)
    ce, kd, labels = collected(student, check, device)
    if fix_mixture(student, config):
        alone = ce if config.ce_weight else kd
        return {"accuracy": float((alone.argmax(-1) == labels).double().mean())}
    accuracy, alpha, beta = search_mixture(ce, kd, labels)
    student.alpha.fill_(alpha)
    student.beta.fill_(beta)
    return {"accuracy": accuracy, "alpha": alpha, "beta": beta}


# ---- the product -----------------------------------------------------------------------------------------------------


class HeadsShape(Spec):
    """What a product needs, besides the network's spec, to build its student again."""

    single: bool = False
    unit_scale: float | None = None
    tower: bool = False


@dataclass
class DualHeadStudent(Student):
    """A classifier of two heads, with their mixture.

    Attributes:
        shape: how it is built again.
    """

    kind: ClassVar[str] = "stillhouse.methods.image_text.dho:DualHeadStudent"
    shape: HeadsShape = field(default_factory=HeadsShape)

    def extras(self) -> dict[str, Any]:
        return {"heads": self.shape.model_dump(mode="json")}

    @classmethod
    def rebuilt(cls, meta: Mapping[str, Any], spec: ModelSpec, task: Task, folder: Path) -> DualHeadStudent:
        assert isinstance(task, Classification)
        shape = HeadsShape.model_validate(meta["heads"])
        features = image_tower(spec, task.input_shape) if shape.tower else backbone(spec, task.input_shape)
        module = DualHead(features, features.width, len(task.classes), shape.single, shape.unit_scale)
        load_weights(module, task.weights_file(folder), owner=f"model {spec.model}")
        return cls(module.eval(), spec, task, shape=shape)


evaluates(DualHeadStudent.kind)(evaluate)

"""DeiT-LT: a vision transformer learns a long tail from a CNN that labels its strongly augmented and mixed images.

paper: DeiT-LT: Distillation Strikes Back for Vision Transformer Training on Long-Tailed Datasets
venue: CVPR 2024
arxiv: 2404.02900
task: classification
family: distillation token, long tails
use when: a vision transformer is to be trained from scratch on imbalanced images
needs: labels, a CNN teacher with the same classes (trained here if it has no weights), a ViT with a distillation token

The class token learns the labels, the distillation token the arg max of the teacher, which was trained with weak
augmentation and sees the student's strong one: its labels are often wrong, and pull the tokens apart, the one towards
the head and the other towards the tail. After a share `drw` of the epochs images are no longer mixed, labels not
smoothed, and the distillation token's cross-entropy is weighted by the effective number of each class (of the teacher's
label). The mean of both classifiers predicts. The teacher is trained with sharpness-aware minimisation (SAM, Foret et
al., arXiv 2010.01412). The authors' teacher is PaCo with SAM, which can be given as a checkpoint; here it is trained
with cross-entropy adjusted by the class priors (`balanced`), with deferred weights (`drw`) or plainly (`ce`): a choice.
Released code: without a start of re-weighting it weights from the first epoch, by an accident of syntax; here `drw:
null` never weights. Its soft branch under weights is not meaningful and is refused. `teacher.view` gives the teacher
another view than the student's, the control with clean inputs: of mixed images, its labels are then mixed as well.
`repeats` is repeated augmentation. `distillation: none` trains both tokens on the labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, DataSpec, MethodConfig, Model, TeacherSpec, TrainSpec
from stillhouse.data import Loader
from stillhouse.data.augment import mix, partners
from stillhouse.data.dataset import BatchKey
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.evaluation.classification import accuracy_by_frequency, gains_by_frequency
from stillhouse.functional import checks
from stillhouse.functional.divergences import kl_divergence
from stillhouse.functional.labels import check_label
from stillhouse.functional.precision import full_precision
from stillhouse.methods.distillation import describe
from stillhouse.processes import rank_world, share
from stillhouse.runs.judging import check_groups
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, evaluating, to_device
from stillhouse.tasks.classification import Classification
from stillhouse.training.context import Context, Progress
from stillhouse.training.module import TrainingModule

# ---- the losses ------------------------------------------------------------------------------------------------------


def effective_number_weights(counts: Tensor, beta: float = 0.9999) -> Tensor:
    """(1 - beta) / (1 - beta^n) of each class, scaled to the sum C; (C,) counts -> (C,) float32.

    Cui et al., CVPR 2019 (arXiv 1901.05555), eq. 4.

    Raises:
        UserError: a class without samples.
    """
    if not bool((counts > 0).all()):
        raise UserError(
            f"deit_lt: class {int((counts == 0).nonzero()[0])} has no training samples, so it has no weight; leave it "
            "out by data.classes."
        )
    weights = (1 - beta) / -torch.expm1(counts.double() * math.log(beta))
    return (weights * len(counts) / weights.sum()).float()


@full_precision
def hard_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy (B, C) with the teacher's labels (B,); with weights (C,), sum_b w_b nll_b / sum_b w_b. Soft labels
    (B, C) of mixed images: the plain mean."""
    return F.cross_entropy(logits, labels, weight=weights)


@full_precision
def soft_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 / (B C) sum KL(teacher || student) at temperature T; (B, C) and (B, C) -> scalar."""
    checks.same_classes("deit_lt", logits, teacher_logits)
    target = F.log_softmax(teacher_logits.detach() / temperature, -1)
    return temperature**2 * kl_divergence(logits, target, temperature) / logits.shape[-1]


@full_precision
def base_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of the class token (B, C) with labels (B,) or soft labels (B, C), which are smoothed."""
    check_label("deit_lt", labels, logits)
    return F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)


# ---- a teacher of flat minima ----------------------------------------------------------------------------------------


class SharpnessAware(TrainingModule):
    """Trains a network on long-tailed labels with SAM: the gradient at theta + rho g / ||g|| moves theta.

    Args:
        student: the network.
        counts: (C,) training samples of each class.
        loss: `balanced`, cross-entropy of z + log n; `drw`, cross-entropy that is weighted by `weights` after a share
            of the epochs; `ce`.
        rho: radius of the ascent; 0: plain training.
        drw: that share.
        weights: (C,) of the classes, for `drw`.
    """

    priors: Tensor
    weights: Tensor

    def __init__(
        self,
        student: nn.Module,
        counts: Tensor,
        loss: Literal["balanced", "drw", "ce"] = "balanced",
        rho: float = 0.05,
        drw: float = 0.8,
        weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.student, self.kind, self.rho, self.drw = student, loss, rho, drw
        self.register_buffer("priors", counts.double().log().float(), persistent=False)
        self.register_buffer(
            "weights", effective_number_weights(counts) if weights is None else weights, persistent=False
        )
        self._last: tuple[Batch, Progress] | None = None

    def loss(self, batch: Batch, progress: Progress) -> Tensor:
        """The loss at the present weights."""
        logits = self.student(batch["input"]).float()
        if self.kind == "balanced":
            logits = logits + self.priors
        late = self.kind == "drw" and progress.epoch >= round(self.drw * progress.epochs)
        return F.cross_entropy(logits, batch["label"], weight=self.weights if late else None)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        self._last = (batch, progress)
        return {"loss": self.loss(batch, progress)}

    def before_update(self, ctx: Context) -> None:
        """Replace the gradients by those at the worst point nearby; running statistics of norms do not move again."""
        if not self.rho or self._last is None:
            return
        learned = [p for p in self.student.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in learned]))
        before = [p.detach().clone() for p in learned]
        with torch.no_grad():
            for p in learned:
                p.add_(p.grad * (self.rho / (norm + 1e-12)))
                p.grad = None
        norms = [m for m in self.student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [m.momentum for m in norms]
        for m in norms:
            m.momentum = 0.0
        self.loss(*self._last).backward()
        for m, momentum in zip(norms, momenta):
            m.momentum = momentum
        with torch.no_grad():
            for p, old in zip(learned, before):
                p.copy_(old)
                if rank_world()[1] > 1 and p.grad is not None:
                    torch.distributed.all_reduce(p.grad)
                    p.grad /= rank_world()[1]
        self._last = None


# ---- the student -----------------------------------------------------------------------------------------------------


class Repeated:
    """A data set whose batches hold fewer samples, each under several augmentations: of every batch asked for, the
    first 1 / `repeats` samples come `repeats` times (Hoffer et al., CVPR 2020). An epoch so sees that share of them."""

    def __init__(self, dataset: Any, repeats: int) -> None:
        self.dataset, self.repeats = dataset, repeats

    def __len__(self) -> int:
        return len(self.dataset)

    def labels(self) -> Tensor:
        """Of the data set."""
        found: Tensor = self.dataset.labels()
        return found

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """`repeats` batches of the same samples, one after the other."""
        own = key.indices[key.start : key.stop]
        few = own[: max(len(own) // self.repeats, 1)]
        numbers = range(key.epoch * self.repeats, (key.epoch + 1) * self.repeats)
        return _joined([self.dataset.batch(BatchKey(number, few, 0, len(few)), seed) for number in numbers])


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], Mapping):
        return {name: _joined([part[name] for part in parts]) for name in parts[0]}
    return torch.cat(parts)


class DeiTLT(TrainingModule):
    """Training module of the student.

    Args:
        student: a ViT with class and distillation token.
        teacher: frozen; reads the student's mixed images, or its own view. None: both tokens learn the labels.
        weights: (C,) of the classes, after `start`.
        start: epoch, from 0, from which images are not mixed and classes weighted; None: never.
        alpha: of the distillation token's loss; the class token's has 1 - alpha.
        kind: hard or soft labels of the teacher.
        temperature: of soft labels.
        mixup, cutmix: alphas; 0 is off.
        smoothing: of the labels while images are mixed.
        weigh_labels: weight the class token's loss too.
        clean: the teacher reads unmixed images of its own, so that its labels are mixed instead.
        seed: of the mixing.

    Raises:
        UserError: a student without a distillation token, or soft labels that would be weighted.
    """

    weights: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: FrozenTeacher | None,
        weights: Tensor,
        start: int | None,
        alpha: float = 0.5,
        kind: Literal["hard", "soft"] = "hard",
        temperature: float = 1.0,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        smoothing: float = 0.1,
        weigh_labels: bool = False,
        clean: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(student, VisionTransformerDistilled):
            raise UserError(
                "deit_lt: the student must be a ViT of timm with a distillation token, such as "
                f"timm:deit_tiny_distilled_patch16_224 with options; given: {type(student).__name__}."
            )
        if kind == "soft" and start is not None:
            raise UserError("deit_lt: distillation: soft cannot be weighted by class; set drw: null, or take hard.")
        self.student, self._teacher, self.start, self.alpha, self.kind = student, [teacher], start, alpha, kind
        self.temperature, self.mixup, self.cutmix, self.smoothing = temperature, mixup, cutmix, smoothing
        self.weigh_labels, self.clean, self.seed = weigh_labels, clean, seed
        self.register_buffer("weights", weights, persistent=False)

    @property
    def teachers(self) -> Mapping[str, Any]:
        return {} if self._teacher[0] is None else {"teacher": self._teacher[0]}

    def build(self, batch: Batch) -> None:
        """Move the teacher to the student's device."""
        if self._teacher[0] is not None:
            self._teacher[0].to(next(self.student.parameters()).device)

    def mixed(self, batch: Batch, progress: Progress) -> tuple[Batch, Any]:
        """The batch with mixed images and soft labels, one share a batch; and what mixes other labels (B, C) alike."""
        x, classes = batch["input"], len(self.weights)
        label = F.one_hot(batch["label"], classes).to(x.dtype)
        other = torch.as_tensor(partners(torch.arange(len(x)).numpy(), len(x)), device=x.device)
        draw = (self.seed, "mix", progress.epoch, progress.batch, rank_world()[0])

        def blend(own: Tensor) -> Tensor:
            return mix(x, x[other], own, own[other], self.mixup, self.cutmix, draw)[1]

        images, soft = mix(x, x[other], label, label[other], self.mixup, self.cutmix, draw)
        return {**batch, "input": images, "label": soft}, blend

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        late = self.start is not None and progress.epoch >= self.start
        blend = None
        if not late and (self.mixup or self.cutmix):
            batch, blend = self.mixed(batch, progress)
        student: Any = self.student
        tokens = student.forward_features(batch["input"])
        of_class, of_token = two_logits(student, tokens)
        base = base_loss(
            of_class,
            batch["label"],
            0.0 if late else self.smoothing,
            self.weights if late and self.weigh_labels else None,
        )
        token = self._token_loss(of_token, batch, late, blend)
        cosine = F.cosine_similarity(tokens[:, 0].detach(), tokens[:, 1].detach(), eps=1e-6).mean()
        loss = (1 - self.alpha) * base + self.alpha * token
        return {"loss": loss, "labels": base, "teacher": token, "cosine": cosine}

    def _token_loss(self, logits: Tensor, batch: Batch, late: bool, blend: Any) -> Tensor:
        weights, teacher = (self.weights if late else None), self._teacher[0]
        if teacher is None:
            return base_loss(logits, batch["label"], 0.0 if late else self.smoothing, weights)
        found = teacher(batch).log_probs()
        if self.kind == "soft":
            return soft_loss(logits, found, self.temperature)
        labels = found.argmax(-1)
        if self.clean and blend is not None:
            labels = blend(F.one_hot(labels, logits.shape[-1]).to(logits.dtype))
        return hard_loss(logits, labels, weights)


def two_logits(student: VisionTransformerDistilled, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, C) of the class token and of the distillation token, from the tokens (B, 2 + L, D) after the last
    norm."""
    return student.head(student.head_drop(tokens[:, 0])), student.head_dist(student.head_drop(tokens[:, 1]))


def components(features: Tensor, share: float = 0.9) -> int:
    """How many principal components hold `share` of the variance of features (N, D)."""
    variances = torch.linalg.svdvals((features - features.mean(0)).double()).square()
    return int((variances.cumsum(0) < share * variances.sum()).sum()) + 1


@torch.no_grad()
def token_figures(
    student: VisionTransformerDistilled, loader: Any, counts: Tensor, device: torch.device
) -> dict[str, float]:
    """Accuracy of each token, by class frequency where counts (C,) are known, the mean cosine of the two, and the
    components that hold 90 % of the variance of each."""
    found: dict[str, list[Tensor]] = {"cls": [], "dist": [], "x_cls": [], "x_dist": [], "label": []}
    with evaluating(student):
        for loaded in loader:
            batch = to_device(loaded, device)
            tokens = student.forward_features(batch["input"])
            for name, logits, x in zip(("cls", "dist"), two_logits(student, tokens), (tokens[:, 0], tokens[:, 1])):
                found[name].append(logits.argmax(-1).cpu())
                found[f"x_{name}"].append(x.float().cpu())
            found["label"].append(batch["label"].cpu())
    every = {name: torch.cat(parts) for name, parts in found.items()}
    out: dict[str, float] = {}
    for name in ("cls", "dist"):
        right = every[name] == every["label"]
        figures = {"accuracy": right.double().mean().item()}
        figures |= accuracy_by_frequency(right, every["label"], counts) if len(counts) else {}
        out |= {f"{k}_{name}": v for k, v in figures.items()}
        out[f"components_{name}"] = components(every[f"x_{name}"])
    cosine = F.cosine_similarity(every["x_cls"], every["x_dist"], eps=1e-6).mean()
    if len(counts):
        head, tail = (every[name] == every["label"] for name in ("cls", "dist"))
        out |= gains_by_frequency(head, tail, every["label"], counts)
    return {**out, "token_cosine": cosine.item()}


# ---- the procedure ---------------------------------------------------------------------------------------------------


class LongTailTeacher(TeacherSpec):
    """A CNN with the data's classes; without weights it is trained first, once, on weakly augmented images."""

    loss: Literal["balanced", "drw", "ce"] = Field(
        "balanced",
        description="train: cross-entropy of logits adjusted by the log counts; weighted by class after 80 % of the "
        "epochs; or plain.",
    )
    rho: float = Field(0.05, ge=0, description="train: radius of sharpness-aware minimisation; 0 is off.")

    @model_validator(mode="after")
    def _is_a_network(self) -> LongTailTeacher:
        if self.model is None or self.store is not None:
            raise ValueError("it labels images as they are augmented and mixed, so it must be a live network: `model`")
        if self.objectives is not None or self.teacher is not None:
            raise ValueError("it is trained with `loss`; leave objectives and teacher out")
        if self.train is not None and self.rho and self.train.accumulate > 1:
            raise ValueError("rho needs the whole batch twice: set train.accumulate to 1, or rho to 0")
        return self


class Config(MethodConfig):
    data: Data
    teacher: LongTailTeacher | None = Field(None, description="The CNN; null with distillation: none.")
    student: Model = Field(description="A ViT with a distillation token, timm:deit_*_distilled_*.")
    distillation: Literal["hard", "soft", "none"] = Field(
        "hard", description="What the distillation token learns: the teacher's arg max, its probabilities, the labels."
    )
    alpha: float = Field(0.5, ge=0, le=1, description="Weight of the distillation token's loss.")
    temperature: float = Field(1.0, gt=0, description="soft: divides both logits.")
    drw: float | None = Field(
        1100 / 1200,
        gt=0,
        le=1,
        description="Share of the epochs after which classes are weighted and images no longer mixed; null: never.",
    )
    beta: float = Field(0.9999, gt=0, lt=1, description="Of the effective number of samples.")
    weigh_labels: bool = Field(False, description="Weight the class token's loss as well.")
    mixup: float = Field(0.8, ge=0, description="Mixup's alpha until then; 0 is off.")
    cutmix: float = Field(1.0, ge=0, description="CutMix's alpha until then; each batch takes one of the two.")
    smoothing: float = Field(0.1, ge=0, lt=1, description="Of the labels until then.")
    repeats: int = Field(1, ge=1, description="Augmentations of each sample in a batch; an epoch sees as many fewer.")
    train: TrainSpec = Field(default_factory=TrainSpec)
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if (self.teacher is None) != (self.distillation == "none"):
            raise ValueError("give a teacher, or set distillation: none and no teacher")
        if self.distillation == "soft" and self.drw is not None:
            raise ValueError("distillation: soft cannot be weighted by class; set drw: null, or take hard")
        if self.data.mixup or self.data.cutmix:
            raise ValueError("set mixup and cutmix at the top level, where they end with `drw`, and not in data")
        return self

    @property
    def start(self) -> int | None:
        """The first epoch with weights, from 0."""
        return None if self.drw is None else round(self.drw * self.train.epochs)

    @property
    def teacher_data(self) -> DataSpec:
        """What the teacher is trained on: its own data, or the student's under the usual weak augmentation."""
        assert self.teacher is not None
        return self.teacher.data or self.data.model_copy(update={"augment": "standard", "views": None})


TEACHER = Stage("teacher", "train the CNN on the long tail with sharpness-aware minimisation (stored, shared)")
STUDENT = Stage("student", "train the transformer; late, without mixing and with weights by class")


class DistilledLongTail(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data, Classification)
        check_groups(bundle.task, config.evaluate)
        stages = []
        if config.teacher is not None:
            model = run.model(config.teacher.network, config.teacher_data, "teacher", config.teacher.seed or 0)
            filled = {"models": {"teacher": describe(config.teacher.network.model, model)}}
            if config.teacher.train is not None:
                train = config.teacher.train
                loader = run.loader(config.teacher_data, "train", train.batch_size, train=True)
                stages.append(TEACHER.filled(**filled, steps=train.epochs * len(loader)))
        student = run.model(config.student, config.data)
        DeiTLT(student, None, torch.ones(bundle.num_classes), None)  # has it a distillation token?
        steps = config.train.epochs * len(self.loader(config, run))
        return [*stages, STUDENT.filled(models={"student": describe(config.student.model, student)}, steps=steps)]

    def loader(self, config: Config, run: Run) -> Loader:
        """The student's batches, with repeated augmentation."""
        plain: Loader = run.loader(config.data, "train", config.train.batch_size, train=True)
        if config.repeats == 1:
            return plain
        repeated = Repeated(plain.dataset, config.repeats)
        return Loader(
            repeated,
            config.train.batch_size,
            seed=run.seed,
            shuffle=True,
            drop_last=True,
            workers=config.data.workers,
            **share(),
        )

    def taught(self, config: Config, run: Run) -> FrozenTeacher | None:
        """The frozen teacher, trained first where it has no weights."""
        spec, data = config.teacher, config.data
        if spec is None:
            return None
        if spec.train is None:
            model = run.network("teacher", spec, data, as_saved=True)
        else:
            model = self._trained(config, run, spec, spec.train)
        return FrozenTeacher(model, embedding=spec.embedding, prepare=run.own_input(spec, model, data))

    def _trained(self, config: Config, run: Run, spec: LongTailTeacher, train: TrainSpec) -> nn.Module:
        data, seed = config.teacher_data, spec.seed or 0
        bundle = run.data(data)
        if bundle.classes != run.data(config.data).classes:
            raise UserError("deit_lt: teacher.data must have the classes of data, in their order.")
        model = run.model(spec.network, data, "teacher", seed)

        def make() -> dict[str, Any]:
            with run.seeded(seed):
                loader = run.loader(data, "train", train.batch_size, train=True)
                module = SharpnessAware(model, class_counts(loader, bundle.num_classes), spec.loss, spec.rho)
                run.fit(TEACHER, module, loader, train, evaluate=run.validating(data))
            test = run.loader(data, "test")
            figures = run.figures(model, data, test, next(model.parameters()).device) if bundle.has("test") else {}
            return {"weights": state_on_cpu(model), "figures": figures}

        uses = {
            "start": FrozenTeacher(model).fingerprint() if spec.pretrained or spec.checkpoint else None,
            "model": spec.network,
            "loss": spec.loss,
            "rho": spec.rho,
            "train": train,
            "data": bundle,
            "augment": data.model_dump(mode="json", include={"augment", "mixup", "cutmix", "image_size"}),
            "seed": seed,
        }
        made = run.stage(TEACHER, make, uses)
        model.load_state_dict(made["weights"])
        run.record.setdefault("teachers", {})["teacher"] = {"model": spec.model, **made["figures"]}
        return model

    def run(self, config: Config, run: Run) -> Student:
        teacher, bundle = self.taught(config, run), run.data(config.data)
        student = run.model(config.student, config.data)
        assert isinstance(student, VisionTransformerDistilled)
        loader = self.loader(config, run)
        counts = class_counts(loader, bundle.num_classes)
        module = DeiTLT(
            student,
            teacher,
            effective_number_weights(counts, config.beta),
            config.start,
            config.alpha,
            "soft" if config.distillation == "soft" else "hard",
            config.temperature,
            config.mixup,
            config.cutmix,
            config.smoothing,
            config.weigh_labels,
            clean=config.teacher is not None and config.teacher.view is not None,
            seed=run.seed,
        )
        fitted = run.fit(
            STUDENT, module, loader, config.train, evaluate=run.validating(config.data), splits=run.splits(config.data)
        )
        if teacher is not None:
            run.record["weights"] = {"teacher": teacher.fingerprint()}
        tail = torch.tensor(bundle.task.train_counts)
        device = next(student.parameters()).device
        figures = {"train_seconds": fitted.seconds}
        figures |= token_figures(student, run.loader(*run.judging_data()), tail, device)
        for name in ("accuracy", "accuracy_few"):
            if name in (made := run.record.get("teachers", {}).get("teacher", {})):
                figures[f"{name}_teacher"] = made[name]
        return run.student(student, config.student, config.data, figures)


def class_counts(loader: Loader, classes: int) -> Tensor:
    """(C,) training samples of each class."""
    return torch.bincount(loader.labels(), minlength=classes)

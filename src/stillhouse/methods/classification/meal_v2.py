"""MEAL V2: fine-tune a trained student on the averaged probabilities of several teachers, with a small discriminator,
without labels or weight decay.

paper: MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks
venue: NeurIPS 2020 workshop Beyond BackPropagation
arxiv: 2009.08453
task: classification
family: logits
use when: a trained student should gain from two or more strong teachers with the same classes
needs: teachers (one or more), and a student that is pretrained, has a checkpoint, or is trained with labels first
(`initial`)

Labels are used only in `initial`, the student's training before, where it has no weights. The paper calls the
discriminator adversarial; in the released code student and discriminator minimise the same loss in one optimiser, which
is followed; `adversarial: true` reverses the gradient to the student. The code makes the discriminator's group at rate
1e-4 but then gives it the student's rate, which is the default here (`discriminator.lr` for another). Its layers are C,
C // K, C // K // K and 2 wide, at least 1 (K = 8; choose K = 2 for ten classes); its last layer ends in a ReLU as in
the code, so its loss may rest at ln 2 = 0.693, where it does nothing. The FKD variant, in which it sees probabilities,
is `sees: probabilities`; soft labels stored per crop are not read, as teachers answer live. Mixed images (`data.cutmix:
1`, the paper's further gain) need no mixed labels, as teachers see the same image. All networks see one input size and
normalisation. The similarity loss is a cross-entropy: its least value is the teachers' entropy, not 0.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, MethodConfig, Model, Spec, Teacher, TrainSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Objective, Progress
from stillhouse.distillation.weighted import WeightedObjective
from stillhouse.errors import UserError
from stillhouse.functional import checks
from stillhouse.functional.divergences import soft_cross_entropy
from stillhouse.functional.labels import check_label, is_soft
from stillhouse.functional.precision import full_precision
from stillhouse.methods.distillation import describe
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, Signals


@full_precision
def averaged(teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The mean probabilities, which teach the student, and the mean logits, which the discriminator sees; (M, B, C) ->
    (B, C) and (B, C), constants."""
    logits = teacher_logits.detach()
    return torch.softmax(logits, dim=-1).mean(0), logits.mean(0)


class Discriminator(nn.Module):
    """Tells students' rows (B, C) from teachers': three linear layers (1x1 convolutions in the released code), each
    with a ReLU, C -> C/K -> C/K^2 -> 2.

    Args:
        classes: C.
        reduction: K; widths below 1 become 1.
    """

    def __init__(self, classes: int, reduction: int = 8) -> None:
        super().__init__()
        first = max(classes // reduction, 1)
        second = max(first // reduction, 1)
        self.conv1, self.conv2, self.conv3 = nn.Linear(classes, first), nn.Linear(first, second), nn.Linear(second, 2)

    def forward(self, rows: Tensor) -> Tensor:
        """(N, C) -> (N, 2): how much a row looks like a student's, and like a teacher's."""
        return torch.relu(self.conv3(torch.relu(self.conv2(torch.relu(self.conv1(rows))))))


@full_precision
def discriminator_loss(verdict: Tensor) -> Tensor:
    """Binary cross-entropy of the verdicts (2B, 2), the students' B rows first, the teachers' after them; mean over all
    entries."""
    target = torch.eye(2, dtype=verdict.dtype, device=verdict.device).repeat_interleave(len(verdict) // 2, dim=0)
    return F.binary_cross_entropy_with_logits(verdict, target)


class MealV2(Objective):
    """The similarity to the averaged teachers, and the discriminator.

    Args:
        hard_labels: share of the label in the target; 0 in the paper.
        discriminator: False leaves it out.
        sees: what the discriminator looks at.
        reduction: K of its widths.
        weight: of its loss.
        lr: its learning rate; default: the student's.
        adversarial: reverse its gradient to the student.
    """

    name = "meal_v2"

    def __init__(
        self,
        hard_labels: float = 0.0,
        discriminator: bool = True,
        sees: Literal["logits", "probabilities"] = "logits",
        reduction: int = 8,
        weight: float = 1.0,
        lr: float | None = None,
        adversarial: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= hard_labels <= 1:
            raise UserError(f"meal_v2: hard_labels must lie between 0 and 1; given: {hard_labels}.")
        checks.options("meal_v2", positive={"reduction": reduction}, non_negative={"weight": weight})
        self.hard_labels, self.has_discriminator, self.sees, self.reduction = (
            hard_labels,
            discriminator,
            sees,
            reduction,
        )
        self.weight, self.lr, self.adversarial = weight, lr, adversarial
        self.discriminator: Discriminator | None = None
        self.needs = frozenset({"student.logits", "teacher.logits"} | ({"label"} if hard_labels else set()))

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        if self.has_discriminator:
            self.discriminator = Discriminator(student.require("logits").shape[1], self.reduction)

    def param_groups(self) -> list[dict[str, Any]]:
        return [group | ({"lr": self.lr} if self.lr is not None else {}) for group in super().param_groups()]

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        logits = student.require("logits").float()
        members = teacher.members or (teacher,)
        known = [m.logits for m in members if m.logits is not None]
        if len(known) == len(members):
            target, seen = averaged(torch.stack(known))
        elif self.discriminator is None or self.sees == "probabilities":
            target = seen = teacher.log_probs().exp()
        else:
            raise UserError(
                f"meal_v2: the teacher '{self.teacher}' gives no logits for the discriminator to see; set sees: "
                "probabilities."
            )
        checks.same_classes("meal_v2", logits, target)
        terms = {"similarity": soft_cross_entropy(logits, self._with_labels(target, logits, batch))}
        if self.discriminator is not None:
            rows = (logits, seen) if self.sees == "logits" else (torch.softmax(logits, dim=-1), target)
            mine = (
                2 * rows[0].detach() - rows[0] if self.adversarial else rows[0]
            )  # the same value, the gradient reversed
            terms["discriminator"] = self.weight * discriminator_loss(self.discriminator(torch.cat([mine, rows[1]])))
        return terms

    def _with_labels(self, target: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        if not self.hard_labels:
            return target
        labels = batch["label"]
        check_label("meal_v2", labels, logits)
        one_hot = labels if is_soft(labels) else F.one_hot(labels, target.shape[1])
        return (1 - self.hard_labels) * target + self.hard_labels * one_hot


class DiscriminatorSpec(Spec):
    """The discriminator on final outputs."""

    sees: Literal["logits", "probabilities"] = "logits"
    reduction: int = Field(
        8, ge=1, description="K: each of its first two layers is so many times narrower than the one before."
    )
    weight: float = Field(1.0, ge=0)
    lr: float | None = Field(None, gt=0, description="Its learning rate; default: the student's.")
    adversarial: bool = Field(False, description="Reverse its gradient to the student.")


class Config(MethodConfig):
    data: Data
    teacher: Teacher = Field(description="Usually an `ensemble` of two.")
    student: Model
    initial: TrainSpec | None = Field(
        None,
        description="The student's training with labels before, stored by content; None: it has weights, or starts "
        "from scratch.",
    )
    hard_labels: float = Field(0.0, ge=0, le=1, description="Share of the label in the target; 0 in the paper.")
    discriminator: DiscriminatorSpec | None = Field(default_factory=DiscriminatorSpec)
    train: TrainSpec = Field(
        description="The fine-tuning; without weight decay unless train.optimizer.weight_decay is set."
    )
    evaluate: list[str] = Field(
        default_factory=lambda: ["accuracy", "calibration", "cost"],
        description="Groups of figures: accuracy, calibration, cost.",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_weight_decay(cls, value: Any) -> Any:
        train = value.get("train") if isinstance(value, dict) else None
        if not isinstance(train, dict) or not isinstance(train.get("optimizer", {}), dict):
            return value
        return {
            **value,
            "train": {**train, "optimizer": {"lr": 0.01, "weight_decay": 0.0, **train.get("optimizer", {})}},
        }


class MealV2Method(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        stages = []
        for member in config.teacher.ensemble or [config.teacher]:
            if member.model and member.train:
                steps = member.train.epochs * len(
                    run.loader(member.data or config.data, "train", member.train.batch_size, train=True)
                )
                network = describe(member.model, run.model(member.network, config.data, "teacher", member.seed or 0))
                stages.append(
                    Stage(
                        "teacher",
                        "train a teacher with cross-entropy (stored, shared)",
                        {"teacher": network},
                        steps=steps,
                    )
                )
        student = {"student": describe(config.student.model, run.model(config.student, config.data))}
        if config.initial is not None:
            steps = config.initial.epochs * len(run.loader(config.data, "train", config.initial.batch_size, train=True))
            stages.append(
                Stage("initial", "train the student with cross-entropy (stored, shared)", student, steps=steps)
            )
        steps = config.train.epochs * len(run.loader(config.data, "train", config.train.batch_size, train=True))
        stages.append(
            Stage("student", "fine-tune the student on the teachers' averaged probabilities", student, steps=steps)
        )
        return stages

    def run(self, config: Config, run: Run) -> Student:
        teacher = run.teacher("teacher", config.teacher, config.data)
        student = run.model(config.student, config.data)
        figures: dict[str, float] = {}
        if config.initial is not None:
            before = run.trained("initial", student, config.student, config.initial, config.data, run.seed)
            student.load_state_dict(before["weights"])
            figures = {
                f"initial_{name}": value for name, value in before["figures"].items() if name in ("accuracy", "nll")
            }
        options = {"discriminator": False} if config.discriminator is None else config.discriminator.model_dump()
        module = Distillation(
            student, teacher, [WeightedObjective(MealV2(config.hard_labels, **options), 1.0, "meal_v2")], seed=run.seed
        )
        loader = run.loader(config.data, "train", config.train.batch_size, train=True)
        fitted = run.fit(
            "student",
            module,
            loader,
            config.train,
            evaluate=run.validating(config.data),
            splits=run.splits(config.data),
        )
        module.close()
        run.record["weights"] = {"teacher": teacher.fingerprint()}
        return run.student(student, config.student, config.data, {**figures, "train_seconds": fitted.seconds})

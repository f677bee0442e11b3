"""HARD's game: the losses of augmentor and student, the balance between them, and the module that trains both in
turn."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Progress
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.functional import checks
from stillhouse.functional.divergences import kl_divergence
from stillhouse.functional.gather import gather
from stillhouse.functional.precision import full_precision
from stillhouse.objectives.ce import cross_entropy
from stillhouse.signals import Batch, call_model, read_logits
from stillhouse.training.module import TrainingModule

MOMENTUM = 0.9  # of the running mean that the balance watches


@full_precision
def disagreement(reference: Tensor, other: Tensor, temperature: float = 2.0) -> Tensor:
    """D(a || b) = T^2 KL(softmax(a / T) || softmax(b / T)), batch mean, with gradient to both. (B, C) and (B, C) ->
    scalar."""
    checks.same_classes("hard", other, reference)
    return temperature**2 * kl_divergence(other, F.log_softmax(reference / temperature, dim=-1), temperature)


def augmentor_loss(
    form: Literal["A", "B"],
    student_hard: Tensor,
    teacher_hard: Tensor,
    student_clean: Tensor,
    teacher_clean: Tensor,
    temperature: float = 2.0,
    lambda_student: float = 1.0,
    lambda_teacher: float = 3.0,
) -> Tensor:
    """What the augmentor minimises; logits (B, C) on changed and on clean images (the clean ones are detached).

    Form A: -D(t(x~) || s(x~)). Form B: -lambda_s D(s(x) || s(x~)) + lambda_t D(t(x) || t(x~)).
    """
    if form == "A":
        return -disagreement(teacher_hard, student_hard, temperature)
    moved = disagreement(student_clean.detach(), student_hard, temperature)
    kept = disagreement(teacher_clean.detach(), teacher_hard, temperature)
    return lambda_teacher * kept - lambda_student * moved


def balanced(active: Tensor, mean: Tensor, reference: Tensor, low: float, high: float) -> Tensor:
    """Whether the augmentor learns (1) or rests (0): it stops above high * reference and learns again below low *
    reference; between them nothing changes."""
    return torch.where(mean > high * reference, 0.0, torch.where(mean < low * reference, 1.0, active))


class Game(TrainingModule):
    """The training module: student and augmentor, step by step in turn. The teacher stays outside the module tree.

    Args:
        student: the model being trained.
        teacher: frozen, live.
        augmentor: images -> (changed images, penalty); None for plain distillation.
        rate: Adam's learning rate for the augmentor.
        form, temperature, lambda_student, lambda_teacher: see `augmentor_loss`.
        steps: augmentor steps before a student step.
        low, high: the balance, as shares of the untrained student's loss.
        label_weight: of the cross-entropy on clean images.
    """

    reference: Tensor
    mean: Tensor
    active: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: FrozenTeacher,
        augmentor: nn.Module | None,
        *,
        rate: float = 2e-2,
        form: Literal["A", "B"] = "B",
        temperature: float = 2.0,
        lambda_student: float = 1.0,
        lambda_teacher: float = 3.0,
        steps: int = 1,
        low: float = 0.05,
        high: float = 1.0,
        label_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.student, self.augmentor = student, augmentor
        self._teacher = [teacher]
        self.form, self.temperature, self.weights = form, temperature, (lambda_student, lambda_teacher)
        self.steps, self.low, self.high, self.label_weight = steps, low, high, label_weight
        self._learned = [] if augmentor is None else [p for p in augmentor.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self._learned, lr=rate) if self._learned else None
        for name in ("reference", "mean"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("active", torch.ones(()))
        self._teacher_clean: Tensor | None = None

    def build(self, batch: Batch) -> None:
        """Move the teacher to the student's device and compare the classes."""
        x = batch["input"][:2]
        device = next(self.student.parameters()).device
        self._teacher[0].to(device)
        mode = self.student.training
        self.student.eval()
        with torch.no_grad():
            checks.same_classes("hard", self._ask_student(x.to(device)), self._ask_teacher(x.to(device)))
        self.student.train(mode)

    def before_step(self, batch: Batch, ctx: Any) -> None:
        """The augmentor's steps."""
        if self.optimizer is None:
            return
        x = batch["input"]
        self.student.eval()
        with torch.no_grad():
            student_clean, teacher_clean = self._ask_student(x), self._ask_teacher(x)
        self._teacher_clean = teacher_clean
        for _ in range(self.steps):
            self.learn(x, student_clean, teacher_clean)
        self.student.train()

    def learn(self, x: Tensor, student_clean: Tensor, teacher_clean: Tensor) -> Tensor:
        """One step of the augmentor on L_a, which is returned; parameters of the networks get no gradient."""
        assert self.augmentor is not None and self.optimizer is not None
        changed, penalty = self.augmentor(x)
        answers = self._ask_student(changed), self._ask_teacher(changed)
        loss = (
            augmentor_loss(self.form, *answers, student_clean, teacher_clean, self.temperature, *self.weights) + penalty
        )
        gradients = torch.autograd.grad(loss, self._learned, allow_unused=True)
        before = [p.detach().clone() for p in self._learned]
        for p, g in zip(self._learned, gradients):
            p.grad = torch.zeros_like(p) if g is None else _mean_over_ranks(g) * self.active
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for p, old in zip(self._learned, before):
                p.copy_(torch.where(self.active > 0, p, old))
        return loss.detach()

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        x = batch["input"]
        changed = None
        if self.augmentor is not None:
            with torch.no_grad():
                changed = self.augmentor(x)[0].to(x.dtype)
        with torch.no_grad():
            ready, self._teacher_clean = self._teacher_clean, None
            teacher_clean = self._ask_teacher(x) if ready is None else ready
            teacher_hard = None if changed is None else self._ask_teacher(changed)
        answers = self._ask_student(x if changed is None else torch.cat([x, changed]))
        clean = disagreement(teacher_clean, answers[: len(x)], self.temperature)
        terms = {"clean": clean, "loss": clean}
        if self.label_weight:
            terms["ce"] = cross_entropy(answers[: len(x)], batch["label"])
            terms["loss"] = terms["loss"] + self.label_weight * terms["ce"]
        if teacher_hard is not None:
            terms["hard"] = disagreement(teacher_hard, answers[len(x) :], self.temperature)
            terms["loss"] = terms["loss"] + terms["hard"]
            terms["ratio"] = terms["hard"].detach() / clean.detach().clamp_min(1e-8)
            self._watch(clean.detach(), terms["hard"].detach())
            terms["active"] = self.active.clone()
        return terms

    @torch.no_grad()
    def _watch(self, clean: Tensor, hard: Tensor) -> None:
        clean, hard = gather(clean[None]).mean(), gather(hard[None]).mean()
        first = self.reference == 0
        self.reference.copy_(torch.where(first, clean, self.reference))
        self.mean.copy_(torch.where(first, hard, MOMENTUM * self.mean + (1 - MOMENTUM) * hard))
        self.active.copy_(balanced(self.active, self.mean, self.reference, self.low, self.high))

    def _ask_student(self, x: Tensor) -> Tensor:
        return read_logits(call_model(self.student, {"input": x}))

    def _ask_teacher(self, x: Tensor) -> Tensor:
        return read_logits(call_model(self._teacher[0].model, {"input": x}))

    def train(self, mode: bool = True) -> Game:
        """The augmentor's own networks (a VAE) have no other mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self._teacher[0].model.eval()
        return self

    def get_extra_state(self) -> dict[str, Any]:
        return {} if self.optimizer is None else {"optimizer": self.optimizer.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if self.optimizer is not None and "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])


def _mean_over_ranks(gradient: Tensor) -> Tensor:
    return gather(gradient[None]).mean(0)

"""PLD: the student learns the whole class order, the true class first and then the teacher's ranking, under the
Plackett-Luce model.

paper: PLD: A Choice-Theoretic List-Wise Knowledge Distillation
venue: NeurIPS 2025
arxiv: 2506.12542
task: classification
family: logits
use when: one convex loss should replace the cross-entropy and its distillation term, with no mixing weight to tune
needs: labels; teacher logits

It is the whole loss: no cross-entropy is added. The temperature acts on the teacher's weights only: 1 on ImageNet, 4
on CIFAR-100. Where the teacher is confident and wrong, the true class is hardly trained on that sample, by design;
raise the temperature for a weak teacher. Class ids only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.functional import checks
from stillhouse.functional.labels import check_label, hard_only
from stillhouse.functional.precision import full_precision
from stillhouse.functional.token_losses import NEVER
from stillhouse.signals import Batch, Signals


@full_precision
def pld_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over the batch of sum_k alpha_k l_k (eq. 8 of the paper and the listing of its appendix C).

    Args:
        student_logits, teacher_logits: (B, C); the teacher's may be log-probabilities.
        labels: class ids (B,).
        temperature: of the teacher's weights alpha; the student's logits are used as they are.

    Raises:
        UserError: shapes that do not fit, soft labels, fewer than two classes, or (on the CPU) a class id out of range.
    """
    checks.same_classes("pld", student_logits, teacher_logits)
    hard_only("pld", labels)
    check_label("pld", labels, student_logits)
    teacher_logits = teacher_logits.detach()
    ranking = pld_ranking(teacher_logits, labels)
    alpha = F.softmax(teacher_logits / temperature, dim=1).gather(1, ranking)
    return (alpha * pld_steps(student_logits, ranking)).sum(1).mean()


def pld_ranking(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """The order to learn, (B, C) class ids: the true class, then the others by falling teacher logit (ties by class
    id)."""
    first = teacher_logits.scatter(1, labels[:, None], float("inf"))
    return first.argsort(dim=1, descending=True, stable=True)


@full_precision
def pld_steps(student_logits: Tensor, ranking: Tensor) -> Tensor:
    """Negative log-likelihood of each pick in turn, (B, C) in ranking order: logsumexp over the classes left, minus the
    picked logit; the last is 0."""
    ordered = student_logits.gather(
        1, ranking.flip(1)
    )  # worst first: a cumulative sum is then a sum over the classes left
    ordered = (ordered - ordered.amax(1, keepdim=True).detach()).clamp_min(NEVER)  # a masked class is never picked
    return (torch.logcumsumexp(ordered, dim=1) - ordered).flip(1)


class PLD(Objective):
    """Plackett-Luce distillation, in the place of the cross-entropy.

    Args:
        temperature: of the teacher's weights.
    """

    name = "pld"
    needs = frozenset({"student.logits", "teacher.logits", "label"})

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        checks.options("pld", positive={"temperature": temperature})
        self.temperature = temperature

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"loss": pld_loss(student.require("logits"), teacher.log_probs(), batch["label"], self.temperature)}

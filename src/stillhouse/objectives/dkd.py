"""DKD: KD split into a target-class part and a non-target part, each with a weight of its own.

paper: Decoupled Knowledge Distillation
venue: CVPR 2022
arxiv: 2203.08679
task: classification
family: logits
use when: the teacher is confident, so that plain KD passes little on about the other classes
needs: labels; teacher logits

L = T^2 (alpha * KL of (target, rest) + beta * KL over the other classes, renormalised), with a linear warm-up over 20
epochs whose first epoch counts as 1, as in the authors' code. beta is 8 for unlike pairs of networks and 2 for pairs of
one small family. Soft labels: their largest class.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.functional import checks
from stillhouse.functional.divergences import standardise, weighed
from stillhouse.functional.labels import check_label, class_ids
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals


@full_precision
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> dict[str, Tensor]:
    """The two weighted parts of DKD (eq. 7 of the paper); their sum is the loss.

    Args:
        student_logits, teacher_logits: (B, C); the teacher's may be log-probabilities.
        labels: class ids (B,), or soft labels (B, C), of which the largest class is taken.
        alpha, beta: weights of the target and the non-target part, both times temperature^2.
        temperature: of both parts.

    Raises:
        UserError: shapes that do not fit, fewer than two classes, or (on the CPU) a class id out of range.
    """
    checks.same_classes("dkd", student_logits, teacher_logits)
    check_label("dkd", labels, student_logits)
    target = class_ids(labels)
    (binary_s, rest_s), (binary_t, rest_t) = (
        _split(z / temperature, target) for z in (student_logits, teacher_logits.detach())
    )
    scale = temperature**2 / len(target)
    return {
        "target": alpha * scale * weighed(binary_t, binary_t - binary_s).sum(),
        "non_target": beta * scale * weighed(rest_t, rest_t - rest_s).sum(),
    }


def _split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, rest), (B, 2), and of the classes but the target, (B, C), which itself has
    probability 0 and no gradient."""
    own = target[:, None]
    rest = logits.scatter(1, own, -1e30)  # finite: 0 times it is 0 in a divergence
    total = rest.logsumexp(1, keepdim=True)
    return F.log_softmax(torch.cat([logits.gather(1, own), total], dim=1), dim=1), rest - total


class DKD(Objective):
    """Decoupled knowledge distillation.

    Args:
        alpha, beta: weights of the target and the non-target part.
        temperature: of both parts.
        warmup_epochs: epochs over which the loss grows linearly to its full weight; 0: none.
        standardise: standardise both logits per row first (arXiv 2403.01427).
    """

    name = "dkd"
    needs = frozenset({"student.logits", "teacher.logits", "label"})

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        warmup_epochs: float = 20.0,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        checks.options(
            "dkd",
            positive={"temperature": temperature},
            non_negative={"alpha": alpha, "beta": beta, "warmup_epochs": warmup_epochs},
        )
        self.alpha, self.beta, self.temperature, self.warmup_epochs, self.standardise = (
            alpha,
            beta,
            temperature,
            warmup_epochs,
            standardise,
        )

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        z, v = student.require("logits"), teacher.log_probs()
        if self.standardise:
            z, v = standardise(z), standardise(v)
        warmth = min(1.0, (progress.epoch + 1) / self.warmup_epochs) if self.warmup_epochs else 1.0
        terms = dkd_loss(z, v, batch["label"], self.alpha, self.beta, self.temperature)
        return {name: warmth * term for name, term in terms.items()}

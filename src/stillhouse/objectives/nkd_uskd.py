"""NKD + USKD: cross-entropy split into target and normalised non-target parts, taught by a teacher (nkd) or by the
student's own ranking (uskd).

paper: From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and
Customized Soft Labels
venue: ICCV 2023
arxiv: 2303.13005
task: classification
family: logits
use when: a teacher exists (nkd), or none does and a gain is wanted for nearly no cost (uskd)
needs: labels; teacher logits (nkd), or a mid-level student layer and no teacher (uskd)
provides: nkd, uskd

Both are added to the ordinary cross-entropy with weight 1. Published settings: nkd temperature 1, gamma 1.5 on ImageNet
(gamma 1 for ViTs), 3 and 3.5 on CIFAR-100; uskd alpha 1, beta 0.1, mu 0.005 on ImageNet, all 0.1 on CIFAR-100. Soft
labels: nkd takes their largest class, uskd their two largest. Where paper and released code differ (the score that
ranks classes in uskd), the code is followed, and `rank_on: probabilities` is the paper. Over many processes uskd's
batch mean is that of all ranks, where the released code takes each rank's own.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.functional import checks
from stillhouse.functional.divergences import soft_cross_entropy, standardise
from stillhouse.functional.feature_maps import pooled_tap
from stillhouse.functional.gather import gather
from stillhouse.functional.labels import check_label, class_ids, is_soft, without_classes
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals


@full_precision
def nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0, gamma: float = 1.5
) -> dict[str, Tensor]:
    """The two parts of NKD (eq. 6 of the paper); their sum is the loss.

    Args:
        student_logits, teacher_logits: (B, C). The teacher's may be log-probabilities.
        labels: class ids (B,), or soft labels (B, C), of which the largest class is taken.
        temperature: of the non-target part only.
        gamma: weight of the non-target part, times temperature^2.

    Returns:
        `target`: -mean T_t log S_t. `non_target`: gamma * temperature^2 times the cross-entropy of the softmaxes over
            the other classes; its minimum
        is the teacher's entropy there, not 0. For two classes it is 0.

    Raises:
        UserError: logits or labels whose shapes do not fit, fewer than two classes, or (on the CPU) a class id out of
            range.
    """
    checks.same_classes("nkd", student_logits, teacher_logits)
    check_label("nkd", labels, student_logits)
    target = class_ids(labels)
    teacher_t = F.softmax(teacher_logits, dim=1).gather(1, target[:, None]).detach()
    student_t = F.log_softmax(student_logits, dim=1).gather(1, target[:, None])
    teacher_rest = F.softmax(without_classes(teacher_logits, target) / temperature, dim=1).detach()
    student_rest = without_classes(student_logits, target) / temperature
    return {
        "target": -(teacher_t * student_t.masked_fill(teacher_t == 0, 0.0)).mean(),
        "non_target": gamma * temperature**2 * soft_cross_entropy(student_rest, teacher_rest),
    }


@full_precision
def uskd_loss(
    student_logits: Tensor,
    weak_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    rank_on: Literal["logs", "probabilities"] = "logs",
) -> dict[str, Tensor]:
    """The three weighted parts of USKD; their sum is the loss.

    Args:
        student_logits: (B, C).
        weak_logits: (B, C), a linear layer's view of a mid-level feature of the student.
        labels: class ids (B,), or soft labels (B, C), of which the two largest classes are the targets.
        alpha, beta, mu: weights of the three parts.
        rank_on: what of the final output enters the ranking score: log-probabilities, as the released code, or
            probabilities, as the paper.

    Returns:
        `target`, `non_target` (gradients reach `student_logits` only) and `weak` (gradient reaches `weak_logits` only).

    Raises:
        UserError: shapes that do not fit, too few classes, or (on the CPU) a class id out of range.
    """
    soft = is_soft(labels)
    checks.same_classes("uskd", student_logits, weak_logits, at_least=3 if soft else 2)
    check_label("uskd", labels, student_logits)
    classes = student_logits.shape[1]
    if soft:
        value, target = labels.sort(dim=1, descending=True, stable=True)
        value, target = value[:, :2], target[:, :2]
    else:
        target = labels[:, None]
        value = torch.ones_like(target, dtype=student_logits.dtype)

    # P = S_t^2 + V - mean_b S_t^2, 0 where V = 0
    log_s = F.log_softmax(student_logits, dim=1)
    log_s_t = log_s.gather(1, target)
    square = log_s_t.detach().exp().square()
    smoothed = torch.where(value == 0, 0.0, square + value - gather(square).mean(dim=0))
    target_part = -(smoothed * log_s_t).sum(1).mean()

    one_hot = labels if soft else F.one_hot(labels, classes)
    weak_part = soft_cross_entropy(weak_logits, 0.9 * one_hot + 0.1 / classes)

    with (
        torch.no_grad()
    ):  # Zipf's law over the ranking: label 1 / rank for every class, targets included, then targets dropped
        weak = F.softmax(weak_logits, dim=1)
        final = log_s if rank_on == "logs" else log_s.exp()
        score = share_of_rest(weak, target) + share_of_rest(final, target)
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
        zipf = without_classes((1.0 / rank).masked_fill(student_logits == -math.inf, 0.0), target)
        zipf = zipf / zipf.sum(1, keepdim=True)
    non_target_part = soft_cross_entropy(without_classes(student_logits, target), zipf)
    return {"target": alpha * target_part, "non_target": beta * non_target_part, "weak": mu * weak_part}


def share_of_rest(x: Tensor, target: Tensor) -> Tensor:
    """x over what it leaves to the non-targets, x / (1 - sum_k x_tk + 1e-6); (B, C) and (B, K) ids -> (B, C)."""
    return x / (1 - x.gather(1, target).sum(1, keepdim=True) + 1e-6)


class NKD(Objective):
    """Normalised knowledge distillation.

    Args:
        temperature: of the non-target part.
        gamma: weight of the non-target part.
        standardise: standardise both logits per row first (arXiv 2403.01427).
    """

    name = "nkd"
    needs = frozenset({"student.logits", "teacher.logits", "label"})

    def __init__(self, temperature: float = 1.0, gamma: float = 1.5, standardise: bool = False) -> None:
        super().__init__()
        checks.options("nkd", positive={"temperature": temperature}, non_negative={"gamma": gamma})
        self.temperature, self.gamma, self.standardise = temperature, gamma, standardise

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        z, v = student.require("logits"), teacher.log_probs()
        if self.standardise:
            z, v = standardise(z), standardise(v)
        return nkd_loss(z, v, batch["label"], self.temperature, self.gamma)


class USKD(Objective):
    """Universal self-knowledge distillation; its linear layer is trained with the student and thrown away after.

    Args:
        alpha, beta, mu: weights of the target, non-target and weak parts.
        student_layer: the mid-level layer; a map is averaged over space, of tokens the class token is taken. For a CNN
            the last stage but one (the default), for a ViT the block in the middle.
        rank_on: what of the final output enters the ranking: `logs` as the released code, `probabilities` as the paper.
    """

    name = "uskd"

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
        student_layer: str = "stage:-2",
        rank_on: Literal["logs", "probabilities"] = "logs",
    ) -> None:
        super().__init__()
        checks.options("uskd", non_negative={"alpha": alpha, "beta": beta, "mu": mu})
        self.alpha, self.beta, self.mu, self.student_layer, self.rank_on = alpha, beta, mu, student_layer, rank_on
        self.needs = frozenset({"student.logits", f"student.tap:{student_layer}", "label"})

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        self.weak = nn.Linear(pooled_tap(student, self.student_layer).shape[1], student.require("logits").shape[1])

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        weak_logits = self.weak(pooled_tap(student, self.student_layer))
        return uskd_loss(
            student.require("logits"), weak_logits, batch["label"], self.alpha, self.beta, self.mu, self.rank_on
        )

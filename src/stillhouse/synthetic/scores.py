"""DD-Ranking (arXiv 2505.13300): scores that separate what a synthetic set owes to its images from what it owes to soft
labels and augmentation.

All accuracies are fractions in [0, 1], numbers or float64 tensors; then the scores lie in [0, 1]. (The released code
gives percents to exp, and counts the hard-label score twice; both are corrected here.)
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError, unknown
from stillhouse.functional.divergences import kl_divergence, soft_cross_entropy
from stillhouse.functional.precision import full_precision

Number = TypeVar("Number", float, Tensor)
SoftLoss = Literal["kl", "sce", "mse"]


def hard_label_recovery(real_hard: Number, synthetic_hard: Number) -> Number:
    """HLR: what training on the synthetic set with hard labels loses against all real data; smaller is better."""
    return real_hard - synthetic_hard


def improvement_over_random(synthetic: Number, random: Number) -> Number:
    """IOR: what the synthetic set gains over as many random real images under the same protocol."""
    return synthetic - random


def label_robust_score(hlr: Number, ior: Number, weight: Number | float = 0.5) -> Number:
    """LRS = (e^a - e^-1) / (e - e^-1) with a = w IOR - (1 - w) HLR: 1 where a is 1, 0 where it is -1.

    Raises `UserError` for percents.
    """
    return _normalised(weight * ior - (1 - weight) * hlr)


def augmentation_robust_score(
    synthetic_augmented: Number,
    random_augmented: Number,
    synthetic_plain: Number,
    random_plain: Number,
    weight: Number | float = 0.5,
) -> Number:
    """ARS: the same of g (gain over random with augmentation) + (1 - g) (gain without)."""
    return _normalised(
        weight * (synthetic_augmented - random_augmented) + (1 - weight) * (synthetic_plain - random_plain)
    )


def _normalised(value: Number) -> Number:
    if float(torch.as_tensor(value).abs().max()) > 1 + 1e-9:
        raise UserError(
            "DD-Ranking scores take accuracies as fractions in [0, 1]; these differ by more than 1: divide percents "
            "by 100."
        )
    low, high = math.exp(-1), math.e
    grown = value.exp() if isinstance(value, Tensor) else math.exp(value)
    return (grown - low) / (high - low)


@full_precision
def soft_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    kind: SoftLoss = "kl",
    temperature: float = 1.2,
    labels: Tensor | None = None,
    mse_weight: float = 1.0,
    ce_weight: float = 0.0,
) -> Tensor:
    """A loss to a teacher's logits (B, C), without the factor T^2: `kl` and `sce` (soft cross-entropy) at a
    temperature, or `mse` on logits plus cross-entropy to `labels` (B,).

    Raises:
        UserError: an unknown kind, or a cross-entropy without labels.
    """
    if kind == "kl":
        return kl_divergence(logits / temperature, F.log_softmax(teacher_logits / temperature, -1))
    if kind == "sce":
        return soft_cross_entropy(logits / temperature, F.softmax(teacher_logits / temperature, -1))
    if kind != "mse":
        raise unknown("loss to soft labels", kind, ("kl", "sce", "mse"))
    value = mse_weight * F.mse_loss(logits, teacher_logits)
    if not ce_weight:
        return value
    if labels is None:
        raise UserError("The loss 'mse' with ce_weight above 0 needs labels (B,).")
    return value + ce_weight * F.cross_entropy(logits, labels)

"""KD^3's mathematics: which images to select, the transfer block and the weighted alignment of features,
MixDistribution and its contrast.

Read and run in the released code (tangjialiang97/KD3: `helper/util.py`, `helper/loops.py`, `dataset/augmentation.py`,
`models/util.py`, `distiller_zoo`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional import checks
from stillhouse.functional.feature_maps import same_size
from stillhouse.functional.precision import full_precision


def teacher_share(epoch: float, until: float = 120, steepness: float = 5.0, denominator: float = 160) -> float:
    """alpha of an epoch, counted from 1 of 240: 1 - exp(-5 ((e + 1) / 160 - 1)^2) before epoch 120, then 0 (the student
    alone decides).

    >>> round(teacher_share(1), 4), round(teacher_share(119), 4), teacher_share(120)
    (0.9924, 0.2684, 0.0)
    """
    return 1 - math.exp(-steepness * ((epoch + 1) / denominator - 1) ** 2) if epoch < until else 0.0


def select(
    teacher_logits: Tensor, student_logits: Tensor, alpha: float, cutoff: float = 0.95
) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamic instance selection over a whole pool.

    Args:
        teacher_logits, student_logits: (N, C).
        alpha: the teacher's share of the combined logits.
        cutoff: threshold of the most frequent class; of class k it is cutoff * r / (2 - r), r its share of that class's
            count.

    Returns:
        (N,) whether selected, (N,) confidence, (N,) predicted class.
    """
    checks.same_classes("kd3", student_logits, teacher_logits)
    probs = F.softmax(alpha * teacher_logits + (1 - alpha) * student_logits, dim=-1)
    confidence, predicted = probs.max(-1)
    counts = predicted.bincount(minlength=probs.shape[-1]).to(probs.dtype)
    share = counts / counts.max()
    return confidence > (cutoff * share / (2 - share))[predicted], confidence, predicted


def transfer_block(student: int, teacher: int, factor: int = 2) -> nn.Sequential:
    """SimKD's projector of feature maps, `student` to `teacher` channels through teacher / factor: 1x1, 3x3, 1x1, each
    with batch norm and ReLU."""
    inner = max(teacher // factor, 1)
    return nn.Sequential(
        nn.Conv2d(student, inner, 1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Conv2d(inner, inner, 3, padding=1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Conv2d(inner, teacher, 1, bias=False),
        nn.BatchNorm2d(teacher),
        nn.ReLU(),
    )


def share_map(student: Tensor, teacher: Tensor, transfer: nn.Module) -> tuple[Tensor, Tensor]:
    """The student's map through the transfer block and the teacher's, both at the smaller size. (B, s, h', w') and (B,
    t, h, w) -> twice (B, t, ., .)."""
    student, teacher = same_size(student, teacher)
    return transfer(student), teacher


@full_precision
def disagreement_weights(student_logits: Tensor, teacher_logits: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Distance d = ||z_s - z_t + eps|| and weight sigmoid(d) in [0.5, 1) of every sample, outside autograd. (B, C) and
    (B, C) -> (B,), (B,)."""
    checks.same_classes("kd3", student_logits, teacher_logits)
    distance = (student_logits.detach() - teacher_logits.detach() + eps).norm(dim=1)
    return distance, torch.sigmoid(distance)


@full_precision
def aligned(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over batch, channels and positions of w (F_s - F_t)^2; (B, t, h, w) twice, weights (B,) or None for ones."""
    checks.same_shape("kd3", student, teacher)
    square = (student - teacher).square()
    return square.mean() if weights is None else (weights[:, None, None, None] * square).mean()


@full_precision
def mix_distribution(images: Tensor, share: Tensor, partner: Tensor, eps: float = 1e-6) -> Tensor:
    """MixDistribution: images with the mean and deviation of each channel mixed with those of another image (MixStyle
    on pixels).

    Args:
        images: (B, C, H, W), normalised.
        share: (B, 1, 1, 1) what stays of the own statistics.
        partner: (B,) positions in the batch.

    Raises:
        UserError: images of one pixel, which have no deviation.
    """
    if images.shape[-2] * images.shape[-1] < 2:
        raise UserError(f"kd3: MixDistribution needs images of more than one pixel; given: {tuple(images.shape)}.")
    mean = images.mean((2, 3), keepdim=True).detach()
    deviation = (images.var((2, 3), keepdim=True, unbiased=True) + eps).sqrt().detach()
    new_mean = share * mean + (1 - share) * mean[partner]
    new_deviation = share * deviation + (1 - share) * deviation[partner]
    return (images - mean) / deviation * new_deviation + new_mean


@full_precision
def contrast(first: Tensor, second: Tensor, temperature: float = 0.3) -> Tensor:
    """NT-Xent over both views: each vector should find its other view among the 2B - 1 others. Unit vectors (B, D) and
    (B, D) -> scalar.

    Raises:
        UserError: a batch of one, which has no negatives.
    """
    if len(first) < 2:
        raise UserError("kd3: the contrast needs a batch of at least two images.")
    both = torch.cat([first, second])
    similarity = both @ both.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(both), dtype=torch.bool, device=both.device), float("-inf"))
    other = torch.arange(len(both), device=both.device).roll(len(first))
    return F.cross_entropy(similarity, other)

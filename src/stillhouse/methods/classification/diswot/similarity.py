"""DisWOT's two distances between a teacher and a student that were never trained, on one batch (arXiv 2303.15678)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.teachers import Reader
from stillhouse.errors import UserError
from stillhouse.functional import checks
from stillhouse.functional.feature_maps import map_tap
from stillhouse.functional.precision import full_precision
from stillhouse.objectives.sp import sp_loss
from stillhouse.randomness import keyed
from stillhouse.signals import Batch

SMALLEST = 1e-12


@full_precision
def relation_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """D_r: mean squared difference of the (B, B) matrices of similarity between samples, rows of length 1. (B, ...) and
    (B, ...), other sizes may differ."""
    if len(student) < 2:
        raise UserError(f"diswot: the relation between samples needs a batch of at least two; given: {len(student)}.")
    return sp_loss(student, teacher)


@full_precision
def semantic_gradient(embedding: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient (K, d) of the batch's mean cross-entropy with respect to the classifier's weight: (softmax(z) -
    onehot(y))^T h / B.

    Args:
        embedding: what goes into the classifier, (B, d).
        logits: (B, K). labels: class ids (B,).
    """
    return (F.softmax(logits, dim=-1) - F.one_hot(labels, logits.shape[1])).T @ embedding / len(logits)


@full_precision
def semantic_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """D_s = sum_c |E^s_c - E^t_c|^2 / (K d), with E_c = g_c g_c^T whose rows have length 1; in O(K d), without E.

    Row i of E_c is s_ci times the unit vector along g_c, with s_ci the sign of g_ci (less only where the row is shorter
    than 1e-12).

    Args:
        student, teacher: classifier gradients (K, d).

    Raises:
        UserError: gradients of unequal shape: the two classifiers must have the same number of inputs and classes.
    """
    if student.shape != teacher.shape:
        raise UserError(
            f"diswot: the semantic metric compares classifiers of one shape; the student's is {tuple(student.shape)}, "
            f"the teacher's {tuple(teacher.shape)}: "
            "choose a space with the teacher's last width, or combine: relation."
        )
    (unit_s, sign_s), (unit_t, sign_t) = _rows(student), _rows(teacher)
    cosine = (unit_s * unit_t).sum(1)
    per_class = sign_s.square().sum(1) + sign_t.square().sum(1) - 2 * (sign_s * sign_t).sum(1) * cosine
    return per_class.sum() / student.numel()


def _rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The unit vector of each class's gradient, (K, d), and the factor of each row of its outer product, (K, d)."""
    norm = gradient.norm(dim=1, keepdim=True)
    return gradient / norm.clamp_min(torch.finfo(gradient.dtype).tiny), gradient * norm / (
        gradient.abs() * norm
    ).clamp_min(SMALLEST)


@full_precision
def channel_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """D_c: the semantic distance as a loss: difference of the (C, C) similarities of channels of maps (B, C, H, W),
    rows of length 1, over C B.

    Height and width may differ; teacher detached. Raises `UserError` for another number of samples or channels.
    """
    checks.same_rows("diswot", student, teacher)
    if student.shape[1] != teacher.shape[1]:
        raise UserError(
            f"diswot: maps must have as many channels; the student's has {student.shape[1]}, the teacher's "
            f"{teacher.shape[1]}."
        )
    difference = _channel_similarity(student) - _channel_similarity(teacher.detach())
    return difference.square().sum() / (student.shape[0] * student.shape[1])


def _channel_similarity(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    return F.normalize(flat @ flat.transpose(1, 2), dim=-1)


def initialise(network: nn.Module) -> nn.Module:
    """Every convolution and linear layer ~ N(0, 1) with zero bias, every norm 1 and 0; in training mode, so that batch
    norm sees its batch."""
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight)
        elif (
            isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm)
            and module.weight is not None
        ):
            nn.init.ones_(module.weight)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return network.train()


@dataclass(frozen=True)
class View:
    """What a network that was never trained makes of a batch: its last feature map (B, C, h, w) and its classifier's
    gradient (K, d)."""

    feature: Tensor
    gradient: Tensor


@torch.no_grad()
def view(
    build: Callable[[], nn.Module],
    batch: Batch,
    seed: int,
    *key: int | str,
    owner: str = "student",
    embedding: str | None = None,
) -> View:
    """Build and initialise a network by its keys, and look at one batch through it: one forward pass, no backward.

    Args:
        build: makes the network, on the batch's device.
        batch: `input` and `label` (B,).
        embedding: its classifier, where it is not found by itself.
    """
    with keyed("diswot", seed, *key):
        network = initialise(build())
        reader = Reader(network, owner, embedding)
        reader.attach({"embedding", "tap:stage:-1"}, {k: v[:2] for k, v in batch.items() if isinstance(v, Tensor)})
        network.train()
        outputs = reader(batch)
        reader.close()
    gradient = semantic_gradient(outputs.require("embedding"), outputs.require("logits"), batch["label"])
    return View(map_tap(outputs, "stage:-1"), gradient)

"""Distances of the hidden states and attention maps of two language models, padding left out, and which layers are
compared where the depths differ.

The definitions of TextBrewer (Yang et al., arXiv 2002.12620) and Distiller (arXiv 2109.11105); token 0 alone is PKD's
(Sun et al., arXiv 1908.09355).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision

Pairing = Literal["skip", "last"]


def check_mask(mask: Tensor) -> Tensor:
    """The mask (B, L), 1 where a token is real. Raises `UserError` for a text that is padding alone, where that can be
    seen without waiting for a device."""
    if mask.device.type == "cpu" and not bool(mask.bool().any(-1).all()):
        raise UserError(
            "A text of this batch is padding alone, so its hidden states say nothing; leave empty texts out."
        )
    return mask


def _checked(student: Tensor, teacher: Tensor) -> Tensor:
    if student.shape != teacher.shape:
        raise UserError(
            f"Hidden states of shape {tuple(student.shape)} and {tuple(teacher.shape)} (batch, tokens, width) cannot "
            "be compared entry by entry; both networks must read the same tokens, and a linear map bring one to the "
            "other's width."
        )
    return teacher.detach()


@full_precision
def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference over real tokens and width, of states (B, L, D) and a mask (B, L)."""
    real = check_mask(mask).to(student)[..., None]
    return ((student - _checked(student, teacher)).square() * real).sum() / (real.sum() * student.shape[-1])


@full_precision
def hidden_ce(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of the softmax over the width, teacher as target, mean over real tokens."""
    real = check_mask(mask).to(student)
    rows = -(_checked(student, teacher).softmax(-1) * student.log_softmax(-1)).sum(-1)
    return (rows * real).sum() / real.sum()


@full_precision
def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """1 - cosine, mean over real tokens."""
    real = check_mask(mask).to(student)
    rows = 1 - F.cosine_similarity(student, _checked(student, teacher), dim=-1)
    return (rows * real).sum() / real.sum()


@full_precision
def first_token_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """PKD: squared distance of token 0 as unit vectors, summed over the width, mean over the batch; no mask is used."""
    theirs = _checked(student, teacher)
    return (F.normalize(student[:, 0], dim=-1) - F.normalize(theirs[:, 0], dim=-1)).square().sum(-1).mean()


@full_precision
def attention_maps(queries: Tensor, keys: Tensor, heads: int, mask: Tensor) -> Tensor:
    """(B, heads, L, L) softmax of scaled dot products over real keys, of queries and keys (B, L, D) of all heads."""
    b, n, width = queries.shape

    def by_head(x: Tensor) -> Tensor:
        return x.view(b, n, heads, width // heads).transpose(1, 2)

    scores = by_head(queries) @ by_head(keys).transpose(-1, -2) / math.sqrt(width // heads)
    return scores.masked_fill(mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min).softmax(-1)


@full_precision
def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of maps (B, H, L, L) over heads and pairs of real tokens."""
    theirs, real = _same_heads(student, teacher), check_mask(mask).to(student)
    pairs = (real[:, :, None] * real[:, None, :])[:, None]
    return ((student - theirs).square() * pairs).sum() / (pairs.sum() * student.shape[1])


@full_precision
def attention_ce(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of maps (B, H, L, L), whose rows are softmaxed again, over real keys, mean over heads and real
    rows."""
    theirs, real = _same_heads(student, teacher), check_mask(mask).to(student)
    rows = -(theirs.softmax(-1) * student.log_softmax(-1) * real[:, None, None, :]).sum(-1)
    return (rows * real[:, None, :]).sum() / (real.sum() * student.shape[1])


def _same_heads(student: Tensor, teacher: Tensor) -> Tensor:
    if student.shape != teacher.shape:
        raise UserError(
            f"Attention maps of shape {tuple(student.shape)} and {tuple(teacher.shape)} (batch, heads, tokens, tokens) "
            "cannot be compared; give the student as many heads as the teacher."
        )
    return teacher.detach()


def hidden_pairs(teacher_layers: int, student_layers: int, how: Pairing) -> list[tuple[int, int]]:
    """(teacher, student) indices of hidden states, 0 being the embeddings: `skip` spreads the teacher's evenly, `last`
    takes its last ones.

    Raises:
        UserError: a teacher that is not as deep as the student.

    >>> hidden_pairs(12, 4, "skip"), hidden_pairs(12, 4, "last")[0]
    ([(0, 0), (3, 1), (6, 2), (9, 3), (12, 4)], (8, 0))
    """
    _check_depths(teacher_layers, student_layers)
    m, n = teacher_layers, student_layers
    return [(int(i * m / n) if how == "skip" else m - n + i, i) for i in range(n + 1)]


def attention_pairs(teacher_layers: int, student_layers: int, how: Pairing) -> list[tuple[int, int]]:
    """(teacher, student) indices of layers, from 0, whose attention is compared. Raises as `hidden_pairs`.

    >>> attention_pairs(12, 4, "skip")
    [(2, 0), (5, 1), (8, 2), (11, 3)]
    """
    _check_depths(teacher_layers, student_layers)
    m, n = teacher_layers, student_layers
    return [(int((i + 1) * m / n - 1) if how == "skip" else m - n + i, i) for i in range(n)]


def _check_depths(teacher_layers: int, student_layers: int) -> None:
    if student_layers < 1 or teacher_layers < student_layers:
        raise UserError(
            f"The student has {student_layers} layers and the teacher {teacher_layers}: layers can be paired where the "
            "teacher has at least as many."
        )

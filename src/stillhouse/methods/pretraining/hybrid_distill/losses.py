"""Hybrid Distill's losses: last features of one teacher, and relations of the other, on the patches that the student
still has."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from stillhouse.functional.masking import take_tokens
from stillhouse.functional.precision import full_precision
from stillhouse.functional.relations import relation_heads, relation_kl

FeatureLoss = Literal["smooth_l1", "mse", "cosine"]


@full_precision
def feature_loss(predicted: Tensor, features: Tensor, kind: FeatureLoss = "smooth_l1", beta: float = 2.0) -> Tensor:
    """Distance of predictions from a teacher's tokens, which are standardised over the width; mean over tokens.

    Args:
        predicted: (B, N, D).
        features: (B, N, D), detached.
        kind: smooth L1 or squared error, mean over the width too, or 1 - cosine.
        beta: smooth L1 is d^2 / (2 beta) below it.
    """
    target = F.layer_norm(features.detach(), features.shape[-1:], eps=1e-6)
    if kind == "cosine":
        return (1 - F.cosine_similarity(predicted, target, dim=-1)).mean()
    return F.mse_loss(predicted, target) if kind == "mse" else F.smooth_l1_loss(predicted, target, beta=beta)


def with_class_token(kept: Tensor) -> Tensor:
    """(B, 1 + n) positions in a teacher's tokens: its class token, and the patches at (B, n)."""
    return F.pad(kept + 1, (1, 0))


@full_precision
def relations_loss(student: Tensor, teacher: Tensor, kept: Tensor, heads: int) -> dict[str, Tensor]:
    """`qk` and `vv`: divergence of the relations of queries with keys, and of values with each other.

    Args:
        student: (B, 1 + n, 3 D) a block's queries, keys and values.
        teacher: (B, 1 + L, 3 D'), of all patches.
        kept: (B, n) raster positions of the student's patches.
        heads: relation heads.
    """
    mine = [relation_heads(x, heads) for x in student.chunk(3, -1)]
    theirs = [relation_heads(x, heads) for x in take_tokens(teacher, with_class_token(kept)).chunk(3, -1)]
    return {
        "qk": relation_kl((mine[0], mine[1]), (theirs[0], theirs[1])),
        "vv": relation_kl((mine[2], mine[2]), (theirs[2], theirs[2])),
    }

"""Relations of tokens inside one network (softmax of scaled dot products, head by head), and their divergence between
two networks.

MiniLMv2 (Wang et al., ACL 2021 Findings, arXiv 2012.15828) and TinyMIM (Ren et al., CVPR 2023, arXiv 2301.01296).
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.divergences import kl_divergence
from stillhouse.functional.precision import full_precision


def relation_heads(x: Tensor, heads: int) -> Tensor:
    """(B, A, N, width / A): concatenated heads (B, N, width) cut into A relation heads.

    Raises:
        UserError: heads that do not divide the width.
    """
    b, n, width = x.shape
    if width % heads:
        raise UserError(f"{heads} relation heads do not divide a width of {width}; choose a divisor.")
    return x.view(b, n, heads, width // heads).transpose(1, 2)


@full_precision
def relation_scores(a: Tensor, b: Tensor) -> Tensor:
    """(B, A, N, N) a b^T / sqrt(d), whose softmax over the last axis is the relation; a and b are (B, A, N, d)."""
    return a @ b.transpose(-1, -2) / math.sqrt(a.shape[-1])


@full_precision
def relation_kl(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """KL(teacher's relation || student's), summed over keys, mean over batch, heads and queries.

    Args:
        student: two tensors (B, A, N, d) whose relation is compared, such as queries and keys, or values twice.
        teacher: the same of the teacher, of any head width; detached.

    Raises:
        UserError: different heads or tokens.
    """
    mine, theirs = relation_scores(*student), relation_scores(*teacher).detach()
    if mine.shape != theirs.shape:
        raise UserError(
            f"Relations of shape {tuple(mine.shape)} and {tuple(theirs.shape)} (batch, heads, tokens, tokens) cannot "
            "be compared; give both networks the same relation heads and the same tokens."
        )
    return kl_divergence(mine, F.log_softmax(theirs, dim=-1))

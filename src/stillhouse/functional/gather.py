"""Rows of all ranks, with gradient: what losses with statistics over the batch need so that many processes give what
one would."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, shape (world * B, …); the identity without torch.distributed or on one rank.

    Every rank must hold as many rows. Gradients flow back to the rank that a row came from, summed over ranks: with the
    loss of the whole batch computed on each rank and gradients then averaged (as DDP does), the step is that of one
    process.

    >>> gather(torch.arange(3))
    tensor([0, 1, 2])
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    if x.requires_grad and torch.is_grad_enabled():
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(x.contiguous()))
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)

"""Batch normalisation over the rows that are there."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MaskedBatchNorm(nn.Module):
    """Batch norm over the last axis, whose statistics are those of the rows that a mask has; without a mask it is
    `nn.BatchNorm1d` of all rows, with its weights by the same names.

    Args:
        channels: C.
        eps, momentum: as of `nn.BatchNorm1d`.
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (..., C), mask (...) bool, shaped as x without its last axis."""
        if not self.training:
            mean, var = self.running_mean, self.running_var
        else:
            axes = tuple(range(x.ndim - 1))
            weight = x.new_ones(x.shape[:-1]) if mask is None else mask.to(x.dtype)
            number = weight.sum().clamp_min(1)
            mean = (x * weight[..., None]).sum(axes) / number
            var = ((x - mean).square() * weight[..., None]).sum(axes) / number
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                unbiased = var * number / (number - 1).clamp_min(1)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
                self.num_batches_tracked += 1
        return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias

"""ZCA whitening of images, as kornia and the data-set distillation papers use it: y = (x - mu) T with T = U diag((S +
eps)^-1/2) U^T."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.errors import UserError


@dataclass(frozen=True)
class Whitening:
    """A fitted whitening: calling it whitens (B, C, H, W) images, `invert` gives them back.

    Attributes:
        mean: (1, d).
        matrix, inverse: (d, d), symmetric.
    """

    mean: Tensor
    matrix: Tensor
    inverse: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return ((x.flatten(1) - self.mean.to(x)) @ self.matrix.to(x)).view_as(x)

    def invert(self, y: Tensor) -> Tensor:
        return (y.flatten(1) @ self.inverse.to(y) + self.mean.to(y)).view_as(y)


def fit_whitening(x: Tensor, eps: float = 0.1) -> Whitening:
    """The whitening of images (N, C, H, W), pixels in [0, 1]; the covariance is unbiased (N - 1).

    Raises:
        UserError: fewer than two images.
    """
    if len(x) < 2:
        raise UserError(f"Whitening is fitted on at least two images; given: {len(x)}.")
    rows = x.flatten(1).double()
    mean = rows.mean(0, keepdim=True)
    centred = rows - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(x) - 1))
    root = (values.clamp_min(0) + eps).sqrt()
    matrix, inverse = (vectors / root) @ vectors.T, (vectors * root) @ vectors.T
    return Whitening(mean.float(), matrix.float(), inverse.float())

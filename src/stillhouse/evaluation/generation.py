"""How good and how varied generated samples are, in the features and classes of a probe that knows the data."""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.errors import UserError


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """The Frechet distance of two sets of features (n, D) and (m, D), taken as normal: |m1 - m2|^2 + tr(C1 + C2 -
    2 (C1 C2)^(1/2)) (Heusel et al., arXiv 1706.08500, there in Inception's features).

    Raises:
        UserError: fewer than two samples on a side, or features of other widths.
    """
    if min(len(real), len(generated)) < 2 or real.shape[1:] != generated.shape[1:] or real.ndim != 2:
        raise UserError(
            "A Frechet distance needs two samples or more on each side, with features (n, D) of one width; given: "
            f"{tuple(real.shape)} and {tuple(generated.shape)}."
        )
    a, b = real.double(), generated.double()
    first, second = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(a.shape[1], -1)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * crossed
    return max(float(distance), 0.0)


def modes(classes: Tensor, count: int) -> float:
    """The effective number of classes among the samples' (n,): the exponential of the entropy of their shares, 1 where
    all are alike and at most `count`; 0 of no samples."""
    if not classes.numel():
        return 0.0
    shares = torch.bincount(classes.flatten().cpu(), minlength=count).double()
    shares = shares / shares.sum()
    return float(torch.special.entr(shares).sum().exp())


def pairwise_distance(features: Tensor) -> float:
    """The mean Euclidean distance of two samples (n, D), n > 1."""
    return float(torch.pdist(features.double().cpu()).mean())


def spread(values: Tensor) -> float:
    """The mean over columns of the standard deviation of values (n, D), n > 1."""
    return float(values.double().std(0).mean())

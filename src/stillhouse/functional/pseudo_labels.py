"""Losses on unlabelled samples whose targets are predictions on another view of them."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from stillhouse.functional.precision import full_precision


@full_precision
def confident_pseudo_loss(weak: Tensor, strong: Tensor, threshold: float = 0.95) -> Tensor:
    """Cross-entropy of a strong view with the arg max of the weak one, where that is at least so probable, and zero
    elsewhere; the mean over all samples. FixMatch, Sohn et al., NeurIPS 2020 (arXiv 2001.07685), eq. 4.

    Args:
        weak, strong: (B, C) logits of the two views; the weak view is a constant.
        threshold: a probability.
    """
    sure, label = weak.detach().softmax(-1).max(-1)
    rows = F.cross_entropy(strong, label, reduction="none")
    return (rows * (sure >= threshold)).mean()

"""Crops as the adapted teacher sees them, how sure it is of them, and the loss that carries its features over."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.functional.crops import cut
from stillhouse.functional.precision import full_precision

SMALLEST = 10.0  # pixels a side that a box is taken to have at least
TINY = 1e-5  # in the place of a probability of 0


def square_crop(image: Tensor, box: Tensor, ratio: float = 1.2) -> Tensor:
    """The square (C, s, s) with the part of an image (C, H, W) in a box (4,) in its middle, enlarged by `ratio` about
    its centre and cut at the edges, and zeros around it."""
    height, width = image.shape[-2:]
    left, top, right, bottom = box.tolist()
    wide, high = max(right - left, SMALLEST), max(bottom - top, SMALLEST)
    margin = (ratio - 1) / 2
    x0, y0 = (math.floor(max(low - margin * side, 0)) for low, side in ((left, wide), (top, high)))
    x1 = math.ceil(min(left + (1 + margin) * wide, width - 1))
    y1 = math.ceil(min(top + (1 + margin) * high, height - 1))
    part = cut(image, (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
    h, w = part.shape[-2:]
    side = max(h, w)
    out = image.new_zeros(image.shape[0], side, side)
    y, x = (side - h) // 2, (side - w) // 2
    out[:, y : y + h, x : x + w] = part
    return out


def certainty(logits: Tensor) -> Tensor:
    """(n,) log K - H(p) of the probabilities of logits (n, K): 0 where all are equal."""
    p = logits.float().softmax(-1)
    p = torch.where(p == 0, TINY, p)
    return math.log(logits.shape[-1]) + (p * p.log()).sum(-1)


def row_weights(weights: Tensor, there: Tensor) -> Tensor:
    """(B, M) weights whose mean over the rows of each image is 1; 0 where there is no row, or all weights are 0.

    Args:
        weights: (B, M), of boxes and proposals.
        there: (B, M), 1 where there is a row.
    """
    weights = weights * there
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights * there.sum(-1, keepdim=True) / total.clamp_min(1e-12), 0.0)


@full_precision
def feature_loss(raw: Tensor, features: Tensor, weights: Tensor | None, there: Tensor, factor: float = 1.0) -> Tensor:
    """factor times the sum over dimensions of |r / |r| - c / |c||, weighted, as a mean over rows; 0 without rows.

    Args:
        raw: (..., d) embeddings of the student.
        features: (..., d) of the teacher; a row of zeros counts for nothing.
        weights: (...) of the rows, of mean 1 (see `row_weights`); None: all are 1.
        there: (...), 1 where there is a row.
    """
    there = there * (features.abs().sum(-1) > 0)
    error = (F.normalize(raw, dim=-1) - F.normalize(features.detach(), dim=-1)).abs().sum(-1)
    weighted = error * (there if weights is None else weights * there)
    return factor * weighted.sum() / there.sum().clamp_min(1)


def grid(
    width: int, height: int, stride: float, sides: Sequence[float], ratios: Sequence[float], smallest: float = 4.0
) -> Tensor:
    """(n, 4) anchors centred on the cells of an image, cut at its edges, without those that are then too small.

    Args:
        stride: pixels of a cell.
        sides: of square anchors, in pixels.
        ratios: of height to width, at equal area.
    """
    y, x = (torch.arange(stride / 2, side, stride) for side in (height, width))
    shapes = torch.tensor([[s / r**0.5, s * r**0.5] for s in sides for r in ratios])
    middle = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 1, 2)
    boxes = torch.cat([middle - shapes / 2, middle + shapes / 2], -1).reshape(-1, 4).clamp_min(0)
    boxes = torch.minimum(boxes, torch.tensor([width, height] * 2, dtype=boxes.dtype))
    return boxes[((boxes[:, 2:] - boxes[:, :2]) >= smallest).all(1)]

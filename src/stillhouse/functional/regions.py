"""What two-stage detectors share: anchors, the coding of boxes, which boxes answer for which true ones, and which of
them a step looks at.

Shapes do not depend on the data: true boxes are padded, and a choice has as many places whatever it finds, so nothing
waits for the device. Ren et al., NeurIPS 2015 (arXiv 1506.01497).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.functional.boxes import centred, pairwise_iou

LARGEST = math.log(1000 / 16)  # of the logarithm of a side's growth
MARGIN = 1e-6


@dataclass
class Truth:
    """The true boxes of a batch, padded.

    Attributes:
        boxes: (B, G, 4).
        labels: (B, G); 0 where there is none.
        real: (B, G) whether there is one.
    """

    boxes: Tensor
    labels: Tensor
    real: Tensor


def padded_truth(targets: Sequence[Mapping[str, Any]], device: torch.device) -> Truth:
    """Targets with `boxes` (n, 4) and `labels` (n,) as one; G is 1 at least."""
    boxes = [t["boxes"].reshape(-1, 4).float().to(device) for t in targets]
    labels = [t["labels"].to(device) for t in targets]
    number = max(1, *(len(b) for b in boxes))
    pad = nn.functional.pad
    real = torch.tensor([[i < len(b) for i in range(number)] for b in boxes], device=device)
    return Truth(
        torch.stack([pad(b, (0, 0, 0, number - len(b))) for b in boxes]),
        torch.stack([pad(y, (0, number - len(y))) for y in labels]),
        real,
    )


def anchors(
    size: tuple[int, int],
    stride: int,
    sides: Sequence[float],
    ratios: Sequence[float],
    device: torch.device | None = None,
) -> Tensor:
    """(rows * columns * A, 4) corners of anchors at the cells of an image, A = sides x ratios, the ratio being height
    over width.

    Args:
        size: (rows, columns) of the map.
        stride: pixels of a cell; an anchor is at its centre.
        sides: of square anchors, in pixels.
        ratios: of height to width, at equal area.

    >>> anchors((1, 1), 8, [8.0], [1.0]).tolist()
    [[0.0, 0.0, 8.0, 8.0]]
    """
    shapes = torch.tensor([[s / r**0.5, s * r**0.5] for s in sides for r in ratios], device=device)
    y, x = (torch.arange(n, device=device, dtype=torch.float32) * stride + stride / 2 for n in size)
    middle = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[:, :, None]
    return torch.cat([middle - shapes / 2, middle + shapes / 2], -1).reshape(-1, 4)


def encoded(boxes: Tensor, given: Tensor, scale: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """(..., 4) shifts of the centre in sides of the given boxes, and logarithms of the sides' growth, times `scale`."""
    wanted, own = centred(boxes), centred(given)
    sides = own[..., 2:].clamp_min(MARGIN)
    shift = (wanted[..., :2] - own[..., :2]) / sides
    growth = (wanted[..., 2:].clamp_min(MARGIN) / sides).log()
    return torch.cat([shift, growth], -1) * torch.tensor(scale, device=boxes.device)


def decoded(numbers: Tensor, given: Tensor, scale: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """The inverse of `encoded`: corners (..., 4)."""
    numbers = numbers.float() / torch.tensor(scale, device=numbers.device)
    own = centred(given)
    middle = own[..., :2] + numbers[..., :2] * own[..., 2:]
    half = own[..., 2:] * numbers[..., 2:].clamp(max=LARGEST).exp() / 2
    return torch.cat([middle - half, middle + half], -1)


def clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) that end at the edges of an image (height, width)."""
    height, width = size
    edge = torch.tensor([width, height, width, height], device=boxes.device, dtype=boxes.dtype)
    return torch.minimum(boxes.clamp_min(0), edge)


@dataclass
class Match:
    """Which true box each box answers for.

    Attributes:
        which: (B, N) the true box that it overlaps most.
        overlap: (B, N) by how much.
        positive: (B, N) whether it answers for that.
        negative: (B, N) whether it is background; neither: it counts for nothing.
    """

    which: Tensor
    overlap: Tensor
    positive: Tensor
    negative: Tensor


def matched(boxes: Tensor, truth: Truth, low: float, high: float, best_too: bool = False) -> Match:
    """Boxes (B, N, 4) or (N, 4) by their overlap: at least `high` with a true box is positive, below `low` negative.

    Args:
        best_too: the boxes that overlap a true one the most are positive, however little that is.
    """
    iou = pairwise_iou(boxes, truth.boxes) if boxes.ndim == 3 else pairwise_iou(boxes[None], truth.boxes)
    iou = torch.where(truth.real[:, None], iou, -1.0)
    overlap, which = iou.max(2)
    positive = overlap >= high
    if best_too:
        best = iou.amax(1, keepdim=True)
        positive = positive | ((iou == best) & (best > 0)).any(2)
    return Match(which, overlap, positive, (overlap < low) & ~positive)


@dataclass
class Choice:
    """Boxes that a step looks at.

    Attributes:
        places: (B, n) which.
        positive: (B, n) whether it is a positive.
        counted: (B, n) whether it is anything at all.
    """

    places: Tensor
    positive: Tensor
    counted: Tensor


def chosen(match: Match, number: int, share: float) -> Choice:
    """`number` boxes of each image at random, of which at most `share` are positive, and the others negative."""
    draws = torch.rand(match.positive.shape, device=match.positive.device)
    number = min(number, draws.shape[1])
    most = max(int(number * share), 1)
    ranked = torch.where(match.positive, draws, -1.0)
    bar = ranked.topk(most, dim=1).values[:, -1:]
    kept = match.positive & (ranked >= bar)
    order = torch.where(kept, draws + 2, torch.where(match.negative, draws, -1.0))
    values, places = order.topk(number, dim=1)
    return Choice(places, values >= 2, values >= 0)


def taken(values: Tensor, places: Tensor) -> Tensor:
    """Rows (B, n, ...) of values (B, N, ...) at places (B, n)."""
    index = places.reshape(*places.shape, *[1] * (values.ndim - 2)).expand(*places.shape, *values.shape[2:])
    return values.gather(1, index)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The mean of values (...) over what is counted; 0 where nothing is."""
    weights = weights.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp_min(1)


def blended(box: Tensor, other: Tensor, known: Tensor, share: float = 2 / 3) -> Tensor:
    """Scores of two classifiers as one (ViLD, Gu et al., ICLR 2022, arXiv 2104.13921, section 3.3): p^s q^(1 - s) for a
    known class, p^(1 - s) q^s for another, and what is left for the background.

    Args:
        box: (..., K + 1) logits of one, the background last.
        other: (..., K) logits of another, without background.
        known: (K,) bool.
        share: s.

    Returns:
        (..., K + 1).
    """
    p, q = box.float().softmax(-1)[..., :-1], other.float().softmax(-1)
    power = torch.where(known, share, 1 - share)
    scores = p.pow(power) * q.pow(1 - power)
    return torch.cat([scores, 1 - scores.sum(-1, keepdim=True)], -1)

"""One-stage detection on grids: what a YOLO-like head's numbers mean, which of its places answer for a box, and the
losses.

Redmon and Farhadi, YOLOv3 (arXiv 1804.02767): each place of a grid (A anchors a cell) gives 5 + K numbers: the centre
inside its cell, the size in anchors, objectness, and K classes. An anchor answers for a box if their shapes are alike,
as many as are, and the best of all in any case (as YOLOv3's later forms have it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.functional.boxes import best_detections, cornered, overlaps
from stillhouse.functional.precision import full_precision

LARGEST = 4.0  # a box is at most e^4 anchors wide


@dataclass(frozen=True)
class Level:
    """A grid: (A, 2) widths and heights of its anchors in pixels, and the pixels of a cell."""

    anchors: Tensor
    stride: int


@dataclass(frozen=True)
class Matches:
    """Which places of a level answer for which boxes.

    Attributes:
        places: (T, A) positions in the flattened (B, A, H, W) grid.
        weights: (T, A) 1 where the anchor answers for the box, else 0.
        boxes: (T, 4) corners.
        labels: (T,) class ids.
    """

    places: Tensor
    weights: Tensor
    boxes: Tensor
    labels: Tensor


def joined(targets: Sequence[Mapping[str, Any]], device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (T, 4), labels (T,) and image numbers (T,) of all targets of a batch."""
    counts = torch.tensor([len(t["labels"]) for t in targets])
    images = torch.arange(len(targets)).repeat_interleave(counts).to(device, non_blocking=True)
    boxes = torch.cat([t["boxes"].reshape(-1, 4) for t in targets]) if len(targets) else torch.zeros(0, 4)
    labels = torch.cat([t["labels"] for t in targets]) if len(targets) else torch.zeros(0, dtype=torch.long)
    return boxes.to(device), labels.to(device), images


def assigned(
    grids: Sequence[Tensor], targets: Sequence[Mapping[str, Any]], levels: Sequence[Level], alike: float = 0.35
) -> list[Matches]:
    """Which places answer for which boxes, level by level; nothing waits for the device.

    Args:
        grids: (B, A, H, W, 5 + K) of each level.
        targets: of each image `boxes` (n, 4) corners in pixels and `labels` (n,).
        levels: of each grid.
        alike: the intersection over union, of shapes alone, from which an anchor answers.
    """
    boxes, labels, images = joined(targets, grids[0].device)
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp_min(1e-3)
    anchors = torch.cat([level.anchors for level in levels])
    shared = torch.minimum(sides[:, None], anchors).prod(-1)
    shape_iou = shared / (sides.prod(-1)[:, None] + anchors.prod(-1) - shared)
    best = torch.zeros_like(shape_iou)
    best = best.scatter(1, shape_iou.argmax(1, keepdim=True), 1.0)
    answers = torch.maximum((shape_iou > alike).to(best.dtype), best).split([len(level.anchors) for level in levels], 1)
    middle, out = (boxes[:, :2] + boxes[:, 2:]) / 2, []
    for grid, level, weights in zip(grids, levels, answers):
        number, height, width = grid.shape[1:4]
        x = (middle[:, 0] / level.stride).long().clamp(0, width - 1)
        y = (middle[:, 1] / level.stride).long().clamp(0, height - 1)
        anchor = torch.arange(number, device=grid.device)
        places = ((images[:, None] * number + anchor) * height + y[:, None]) * width + x[:, None]
        out.append(Matches(places, weights, boxes, labels))
    return out


def boxes_of(numbers: Tensor, corners: Tensor, anchors: Tensor, stride: int) -> Tensor:
    """Boxes (..., 4) in pixels of a head's numbers (..., 4 or more); `corners` (..., 2) are the cells' columns and
    rows, `anchors` (..., 2) in pixels."""
    middle = (numbers[..., :2].sigmoid() + corners) * stride
    return cornered(torch.cat([middle, numbers[..., 2:4].clamp(max=LARGEST).exp() * anchors], -1))


def decoded(grid: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Boxes (B, P, 4) and scores (B, P, K) of a grid (B, A, H, W, 5 + K), P = A * H * W. A score is objectness times
    the class's probability."""
    height, width = grid.shape[2:4]
    rows, columns = torch.meshgrid(
        torch.arange(height, device=grid.device), torch.arange(width, device=grid.device), indexing="ij"
    )
    corners = torch.stack([columns, rows], -1).to(grid.dtype)
    boxes = boxes_of(grid, corners, level.anchors[:, None, None].to(grid.dtype), level.stride)
    scores = grid[..., 4:5].sigmoid() * grid[..., 5:].sigmoid()
    return boxes.flatten(1, 3), scores.flatten(1, 3)


@full_precision
def grid_detections(
    grids: Sequence[Tensor], levels: Sequence[Level], size: tuple[int, int], threshold: float = 0.5, number: int = 100
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (B, N, 4) inside the image (height, width), scores (B, N) and labels (B, N) of all levels, without
    duplicates."""
    found = [decoded(grid, level) for grid, level in zip(grids, levels)]
    boxes, scores = torch.cat([b for b, _ in found], 1), torch.cat([s for _, s in found], 1)
    edge = torch.tensor([size[1], size[0]] * 2, dtype=boxes.dtype).to(boxes.device)
    return best_detections(torch.minimum(boxes.clamp_min(0), edge), scores, threshold, number)


@full_precision
def grid_losses(
    grids: Sequence[Tensor],
    targets: Sequence[Mapping[str, Any]],
    levels: Sequence[Level],
    gains: tuple[float, float, float] = (2.0, 20.0, 1.0),
) -> dict[str, Tensor]:
    """The losses of a batch: `box` (1 - generalised IoU, mean over the places that answer), `objectness` (binary
    cross-entropy, mean over all places; the target is the IoU that was reached) and `class` (binary cross-entropy, mean
    over the places that answer). Without boxes, `box` and `class` are 0.

    Args:
        grids: (B, A, H, W, 5 + K) of each level.
        targets: of each image `boxes` (n, 4) corners in pixels and `labels` (n,).
        levels: of each grid.
        gains: weights of the three.
    """
    zero = torch.stack([g.sum() for g in grids]).sum() * 0.0
    box, objectness, classes, places = zero, zero, zero, 0
    matches = assigned(grids, targets, levels)
    count = torch.stack([m.weights.sum() for m in matches]).sum().clamp_min(1)
    for grid, level, match in zip(grids, levels, matches):
        number, height, width, numbers = grid.shape[1:]
        flat = grid.reshape(-1, numbers)
        mine = flat[match.places]  # (T, A, 5 + K)
        cell = match.places % (height * width)
        corners = torch.stack([cell % width, cell // width], -1).to(grid.dtype)
        boxes = boxes_of(mine, corners, level.anchors.to(grid.dtype), level.stride)
        iou, giou = overlaps(boxes, match.boxes[:, None])
        box = box + (match.weights * (1 - giou)).sum()
        right = F.one_hot(match.labels, numbers - 5).to(grid.dtype)[:, None].expand(-1, number, -1)
        cross = F.binary_cross_entropy_with_logits(mine[..., 5:], right, reduction="none").sum(-1)
        classes = classes + (match.weights * cross).sum()
        reached = (match.weights * iou.detach().clamp(0, 1)).flatten()
        wanted = torch.zeros_like(flat[:, 4]).scatter_reduce(0, match.places.flatten(), reached, "amax")
        objectness = objectness + F.binary_cross_entropy_with_logits(flat[:, 4], wanted, reduction="sum")
        places += len(flat)
    terms = {"box": box / count, "objectness": objectness / max(places, 1), "class": classes / count}
    return {name: gain * value for gain, (name, value) in zip(gains, terms.items())}

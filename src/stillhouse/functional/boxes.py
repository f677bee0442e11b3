"""Boxes: forms, overlaps, and the suppression of duplicates with shapes that do not depend on the data.

A box is (x1, y1, x2, y2) in pixels, the corner at the image's top left first, unless a name says `centred`: (centre x,
centre y, width, height).
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-7


def centred(boxes: Tensor) -> Tensor:
    """Corners (..., 4) as centre x, centre y, width, height.

    >>> centred(torch.tensor([0.0, 2.0, 4.0, 8.0])).tolist()
    [2.0, 5.0, 4.0, 6.0]
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def cornered(boxes: Tensor) -> Tensor:
    """Centre x, centre y, width, height (..., 4) as corners: the inverse of `centred`."""
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([middle - half, middle + half], -1)


def area(boxes: Tensor) -> Tensor:
    """(...,) of boxes (..., 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of boxes (..., 4) and (..., 4), which broadcast, and its generalised form.

    Rezatofighi et al., CVPR 2019 (arXiv 1902.09630): from the second, the share of the smallest box around both that
    neither covers is subtracted.
    """
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    union = area(first) + area(second) - shared
    iou = shared / union.clamp_min(EPS)
    around = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    hull = around.prod(-1)
    return iou, iou - (hull - union) / hull.clamp_min(EPS)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """(..., N, M) intersection over union of boxes (..., N, 4) with boxes (..., M, 4)."""
    return overlaps(first[..., :, None, :], second[..., None, :, :])[0]


def unsuppressed(boxes: Tensor, labels: Tensor, threshold: float, rounds: int = 20) -> Tensor:
    """Which boxes greedy suppression leaves: those that no better box of their class, itself left, overlaps by more
    than the threshold. (B, N) bool.

    Cluster NMS (Zheng et al., arXiv 2005.03572): each round decides one more link of a chain of overlaps, so that
    `rounds` give the greedy result wherever no chain is longer. Nothing waits for the device, and shapes are fixed.

    Args:
        boxes: (B, N, 4), best first.
        labels: (B, N) class ids.
        threshold: of intersection over union.
    """
    return unsuppressed_by(pairwise_iou(boxes, boxes), labels, threshold, rounds)


def unsuppressed_by(overlap: Tensor, labels: Tensor, threshold: float, rounds: int = 20) -> Tensor:
    """The same where the overlap (B, N, N) of boxes of any form is known, (B, N) bool."""
    same = labels[:, :, None] == labels[:, None, :]
    over = ((overlap > threshold) & same).triu(1).to(overlap.dtype)  # [j, i]: j is better than i
    left = torch.ones_like(labels, dtype=overlap.dtype)
    for _ in range(min(rounds, labels.shape[1])):
        left = ((left[:, None] @ over)[:, 0] == 0).to(overlap.dtype)
    return left.bool()


def best_detections(
    boxes: Tensor, scores: Tensor, threshold: float | None, number: int = 100, candidates: int = 300
) -> tuple[Tensor, Tensor, Tensor]:
    """The best boxes of each image, of each class at most one for each thing.

    Args:
        boxes: (B, P, 4), one for each place.
        scores: (B, P, C) of the classes.
        threshold: boxes of one class that overlap by more are duplicates; None: none are.
        number: N, how many are given.
        candidates: how many of the best are looked at.

    Returns:
        boxes (B, N, 4), scores (B, N), labels (B, N); the score of a duplicate, and of padding, is 0.
    """
    classes = scores.shape[2]
    if threshold is None:
        candidates = number
    best, places = scores.flatten(1).topk(min(candidates, scores.shape[1] * classes), dim=1)
    labels = places % classes
    found = boxes.gather(1, (places // classes)[..., None].expand(-1, -1, 4))
    if threshold is not None:
        best = best * unsuppressed(found, labels, threshold)
        best, order = best.topk(min(number, best.shape[1]), dim=1)
        labels, found = labels.gather(1, order), found.gather(1, order[..., None].expand(-1, -1, 4))
    missing = number - best.shape[1]
    if missing > 0:
        best = torch.nn.functional.pad(best, (0, missing))
        labels = torch.nn.functional.pad(labels, (0, missing))
        found = torch.nn.functional.pad(found, (0, 0, 0, missing))
    return found, best, labels

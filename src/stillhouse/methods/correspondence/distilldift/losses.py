"""Similarity maps between two images, what a student learns of them, and correspondences read from them.

Feature maps are (B, C, H, W). Points are (row, column) in pixels, and sizes (height, width), everywhere.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision

Form = Literal["paper", "official", "sce"]
ROWS = 1024  # rows of a similarity map that are there at a time


def rows(features: Tensor) -> Tensor:
    """(B, H W, C) the features of cells, each of length 1."""
    return F.normalize(features.flatten(2).transpose(1, 2), dim=-1, eps=1e-8)


def concatenated(features: list[Tensor], size: tuple[int, int], normalise: Literal["channels", "width"]) -> Tensor:
    """(B, sum of C, H, W) the maps of several teachers, each normalised and resized to a grid.

    Args:
        normalise: over the channels of each cell; or over the last spatial axis, as the released code does.
    """
    axis = 1 if normalise == "channels" else -1
    same = [F.interpolate(F.normalize(f, dim=axis), size, mode="bilinear", align_corners=False) for f in features]
    return torch.cat(same, 1)


@full_precision
def similarity(source: Tensor, target: Tensor) -> Tensor:
    """(B, H W, H' W') cosines of the cells of two maps."""
    return rows(source) @ rows(target).transpose(1, 2)


def _row_loss(student: Tensor, student_target: Tensor, teacher: Tensor, teacher_target: Tensor, tau: float) -> Tensor:
    ours = (student @ student_target.transpose(1, 2) / tau).log_softmax(-1)
    theirs = (teacher @ teacher_target.transpose(1, 2) / tau).softmax(-1)
    return -(theirs * ours).sum()


@full_precision
def row_cross_entropy(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], tau: float, at_once: int = ROWS
) -> Tensor:
    """The distillation loss of the text: mean over pairs and source cells of the cross-entropy of softmax(S / tau) with
    softmax(T / tau) over target cells, some rows at a time.

    Args:
        student, teacher: rows of length 1 of source and target, (B, H W, C) each; both on one grid.
    """
    _check_tau(tau)
    (a, b), (c, d) = student, teacher
    count = a.shape[1]
    if count <= at_once:
        total = _row_loss(a, b, c, d, tau)
    else:
        parts = zip(a.split(at_once, 1), c.split(at_once, 1))
        made = [checkpoint(_row_loss, part, b, other, d, tau, use_reentrant=False) for part, other in parts]
        total = torch.stack(made).sum()
    return total / (len(a) * count)


@full_precision
def official_cross_entropy(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """The loss as released: probabilities over target cells, S and T (B, N, M) over tau, are given to a cross-entropy
    that takes the source cells for classes, and so has a second softmax, over them."""
    _check_tau(tau)
    ours, theirs = (student / tau).softmax(-1), (teacher / tau).softmax(-1)
    return -(theirs * ours.log_softmax(1)).sum(1).mean()


def distillation_loss(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], tau: float, form: Form = "paper"
) -> Tensor:
    """The loss of similarity maps, from maps (B, C, H, W) of source and target; the teacher's are constants, and are
    resized to the student's grid."""
    size = student[0].shape[-2:]
    theirs = [F.interpolate(t.detach(), size, mode="bilinear", align_corners=False) for t in teacher]
    ours = tuple(map(rows, student))
    given = tuple(map(rows, theirs))
    if form == "paper":
        return row_cross_entropy((ours[0], ours[1]), (given[0], given[1]), tau)
    s, t = ours[0] @ ours[1].transpose(1, 2), given[0] @ given[1].transpose(1, 2)
    loss = official_cross_entropy(s, t, tau)
    if form == "sce":
        loss = loss + official_cross_entropy(s.transpose(1, 2), t.transpose(1, 2), tau)
    return loss


def _check_tau(tau: float) -> None:
    if not tau > 0:
        raise UserError(f"distilldift: the temperature tau must be above 0; given: {tau}.")


def cells(points: Tensor, image: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(..., 2) points in pixels as places on a grid, not rounded."""
    scale = torch.tensor([grid[0] / image[0], grid[1] / image[1]], dtype=points.dtype, device=points.device)
    return points * scale


def nearest_cells(places: Tensor, grid: tuple[int, int]) -> Tensor:
    """(...,) the index of the nearest cell of places (..., 2) on a grid, inside of it."""
    whole = places.round().long()
    return whole[..., 0].clamp(0, grid[0] - 1) * grid[1] + whole[..., 1].clamp(0, grid[1] - 1)


def point_similarity(source: Tensor, target: Tensor, index: Tensor) -> Tensor:
    """(B, N, H W) cosines of the source cells with these indices (B, N) to all target cells."""
    chosen = rows(source).gather(1, index[..., None].expand(-1, -1, source.shape[1]))
    return chosen @ rows(target).transpose(1, 2)


def soft_argmax(scores: Tensor, grid: tuple[int, int], beta: float) -> Tensor:
    """(B, N, 2) the mean place (row, column) under softmax(beta * scores); scores are (B, N, H W)."""
    return (beta * scores).softmax(-1) @ _places(grid, scores)


def _places(grid: tuple[int, int], like: Tensor) -> Tensor:
    """(H W, 2) the places of the cells."""
    axes = (torch.arange(n, dtype=like.dtype, device=like.device) for n in grid)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)


@full_precision
def soft_argmax_loss(
    source: Tensor, target: Tensor, index: Tensor, places: Tensor, beta: float, counted: Tensor | None = None
) -> Tensor:
    """Mean square distance, over points and coordinates, of the soft argmax from where points are.

    Args:
        index: (B, N) source cells.
        places: (B, N, 2) where they are on the target's grid, with their jitter.
        counted: (B, N) which points there are; None: all.
    """
    grid = (target.shape[2], target.shape[3])
    off = (soft_argmax(point_similarity(source, target, index), grid, beta) - places).square().mean(-1)
    return off.mean() if counted is None else (off * counted).sum() / counted.sum().clamp_min(1)


def blurred(index: Tensor, grid: tuple[int, int], kernel: int, sigma: float = 1.4) -> Tensor:
    """(B, N, H, W) one-hot maps of cells (B, N), blurred by a Gaussian window with reflected borders."""
    maps = F.one_hot(index, grid[0] * grid[1]).float().unflatten(-1, grid)
    if kernel == 1:
        return maps
    if kernel // 2 >= min(grid):
        raise UserError(f"distilldift: a blur of {kernel} cells needs a grid larger than {kernel // 2}; it is {grid}.")
    reach = torch.arange(kernel, device=index.device) - kernel // 2
    window = torch.exp(-0.5 * (reach / sigma) ** 2)
    window = window / window.sum()
    half = kernel // 2
    padded = F.pad(maps, (half, half, half, half), mode="reflect").flatten(0, 1)[:, None]
    return F.conv2d(F.conv2d(padded, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))[:, 0].view_as(maps)


@full_precision
def blur_loss(
    source: Tensor,
    target: Tensor,
    index: Tensor,
    wanted: Tensor,
    tau: float,
    kernel: int,
    official: bool = False,
    counted: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of softmax(S / tau) over target cells with blurred one-hot maps of the cells `wanted` (B, N).

    Args:
        official: as released, where probabilities are given to a cross-entropy that takes the points for classes.
        counted: (B, N) which points there are; None: all.
    """
    _check_tau(tau)
    scores = point_similarity(source, target, index)
    given = blurred(wanted, (target.shape[2], target.shape[3]), kernel).flatten(2)
    if official:
        return -(given * (scores / tau).softmax(-1).log_softmax(1)).sum(1).mean()
    each = -(given * (scores / tau).log_softmax(-1)).sum(-1)
    return each.mean() if counted is None else (each * counted).sum() / counted.sum().clamp_min(1)


def correspondences(
    source: Tensor, target: Tensor, points: Tensor, sizes: tuple[tuple[int, int], tuple[int, int]], window: int = 0
) -> Tensor:
    """(B, N, 2) where points of the source image are in the target image: both maps resized to their image, the
    largest cosine; float where a window is given.

    Args:
        points: (B, N, 2) rows and columns in the source image, whole.
        sizes: of source and target image.
        window: side of the window around the largest cosine in which a soft argmax is taken; 0: none.
    """
    here = F.interpolate(source, sizes[0], mode="bilinear", align_corners=False)
    there = rows(F.interpolate(target, sizes[1], mode="bilinear", align_corners=False))
    whole = points.round().long()
    index = whole[..., 0].clamp(0, sizes[0][0] - 1) * sizes[0][1] + whole[..., 1].clamp(0, sizes[0][1] - 1)
    chosen = here.flatten(2).transpose(1, 2).gather(1, index[..., None].expand(-1, -1, source.shape[1]))
    found, scores = [], F.normalize(chosen, dim=-1, eps=1e-8)
    width = sizes[1][1]
    for part in scores.split(max(1, 2**24 // there.shape[1]), 1):
        cosines = part @ there.transpose(1, 2)
        best = cosines.argmax(-1)
        place = torch.stack([best // width, best % width], -1)
        found.append(_windowed(cosines, place, sizes[1], window) if window else place)
    return torch.cat(found, 1)


def _windowed(cosines: Tensor, place: Tensor, size: tuple[int, int], window: int, beta: float = 50.0) -> Tensor:
    """The soft argmax of cosines (B, N, H W) in a window around places (B, N, 2)."""
    every = _places(size, cosines)
    near = ((every - place[..., None, :]).abs() <= window // 2).all(-1)
    return (beta * cosines).masked_fill(~near, -torch.inf).softmax(-1) @ every


def within(found: Tensor, truth: Tensor, reach: Tensor | float) -> Tensor:
    """(B, N) bool: whether found points are at most so far from the true ones (PCK)."""
    return (found.float() - truth.float()).norm(dim=-1) <= reach


def neighbours(embeddings: Tensor, count: int) -> Tensor:
    """(N, count) for each image those of the most similar embeddings (N, D), itself left out; similarity is the product
    of embeddings that were scaled to [0, 1] over the whole matrix.

    Raises:
        UserError: too few images.
    """
    if count >= len(embeddings):
        raise UserError(
            f"distilldift: {count} neighbours need more than {count} images; there are {len(embeddings)}. Lower "
            "distil.neighbours."
        )
    low, high = embeddings.min(), embeddings.max()
    scaled = (embeddings - low) / (high - low).clamp_min(1e-12)
    scores = scaled @ scaled.T
    scores.fill_diagonal_(torch.inf)  # the image itself is the first, which is left out
    return scores.argsort(dim=1, descending=True, stable=True)[:, 1 : count + 1]

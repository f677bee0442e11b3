"""Prune, combine and augment (arXiv 2502.06434): which images are kept, how several are stored as one, and how a stored
image is seen in training.

Images of a class come in rank order; stored image k holds the ranks k, k + ipc, k + 2 ipc, … as tiles, row-major, so
that its tiles have mixed ranks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError

Hardness = Literal["easy", "hard", "balanced", "coverage", "random"]
MANY = 0.15
"""Share of a class beyond which keeping only its easy images is known to hurt."""


def select(
    scores: Tensor,
    rows: Sequence[Tensor],
    count: int,
    hardness: Hardness = "easy",
    generator: torch.Generator | None = None,
    cutoff: float = 0.0,
    strata: int = 50,
) -> Tensor:
    """(classes * count,) rows, class-major, those of each class in rank order; equal scores in the order of their rows.

    Args:
        scores: (N,), small is easy; not read by `random`.
        rows: of each class.
        hardness: `easy`: the smallest scores, `hard`: the largest, `balanced`: evenly spaced ranks, `coverage`: see
            `covering`, `random`: by the generator.
        cutoff, strata: coverage.

    Raises:
        UserError: scores that are not finite.
    """
    if hardness != "random" and not bool(scores.isfinite().all()):
        raise UserError(
            "pca: scores of the training samples are not finite; train the scoring network with a lower learning rate."
        )
    least = min(map(len, rows))
    if count > least:
        warnings.warn(
            f"pca: {count} images of each class are wanted and one class has {least}; its images are repeated.",
            stacklevel=2,
        )
    elif hardness == "easy" and count > MANY * least:
        warnings.warn(
            f"pca: {count} of {least} images of a class are selected; at such a share easy images alone hurt: compare "
            "hardness balanced.",
            stacklevel=2,
        )
    return torch.cat([_ranked(scores, r, count, hardness, generator, cutoff, strata) for r in rows])


def _ranked(
    scores: Tensor,
    rows: Tensor,
    count: int,
    hardness: Hardness,
    generator: torch.Generator | None,
    cutoff: float,
    strata: int,
) -> Tensor:
    if hardness == "random":
        order = torch.randperm(len(rows), generator=generator)
    else:
        own = scores[rows.to(scores.device)].cpu()
        order = torch.argsort(-own if hardness == "hard" else own, stable=True)
        if hardness == "coverage" and count < len(rows):
            order = order[covering(own[order], count, cutoff, strata, generator)]
    if hardness == "balanced" and count <= len(rows):
        order = order[((torch.arange(count) + 0.5) * len(rows) / count).long()]
    return rows[order.repeat(-(-count // len(rows)))[:count]]


def covering(
    ranked: Tensor, count: int, cutoff: float = 0.0, strata: int = 50, generator: torch.Generator | None = None
) -> Tensor:
    """(count,) positions in scores (n,) that ascend: coverage-centric selection (CCS, Zheng et al., arXiv 2210.15809).

    Without the share `cutoff` of the largest scores, the range of scores is cut into `strata` equal parts; the budget
    is spread evenly over them, the smallest part first, so that what a part lacks goes to the others; inside a part the
    choice is random.
    """
    kept = max(round(len(ranked) * (1 - cutoff)), count)
    own = ranked[:kept].double()
    width = (own[-1] - own[0]).clamp_min(1e-300) / strata
    part = ((own - own[0]) / width).long().clamp(max=strata - 1)
    sizes = torch.bincount(part, minlength=strata)
    filled = [int(s) for s in torch.argsort(sizes, stable=True) if sizes[s]]
    shuffled, chosen, left = torch.randperm(kept, generator=generator), [], count
    for done, stratum in enumerate(filled):
        take = min(int(sizes[stratum]), left // (len(filled) - done))
        chosen.append(shuffled[part[shuffled] == stratum][:take])
        left -= take
    return torch.cat(chosen).sort().values


def combine(images: Tensor, ipc: int, grid: int) -> Tensor:
    """Whole images (classes * grid^2 * ipc, C, H, W), class-major in rank order, as stored images (classes * ipc, C,
    grid * h, grid * w).

    Every image is made small with antialiasing to h = ceil(H / grid) and w = ceil(W / grid), not cropped; where a side
    does not divide, the stored image is that much larger.

    Raises:
        UserError: a number of images that does not divide.
    """
    tiles = grid**2
    if grid < 1 or len(images) % (ipc * tiles):
        raise UserError(f"pca: {len(images)} images cannot be stored {tiles} to an image and {ipc} a class.")
    small = resized(images, grid)
    shape = (-1, grid, grid, ipc, *small.shape[1:])  # class, tile row, tile column, image, C, h, w
    packed = small.view(shape).permute(0, 3, 4, 1, 5, 2, 6)
    return packed.reshape(-1, images.shape[1], grid * small.shape[-2], grid * small.shape[-1]).contiguous()


def resized(images: Tensor, grid: int) -> Tensor:
    """(B, C, ceil(H / grid), ceil(W / grid)), bilinear with antialiasing."""
    size = [-(-side // grid) for side in images.shape[-2:]]
    return (
        images if grid == 1 else F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    )


def cut(stored: Tensor, grid: int) -> Tensor:
    """The tiles (B, grid^2, C, h, w) of stored images (B, C, grid * h, grid * w), row-major."""
    height, width = stored.shape[-2] // grid, stored.shape[-1] // grid
    return (
        stored.view(len(stored), -1, grid, height, grid, width)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(len(stored), grid**2, -1, height, width)
    )


def crop_boxes(
    count: int, size: tuple[int, int], drawn: torch.Generator, area: float = 0.08, attempts: int = 10
) -> tuple[Tensor, ...]:
    """(top, left, height, width), each (count,) whole pixels inside an image of that (H, W): an area of [area, 1], a
    ratio of sides of [3/4, 4/3].

    As torchvision's RandomResizedCrop: the first of some attempts that fits, else the whole image.
    """
    height, width = size
    share = area + torch.rand(count, attempts, generator=drawn) * (1 - area)
    ratio = torch.exp((2 * torch.rand(count, attempts, generator=drawn) - 1) * math.log(4 / 3))
    h = (height * width * share / ratio).sqrt().round().long().clamp(min=1)
    w = (height * width * share * ratio).sqrt().round().long().clamp(min=1)
    fits = (h <= height) & (w <= width)
    first = fits.int().argmax(1, keepdim=True)
    none = ~fits.any(1)
    h = h.gather(1, first)[:, 0].masked_fill(none, height)
    w = w.gather(1, first)[:, 0].masked_fill(none, width)
    top = (torch.rand(count, generator=drawn) * (height - h + 1)).long()
    left = (torch.rand(count, generator=drawn) * (width - w + 1)).long()
    return top, left, h, w


def views(
    stored: Tensor,
    grid: int,
    size: tuple[int, int],
    drawn: torch.Generator,
    area: float = 0.08,
    flip: float = 0.5,
    confined: bool = True,
) -> Tensor:
    """One view (B, C, *size) of each stored image: a crop inside one of its tiles (`confined`), or anywhere on it.

    Args:
        area: the smallest share of the tile (or of the stored image) that a crop keeps.
        flip: probability of mirroring.
    """
    parts = cut(stored, grid) if confined else stored[:, None]
    which = torch.randint(parts.shape[1], (len(stored),), generator=drawn)
    x = parts[
        torch.arange(len(stored), device=stored.device), which.to(stored.device)
    ]  # the tile alone: nothing of its neighbours can be seen
    height, width = x.shape[-2:]
    top, left, h, w = (v.to(x) for v in crop_boxes(len(x), (height, width), drawn, area))
    mirrored = (torch.rand(len(x), generator=drawn) < flip).to(x.device)
    zero, sign = torch.zeros_like(top), torch.where(mirrored, -1.0, 1.0).to(x)
    theta = torch.stack(
        [sign * w / width, zero, (2 * left + w) / width - 1, zero, h / height, (2 * top + h) / height - 1], -1
    ).view(-1, 2, 3)
    grid_of = F.affine_grid(theta, [len(x), x.shape[1], *size], align_corners=False)
    return F.grid_sample(x, grid_of, padding_mode="border", align_corners=False)

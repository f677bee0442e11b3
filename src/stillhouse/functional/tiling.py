"""Images of any size through a network that takes sides of a certain multiple, or images too large to be taken at once:
four overlapping crops (the adaptive cropping strategy, ACS, of IMDN, arXiv 1909.11856, section 3.4).

The crops are not exact where a network looks at a whole image, as channel attention does: its statistics are then those
of each crop.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError

SHAVE = 32


def crop_size(side: int, shave: int = SHAVE, multiple: int = 4) -> int:
    """The side of two crops that cover an image's side and overlap by about twice `shave` pixels."""
    whole = side // 2 + shave
    return whole - whole % multiple


def croppable(height: int, width: int, shave: int = SHAVE, multiple: int = 4) -> bool:
    """Whether four crops cover an image of this size and are no larger than it."""
    return all(-(-side // 2) <= crop_size(side, shave, multiple) <= side for side in (height, width))


def four_crops(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    shave: int = SHAVE,
    multiple: int = 4,
    scale: int = 1,
    chunk: int | None = None,
) -> Tensor:
    """A network's output for images, from four overlapping crops of each: (B, C, h, w) -> (B, C', h scale, w scale).

    Args:
        network: crops (n, C, hs, ws) -> (n, C', hs * scale, ws * scale), with hs and ws multiples of `multiple`.
        shave: pixels by which a crop goes beyond its quadrant, before it is rounded down to the multiple.
        scale: by how much the output is larger.
        chunk: crops that go through the network at a time; None: all of them.

    Raises:
        UserError: a `shave` with which the crops do not cover the image, or are larger than it.
    """
    height, width = images.shape[-2:]
    if not croppable(height, width, shave, multiple):
        raise UserError(
            f"Four crops with a shave of {shave} pixels and sides of a multiple of {multiple} do not fit an image of "
            f"{height} x {width} pixels: they must cover it and be no larger. Choose another shave, or pad the image."
        )
    half_h, half_w = height // 2, width // 2
    high, wide = (crop_size(side, shave, multiple) for side in (height, width))
    rows, columns = (slice(0, high), slice(height - high, height)), (slice(0, wide), slice(width - wide, width))
    crops = torch.cat([images[..., r, c] for r in rows for c in columns])
    parts = [network(part) for part in crops.split(chunk or len(crops))]
    top_left, top_right, bottom_left, bottom_right = torch.cat(parts).chunk(4)
    top, left = slice(0, half_h * scale), slice(0, half_w * scale)
    bottom, right = slice((high - height + half_h) * scale, None), slice((wide - width + half_w) * scale, None)
    upper = torch.cat([top_left[..., top, left], top_right[..., top, right]], -1)
    lower = torch.cat([bottom_left[..., bottom, left], bottom_right[..., bottom, right]], -1)
    return torch.cat([upper, lower], -2)


def any_size(
    network: Callable[[Tensor], Tensor], images: Tensor, *, shave: int = SHAVE, multiple: int = 4, scale: int = 1
) -> Tensor:
    """A network's output for images of any size: at once where both sides are multiples, else by `four_crops`, and
    where an image is too small for that, mirrored at its lower and right edge up to the next multiple."""
    height, width = images.shape[-2:]
    if height % multiple == 0 and width % multiple == 0:
        return network(images)
    if croppable(height, width, shave, multiple):
        return four_crops(network, images, shave=shave, multiple=multiple, scale=scale)
    return padded_to(network, images, multiple=multiple, scale=scale)


def padded_to(network: Callable[[Tensor], Tensor], images: Tensor, *, multiple: int, scale: int = 1) -> Tensor:
    """A network's output for images mirrored at their lower and right edge up to the next multiple, without what was
    added."""
    height, width = images.shape[-2:]
    mode = "reflect" if min(height, width) >= multiple else "replicate"
    padded = F.pad(images, (0, -width % multiple, 0, -height % multiple), mode=mode)
    return network(padded)[..., : height * scale, : width * scale]

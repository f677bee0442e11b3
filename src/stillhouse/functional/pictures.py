"""Images as networks and people see them: fitted to a size, normalised, class maps drawn over them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(B, C, H, W) uint8, or floats in [0, 1], as float32 with each channel centred and scaled."""
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    centre, scale = (torch.tensor(v, dtype=torch.float32)[:, None, None] * unit for v in (mean, std))
    return images.to(torch.float32, copy=True).sub_(centre).div_(scale)


def unnormalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The inverse of `normalise`: (B, C, H, W) float32 as uint8."""
    centre, scale = (torch.tensor(v, dtype=torch.float32, device=images.device)[:, None, None] for v in (mean, std))
    return ((images * scale + centre).clamp(0, 1) * 255).round().to(torch.uint8)


def renormalise(
    images: Tensor,
    given: tuple[Sequence[float], Sequence[float]],
    own: tuple[Sequence[float], Sequence[float]],
    size: tuple[int, int] | None = None,
    interpolation: str = "bilinear",
) -> Tensor:
    """Float images (B, C, H, W) as another network sees them.

    Args:
        images: normalised by the mean and standard deviation per channel `given`; () for images in [0, 1].
        own: the other network's; () leaves the values as they are.
        size: (H, W) to resize to; None: as they are.
        interpolation: how, bilinear or bicubic.
    """
    if size is not None and tuple(images.shape[2:]) != tuple(size):
        images = F.interpolate(images, size, mode=interpolation, align_corners=False, antialias=True)
    if not own[0] or (tuple(given[0]), tuple(given[1])) == (tuple(own[0]), tuple(own[1])):
        return images
    mean, std = (_channels(images, values, empty) for values, empty in zip(given, (0.0, 1.0)))
    own_mean, own_std = (_channels(images, values, 0.0) for values in own)
    return images * (std / own_std) + (mean - own_mean) / own_std


def _channels(images: Tensor, values: Sequence[float], empty: float) -> Tensor:
    return torch.tensor(tuple(values) or (empty,), dtype=images.dtype, device=images.device)[:, None, None]


def with_channels(image: Tensor, channels: int) -> Tensor:
    """A uint8 image (C, H, W) with 1 or 3 channels: grey repeated, colour as its luma (ITU-R 601)."""
    if image.shape[0] == channels:
        return image
    if channels == 3:
        return image[:1].expand(3, -1, -1)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    return (image[:3].float() * weights).sum(0, keepdim=True).round().to(torch.uint8)


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A uint8 image (C, H, W) of another size (bilinear, antialiased)."""
    if tuple(image.shape[-2:]) == size:
        return image
    out = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)
    return out[0].round().clamp(0, 255).to(torch.uint8)


def centre(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The centre of a uint8 image (C, H, W) resized so that its shorter side is 8/7 of the wanted one (256 for 224)."""
    if tuple(image.shape[-2:]) == size:
        return image
    height, width = image.shape[-2:]
    scale = max(size[0] / height, size[1] / width) * 8 / 7
    whole = resized(image, (max(round(height * scale), size[0]), max(round(width * scale), size[1])))
    top, left = (whole.shape[-2] - size[0]) // 2, (whole.shape[-1] - size[1]) // 2
    return whole[:, top : top + size[0], left : left + size[1]]


def palette(classes: int) -> Tensor:
    """(classes, 3) uint8 colours that are far apart, the same for every picture."""
    steps = [
        colorsys.hsv_to_rgb((i * 0.618034) % 1, 0.85 - 0.35 * (i % 3) / 2, 1.0 - 0.3 * (i % 2)) for i in range(classes)
    ]
    return (torch.tensor(steps) * 255).round().to(torch.uint8)


def overlay(image: Tensor, classes: Tensor, number: int, share: float = 0.6) -> Tensor:
    """A uint8 image (3, H, W) with a class map (H, W) drawn over it; negative ids are left as they are."""
    colours = palette(number).to(image.device)[classes.clamp_min(0)].permute(2, 0, 1)
    mixed = (share * colours.float() + (1 - share) * image.float()).round().to(torch.uint8)
    return torch.where(classes >= 0, mixed, image)

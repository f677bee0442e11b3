"""How far two images are apart, as super-resolution measures it: PSNR and SSIM of RGB or of luma (BT.601, 16 to 235).

Images here hold values from 0 to 255, whatever their type; `whole_levels` makes them from a network's output. The
Gaussian window, the constants and the region of SSIM are those of Wang et al. (IEEE TIP 2004). Figures are computed in
float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError

PEAK = 255.0
WINDOW, SIGMA = 11, 1.5
LUMA = (65.481, 128.553, 24.966)


def whole_levels(images: Tensor) -> Tensor:
    """Images in [0, 1] as whole grey levels 0 to 255 (float64): clamped, scaled, rounded."""
    return (images.double().clamp(0, 1) * PEAK).round()


def luma(images: Tensor) -> Tensor:
    """Y of YCbCr by BT.601 in studio range, not rounded: levels (..., 3, H, W) -> (..., H, W), 16 to 235.

    >>> luma(torch.full((3, 1, 1), 255.0)).round().item()
    235.0
    """
    weights = torch.tensor(LUMA, dtype=torch.float64, device=images.device)
    return 16 + (images.double() * weights[:, None, None]).sum(-3) / PEAK


def shaved(images: Tensor, border: int) -> Tensor:
    """Images (..., H, W) without `border` pixels on each side. Raises `UserError` where nothing would be left."""
    height, width = images.shape[-2:]
    if min(height, width) <= 2 * border:
        raise UserError(f"An image of {height} x {width} pixels has nothing left without {border} pixels on each side.")
    return images[..., border : height - border, border : width - border]


def psnr(images: Tensor, truth: Tensor, peak: float = PEAK) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image: (B, ...) and (B, ...) -> (B,); infinite where they are equal.

    >>> psnr(torch.zeros(1, 2, 2), torch.full((1, 2, 2), 255.0))
    tensor([0.], dtype=torch.float64)
    """
    error = (images.double() - truth.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(peak**2 / error)


def ssim(images: Tensor, truth: Tensor, peak: float = PEAK) -> Tensor:
    """Structural similarity of each image: (B, H, W) or (B, C, H, W), each channel by itself -> (B,).

    A Gaussian window of 11 x 11 and sigma 1.5, population moments, the mean over the positions at which the window lies
    within the image.

    Raises:
        UserError: an image smaller than the window.
    """
    height, width = images.shape[-2:]
    if min(height, width) < WINDOW:
        raise UserError(
            f"SSIM looks through windows of {WINDOW} x {WINDOW} pixels, but an image has {height} x {width}."
        )
    x, y = (v.double().reshape(-1, 1, height, width) for v in (images, truth))
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    taps = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    taps = taps / taps.sum()
    moments = torch.cat([x, y, x * x, y * y, x * y])
    moments = F.conv2d(F.conv2d(moments, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
    mean_x, mean_y, xx, yy, xy = moments.chunk(5)
    low, high = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    brightness = (2 * mean_x * mean_y + low) / (mean_x**2 + mean_y**2 + low)
    contrast = (2 * (xy - mean_x * mean_y) + high) / (xx - mean_x**2 + yy - mean_y**2 + high)
    return (brightness * contrast).reshape(len(images), -1).mean(1)


def enlarged(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, C, h, w) in [0, 1] resized by bicubic interpolation (Keys, a = -0.5, as Pillow and MATLAB have it) to
    whole grey levels of the size, (B, C, *size) in [0, 1]."""
    if tuple(images.shape[-2:]) == size:
        return images
    out = F.interpolate(images, size=size, mode="bicubic", antialias=True)
    return ((out.clamp(0, 1) * PEAK).round() / PEAK).to(images.dtype)

"""Augmentation that can be learned: images in, changed images out, differentiable in what is learned. Noise is torch's,
drawn at every call.

An augmentor maps normalised images (B, C, H, W) to changed ones and a penalty (a scalar, 0 for most).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError

Augmentor = Callable[[Tensor], tuple[Tensor, Tensor]]


def warp(images: Tensor, theta: Tensor, background: Tensor | None) -> Tensor:
    """Affine resampling, bilinear.

    Args:
        images: (B, C, H, W).
        theta: (B, 2, 3), as `affine_grid` takes them.
        background: (C, 1, 1) what lies outside the image; None repeats its border.
    """
    grid = F.affine_grid(theta, list(images.shape), align_corners=False).to(images.dtype)
    if background is None:
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return F.grid_sample(images - background, grid, align_corners=False) + background


class LearnedAffine(nn.Module):
    """HARD-affine: theta = identity + mu + L n with n ~ N(0, I) a sample; mu and L are learned.

    A sample whose map would change areas beyond [1 - max_area, 1 + max_area] stays as it is, and standard deviations
    are held below 1.

    Args:
        background: (C,) what lies outside the image, normalised; None repeats the border.
        sigma: standard deviation at the start.
        covariance: `diagonal`, or `full` (a lower triangular L).
        max_area: bound on |det - 1|.
    """

    background: Tensor | None

    def __init__(
        self,
        background: Sequence[float] | None,
        sigma: float = 0.1,
        covariance: Literal["diagonal", "full"] = "diagonal",
        max_area: float = 0.75,
    ) -> None:
        super().__init__()
        self.register_buffer("background", None if background is None else torch.tensor(background)[:, None, None])
        self.max_area = max_area
        self.mu = nn.Parameter(torch.zeros(6))
        self.log_sigma = nn.Parameter(torch.full((6,), sigma).log())
        self.off_diagonal = nn.Parameter(torch.zeros(6, 6)) if covariance == "full" else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        factor = torch.diag(self.log_sigma.clamp_max(0).exp())
        if self.off_diagonal is not None:
            factor = factor + self.off_diagonal.tril(-1)
        noise = torch.randn(len(images), 6, device=images.device, dtype=self.mu.dtype)
        change = (self.mu + noise @ factor.T).view(-1, 2, 3)
        theta = torch.eye(2, 3, device=images.device, dtype=self.mu.dtype) + change
        area = theta[:, 0, 0] * theta[:, 1, 1] - theta[:, 0, 1] * theta[:, 1, 0]
        fits = ((area - 1).abs() <= self.max_area)[:, None, None]
        theta = torch.where(fits, theta, torch.eye(2, 3, device=images.device, dtype=self.mu.dtype))
        return warp(images, theta, self.background), images.new_zeros(())


class RandomAffine(nn.Module):
    """Rotations and shifts drawn evenly, nothing learned: the upper bound where the teacher's own transformations are
    known.

    Args:
        background: (C,), normalised; None repeats the border.
        rotate: largest angle, in radians.
        shift: largest shift, as a share of the image.
    """

    background: Tensor | None

    def __init__(self, background: Sequence[float] | None, rotate: float, shift: float) -> None:
        super().__init__()
        self.register_buffer("background", None if background is None else torch.tensor(background)[:, None, None])
        self.rotate, self.shift = rotate, shift

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        draws = 2 * torch.rand(len(images), 3, device=images.device) - 1
        angle, move = draws[:, 0] * self.rotate, 2 * self.shift * draws[:, 1:]
        cos, sin = angle.cos(), angle.sin()
        theta = torch.stack([torch.stack([cos, -sin, move[:, 0]], 1), torch.stack([sin, cos, move[:, 1]], 1)], 1)
        return warp(images, theta, self.background), images.new_zeros(())


class LearnedMix(nn.Module):
    """HARD-mix: m x + (1 - m) x' with another image x' of the batch; the mask m follows the similarity of both images'
    patches.

    Args:
        channels: C.
        patch: pixels of a patch's side, which is one value of the mask.
        width: of the patches' embeddings.
        noise: standard deviation added to the similarity.
    """

    def __init__(self, channels: int, patch: int = 4, width: int = 16, noise: float = 1.0) -> None:
        super().__init__()
        self.patch, self.noise = patch, noise
        self.own = nn.Conv2d(channels, width, patch, patch)
        self.other = nn.Conv2d(channels, width, patch, patch)
        self.bias = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if len(images) < 2:
            raise UserError("hard: mixing needs a batch of at least two images.")
        if min(images.shape[-2:]) < self.patch:
            raise UserError(
                f"hard: augmentor.patch is {self.patch}, but images are {images.shape[-2]} x {images.shape[-1]} pixels."
            )
        partner = images[torch.randperm(len(images), device=images.device)]
        own = self.own(images)
        similarity = (own * self.other(partner)).sum(1, keepdim=True) / own.shape[1] ** 0.5
        mask = torch.sigmoid(similarity + self.bias + self.noise * torch.randn_like(similarity))
        mask = F.interpolate(mask, size=images.shape[-2:], mode="nearest")
        return mask * images + (1 - mask) * partner, images.new_zeros(())

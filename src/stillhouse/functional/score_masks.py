"""What a denoiser of functional maps teaches a solve: a mask, and a direction (DiffuMatch, arXiv 2507.23715)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""Matrices (B, 1, k, k) and levels (B,) -> denoised (B, 1, k, k)."""


@torch.no_grad()
def distilled_mask(
    functional: Tensor, denoise: Denoise, noise: Tensor, sigma: float = 1.0, normalise: bool = False
) -> Tensor:
    """(k, k) where a denoiser holds entries of a functional map back: with Y = ||C| + s n|, the square root of
    mean |Y - D(Y, s)| / (2 s mean |Y|), above its least entry.

    Args:
        functional: C (k, k).
        noise: n (N, k, k), standard normal.
        normalise: limit the ratio by its median first: sqrt(clamp(Q - med / 2, 0, 2 med)).
    """
    levels = torch.full((len(noise),), sigma, dtype=noise.dtype, device=noise.device)
    noisy = (functional.abs() + sigma * noise).abs()
    denoised = denoise(noisy[:, None], levels)[:, 0]
    ratio = ((noisy - denoised).abs() / (2 * sigma)).mean(0) / noisy.mean(0)
    if normalise:
        median = ratio.median()
        ratio = torch.minimum((ratio - median / 2).clamp_min(0), 2 * median)
    mask = ratio.sqrt()
    return mask - mask.min()


@torch.no_grad()
def guidance(functional: Tensor, denoise: Denoise, uniform: Tensor, noise: Tensor, scale: float = 1.0) -> Tensor:
    """(k, k) the direction of score distillation: mean_b |C| - D(|C| + s_b n, s_b), with s_b = 0.01 + scale u_b and one
    noise matrix n (k, k) for all levels (B,); 0 where it is not a number."""
    levels = 0.01 + scale * uniform
    magnitude = functional.abs()
    denoised = denoise((magnitude + levels[:, None, None] * noise)[:, None], levels)[:, 0]
    return (magnitude - denoised).mean(0).nan_to_num(0.0)


def score_distillation_loss(functional: Tensor, direction: Tensor, form: str = "intended", lr: float = 1e-3) -> Tensor:
    """A loss whose gradient moves |C| against `direction` (k, k).

    `intended`: half the sum of (|C| - sg(|C| - g))^2, times 2 lr / k^2, which has the scale of the released one.
    `released`: mean (|C| - sg(C - lr g))^2, whose target of negative entries is negative, so that it mostly pulls
    these towards 0.
    """
    magnitude = functional.abs()
    if form == "released":
        return (magnitude - (functional - lr * direction).detach()).square().mean()
    return lr * (magnitude - (magnitude - direction).detach()).square().mean()

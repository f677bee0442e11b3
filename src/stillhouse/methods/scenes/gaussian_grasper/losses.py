"""What a rendered view is compared with: colour, depth, normals, and features in two ways (efficient feature
distillation)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.functional.images import ssim
from stillhouse.functional.precision import full_precision


@dataclass(frozen=True)
class Drawn:
    """Pixels of a view, by their numbers, row by row.

    Attributes:
        first, second: (K, P) of each mask, in pairs.
        paired: (K, P) whether there is such a pair.
        lifted: (L,) those whose features are lifted.
        counted: (L,) whether there is such a pixel.
    """

    first: Tensor
    second: Tensor
    paired: Tensor
    lifted: Tensor
    counted: Tensor


@dataclass(frozen=True)
class Weights:
    """Of the terms."""

    color: float = 1.0
    ssim: float = 0.2
    depth: float = 1.0
    normal: float = 1.0
    contrast: float = 1.0
    lift: float = 1.0
    ratio: float = 0.1


@full_precision
def color_loss(rendered: Tensor, image: Tensor, valid: Tensor, ssim_weight: float = 0.2) -> Tensor:
    """(1 - w) mean |I - I_hat| over valid pixels + w (1 - SSIM) with invalid ones 0 in both; (H, W, 3), (H, W)."""
    seen = valid[..., None].to(rendered.dtype)
    absolute = ((rendered - image).abs() * seen).sum() / (3 * seen.sum()).clamp_min(1)
    if not ssim_weight:
        return absolute
    a, b = ((x * seen).movedim(-1, 0)[None] for x in (rendered, image))
    return (1 - ssim_weight) * absolute + ssim_weight * (1 - ssim(a, b, peak=1.0)[0]).to(rendered.dtype)


@full_precision
def depth_loss(rendered: Tensor, depth: Tensor, valid: Tensor, nearest: float = 0.05) -> Tensor:
    """Mean |d - d_hat| of valid pixels beyond `nearest` metres; all (H, W)."""
    counted = (valid & (depth > nearest)).to(rendered.dtype)
    return ((rendered - depth).abs() * counted).sum() / counted.sum().clamp_min(1)


@full_precision
def normal_loss(rendered: Tensor, normal: Tensor, depth: Tensor, valid: Tensor, nearest: float = 0.05) -> Tensor:
    """0.5 mean square + 0.5 cosine distance at the pixels of the depth loss; the target (H, W, 3) has length 1, what is
    rendered has not."""
    counted = (valid & (depth > nearest)).to(rendered.dtype)
    count = counted.sum().clamp_min(1)
    target = F.normalize(normal, dim=-1, eps=1e-12)
    squared = ((rendered - target).square().sum(-1) * counted).sum() / (3 * count)
    cosine = (F.normalize(rendered, dim=-1, eps=1e-12) * target).sum(-1)
    return 0.5 * squared + 0.5 * (1 - (cosine * counted).sum() / count)


@full_precision
def contrastive_loss(features: Tensor, drawn: Drawn) -> Tensor:
    """Mean over masks of the cosine distance of pairs of pixels of one mask; features (H, W, D). Pairs of different
    masks are not pushed apart: the lifted features do that."""
    flat = features.flatten(0, 1)
    cosine = _cosine(flat[drawn.first], flat[drawn.second])  # (K, P)
    there = drawn.paired.to(cosine.dtype)
    each = 1 - (cosine * there).sum(1) / there.sum(1).clamp_min(1)
    counted = drawn.paired.any(1).to(cosine.dtype)
    return (each * counted).sum() / counted.sum().clamp_min(1)


@full_precision
def lifted_loss(features: Tensor, targets: Tensor, drawn: Drawn, lift: nn.Module) -> Tensor:
    """Cosine distance of lifted features (H, W, D) at the drawn pixels and the image encoder's there, (L, E)."""
    cosine = _cosine(lift(features.flatten(0, 1)[drawn.lifted]), targets)
    there = drawn.counted.to(cosine.dtype)
    return ((1 - cosine) * there).sum() / there.sum().clamp_min(1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (F.normalize(a, dim=-1, eps=1e-12) * F.normalize(b, dim=-1, eps=1e-12)).sum(-1)


def color_change(harmonics: Tensor) -> Tensor:
    """Mean over Gaussians and colours of the norm of the coefficients of degree 1 and more; (N, K, 3)."""
    return harmonics[:, 1:].norm(dim=1).mean() if harmonics.shape[1] > 1 else harmonics.sum() * 0


def elongation(log_scales: Tensor, most: float = 10.0) -> Tensor:
    """Mean over Gaussians of how far the ratio of the largest to the smallest scale lies above `most`; (N, 3)."""
    ratio = (log_scales.amax(-1) - log_scales.amin(-1)).exp()
    return ratio.clamp_min(most).mean() - most


def visible_ids(masks: Tensor, valid: Tensor) -> Tensor:
    """Mask ids (H, W), -1 where a pixel is not valid."""
    return torch.where(valid, masks, -1)


def lift_share(points: int, present: Tensor) -> Tensor:
    """Pixels that are lifted of each mask: points over the number of distinct ids less one, rounded down.

    Args:
        present: (K + 1,) whether an id is in the view; the first is that of pixels without a mask.
    """
    return points // (present.sum() - 1).clamp_min(1)


def draw_pixels(ids: Tensor, masks: int, pairs: int, points: int) -> Drawn:
    """Pixels of each mask: two draws without replacement of at most `pairs`, taken in pairs; and those that are lifted,
    of each mask as many, `points` altogether. By torch's generator; without a look at the values by the host.

    Args:
        ids: (H, W) from 0 to masks - 1, -1: none.
    """
    flat, size = ids.flatten(), ids.numel()
    count = torch.zeros(masks + 1, dtype=torch.int64, device=ids.device).scatter_add_(
        0, flat + 1, torch.ones_like(flat)
    )
    start = (count.cumsum(0) - count)[1:, None]
    orders = [(flat + 0.999 * draw).argsort() for draw in torch.rand(3, size, device=ids.device)]
    rank = torch.arange(min(pairs, size), device=ids.device)
    paired = rank < count[1:, None]
    first, second = (order[(start + rank).clamp_max(size - 1)] for order in orders[:2])
    rank = torch.arange(min(points, size), device=ids.device)
    lifts = rank < torch.minimum(count[1:, None], lift_share(points, count > 0))
    lifted = orders[2][(start + rank).clamp_max(size - 1)].flatten()
    front = lifts.flatten().logical_not().argsort(stable=True)[: 2 * points]
    return Drawn(first, second, paired, lifted[front], lifts.flatten()[front])


def every_pixel(ids: Tensor, drawn: Drawn) -> Drawn:
    """The same pairs, and all pixels of masks lifted."""
    flat = ids.flatten()
    return replace(drawn, lifted=torch.arange(len(flat), device=ids.device), counted=flat >= 0)

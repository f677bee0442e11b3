"""Patches, activation maps and the masked step (NRR-DD, arXiv 2503.18267): which parts of real images are kept, and how the rest learns."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.augmentation import apply
from stillhouse.signals import Taps, evaluating


def activation_map(network: nn.Module, taps: Taps, x: Tensor, labels: Tensor) -> Tensor:
    """Class activation maps (B, h, w) of the classes `labels` (B,), detached: sum_k F_k(h, w) dz_y/dF_k(h, w), times h w.

    Where the features are pooled, or flattened, into one linear layer this is the map of Zhou et al. (2016): its mean is the logit less the bias.

    Args:
        network: in evaluation mode.
        taps: of the network, with one name: where the features (B, K, h, w) are.
    """
    with torch.enable_grad():
        with taps.capture() as got:
            logits = network(x.detach().requires_grad_())
        features = got[taps.names[0]]
        if features.ndim != 4:
            raise UserError(f"An activation map needs features (B, K, h, w), but the tap '{taps.names[0]}' gives {tuple(features.shape)}; set cam.")
        (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), features)
        found = (features * gradient).sum(1).detach().float()
    return found * found.shape[-2] * found.shape[-1]


def critical(activation: Tensor, size: tuple[int, int], tiles: int = 1) -> Tensor:
    """Maps (B, h, w) as (B, 1, H, W) in [0, 1]: negative parts cut off, enlarged (bilinear), from least to most of each image; a constant map is 0.

    Args:
        tiles: a side; above 1 each tile runs from least to most of its own.
    """
    grown = F.interpolate(activation.clamp_min(0)[:, None], size=size, mode="bilinear", align_corners=False)
    grown = grown.view(len(grown), tiles, size[0] // tiles, tiles, size[1] // tiles)
    low, high = grown.amin((2, 4), keepdim=True), grown.amax((2, 4), keepdim=True)
    found = torch.where(high - low > 1e-8, (grown - low) / (high - low).clamp_min(1e-8), torch.zeros_like(grown))
    return found.view(-1, 1, *size)


def mask(criticality: Tensor, eps: float) -> Tensor:
    """M = max(0, eps - C): 0 in critical regions, eps where nothing is active."""
    return (eps - criticality).clamp_min(0)


@torch.no_grad()
def masked_step(x: Tensor, before: Tensor, masked: Tensor) -> None:
    """Turn an optimiser's step, in place, from x into before + M (x - before); a pixel of mask 0 is exactly as it was."""
    x.copy_(before + masked * (x - before))


def boxes(count: int, area: float, drawn: torch.Generator) -> Tensor:
    """Square crops (count, 3) as top, left and side, shares of the image; the areas are uniform from `area` to 1."""
    side = (area + torch.rand(count, generator=drawn) * (1 - area)).sqrt()
    return torch.stack([torch.rand(count, generator=drawn) * (1 - side), torch.rand(count, generator=drawn) * (1 - side), side], 1)


def share_inside(criticality: Tensor, box: Tensor) -> Tensor:
    """(B,): the part of each map (B, 1, H, W) that lies in its box (B, 3); a map of zeros counts as even."""
    height, width = criticality.shape[-2:]
    top, left, side = (v[:, None] for v in box.to(criticality.device).unbind(1))
    rows = (torch.arange(height, device=criticality.device) + 0.5) / height
    columns = (torch.arange(width, device=criticality.device) + 0.5) / width
    inside = ((rows >= top) & (rows < top + side))[:, :, None] & ((columns >= left) & (columns < left + side))[:, None, :]
    weights = torch.where(criticality.amax((1, 2, 3), keepdim=True) > 0, criticality, torch.ones_like(criticality))[:, 0]
    return (weights * inside).sum((1, 2)) / weights.sum((1, 2))


@torch.no_grad()
def discover(
    network: nn.Module,
    taps: Taps,
    images: Tensor,
    label: int,
    wanted: int,
    *,
    factor: int,
    crops: int,
    keep: float,
    area: float,
    choose: Literal["low", "high"],
    drawn: torch.Generator,
) -> Tensor:
    """Patches (wanted, C, H / factor, W / factor) of one class, of square crops of its real images (n, C, H, W).

    Those with the largest share of the image's activation are kept (`keep` of all), of them those that the network gets right, of them the least sure
    ones (`choose: high`, as RDED: the surest). Where they do not suffice, wrong ones follow, the surest of them first, and then all again, with a warning.
    """
    height, width = images.shape[-2:]
    y = torch.full((len(images),), label, device=images.device)
    maps = critical(activation_map(network, taps, images, y), (height, width))
    patches, shares, sure, right = [], [], [], []
    for _ in range(crops):
        box = boxes(len(images), area, drawn)
        top, left, side = box.unbind(1)
        cut = apply(images, (("resized_crop", (top, left, side, side)),))
        if factor > 1:
            cut = F.interpolate(cut, size=(height // factor, width // factor), mode="bilinear", antialias=True)
        seen = cut if factor == 1 else F.interpolate(cut, size=(height, width), mode="bilinear", align_corners=False)
        with evaluating(network):
            probs = network(seen).float().softmax(1)
        patches.append(cut)
        shares.append(share_inside(maps, box))
        sure.append(probs[:, label])
        right.append(probs.argmax(1) == label)
    patch, share, p, ok = torch.cat(patches), torch.cat(shares), torch.cat(sure), torch.cat(right)
    kept = share.argsort(dim=0, descending=True, stable=True)[: max(int(keep * len(share)), min(wanted, len(share)))]
    order = p[kept].argsort(dim=0, descending=choose == "high", stable=True)
    good, wrong = kept[order][ok[kept][order]], kept[p[kept].argsort(dim=0, descending=True, stable=True)]
    chosen = torch.cat([good, wrong[~ok[wrong]]])
    if len(good) < wanted:
        warnings.warn(f"Class {label} has {len(good)} patches that the network gets right, of {wanted} wanted; others follow.", stacklevel=2)
        chosen = chosen.repeat(-(-wanted // len(chosen)))
    return patch[chosen[:wanted]]


def mosaic(patches: Tensor, factor: int) -> Tensor:
    """Patches (n factor^2, C, h, w) as (n, C, h factor, w factor), row by row."""
    channels, h, w = patches.shape[1:]
    grid = patches.view(-1, factor, factor, channels, h, w).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, channels, h * factor, w * factor).contiguous()

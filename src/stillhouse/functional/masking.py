"""Masks over the patches of an image: what a masked encoder sees, how its tokens go back to their places, and targets
patch by patch.

MAE (He et al., CVPR 2022, arXiv 2111.06377): a uniform draw a patch, of which the smallest are visible, in shuffled
order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision


class Masking(NamedTuple):
    """Which of L patches are visible, for each of B images.

    Attributes:
        ids_keep: (B, K) raster positions of the visible patches, in the order in which encoders see them.
        ids_restore: (B, L) where each raster position lies in [visible, removed].
        mask: (B, L) in raster order, 0 visible and 1 removed.
    """

    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor


def visible_count(length: int, ratio: float) -> int:
    """int(length * (1 - ratio)), the patches that stay visible.

    Raises:
        UserError: a ratio outside [0, 1), or one that leaves no patch.

    >>> visible_count(196, 0.98), visible_count(64, 0.75)
    (3, 16)
    """
    if not 0 <= ratio < 1:
        raise UserError(f"mask_ratio must be at least 0 and below 1; given: {ratio}.")
    count = int(length * (1 - ratio))
    if count < 1:
        raise UserError(
            f"mask_ratio {ratio} leaves none of {length} patches visible; lower it, or use smaller patches.",
        )
    return count


def masking_of(ids_shuffle: Tensor, keep: int) -> Masking:
    """The masking whose first `keep` entries of `ids_shuffle` (B, L), a permutation for each image, are visible."""
    ids_restore = ids_shuffle.argsort(1)
    return Masking(ids_shuffle[:, :keep], ids_restore, (ids_restore >= keep).float())


def random_masking(noise: Tensor, ratio: float) -> Masking:
    """The patches with the smallest noise are visible, in its order.

    Args:
        noise: (B, L) uniform draws.
        ratio: share of the patches that is removed. Raises as `visible_count`.
    """
    return masking_of(noise.argsort(1), visible_count(noise.shape[1], ratio))


def grid_blocks(rows: int, columns: int) -> int:
    """Blocks of 2 x 2 patches in a grid. Raises `UserError` for an odd side."""
    if rows % 2 or columns % 2:
        raise UserError(f"Block masks need an even grid of patches; this one is {rows} x {columns}. Use random masks.")
    return rows * columns // 4


def patches_of_blocks(ids: Tensor, columns: int) -> Tensor:
    """Raster positions of the patches of 2 x 2 blocks: the upper left ones of all blocks, the upper right, the lower
    left, the lower right.

    Args:
        ids: (B, n) block positions, row by row.
        columns: width of the grid of patches.

    Returns:
        (B, 4n)
    """
    first = ids // (columns // 2) * (2 * columns) + ids % (columns // 2) * 2
    return torch.cat([first, first + 1, first + columns, first + columns + 1], 1)


def take_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """(B, K, D): tokens (B, L, D) at positions (B, K)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def restore_tokens(visible: Tensor, filler: Tensor, ids_restore: Tensor) -> Tensor:
    """(B, L, D) in raster order: visible tokens (B, K, D) at their places, the filler (1, 1, D) at the removed ones."""
    removed = filler.expand(len(visible), ids_restore.shape[1] - visible.shape[1], -1)
    return take_tokens(torch.cat([visible, removed.to(visible.dtype)], 1), ids_restore)


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, L, patch * patch * C): images (B, C, H, W) patch by patch in raster order, each as (row, column, channel).

    Raises:
        UserError: a side that the patch does not divide.
    """
    b, c, height, width = images.shape
    if height % patch or width % patch:
        raise UserError(
            f"Patches of {patch} pixels do not divide an image of {height} x {width}; choose a divisor of both.",
        )
    parts = images.view(b, c, height // patch, patch, width // patch, patch)
    return parts.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def normalised_patches(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """Each patch (B, L, P) with its mean taken out, over its standard deviation (unbiased variance plus eps, MAE's
    `norm_pix_loss`)."""
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + eps).sqrt()


@full_precision
def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (B, L) over the entries where the mask is 1, all samples together; 0 where there is none."""
    return (values * mask).sum() / mask.sum().clamp_min(1)


@full_precision
def masked_pixel_loss(predicted: Tensor, patches: Tensor, mask: Tensor, normalise: bool = False) -> Tensor:
    """Squared error of removed patches: mean over a patch, then over all removed ones of the batch (MAE).

    Args:
        predicted: (B, L, P).
        patches: (B, L, P), the images as `patchify` gives them.
        mask: (B, L), 1 where removed. Without any the loss is 0.
        normalise: compare with `normalised_patches`.
    """
    target = normalised_patches(patches) if normalise else patches
    return masked_mean((predicted - target).square().mean(-1), mask)

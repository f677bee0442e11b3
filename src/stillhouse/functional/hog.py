"""Histograms of oriented gradients as dense targets (Dalal and Triggs, CVPR 2005; MaskFeat, CVPR 2022, arXiv
2112.09133).

Channel by channel: unsigned angles in equal bins, hard assignment, no block normalisation; whitened within each cell.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision


@full_precision
def hog(pixels: Tensor, cell: int = 8, orientations: int = 9) -> Tensor:
    """(B, C, H / cell, W / cell, orientations): in each cell, the summed magnitude of gradients by angle, over the
    cell's area.

    Gradients are differences of the two neighbours, not halved; 0 on the image's border.

    Args:
        pixels: (B, C, H, W), values 0 to 255.
        cell: pixels a side of a cell.
        orientations: bins over 180 degrees.

    Raises:
        UserError: a side that the cell does not divide.
    """
    if pixels.shape[-2] % cell or pixels.shape[-1] % cell:
        raise UserError(
            f"HOG cells of {cell} pixels do not divide an image of {pixels.shape[-2]} x {pixels.shape[-1]}.",
        )
    down, right = torch.zeros_like(pixels), torch.zeros_like(pixels)
    down[..., 1:-1, :] = pixels[..., 2:, :] - pixels[..., :-2, :]
    right[..., 1:-1] = pixels[..., 2:] - pixels[..., :-2]
    angle = torch.rad2deg(torch.atan2(down, right)) % 180
    bins = (angle * orientations / 180).floor().clamp_max(orientations - 1)  # an angle may round up to 180
    magnitude = torch.hypot(right, down)
    return torch.stack([F.avg_pool2d(magnitude * (bins == i), cell) for i in range(orientations)], -1)


def hog_targets(pixels: Tensor, patch: int, cells: int = 2, orientations: int = 9, eps: float = 1e-5) -> Tensor:
    """(B, L, cells * cells * orientations * C): each patch's histograms, standardised within each cell and channel.

    Args:
        pixels: (B, C, H, W), values 0 to 255.
        patch: pixels a side of a patch.
        cells: cells a side of a patch. Numbers of a patch are ordered by (cell row, cell column, bin, channel).
        orientations: bins of a cell.
        eps: added to the variance of a cell, so that a flat one gives zeros.

    Raises:
        UserError: a patch that the cells do not divide.
    """
    if patch % cells:
        raise UserError(f"{cells} x {cells} HOG cells do not divide a patch of {patch} pixels; choose a divisor.")
    found = F.layer_norm(hog(pixels, patch // cells, orientations), (orientations,), eps=eps)
    b, c, rows, columns, bins = found.shape
    parts = found.view(b, c, rows // cells, cells, columns // cells, cells, bins)
    return parts.permute(0, 2, 4, 3, 5, 6, 1).reshape(b, -1, cells * cells * bins * c)

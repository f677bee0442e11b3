"""Parts of images."""

from __future__ import annotations

from torch import Tensor


def cut(image: Tensor, window: tuple[int, int, int, int]) -> Tensor:
    """The part (C, bottom - top, right - left) of an image (C, H, W) in a window (left, top, right, bottom) of whole
    pixels; 0 where that lies outside.

    >>> cut(torch.ones(1, 2, 2), (-1, 0, 1, 2)).tolist()
    [[[0.0, 1.0], [0.0, 1.0]]]
    """
    left, top, right, bottom = window
    height, width = image.shape[-2:]
    out = image.new_zeros(image.shape[0], max(bottom - top, 1), max(right - left, 1))
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if x2 > x1 and y2 > y1:
        out[:, y1 - top : y2 - top, x1 - left : x2 - left] = image[:, y1:y2, x1:x2]
    return out


def centre_square(width: int, height: int) -> tuple[int, int, int, int]:
    """left, top, right, bottom of the largest square in the middle of an image.

    >>> centre_square(6, 2)
    (2, 0, 4, 2)
    """
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side

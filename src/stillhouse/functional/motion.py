"""Motion between frames, as video codecs estimate it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def block_motion(frame: Tensor, before: Tensor, block: int = 8, reach: int = 3) -> Tensor:
    """(B, H, W): how many pixels the content of each block came from, by the smallest sum of absolute differences; of
    equal ones the shortest way.

    Args:
        frame, before: (B, C, H, W); `block` divides H and W.
        block: pixels a side of a block.
        reach: how many pixels a block may have moved, in each direction.
    """
    height, width = frame.shape[-2:]
    padded = F.pad(before, (reach,) * 4, mode="replicate")
    ways = [(y, x) for y in range(2 * reach + 1) for x in range(2 * reach + 1)]
    ways.sort(key=lambda way: (way[0] - reach) ** 2 + (way[1] - reach) ** 2)
    costs = torch.stack(
        [
            F.avg_pool2d((frame - padded[..., y : y + height, x : x + width]).abs().mean(1, keepdim=True), block)[:, 0]
            for y, x in ways
        ]
    )
    length = torch.tensor([((y - reach) ** 2 + (x - reach) ** 2) ** 0.5 for y, x in ways], device=frame.device)
    best = length[costs.argmin(0)]
    return best.repeat_interleave(block, 1).repeat_interleave(block, 2)


def frame_difference(frame: Tensor, before: Tensor) -> Tensor:
    """(B, H, W): the mean absolute difference of a frame's channels to the frame before, (B, C, H, W)."""
    return (frame - before).abs().mean(1)

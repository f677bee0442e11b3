"""`GridDetector`: what our one-stage detectors share: anchors, the meaning of their grids, losses, and boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.functional.grids import Level, grid_detections, grid_losses

ANCHORS = ((1.0, 1.75, 2.75), (2.0, 3.0, 5.0), (2.5, 4.0, 6.0))
"""Sides of the usual square anchors, in cells, of a first, second and third level."""
PRIOR = -4.0  # the bias of objectness before training: few places hold a thing


class GridDetector(nn.Module):
    """A detector whose heads give grids (B, A, H, W, 5 + K). A subclass sets the levels and gives the grids.

    In training, with targets, it returns its losses; else the boxes it finds: `boxes` (B, N, 4) corners in pixels,
    `scores` (B, N), and `labels` (B, N), padded with score 0.

    Args:
        classes: K.
        strides: pixels of a cell, by level.
        anchors: (width, height) in pixels of each anchor, by level; None: squares that suit the strides.
        gains: weights of the losses of boxes, objectness, and classes.
        overlap: the intersection over union from which two boxes of a class are duplicates.
    """

    def __init__(
        self,
        classes: int,
        strides: Sequence[int],
        anchors: Sequence[Sequence[Sequence[float]]] | None = None,
        gains: Sequence[float] = (2.0, 20.0, 1.0),
        overlap: float = 0.5,
    ) -> None:
        super().__init__()
        given = anchors or [[(s * side, s * side) for side in sides] for s, sides in zip(strides, ANCHORS)]
        if len(given) != len(strides) or any(len(a) != len(given[0]) or not len(a) for a in given):
            raise UserError(
                f"options.anchors: give as many anchors, [width, height] in pixels, for each of the {len(strides)} "
                f"levels; given: {[len(a) for a in given]}."
            )
        if len(gains) != 3:
            raise UserError(f"options.gains: give the weights of boxes, objectness and classes; given: {list(gains)}.")
        self.classes, self.strides, self.overlap = classes, tuple(strides), overlap
        self.gains = (float(gains[0]), float(gains[1]), float(gains[2]))
        self.anchors: Tensor
        self.register_buffer("anchors", torch.tensor(given, dtype=torch.float32), persistent=False)

    @property
    def outputs(self) -> int:
        """Channels of a head: A * (5 + K)."""
        return self.anchors.shape[1] * (5 + self.classes)

    @property
    def levels(self) -> list[Level]:
        """The grids' anchors and strides."""
        return [Level(a, s) for a, s in zip(self.anchors, self.strides)]

    def head(self, width: int) -> nn.Conv2d:
        """A 1x1 convolution of `width` channels to a head's, whose objectness starts low."""
        layer = nn.Conv2d(width, self.outputs, 1)
        nn.init.normal_(layer.weight, 0.0, 0.01)
        assert layer.bias is not None
        with torch.no_grad():
            layer.bias.zero_().view(self.anchors.shape[1], -1)[:, 4] = PRIOR
        return layer

    def as_grid(self, output: Tensor) -> Tensor:
        """A head's (B, A * (5 + K), H, W) as (B, A, H, W, 5 + K)."""
        return output.unflatten(1, (self.anchors.shape[1], 5 + self.classes)).permute(0, 1, 3, 4, 2)

    def grids(self, images: Tensor) -> list[Tensor]:
        """The heads' numbers (B, A, H, W, 5 + K), by level, of images (B, C, H, W)."""
        raise NotImplementedError

    def detections(self, grids: Sequence[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """`boxes`, `scores` and `labels` of the grids of images (height, width)."""
        boxes, scores, labels = grid_detections(grids, self.levels, size, self.overlap)
        return {"boxes": boxes, "scores": scores, "labels": labels}

    def losses(self, grids: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`box`, `objectness` and `class`, weighted by the gains."""
        return grid_losses(grids, targets, self.levels, self.gains)

    def forward(
        self, images: Tensor, targets: Sequence[Mapping[str, Any]] | None = None, search: bool = True
    ) -> dict[str, Tensor]:
        """Losses where targets (`boxes` corners in pixels, `labels`) are given; else boxes, or without `search`
        nothing: the network has run for what is captured inside it."""
        grids = self.grids(images)
        if not search:
            return {}
        if targets is not None:
            return self.losses(grids, targets)
        return self.detections(grids, (images.shape[-2], images.shape[-1]))

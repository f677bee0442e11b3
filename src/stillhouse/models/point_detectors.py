"""Detectors in point clouds: PointPillars, SECOND and PointRCNN, small, with shapes that do not depend on the data.

Lang et al., CVPR 2019 (1812.05784); Yan et al., Sensors 2018; Shi et al., CVPR 2019 (1812.04244). What is ours: boxes
are read off heatmaps of their centres (Yin et al., 2006.11275) or off foreground points, in place of anchors and bins;
SECOND's convolutions are dense, not sparse; of PointRCNN there is the first of its two stages, which has the features
that are distilled. A heading is known up to a half turn, as two double angles: all that an overlap sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.boxes import pairwise_iou, unsuppressed_by
from stillhouse.functional.point_clouds import (
    Voxels,
    farthest_points,
    grid_shape,
    inside,
    nearest_rows,
    on_grid,
    pooled,
    rows_at,
    voxelised,
)
from stillhouse.functional.rotated_boxes import bev_corners
from stillhouse.models.registry import register
from stillhouse.nn.masked_norm import MaskedBatchNorm

FOUND = 50  # boxes of a cloud
PRIOR = -2.19  # the bias of scores before training: few places hold a thing
CODE = 8  # dx, dy, z, log length, log width, log height, sin and cos of the doubled yaw
Targets = Sequence[Mapping[str, Any]]


@dataclass
class Wanted:
    """True boxes of a batch, padded: boxes (B, M, 7), labels (B, M), there (B, M)."""

    boxes: Tensor
    labels: Tensor
    there: Tensor


def wanted(targets: Targets) -> Wanted:
    """The boxes that are learned: not those that a target marks `ignored`."""
    pad = nn.utils.rnn.pad_sequence
    boxes = pad([t["boxes"] for t in targets], batch_first=True)
    labels = pad([t["labels"] for t in targets], batch_first=True)
    kept = [~t["ignored"] if "ignored" in t else torch.ones_like(t["labels"], dtype=torch.bool) for t in targets]
    return Wanted(boxes, labels, pad(kept, batch_first=True))


def encoded(boxes: Tensor, origin: Tensor) -> Tensor:
    """(..., 8) codes of boxes (..., 7) as seen from (..., 2) origins."""
    turn = torch.stack([(2 * boxes[..., 6]).sin(), (2 * boxes[..., 6]).cos()], -1)
    return torch.cat([boxes[..., :2] - origin, boxes[..., 2:3], boxes[..., 3:6].clamp_min(1e-3).log(), turn], -1)


def decoded(codes: Tensor, origin: Tensor) -> Tensor:
    """Boxes (..., 7) of codes (..., 8): the inverse of `encoded`, with yaw within a quarter turn of 0."""
    yaw = torch.atan2(codes[..., 6:7], codes[..., 7:8]) / 2
    return torch.cat([codes[..., :2] + origin, codes[..., 2:3], codes[..., 3:6].clamp(-5, 5).exp(), yaw], -1)


def focal_loss(scores: Tensor, heat: Tensor, number: Tensor) -> Tensor:
    """CornerNet's loss of logits and heatmaps of one shape: 1 at a centre, less around it (1808.01244, Eq. 1)."""
    log_p, log_q = F.logsigmoid(scores), F.logsigmoid(-scores)
    p, centre = log_p.exp(), (heat == 1).to(scores.dtype)
    right = centre * (1 - p).square() * log_p
    wrong = (1 - centre) * (1 - heat).pow(4) * p.square() * log_q
    return -(right + wrong).sum() / number.clamp_min(1)


class PointDetector(nn.Module):
    """What our detectors share. A subclass gives, for clouds (B, N, F), the scores and codes of places and where these
    lie; in training, with targets, it returns its losses, else boxes, best first, padded with score 0.

    Args:
        classes: K.
        low, high: the range in metres, x, y, z.
        overlap: the intersection over union, of rectangles along x and y around the boxes, from which two boxes of a
            class are duplicates.
        gain: weight of the loss of codes.
    """

    candidates: ClassVar[int] = FOUND  # places that are looked at

    def __init__(
        self, classes: int, low: Sequence[float], high: Sequence[float], overlap: float = 0.2, gain: float = 0.5
    ) -> None:
        super().__init__()
        if len(low) != 3 or len(high) != 3 or not all(a < b for a, b in zip(low, high)):
            raise UserError(f"The range of a detector in points is low to high, x, y, z; given: {low} and {high}.")
        self.classes, self.low, self.high = classes, tuple(low), tuple(high)
        self.overlap, self.gain = overlap, gain

    def places(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, L, K) of places, their codes (B, L, 8), and where they lie (B, L, 2)."""
        raise NotImplementedError

    def losses(self, points: Tensor, targets: Targets) -> dict[str, Tensor]:
        """`score` and `box`."""
        raise NotImplementedError

    def peaks(self, scores: Tensor) -> Tensor:
        """Scores (B, L, K) in which only places that are better than their neighbours are left."""
        return scores

    def forward(self, points: Tensor, targets: Targets | None = None) -> dict[str, Tensor]:
        if targets is not None:
            return self.losses(points, targets)
        scores, codes, origin = self.places(points)
        best, index = self.peaks(scores.sigmoid()).flatten(1).topk(min(self.candidates, scores[0].numel()), dim=1)
        labels, place = index % self.classes, index // self.classes
        boxes = decoded(rows_at(codes, place), rows_at(origin, place)).float()
        corners = bev_corners(boxes)
        hulls = torch.cat([corners.amin(2), corners.amax(2)], -1)
        best = best * unsuppressed_by(pairwise_iou(hulls, hulls), labels, self.overlap)
        best, order = best.topk(min(FOUND, best.shape[1]), dim=1)
        return {"boxes": rows_at(boxes, order), "scores": best, "labels": labels.gather(1, order)}


class CentreHead(nn.Module):
    """A shared convolution, then scores and codes of each cell (B, C, H, W) -> (B, K + 8, H, W)."""

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.shared = _block(channels, width, 1)
        self.out = nn.Conv2d(width, classes + CODE, 1)
        assert self.out.bias is not None
        nn.init.constant_(self.out.bias[:classes], PRIOR)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.shared(x))
        return out


class Backbone(nn.Module):
    """Stages of convolutions on the map from above, all brought to the first's size and put side by side.

    Args:
        channels: of the map.
        width: of the first stage; each further one has twice as many.
        depths: of each stage, convolutions after its first, which has stride 2 (the very first: `stride`).
        side: channels of each stage at the end.
    """

    def __init__(self, channels: int, width: int, depths: Sequence[int], stride: int, side: int) -> None:
        super().__init__()
        self.stages, self.sides = nn.ModuleList(), nn.ModuleList()
        for i, depth in enumerate(depths):
            own = width * 2**i
            more = [_block(own, own, 1) for _ in range(depth)]
            self.stages.append(nn.Sequential(_block(channels, own, stride if i == 0 else 2), *more))
            self.sides.append(_block(own, side, 1, 1))
            channels = own
        self.channels = side * len(depths)

    def forward(self, x: Tensor) -> Tensor:
        out: list[Tensor] = []
        for stage, side in zip(self.stages, self.sides):
            x = stage(x)
            map_ = side(x)
            out.append(F.interpolate(map_, size=out[0].shape[-2:], mode="nearest") if out else map_)
        return torch.cat(out, 1)


def _block(channels: int, width: int, stride: int, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


class GridPointDetector(PointDetector):
    """A detector whose places are the cells of a map from above; a subclass makes the map.

    Args:
        voxel: size of a pillar or voxel in metres, x, y, z.
        stride: pillars a side of one cell of the head's map.
    """

    def __init__(
        self,
        classes: int,
        low: Sequence[float],
        high: Sequence[float],
        voxel: Sequence[float],
        stride: int,
        overlap: float,
        gain: float,
    ) -> None:
        super().__init__(classes, low, high, overlap, gain)
        depth, height, width = grid_shape(low, high, voxel)
        if min(depth, height, width) < 1 or (width < 2 * stride or height < 2 * stride):
            raise UserError(f"options.voxel: {list(voxel)} metres leave a grid of {depth} x {height} x {width} cells.")
        self.voxel, self.stride = tuple(voxel), stride
        self.cells = (-(-height // stride), -(-width // stride))
        y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in self.cells), indexing="ij")
        side = torch.tensor([voxel[0] * stride, voxel[1] * stride])
        self.centres: Tensor
        self.register_buffer("centres", torch.stack([x, y], -1) * side + torch.tensor(low[:2]), persistent=False)

    def bev(self, points: Tensor) -> Tensor:
        """The head's map (B, K + 8, H, W) of clouds."""
        raise NotImplementedError

    def places(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.bev(points).flatten(2).mT
        scores, codes = out[..., : self.classes], out[..., self.classes :]
        return scores, codes, self.centres.flatten(0, 1).expand(len(out), -1, -1)

    def peaks(self, scores: Tensor) -> Tensor:
        grid = scores.mT.reshape(len(scores), self.classes, *self.cells)
        return (grid * (F.max_pool2d(grid, 3, 1, 1) == grid)).flatten(2).mT

    def losses(self, points: Tensor, targets: Targets) -> dict[str, Tensor]:
        out, true = self.bev(points), wanted(targets)
        scores, codes = out[:, : self.classes], out[:, self.classes :]
        number = true.there.sum()
        if not true.boxes.shape[1]:
            return {"score": focal_loss(scores, torch.zeros_like(scores), number), "box": self.gain * (codes * 0).sum()}
        side = torch.tensor([self.voxel[0], self.voxel[1]], device=out.device) * self.stride
        place = ((true.boxes[..., :2] - out.new_tensor(self.low[:2])) / side).floor().long()
        height, width = self.cells
        x, y = place[..., 0].clamp(0, width - 1), place[..., 1].clamp(0, height - 1)
        cell = y * width + x
        heat = self._heat(true, rows_at(self.centres.flatten(0, 1).expand(len(out), -1, -1), cell))
        at = rows_at(codes.flatten(2).mT, cell)
        goal = encoded(true.boxes, rows_at(self.centres.flatten(0, 1).expand(len(out), -1, -1), cell))
        gap = (F.l1_loss(at, goal.to(at.dtype), reduction="none") * true.there[..., None]).sum()
        return {"score": focal_loss(scores, heat, number), "box": self.gain * gap / number.clamp_min(1)}

    def _heat(self, true: Wanted, middle: Tensor) -> Tensor:
        """(B, K, H, W): 1 at the cell (B, M, 2) of a box's centre, and a bell around it as wide as the box allows."""
        away = (self.centres[None, None] - middle[:, :, None, None]).square().sum(-1)
        cell = self.voxel[0] * self.stride
        spread = (true.boxes[..., 3:5].amin(-1) / 3).clamp_min(0.6 * cell)[..., None, None]
        bell = (-away / (2 * spread.square())).exp() * true.there[..., None, None]
        kinds = F.one_hot(true.labels, self.classes).to(bell.dtype)[..., None, None]
        return (bell[:, :, None] * kinds).amax(1)


class PillarEncoder(nn.Module):
    """Points of each pillar as one vector: ten numbers a point (x, y, z, intensity, offsets to the pillar's mean and to
    its centre), a linear layer, batch norm, ReLU, and the largest of each channel.

    `counts` is a module that gives the points of each pillar as they are, so that they can be tapped.
    """

    def __init__(self, features: int, width: int, low: Sequence[float], voxel: Sequence[float]) -> None:
        super().__init__()
        self.low, self.voxel = tuple(low), tuple(voxel)
        self.linear, self.norm = nn.Linear(features + 6, width, bias=False), MaskedBatchNorm(width)
        self.counts = nn.Identity()

    def forward(self, voxels: Voxels) -> Tensor:
        """(B, P, C); 0 for an empty slot."""
        counts: Tensor = self.counts(voxels.counts)
        xyz = voxels.points[..., :3]
        slots = voxels.slots.clamp_max(counts.shape[1] - 1)
        mean = pooled(xyz, voxels, "sum") / counts[..., None].clamp_min(1)
        height, width = voxels.shape[1:]
        cells = voxels.cells % (height * width)
        steps = torch.stack([cells % width, cells // width, voxels.cells // (height * width)], -1)
        centre = (steps + 0.5) * xyz.new_tensor(self.voxel) + xyz.new_tensor(self.low)
        offsets = [xyz - rows_at(mean, slots), xyz - rows_at(centre, slots)]
        valid = voxels.valid
        decorated = torch.cat([voxels.points, *offsets], -1).masked_fill(~valid[..., None], 0)
        out: Tensor = self.norm(self.linear(decorated), valid).relu()
        return pooled(out, voxels, "amax")


@register({"point_pillars": {}})
class PointPillars(GridPointDetector):
    """Pillars, encoded and put on the ground; convolutions; scores and boxes of each cell.

    Taps: `encoder` (B, P, C) with `encoder.counts` (B, P), `scatter` (B, C, H, W), `backbone.stages.0`, `.1`.

    Args:
        num_classes, input_shape: K, and (N, F) of a cloud.
        low, high: the range in metres.
        voxel: of a pillar, x and y; it is as high as the range.
        width: channels of the encoder and of the first stage.
        depths: of each stage on the map from above, convolutions after its first.
        side: channels of each stage where they are put side by side; default: width.
        stride: of the first stage.
        most_points, pillars: of a pillar, and of a cloud.
    """

    def __init__(
        self,
        num_classes: int = 3,
        input_shape: Sequence[int] = (2048, 4),
        low: Sequence[float] = (0.0, -12.0, -3.0),
        high: Sequence[float] = (24.0, 12.0, 1.0),
        voxel: Sequence[float] = (0.5, 0.5),
        width: int = 32,
        depths: Sequence[int] = (1, 1),
        stride: int = 1,
        side: int | None = None,
        most_points: int = 32,
        pillars: int = 1200,
        overlap: float = 0.2,
        gain: float = 0.5,
    ) -> None:
        size = (*voxel[:2], high[2] - low[2])
        super().__init__(num_classes, low, high, size, stride, overlap, gain)
        self.most_points, self.pillars = most_points, pillars
        self.encoder = PillarEncoder(input_shape[-1], width, low, size)
        self.scatter = nn.Identity()
        self.backbone = Backbone(width, width, depths, stride, side or width)
        self.head = CentreHead(self.backbone.channels, width, num_classes)

    def bev(self, points: Tensor) -> Tensor:
        voxels = voxelised(points, self.low, self.high, self.voxel, self.most_points, self.pillars)
        ground = self.scatter(on_grid(self.encoder(voxels), voxels).flatten(1, 2))
        out: Tensor = self.head(self.backbone(ground))
        return out


@register({"second": {}})
class Second(GridPointDetector):
    """The mean of each voxel's points, three convolutions in space that halve its height, then as PointPillars.

    Args:
        voxel: x, y, z.
        others: as of PointPillars.
    """

    def __init__(
        self,
        num_classes: int = 3,
        input_shape: Sequence[int] = (2048, 4),
        low: Sequence[float] = (0.0, -12.0, -3.0),
        high: Sequence[float] = (24.0, 12.0, 1.0),
        voxel: Sequence[float] = (0.5, 0.5, 0.5),
        width: int = 32,
        depths: Sequence[int] = (1, 1),
        stride: int = 1,
        side: int | None = None,
        most_points: int = 5,
        voxels: int = 1600,
        overlap: float = 0.2,
        gain: float = 0.5,
    ) -> None:
        super().__init__(num_classes, low, high, voxel, stride, overlap, gain)
        self.most_points, self.voxels = most_points, voxels
        narrow = max(width // 4, 2)
        layers, channels, levels = [], input_shape[-1] + 1, grid_shape(low, high, voxel)[0]
        for _ in range(3):
            step = 2 if levels > 1 else 1
            conv = nn.Conv3d(channels, narrow, 3, (step, 1, 1), 1, bias=False)
            layers += [conv, nn.BatchNorm3d(narrow), nn.ReLU()]
            channels, levels = narrow, -(-levels // step)
        self.middle = nn.Sequential(*layers)
        self.backbone = Backbone(narrow * levels, width, depths, stride, side or width)
        self.head = CentreHead(self.backbone.channels, width, num_classes)

    def bev(self, points: Tensor) -> Tensor:
        voxels = voxelised(points, self.low, self.high, self.voxel, self.most_points, self.voxels)
        counts = voxels.counts[..., None].to(points.dtype)
        mean = pooled(voxels.points.masked_fill(~voxels.valid[..., None], 0), voxels, "sum") / counts.clamp_min(1)
        space = on_grid(torch.cat([mean, (counts > 0).to(mean.dtype)], -1), voxels)
        out: Tensor = self.head(self.backbone(self.middle(space).flatten(1, 2)))
        return out


class Gathering(nn.Module):
    """PointNet++'s set abstraction: some points, each with the largest of what a perceptron makes of its neighbours.

    Args:
        channels: of the points' features.
        width: of what it gives.
        points: how many points are left.
        neighbours: of each, the nearest.
    """

    def __init__(self, channels: int, width: int, points: int, neighbours: int) -> None:
        super().__init__()
        self.points, self.neighbours = points, neighbours
        self.first, self.second = nn.Linear(channels + 3, width, bias=False), nn.Linear(width, width, bias=False)
        self.norms = nn.ModuleList([MaskedBatchNorm(width), MaskedBatchNorm(width)])

    def forward(self, xyz: Tensor, features: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, n, 3), (B, n, C) and (B, n) bool -> those of the points that are left."""
        with torch.no_grad():
            number = min(self.points, xyz.shape[1])
            chosen = farthest_points(xyz, number, valid)
            at, left = rows_at(xyz, chosen), valid.gather(1, chosen)
            near = nearest_rows(at, xyz, min(self.neighbours, xyz.shape[1]), valid)
            there = rows_at(valid[..., None], near)[..., 0] & left[..., None]
        edges = torch.cat([rows_at(features, near), rows_at(xyz, near) - at[:, :, None]], -1)
        edges = self.norms[0](self.first(edges), there).relu()
        edges = self.norms[1](self.second(edges), there).relu()
        return at, edges.masked_fill(~there[..., None], 0).amax(2), left


class Spreading(nn.Module):
    """PointNet++'s feature propagation: each point takes the mean of the three nearest coarse points, by inverse
    distance, beside what it had."""

    def __init__(self, fine: int, coarse: int, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(fine + coarse, width, bias=False), MaskedBatchNorm(width)

    def forward(self, xyz: Tensor, features: Tensor, valid: Tensor, coarse: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """(B, n, C') of points with features (B, n, C) from coarse points, features and what is valid of them."""
        at, values, there = coarse
        with torch.no_grad():
            near = nearest_rows(xyz, at, min(3, at.shape[1]), there)
            closeness = 1 / ((rows_at(at, near) - xyz[:, :, None]).square().sum(-1) + 1e-4)
            closeness = closeness * rows_at(there[..., None], near)[..., 0]
            share = closeness / closeness.sum(-1, keepdim=True).clamp_min(1e-9)
        mixed = (rows_at(values, near) * share[..., None].to(values.dtype)).sum(2)
        out: Tensor = self.norm(self.linear(torch.cat([features, mixed], -1)), valid).relu()
        return out.masked_fill(~valid[..., None], 0)


@register({"point_rcnn": {}})
class PointRCNN(PointDetector):
    """PointRCNN's first stage: features of each point by PointNet++, whether it lies in a box, and that box.

    Tap: `neck` (B, C, N), 0 for a point outside of the range.

    Args:
        points: how many are left by each gathering.
        neighbours: of each of these.
        width: channels of the neck; the gatherings have a half, all and twice as many.
        others: as of PointPillars.
    """

    candidates: ClassVar[int] = 500

    def __init__(
        self,
        num_classes: int = 3,
        input_shape: Sequence[int] = (2048, 4),
        low: Sequence[float] = (0.0, -12.0, -3.0),
        high: Sequence[float] = (24.0, 12.0, 1.0),
        points: Sequence[int] = (256, 64),
        neighbours: int = 16,
        width: int = 32,
        overlap: float = 0.2,
        gain: float = 0.5,
    ) -> None:
        super().__init__(num_classes, low, high, overlap, gain)
        features = input_shape[-1] - 3
        widths = [features + 1, *(max(width * 2**i // 2, 2) for i in range(len(points)))]
        self.gathering = nn.ModuleList(Gathering(a, b, n, neighbours) for a, b, n in zip(widths, widths[1:], points))
        up, spread = widths[-1], []
        for fine in widths[-2::-1]:
            spread.append(Spreading(fine, up, width))
            up = width
        self.spreading = nn.ModuleList(spread)
        self.neck = nn.Identity()
        self.scores, self.codes = nn.Linear(width, num_classes), nn.Linear(width, CODE)
        nn.init.constant_(self.scores.bias, PRIOR)

    def places(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        valid = inside(points, self.low, self.high)
        low, high = points.new_tensor(self.low), points.new_tensor(self.high)
        xyz = torch.where(valid[..., None], points[..., :3], high + 100)  # far from every point
        features = torch.cat([points[..., 3:], (xyz[..., 2:3] - low[2]) / (high[2] - low[2])], -1)
        levels = [(xyz, features.masked_fill(~valid[..., None], 0), valid)]
        for gathering in self.gathering:
            levels.append(gathering(*levels[-1]))
        coarse = levels.pop()
        for spreading in self.spreading:
            fine = levels.pop()
            coarse = (fine[0], spreading(*fine, coarse), fine[2])
        rows = self.neck(coarse[1].mT).mT
        codes = self.codes(rows)
        codes = torch.cat([codes[..., :2], codes[..., 2:3] + xyz[..., 2:3], codes[..., 3:]], -1)
        scores = self.scores(rows).masked_fill(~valid[..., None], -math.inf)
        return scores, codes, xyz[..., :2]

    def losses(self, points: Tensor, targets: Targets) -> dict[str, Tensor]:
        scores, codes, origin = self.places(points)
        true, valid = wanted(targets), inside(points, self.low, self.high)
        scores = scores.masked_fill(~valid[..., None], PRIOR)
        if not true.boxes.shape[1]:
            zero = torch.zeros_like(scores)
            return {"score": _point_focal(scores, zero, valid), "box": self.gain * (codes * 0).sum()}
        offset = points[:, :, None, :3] - true.boxes[:, None, :, :3]  # (B, N, M, 3)
        cos, sin = true.boxes[:, None, :, 6].cos(), true.boxes[:, None, :, 6].sin()
        along = torch.stack(
            [cos * offset[..., 0] + sin * offset[..., 1], cos * offset[..., 1] - sin * offset[..., 0]], -1
        )
        local = torch.cat([along, offset[..., 2:]], -1).abs()
        half = true.boxes[:, None, :, 3:6] / 2 + 0.05
        within = (local <= half).all(-1) & true.there[:, None] & valid[..., None]
        own, which = within.any(-1), within.long().argmax(-1)
        labels = F.one_hot(true.labels.gather(1, which), self.classes) * own[..., None]
        goal = encoded(rows_at(true.boxes, which), origin)
        gap = (F.l1_loss(codes, goal.to(codes.dtype), reduction="none") * own[..., None]).sum()
        return {
            "score": _point_focal(scores, labels.to(scores.dtype), valid),
            "box": self.gain * gap / own.sum().clamp_min(1),
        }


def _point_focal(scores: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """The focal loss (1708.02002) of logits (B, N, K) with labels of 0 and 1, over the positive points."""
    p = scores.sigmoid()
    away = torch.where(labels > 0, 1 - p, p)
    alpha = torch.where(labels > 0, 0.25, 0.75)
    terms = alpha * away.square() * F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    return 4 * (terms * valid[..., None]).sum() / labels.sum().clamp_min(1)

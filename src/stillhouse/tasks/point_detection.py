"""Detection in point clouds: upright boxes in space, turned, with a class and a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.evaluation.judge import Meter
from stillhouse.evaluation.point_detection import GROUPS, PointDetectionMeter
from stillhouse.functional.pictures import palette
from stillhouse.functional.point_clouds import NOWHERE
from stillhouse.functional.rotated_boxes import bev_corners, pairwise_overlaps
from stillhouse.models import accepts, build
from stillhouse.signals import Batch, Signals, own_precision
from stillhouse.tasks.base import Task

SHOWN_SCORE = 0.3  # boxes with less are not drawn
PICTURE = 320  # pixels of the longer side of a picture
TARGET = "target"


@dataclass(frozen=True)
class PointDetection(Task):
    """Clouds (B, N, F): x, y, z in metres, and what else the sensor gives; rows outside of the range pad a cloud. Under
    `target` a mapping for each: `boxes` (n, 7) x, y, z of the centre, length, width, height, yaw; `labels` (n,) class
    ids from 0; `ignored` (n,) those that are neither learned nor judged.

    A network is one of ours, or any module called as these are: `model(points, targets)` returns its losses by name,
    and in evaluation `model(points)` a mapping with `boxes` (B, M, 7), `scores` (B, M), the best first, and `labels`
    (B, M).

    Attributes:
        classes: names, in label order.
        low, high: the range in metres, x, y, z.
        points: N.
        features: F.
        overlap: of each class, the intersection over union from which a box is right.
    """

    name: ClassVar[str] = "point_detection"
    parts: ClassVar[Mapping[str, str]] = {
        "boxes": "(B, M, 7) x, y, z of the centre, length, width, height, yaw, in evaluation",
        "scores": "(B, M) in [0, 1], best first; 0 where there is no box",
        "labels": "(B, M) class ids",
    }
    supervised: ClassVar[tuple[str, ...]] = ("own",)
    groups: ClassVar[tuple[str, ...]] = GROUPS
    reads: ClassVar[str] = "points"
    classes: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    points: int
    features: int
    overlap: tuple[float, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    def build(self, spec: ModelSpec) -> nn.Module:
        """A detector for these classes and this range. Raises `UserError` for one that takes no range."""
        if spec.model.startswith("stillhouse:") and not accepts(spec.model, "low"):
            raise UserError(
                f"'{spec.model}' is no detector in point clouds; take stillhouse:point_pillars, stillhouse:second or "
                "stillhouse:point_rcnn."
            )
        options = dict(spec.options)
        for key in ("low", "high"):
            if accepts(spec.model, key):
                options.setdefault(key, getattr(self, key))
        return build(spec.model_copy(update={"options": options}), len(self.classes), (self.points, self.features))

    def call(self, model: nn.Module, batch: Batch, *, losses: bool = False) -> Any:
        with own_precision(model):
            if not losses:
                return model(batch["input"])
            if TARGET not in batch:
                raise UserError(f"A detector's own losses need boxes under `{TARGET}` in every batch.")
            return _Losses(model(batch["input"], batch[TARGET]))

    def read(self, output: Any, batch: Batch) -> Signals:
        """Losses, or boxes, scores and labels. Raises `UserError` for the output of another kind of network."""
        if isinstance(output, _Losses):
            return Signals(losses=dict(output))
        if not isinstance(output, Mapping) or not all(name in output for name in self.parts):
            raise UserError(
                "A detector in point clouds gives boxes (B, M, 7), scores (B, M) and labels (B, M) by name; this "
                f"network returned a {type(output).__name__}."
            )
        return Signals(parts={name: output[name] for name in self.parts})

    def meter(self, groups: Sequence[str]) -> Meter:
        return PointDetectionMeter(self.classes, groups, self.overlap)

    def example(self) -> Batch:
        return {"input": torch.full((1, self.points, self.features), NOWHERE)}

    def for_export(self, module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
        return _Boxes(module, self), ("boxes", "scores", "labels")

    # ---- for people --------------------------------------------------------------------------------------------------

    def inside(self, points: Tensor) -> Tensor:
        """The points (M, F) that lie in the range."""
        low, high = points.new_tensor(self.low), points.new_tensor(self.high)
        return points[((points[:, :3] >= low) & (points[:, :3] < high)).all(1)]

    def sized(self, points: Tensor) -> Tensor:
        """(N, F) of points (M, F): evenly taken, or padded."""
        number, there = self.points, len(points)
        if there > number:
            return points[torch.arange(number) * there // number]
        return torch.cat([points, points.new_full((number - there, points.shape[1]), NOWHERE)])

    @torch.no_grad()
    def predict(self, module: nn.Module, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each cloud (M, F): `counts` by class, `objects` (label, score, box in metres), and `picture`, from above.
        Boxes with a score below 0.3 are left out."""
        found, device = [], next(module.parameters()).device
        for cloud in inputs:
            points = torch.as_tensor(cloud, dtype=torch.float32)
            if points.ndim != 2 or points.shape[1] != self.features:
                raise UserError(f"A cloud has rows of {self.features} numbers; this one is {tuple(points.shape)}.")
            x = self.sized(self.inside(points))
            outputs = self.read(self.call(module, {"input": x[None].to(device)}), {"input": x[None]})
            boxes, labels = self._shown(outputs)[0]
            scores = outputs.require("part:scores")[0].tolist()
            names = [self.classes[i] for i in labels.tolist()]
            objects = [
                {"label": name, "score": round(score, 4), "box": [round(v, 2) for v in box]}
                for name, score, box in zip(names, scores, boxes.tolist())
            ]
            counts = {name: names.count(name) for name in self.classes if name in names}
            found.append(
                {"counts": counts or {"nothing": 0}, "objects": objects, "picture": self._drawn(x, boxes, labels)}
            )
        return found

    def _shown(self, outputs: Signals) -> list[tuple[Tensor, Tensor]]:
        """Of each cloud, the boxes (n, 7) that are shown and their labels (n,)."""
        boxes, scores, labels = (outputs.require(f"part:{name}").cpu() for name in ("boxes", "scores", "labels"))
        return [(b[s >= SHOWN_SCORE], y[s >= SHOWN_SCORE]) for b, s, y in zip(boxes, scores, labels)]

    def pictures(self, batch: Batch, outputs: Signals) -> list[Tensor]:
        return [self._drawn(x.cpu(), b, y) for x, (b, y) in zip(batch["input"], self._shown(outputs))]

    def truth(self, batch: Batch) -> list[Tensor]:
        return [
            self._drawn(x.cpu(), t["boxes"].cpu(), t["labels"].cpu()) for x, t in zip(batch["input"], batch[TARGET])
        ]

    def captions(self, batch: Batch, outputs: Signals | None) -> list[str]:
        found = [t["labels"].cpu() for t in batch[TARGET]] if outputs is None else [y for _, y in self._shown(outputs)]
        counts = [{name: int((y == i).sum()) for i, name in enumerate(self.classes)} for y in found]
        return [", ".join(f"{n} {name}" for name, n in c.items() if n) or "nothing" for c in counts]

    def disagreement(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        """(B,) the share of the boxes of both that the other does not have (of the class, overlapping by a half)."""
        out = []
        for (mine, mine_y), (theirs, theirs_y) in zip(self._shown(student), self._shown(teacher)):
            alike = (pairwise_overlaps(mine, theirs)[0] >= 0.5) & (mine_y[:, None] == theirs_y)
            both = len(mine) + len(theirs)
            same = float(alike.any(0).sum() + alike.any(1).sum())
            out.append(1 - same / both if both else 0.0)
        return torch.tensor(out)

    def _drawn(self, points: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        """A uint8 picture (3, H, W) from above, the sensor at the left: points grey, sides of boxes in their class's
        colour."""
        spans = [b - a for a, b in zip(self.low, self.high)]
        scale = PICTURE / max(spans[:2])
        width, height = round(spans[0] * scale), round(spans[1] * scale)
        picture = torch.full((height, width, 3), 255, dtype=torch.uint8)

        def draw(xy: Tensor, colour: Tensor) -> None:
            at = ((xy - torch.tensor(self.low[:2])) * scale).long()
            at = at[(at >= 0).all(1) & (at < torch.tensor([width, height])).all(1)]
            picture[height - 1 - at[:, 1], at[:, 0]] = colour

        draw(points[:, :2], torch.tensor(150, dtype=torch.uint8))
        colours, along = palette(len(self.classes)), torch.linspace(0, 1, 200)[:, None]
        for corners, label in zip(bev_corners(boxes), labels.tolist()):
            for a, b in zip(corners, corners.roll(-1, 0)):
                draw(a + along * (b - a), colours[label])
        return picture.permute(2, 0, 1).contiguous()


class _Losses(dict[str, Tensor]):
    """A network's losses by name, told from the boxes that it finds."""


class _Boxes(nn.Module):
    """A detector that gives boxes, scores and labels as a tuple."""

    def __init__(self, network: nn.Module, task: PointDetection) -> None:
        super().__init__()
        self.network, self.task = network, task

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.task.read(self.network(x), {"input": x}).parts
        return parts["boxes"], parts["scores"], parts["labels"]

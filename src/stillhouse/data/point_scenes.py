"""Point clouds with boxes, whatever format they are in: clouds of one size, boxes that are moved with their points."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.format import refuse_unheeded
from stillhouse.data.samples import Sample, SampleBundle, SampleDataset
from stillhouse.data.split import cut, in_proportion
from stillhouse.errors import UserError
from stillhouse.files import digest
from stillhouse.tasks.point_detection import TARGET, PointDetection

KEYS = frozenset({"augment"})
TURN = math.pi / 4  # the largest turn of training, as usual for KITTI
SCALES = (0.95, 1.05)


@dataclass
class PointScene:
    """A cloud with its boxes.

    Attributes:
        points: (M, F) float32: x, y, z in metres, and what else the sensor gives.
        boxes: (n, 7) x, y, z of the centre, length, width, height, yaw.
        labels: (n,) class ids; -1 for none of the classes.
        ignored: (n,) boxes that are neither learned nor judged.
    """

    points: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray


Open = Callable[[int], PointScene]


def read_sweep(path: Path) -> np.ndarray:
    """(M, 4) x, y, z, intensity of a file. Raises `UserError` for one that is no sweep."""
    values = np.fromfile(path, np.float32)
    if not len(values) or len(values) % 4 or not np.isfinite(values).all():
        raise UserError(f"'{path}' is no sweep: it does not hold float32 numbers x, y, z, intensity, point by point.")
    return values.reshape(-1, 4)


def checked_range(low: Sequence[float], high: Sequence[float]) -> None:
    """Raises `UserError` for a range that holds nothing."""
    if len(low) != 3 or len(high) != 3 or not all(a < b for a, b in zip(low, high)):
        raise UserError(f"data.options: low and high are x, y, z in metres, low below high; given: {low} and {high}.")


def scenes(
    opens: Mapping[str, tuple[int, Open]],
    classes: Sequence[str],
    overlap: Sequence[float],
    spec: DataSpec,
    options: Spec,
) -> SampleBundle:
    """Clouds with boxes as a bundle.

    Args:
        opens: split (train, and val and test where there are such) -> how many scenes, and what opens one.
        classes: names, in label order.
        overlap: of each class, from which a box is right.
        spec: the recipe's `data`.
        options: with `low`, `high` and `points`; the fingerprint depends on all of them.
    """
    refuse_unheeded(spec, KEYS)
    if isinstance(spec.augment, list):
        raise UserError(
            f"data.augment: point clouds take 'standard' or 'plain', not transforms of images ({spec.name})."
        )
    low, high, points = (getattr(options, name) for name in ("low", "high", "points"))
    checked_range(low, high)
    if not opens["train"][0]:
        raise UserError(f"The data set '{spec.name}' holds no training scenes.")
    parts = dict(opens)
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    portions = cut(
        {name: np.zeros(count, np.int64) for name, (count, _) in parts.items()},
        spec,
        0.2 * parts["train"][0],
        in_proportion,
    )
    first = parts["train"][1](0)
    task = PointDetection(tuple(classes), tuple(low), tuple(high), points, first.points.shape[1], tuple(overlap))
    content = [
        digest(first.points, first.boxes),
        {n: c for n, (c, _) in parts.items()},
        options.model_dump(mode="json"),
    ]
    rows = {name: portion.rows for name, portion in portions.items()}
    fingerprint = digest(
        *content, tuple(classes), *[(n, rows[n]) for n in sorted(rows)], *[rows[n] for n in sorted(rows)]
    )
    moved = spec.augment == "standard"

    def make(split: str, train: bool) -> SampleDataset:
        opened = parts[portions[split].source][1]
        finish = _Finished(task, moved and train, train)
        return SampleDataset(lambda i: _sample(opened(i)), rows[split], finish, [TARGET])

    return SampleBundle(spec.name, task, fingerprint, rows, make)


def _sample(scene: PointScene) -> Sample:
    known = scene.labels >= 0
    target = {
        "boxes": torch.from_numpy(scene.boxes[known].astype(np.float32)).reshape(-1, 7),
        "labels": torch.from_numpy(scene.labels[known].astype(np.int64)),
        "ignored": torch.from_numpy(scene.ignored[known].astype(bool)),
    }
    return {"input": torch.from_numpy(scene.points.astype(np.float32)), TARGET: target}


@dataclass
class _Finished:
    """A sample as a network takes it: moved as a whole in training, cut to the range, of N points."""

    task: PointDetection
    moved: bool
    train: bool

    def __call__(self, sample: Sample) -> Sample:
        points, target = sample["input"], dict(sample[TARGET])
        if self.moved:
            points, target["boxes"] = moved(points, target["boxes"])
        low, high = torch.tensor(self.task.low), torch.tensor(self.task.high)
        points = self.task.inside(points)
        middle = target["boxes"][:, :3]
        inside = ((middle[:, :2] >= low[:2]) & (middle[:, :2] < high[:2])).all(1)
        target = {k: v[inside] for k, v in target.items()}
        if self.train:
            learned = ~target["ignored"]
            target = {k: v[learned] for k, v in target.items()}
        return {"input": self._sized(points), TARGET: target}

    def _sized(self, points: torch.Tensor) -> torch.Tensor:
        """(N, F): some of the points, drawn in training and evenly taken in evaluation; or padded."""
        number = self.task.points
        if self.train and len(points) > number:
            points = points[torch.randperm(len(points))[:number]]
        return self.task.sized(points)


def moved(points: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A cloud and its boxes mirrored half of the time (left and right), turned around the sensor, and scaled."""
    mirror, turn, size = torch.rand(3).tolist()
    points, boxes = points.clone(), boxes.clone()
    if mirror < 0.5:
        points[:, 1], boxes[:, 1], boxes[:, 6] = -points[:, 1], -boxes[:, 1], -boxes[:, 6]
    angle, scale = (2 * turn - 1) * TURN, SCALES[0] + (SCALES[1] - SCALES[0]) * size
    cos, sin = math.cos(angle), math.sin(angle)
    around = torch.tensor([[cos, sin], [-sin, cos]])
    points[:, :2], boxes[:, :2] = points[:, :2] @ around, boxes[:, :2] @ around
    boxes[:, 6] += angle
    points[:, :3] *= scale
    boxes[:, :6] *= scale
    return points, boxes

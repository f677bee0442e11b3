"""`sweeps:PATH`: real sweeps of a LiDAR, files of float32 x, y, z, intensity, in which boxes are placed.

Sweeps without labels become scenes with labels: objects of plain shapes are put on the ground of a sweep that is turned
a little and mirrored half of the time, and every ray of the sweep that meets an object ends there. So the objects have
the sensor's own pattern of points, which thins out with distance, and hide what is behind them. What stands in the
sweep by itself is background. The test scenes are of the same sweeps where there are few; their objects are others.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from pydantic import Field

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.point_scenes import KEYS, PointScene, read_sweep, scenes
from stillhouse.data.samples import SampleBundle
from stillhouse.data.source import existing
from stillhouse.errors import UserError
from stillhouse.files import digest
from stillhouse.randomness import key

__all__ = ["KEYS", "REST", "Options", "load"]
REST = "PATH"
CLASSES: dict[str, tuple[tuple[float, float, float], list[tuple[float, float, float, float, float]]]] = {
    # name: length, width, height; its parts: along, length, width, bottom and top, in shares of these
    "car": ((4.2, 1.75, 1.5), [(0.0, 1.0, 1.0, 0.1, 0.6), (-0.05, 0.55, 0.9, 0.6, 1.0)]),
    "person": ((0.7, 0.6, 1.75), [(0.0, 0.6, 0.5, 0.0, 0.5), (0.0, 1.0, 1.0, 0.5, 0.85), (0.0, 0.4, 0.4, 0.85, 1.0)]),
    "pole": ((0.4, 0.4, 3.0), [(0.0, 1.0, 1.0, 0.0, 1.0)]),
}
OVERLAP = {"car": 0.5, "person": 0.3, "pole": 0.3}
"""From which a box is right; less of slim things, of which a cell of a map is as large as they are."""
FEWEST = 5  # rays that meet an object, else it is left out
NOISE = 0.02  # metres along a ray
TURN = math.radians(10)
LOOKED_AT = 3000  # points by which a place is chosen
TRIES = 20
STORED = 512  # scenes of a split that stay in memory, about 100 kB each by default
RAYS = 3  # times the points of a cloud: rays of a scene, at most


class Options(Spec):
    """data.options of sweeps."""

    scenes: int = Field(400, ge=1, description="Training scenes.")
    test_scenes: int = Field(100, ge=1, description="Test scenes.")
    objects: tuple[int, int] = Field((2, 6), description="How many objects are placed, at least and at most.")
    points: int = Field(2048, ge=1, description="Points of a cloud; rays beyond it are left out, evenly.")
    low: tuple[float, float, float] = Field((0.0, -12.0, -3.0), description="Of the range: x, y, z in metres.")
    high: tuple[float, float, float] = Field((24.0, 12.0, 1.0), description="Of the range.")
    seed: int = Field(0, description="By which the scenes are drawn.")


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> SampleBundle:
    """Scenes of the sweeps in a file or folder.

    Raises:
        UserError: no such place, no sweep in it, or a file that is no sweep.
    """
    place = existing(rest, root)
    files = sorted(place.glob("*.bin")) if place.is_dir() else [place]
    if not files:
        raise UserError(f"The folder '{place}' holds no sweeps (*.bin).")
    if not 1 <= options.objects[0] <= options.objects[1]:
        raise UserError(f"data.options.objects: at least and at most, from 1 up; given: {list(options.objects)}.")
    sweeps = [read_sweep(path) for path in files[:64]]
    identity = key(digest(*sweeps), options.seed)
    opens = {
        split: (count, lru_cache(STORED)(partial(_scene, sweeps, options, identity, split)))
        for split, count in (("train", options.scenes), ("test", options.test_scenes))
    }
    return scenes(opens, list(CLASSES), [OVERLAP[name] for name in CLASSES], spec, options)


def _scene(sweeps: list[np.ndarray], options: Options, identity: int, split: str, position: int) -> PointScene:
    draw = np.random.default_rng(key(identity, split, position))
    points = sweeps[draw.integers(len(sweeps))].copy()
    if draw.random() < 0.5:
        points[:, 1] *= -1
    angle = draw.uniform(-TURN, TURN)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    points[:, :2] = points[:, :2] @ np.array([[cos, sin], [-sin, cos]])
    low, high = np.array(options.low), np.array(options.high)
    points = points[((points[:, :3] >= low) & (points[:, :3] < high)).all(1)]
    if not len(points):
        raise UserError(f"No point of a sweep lies in data.options.low {options.low} to high {options.high}.")
    if len(points) > RAYS * options.points:
        points = points[np.sort(draw.permutation(len(points))[: RAYS * options.points])]
    boxes, labels = _placed(points, options, draw)
    points, hits = cast(points, boxes, labels, draw)
    seen = hits >= FEWEST
    return PointScene(points, boxes[seen], labels[seen], np.zeros(int(seen.sum()), bool))


def _placed(points: np.ndarray, options: Options, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n, 7) that stand on the ground where little else stands, and their labels (n,)."""
    sizes = [np.array(size) for size, _ in CLASSES.values()]
    boxes: list[np.ndarray] = []
    labels: list[int] = []
    known = points[draw.permutation(len(points))[:LOOKED_AT], :3].astype(np.float64)
    for _ in range(int(draw.integers(options.objects[0], options.objects[1] + 1))):
        label = int(draw.integers(len(sizes)))
        size = sizes[label] * draw.uniform(0.9, 1.1, 3)
        reach = max(float(np.hypot(size[0], size[1])) / 2, 0.7)
        spots = known[draw.integers(len(known), size=TRIES), :2] + draw.normal(0, 0.5, (TRIES, 2))
        away = np.hypot(*(known[:, None, :2] - spots).transpose(2, 0, 1))  # (points, tries)
        for (x, y), distance in zip(spots, away.T):
            near = known[distance < reach, 2]
            if len(near) < 4 or any(np.hypot(b[0] - x, b[1] - y) < reach + np.hypot(b[3], b[4]) / 2 for b in boxes):
                continue
            ground = np.quantile(near, 0.1)
            if (near > ground + 0.5).mean() < 0.1:
                boxes.append(np.array([x, y, ground + size[2] / 2, *size, draw.uniform(-math.pi, math.pi)]))
                labels.append(label)
                break
    return np.array(boxes, np.float64).reshape(-1, 7), np.array(labels, np.int64)


def cast(
    points: np.ndarray, boxes: np.ndarray, labels: np.ndarray, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The cloud (M, 4) whose rays, from the sensor at 0 to each point, end where they first meet an object; and how
    many rays (n,) end at each object."""
    rays = points[:, :3].astype(np.float64)
    nearest, owner = np.ones(len(rays)), np.full(len(rays), -1)
    kinds = list(CLASSES.values())
    for i, (box, label) in enumerate(zip(boxes, labels)):
        cos, sin = math.cos(box[6]), math.sin(box[6])
        turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        for along, length, width, bottom, top in kinds[label][1]:
            half = np.array([box[3] * length, box[4] * width, box[5] * (top - bottom)]) / 2
            middle = np.array([along * box[3], 0.0, box[5] * ((bottom + top) / 2 - 0.5)])
            start, way = -box[:3] @ turn - middle, rays @ turn
            with np.errstate(divide="ignore", invalid="ignore"):
                first, second = (-half - start) / way, (half - start) / way
            enter = np.minimum(first, second).max(1)
            leave = np.maximum(first, second).min(1)
            hit = (enter <= leave) & (enter > 0) & (enter < nearest)
            nearest[hit], owner[hit] = enter[hit], i
    out, hit = points.copy(), owner >= 0
    distance = np.linalg.norm(rays[hit], axis=1)
    noisy = nearest[hit] + draw.normal(0, NOISE, int(hit.sum())) / distance.clip(1e-3)
    out[hit, :3] = rays[hit] * noisy[:, None]
    bright = draw.uniform(0.1, 0.6, len(boxes))
    out[hit, 3] = bright[owner[hit]] if len(boxes) else 0
    return out, np.bincount(owner[hit], minlength=len(boxes))

"""`kitti:PATH`: KITTI's objects in space: `training/velodyne`, `label_2`, `calib`, `ImageSets/train.txt` and `val.txt`.

Boxes are brought from the left camera's coordinates to the sensor's. Of the classes asked for, objects that are harder
than `difficulty` are neither learned nor judged, as KITTI does.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import Field

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.point_scenes import KEYS, PointScene, read_sweep, scenes
from stillhouse.data.samples import SampleBundle
from stillhouse.data.source import existing
from stillhouse.errors import UserError, unknown

__all__ = ["KEYS", "REST", "Options", "load"]
REST = "PATH"
OVERLAPS = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
DIFFICULTIES: dict[str, tuple[float, int, float]] = {
    # least height in the image in pixels, largest occlusion, largest truncation
    "easy": (40, 0, 0.15),
    "moderate": (25, 1, 0.3),
    "hard": (25, 2, 0.5),
}
IN_VIEW = (1242.0, 375.0)  # pixels of the camera's image


class Options(Spec):
    """data.options of a KITTI folder."""

    classes: list[str] = Field(["Pedestrian", "Cyclist", "Car"], description="Class names, in label order.")
    difficulty: str = Field("moderate", description="easy, moderate or hard: what is learned and judged.")
    points: int = Field(20000, ge=1, description="Points of a cloud; further ones are left out.")
    low: tuple[float, float, float] = Field((0.0, -39.68, -3.0), description="Of the range: x, y, z in metres.")
    high: tuple[float, float, float] = Field((69.12, 39.68, 1.0), description="Of the range.")


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> SampleBundle:
    """The scenes of a KITTI folder.

    Raises:
        UserError: no such folder, a class or difficulty that there is not, or a missing or damaged file.
    """
    base = existing(rest, root)
    if options.difficulty not in DIFFICULTIES:
        raise unknown("data.options.difficulty", options.difficulty, list(DIFFICULTIES))
    if not options.classes or len(set(options.classes)) < len(options.classes):
        raise UserError(f"data.options.classes: name at least one class, each once; given: {options.classes}.")
    opens = {}
    for split in ("train", "val"):
        path = base / "ImageSets" / f"{split}.txt"
        if split == "train" and not path.is_file():
            raise UserError(f"'{base}' is no KITTI folder: it has no ImageSets/train.txt.")
        if path.is_file():
            names = path.read_text(encoding="utf-8").split()
            opens[split] = (len(names), partial(_scene, base, names, options))
    return scenes(opens, options.classes, [OVERLAPS.get(name, 0.5) for name in options.classes], spec, options)


def _scene(base: Path, names: list[str], options: Options, position: int) -> PointScene:
    name, training = names[position], base / "training"
    for folder, end in (("velodyne", "bin"), ("label_2", "txt"), ("calib", "txt")):
        if not (training / folder / f"{name}.{end}").is_file():
            raise UserError(f"'{training / folder / f'{name}.{end}'}' is missing, which ImageSets lists.")
    to_sensor, seen = _calibration(training / "calib" / f"{name}.txt")
    points = read_sweep(training / "velodyne" / f"{name}.bin")
    points = points[in_view(points, seen)]
    rows = [line.split() for line in (training / "label_2" / f"{name}.txt").read_text(encoding="utf-8").splitlines()]
    boxes, labels, ignored = [], [], []
    for row in rows:
        if not row or row[0] not in options.classes:
            continue
        try:
            values = [float(v) for v in row[1:15]]
            box = _box(values, to_sensor)
        except (ValueError, IndexError):
            raise UserError(
                f"'{training / 'label_2' / f'{name}.txt'}' has a line that is no object: {' '.join(row)}"
            ) from None
        boxes.append(box)
        labels.append(options.classes.index(row[0]))
        height, occlusion, truncation = DIFFICULTIES[options.difficulty]
        ignored.append(values[6] - values[4] < height or values[1] > occlusion or values[0] > truncation)
    return PointScene(points, np.array(boxes).reshape(-1, 7), np.array(labels, np.int64), np.array(ignored, bool))


def _box(values: list[float], to_sensor: np.ndarray) -> np.ndarray:
    """(7,) in the sensor's coordinates of a line's numbers after its name."""
    height, width, length, x, y, z, turn = values[7:14]
    centre = to_sensor @ np.array([x, y - height / 2, z, 1.0])
    return np.array([*centre[:3], length, width, height, -turn - math.pi / 2])


def _calibration(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """From the rectified camera to the sensor (4, 4), and from the sensor to pixels (3, 4)."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, numbers = line.partition(":")
        found[key.strip()] = np.array(numbers.split(), np.float64)
    try:
        sensor, turn, camera = np.eye(4), np.eye(4), found["P2"].reshape(3, 4)
        sensor[:3], turn[:3, :3] = found["Tr_velo_to_cam"].reshape(3, 4), found["R0_rect"].reshape(3, 3)
    except (KeyError, ValueError):
        raise UserError(f"'{path}' is no calibration: it lacks P2, R0_rect or Tr_velo_to_cam.") from None
    to_camera = turn @ sensor
    return np.linalg.inv(to_camera), camera @ to_camera


def in_view(points: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(M,) which points the camera sees, where alone KITTI has labels."""
    pixels = np.concatenate([points[:, :3], np.ones((len(points), 1))], 1) @ seen.T
    depth = pixels[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        place = pixels[:, :2] / depth[:, None]
    inside: np.ndarray = (depth > 0) & (place >= 0).all(1) & (place < IN_VIEW).all(1)
    return inside

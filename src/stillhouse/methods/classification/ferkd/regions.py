"""Regions of images: how their boxes are drawn, how they are cut and resized exactly again (a batch at once), and the
store of a teacher's labels of them.

A store is a folder of memory-mapped arrays, a row an image: `coords` (N, K, 4) float32 = (top / H, left / W,
height / H, width / W), `flips` (N, K), `values` and `classes` (N, K, k) of the compressed labels, `done` (N,), and
`store.json`, which describes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.files import atomic_write, read_json
from stillhouse.methods.classification.ferkd.labels import LabelType, kept_values, restore
from stillhouse.randomness import key, uniforms

ATTEMPTS = 10  # of torchvision's RandomResizedCrop, before it takes the centre


def draw_regions(
    rows: np.ndarray,
    crops: int,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Random resized crops and flips of images, each a function of (seed, image, crop); the distribution is
    torchvision's `RandomResizedCrop`.

    Args:
        rows: (n,) ids of the images.
        crops: K regions an image.
        size: (H, W) of the images.
        scale, ratio: ranges of the region's share of the area and of width / height.
        seed: of the draw.

    Returns:
        coords (n, K, 4) float32 and flips (n, K) bool.
    """
    height, width = size
    ids = (rows[:, None].astype(np.int64) * crops + np.arange(crops)).ravel()
    draws = uniforms(key(seed, "regions"), ids, 2 * ATTEMPTS + 3)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, :ATTEMPTS])
    log_ratio = np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * draws[:, ATTEMPTS : 2 * ATTEMPTS]
    aspect = np.exp(log_ratio)
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first, any_fits = fits.argmax(1), fits.any(1)
    at = np.arange(len(ids))
    w, h = w[at, first], h[at, first]
    top = np.floor(draws[:, -3] * (height - h + 1))
    left = np.floor(draws[:, -2] * (width - w + 1))
    central_w = width if width / height <= ratio[1] else round(height * ratio[1])
    central_h = height if width / height >= ratio[0] else round(width / ratio[0])
    w, h = np.where(any_fits, w, central_w), np.where(any_fits, h, central_h)
    top = np.where(any_fits, top, (height - central_h) // 2)
    left = np.where(any_fits, left, (width - central_w) // 2)
    coords = np.stack([top / height, left / width, h / height, w / width], axis=1).astype(np.float32)
    return torch.from_numpy(coords.reshape(-1, crops, 4)), torch.from_numpy((draws[:, -1] < 0.5).reshape(-1, crops))


def replay(images: Tensor, coords: Tensor, flips: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut regions, resize them (bilinear with antialiasing, as PIL does) and mirror them; all at once, by two matrix
    products.

    Args:
        images: (N, C, H, W); uint8 or floats. Normalising before or after is the same.
        coords: (N, K, 4) shares of height and width: top, left, height, width.
        flips: (N, K).
        size: (H, W) of the result.

    Returns:
        (N, K, C, h, w) floats.
    """
    height, width = images.shape[-2:]
    coords = coords.double()
    top, bottom = (coords[..., 0] * height).round(), (coords[..., 0] * height + coords[..., 2] * height).round()
    left, right = (coords[..., 1] * width).round(), (coords[..., 1] * width + coords[..., 3] * width).round()
    down = _resampling(top, bottom - top, size[0], height)
    across = _resampling(left, right - left, size[1], width)
    across = torch.where(flips[..., None, None], across.flip(-2), across)
    x = images.float()[:, None]
    return down[:, :, None] @ (x @ across[:, :, None].transpose(-1, -2))


def _resampling(start: Tensor, length: Tensor, out: int, full: int) -> Tensor:
    """(..., out, full) weights of a triangle filter that resizes [start, start + length) to `out` samples; rows sum to
    one."""
    step = (length / out)[..., None, None]
    centre = (torch.arange(out, dtype=torch.float64, device=start.device)[:, None] + 0.5) * step + start[
        ..., None, None
    ]
    position = torch.arange(full, dtype=torch.float64, device=start.device)
    inside = (position >= start[..., None, None]) & (position < (start + length)[..., None, None])
    weight = (1 - (position + 0.5 - centre).abs() / step.clamp_min(1)).clamp_min(0) * inside
    return (weight / weight.sum(-1, keepdim=True)).float()


def _facts(path: Path) -> dict[str, Any] | None:
    """What a store.json says; None where it is not readable."""
    try:
        return read_json(path)
    except UserError:
        return None


class RegionStore:
    """Regions and labels on disk.

    Make one with `create`, fill rows with `write` (any order; `missing` says which are left), read with the rest.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], mode: Literal["r", "r+"]) -> None:
        self.folder, self.facts = folder, facts
        self._arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode=mode)
            for name in ("coords", "flips", "values", "classes", "done")
        }

    @classmethod
    def create(cls, folder: Path, images: int, facts: dict[str, Any]) -> RegionStore:
        """A store to fill in a folder; an interrupted one of the same facts is resumed.

        Args:
            facts: JSON data: `crops`, `label_type`, `top`, `num_classes`, `precision`, and whatever else distinguishes
                it from others (`input_shape`, `data`, …).
        """
        path = folder / "store.json"
        facts = json.loads(json.dumps({**facts, "images": images, "format": 1}))
        if path.exists() and _facts(path) == facts:
            return cls(folder, facts, "r+")
        k = kept_values(facts["label_type"], facts["top"], facts["num_classes"])
        ids = np.int16 if facts["num_classes"] < 2**15 else np.int32
        shapes = {
            "coords": (np.float32, (images, facts["crops"], 4)),
            "flips": (np.bool_, (images, facts["crops"])),
            "values": (np.dtype(facts["precision"]), (images, facts["crops"], k)),
            "classes": (ids, (images, facts["crops"], 0 if facts["label_type"] == "ori" else k)),
            "done": (np.bool_, (images,)),
        }
        for name, (dtype, shape) in shapes.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape).flush()
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(facts))
        return cls(folder, facts, "r+")

    @classmethod
    def open(cls, folder: Path, expected: dict[str, Any]) -> RegionStore:
        """A finished store, to read.

        Raises:
            UserError: none there, one that is not finished, or one of other images, classes or input size than
                `expected` (key -> value).
        """
        path = Path(folder) / "store.json"
        if not path.is_file():
            raise UserError(f"There is no store of regions in '{folder}': it holds no store.json.")
        facts = _facts(path)
        if facts is None:
            raise UserError(f"{path} is damaged; make a new store of regions.")
        for name, value in json.loads(json.dumps(expected)).items():
            if facts.get(name) != value:
                raise UserError(
                    f"The store of regions in '{folder}' was made with {name} = {facts.get(name)}, but this recipe "
                    f"has {value}; make a new one."
                )
        store = cls(Path(folder), facts, "r")
        if len(store.missing()):
            raise UserError(
                f"The store of regions in '{folder}' lacks the image {store.missing()[0]} and "
                f"{len(store.missing()) - 1} others; finish it first."
            )
        return store

    @property
    def crops(self) -> int:
        return int(self.facts["crops"])

    @property
    def label_bytes(self) -> int:
        """What the labels take on disk."""
        return int(self._arrays["values"].nbytes + self._arrays["classes"].nbytes)

    def __len__(self) -> int:
        return len(self._arrays["done"])

    def missing(self) -> np.ndarray:
        """Ids of the images that are not stored yet."""
        return np.flatnonzero(~np.asarray(self._arrays["done"]))

    def write(self, rows: np.ndarray, coords: Tensor, flips: Tensor, values: Tensor, classes: Tensor) -> None:
        """Store images `rows` (n,); a row counts as done only after its arrays are on disk."""
        self._arrays["coords"][rows], self._arrays["flips"][rows] = coords.numpy(), flips.numpy()
        self._arrays["values"][rows] = values.numpy()
        if self._arrays["classes"].shape[-1]:
            self._arrays["classes"][rows] = classes.numpy()
        for name in ("coords", "flips", "values", "classes"):
            self._arrays[name].flush()
        self._arrays["done"][rows] = True
        self._arrays["done"].flush()

    def confidence(self, rows: np.ndarray) -> Tensor:
        """(n, K) the teacher's largest probability of every region of the images."""
        return torch.from_numpy(self._arrays["values"][self._known(rows)].astype(np.float32)).amax(-1)

    def regions(self, rows: np.ndarray, picks: np.ndarray) -> tuple[Tensor, Tensor]:
        """Boxes (n, m, 4) and flips (n, m) of the regions `picks` (n, m) of the images `rows` (n,)."""
        at = (self._known(rows)[:, None], picks)
        return torch.from_numpy(self._arrays["coords"][at]), torch.from_numpy(self._arrays["flips"][at])

    def labels(self, rows: np.ndarray, picks: np.ndarray) -> Tensor:
        """(n, m, C) restored labels of the regions `picks` (n, m) of the images `rows` (n,)."""
        at = (self._known(rows)[:, None], picks)
        values = torch.from_numpy(self._arrays["values"][at].astype(np.float32))
        classes = torch.from_numpy(self._arrays["classes"][at].astype(np.int64))
        kind: LabelType = self.facts["label_type"]
        return restore(values, classes, kind, int(self.facts["num_classes"]))

    def _known(self, rows: np.ndarray) -> np.ndarray:
        beyond = rows[(rows < 0) | (rows >= len(self))]
        if len(beyond):
            raise UserError(
                f"The store of regions in '{self.folder}' knows no image {int(beyond[0])}; it holds 0 to "
                f"{len(self) - 1}."
            )
        return rows

"""`pasted:NAME`: labelled images pasted onto photographs: scenes with boxes, some of whose classes may be new; or with
`single`, one object on each, as labelled images.

Scenes are drawn by data.seed alone, in whatever order they are read. An object of the training scenes is a training
sample of NAME, one of the test scenes a test sample; photographs likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data import format as formats
from stillhouse.data.augment import transforms
from stillhouse.data.boxes import BoxedImage, boxed
from stillhouse.data.bundle import KEYS as LABELLED
from stillhouse.data.bundle import DataBundle, labelled
from stillhouse.data.samples import SampleBundle
from stillhouse.data.source import IMAGENET_MEAN, IMAGENET_STD, Samples, Source
from stillhouse.errors import UserError
from stillhouse.files import digest
from stillhouse.functional.pictures import resized, with_channels
from stillhouse.randomness import key as keys
from stillhouse.randomness import keyed

__all__ = ["KEYS", "REST", "Options", "load"]
KEYS = LABELLED
REST = "NAME"
TRIES = 30
"""Places that are tried for an object before it is left out."""
DECODED = 256
"""Photographs that stay in memory."""


class Options(Spec):
    """data.options of `pasted:`."""

    objects: DataSpec | None = Field(
        None, description="The labelled images as a spec, whose name is NAME; default: all of its samples."
    )
    take: str = Field("train", description="The split of these from which training scenes take their objects.")
    on: DataSpec = Field(
        default_factory=lambda: DataSpec(name="camvid"), description="Photographs, of any data set of images."
    )
    images: tuple[int, int] = Field((600, 200), description="How many scenes, for training and for testing.")
    canvas: tuple[int, int] = Field((128, 128), description="[height, width] of a scene.")
    count: tuple[int, int] = Field((2, 5), description="Fewest and most objects of a scene.")
    sides: tuple[float, float] = Field((24.0, 56.0), description="Shortest and longest side of an object, in pixels.")
    stretch: float = Field(1.25, ge=1, description="An object's sides differ by this factor at most.")
    overlap: float = Field(
        0.1, ge=0, le=1, description="Objects overlap by an intersection over union of at most this."
    )
    style: list[str | dict[str, Any]] = Field(
        default_factory=list, description="torchvision.transforms.v2 classes, as in data.augment, on every scene."
    )
    single: bool = Field(False, description="One object on each photograph: labelled images, without boxes.")
    new: list[str] = Field(
        default_factory=list, description="Classes, by name, whose boxes training does not see: new at test time."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Options:
        for name in ("count", "sides"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}: give the smaller first, above 0; given: {[low, high]}")
        if max(self.sides) * self.stretch**0.5 > min(self.canvas):
            raise ValueError(
                f"sides: an object of {max(self.sides)} pixels does not fit the canvas {list(self.canvas)}"
            )
        return self


@dataclass
class Layout:
    """What a scene is made of.

    Attributes:
        photograph: which.
        window: top, left, height and width of its part, as shares of it.
        objects: (n,) positions of what is pasted.
        boxes: (n, 4) whole pixels, corners x1, y1, x2, y2.
        labels: (n,) class ids.
    """

    photograph: int
    window: tuple[float, float, float, float]
    objects: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


def layout(draw: np.random.Generator, options: Options, photographs: int, by_class: list[np.ndarray]) -> Layout:
    """A scene's draw: classes equally often, places such that objects overlap little."""
    height, width = options.canvas
    share = draw.uniform(0.5, 1.0)
    window = (draw.uniform(0, 1 - share), draw.uniform(0, 1 - share), share, share)
    wanted = 1 if options.single else int(draw.integers(options.count[0], options.count[1] + 1))
    boxes: list[tuple[int, int, int, int]] = []
    objects, labels = [], []
    photograph = int(draw.integers(photographs))
    for _ in range(wanted):
        label = int(draw.integers(len(by_class)))
        chosen = int(by_class[label][draw.integers(len(by_class[label]))])
        for _ in range(TRIES):
            side, factor = draw.uniform(*options.sides), options.stretch ** draw.uniform(-0.5, 0.5)
            w, h = max(round(side * factor), 2), max(round(side / factor), 2)
            x, y = (int(draw.integers(0, whole - part + 1)) for whole, part in ((width, w), (height, h)))
            box = (x, y, x + w, y + h)
            if all(_iou(box, other) <= options.overlap for other in boxes):
                boxes.append(box)
                objects.append(chosen)
                labels.append(label)
                break
    return Layout(
        photograph, window, np.array(objects, np.int64), np.array(boxes, np.int64), np.array(labels, np.int64)
    )


def _iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@dataclass
class Painter:
    """Makes the pictures of scenes.

    Args:
        read: an object at a position, uint8 (C, h, w).
        photograph: a photograph, uint8 (3, h, w).
        size: (height, width) of a scene.
        style: on the finished picture.
        where: key of its draws.
    """

    read: Callable[[int], Tensor]
    photograph: Callable[[int], Tensor]
    size: tuple[int, int]
    style: Callable[[Any], Any] | None
    where: int

    def __call__(self, number: int, scene: Layout) -> Tensor:
        """uint8 (3, H, W)."""
        whole = self.photograph(scene.photograph)
        high, wide = whole.shape[-2:]
        top, left, height, width = scene.window
        rows, columns = (
            slice(int(start * side), int(start * side) + max(int(share * side), 1))
            for start, share, side in ((top, height, high), (left, width, wide))
        )
        picture = resized(whole[:, rows, columns], self.size).clone()
        for position, (x1, y1, x2, y2) in zip(scene.objects.tolist(), scene.boxes.tolist()):
            picture[:, y1:y2, x1:x2] = resized(with_channels(self.read(position), 3), (y2 - y1, x2 - x1))
        if self.style is None:
            return picture
        with keyed("style", self.where, number):
            styled: Tensor = self.style(picture)
        return styled

    def opened(self, number: int, scene: Layout) -> Image.Image:
        """The same as a picture of PIL."""
        return Image.fromarray(self(number, scene).permute(1, 2, 0).numpy())


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> SampleBundle | DataBundle:
    """Scenes as a bundle: with boxes, or with `single` labelled.

    Raises:
        UserError: what the inner formats raise; objects without class labels; a style that changes the size; and what
            `stillhouse.data.boxes.boxed` raises.
    """
    given = options.objects or DataSpec(name=rest)
    inner: Any = formats.load(given.model_copy(update={"name": rest, "root": given.root or spec.root}), root)
    behind: Any = formats.load(options.on.model_copy(update={"root": options.on.root or spec.root}), root)
    if not isinstance(inner, DataBundle) or not inner.mean:
        raise UserError(f"pasted: takes labelled images, which '{rest}' does not give.")
    inner.require(options.take)
    style = transforms(options.style, "data.options.style") if options.style else None
    scenes: dict[str, list[Layout]] = {}
    painters: dict[str, Painter] = {}
    for split, number in zip(("train", "test"), options.images):
        source = options.take if split == "train" else "test"
        labels, where = inner.dataset(source, train=False).labels().numpy(), keys("pasted", spec.seed, split)
        by_class = [np.flatnonzero(labels == c) for c in range(inner.num_classes)]
        absent = [inner.classes[c] for c, rows in enumerate(by_class) if not len(rows)]
        if absent:
            raise UserError(f"pasted: the {source} split of '{rest}' has no image of the class '{absent[0]}'.")
        photographs, count = _photographs(behind, split if behind.has(split) else "train", options.on.name)
        painters[split] = Painter(_objects(inner, source), photographs, options.canvas, style, where)
        scenes[split] = [
            layout(np.random.default_rng([where & 0xFFFFFFFF, i]), options, count, by_class) for i in range(number)
        ]
    facts = (inner.fingerprint, behind.fingerprint, options.model_dump_json(exclude={"on", "objects", "new"}))
    if style is not None and tuple(painters["train"](0, scenes["train"][0]).shape[-2:]) != tuple(options.canvas):
        raise UserError("data.options.style changes the size of scenes; keep it.")
    if options.single:
        return _labelled(scenes, painters, inner, spec, options, facts)
    parts = {
        split: [
            BoxedImage(
                f"{split} {i}",
                partial(painters[split].opened, i, scene),
                scene.boxes.reshape(-1, 4),
                scene.labels,
                np.zeros(len(scene.labels), bool),
                options.canvas,
            )
            for i, scene in enumerate(found)
        ]
        for split, found in scenes.items()
    }
    unheeded = {"classes": None, "mixup": 0.0, "cutmix": 0.0, "label_noise": 0.0, "long_tail": None}
    for key, usual in unheeded.items():
        if getattr(spec, key) != usual:
            raise UserError(f"data.{key} does nothing for scenes with boxes; leave it out.")
    return boxed(parts, inner.classes, spec, facts, options.new)


def _labelled(
    scenes: Mapping[str, list[Layout]],
    painters: Mapping[str, Painter],
    inner: DataBundle,
    spec: DataSpec,
    options: Options,
    facts: Any,
) -> DataBundle:
    if options.new:
        raise UserError("data.options.new: labelled images have no boxes to leave out; choose data.classes.")

    def samples(split: str) -> Samples:
        found, paint = scenes[split], painters[split]

        def item(position: int) -> Tensor:
            return paint(position, found[position])

        def pixels(positions: np.ndarray) -> Tensor:
            return torch.stack([item(p) for p in positions.tolist()])

        labels = np.concatenate([s.labels for s in found])
        return Samples(labels, digest(split, facts), item, pixels if max(options.canvas) <= 96 else None)

    source = Source(samples("train"), inner.classes, (3, *options.canvas), samples("test"))
    source.mean, source.std, source.flip = IMAGENET_MEAN, IMAGENET_STD, inner.flip
    return labelled(source, spec)


def _objects(bundle: DataBundle, split: str) -> Callable[[int], Tensor]:
    """Reads a split's images as uint8 (C, h, w)."""
    positions = bundle.positions(split)
    samples = bundle.source.test if split == "test" and bundle.source.test is not None else bundle.source.train

    def read(position: int) -> Tensor:
        return _as_bytes(samples.item(int(positions[position])))

    return read


def _photographs(bundle: Any, split: str, name: str) -> tuple[Callable[[int], Tensor], int]:
    """Reads a split's photographs as uint8 (3, h, w), and how many there are."""
    if isinstance(bundle, SampleBundle):
        dataset = bundle.dataset(split, train=False)

        @lru_cache(DECODED)
        def raw(position: int) -> Tensor:
            return with_channels(_as_bytes(dataset.raw(position)["input"]), 3)

        return raw, len(dataset)
    if isinstance(bundle, DataBundle) and bundle.mean:
        read = _objects(bundle, split)
        return lambda position: with_channels(read(position), 3), len(bundle.positions(split))
    raise UserError(f"data.options.on: '{name}' gives no images.")


def _as_bytes(image: Any) -> Tensor:
    """An image of PIL, or pixels, as uint8 (C, h, w)."""
    if isinstance(image, Tensor):
        plain = image.as_subclass(Tensor)
        return plain if plain.dtype == torch.uint8 else (plain * 255).round().clamp(0, 255).to(torch.uint8)
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())

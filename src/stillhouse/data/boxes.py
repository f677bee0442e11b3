"""Images with boxes, whatever format they are in: what is odd in them is left out and counted, or refused with a
sentence; image and boxes are augmented together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from stillhouse.config.specs import DataSpec
from stillhouse.data.augment import transforms
from stillhouse.data.format import refuse_unheeded
from stillhouse.data.samples import Sample, SampleBundle, SampleDataset
from stillhouse.data.source import IMAGENET_MEAN, IMAGENET_STD
from stillhouse.data.split import cut, in_proportion
from stillhouse.errors import UserError, unknown
from stillhouse.files import digest
from stillhouse.functional.pictures import normalise, with_channels
from stillhouse.tasks.detection import TARGET, Detection

KEYS = frozenset({"image_size", "augment"})
REGIONS = "regions"
SMALLEST = 1.0  # pixels a side that a box has in the network's input, else it is left out
SPLITS = ("train", "val", "test")
OF_OBJECTS = ("labels", "crowd", "masks")
"""What a sample holds for each of its boxes."""


@dataclass
class BoxedImage:
    """An image with its boxes, as the format has them.

    Attributes:
        name: what messages call it, and by which it is known.
        open: decodes the image.
        boxes: (n, 4) corners x1, y1, x2, y2 in pixels, from 0.
        labels: (n,) class ids.
        crowd: (n,) whether it is a region that is neither right nor wrong: not learned, and ignored in judging.
        size: (height, width) as the annotation has it; None: unknown.
        masks: gives (n, height, width) bool, the pixels of the object in each box; None: boxes alone.
    """

    name: str
    open: Callable[[], Image.Image]
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    size: tuple[int, int] | None = None
    masks: Callable[[], np.ndarray] | None = None


@dataclass
class LeftOut:
    """Counts what is left out of a data set, with the first of each kind."""

    found: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, what: str, number: int, name: str) -> None:
        if number:
            before, first = self.found.get(what, (0, name))
            self.found[what] = (before + number, first)

    def warn(self, data: str) -> None:
        """One warning for each kind."""
        for what, (number, first) in self.found.items():
            warnings.warn(f"{data}: {number} {what} left out, the first in '{first}'.", stacklevel=3)


def cleaned(image: BoxedImage, left_out: LeftOut, data: str) -> BoxedImage:
    """The image without boxes that have no area, or none inside the image; the others end at its edges.

    Raises:
        UserError: a coordinate that is not finite.
    """
    boxes = np.asarray(image.boxes, np.float64).reshape(-1, 4)
    if not np.isfinite(boxes).all():
        raise UserError(f"{data}: '{image.name}' has a box with a coordinate that is not finite; correct or remove it.")
    real = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    left_out.add("boxes without area", int((~real).sum()), image.name)
    kept = real
    if image.size is not None:
        height, width = image.size
        clipped = np.clip(boxes, 0, [width, height, width, height])
        inside = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
        left_out.add("boxes outside their image", int((real & ~inside).sum()), image.name)
        boxes, kept = clipped, real & inside
    crowd = np.asarray(image.crowd, bool)[kept]
    labels = np.asarray(image.labels, np.int64)[kept]
    masks = None if image.masks is None else _Kept(image.masks, kept)
    return BoxedImage(image.name, image.open, boxes[kept].astype(np.float32), labels, crowd, image.size, masks)


@dataclass
class _Kept:
    masks: Callable[[], np.ndarray]
    which: np.ndarray

    def __call__(self) -> np.ndarray:
        return self.masks()[self.which]


def boxed(
    splits: Mapping[str, Sequence[BoxedImage]],
    classes: Sequence[str],
    spec: DataSpec,
    format_facts: Any = None,
    new: Sequence[str] = (),
) -> SampleBundle:
    """Images with boxes as a bundle. Without a test split, the validation split is it; without both, a fifth of the
    training images.

    Args:
        splits: train, and val and test where there are such.
        classes: names, in label order.
        spec: the recipe's `data`.
        format_facts: further facts that the fingerprint depends on.
        new: classes whose boxes are left out of all images but those of the test split.

    Objects have masks where the images' say so, all or none.

    Raises:
        UserError: a new class that is none, no training images, no class, images of several sizes without
            data.image_size, a box that is no number, or two images of one name.
    """
    refuse_unheeded(spec, KEYS)
    left_out = LeftOut()
    parts = {s: [cleaned(image, left_out, spec.name) for image in splits[s]] for s in SPLITS if splits.get(s)}
    left_out.warn(spec.name)
    if "train" not in parts:
        raise UserError(f"The data set '{spec.name}' holds no training images.")
    if not classes:
        raise UserError(f"'{spec.name}' has no box at all, so there is no class to find; name data.options.classes.")
    for name in new:
        if name not in classes:
            raise unknown("class for data.options.new", name, classes)
    unseen = [i for i, name in enumerate(classes) if name in new]
    if unseen and len(unseen) == len(classes):
        raise UserError("data.options.new: with every class new there is none to train on.")
    if unseen and "test" not in parts and "val" not in parts:
        raise UserError(f"data.options.new: '{spec.name}' has no test images of its own to judge new classes by.")
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    for name in ("train", "val"):
        if unseen and name in parts:
            parts[name] = [_without(image, unseen) for image in parts[name]]
    everything = [image for part in parts.values() for image in part]
    starts = dict(zip(parts, np.cumsum([0, *map(len, parts.values())]).tolist()))
    strata = {split: np.zeros(len(part), np.int64) for split, part in parts.items()}
    portions = cut(strata, spec, 0.2 * len(parts["train"]), in_proportion)
    rows = {name: starts[portion.source] + portion.rows for name, portion in portions.items()}
    size = _wanted(spec, everything)
    masks = any(image.masks is not None for image in everything)
    task = Detection(tuple(classes), size, IMAGENET_MEAN, IMAGENET_STD, masks, tuple(unseen))
    content = [(i.name, i.size, i.boxes.tolist(), i.labels.tolist(), i.crowd.tolist()) for i in everything]
    facts: tuple[Any, ...] = (content, tuple(classes), size, format_facts, *([tuple(unseen)] if unseen else []))
    fingerprint = digest(*facts, *[(n, rows[n]) for n in sorted(rows)], *[rows[n] for n in sorted(rows)])
    source = _Source(everything, size, spec.name)
    usual = {"standard": crop_and_mirror, "plain": lambda sample: sample}
    moved = transforms(spec.augment) if isinstance(spec.augment, list) else usual[spec.augment]

    def make(split: str, train: bool) -> SampleDataset:
        return SampleDataset(source.read, rows[split], _Training(source, moved) if train else source.plain, [TARGET])

    def contents(position: int) -> np.ndarray:
        image = everything[position]
        return np.unique(image.labels[~image.crowd])

    return SampleBundle(spec.name, task, fingerprint, rows, make, contents=contents)


def _without(image: BoxedImage, classes: Sequence[int]) -> BoxedImage:
    """An image without the boxes of some classes."""
    kept = ~np.isin(image.labels, classes)
    masks = None if image.masks is None else _Kept(image.masks, kept)
    return replace(image, boxes=image.boxes[kept], labels=image.labels[kept], crowd=image.crowd[kept], masks=masks)


@dataclass
class _Source:
    images: list[BoxedImage]
    size: tuple[int, int]
    data: str

    def read(self, position: int) -> Sample:
        """Pixels uint8 (3, H, W), boxes that end at the image's edges, labels, crowd, and the image's own size."""
        found = self.images[position]
        image = found.open().convert("RGB")
        own = (image.height, image.width)
        if found.size is not None and found.size != own:
            raise UserError(
                f"{self.data}: '{found.name}' is {own[1]} x {own[0]} pixels, but its annotation is for "
                f"{found.size[1]} x {found.size[0]}, so its boxes would lie elsewhere; correct one of the two"
                + (" (the image is turned by its EXIF block)." if found.size == own[::-1] else ".")
            )
        edge = np.array([own[1], own[0]] * 2, np.float32)
        boxes = torch.from_numpy(np.clip(found.boxes, 0, edge))
        masks = {} if found.masks is None else {"masks": tv_tensors.Mask(torch.from_numpy(found.masks()))}
        return {
            **masks,
            "input": tv_tensors.Image(torch.from_numpy(np.array(image)).permute(2, 0, 1)),
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=own),
            "labels": torch.from_numpy(found.labels),
            "crowd": torch.from_numpy(found.crowd),
            "size": torch.tensor(own),
        }

    def plain(self, sample: Sample) -> Sample:
        """As it is evaluated: the image resized, every box of it."""
        return self.finished(sample, 0.0)

    def finished(self, sample: Sample, smallest: float) -> Sample:
        """Image and boxes at the network's size, with the boxes whose sides are longer than `smallest` pixels."""
        from torchvision.transforms.v2 import functional as V

        image, boxes = sample["input"], sample["boxes"]
        if tuple(image.shape[-2:]) != self.size:
            image, boxes = V.resize(image, list(self.size), antialias=True), V.resize(boxes, list(self.size))
        boxes = V.clamp_bounding_boxes(boxes).as_subclass(torch.Tensor).float().reshape(-1, 4)
        further: dict[str, Any] = {}
        if REGIONS in sample:
            moved = V.clamp_bounding_boxes(V.resize(sample[REGIONS], list(self.size)))
            further = {
                REGIONS: {"boxes": moved.as_subclass(torch.Tensor).float().reshape(-1, 4), **sample["of_regions"]}
            }
        kept = ((boxes[:, 2:] - boxes[:, :2]) > smallest).all(1)
        masks = {}
        if "masks" in sample:
            masks["masks"] = nearest(sample["masks"].as_subclass(torch.Tensor), self.size)
            kept = kept & masks["masks"].flatten(1).any(1)
        if not kept.all():  # on the host, in the loader
            boxes, masks = boxes[kept], {k: v[kept] for k, v in masks.items()}
        pixels = normalise(with_channels(image.as_subclass(torch.Tensor), 3)[None], IMAGENET_MEAN, IMAGENET_STD)[0]
        target = {"boxes": boxes, "labels": sample["labels"][kept], "crowd": sample["crowd"][kept], **masks}
        return {"input": pixels, TARGET: {**target, "size": sample["size"]}, **further}


@dataclass
class _Training:
    """The transforms of training, on image and boxes; crowds are not learned."""

    source: _Source
    moved: Callable[[Any], Any]

    def __call__(self, sample: Sample) -> Sample:
        own = ~sample["crowd"]
        if not own.all():
            boxes = sample["boxes"]
            kept = tv_tensors.wrap(boxes.as_subclass(torch.Tensor)[own], like=boxes)
            sample = {**sample, "boxes": kept, **objects(sample, own)}
        return self.source.finished(self.moved(sample), SMALLEST)


def objects(sample: Sample, which: torch.Tensor) -> Sample:
    """Labels, crowd and masks of the objects (n,) bool of a sample."""
    out = {k: sample[k][which] for k in OF_OBJECTS if k in sample}
    return {k: tv_tensors.wrap(v, like=sample[k]) if k == "masks" else v for k, v in out.items()}


def nearest(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Masks (n, H, W) at another size, each pixel that of the nearest place; n may be 0."""
    rows, columns = (
        ((torch.arange(new) + 0.5) * old / new).long().clamp_max(old - 1) for new, old in zip(size, masks.shape[-2:])
    )
    return masks[:, rows][:, :, columns]


def with_regions(dataset: SampleDataset, rows: Callable[[int], Mapping[str, torch.Tensor]]) -> SampleDataset:
    """Images with boxes, each of which has further boxes with values of their own, such as stored vectors: a batch
    holds under `regions` a mapping for each image, `boxes` (m, 4) in pixels of the network's input and the values. They
    are resized and mirrored with the image; a transform that crops does not know that what they describe was cut.

    Args:
        dataset: of a bundle that `boxed` made.
        rows: index -> `boxes` (m, 4), corners in pixels of the image's own size, and further tensors (m, …) by name.
    """

    def read(index: int, sample: Sample) -> Sample:
        values = dict(rows(index))
        corners = values.pop("boxes").float().reshape(-1, 4)
        height, width = sample["size"].tolist()
        found = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))
        return {REGIONS: found, "of_regions": values}

    return dataset.joined(read, [REGIONS])


def crop_and_mirror(sample: Sample) -> Sample:
    """Half to all of the image, of its own shape, mirrored half of the time; with the boxes whose centre lies inside.

    What `RandomIoUCrop` and `RandomHorizontalFlip` do, without the search for a crop that suits the boxes, which takes
    longer than a step of a small detector.
    """
    from torchvision.transforms.v2 import functional as V

    share, down, right, mirror = torch.rand(4).tolist()
    image, boxes = sample["input"], sample["boxes"]
    height, width = image.shape[-2:]
    side = (0.5 + 0.5 * share) ** 0.5
    h, w = max(round(height * side), 1), max(round(width * side), 1)
    top, left = int(down * (height - h + 1)), int(right * (width - w + 1))
    corners = boxes.as_subclass(torch.Tensor)
    middle = (corners[:, :2] + corners[:, 2:]) / 2
    low = torch.tensor([left, top])
    inside = ((middle >= low) & (middle <= low + torch.tensor([w, h]))).all(1)
    kept = tv_tensors.wrap(corners[inside], like=boxes)
    out = {**sample, "input": V.crop(image, top, left, h, w), "boxes": V.crop(kept, top, left, h, w)}
    out |= objects(sample, inside)
    if "masks" in out:
        out["masks"] = V.crop(out["masks"], top, left, h, w)
    if mirror < 0.5:
        out |= {k: V.horizontal_flip(out[k]) for k in ("input", "boxes", "masks") if k in out}
    return out


def _wanted(spec: DataSpec, images: Sequence[BoxedImage]) -> tuple[int, int]:
    """(height, width) of the network's input."""
    if spec.image_size is not None:
        return (spec.image_size, spec.image_size) if isinstance(spec.image_size, int) else spec.image_size
    sizes = {image.size for image in images}
    if len(sizes) > 1 or None in sizes:
        number = "sizes that are not known beforehand" if None in sizes else f"{len(sizes)} sizes"
        raise UserError(f"The images of '{spec.name}' have {number}; set data.image_size, such as [256, 256].")
    return next(size for size in sizes if size is not None)


def class_ids(names: Sequence[str], wanted: Sequence[str], data: str) -> dict[str, int]:
    """Class name -> id: as data.options.classes lists them, else by name.

    Raises:
        UserError: a class listed twice.
    """
    if len(set(wanted)) < len(wanted):
        raise UserError(f"data.options.classes: '{data}' lists a class twice: {', '.join(wanted)}.")
    return {name: i for i, name in enumerate(wanted or sorted(set(names)))}

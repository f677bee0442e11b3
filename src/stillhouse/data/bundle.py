"""`labelled`: a source of labelled samples as a `DataBundle`, with its classes, subset, splits, noise and transforms
settled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from stillhouse.config.specs import DataSpec
from stillhouse.data.augment import transforms
from stillhouse.data.dataset import IndexedDataset, ItemInputs, PixelInputs
from stillhouse.data.source import SMALL, Samples, Source, measured
from stillhouse.data.split import foreign, held_out, in_proportion, keep_classes, noisy, subsets
from stillhouse.data.splits import Splits
from stillhouse.errors import UserError
from stillhouse.files import digest
from stillhouse.tasks.classification import Classification

KEYS = frozenset(
    {"classes", "image_size", "augment", "mixup", "cutmix", "label_noise", "long_tail", "views", "unlabelled"}
)
"""Keys of `DataSpec` that are for labelled samples."""


@dataclass
class _Split:
    """Which samples of a source's split, in order, and their labels."""

    samples: Samples
    positions: np.ndarray
    labels: np.ndarray

    def at(self, rows: np.ndarray) -> _Split:
        return _Split(self.samples, self.positions[rows], self.labels[rows])

    @property
    def identity(self) -> str:
        return digest(self.samples.identity, self.positions, self.labels)


@dataclass
class DataBundle(Splits):
    """A data set ready for use.

    Attributes:
        name: as in the recipe.
        task: classes, input shape and normalisation.
        fingerprint: a hash of the samples, their splits and labels, the input's size and the normalisation; equal data
            gives an equal one wherever the files lie. Augmentation is not in it.
    """

    name: str
    task: Classification
    fingerprint: str
    _spec: DataSpec = field(repr=False)
    _source: Source = field(repr=False)
    splits: dict[str, _Split] = field(repr=False)
    _pixels: dict[int, tuple[Tensor, np.ndarray]] = field(repr=False, default_factory=dict)

    evaluation_batch: ClassVar[int] = 256

    @property
    def classes(self) -> list[str]:
        """Class names, in label order."""
        return list(self.task.classes)

    @property
    def num_classes(self) -> int:
        return len(self.task.classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W) of a model's input; any shape for float inputs."""
        return self.task.input_shape

    @property
    def mean(self) -> tuple[float, ...]:
        """Of the normalisation, per channel; () for inputs used as they are."""
        return self.task.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.task.std

    @property
    def source(self) -> Source:
        """What the format read, before subset, splits and noise."""
        return self._source

    @property
    def flip(self) -> bool:
        """Whether a mirrored image keeps its class; not so for digits and text."""
        return self._source.flip

    @property
    def _size(self) -> tuple[int, int]:
        return self.input_shape[-2], self.input_shape[-1]

    def positions(self, split: str) -> np.ndarray:
        """(n,) of the split's samples, in order, in what the format read for it (`source`)."""
        return self.splits[split].positions.copy()

    def dataset(self, split: str, *, train: bool) -> IndexedDataset:
        """A split's samples, with training augmentation (`train=True`) or as they are evaluated.

        Raises:
            UserError: a split that this data set does not have.
        """
        self.require(split)
        part = self.splits[split]
        mixing = {"mixup": self._spec.mixup, "cutmix": self._spec.cutmix} if train and split != "unlabelled" else {}
        if mixing and self._spec.cutmix and len(self.input_shape) != 3:
            raise UserError(f"data.cutmix needs images; the inputs of '{self.name}' have shape {self.input_shape}.")
        if mixing and self._spec.mixup and not self.input_shape:
            raise UserError(f"data.mixup needs inputs that are one tensor; those of '{self.name}' are mappings.")
        views = (self._spec.views or {}) if train else {}
        if views and any(mixing.values()):
            raise UserError("data.views hold one sample each, but data.mixup and data.cutmix mix two; set both to 0.")
        made = {name: self._view(part, name, items) for name, items in views.items()}
        return IndexedDataset(self._inputs(part, train), part.labels, self.num_classes, views=made, **mixing)

    def _view(self, part: _Split, name: str, items: list[str | dict[str, Any]]) -> ItemInputs:
        return self._transformed(part, transforms(items, f"data.views.{name}"), ("view", name))

    def _transformed(self, part: _Split, own: Callable[[Any], Any], draw: tuple[str, ...] = ("augment",)) -> ItemInputs:
        """A split's samples under a user's transforms."""
        item, rows = part.samples.item, part.positions
        if part.samples.pixels is not None:
            images, held = self._decoded(part)
            item, rows = _Rows(images).item, np.searchsorted(held, part.positions)
        return ItemInputs(item, rows, own, self.input_shape, self.mean, self.std, draw)

    def _inputs(self, part: _Split, train: bool) -> PixelInputs | ItemInputs:
        augment = self._spec.augment if train else "plain"
        if isinstance(augment, list):
            return self._transformed(part, transforms(augment))
        if part.samples.pixels is None:
            own = None
            if self.mean:
                own = _photo(
                    self._size, max(self._source.shape[-2:]) <= SMALL, augment == "standard", self._source.flip
                )
            return ItemInputs(part.samples.item, part.positions, own, self.input_shape, self.mean, self.std)
        images, held = self._decoded(part)
        rows = np.searchsorted(held, part.positions)
        moves = augment == "standard"
        pad = max(images.shape[-1] // 8, 1) if moves else 0
        return PixelInputs(images, rows, self.mean, self.std, self._size, pad, moves and self._source.flip)

    def _decoded(self, part: _Split) -> tuple[Tensor, np.ndarray]:
        """The images of all splits that share this split's samples, and their positions; decoded once."""
        which = id(part.samples)
        if which not in self._pixels:
            held = np.unique(np.concatenate([s.positions for s in self.splits.values() if s.samples is part.samples]))
            assert part.samples.pixels is not None
            self._pixels[which] = (part.samples.pixels(held), held)
        return self._pixels[which]


@dataclass
class _Rows:
    images: Tensor

    def item(self, row: int) -> Tensor:
        return self.images[row]


def labelled(found: Source, spec: DataSpec) -> DataBundle:
    """A source of labelled samples as a bundle.

    In this order: keep `classes`; without a test split, take a stratified fifth of the training samples as one; take
    the balanced subsets `size` and `test_size`, and `unlabelled` samples from what `size` leaves; thin training to a
    `long_tail`; replace `label_noise` of the training labels; cut `val` and `holdout` from training (their labels are
    as noisy as training's).

    Raises:
        UserError: what was asked for does not fit; the message says what.
    """
    parts = {
        name: _whole(samples, len(found.classes), spec.name)
        for name in ("train", "val", "test")
        if (samples := getattr(found, name)) is not None
    }
    classes = found.classes
    if spec.classes is not None:
        for name, part in parts.items():
            kept, renumbered = keep_classes(part.labels, spec.classes, classes)
            parts[name] = _Split(part.samples, kept, renumbered)
        classes = [classes[c] for c in spec.classes]
    train = parts["train"]
    if not len(train.labels):
        raise UserError(
            f"The data set '{spec.name}' holds no training samples"
            + (f" of data.classes {spec.classes}." if spec.classes else ".")
        )
    labels = {name: part.labels for name, part in parts.items()}
    portions = subsets(labels, spec, 0.2 * len(train.labels), in_proportion)
    splits = {name: parts[portion.source].at(portion.rows) for name, portion in portions.items()}
    splits |= _held_out(splits["train"], spec, len(classes), "val" in splits)
    if spec.unlabelled is not None and spec.unlabelled.foreign:
        splits["unlabelled"] = _with_foreign(splits["unlabelled"], found.train, spec)
    shape, mean, std = _form(found, spec)
    facts = (classes, shape, mean, std, sorted((name, part.identity) for name, part in splits.items()))
    counts = np.bincount(splits["train"].labels, minlength=len(classes)).tolist() if spec.long_tail else ()
    task = Classification(tuple(classes), tuple(shape), tuple(mean), tuple(std), tuple(counts))
    bundle = DataBundle(spec.name, task, digest(*facts), spec, found, splits)
    if isinstance(spec.augment, list):
        transforms(spec.augment)  # a wrong name is an error at once, not at the first batch
    for name, items in (spec.views or {}).items():
        transforms(items, f"data.views.{name}")
    return bundle


def _whole(samples: Samples, classes: int, name: str) -> _Split:
    labels = samples.labels
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        wrong = int(labels.min()) if labels.min() < 0 else int(labels.max())
        raise UserError(
            f"The data set '{name}' holds the label {wrong}, but has classes 0 to {classes - 1}; is a split without "
            "labels among its splits?"
        )
    return _Split(samples, np.arange(len(labels)), labels)


def _held_out(train: _Split, spec: DataSpec, classes: int, has_val: bool) -> dict[str, _Split]:
    """Training samples as train, holdout and val, with noisy labels where noise is asked for."""
    rows = held_out(train.labels, spec, in_proportion, has_val=has_val)
    if spec.label_noise:
        train = _Split(train.samples, train.positions, noisy(train.labels, spec.label_noise, classes, spec.seed))
    return {name: train.at(r) for name, r in rows.items()}


def _with_foreign(known: _Split, samples: Samples, spec: DataSpec) -> _Split:
    """Unlabelled samples and those of classes outside the task's, whose label is -1."""
    outside = foreign(samples.labels, spec, len(known.labels))
    labels = np.concatenate([known.labels, np.full(len(outside), -1, known.labels.dtype)])
    return _Split(samples, np.concatenate([known.positions, outside]), labels)


def _form(found: Source, spec: DataSpec) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """Input shape, mean and std."""
    if found.mean is not None and found.std is not None:
        mean, std = found.mean, found.std
    else:
        mean, std = measured(found.train)
    if spec.image_size is None:
        return found.shape, mean, std
    if not mean:
        raise UserError(
            f"data.image_size: '{spec.name}' gives no images but inputs that are used as they are; leave it out."
        )
    height, width = (spec.image_size, spec.image_size) if isinstance(spec.image_size, int) else spec.image_size
    return (found.shape[0], height, width), mean, std


def _photo(size: tuple[int, int], small: bool, standard: bool, flip: bool) -> Callable[[Any], Any]:
    """The usual transforms of images that are read one by one: a random resized crop (small images: a shifted crop) and
    a flip, or the centre."""
    from torchvision.transforms import v2

    if not standard:
        return _Centre(size)
    crops = (
        [_Centre(size), v2.RandomCrop(size, padding=max(size[0] // 8, 1))] if small else [v2.RandomResizedCrop(size)]
    )
    usual: Callable[[Any], Any] = v2.Compose([*crops, *([v2.RandomHorizontalFlip()] if flip else [])])
    return usual


@dataclass
class _Centre:
    """The centre of an image resized to 8/7 of the wanted size (256 for 224); one that has the size already is left as
    it is."""

    size: tuple[int, int]

    def __call__(self, image: Any) -> Any:
        from torchvision.transforms.v2 import functional as V

        if tuple(V.get_size(image)) == self.size:
            return image
        return V.center_crop(V.resize(image, [round(min(self.size) * 8 / 7)]), list(self.size))

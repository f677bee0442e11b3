"""`masks:PATH`: images with masks of class ids. PATH holds train, val and test, each
with `images` and `labels`.

A mask is a PNG of class ids, grey or palette, with its image's file name. Image and mask are augmented together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torchvision import tv_tensors

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.augment import transforms
from stillhouse.data.images import EXTENSIONS, is_system, open_image, open_mask, upright_size
from stillhouse.data.samples import Sample, SampleBundle, SampleDataset
from stillhouse.data.source import IMAGENET_MEAN, IMAGENET_STD, existing
from stillhouse.data.split import cut, in_proportion
from stillhouse.errors import UserError
from stillhouse.files import digest
from stillhouse.functional.counting import IGNORED
from stillhouse.functional.pictures import normalise, with_channels
from stillhouse.tasks.segmentation import Segmentation

KEYS = frozenset({"image_size", "augment", "unlabelled"})
REST = "PATH"


class Options(Spec):
    """data.options of images with masks."""

    classes: list[str] = Field(default_factory=list, description="Class names, in the order of their ids in the masks.")
    ignore: int | None = Field(None, description="The id in the masks that counts for nothing, such as 255.")
    label_stride: int = Field(
        1, ge=1, description="Take every n-th pixel of a training mask in each direction; evaluation sees it whole."
    )
    images: str = Field("images", description="The folder of images in a split.")
    labels: str = Field("labels", description="The folder of masks in a split.")


@dataclass
class Pairs:
    """The files of a split: image and mask of one name."""

    images: list[Path]
    masks: list[Path]

    @classmethod
    def found(cls, folder: Path, options: Options) -> Pairs:
        images, masks = (
            {
                p.stem: p
                for p in sorted((folder / name).iterdir())
                if p.suffix.lower() in EXTENSIONS and not is_system(p.name)
            }
            if (folder / name).is_dir()
            else {}
            for name in (options.images, options.labels)
        )
        alone = sorted(set(images) ^ set(masks))
        if alone:
            side, other = (options.images, options.labels) if alone[0] in images else (options.labels, options.images)
            raise UserError(
                f"'{folder / side}' holds '{alone[0]}', but '{folder / other}' has no file of that name ({len(alone)} "
                "such)."
            )
        return cls(list(images.values()), [masks[s] for s in images])


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> SampleBundle:
    """The images under PATH as a bundle.

    Raises:
        UserError: no folder there, fewer than two classes, images without masks, or ids in a mask that are no class.
    """
    if len(options.classes) < 2:
        raise UserError(
            f"data.options.classes: name the classes of '{spec.name}', in the order of their ids in the masks; two at "
            "least."
        )
    base = existing(rest, root)
    parts = {s: Pairs.found(base / s, options) for s in ("train", "val", "test") if (base / s).is_dir()}
    if not parts.get("train") or not parts["train"].images:
        raise UserError(
            f"'{base}' holds no training images: it should have train/{options.images} and train/{options.labels}."
        )
    everything = Pairs(
        [p for part in parts.values() for p in part.images], [p for part in parts.values() for p in part.masks]
    )
    strata = {split: np.zeros(len(part.images), np.int64) for split, part in parts.items()}
    starts = dict(zip(parts, np.cumsum([0, *map(len, strata.values())]).tolist()))
    portions = cut(strata, spec, 0.2 * len(strata["train"]), in_proportion)
    splits = {name: starts[portion.source] + portion.rows for name, portion in portions.items()}
    sizes = {upright_size(p) for p in everything.images}
    size = _wanted(spec, sizes, base)
    task = Segmentation(tuple(options.classes), size, IMAGENET_MEAN, IMAGENET_STD)
    source = _Source(everything, options, size, len(sizes) == 1)
    content = [(p.name, p.stat().st_size) for p in [*everything.images, *everything.masks]]
    fixed = (options.model_dump(mode="json"), size)
    fingerprint = digest(
        content, fixed, *[(n, splits[n]) for n in sorted(splits)], *[splits[n] for n in sorted(splits)]
    )
    augment = spec.augment
    own = transforms(augment) if isinstance(augment, list) else None

    def make(split: str, train: bool) -> SampleDataset:
        moved = _Training(source, own, augment != "plain") if train else source.plain
        return SampleDataset(source.read, splits[split], moved)

    return SampleBundle(spec.name, task, fingerprint, splits, make, names=[p.stem for p in everything.images])


@dataclass
class _Source:
    files: Pairs
    options: Options
    size: tuple[int, int]
    one_size: bool  # whether evaluation can see masks in their own size

    def read(self, position: int) -> Sample:
        """The image as uint8 (3, H, W), and its mask (H, W) with -100 where nothing counts."""
        image, mask = self.files.images[position], self.files.masks[position]
        pixels = torch.from_numpy(np.array(open_image(image).convert("RGB"))).permute(2, 0, 1)
        ids = torch.from_numpy(open_mask(mask))
        if ids.shape != pixels.shape[-2:]:
            raise UserError(
                f"The mask '{mask}' has shape {tuple(ids.shape)}, but its image is {tuple(pixels.shape[-2:])}; they "
                "must be alike."
            )
        if self.options.ignore is not None:
            ids = ids.masked_fill(ids == self.options.ignore, IGNORED)
        wrong = ids[(ids != IGNORED) & (ids >= len(self.options.classes))]
        if len(wrong):
            raise UserError(
                f"The mask '{mask}' holds the id {int(wrong[0])}, but there are {len(self.options.classes)} classes "
                f"(0 to {len(self.options.classes) - 1}); if it counts for nothing, set data.options.ignore: "
                f"{int(wrong[0])}."
            )
        return {"input": tv_tensors.Image(pixels), "label": tv_tensors.Mask(ids)}

    def plain(self, sample: Sample) -> Sample:
        """As it is evaluated: the image resized, the mask in its own size where all images have one."""
        image, label = sample["input"], sample["label"]
        return self._finished(_resized(image, self.size), label if self.one_size else _resized(label, self.size))

    def _finished(self, image: Any, label: Any, stride: int = 1) -> Sample:
        pixels = normalise(with_channels(image.as_subclass(torch.Tensor), 3)[None], IMAGENET_MEAN, IMAGENET_STD)[0]
        return {"input": pixels, "label": label.as_subclass(torch.Tensor)[::stride, ::stride].contiguous()}


@dataclass
class _Training:
    """The transforms of training: the user's list, or the usual crop of half to all of the image and a mirror."""

    source: _Source
    own: Any
    moves: bool

    def __call__(self, sample: Sample) -> Sample:
        from torchvision.transforms import v2

        size = list(self.source.size)
        if self.own is not None:
            moved = self.own(sample)
        elif self.moves:
            moved = v2.Compose(
                [v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True), v2.RandomHorizontalFlip()]
            )(sample)
        else:
            moved = sample
        image, label = (_resized(moved[k], self.source.size) for k in ("input", "label"))
        return self.source._finished(image, label, self.source.options.label_stride)


def _resized(value: Any, size: tuple[int, int]) -> Any:
    """An image (bilinear) or mask (nearest) of another size."""
    from torchvision.transforms.v2 import functional as V

    return value if tuple(value.shape[-2:]) == size else V.resize(value, list(size), antialias=True)


def _wanted(spec: DataSpec, sizes: set[tuple[int, int]], base: Path) -> tuple[int, int]:
    if spec.image_size is not None:
        return (spec.image_size, spec.image_size) if isinstance(spec.image_size, int) else spec.image_size
    if len(sizes) > 1:
        raise UserError(f"The images in '{base}' have {len(sizes)} sizes; set data.image_size, such as [256, 256].")
    return next(iter(sizes))

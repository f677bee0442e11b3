"""`restore:PATH`: a folder of photographs as pairs of a damaged and a true image, for super-resolution and restoration.

The damaged images are read from a folder of their own, or made by bicubic, anti-aliased shrinking of the true ones, as
MATLAB's imresize does it. Training sees mirrored crops, evaluation whole images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.images import image_files, is_transparent, open_image
from stillhouse.data.samples import Sample, SampleBundle, SampleDataset
from stillhouse.data.source import existing
from stillhouse.data.split import cut, in_proportion
from stillhouse.errors import UserError, nearest
from stillhouse.files import digest
from stillhouse.functional.images import PEAK
from stillhouse.tasks.restoration import Restoration

KEYS = frozenset({"augment"})
REST = "PATH"


class Options(Spec):
    """data.options of photographs to be restored."""

    scale: float = Field(
        2, ge=1, description="By how much the true image is larger per side; a whole number unless `enlarged`."
    )
    enlarged: bool = Field(
        False, description="Enlarge the damaged image (bicubic) to the true one's size before the network sees it."
    )
    patch: int = Field(96, ge=4, description="Pixels a side of a training crop of the true image.")
    more: list[str] = Field(default_factory=list, description="Further folders of photographs to train on.")
    low: str | None = Field(
        None,
        description="A folder of damaged training images, by the names of the true ones, with or without an ending "
        "such as x2; {scale} stands for the scale.",
    )
    test: str | None = Field(None, description="A folder of true images to test on; default: a share of training.")
    test_low: str | None = Field(None, description="Of `test`: as `low`.")
    repeat: int = Field(1, ge=1, description="How often a photograph is cropped in one epoch.")


@dataclass
class _Pairs:
    """True images, and the damaged image of each where it is a file."""

    true: list[Path]
    damaged: list[Path | None]

    @classmethod
    def found(cls, folders: list[str], low: str | None, scale: float, root: Path) -> _Pairs:
        true = [Path(file) for folder in folders for file in image_files(existing(folder, root))]
        if not true:
            raise UserError(f"There are no images in {', '.join(folders)} (under '{root}').")
        if low is None:
            return cls(true, [None] * len(true))
        place = existing(low.replace("{scale}", f"{scale:g}"), root)
        there = {Path(file).stem: Path(file) for file in image_files(place)}
        return cls(true, [_of_name(path, there, scale, place) for path in true])


def _of_name(path: Path, there: dict[str, Path], scale: float, place: Path) -> Path:
    for stem in (path.stem, f"{path.stem}x{scale:g}"):
        if stem in there:
            return there[stem]
    close = nearest(path.stem, there, 1)
    hint = f"; nearest: '{there[close[0]].name}'" if close else ""
    raise UserError(f"'{place}' holds no image for '{path.name}'{hint}.")


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> SampleBundle:
    """The photographs under PATH as a bundle.

    Raises:
        UserError: no images, damaged images that are missing or of a wrong size, or options that do not go together.
    """
    _check(spec, options)
    parts = {"train": _Pairs.found([rest, *options.more], options.low, options.scale, root)}
    if options.test is not None:
        parts["test"] = _Pairs.found([options.test], options.test_low, options.scale, root)
    everything = _Pairs(
        [path for part in parts.values() for path in part.true],
        [path for part in parts.values() for path in part.damaged],
    )
    strata = {name: np.zeros(len(part.true), np.int64) for name, part in parts.items()}
    starts = dict(zip(parts, np.cumsum([0, *map(len, strata.values())]).tolist()))
    portions = cut(strata, spec, 0.2 * len(strata["train"]), in_proportion)
    splits = {name: starts[portion.source] + portion.rows for name, portion in portions.items()}
    files = [*everything.true, *(path for path in everything.damaged if path is not None)]
    fingerprint = digest(
        [(path.name, path.stat().st_size) for path in files],
        options.model_dump(mode="json", include={"scale", "enlarged", "patch", "repeat"}),
        *[(name, splits[name]) for name in sorted(splits)],
        *[splits[name] for name in sorted(splits)],
    )
    source = _Source(everything, options)
    task = Restoration(options.scale, options.enlarged)

    def make(split: str, train: bool) -> SampleDataset:
        if split != "train":
            return SampleDataset(source.read, splits[split], source.whole)
        rows = np.tile(splits[split], options.repeat if train else 1)
        return SampleDataset(source.read, rows, source.moved if train and spec.augment != "plain" else source.centre)

    return SampleBundle(spec.name, task, fingerprint, splits, make, evaluation_batch=1)


def _check(spec: DataSpec, options: Options) -> None:
    if isinstance(spec.augment, list):
        raise UserError("data.augment: crops of pairs are mirrored and turned together; give standard or plain.")
    whole = options.scale == int(options.scale)
    if not options.enlarged and not whole:
        raise UserError(
            f"data.options.scale: {options.scale:g} is no whole number, so the network must see the image enlarged "
            "before: set data.options.enlarged to true."
        )
    if options.scale == 1 and options.low is None:
        raise UserError(
            "data.options.scale: at scale 1 nothing is shrunk; name the folder of damaged images in data.options.low."
        )
    if not options.enlarged and options.patch % int(options.scale):
        raise UserError(f"data.options.patch: {options.patch} pixels are no multiple of the scale {options.scale:g}.")


@dataclass
class _Source:
    files: _Pairs
    options: Options

    def read(self, position: int) -> Sample:
        """`input` (3, h, w) and `label` (3, H, W), uint8; the true image loses what the scale does not divide."""
        path, damaged = self.files.true[position], self.files.damaged[position]
        scale, true = self.options.scale, _opened(path)
        if scale == int(scale):
            s = int(scale)
            true = true.crop((0, 0, true.width // s * s, true.height // s * s))
        size = (max(round(true.width / scale), 1), max(round(true.height / scale), 1))
        if damaged is None:
            low = true.resize(size, Image.Resampling.BICUBIC)
        else:
            low = _opened(damaged)
            if low.size != size:
                raise UserError(
                    f"'{damaged}' has {low.width} x {low.height} pixels, but '{path.name}' at scale {scale:g} asks for "
                    f"{size[0]} x {size[1]}."
                )
        if self.options.enlarged:
            low = low.resize(true.size, Image.Resampling.BICUBIC)
        return {"input": _pixels(low), "label": _pixels(true), "name": path.name}

    def whole(self, sample: Sample) -> Sample:
        """As it is evaluated."""
        return {key: sample[key].float() / PEAK for key in ("input", "label")}

    def centre(self, sample: Sample) -> Sample:
        """The centre, as large as a training crop."""
        rows, columns = self._room(sample)
        return self.whole(self._crop(sample, rows // 2, columns // 2))

    def moved(self, sample: Sample) -> Sample:
        """A crop anywhere; mirrored left to right, upside down, and along its diagonal, each at even odds."""
        rows, columns = self._room(sample)
        top, left = int(torch.randint(rows + 1, ())), int(torch.randint(columns + 1, ()))
        cropped = self._crop(sample, top, left)
        flip, turn, transpose = (torch.rand(3) < 0.5).tolist()
        for key, value in cropped.items():
            axes = [axis for axis, chosen in ((-1, flip), (-2, turn)) if chosen]
            value = value.flip(axes) if axes else value
            cropped[key] = (value.transpose(-1, -2) if transpose else value).contiguous()
        return self.whole(cropped)

    @property
    def _factor(self) -> int:
        return 1 if self.options.enlarged else int(self.options.scale)

    def _room(self, sample: Sample) -> tuple[int, int]:
        """By how many pixels of the input a crop can move down and right."""
        side = self.options.patch // self._factor
        rows, columns = (length - side for length in sample["input"].shape[-2:])
        if rows < 0 or columns < 0:
            height, width = sample["label"].shape[-2:]
            raise UserError(
                f"The photograph '{sample['name']}' has {width} x {height} pixels, less than data.options.patch "
                f"({self.options.patch}); make the patch smaller or leave the photograph out."
            )
        return rows, columns

    def _crop(self, sample: Sample, top: int, left: int) -> Sample:
        out, factor = {}, self._factor
        for key, times in (("input", 1), ("label", factor)):
            side = self.options.patch // factor * times
            out[key] = sample[key][:, top * times : top * times + side, left * times : left * times + side]
        return out


def _opened(path: Path) -> Image.Image:
    if is_transparent(path):
        raise UserError(f"'{path}' has an alpha channel, of which nothing could be restored; save it without.")
    return open_image(path).convert("RGB")


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

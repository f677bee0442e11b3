"""`styled:NAME`: any labelled images in another style: fixed transforms on every image, in training and in evaluation,
before the augmentation. Several styles of one data set serve as domains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data import format as formats
from stillhouse.data.augment import transforms
from stillhouse.data.bundle import KEYS, DataBundle, labelled
from stillhouse.data.source import Samples
from stillhouse.errors import UserError
from stillhouse.files import digest
from stillhouse.randomness import keyed

__all__ = ["KEYS", "REST", "Options", "load"]
REST = "NAME"


class Options(Spec):
    """data.options of `styled:`."""

    style: list[str | dict[str, Any]] = Field(
        min_length=1,
        description="torchvision.transforms.v2 classes with their arguments, as in data.augment; what is random in "
        "them is drawn once for each image.",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Of the data set whose style is changed.")


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> DataBundle:
    """The images of another data set in a style. Raises what its format raises, or `UserError` for one without labelled
    images."""
    plain = DataSpec(name=rest, root=spec.root, options=options.options)
    inner = formats.load(plain, root)
    if not isinstance(inner, DataBundle) or not inner.mean:
        raise UserError(f"styled: changes labelled images, which '{rest}' does not give.")
    found = inner.source
    change, identity = transforms(options.style, "data.options.style"), digest(str(options.style))
    given = {"train": found.train, "test": found.test, "val": found.val}
    parts: dict[str, Any] = {n: None if s is None else _styled(s, change, identity) for n, s in given.items()}
    return labelled(replace(found, **parts, mean=inner.mean, std=inner.std), spec)


def _styled(samples: Samples, change: Callable[[Any], Any], identity: str) -> Samples:
    look = _Style(samples, change)
    pixels = None if samples.pixels is None else look.pixels
    return Samples(samples.labels, digest(samples.identity, identity), look.item, pixels)


@dataclass
class _Style:
    """Samples under transforms whose draws are keyed by the position."""

    samples: Samples
    change: Callable[[Any], Any]

    def item(self, position: int) -> Any:
        with keyed("style", position):
            return self.change(self.samples.item(position))

    def pixels(self, positions: np.ndarray) -> Tensor:
        assert self.samples.pixels is not None
        rows = []
        for position, image in zip(positions.tolist(), self.samples.pixels(positions)):
            with keyed("style", position):
                rows.append(self.change(image))
        shapes = {tuple(r.shape) for r in rows}
        if len(shapes) > 1:
            raise UserError("data.options.style gives images of different sizes; keep their size.")
        return torch.stack(rows)

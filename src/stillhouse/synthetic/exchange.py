"""Synthetic sets as training data of any other recipe (`synthetic:PATH`), judged on the real test split of the data
that the set was made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from stillhouse.config.messages import spell
from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data import BatchKey, IndexedDataset
from stillhouse.data import load as load_data
from stillhouse.data.bundle import KEYS, DataBundle, labelled
from stillhouse.data.formats import imagefolder
from stillhouse.data.parquet import read_splits
from stillhouse.data.source import SMALL, InMemoryImages, Samples, Source, existing
from stillhouse.errors import UserError
from stillhouse.files import digest
from stillhouse.runs.products import load_product
from stillhouse.synthetic.files import folder_names
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.real import unnormalised

__all__ = ["KEYS", "REST", "Options", "load", "source"]
REST = "PATH"


class Options(Spec):
    """data.options of `synthetic:`."""

    real: str | dict[str, Any] | None = Field(
        None, description="The real data that judges, a name or its keys; default: the data that the set was made from."
    )


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> DataBundle:
    """A synthetic set as a bundle (see `source`)."""
    return labelled(source(rest, options, root), spec)


def source(path: str, options: Options, root: Path) -> Source:
    """A synthetic set as training data, judged by real data: `synthetic:PATH`.

    PATH is a run's folder, a product folder, or files that `stillhouse export` wrote (a folder, or a Parquet file).
    Test and validation splits are those of the real data that the set was made from; the option `real`, a data set's
    name or its keys, names another, and is needed for exported files. A set that was learned whitened stays so, and
    real images are whitened the same way. Labels are class ids.

    Raises:
        UserError: no set there, one without labels, real data that is not known or has other classes or another size.
    """
    place = existing(path, root)
    if place.is_dir() and any(
        (place / name).is_file() for name in ("product.json", "product/product.json", "recipe.yaml")
    ):
        product = load_product(place)
        if not isinstance(product, SyntheticSet):
            raise UserError(
                f"synthetic: '{path}' holds a product of kind '{product.kind}', not a synthetic set of labelled images."
            )
        real = _real(path, options, product.made_by.get("data"), root)
        _same_classes(path, product.classes, real)
        x, y = product.training_images()
        _same_shape(path, x, real)
        if product.whitening is not None:
            channels = x.shape[1]
            mean, std, seen = (0.0,) * channels, (1.0,) * channels, product.prepared
        else:
            mean, std, seen = product.mean, product.std, partial(unnormalised, mean=real.mean, std=real.std)
            x = product.training_pixels()
        train, identity = Samples(y.numpy(), product.fingerprint, *_held(x)), product.fingerprint
    else:
        real = _real(path, options, None, root)
        train = _exported(path, place, real)
        mean, std, seen, identity = real.mean, real.std, partial(unnormalised, mean=real.mean, std=real.std), "pixels"
    splits = {
        name: _RealSplit(real.dataset(name, train=False), seen).samples(f"{real.fingerprint} {name} {identity}")
        for name in ("test", "val")
        if real.has(name)
    }
    return Source(
        train,
        real.classes,
        real.input_shape,
        test=splits["test"],
        val=splits.get("val"),
        mean=mean,
        std=std,
        flip=real.flip,
    )


def _real(path: str, options: Options, made_from: Any, root: Path) -> DataBundle:
    """The real data by which networks are judged."""
    given = made_from if options.real is None else options.real
    if given is None:
        raise UserError(
            f"synthetic: '{path}' does not name the real data that it stands for; give it as: data.options.real: "
            "cifar10."
        )
    try:
        real = load_data(DataSpec.model_validate({"name": given} if isinstance(given, str) else given), root)
    except ValidationError as error:
        raise spell(error, DataSpec, "data.options.real") from None
    if not isinstance(real, DataBundle) or len(real.input_shape) != 3 or not real.mean:
        raise UserError(f"data.options.real: a synthetic set holds images, but '{real.name}' gives other inputs.")
    return real


def _exported(path: str, place: Path, real: DataBundle) -> Samples:
    """The training images of exported files, in memory."""
    from torchvision.transforms.v2 import functional as V

    found = (
        imagefolder.source(place)
        if place.is_dir() and not list(place.glob("*.parquet"))
        else read_splits(place, None, None)
    )
    numbers = [str(i) for i in range(len(found.classes))]
    if found.classes not in (folder_names(real.classes), numbers):
        _same_classes(path, found.classes, real)
    mode = "L" if real.input_shape[0] == 1 else "RGB"
    images = [V.pil_to_tensor(found.train.item(i).convert(mode)) for i in range(len(found.train))]
    for image in images:
        _same_shape(path, image[None], real)
    x = torch.stack(images)
    return Samples(found.train.labels, digest(x.numpy(), found.train.labels), *_held(x))


def _held(x: Tensor) -> tuple[Callable[[int], Any], Callable[[np.ndarray], Tensor] | None]:
    stored = InMemoryImages(x)
    return stored.item, stored if max(x.shape[-2:]) <= SMALL else None


@dataclass
class _RealSplit:
    """The images of a real split as networks that are trained on the set see them, before the source's
    normalisation."""

    dataset: IndexedDataset
    seen: Callable[[Tensor], Tensor]

    def samples(self, identity: str) -> Samples:
        small = max(self.dataset[0]["input"].shape[-2:]) <= SMALL
        return Samples(self.dataset.labels().numpy(), digest(identity), self.item, self.images if small else None)

    def images(self, positions: np.ndarray) -> Tensor:
        return self.seen(self.dataset.batch(BatchKey(0, positions, 0, len(positions)), 0)["input"])

    def item(self, position: int) -> Tensor:
        return self.images(np.array([position]))[0]


def _same_classes(path: str, classes: list[str], real: DataBundle) -> None:
    if classes != real.classes:
        i = next((i for i, (a, b) in enumerate(zip(classes, real.classes)) if a != b), None)
        how = (
            f"{len(classes)} classes, not {len(real.classes)}"
            if i is None
            else f"'{classes[i]}' for class {i}, not '{real.classes[i]}'"
        )
        raise UserError(
            f"synthetic: '{path}' and the real data '{real.name}' differ in their classes: the set has {how}."
        )


def _same_shape(path: str, images: Tensor, real: DataBundle) -> None:
    if tuple(images.shape[1:]) != real.input_shape:
        raise UserError(
            f"synthetic: the images of '{path}' have shape {tuple(images.shape[1:])}, but those of '{real.name}' "
            f"{real.input_shape}."
        )

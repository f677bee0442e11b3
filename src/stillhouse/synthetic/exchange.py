"""Synthetic sets outside the run that made them: as files that other programs read, and as training data of any other recipe (`synthetic:PATH`).

Files hold what networks are trained on, tiles as whole images, with pixels of 8 bits: `to_folder` and `to_parquet`. `source` keeps the set's own pixels, and
takes the real test split of the data that the set was made from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from stillhouse.data import BatchKey, DataBundle, IndexedDataset, load
from stillhouse.data.source import SMALL, InMemory, Samples, Source, digest, existing
from stillhouse.errors import UserError, unknown
from stillhouse.files import written_beside
from stillhouse.product import load_product
from stillhouse.recipe import DataSpec
from stillhouse.sentences import spell
from stillhouse.synthetic.product import SyntheticSet, png
from stillhouse.synthetic.real import unnormalised

# ---- as files ------------------------------------------------------------------------------------------------------------------------------------


def to_folder(product: SyntheticSet, folder: str | Path) -> int:
    """Write `folder/train/CLASS/NUMBER.png`, as an ImageFolder (classes keep their order by a number before the name); returns how many images.

    Pixels are rounded to 8 bits and clipped to [0, 1]; soft labels are not written.

    Raises:
        UserError: a folder `train` that is there already.
    """
    base = Path(folder) / "train"
    if base.exists():
        raise UserError(f"There is a folder '{base}' already, and old images would be mixed with new ones; take another folder, or remove that one.")
    beside = base.with_name("train.partial")
    shutil.rmtree(beside, ignore_errors=True)
    names = folder_names(product.classes)
    counts = [0] * len(names)
    images, labels = _eight_bits(product)
    for image, label in zip(images, labels):
        (beside / names[label]).mkdir(parents=True, exist_ok=True)
        (beside / names[label] / f"{counts[label]:05d}.png").write_bytes(png(image))
        counts[label] += 1
    os.replace(beside, base)
    return len(images)


def to_parquet(product: SyntheticSet, path: str | Path) -> int:
    """Write one Parquet file in the Hugging Face image layout (`img` as PNG, `label`, and `logits` where images have soft labels); returns how many images.

    Pixels are rounded to 8 bits and clipped to [0, 1]; soft labels of augmented views are not written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    images, labels = _eight_bits(product)
    encoded = pa.array([{"bytes": png(x), "path": None} for x in images], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    columns: dict[str, Any] = {"img": encoded, "label": pa.array(labels, pa.int64())}
    features: dict[str, Any] = {"img": {"_type": "Image"}, "label": {"names": product.classes, "_type": "ClassLabel"}}
    if product.soft is not None:
        columns["logits"] = pa.array(product.soft.float().tolist(), pa.list_(pa.float32()))
        features["logits"] = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    with written_beside(Path(path)) as beside:
        pq.write_table(table, beside)
    return len(images)


def left_out(product: SyntheticSet, to: str) -> list[str]:
    """What files of a format (`folder` or `parquet`) cannot hold of a set, a sentence each."""
    pixels = product.training_pixels()
    clipped = (pixels - pixels.clamp(0, 1)).abs()
    outside = clipped > 1e-3
    out = []
    if bool(outside.any()):
        how = f"{float(outside.double().mean()):.1%} of the pixels lay outside [0, 1], by {float(clipped[outside].mean()):.2g} on average"
        out.append(f"{how}, and were clipped; the set itself, synthetic:RUN, keeps them.")
    if product.whitening is not None:
        out.append("The images were learned whitened (zca), and are written as pictures; networks that are trained on them see them normalised.")
    if product.views is not None or (product.soft is not None and to == "folder"):
        held = "; a Parquet file holds those of whole images" if product.soft is not None and product.views is None else ""
        out.append(f"The soft labels are not written{held}.")
    if product.lr is not None:
        out.append(f"The set was learned together with a learning rate to train with: {product.lr:.4g} (SGD).")
    return out


def folder_names(classes: list[str]) -> list[str]:
    """Names of class folders that sort in the order of the classes."""
    digits = len(str(len(classes) - 1))
    return [f"{i:0{digits}d}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}" for i, name in enumerate(classes)]


def _eight_bits(product: SyntheticSet) -> tuple[Tensor, list[int]]:
    """uint8 images (N * factor^2, C, H, W) and their class ids."""
    return (product.training_pixels().clamp(0, 1) * 255).round().to(torch.uint8), product.training_images()[1].tolist()


# ---- as data of another recipe -------------------------------------------------------------------------------------------------------------------


def source(path: str, spec: DataSpec, root: Path) -> Source:
    """A synthetic set as training data, judged by real data: `synthetic:PATH`.

    PATH is a run's folder, a product folder, or files that `stillhouse export` wrote (a folder, or a Parquet file). Test and validation splits are those of
    the real data that the set was made from; the option `real`, a data set's name or its keys, names another, and is needed for exported files. A set that
    was learned whitened stays so, and real images are whitened beside it. Labels are class ids.

    Raises:
        UserError: no set there, one without labels, real data that is not known or has other classes or another size.
    """
    if wrong := set(spec.options) - {"real"}:
        raise unknown("option of synthetic:", sorted(wrong)[0], ["real"])
    place = existing(path, root)
    if place.is_dir() and any((place / name).is_file() for name in ("product.json", "product/product.json", "recipe.yaml")):
        product = load_product(place)
        if not isinstance(product, SyntheticSet):
            raise UserError(f"synthetic: '{path}' holds a product of kind '{product.kind}', not a synthetic set of labelled images.")
        real = _real(path, spec, product.made_by.get("data"), root)
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
        real = _real(path, spec, None, root)
        train = _exported(path, place, spec, real, root)
        mean, std, seen, identity = real.mean, real.std, partial(unnormalised, mean=real.mean, std=real.std), "pixels"
    splits = {
        name: _Seen(real.dataset(name, train=False), seen).samples(f"{real.fingerprint} {name} {identity}")
        for name in ("test", "val")
        if real.has(name)
    }
    return Source(train, real.classes, real.input_shape, test=splits["test"], val=splits.get("val"), mean=mean, std=std, flip=real.flip)


def _real(path: str, spec: DataSpec, made_from: Any, root: Path) -> DataBundle:
    """The real data by which networks are judged."""
    given = spec.options.get("real", made_from)
    if given is None:
        raise UserError(f"synthetic: '{path}' does not say what real data it stands for; name it: data.options.real: cifar10.")
    try:
        real = load(DataSpec.model_validate({"name": given} if isinstance(given, str) else given), root)
    except ValidationError as error:
        raise spell(error, DataSpec, "data.options.real") from None
    if not isinstance(real, DataBundle) or len(real.input_shape) != 3 or not real.mean:
        raise UserError(f"data.options.real: a synthetic set holds images, but '{real.name}' gives other inputs.")
    return real


def _exported(path: str, place: Path, spec: DataSpec, real: DataBundle, root: Path) -> Samples:
    """The training images of exported files, in memory."""
    from torchvision.transforms.v2 import functional as V

    from stillhouse.data import folder, parquet

    plain = spec.model_copy(update={"options": {}})
    found = (
        folder.imagefolder(str(place), plain, root)
        if place.is_dir() and not list(place.glob("*.parquet"))
        else parquet.parquet(str(place), plain, root)
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
    held = InMemory(x)
    return held.item, held if max(x.shape[-2:]) <= SMALL else None


@dataclass
class _Seen:
    """The images of a real split as networks that are trained on the set see them, before the source's normalisation."""

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
        how = f"{len(classes)} classes, not {len(real.classes)}" if i is None else f"'{classes[i]}' for class {i}, not '{real.classes[i]}'"
        raise UserError(f"synthetic: '{path}' and the real data '{real.name}' differ in their classes: the set has {how}.")


def _same_shape(path: str, images: Tensor, real: DataBundle) -> None:
    if tuple(images.shape[1:]) != real.input_shape:
        raise UserError(f"synthetic: the images of '{path}' have shape {tuple(images.shape[1:])}, but those of '{real.name}' {real.input_shape}.")

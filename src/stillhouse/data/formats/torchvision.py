"""`torchvision:CLASS`: a data set of torchvision.datasets: for classification, or VOCDetection."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, ValidationError
from torch import Tensor

from stillhouse.config.messages import spell
from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.bundle import KEYS, DataBundle, labelled
from stillhouse.data.formats import voc
from stillhouse.data.images import open_image
from stillhouse.data.labels import whole_numbers
from stillhouse.data.samples import SampleBundle
from stillhouse.data.sequences import sequence_samples, source_of
from stillhouse.data.source import Samples, in_memory
from stillhouse.errors import UserError, unknown

__all__ = ["KEYS", "REST", "Options", "load"]
REST = "CLASS"
# Sets whose classes a mirror image changes.
WRITTEN = {"MNIST", "EMNIST", "KMNIST", "QMNIST", "USPS", "SVHN", "Omniglot", "RenderedSST2", "GTSRB"}


BOXES = "VOCDetection"
OTHER_BOXES = {"CocoDetection": "coco:PATH", "CocoCaptions": "coco:PATH"}


class Options(Spec):
    """data.options of `torchvision:`: further arguments of the class, such as split."""

    model_config = ConfigDict(extra="allow")


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> DataBundle | SampleBundle:
    """A data set of torchvision.datasets as a bundle; downloads what is not there.

    Raises:
        UserError: no such class (with the nearest), a wrong argument, or neither there nor to be downloaded.
    """
    from torchvision import datasets

    name, given = rest, dict(options.model_extra or {})
    if name not in datasets.__all__:
        raise unknown("data set in torchvision.datasets called", name, datasets.__all__)
    cls = getattr(datasets, name)
    if name == BOXES:
        return _voc_boxes(cls, given, spec, root)
    if name in OTHER_BOXES:
        raise UserError(f"torchvision:{name} is images with boxes: name their files as data.name {OTHER_BOXES[name]}.")
    takes = inspect.signature(cls.__init__).parameters
    for option in given:
        if option not in takes:
            raise UserError(
                "data.options: "
                f"{str(unknown('argument', option, [t for t in takes if t not in ('self', 'root', 'train')]))[:-1]} "
                f"of {name}."
            )
    by_split = "train" not in takes and "split" in takes and "split" not in given
    wanted: dict[str, list[dict[str, Any]]] = {"train": [{}], "val": [], "test": []}
    if "train" in takes:
        wanted |= {"train": [{"train": True}], "test": [{"train": False}]}
    elif by_split:
        wanted = {
            "train": [{"split": "train"}],
            "val": [{"split": s} for s in ("val", "valid", "validation")],
            "test": [{"split": "test"}],
        }
    sets = {
        split: next(filter(None, (_torchvision_split(cls, a | given, root, takes) for a in tried)), None)
        for split, tried in wanted.items()
    }
    if sets["train"] is None:
        raise UserError(f"torchvision:{name} has no training split; choose one with data.options.split.")
    if sets["test"] is None:
        sets["test"], sets["val"] = sets["val"], None
    samples = {
        split: None if s is None else _torchvision_samples(s, f"torchvision:{name}") for split, s in sets.items()
    }
    found = source_of(samples, getattr(sets["train"], "classes", None), f"torchvision:{name}", flip=name not in WRITTEN)
    return labelled(found, spec)


def _voc_boxes(cls: Any, given: dict[str, Any], spec: DataSpec, root: Path) -> SampleBundle:
    """The Pascal VOC folder of a year; options besides `year` are those of `voc:`."""
    year = str(given.pop("year", 2012))
    base = root / "VOCdevkit" / f"VOC{year}"
    if not base.is_dir():
        try:
            root.mkdir(parents=True, exist_ok=True)
            for image_set in ("train", "test") if year == "2007" else ("train",):
                cls(str(root), year=year, image_set=image_set, download=True)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(
                f"torchvision:{BOXES}: '{base}' is not there and could not be downloaded "
                f"({' '.join(str(error).split()).rstrip('.')}); name the folder that holds it with --data-root or "
                "STILLHOUSE_DATA."
            ) from None
    try:
        options = voc.Options.model_validate(given)
    except ValidationError as error:
        raise spell(error, voc.Options, "data.options") from None
    return voc.read(base, spec, options)


def _torchvision_split(cls: Any, arguments: dict[str, Any], root: Path, takes: Any) -> Any:
    """An instance; downloaded only where its files are missing. None: it has no such split."""
    place: dict[str, Any] = {"root": str(root)} if "root" in takes else {}
    if "loader" in takes:
        place["loader"] = open_image
    try:
        return cls(**place, **arguments)
    except ValueError as error:
        if "split" in arguments and "Unknown value" in str(error):
            return None
        raise UserError(f"torchvision:{cls.__name__}: {error}") from None
    except (TypeError, AssertionError) as error:
        raise UserError(f"data.options: torchvision:{cls.__name__}: {error}.") from None
    except (RuntimeError, OSError) as missing:
        if "download" not in takes:
            raise UserError(
                f"torchvision:{cls.__name__} is not under '{root}' ({missing}); name the folder with --data-root or "
                "STILLHOUSE_DATA."
            ) from None
    try:
        root.mkdir(parents=True, exist_ok=True)
        return cls(**place, **arguments, download=True)
    except (RuntimeError, OSError, ImportError) as error:
        raise UserError(
            f"torchvision:{cls.__name__} is not under '{root}' and could not be downloaded "
            f"({' '.join(str(error).split()).rstrip('.')}); "
            "name the folder that holds it with --data-root or STILLHOUSE_DATA."
        ) from None


def _torchvision_samples(found: Any, what: str) -> Samples:
    labels = next((getattr(found, name) for name in ("targets", "labels", "_labels") if hasattr(found, name)), None)
    labels = whole_numbers([found[i][1] for i in range(len(found))] if labels is None else labels, what)
    data = getattr(found, "data", None)
    data = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
    if isinstance(data, Tensor) and data.dtype == torch.uint8 and data.ndim in (3, 4) and len(data) == len(labels):
        images = data[:, None] if data.ndim == 3 else data.permute(0, 3, 1, 2) if data.shape[-1] in (1, 3) else data
        return in_memory(images.contiguous(), labels)
    return sequence_samples(found, labels)

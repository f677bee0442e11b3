"""Data sets of other libraries, and of a user's own function: torchvision:CLASS, hf:REPO, file:PATH.py:FUNCTION."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stillhouse.config.specs import DataSpec
from stillhouse.data.dataset import as_tensor
from stillhouse.data.images import channels, from_array, open_image, standard
from stillhouse.data.labels import unnamed, whole_numbers
from stillhouse.data.parquet import DECODER, DecodedImages, cell_is_grey, decoded
from stillhouse.data.source import IMAGENET_MEAN, IMAGENET_STD, SMALL, Samples, Source, evenly, existing, in_memory
from stillhouse.errors import MissingExtra, UserError, nearest, unknown
from stillhouse.files import cache_folder, digest

# Sets whose classes a mirror image changes.
WRITTEN = {"MNIST", "EMNIST", "KMNIST", "QMNIST", "USPS", "SVHN", "Omniglot", "RenderedSST2", "GTSRB"}


def torchvision(name: str, spec: DataSpec, root: Path) -> Source:
    """A classification data set of torchvision.datasets; `data.options` are further arguments of its class. Downloads
    what is not there.

    Raises:
        UserError: no such class (with the nearest), a wrong argument, or neither there nor to be downloaded.
    """
    from torchvision import datasets

    if name not in datasets.__all__:
        raise unknown("data set in torchvision.datasets called", name, datasets.__all__)
    cls = getattr(datasets, name)
    takes = inspect.signature(cls.__init__).parameters
    for option in spec.options:
        if option not in takes:
            raise UserError(
                "data.options: "
                f"{str(unknown('argument', option, [t for t in takes if t not in ('self', 'root', 'train')]))[:-1]} "
                f"of {name}."
            )
    by_split = "train" not in takes and "split" in takes and "split" not in spec.options
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
        split: next(filter(None, (_torchvision_split(cls, a | spec.options, root, takes) for a in options)), None)
        for split, options in wanted.items()
    }
    if sets["train"] is None:
        raise UserError(f"torchvision:{name} has no training split; choose one with data.options.split.")
    if sets["test"] is None:
        sets["test"], sets["val"] = sets["val"], None
    samples = {
        split: None if s is None else _torchvision_samples(s, f"torchvision:{name}") for split, s in sets.items()
    }
    return _source(samples, getattr(sets["train"], "classes", None), f"torchvision:{name}", flip=name not in WRITTEN)


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
    return _sequence_samples(found, labels)


def hf(repo: str, spec: DataSpec, root: Path) -> Source:
    """An image classification data set for `datasets.load_dataset`: a repository of the Hub, or a local folder.

    Options: `image_column`, `label_column`, `train_split`, `val_split`, `test_split`; all others go to `load_dataset`.

    Raises:
        UserError: not found, or without these columns or splits. MissingExtra: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtra("hf: data sets", "text") from None
    own = {k: spec.options.get(k) for k in ("image_column", "label_column", "train_split", "val_split", "test_split")}
    local = next((p for p in (Path(repo).expanduser(), root / repo) if p.is_dir()), None)
    try:
        found = datasets.load_dataset(str(local or repo), **{k: v for k, v in spec.options.items() if k not in own})
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"hf:{repo} could not be loaded ({first}); check the name, the network, or name a local folder."
        ) from None
    if not isinstance(found, dict):
        found = {"train": found}
    usual = {"train": ["train"], "val": ["validation", "val", "valid"], "test": ["test"]}
    chosen: dict[str, Any] = {}
    for split, names in usual.items():
        asked = own[f"{split}_split"]
        if asked is not None and asked not in found:
            raise unknown(f"split in hf:{repo} for data.options.{split}_split,", asked, found)
        name = asked or next((n for n in names if n in found), None)
        chosen[split] = found[name] if name else None
    if chosen["train"] is None:
        raise UserError(
            f"hf:{repo} has no split 'train' (it has {', '.join(found)}); choose one with data.options.train_split."
        )
    if chosen["test"] is None:
        chosen["test"], chosen["val"] = chosen["val"], None
    features = chosen["train"].features
    image = _hf_column(features, own["image_column"], ["image", "img"], "image_column", repo)
    label = _hf_column(features, own["label_column"], ["label", "labels", "fine_label"], "label_column", repo)
    columns = {
        split: _Column.of(table, image, f"hf:{repo} ({split})") for split, table in chosen.items() if table is not None
    }
    samples = {split: column.samples(chosen[split], label) for split, column in columns.items()}
    depth = None
    if columns["train"].encoded:
        size = columns["train"].item(0).size
        depth = channels(grey for column in columns.values() for grey in column.grey())
        if max(size) <= SMALL:
            for split, column in columns.items():
                column.decode_once(samples[split], (depth, size[1], size[0]))
    return _source(samples, getattr(features[label], "names", None), f"hf:{repo}", depth=depth)


def _hf_column(features: Any, asked: str | None, usual: list[str], option: str, repo: str) -> str:
    chosen = asked or next((n for n in usual if n in features), None)
    if chosen is None or chosen not in features:
        raise UserError(
            f"hf:{repo} has no column '{chosen or usual[0]}' (it has {', '.join(features)}); name it with "
            f"data.options.{option}."
        )
    return chosen


@dataclass
class _Column:
    """The inputs of a Hugging Face data set; images are decoded here, not by `datasets`, which opens any format."""

    table: Any
    name: str
    what: str
    identity: str
    encoded: bool  # bytes, or {bytes, path}

    @classmethod
    def of(cls, table: Any, name: str, what: str) -> _Column:
        import datasets

        identity = table._fingerprint
        table = table.select_columns([name])
        if isinstance(table.features[name], datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        first = table[0][name] if len(table) else None
        encoded = isinstance(first, bytes) or (isinstance(first, dict) and {"bytes", "path"} >= first.keys())
        return cls(table, name, what, identity, encoded)

    def item(self, position: int) -> Any:
        cell = self.table[int(position)][self.name]
        return decoded(cell, self._where(int(position))) if self.encoded else cell

    def read(self, positions: np.ndarray) -> Iterator[Image.Image]:
        return (self.item(p) for p in positions)

    def grey(self) -> Iterator[bool]:
        """Whether each image is grey, one after the other; looks at headers alone."""
        for start in range(0, len(self.table), 1000):
            for i, cell in enumerate(self.table[start : start + 1000][self.name], start):
                yield cell_is_grey(cell, self._where(i))

    def samples(self, table: Any, label: str) -> Samples:
        return _sampled(whole_numbers(list(table[label]), self.what), self.item)

    def decode_once(self, samples: Samples, shape: tuple[int, ...]) -> None:
        """Small images are kept in memory."""
        samples.pixels = DecodedImages(
            self.read, len(samples), shape, cache_folder() / "images" / digest(DECODER, self.identity, self.name)
        )

    def _where(self, position: int) -> str:
        return f"in row {position} of {self.what}"


def file(path: str, spec: DataSpec, root: Path) -> Source:
    """A user's own data: `FUNCTION(split)` for "train", "val", "test" gives a sequence of (input, label), or None where
    there is no such split.

    Inputs are PIL images or uint8 tensors (C, H, W), normalised and augmented like any image; or float tensors of any
    shape, or mappings of tensors, used as they are. A sequence may have `classes` (names) and `labels` or `targets`
    (else every sample is read once for its label). `data.options` are further keyword arguments of the function.

    Raises:
        UserError: no such file or function, or what it gives is not such a sequence.
    """
    script, _, function = path.rpartition(":")
    if not script.endswith(".py") or not function:
        raise UserError(f"data.name: 'file:{path}' must be 'file:PATH.py:FUNCTION'.")
    at = existing(script, root)
    loader = importlib.util.spec_from_file_location(at.stem, at)
    assert loader is not None and loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    try:
        loader.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"'{at}' could not be imported: {type(error).__name__}: {error}.") from error
    make = getattr(module, function, None)
    if not callable(make):
        close = nearest(function, [n for n, v in vars(module).items() if inspect.isfunction(v)], 1)
        raise UserError(f"'{at}' has no function '{function}'" + (f"; did you mean '{close[0]}'?" if close else "."))
    found = {split: make(split, **spec.options) for split in ("train", "val", "test")}
    if found["train"] is None:
        raise UserError(f"file:{path} gives None for 'train'; it must give a sequence of (input, label).")
    samples = {split: None if s is None else _own_samples(s, f"file:{path} ('{split}')") for split, s in found.items()}
    return _source(samples, getattr(found["train"], "classes", None), f"file:{path}")


def _own_samples(found: Any, what: str) -> Samples:
    if not hasattr(found, "__len__") or not hasattr(found, "__getitem__"):
        raise UserError(
            f"{what} gives a {type(found).__name__}; it must give a sequence (with a length and [i]) of (input, label)."
        )
    if len(found) and not (isinstance(found[0], tuple | list) and len(found[0]) == 2):
        raise UserError(f"{what}: samples must be pairs (input, label); the first is a {type(found[0]).__name__}.")
    labels = next((getattr(found, name) for name in ("labels", "targets") if hasattr(found, name)), None)
    return _sequence_samples(
        found, whole_numbers([found[i][1] for i in range(len(found))] if labels is None else labels, what)
    )


@dataclass
class _Inputs:
    """The inputs of a sequence of (input, label, …)."""

    pairs: Any

    def item(self, position: int) -> Any:
        return self.pairs[int(position)][0]


def _sequence_samples(found: Any, labels: np.ndarray) -> Samples:
    return _sampled(labels, _Inputs(found).item)


def _sampled(labels: np.ndarray, item: Callable[[int], Any]) -> Samples:
    """Samples whose identity is their labels and the content of 16 of them."""
    return Samples(labels, digest(labels, *(_content(item(int(i))) for i in evenly(len(labels), 16))), item)


def _content(value: Any) -> Any:
    if isinstance(value, dict):
        return digest(*(x for k in sorted(value) for x in (k, _content(value[k]))))
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)


def _source(
    samples: Mapping[str, Samples | None], classes: Any, what: str, flip: bool = True, depth: int | None = None
) -> Source:
    """A source whose kind of input and size are those of its first training sample.

    Args:
        samples: by split.
        classes: names, or None.
        what: what messages call it.
        flip: whether a mirrored image keeps its class.
        depth: channels of its images, where they are known; default: 3 if any of 1,000 images of a split is in colour.
    """
    train = samples["train"]
    assert train is not None
    parts = {k: s for k, s in samples.items() if s is not None and len(s)}
    if not parts.get("train"):
        raise UserError("The training split holds no samples.")
    names = [str(c) for c in classes] if classes else unnamed([s.labels for s in parts.values()], what)
    first = _input(train.item(0), what)
    shape: tuple[int, ...] = ()
    if isinstance(first, Image.Image):
        depth = depth or channels(_grey(s.item(int(i)), what) for s in parts.values() for i in evenly(len(s), 1000))
        side = max(first.size) if max(first.size) <= SMALL else 224
        shape = (depth, first.height, first.width) if train.pixels else (depth, side, side)
    elif isinstance(first, Tensor):
        shape = tuple(first.shape)
    elif not isinstance(first, Mapping):
        raise UserError(
            f"{what}: inputs must be images, arrays, or mappings of arrays; the first is a {type(first).__name__}."
        )
    image = isinstance(first, Image.Image) or (
        isinstance(first, Tensor) and first.dtype == torch.uint8 and first.ndim == 3
    )
    usual = (
        (None, None)
        if train.pixels
        else ((), ())
        if not image
        else (IMAGENET_MEAN, IMAGENET_STD)
        if shape[0] == 3
        else ((0.5,), (0.5,))
    )
    return Source(
        train, names, shape, test=parts.get("test"), val=parts.get("val"), mean=usual[0], std=usual[1], flip=flip
    )


def _input(value: Any, what: str) -> Any:
    """An image where it is one, else a tensor or what it was."""
    if isinstance(value, np.ndarray) and value.dtype in (np.uint8, np.uint16) and value.ndim in (2, 3):
        value = from_array(value, f"{what}: the first input")
    return standard(value, f"{what}: the first input") if isinstance(value, Image.Image) else as_tensor(value)


def _grey(value: Any, what: str) -> bool:
    found = _input(value, what)
    return isinstance(found, Image.Image) and found.mode == "L"

"""Weights from a file into a model: safetensors, or a torch state dict read with `weights_only`; what does not fit is
reported in one sentence."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError, nearest, unknown

WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and DDP, torch.compile


def load_weights(
    model: nn.Module,
    path: str | Path,
    owner: str = "model",
    rename: Sequence[tuple[str, str]] | str = (),
    new_classifier: bool = False,
) -> None:
    """Load a checkpoint into a model, whole or not at all.

    Takes a state dict, or one under the key `state_dict` or `model`; a prefix `module.` or `_orig_mod.` that all names
    share goes. Names of the published CIFAR checkpoints of our own nets are understood.

    Args:
        model: changed in place.
        path: a .safetensors file, or a torch file with nothing in it but tensors and plain values.
        owner: what messages call the model.
        rename: (regular expression, replacement) pairs that turn the file's names into the model's, in order; or the
            name of a layout (see `layout`).
        new_classifier: the classifier stays as the model has it where the file has one of other classes, or none.

    Raises:
        UserError: a missing or unreadable file, a wrong expression, or a checkpoint of another architecture.
    """
    path = Path(path)
    given = read_state(path, owner)
    if isinstance(rename, str):
        if rename not in _LAYOUTS:
            raise unknown("layout in checkpoint.rename,", rename, _LAYOUTS)
        given = _LAYOUTS[rename](given)
    else:
        given = renamed(given, rename, path)
    load_state(model, given, path, owner, new_classifier)


def layout(name: str, convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> None:
    """Let `checkpoint.rename` name a layout: what turns a file's state dict, names and shapes, into a model's."""
    _LAYOUTS[name] = convert


_LAYOUTS: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {}


def renamed(given: Mapping[str, Tensor], rename: Sequence[tuple[str, str]], path: Path) -> dict[str, Tensor]:
    """A state dict under other names.

    Raises:
        UserError: a wrong expression, one that meets no name, or two tensors that get one name.
    """
    out = dict(given)
    for pattern, replacement in rename:
        try:
            names = {name: re.sub(pattern, replacement, name) for name in out}
        except (re.error, IndexError) as error:
            raise UserError(f"checkpoint.rename: '{pattern}' to '{replacement}' is no valid rule: {error}.") from None
        if not any(re.search(pattern, name) for name in out):
            raise UserError(
                f"checkpoint.rename: '{pattern}' matches no name of '{path}', whose names are such as "
                f"'{next(iter(out))}'."
            )
        twice = [name for name, count in Counter(names.values()).items() if count > 1]
        if twice:
            raise UserError(f"checkpoint.rename: '{pattern}' gives two tensors of '{path}' the name '{twice[0]}'.")
        out = {names[name]: value for name, value in out.items()}
    return out


def load_state(
    model: nn.Module, given: Mapping[str, Tensor], path: Path, owner: str = "model", new_classifier: bool = False
) -> None:
    """Load a state dict that was read from `path` into a model, whole or not at all; of tied weights one is enough.
    Raises as `load_weights`."""
    ours = model.state_dict()
    given = _renamed(model, given, ours)
    present = {_place(ours[name]) for name in given if name in ours}
    missing = [
        n for n in ours if n not in given and not n.endswith("num_batches_tracked") and _place(ours[n]) not in present
    ]
    unexpected = [n for n in given if n not in ours]
    shapes = [n for n in given if n in ours and given[n].shape != ours[n].shape]
    if new_classifier and not unexpected and _only_classifier(given, ours, missing, shapes):
        given = {n: value for n, value in given.items() if n not in shapes}
    elif missing or unexpected or shapes:
        raise UserError(_explain(given, ours, missing, unexpected, shapes, path, owner))
    model.load_state_dict(given, strict=False)


def _only_classifier(
    given: Mapping[str, Tensor], ours: Mapping[str, Tensor], missing: Sequence[str], shapes: Sequence[str]
) -> bool:
    """Whether what does not fit is the classifier alone: tensors that differ in their first axis, the classes, all by
    the same numbers; or absent layers at the end of a model most of which is there."""
    sizes = {(given[n].shape[:1], ours[n].shape[:1]) for n in shapes}
    classes = len(sizes) <= 1 and all(given[n].shape[1:] == ours[n].shape[1:] for n in shapes)
    names = [n for n in ours if not n.endswith("num_batches_tracked")]
    at_end = set(missing) <= set(names[len(names) - len(missing) :])
    return classes and at_end and 2 * (len(missing) + len(shapes)) <= len(names)


def read_state(path: str | Path, owner: str = "model") -> dict[str, Tensor]:
    """The state dict in a checkpoint, without a wrapper's prefix. Raises `UserError` for a missing or unreadable
    file."""
    path = Path(path)
    return _unwrap(_read(path, owner), path, owner)


def load_fitting(model: nn.Module, path: str | Path, owner: str = "model") -> list[str]:
    """Load the tensors of a checkpoint that fit a model in name and shape; the rest of the model stays as it is.

    Returns:
        the names in the model of tensors that stay.

    Raises:
        UserError: as `load_weights`, and where less than half of the model's tensors are there.
    """
    path, ours = Path(path), model.state_dict()
    given = _renamed(model, _unwrap(_read(path, owner), path, owner), ours)
    fitting = {name: v for name, v in given.items() if name in ours and v.shape == ours[name].shape}
    missing = [name for name in ours if name not in fitting]
    if 2 * len(missing) > len(ours):
        unexpected = [name for name in given if name not in ours]
        raise UserError(_explain(given, ours, missing, unexpected, [], path, owner))
    model.load_state_dict(fitting, strict=False)
    return missing


def _renamed(model: nn.Module, given: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict in our names, where it is in those under which a network was published."""
    if not _fits(given, ours):
        for pattern, name in getattr(model, "published_names", {}).items():
            given = {re.sub(pattern, name, key): value for key, value in given.items()}
    return given


def _read(path: Path, owner: str) -> Any:
    if not path.is_file():
        others = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        close = nearest(path.name, others)
        raise UserError(
            f"The {owner}'s checkpoint '{path}' does not exist"
            + (f"; did you mean '{path.parent / close[0]}'?" if close else ".")
        )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"The {owner}'s checkpoint '{path}' is no readable safetensors file (incomplete or corrupt?): {error}."
            ) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise UserError(
                f"The {owner}'s checkpoint '{path}' holds Python objects besides tensors, which are not loaded; save "
                "its state_dict() alone."
            ) from None
        raise UserError(
            f"The {owner}'s checkpoint '{path}' is not a readable torch file (incomplete or corrupt?)."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AssertionError):
        raise UserError(
            f"The {owner}'s checkpoint '{path}' is not a readable torch file (incomplete or corrupt?)."
        ) from None


def _unwrap(value: Any, path: Path, owner: str) -> dict[str, Tensor]:
    """The state dict in a file's content, without a wrapper's prefix."""
    for key in ("state_dict", "model"):
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    tensors = {str(k): v for k, v in value.items() if isinstance(v, Tensor)} if isinstance(value, Mapping) else {}
    if not tensors:
        content = (
            f"the keys {', '.join(map(str, list(value)[:5]))}"
            if isinstance(value, Mapping) and value
            else type(value).__name__
        )
        raise UserError(
            f"The {owner}'s checkpoint '{path}' holds no state dict (a mapping of names to tensors), but {content}."
        )
    for prefix in WRAPPERS * 2:
        if all(k.startswith(prefix) for k in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors


def _fits(given: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> bool:
    return all(name in ours for name in given)


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    """Equal for tied weights, of which a file may hold only one."""
    return (tensor.data_ptr() or id(tensor), tensor.shape)


def _explain(
    given: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    shapes: list[str],
    path: Path,
    owner: str,
) -> str:
    matching = sum(1 for n in given if n in ours and given[n].shape == ours[n].shape)
    opening = f"The checkpoint '{path}' does not fit the {owner}: {matching} of its {len(ours)} tensors match"
    if shapes:
        first = next(n for n in ours if n in shapes)
        hint = ""
        if not unexpected and _only_classifier(given, ours, missing, shapes):
            hint = (
                " Only the classifier differs: train the network (`train:`), which gives it a new one, or set "
                "checkpoint.classifier: none for a teacher of features."
            )
        return (
            f"{opening}; the first that differs is '{first}': {tuple(given[first].shape)} in the checkpoint, "
            f"{tuple(ours[first].shape)} in the {owner}.{hint}"
        )
    parts = [
        f"{what} {', '.join(repr(n) for n in found[:3])}{', …' if len(found) > 3 else ''}"
        for what, found in (("the checkpoint lacks", missing), ("the model has no", unexpected))
        if found
    ]
    return f"{opening}; {'; '.join(parts)}{_hint(given, ours, missing, unexpected)}"


def _hint(
    given: Mapping[str, Tensor], ours: Mapping[str, Tensor], missing: Sequence[str], unexpected: Sequence[str]
) -> str:
    """What would make names fit: a prefix to take off or to put on, a new classifier, or the nearest name of the same
    shape."""
    prefixes: Counter[tuple[str, str]] = Counter()
    for name in missing:
        for other in unexpected:
            if given[other].shape == ours[name].shape:
                if other.endswith("." + name):
                    prefixes[other.removesuffix(name), ""] += 1
                elif name.endswith("." + other):
                    prefixes["", name.removesuffix(other)] += 1
    if prefixes:
        (theirs, own), count = prefixes.most_common(1)[0]
        if 2 * count >= len(missing):
            return f". To rename: checkpoint: {{path: …, rename: [['^{re.escape(theirs)}', '{own}']]}}."
    if not unexpected and _only_classifier(given, ours, missing, ()):
        return (
            ". Only the classifier is absent: train the network (`train:`), which gives it a new one, or set "
            "checkpoint.classifier: none for a teacher of features."
        )
    if missing and unexpected:
        alike = [n for n in unexpected if given[n].shape == ours[missing[0]].shape]
        close = nearest(missing[0], alike, 1) or alike[:1]
        if close:
            return f"; the nearest to '{missing[0]}' is the checkpoint's '{close[0]}' (see checkpoint.rename)."
    return "."

"""`file:PATH.py:FUNCTION`: a user's own data."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.bundle import KEYS, DataBundle, labelled
from stillhouse.data.labels import whole_numbers
from stillhouse.data.sequences import sequence_samples, source_of
from stillhouse.data.source import Samples, existing
from stillhouse.errors import UserError, nearest

__all__ = ["KEYS", "REST", "Options", "load"]
REST = "PATH.py:FUNCTION"


class Options(Spec):
    """data.options of `file:`: further keyword arguments of the function."""

    model_config = ConfigDict(extra="allow")


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> DataBundle:
    """A user's own data: `FUNCTION(split)` for "train", "val", "test" gives a sequence of (input, label), or None where
    there is no such split.

    Inputs are PIL images or uint8 tensors (C, H, W), normalised and augmented like any image; or float tensors of any
    shape, or mappings of tensors, used as they are. A sequence may have `classes` (names) and `labels` or `targets`
    (else every sample is read once for its label). `data.options` are further keyword arguments of the function.

    Raises:
        UserError: no such file or function, or what it gives is not such a sequence.
    """
    path = rest
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
    found = {split: make(split, **(options.model_extra or {})) for split in ("train", "val", "test")}
    if found["train"] is None:
        raise UserError(f"file:{path} gives None for 'train'; it must give a sequence of (input, label).")
    samples = {split: None if s is None else _own_samples(s, f"file:{path} ('{split}')") for split, s in found.items()}
    return labelled(source_of(samples, getattr(found["train"], "classes", None), f"file:{path}"), spec)


def _own_samples(found: Any, what: str) -> Samples:
    if not hasattr(found, "__len__") or not hasattr(found, "__getitem__"):
        raise UserError(
            f"{what} gives a {type(found).__name__}; it must give a sequence (with a length and [i]) of (input, label)."
        )
    if len(found) and not (isinstance(found[0], tuple | list) and len(found[0]) == 2):
        raise UserError(f"{what}: samples must be pairs (input, label); the first is a {type(found[0]).__name__}.")
    labels = next((getattr(found, name) for name in ("labels", "targets") if hasattr(found, name)), None)
    return sequence_samples(
        found, whole_numbers([found[i][1] for i in range(len(found))] if labels is None else labels, what)
    )

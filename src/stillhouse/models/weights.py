"""Weights from a file into a model: safetensors, or a torch state dict read with `weights_only`; what does not fit is
reported in one sentence."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError, nearest

WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and DDP, torch.compile


def load_weights(model: nn.Module, path: str | Path, owner: str = "model") -> None:
    """Load a checkpoint into a model, whole or not at all.

    Takes a state dict, or one under the key `state_dict` or `model`; a prefix `module.` or `_orig_mod.` that all names
    share goes. Names of the published CIFAR checkpoints of our own nets are understood.

    Args:
        model: changed in place.
        path: a .safetensors file, or a torch file with nothing in it but tensors and plain values.
        owner: what messages call the model.

    Raises:
        UserError: a missing or unreadable file, or a checkpoint of another architecture.
    """
    path = Path(path)
    load_state(model, _unwrap(_read(path, owner), path, owner), path, owner)


def load_state(model: nn.Module, given: Mapping[str, Tensor], path: Path, owner: str = "model") -> None:
    """Load a state dict that was read from `path` into a model, whole or not at all; of tied weights one is enough.
    Raises as `load_weights`."""
    ours = model.state_dict()
    if not _fits(given, ours):
        for pattern, name in getattr(model, "published_names", {}).items():
            given = {re.sub(pattern, name, key): value for key, value in given.items()}
    present = {_place(ours[name]) for name in given if name in ours}
    missing = [
        n for n in ours if n not in given and not n.endswith("num_batches_tracked") and _place(ours[n]) not in present
    ]
    unexpected = [n for n in given if n not in ours]
    shapes = [n for n in given if n in ours and given[n].shape != ours[n].shape]
    if missing or unexpected or shapes:
        raise UserError(_explain(given, ours, missing, unexpected, shapes, path, owner))
    model.load_state_dict(given, strict=False)


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
        return (
            f"{opening}; the first that differs is '{first}': {tuple(given[first].shape)} in the checkpoint, "
            f"{tuple(ours[first].shape)} in the {owner}."
        )
    parts = [
        f"{what} {', '.join(repr(n) for n in found[:3])}{', …' if len(found) > 3 else ''}"
        for what, found in (("the checkpoint lacks", missing), ("the model has no", unexpected))
        if found
    ]
    return f"{opening}; {'; '.join(parts)}."

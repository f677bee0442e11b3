"""Results of stages on disk, under a hash of what they depend on: `cached` computes one once, and every run that uses
the same takes it from there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from stillhouse.config.specs import TrainSpec
from stillhouse.errors import UserError
from stillhouse.files import atomic_write, digest
from stillhouse.processes import agreed, rank_world, wait


@runtime_checkable
class FingerprintedValue(Protocol):
    """What names its content by a hash: data (an attribute), teachers and products (a method)."""

    @property
    def fingerprint(self) -> Any: ...


def as_json(value: Any, where: str = "uses") -> Any:
    """What a result depends on, as JSON data: equal values give equal JSON, in every process.

    Plain JSON data stays as it is. A spec becomes its keys (a `TrainSpec` only those that change the weights), data,
    teachers and products their fingerprint, a network and a tensor a hash of their values, a file a hash of its bytes.

    Args:
        value: any nesting of these in mappings, lists and tuples.
        where: what the value is called in messages.

    Raises:
        UserError: an object of another kind, a folder, or a teacher whose content is not known.

    >>> as_json({"widths": (8, 4), "train": TrainSpec(epochs=3)})["widths"]
    [8, 4]
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {k: as_json(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v, f"{where}.{i}") for i, v in enumerate(value)]
    if isinstance(value, TrainSpec):
        return value.identity()
    if isinstance(value, BaseModel):
        nested = {k: as_json(v, f"{where}.{k}") for k, v in value if isinstance(v, BaseModel)}
        return {**value.model_dump(mode="json"), **nested}
    if isinstance(value, Tensor | np.ndarray):
        return _tensor_hash(torch.as_tensor(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path) and value.is_file():
        return hashlib.blake2b(value.read_bytes(), digest_size=16).hexdigest()
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, FingerprintedValue):
        found = value.fingerprint() if callable(value.fingerprint) else value.fingerprint
        if found is not None:
            return found
    elif isinstance(value, nn.Module):
        return digest(*(part for k, v in value.state_dict().items() for part in (k, as_json(v))))
    raise UserError(
        f"A stage cannot be stored under `{where}`, a {type(value).__name__}: its content has no hash. Give JSON data, "
        "specs, data, teachers, networks, tensors or files."
    )


def _tensor_hash(x: Tensor) -> str:
    x = x.detach().cpu().contiguous()
    return digest(str(x.dtype), tuple(x.shape), x.reshape(-1).view(torch.uint8).numpy())


def cached(root: Path, name: str, make: Callable[[Path], Any], uses: Mapping[str, Any]) -> Any:
    """What `make(folder)` returned for these `uses`: computed now, or read if it was computed before. Two processes
    that want the same take turns.

    Args:
        root: the folder of all results.
        name: of this one; the name of its folder is this and the hash.
        make: works in the folder that it is given, which has the files of an earlier call that was interrupted; returns
            a mapping of tensors, JSON data, or a mapping of those two.
        uses: all that the result depends on (see `as_json`).
    """
    from filelock import FileLock

    facts = as_json(uses)
    key = json.dumps({"name": name, "format": 1, **facts}, sort_keys=True)
    hashed = hashlib.blake2b(key.encode(), digest_size=10).hexdigest()
    done, working = root / f"{name}-{hashed}", root / f"{name}-{hashed}.partial"
    root.mkdir(parents=True, exist_ok=True)
    main = rank_world()[0] == 0
    with FileLock(str(done) + ".lock") if main else nullcontext():
        if not agreed((done / "result.json").exists()):
            working.mkdir(exist_ok=True)
            result = make(working)
            if main:
                (working / "uses.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
                _save(working, result)
                shutil.rmtree(working / "checkpoints", ignore_errors=True)
                os.replace(working, done)
        wait()
    return _load(done)


def _save(folder: Path, value: Any) -> None:
    from safetensors.torch import save_file

    def is_tensors(v: Any) -> bool:
        return isinstance(v, Mapping) and bool(v) and all(isinstance(x, Tensor) for x in v.values())

    parts = dict(value) if isinstance(value, Mapping) and any(is_tensors(v) for v in value.values()) else {"": value}
    index: dict[str, Any] = {}
    for name, part in parts.items():
        if is_tensors(part):
            with atomic_write(folder / f"{name or 'result'}.safetensors") as temporary:
                save_file({k: v.detach().cpu().contiguous().clone() for k, v in part.items()}, str(temporary))
            index[name] = {"tensors": f"{name or 'result'}.safetensors"}
        else:
            index[name] = {"value": part}
    with atomic_write(folder / "result.json") as temporary:
        temporary.write_text(json.dumps(index))


def _load(folder: Path) -> Any:
    from safetensors.torch import load_file

    index = json.loads((folder / "result.json").read_text())
    parts = {
        name: load_file(str(folder / part["tensors"])) if "tensors" in part else part["value"]
        for name, part in index.items()
    }
    return parts[""] if set(parts) == {""} else parts

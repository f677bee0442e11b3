"""Results of stages on disk, under a hash of what they depend on: `cached` computes one once, and every run that uses
the same takes it from there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from stillhouse.config.names import folder_name
from stillhouse.config.specs import TrainSpec
from stillhouse.errors import UserError
from stillhouse.files import atomic_write, damage, digest, remove, turn, write_checksums
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


RESUMABLE = 14 * 24 * 3600
"""Seconds after which work that was interrupted, and that nothing resumed, is removed."""


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cached(
    root: Path, name: str, make: Callable[[Path], Any], uses: Mapping[str, Any], say: Callable[[str], None] = to_stderr
) -> Any:
    """What `make(folder)` returned for these `uses`: computed now, or read if it was computed before. Two processes
    that want the same take turns. A result that is damaged is computed again.

    Args:
        root: the folder of all results.
        name: of this one; the name of its folder is this and the hash.
        make: works in the folder that it is given, which has the files of an earlier call that was interrupted; returns
            a mapping of tensors, JSON data, or a mapping of those two.
        uses: all that the result depends on (see `as_json`).
        say: shows a sentence: that it waits for another process, or that a result was damaged.

    Raises:
        UserError: a name that cannot be a folder's, and what `as_json` raises.
    """
    facts = as_json(uses)
    done = _place(root, name, facts)
    working = done.with_name(f"{done.name}.partial")
    root.mkdir(parents=True, exist_ok=True)
    main = rank_world()[0] == 0
    result = None
    with turn(done, f"the stage '{name}'", say) if main else nullcontext():
        if main:
            sweep_interrupted(root)
            result = _whole(done, name, say)
        if agreed(result is None):
            working.mkdir(exist_ok=True)
            made = make(working)
            if main:
                (working / "uses.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
                _save(working, made)
                shutil.rmtree(working / "checkpoints", ignore_errors=True)
                for left in working.glob(".*.partial"):
                    left.unlink()
                write_checksums(working)
                os.replace(working, done)
        wait()
    return _load(done) if result is None else result[0]


def place(root: Path, name: str, uses: Mapping[str, Any]) -> Path:
    """The folder in which `cached` stores the result of these `uses`."""
    return _place(root, name, as_json(uses))


def _place(root: Path, name: str, facts: Any) -> Path:
    key = json.dumps({"name": name, "format": 1, **facts}, sort_keys=True)
    hashed = hashlib.blake2b(key.encode(), digest_size=10).hexdigest()
    return root / f"{folder_name(name, 'stage')}-{hashed}"


def _whole(done: Path, name: str, say: Callable[[str], None]) -> tuple[Any] | None:
    """A stored result; None where there is none, or where it is damaged, which is removed."""
    if not done.is_symlink() and not done.exists():
        return None
    reason = "it is no folder" if done.is_symlink() or not done.is_dir() else damage(done)
    if reason is None:
        try:
            return (_load(done),)
        except Exception as error:  # whatever a file that is not as it was written may cause
            reason = f"{type(error).__name__} when it was read"
    say(f"The stored stage '{name}' in {done} is damaged ({reason}), so it is computed again.")
    remove(done)
    return None


def sweep_interrupted(root: Path) -> None:
    """Remove what interrupted stages left, where nobody works on it: after an hour if there is nothing to resume, else
    after `RESUMABLE` seconds."""
    from filelock import FileLock, Timeout

    for folder in root.glob("*.partial"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        files = [p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".partial")]
        with suppress(OSError, Timeout):
            age = time.time() - max(p.stat().st_mtime for p in (folder, *files))
            if age > (RESUMABLE if files else 3600):
                with FileLock(str(folder.with_suffix("")) + ".lock", timeout=0):
                    shutil.rmtree(folder)


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
        name: load_file(str(folder / folder_name(part["tensors"], "result"))) if "tensors" in part else part["value"]
        for name, part in index.items()
    }
    return parts[""] if set(parts) == {""} else parts

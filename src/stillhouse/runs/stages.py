"""Results kept on disk under a hash of what made them: `kept` makes one once, and every run that uses the same takes it
from there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from stillhouse.files import written_beside
from stillhouse.processes import agreed, rank_world, wait


def kept(root: Path, name: str, make: Callable[[Path], Any], uses: Mapping[str, Any]) -> Any:
    """What `make(folder)` returned for these `uses`: now, or when it was first asked for. Two processes that want the
    same take turns.

    Args:
        root: the folder of all results.
        name: of this one, followed in its folder's name by the hash.
        make: works in the folder that it is given, where it finds what a call that was cut off had left; returns a
            mapping of tensors, JSON data, or a mapping of those two.
        uses: all that the result depends on, as JSON data.
    """
    from filelock import FileLock

    digest = hashlib.blake2b(
        json.dumps({"name": name, "format": 1, **uses}, sort_keys=True, default=str).encode(), digest_size=10
    ).hexdigest()
    done, working = root / f"{name}-{digest}", root / f"{name}-{digest}.partial"
    root.mkdir(parents=True, exist_ok=True)
    main = rank_world()[0] == 0
    with FileLock(str(done) + ".lock") if main else nullcontext():
        if not agreed((done / "result.json").exists()):
            working.mkdir(exist_ok=True)
            result = make(working)
            if main:
                (working / "uses.json").write_text(json.dumps(uses, indent=1, sort_keys=True, default=str))
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
            with written_beside(folder / f"{name or 'result'}.safetensors") as beside:
                save_file({k: v.detach().cpu().contiguous().clone() for k, v in part.items()}, str(beside))
            index[name] = {"tensors": f"{name or 'result'}.safetensors"}
        else:
            index[name] = {"value": part}
    with written_beside(folder / "result.json") as beside:
        beside.write_text(json.dumps(index))


def _load(folder: Path) -> Any:
    from safetensors.torch import load_file

    index = json.loads((folder / "result.json").read_text())
    parts = {
        name: load_file(str(folder / part["tensors"])) if "tensors" in part else part["value"]
        for name, part in index.items()
    }
    return parts[""] if set(parts) == {""} else parts

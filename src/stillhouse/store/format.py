"""How a store lies on disk: `manifest.json` says whose signals of which data they are; each shard is one file of arrays
with a record next to it.

A shard counts once its record is there. The record names every array (dtype, shape, offset), the file's bytes and
checksum, and what rounding cost.
Rows of tokens differ in length: their arrays are laid end to end, and `offsets` says where each sample begins.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.files import atomic_write

FORMAT = 1
ALIGN = 64
Precision = Literal["fp32", "fp16", "bf16", "int8"]
LEVELS = 254  # of 8 bits; code 255 is minus infinity


# ---- numbers ---------------------------------------------------------------------------------------------------------


def encode(values: Tensor, precision: Precision, what: str = "signals") -> dict[str, np.ndarray]:
    """float32 (n, ..., w) as arrays by suffix: `""` the numbers, and for int8 also `.low` and `.step`, (n, ..., 1)
    float32, one pair a row of w.

    Raises:
        UserError: values that are not a number, or too large for fp16.
    """
    values = values.detach().to("cpu", torch.float32).contiguous()
    if bool(torch.isnan(values).any()) or bool((values == math.inf).any()):
        raise UserError(
            f"The teacher's {what} hold NaN or infinity; a store keeps finite numbers (and minus infinity) only."
        )
    if precision == "fp32":
        return {"": values.numpy()}
    if precision == "fp16":
        half = values.to(torch.float16)
        if bool((torch.isinf(half) & ~torch.isinf(values)).any()):
            raise UserError(
                f"The teacher's {what} reach {values.abs().max():.3g}, beyond the largest fp16 number 65504; choose "
                "bf16, int8 or fp32."
            )
        return {"": half.numpy()}
    if precision == "bf16":
        return {"": values.to(torch.bfloat16).view(torch.int16).numpy()}
    flat = values if values.ndim > 1 else values[:, None]
    lost = torch.isinf(flat)
    low = flat.masked_fill(lost, math.inf).amin(-1, keepdim=True).nan_to_num(posinf=0.0)
    high = flat.masked_fill(lost, -math.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    step = ((high - low) / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    codes = ((flat - low) / step).round().clamp(0, LEVELS).masked_fill(lost, 255).to(torch.uint8)
    return {"": codes.view(values.shape).numpy(), ".low": low.numpy(), ".step": step.numpy()}


def decode(arrays: Mapping[str, np.ndarray], precision: Precision) -> Tensor:
    """What `encode` wrote, float32."""
    stored = arrays[""]
    if precision in ("fp32", "fp16"):
        return torch.from_numpy(stored).to(torch.float32)
    if precision == "bf16":
        return torch.from_numpy(stored).view(torch.bfloat16).to(torch.float32)
    codes = torch.from_numpy(stored)
    low, step = torch.from_numpy(arrays[".low"]), torch.from_numpy(arrays[".step"])
    if codes.ndim == 1:
        low, step = low[:, 0], step[:, 0]
    return torch.where(codes == 255, -math.inf, codes.to(torch.float32) * step + low)


def rounding(values: Tensor, arrays: Mapping[str, np.ndarray], precision: Precision) -> dict[str, float]:
    """What a precision costs: the largest and the squared differences over finite values, and how many there are."""
    values = values.detach().to("cpu", torch.float32)
    gap = (decode(arrays, precision) - values)[torch.isfinite(values)].double()
    return {"largest": float(gap.abs().max()) if len(gap) else 0.0, "squares": float((gap**2).sum()), "count": len(gap)}


def index_dtype(classes: int) -> type[np.unsignedinteger[Any]]:
    """The smallest unsigned type that counts to `classes`."""
    return np.uint8 if classes <= 1 << 8 else np.uint16 if classes <= 1 << 16 else np.uint32


# ---- files -----------------------------------------------------------------------------------------------------------


def shard_file(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:06d}.bin"


def record_file(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:06d}.json"


def write_shard(folder: Path, number: int, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Write a shard and then its record, each by an atomic write. Raises `UserError` where the disk is full; what was
    whole before stays."""
    path, listed, digest, at = shard_file(folder, number), {}, hashlib.blake2b(digest_size=16), 0
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        for name, array in arrays.items():
            array = np.ascontiguousarray(array)
            listed[name] = {"dtype": array.dtype.str, "shape": list(array.shape), "offset": at}
            raw = array.tobytes() + b"\0" * (-array.nbytes % ALIGN)
            file.write(raw)
            digest.update(raw)
            at += len(raw)
    for left in path.parent.glob(f".{path.name}.*.partial"):  # of a process that was killed while it wrote this shard
        left.unlink(missing_ok=True)
    record = {"arrays": listed, "bytes": at, "checksum": digest.hexdigest(), **facts}
    with atomic_write(record_file(folder, number)) as temporary:
        temporary.write_text(json.dumps(sealed(record)))


def sealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """JSON data with a hash of themselves, under `seal`."""
    text = json.dumps(facts, sort_keys=True)
    return {**facts, "seal": hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}


def unsealed(text: str) -> dict[str, Any]:
    """What `sealed` gave. Raises `ValueError` for anything else; what was written before there were seals is taken."""
    try:
        facts = json.loads(text)
    except RecursionError:
        raise ValueError("nested without end") from None
    if not isinstance(facts, dict):
        raise ValueError("no mapping")
    seal = facts.pop("seal", None)
    if seal is not None and sealed(facts)["seal"] != seal:
        raise ValueError("another seal")
    return facts


def read_record(folder: Path, number: int) -> dict[str, Any] | None:
    """A shard's record; None where there is none. Raises `UserError` for one that is damaged."""
    try:
        record = unsealed(record_file(folder, number).read_text())
        _check_record(record)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"The record {record_file(folder, number)} is damaged; {hint(folder)}") from None
    return record


def _check_record(record: Mapping[str, Any]) -> None:
    """Raises `ValueError`, `KeyError` or `TypeError` for arrays that are not plain numbers inside the shard's file."""
    if not isinstance(record["checksum"], str) or not isinstance(record["bytes"], int):
        raise ValueError("no checksum")
    for sizes in record["errors"].values():
        if not all(isinstance(sizes[key], int | float) for key in ("largest", "squares", "count")):
            raise ValueError("no rounding")
    for array in record["arrays"].values():
        dtype, shape, at = np.dtype(array["dtype"]), array["shape"], array["offset"]
        if dtype.kind not in "biuf" or not all(isinstance(n, int) and n >= 0 for n in (at, *shape)):
            raise ValueError("no array of numbers")
        if at + dtype.itemsize * math.prod(shape) > record["bytes"]:
            raise ValueError("an array beyond the file")


def fault(folder: Path, number: int, record: Mapping[str, Any]) -> str | None:
    """What is wrong with a shard's file, or None: it is there, has its length, and its checksum."""
    path = shard_file(folder, number)
    if not path.exists():
        return "is missing"
    if path.stat().st_size != record["bytes"]:
        return f"is torn: it has {path.stat().st_size:,} of {record['bytes']:,} bytes"
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return None if digest.hexdigest() == record["checksum"] else "is corrupted: its checksum differs"


def map_shard(folder: Path, number: int, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a shard, memory-mapped and read-only."""
    if not record["bytes"]:
        return {n: np.empty(a["shape"], a["dtype"]) for n, a in record["arrays"].items()}
    memory = np.memmap(shard_file(folder, number), mode="r", dtype=np.uint8)
    out = {}
    for name, array in record["arrays"].items():
        dtype, shape = np.dtype(array["dtype"]), tuple(array["shape"])
        size = dtype.itemsize * math.prod(shape)
        out[name] = np.asarray(memory[array["offset"] : array["offset"] + size]).view(dtype).reshape(shape)
    return out


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    with atomic_write(folder / "manifest.json") as temporary:
        temporary.write_text(json.dumps(sealed(manifest), indent=1, sort_keys=True))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises `UserError` where there is no store, a damaged manifest, or one of a later format."""
    try:
        manifest = unsealed((folder / "manifest.json").read_text())
    except FileNotFoundError:
        raise UserError(
            f"There is no store at '{folder}' (no manifest.json); write one with: stillhouse cache RECIPE --out "
            f"{folder}."
        ) from None
    except ValueError:
        raise DamagedManifest(f"The manifest of the store '{folder}' is damaged; {hint(folder)}") from None
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"The store '{folder}' has the format {manifest.get('format')}, but this version reads format {FORMAT}; "
            "cache it again."
        )
    try:
        _check_manifest(manifest)
    except (ValueError, KeyError, TypeError):
        raise DamagedManifest(f"The manifest of the store '{folder}' is damaged; {hint(folder)}") from None
    return manifest


class DamagedManifest(UserError):
    """A manifest that is not as it was written."""


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raises `ValueError`, `KeyError` or `TypeError` for a manifest whose entries are not what they should be."""
    counts = [manifest[key] for key in ("count", "classes", "views", "shard_rows")]
    if not all(isinstance(n, int) and 0 < n < 1 << 48 for n in counts) or not isinstance(manifest["seed"], int):
        raise ValueError("no counts")
    if math.ceil(counts[0] / counts[3]) * counts[2] > 1 << 22:
        raise ValueError("shards without end")
    if manifest["top"] is not None and not 0 < manifest["top"] < counts[1]:
        raise ValueError("no top")
    if not all(isinstance(manifest[key], bool) for key in ("logits", "embedding")):
        raise ValueError("no signals")
    if manifest["precision"] not in get_args(Precision) or not all(isinstance(t, str) for t in manifest["taps"]):
        raise ValueError("no precision")
    if not all(isinstance(part, Mapping) for part in (manifest["teacher"], manifest["data"])):
        raise ValueError("no teacher")


def hint(folder: Path) -> str:
    """What to do about a shard that is missing or damaged."""
    return (
        f"run the command that wrote the store again (stillhouse cache … --out {folder}): it writes the shards "
        "that are missing or damaged, and leaves the rest."
    )


def difference(there: Any, here: Any, path: str = "") -> str | None:
    """The first place where two nested JSON values differ, as `key: X there, Y here`."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted({*there, *here}):
            found = difference(there.get(key), here.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    if there == here:
        return None
    return f"{path}: {json.dumps(there, default=str)} there, {json.dumps(here, default=str)} here"

"""Writing a store: a teacher runs once over every view of a data set. Shards are divided among processes; whole shards
are left as they are, the others are written."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from stillhouse.config.specs import StoreSpec
from stillhouse.data.dataset import BatchKey, IndexedDataset
from stillhouse.errors import UserError
from stillhouse.signals import Batch, Signals
from stillhouse.store import format as F
from stillhouse.training.display import Display

SHARD_BYTES = 64 << 20


def identity(manifest: Mapping[str, Any]) -> str:
    """A store's key inside batches: a hash of its manifest."""
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=8).hexdigest()


class StoreWriter:
    """Writes a store, or what an interrupted run left of it.

    Args:
        folder: of the store.
        manifest: whose signals of which data (see `manifest_of`).

    Raises:
        UserError: a folder that holds another store, or something else.
    """

    def __init__(self, folder: str | Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = Path(folder).expanduser(), json.loads(json.dumps(manifest))
        self.id = identity(self.manifest)
        occupied = self.folder.exists() and any(not p.name.startswith(".") for p in self.folder.iterdir())
        if (self.folder / "manifest.json").exists():  # looked for last: another process may be writing it now
            try:
                differs = F.difference(F.read_manifest(self.folder), self.manifest)
            except F.DamagedManifest:  # written again; shards of another store are known by their records
                differs = None
                F.write_manifest(self.folder, self.manifest)
            if differs:
                raise UserError(f"'{self.folder}' holds another store ({differs}); choose another folder.")
        elif occupied:
            raise UserError(f"'{self.folder}' is not empty and not a store; choose another folder.")
        else:
            F.write_manifest(self.folder, self.manifest)

    @property
    def shards(self) -> int:
        """How many shards the whole store has."""
        return int(self.manifest["views"]) * self._blocks

    @property
    def _blocks(self) -> int:
        return math.ceil(int(self.manifest["count"]) / int(self.manifest["shard_rows"]))

    def place(self, shard: int) -> tuple[int, np.ndarray]:
        """The view, and the samples (n,), of a shard."""
        view, block = divmod(shard, self._blocks)
        rows = self.manifest["shard_rows"]
        return view, np.arange(block * rows, min((block + 1) * rows, self.manifest["count"]), dtype=np.int64)

    def missing(self, rank: int = 0, world: int = 1) -> Iterator[int]:
        """The shards of a process that are missing or damaged, each checked when its turn comes."""
        for shard in range(rank, self.shards, world):
            try:
                record = F.read_record(self.folder, shard)
            except UserError:
                record = None
            other = record is not None and record.get("store", self.id) != self.id
            if record is None or other or F.fault(self.folder, shard, record):
                yield shard

    def write(self, shard: int, columns: Mapping[str, Tensor], plain: Mapping[str, np.ndarray]) -> None:
        """Write a shard: `columns` in the store's precision, `plain` arrays as they are."""
        arrays: dict[str, np.ndarray] = {}
        errors = {}
        precision = self.manifest["precision"]
        for name, values in columns.items():
            encoded = F.encode(values, precision, name)
            errors[name] = F.rounding(values, encoded, precision)
            arrays |= {name + suffix: array for suffix, array in encoded.items()}
        F.write_shard(self.folder, shard, {**arrays, **plain}, {"errors": errors, "store": self.id})


def manifest_of(
    spec: StoreSpec, *, teacher: Mapping[str, Any], data: Mapping[str, Any], count: int, classes: int, row_bytes: int
) -> dict[str, Any]:
    """The manifest of a store: its format, the teacher, the data (fingerprint, split, transform), which signals and in
    what form.

    Raises:
        UserError: `top` is not below the number of classes.
    """
    if spec.top is not None and spec.top >= classes:
        raise UserError(
            f"The top {spec.top} of {classes} classes are all of them; leave `top` out to store full logits."
        )
    rows = spec.shard_rows or max(min(SHARD_BYTES // max(row_bytes, 1), 16384, math.ceil(count / 16)), 64)
    return {
        "format": F.FORMAT,
        "teacher": dict(teacher),
        "data": dict(data),
        "count": count,
        "classes": classes,
        "views": spec.views,
        "seed": spec.seed,
        "top": spec.top,
        "logits": spec.logits,
        "embedding": spec.embedding,
        "taps": sorted(spec.taps),
        "precision": spec.precision,
        "shard_rows": rows,
    }


class Source(Protocol):
    """What `cache` reads signals from: a teacher of `stillhouse.distillation.teachers`, such as `FrozenTeacher`."""

    def to(self, device: Any) -> Any: ...
    def attach(self, wanted: Iterable[str], probe: Batch, student: Any) -> None: ...
    def __call__(self, batch: Batch) -> Signals: ...
    def readers(self) -> Sequence[Any]: ...
    def close(self) -> None: ...


def cache(
    teacher: Source,
    dataset: Any,
    folder: str | Path,
    spec: StoreSpec,
    *,
    teacher_facts: Mapping[str, Any],
    data_facts: Mapping[str, Any],
    batch_size: int = 256,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    live: Display | None = None,
) -> int:
    """Run a teacher over every view of a data set, and store its outputs.

    Args:
        teacher: `FrozenTeacher` or `Ensemble`.
        dataset: what `Loader` takes; view v of sample i is its input at the key (spec.seed, v, i).
        teacher_facts, data_facts: their entries in the manifest.
        rank, world: this process's share of the shards.
        live: the display.

    Returns:
        how many shards this process wrote.

    Raises:
        UserError: a folder that holds another store, a full disk, a teacher whose signals do not fit.
    """
    device = torch.device(device)
    teacher.to(device)
    wanted = {*(["embedding"] if spec.embedding else []), *(f"tap:{t}" for t in spec.taps)}
    probe = _on(
        dataset.batch(BatchKey(0, np.arange(min(2, len(dataset)), dtype=np.int64), 0, min(2, len(dataset))), spec.seed),
        device,
    )
    teacher.attach(wanted, probe, None)
    try:
        signals = teacher(probe)
        scores = _scores(signals)
        if spec.top is not None and scores.ndim not in (2, 3):
            raise UserError(
                "The top k can be stored of class scores (B, C) and of tokens (B, L, V), but the teacher gives "
                f"{tuple(scores.shape)}; store it in full."
            )
        first, _, _ = columns(signals, probe, spec)
        row_bytes = 4 * sum(v.numel() for v in first.values()) // len(probe["index"])
        writer = StoreWriter(
            folder,
            manifest_of(
                spec,
                teacher=teacher_facts,
                data=data_facts,
                count=len(dataset),
                classes=scores.shape[-1],
                row_bytes=row_bytes,
            ),
        )
        live = live or Display()
        live.start("store", len(range(rank, writer.shards, world)), 0)
        written = 0
        for shard in writer.missing(rank, world):
            writer.write(shard, *_shard(teacher, dataset, spec, *writer.place(shard), batch_size, device))
            written += 1
            live.advance(shard // world + 1)
        live.stop("store")
    finally:
        teacher.close()
    return written


def _shard(
    teacher: Any, dataset: Any, spec: StoreSpec, view: int, rows: np.ndarray, batch_size: int, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    parts: list[dict[str, Tensor]] = []
    plain: list[dict[str, np.ndarray]] = []
    lengths: list[np.ndarray] = []
    for start in range(0, len(rows), batch_size):
        indices = rows[start : start + batch_size]
        key = BatchKey(view, indices, 0, len(indices))
        batch, draws = (
            dataset.recorded(key, spec.seed)
            if isinstance(dataset, IndexedDataset)
            else (dataset.batch(key, spec.seed), {})
        )
        _fits(teacher, batch, indices)
        moved = _on(batch, device)
        real, top, tokens = columns(teacher(moved), moved, spec)
        parts.append({k: v.cpu() for k, v in real.items()})
        plain.append({**{k: v.cpu().numpy() for k, v in top.items()}, "seen": glance(batch), **draws})
        if tokens is not None:
            lengths.append(tokens.cpu().numpy())
    out = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    arrays = {k: np.concatenate([p[k] for p in plain]) for k in plain[0]}
    if lengths:
        arrays["offsets"] = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
    return out, arrays


def _fits(teacher: Any, batch: Batch, samples: np.ndarray) -> None:
    """Refuse a sample of more tokens than the teacher reads, where its config says how many those are."""
    ids = batch["input"].get("input_ids") if isinstance(batch["input"], Mapping) else None
    for reader in teacher.readers():
        limit = getattr(getattr(reader.model, "config", None), "max_position_embeddings", None)
        if ids is None or not isinstance(limit, int) or not 0 < limit < ids.shape[1]:
            continue
        mask = batch["input"].get("attention_mask")
        longest = int(mask.sum(1).argmax()) if mask is not None else 0
        raise UserError(
            f"Sample {int(samples[longest])} has {ids.shape[1]} tokens, but the teacher reads at most {limit}; "
            "shorten the samples (data.options.context, and too_long: cut or drop)."
        )


def columns(
    signals: Signals, batch: Batch, spec: StoreSpec
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    """A batch as it is stored: real-valued columns, the top's indices and tail, and for tokens the number of stored
    positions of each sample, (B,).

    Logits (B, L, V) are stored where the label (B, L) is not -100; without such labels, everywhere.
    """
    out: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    lengths: Tensor | None = None
    if spec.logits or spec.top is not None:
        scores = _scores(signals).float()
        if scores.ndim == 3:
            mask = token_mask(batch, scores.shape[:2], scores.device)
            scores, lengths = scores[mask], mask.sum(1)
        if spec.top is None:
            out["logits"] = scores
        else:
            values, indices, tail = top_k(scores, spec.top)
            out["top"] = values
            plain = {"top.indices": indices.to(torch.int64), "top.tail": tail}
            narrow = F.index_dtype(scores.shape[-1])
            plain["top.indices"] = torch.from_numpy(plain["top.indices"].cpu().numpy().astype(narrow))
    if spec.embedding:
        out["embedding"] = signals.require("embedding")
    for name in spec.taps:
        out[f"tap:{name}"] = signals.taps[name]
    return out, plain, lengths


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the k most probable classes, falling, their indices, and the mass of all others; (..., C) ->
    (..., k), (..., k), (...)."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    values, indices = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
    tail = log_p.scatter(-1, indices, -math.inf).logsumexp(-1).exp()
    return values, indices, tail


def token_mask(batch: Batch, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """(B, L) True at the positions that are stored."""
    label = batch.get("label")
    if isinstance(label, Tensor) and label.shape == torch.Size(shape) and not label.is_floating_point():
        return label.to(device) != -100
    return torch.ones(tuple(shape), dtype=torch.bool, device=device)


def glance(batch: Batch) -> np.ndarray:
    """(B, 2) float32: mean and spread of each sample's input, by which a reader checks later that the
    student sees what the teacher saw."""
    x = batch["input"]
    values = [x[k] for k in sorted(x)] if isinstance(x, Mapping) else [x]
    values = [v for v in values if isinstance(v, Tensor) and v.ndim and v.dtype != torch.bool]
    if isinstance(x, Mapping) and "input_ids" in x:  # the padding of a batch is not the sample's
        ids, label = x["input_ids"].double(), batch.get("label")
        mask = x["attention_mask"] if "attention_mask" in x else torch.ones_like(x["input_ids"])
        ids = ids * mask
        spread = (
            (label.double() * (label != -100)).sum(1)
            if isinstance(label, Tensor) and label.ndim == 2
            else mask.double().sum(1)
        )
        return (
            torch.stack([ids.sum(1) / mask.sum(1).clamp_min(1), spread / mask.sum(1).clamp_min(1)], 1).float().numpy()
        )
    flat = torch.cat([v.reshape(len(v), -1).to(torch.float32) for v in values], 1)
    return torch.stack([flat.mean(1), flat.std(1, correction=0)], 1).numpy()


def _scores(signals: Signals) -> Tensor:
    return signals.logits if signals.logits is not None else signals.log_probs()


def _on(batch: Batch, device: torch.device) -> Batch:
    from stillhouse.signals import to_device

    moved: Batch = to_device(batch, device)
    return moved

"""Reading a store: `Store` gives rows in any order from memory-mapped shards; `StoredDataset` makes batches that replay
its views and carry its signals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.dataset import BatchKey
from stillhouse.errors import UserError
from stillhouse.signals import Batch
from stillhouse.store import format as F
from stillhouse.store.writing import glance, identity, token_mask


class Store:
    """A finished store, read-only.

    Args:
        folder: where it is.
        verify: compare every shard with its checksum first (the disk's reading speed); False: only that it is there and
            as long as it should be.

    Raises:
        UserError: no store there, an unfinished one, a shard that is missing, incomplete or damaged.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self.manifest = F.read_manifest(self.folder)
        self.id = identity(self.manifest)
        self._blocks = math.ceil(self.manifest["count"] / self.manifest["shard_rows"])
        total = self._blocks * self.manifest["views"]
        records = [F.read_record(self.folder, s) for s in range(total)]
        absent = [s for s, r in enumerate(records) if r is None]
        if absent:
            raise UserError(
                f"The store '{self.folder}' is not finished: {len(absent)} of {total} shards are missing (the first "
                f"is {absent[0]}); {F.hint(self.folder)}"
            )
        self._records = [r for r in records if r is not None]
        for shard, record in enumerate(self._records):
            if not self._belongs(shard, record):
                path = F.record_file(self.folder, shard)
                raise UserError(f"The record {path} is of another store, or damaged; {F.hint(self.folder)}")
        for shard, record in enumerate(self._records):
            path = F.shard_file(self.folder, shard)
            short = not path.exists() or path.stat().st_size != record["bytes"]
            wrong = F.fault(self.folder, shard, record) if verify or short else None
            if wrong:
                raise UserError(f"The shard {path} {wrong}; {F.hint(self.folder)}")
        self._maps: dict[int, dict[str, np.ndarray]] = {}

    def _belongs(self, shard: int, record: Mapping[str, Any]) -> bool:
        """Whether a record is of this store, and its arrays have a row for each of its samples."""
        first = shard % self._blocks * self.manifest["shard_rows"]
        rows = min(self.manifest["shard_rows"], self.manifest["count"] - first)
        arrays = record["arrays"]
        if "offsets" in arrays:
            whole = arrays["offsets"]["shape"] == [rows + 1]
        else:
            whole = all(a["shape"][:1] == [rows] for a in arrays.values())
        same = arrays.keys() == self._records[0]["arrays"].keys()
        return whole and same and record.get("store", self.id) == self.id

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __len__(self) -> int:
        """Samples."""
        count: int = self.manifest["count"]
        return count

    @property
    def views(self) -> int:
        views: int = self.manifest["views"]
        return views

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(r["bytes"] for r in self._records)

    @property
    def tokens(self) -> int | None:
        """Kept positions of token rows, over all views; None where samples are not rows of tokens."""
        if "offsets" not in self._records[0]["arrays"]:
            return None
        return sum(int(self._mapped(s)["offsets"][-1]) for s in range(len(self._records)))

    @property
    def gives(self) -> frozenset[str]:
        """What a teacher read from it can give."""
        header = self.manifest
        out = {"top"} if header["top"] is not None else {"logits"} if header["logits"] else set()
        return frozenset(
            out | ({"embedding"} if header["embedding"] else set()) | ({"taps"} if header["taps"] else set())
        )

    def errors(self) -> dict[str, tuple[float, float]]:
        """Rounding of each signal: (largest difference, root of the mean square) over the whole store."""
        out = {}
        for name in self._records[0]["errors"]:
            parts = [r["errors"][name] for r in self._records]
            count = max(sum(p["count"] for p in parts), 1)
            out[name] = (max(p["largest"] for p in parts), math.sqrt(sum(p["squares"] for p in parts) / count))
        return out

    def _mapped(self, shard: int) -> dict[str, np.ndarray]:
        if shard not in self._maps:
            self._maps[shard] = F.map_shard(self.folder, shard, self._records[shard])
        return self._maps[shard]

    def view_of(self, epoch: int) -> int:
        """The view that an epoch replays: 0, 1, … and from the first again."""
        return epoch % self.views

    def column(self, name: str, indices: np.ndarray, view: int = 0) -> np.ndarray:
        """Rows (B, ...) of an array of one row a sample: `logits`, `crop`, `flip`, `seen`, … as they are on disk."""
        if name not in self._records[0]["arrays"]:
            raise UserError(
                f"The store '{self.folder}' holds no '{name}'; it holds: {', '.join(self._records[0]['arrays'])}."
            )
        block, local = np.divmod(indices, self.manifest["shard_rows"])
        block = block + view * self._blocks
        touched = np.unique(block)
        if len(touched) == 1:
            return self._mapped(int(touched[0]))[name][local]
        out: np.ndarray | None = None
        for shard in touched.tolist():
            here = block == shard
            rows = self._mapped(shard)[name][local[here]]
            if out is None:
                out = np.empty((len(indices), *rows.shape[1:]), rows.dtype)
            out[here] = rows
        assert out is not None
        return out

    def _flat(self, names: Sequence[str], indices: np.ndarray, view: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Token rows of these samples end to end, and their lengths (B,)."""
        block, local = np.divmod(indices, self.manifest["shard_rows"])
        block = block + view * self._blocks
        lengths, starts = np.empty(len(indices), np.int64), np.empty(len(indices), np.int64)
        touched = np.unique(block).tolist()
        for shard in touched:
            here = block == shard
            offsets = self._mapped(shard)["offsets"]
            starts[here] = offsets[local[here]]
            lengths[here] = offsets[local[here] + 1] - starts[here]
        ends = np.cumsum(lengths)
        source = np.repeat(starts - (ends - lengths), lengths) + np.arange(int(ends[-1]))
        if len(touched) == 1:
            return {n: self._mapped(touched[0])[n][source] for n in names}, lengths
        owner, out = np.repeat(block, lengths), {}
        for name in names:
            first = self._mapped(touched[0])[name]
            out[name] = np.empty((len(source), *first.shape[1:]), first.dtype)
            for shard in touched:
                here = owner == shard
                out[name][here] = self._mapped(shard)[name][source[here]]
        return out, lengths

    def tokens_of(self, indices: np.ndarray) -> list[np.ndarray]:
        """The tokens that a server wrote for these samples, one array each. Raises `UserError` for a store that holds
        none."""
        if "tokens" not in self._records[0]["arrays"]:
            raise UserError(f"The store '{self.folder}' holds no tokens: its signals are of a data set's own.")
        flat, lengths = self._flat(["tokens"], indices, 0)
        return np.split(flat["tokens"].astype(np.int64), np.cumsum(lengths)[:-1])

    def read(self, indices: np.ndarray, view: int = 0, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The signals of samples, float32: `logits` (B, C), or `top` (B, k), `top.indices` (B, k) int64 and `top.tail`
        (B,), `embedding`, `tap:NAME`.

        Of token rows, logits are (B, L, V) and so on, laid where `mask` (B, L) is True (without it: from the left). At
        other positions nothing is known: all logits are 0; the top is empty (minus infinity) with all mass in the tail.

        Raises:
            UserError: a mask whose rows are not as long as the stored ones.
        """
        precision = self.manifest["precision"]
        arrays = self._records[0]["arrays"]
        signals = [n for n in self._records[0]["errors"]]
        ragged = "offsets" in arrays
        along = [n for n in signals if n in ("logits", "top")] if ragged else []
        out: dict[str, Tensor] = {}
        for name in signals:
            if name not in along:
                encoded = {s: self.column(name + s, indices, view) for s in ("", ".low", ".step") if name + s in arrays}
                out[name] = F.decode(encoded, precision)
        if not ragged:
            if "top" in signals:
                out["top.indices"] = torch.from_numpy(self.column("top.indices", indices, view).astype(np.int64))
                out["top.tail"] = torch.from_numpy(self.column("top.tail", indices, view))
            return out
        wanted = [n + s for n in along for s in ("", ".low", ".step") if n + s in arrays]
        wanted += ["top.indices", "top.tail"] if "top" in along else []
        flat, lengths = self._flat(wanted, indices, view)
        if mask is None:
            mask = torch.arange(int(lengths.max()) if len(lengths) else 0)[None, :] < torch.from_numpy(lengths)[:, None]
        found = mask.sum(1).numpy()
        lost = (lengths == 0) & (found > 0)  # samples that the teacher could not answer: nothing is known of them
        if not np.array_equal(found[~lost], lengths[~lost]):
            at = int(np.flatnonzero((found != lengths) & ~lost)[0])
            raise UserError(
                f"Sample {int(indices[at])} has {int(found[at])} positions to learn from, but the store "
                f"'{self.folder}' holds {int(lengths[at])} of them."
            )
        mask = mask & ~torch.from_numpy(lost)[:, None]
        for name in along:
            values = F.decode({s: flat[name + s] for s in ("", ".low", ".step") if name + s in flat}, precision)
            out[name] = _laid(values, mask, 0.0 if name == "logits" else -math.inf)
        if "top" in along:
            out["top.indices"] = _laid(torch.from_numpy(flat["top.indices"].astype(np.int64)), mask, 0)
            out["top.tail"] = _laid(torch.from_numpy(flat["top.tail"]), mask, 1.0)
        return out

    def check(self, data: Mapping[str, Any], classes: int, dataset: Any) -> None:
        """Refuse a data set whose samples, or whose transforms, are not those that the teacher saw.

        Args:
            data: the manifest's `data` facts of what is to be trained on.
            classes: of the data.
            dataset: makes the batches; a few samples are looked at.

        Raises:
            UserError: what differs.
        """
        recorded = self.manifest["data"]
        other = F.difference(recorded["spec"], data["spec"])
        moved = F.difference(recorded["transform"], data["transform"], "data") or F.difference(
            {"split": recorded["split"]}, {"split": data["split"]}
        )
        if other or (recorded["fingerprint"] != data["fingerprint"] and not moved):
            raise UserError(
                f"The store '{self.folder}' was written over other data "
                f"({other or 'the same name and options, but other content'}); train on the data that it was written "
                "over, or cache again."
            )
        if moved:
            raise UserError(
                f"The store '{self.folder}' was written under other transforms ({moved}); the student must see what "
                "the teacher saw."
            )
        if len(dataset) != len(self):
            raise UserError(
                f"The store '{self.folder}' holds {len(self)} samples, but the {data['split']} split has "
                f"{len(dataset)}."
            )
        if self.manifest["classes"] != classes and self.gives & {"logits", "top"}:
            raise UserError(
                f"The store '{self.folder}' scores {self.manifest['classes']} classes, but the data has {classes}."
            )
        rows = np.unique(np.linspace(0, len(self) - 1, 8).astype(np.int64))
        for view in {0, self.views - 1}:
            now = glance(dataset.batch(BatchKey(view, rows, 0, len(rows)), self.manifest["seed"]))
            if not np.allclose(now, self.column("seen", rows, view), rtol=1e-3, atol=1e-3):
                raise UserError(
                    f"The inputs that the store '{self.folder}' was written from cannot be reproduced here: data and "
                    f"transforms have the same names, but view {view} differs; was a library changed? Cache again."
                )


def _laid(values: Tensor, mask: Tensor, fill: float) -> Tensor:
    out = torch.full((*mask.shape, *values.shape[1:]), fill, dtype=values.dtype)
    out[mask] = values
    return out


class StoredDataset:
    """A data set whose training batches replay the views of stores, and carry what is in them (what `Loader` asks of a
    data set).

    Epoch e shows view e mod views, augmented under the store's own seed; the order of the samples is the run's.

    Args:
        dataset: makes the inputs.
        stores: what is read; they must have one seed and one number of views, as an input is one view. More may be
            added until training begins.
    """

    def __init__(self, dataset: Any, stores: Iterable[Store] = ()) -> None:
        self.dataset = dataset
        self.stores: list[Store] = stores if isinstance(stores, list) else list(stores)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name in ("dataset", "stores") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def labels(self) -> Tensor:
        labels: Tensor = self.dataset.labels()
        return labels

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """The data set's batch of the stored view, with `view` (B,) and `stored` by store."""
        if not self.stores:
            plain: Batch = self.dataset.batch(key, seed)
            return plain
        first = self.stores[0]
        view = first.view_of(key.epoch)
        own = key.indices[key.start : key.stop]
        batch: Batch = self.dataset.batch(BatchKey(view, own, 0, len(own)), first.manifest["seed"])
        label = batch.get("label")
        mask = token_mask(batch, label.shape, "cpu") if isinstance(label, Tensor) and label.ndim == 2 else None
        batch["view"] = torch.full((len(own),), view)
        batch["stored"] = {s.id: s.read(own, view, mask) for s in self.stores}
        return batch

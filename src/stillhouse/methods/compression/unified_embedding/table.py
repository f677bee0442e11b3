"""One table of embeddings for many categorical features, and the tables that it is compared with, behind one interface.

All of them are one parameter, and look-ups differ only in which rows a chunk of a feature reads: a slice of its own or
the whole, by the value itself or by a salted hash. So a batch of all features is one gather, whatever the scheme.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError, unknown
from stillhouse.methods.compression.unified_embedding.hashing import bucket, salt

Scheme = Literal["exact", "hash", "sum", "quotient", "robe"]
Pool = Literal["sum", "mean"]
PARTS = {"exact": 1, "hash": 1, "sum": 2, "quotient": 2}
BLOCK = 4  # numbers that robe reads at a time


@dataclass(frozen=True)
class Feature:
    """A categorical feature.

    Attributes:
        name: unique.
        chunks: look-ups of one value, each `dim` wide.
        size: how many values it has; only for tables that are split by features, and for `exact` and `quotient`, whose
            codes are 0 ... size - 1.
    """

    name: str
    chunks: int = 1
    size: int | None = None


@dataclass(frozen=True)
class Assignment:
    """Where the chunks of all features go, in the order of features: (C,) each, salts (C, 2), widths (T,)."""

    feature: list[int]
    table: list[int]
    salts: list[tuple[int, int]]
    chunk: list[int]
    widths: list[int]


def assign(features: Sequence[Feature], dim: int, tables: int = 1) -> Assignment:
    """Chunks to tables in turn, by a counter that runs over all features; salts are (feature, chunk); chunks are joined
    in numeric order."""
    pairs = [(t, k) for t, f in enumerate(features) for k in range(f.chunks)]
    table = [i % tables for i in range(len(pairs))]
    return Assignment([t for t, _ in pairs], table, pairs, [k for _, k in pairs], [f.chunks * dim for f in features])


class UnifiedEmbedding(nn.Module):
    """Embeddings of T features.

    Args:
        features: in the order of the columns; the order and the number of chunks fix the salts.
        rows: M, of each table; where `shared` is False, the rows of all features' slices together.
        dim: d, the width of a chunk; a feature with c chunks is c d wide.
        tables: K tables that chunks take in turn (`shared` only).
        scheme: `hash`: one salted hash a chunk; `sum`: the sum of two; `quotient`: the sum of a row for the code's
            quotient and one for its remainder; `robe`: blocks of numbers at hashed places of the flat memory; `exact`:
            the code is the row, without collisions (`rows` is not used).
        shared: one memory for all features; False: a slice each, in proportion to its size.

    Raises:
        UserError: no feature, names twice, numbers below 1, a size that is needed and not there.
    """

    feature: Tensor
    salts: Tensor
    offsets: Tensor
    sizes: Tensor
    bases: Tensor

    def __init__(
        self,
        features: Sequence[Feature],
        rows: int,
        dim: int,
        *,
        tables: int = 1,
        scheme: Scheme = "hash",
        shared: bool = True,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        shared = shared and scheme != "exact"
        _check(features, rows, dim, tables, scheme, shared)
        self.features, self.rows, self.dim, self.scheme, self.shared, self.sparse = (
            list(features),
            rows,
            dim,
            scheme,
            shared,
            sparse,
        )
        self.assignment = assign(features, dim, tables if shared else 1)
        self.widths = self.assignment.widths
        slices = [rows] * tables if shared else _slices(features, rows, scheme)
        starts = [sum(slices[:i]) for i in range(len(slices))]
        parts = dim // _block(dim) if scheme == "robe" else PARTS[scheme]
        unit = dim if scheme == "robe" else 1  # robe's places are numbers, not rows
        offsets, sizes, salts, bases = [], [], [], []
        for t, k, table in zip(self.assignment.feature, self.assignment.chunk, self.assignment.table):
            own = table if shared else t
            base = max(1, math.isqrt(max(features[t].size or 1, 1) - 1) + 1)
            span = [slices[own]] * parts
            at = [starts[own]] * parts
            if scheme == "quotient" and not shared:
                base = _remainders(slices[own], features[t].size or 1)
                span, at = (
                    [base, max(1, slices[own] - base)],
                    [starts[own], starts[own] + (base if slices[own] > base else 0)],
                )
            offsets.append([a * unit for a in at])
            sizes.append([s * dim - _block(dim) + 1 if scheme == "robe" else s for s in span])
            salts.append([salt(t, k, p) for p in range(parts)])
            bases.append([base])
        for name, values in (("offsets", offsets), ("sizes", sizes), ("salts", salts), ("bases", bases)):
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self.register_buffer("feature", torch.tensor(self.assignment.feature), persistent=False)
        self.weight = nn.Parameter(torch.empty(sum(slices), dim).uniform_(-0.05, 0.05))

    @property
    def width(self) -> int:
        """Of all features together."""
        return sum(self.widths)

    def places(self, codes: Tensor, chunks: Tensor | slice = slice(None)) -> Tensor:
        """int64 codes (..., C), one for each chunk, -> (..., C, H) rows of `weight`; with `robe`, positions of its
        numbers where blocks begin."""
        offsets, sizes, salts = self.offsets[chunks], self.sizes[chunks], self.salts[chunks]
        x = codes.unsqueeze(-1)
        if self.scheme == "exact":
            return offsets + torch.where((x >= 0) & (x < sizes), x, 0)  # code 0 is the unknown value
        if self.scheme == "quotient":
            base = self.bases[chunks]
            x = torch.cat([x % base, x.div(base, rounding_mode="floor")], -1)
            return offsets + (bucket(x, salts, sizes) if self.shared else x % sizes)
        return offsets + bucket(x, salts, sizes)

    def read(self, places: Tensor) -> Tensor:
        """(..., C, H) places -> (..., C d)."""
        if self.scheme == "robe":
            within = torch.arange(_block(self.dim), device=places.device)
            return self.weight.view(-1)[places.unsqueeze(-1) + within].flatten(-3)
        found = F.embedding(places, self.weight, sparse=self.sparse)
        return (found.squeeze(-2) if found.shape[-2] == 1 else found.sum(-2)).flatten(-2)

    def forward(self, codes: Tensor | Mapping[str, Any], pool: Pool = "sum") -> Tensor:
        """Embeddings (B, width), the features side by side, of one value each, or pooled over a feature's values.

        Args:
            codes: (B, T) int64; or by feature name: (B,) codes, (B, n) of n values each, or a pair of values (n,) and
                where each of the B lists of them begins, (B,); an empty list is zeros.
            pool: over the values of a feature.

        Raises:
            UserError: a feature that is not known or not given, or shapes that do not fit.
        """
        if isinstance(codes, Tensor):
            if codes.ndim != 2 or codes.shape[1] != len(self.features):
                raise UserError(
                    f"unified_embedding: codes must be (B, {len(self.features)}), a column a feature; given: "
                    f"{tuple(codes.shape)}."
                )
            return self.read(self.places(codes[:, self.feature]))
        for name in codes:
            self.index(name)
        missing = [f.name for f in self.features if f.name not in codes]
        if missing:
            raise UserError(f"unified_embedding: no values for the feature '{missing[0]}'.")
        out = []
        for f in self.features:
            given = codes[f.name]
            if isinstance(given, tuple):
                values, offsets = given
                out.append(self._ragged(f.name, values, offsets, pool))
            else:
                found = self.lookup(f.name, given)
                out.append(found if given.ndim == 1 else found.sum(1) if pool == "sum" else found.mean(1))
        return torch.cat(out, -1)

    def lookup(self, name: str, codes: Tensor) -> Tensor:
        """Codes (...) of one feature -> (..., its width)."""
        t = self.index(name)
        chunks = (self.feature == t).nonzero().flatten()
        return self.read(self.places(codes.unsqueeze(-1).expand(*codes.shape, len(chunks)), chunks))

    def index(self, name: str) -> int:
        """The position of a feature. Raises `UserError` with the nearest name."""
        names = [f.name for f in self.features]
        if name not in names:
            raise unknown("feature", name, names)
        return names.index(name)

    def _ragged(self, name: str, values: Tensor, offsets: Tensor, pool: Pool) -> Tensor:
        ends = torch.cat([offsets[1:], offsets.new_tensor([len(values)])])
        if len(offsets) and (int(offsets[0]) != 0 or (ends < offsets).any()):
            raise UserError(
                f"unified_embedding: the offsets of '{name}' must rise from 0 to at most {len(values)}, the number of "
                "values."
            )
        bag = torch.repeat_interleave(torch.arange(len(offsets), device=values.device), ends - offsets)
        found = self.lookup(name, values)
        total = found.new_zeros(len(offsets), found.shape[1]).index_add(0, bag, found)
        return total if pool == "sum" else total / (ends - offsets).clamp_min(1)[:, None]

    def get_extra_state(self) -> Tensor:
        """Names, chunks and sizes as bytes: weights are of no use to other features or another order."""
        text = json.dumps(
            {
                "scheme": self.scheme,
                "shared": self.shared,
                "features": [[f.name, f.chunks, f.size] for f in self.features],
            }
        )
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        saved, here = (json.loads(bytes(s.tolist())) for s in (state, self.get_extra_state()))
        for i, (there, mine) in enumerate(zip(saved["features"], here["features"])):
            if there != mine:
                raise UserError(
                    f"unified_embedding: the weights have feature {i} '{there[0]}' ({there[1]} chunks), the model "
                    f"'{mine[0]}' ({mine[1]} chunks); salts go by "
                    "position, so names, order and chunks must be the same."
                )
        if saved != here:
            raise UserError(
                f"unified_embedding: the weights are of {len(saved['features'])} features by '{saved['scheme']}', the "
                f"model of {len(here['features'])} by '{here['scheme']}'."
            )


def expected_collisions(values: int, rows: int) -> float:
    """How many other values share the row of a value, on average, when so many are hashed: (n - 1) / M."""
    return (values - 1) / rows


def collisions(table: UnifiedEmbedding, values: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """For each feature, how many values share the row of one of its values, on average over values and chunks.

    `same`: values of the same feature and chunk, which no network can tell apart in that chunk; `other`: of other
    features and chunks, which it learns to ignore. `same_expected` and `other_expected`: of random hashes.

    Args:
        values: the distinct codes of each feature.

    Raises:
        UserError: a scheme other than `hash` and `exact`.
    """
    if table.scheme not in ("hash", "exact"):
        raise UserError(
            "unified_embedding: collisions are counted for hash and exact, where a chunk reads one row; this table "
            f"is '{table.scheme}'."
        )
    rows = []
    for t, f in enumerate(table.features):
        chunks = (table.feature == t).nonzero().flatten()
        codes = values[f.name]
        rows.append(table.places(codes[:, None].expand(-1, len(chunks)), chunks).squeeze(-1))
    length = len(table.weight)
    total = torch.zeros(length, dtype=torch.int64)
    for r in rows:
        total += torch.bincount(r.flatten(), minlength=length)
    out = {}
    first = 0
    for f, r in zip(table.features, rows):
        n, same, other, expected = len(r), 0.0, 0.0, 0.0
        for k in range(r.shape[1]):
            own = torch.bincount(r[:, k], minlength=length)
            same += float((own[r[:, k]] - 1).sum()) / n
            other += float((total - own)[r[:, k]].sum()) / n
            place = table.offsets[first + k, 0]
            size = int(table.sizes[first + k, 0])
            there = (table.offsets[:, 0] == place).nonzero().flatten().tolist()
            expected += sum(len(rows[int(table.feature[i])]) for i in there if i != first + k) / size
        first += r.shape[1]
        chance = expected_collisions(n, size) if table.scheme == "hash" else 0.0
        out[f.name] = {
            "same": same / r.shape[1],
            "same_expected": chance,
            "other": other / r.shape[1],
            "other_expected": expected / r.shape[1],
        }
    return out


def _check(features: Sequence[Feature], rows: int, dim: int, tables: int, scheme: str, shared: bool) -> None:
    if not features:
        raise UserError("unified_embedding: there is no feature.")
    names = [f.name for f in features]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UserError(f"unified_embedding: two features are called '{twice[0]}'.")
    numbers = {"rows": rows, "dim": dim, "tables": tables, **{f"chunks of '{f.name}'": f.chunks for f in features}}
    for what, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"unified_embedding: {what} must be a whole number of at least 1; given: {value!r}.")
    if scheme not in (*PARTS, "robe"):
        raise unknown("scheme of embeddings", scheme, [*PARTS, "robe"])
    if (not shared or scheme in ("exact", "quotient")) and any(f.size is None or f.size < 1 for f in features):
        raise UserError(
            "unified_embedding: tables split by features, `exact` and `quotient` need the size of every feature."
        )
    if shared and rows < len(features):
        warnings.warn(f"unified_embedding: {rows} rows are fewer than the {len(features)} features.", stacklevel=3)


def _slices(features: Sequence[Feature], rows: int, scheme: str) -> list[int]:
    """Rows of each feature's own slice: its share of `rows` by size, at least 1; `exact`: its size."""
    sizes = [f.size or 1 for f in features]
    return sizes if scheme == "exact" else [max(1, rows * s // sum(sizes)) for s in sizes]


def _remainders(rows: int, size: int) -> int:
    """How many of a slice's rows hold remainders, so that as many quotients as can be have rows of their own."""
    for base in range(max(1, math.isqrt(size)), rows):
        if base + -(-size // base) <= rows:
            return base
    return max(1, rows // 2)


def _block(dim: int) -> int:
    return math.gcd(dim, BLOCK)

"""Tables with categorical columns: from a CSV file or a Python function, split, and as data for `Loader`."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse import catalog
from stillhouse.config.specs import Spec
from stillhouse.data import BatchKey
from stillhouse.errors import UserError, unknown
from stillhouse.files import digest
from stillhouse.methods.compression.unified_embedding.hashing import encode
from stillhouse.methods.compression.unified_embedding.network import class_probs
from stillhouse.randomness import permutation
from stillhouse.signals import Batch, evaluating

AT_ONCE = 4096  # rows of one forward pass when a model is tested


class TableSpec(Spec):
    """A table by name."""

    name: str = Field(
        description="csv:PATH | file:PATH.py:FUNCTION, which takes no argument and returns {column: values}"
    )
    label: str = Field("label", description="The column to predict; its distinct values, sorted, are the classes.")
    dense: list[str] = Field(default_factory=list, description="Columns of numbers; all others are categories.")
    ignore: list[str] = Field(default_factory=list, description="Columns that are left out.")
    val: float = Field(0.1, gt=0, lt=1, description="Share of the rows that picks the best epoch.")
    test: float = Field(0.2, gt=0, lt=1, description="Share of the rows that is judged on.")
    seed: int = Field(0, description="Of the random split: one for all seeds of a run.")


@dataclass
class Columns:
    """A table, encoded: codes (n, T) int64, dense (n, D) float32, labels (n,), and the row ids of `train`, `val` and
    `test`."""

    names: list[str]
    dense_names: list[str]
    codes: Tensor
    dense: Tensor
    labels: Tensor
    classes: int
    split: dict[str, Tensor]

    def vocabularies(self) -> list[Tensor]:
        """The sorted distinct codes of each feature in the training split."""
        return self._vocabularies

    @cached_property
    def _vocabularies(self) -> list[Tensor]:
        return [torch.unique(c) for c in self.codes[self.split["train"]].T]

    @cached_property
    def fingerprint(self) -> str:
        parts = (self.codes, self.dense, self.labels, *(self.split[s] for s in ("train", "val", "test")))
        return digest(*self.names, *self.dense_names, *(p.numpy() for p in parts))

    def scaling(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation (1 where it is 0) of each dense column in the training split."""
        if not self.dense_names:
            return {}
        rows = self.dense[self.split["train"]].double()
        spread = rows.std(0, correction=0)
        return {n: (float(rows[:, i].mean()), float(spread[i]) or 1.0) for i, n in enumerate(self.dense_names)}

    def part(self, split: str, known: Callable[[Tensor], Tensor]) -> Rows:
        """A split, its codes as `known` gives them, its dense columns scaled."""
        rows = self.split[split]
        scaling = torch.tensor(list(self.scaling().values())).view(-1, 2)
        return Rows(known(self.codes[rows]), (self.dense[rows] - scaling[:, 0]) / scaling[:, 1], self.labels[rows])


class Rows:
    """Rows of a table as data for `Loader`."""

    def __init__(self, codes: Tensor, dense: Tensor, targets: Tensor) -> None:
        self.codes, self.dense, self.targets = codes, dense, targets

    def __len__(self) -> int:
        return len(self.targets)

    def labels(self) -> Tensor:
        return self.targets

    def batch(self, at: BatchKey, seed: int) -> Batch:
        rows = torch.from_numpy(at.indices[at.start : at.stop])
        batch = {"input": self.codes[rows], "label": self.targets[rows], "index": rows}
        return {**batch, "dense": self.dense[rows]} if self.dense.shape[1] else batch

    @torch.no_grad()
    def scores(self, network: nn.Module, device: torch.device) -> dict[str, float]:
        """`auc` (of class 1; with more classes, one against the rest, the mean over classes), `accuracy` and `nll` in
        nats."""
        from sklearn.metrics import roc_auc_score

        network.to(device)
        with evaluating(network):
            outputs = []
            for rows in torch.arange(len(self)).split(AT_ONCE):
                dense = self.dense[rows].to(device) if self.dense.shape[1] else None
                outputs.append(class_probs(network(self.codes[rows].to(device), dense)).cpu())
        probs, y = torch.cat(outputs), self.targets
        auc = (
            roc_auc_score(y, probs[:, 1])
            if probs.shape[1] == 2
            else roc_auc_score(y, probs.double() / probs.double().sum(1, keepdim=True), multi_class="ovr")
        )
        nll = -probs.gather(1, y[:, None]).clamp_min(1e-12).log().mean()
        return {"auc": float(auc), "accuracy": (probs.argmax(1) == y).double().mean().item(), "nll": nll.item()}


@lru_cache(maxsize=4)
def _load(text: str) -> Columns:
    spec = TableSpec.model_validate_json(text)
    table = _read(spec.name)
    for name in (spec.label, *spec.dense, *spec.ignore):
        if name not in table:
            raise unknown("column", name, table)
    lengths = {name: len(v) for name, v in table.items()}
    if len(set(lengths.values())) != 1 or not lengths[spec.label]:
        raise UserError(f"The columns of {spec.name} must be of one length above 0; given: {lengths}.")
    names = [n for n in table if n not in (spec.label, *spec.dense, *spec.ignore)]
    if not names:
        raise UserError(f"{spec.name} has no categorical column: all are label, dense or ignored.")
    values, labels = np.unique(np.asarray(table[spec.label]), return_inverse=True)
    if len(values) < 2:
        raise UserError(f"The column '{spec.label}' of {spec.name} holds one class alone.")
    try:
        dense = (
            torch.tensor([[float(x) for x in table[n]] for n in spec.dense]).T
            if spec.dense
            else torch.zeros(len(labels), 0)
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"A dense column of {spec.name} holds what is not a number ({error}); fill it in, or leave it among the "
            "categories."
        ) from None
    order = torch.tensor(permutation(len(labels), "table", spec.seed))
    test, val = (round(len(order) * s) for s in (spec.test, spec.val))
    split = {"test": order[:test], "val": order[test : test + val], "train": order[test + val :]}
    found = torch.from_numpy(labels.astype(np.int64))
    for part, rows in split.items():
        if len(torch.unique(found[rows])) < len(values):
            raise UserError(
                f"The {part} part of {spec.name} ({len(rows)} rows) lacks a class; choose another data.seed, or other "
                "shares."
            )
    return Columns(
        names, list(spec.dense), torch.stack([encode(table[n]) for n in names], 1), dense, found, len(values), split
    )


def load_columns(spec: TableSpec) -> Columns:
    """The table of a spec.

    Raises `UserError` for a file, function or column that is not there, or a split without one of the classes.
    """
    return _load(spec.model_dump_json())


def _read(name: str) -> dict[str, Any]:
    scheme, _, rest = name.partition(":")
    if scheme == "file" and rest:
        module, function = catalog.load_file(name)
        if function is None or not callable(getattr(module, function, None)):
            raise unknown(
                f"function in {name}",
                function or "",
                [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")],
            )
        return dict(getattr(module, function)())
    if scheme == "csv" and rest:
        path = Path(rest).expanduser()
        if not path.is_file():
            raise UserError(f"There is no file '{path}'.")
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        if len(rows) < 2 or any(len(r) != len(rows[0]) for r in rows):
            raise UserError(f"'{path}' must have a line of column names and lines of as many cells.")
        return {n: [c or None for c in column] for n, column in zip(rows[0], zip(*rows[1:]))}
    raise unknown("table", name, ["csv:PATH", "file:PATH.py:FUNCTION"])

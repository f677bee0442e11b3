"""metrics.csv: the rows of named figures that a run writes, cut at resume to what its checkpoint knows."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.errors import UserError
from stillhouse.files import atomic_write, is_full


class Metrics:
    """metrics.csv of a run: rows of named figures, `stage`, `epoch` and `step` first. New columns rewrite the file;
    else rows are appended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = ["stage", "epoch", "step"]
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with open(path, newline="") as handle:
                self.rows = [r for r in csv.DictReader(handle) if r.get("step")]
            for row in self.rows:
                self._widen(row)

    def _widen(self, row: Mapping[str, Any]) -> bool:
        new = [c for c in row if c not in self.columns]
        self.columns += new
        return bool(new)

    def keep(self, stage: str, count: int) -> None:
        """Drop the rows of a stage after its first `count`: what a killed run wrote past its last checkpoint."""
        seen, remaining = 0, []
        for row in self.rows:
            if row["stage"] == stage:
                seen += 1
                if seen > count:
                    continue
            remaining.append(row)
        self.rows = remaining
        self._rewrite()

    def count(self, stage: str) -> int:
        return sum(1 for r in self.rows if r["stage"] == stage)

    def add(self, stage: str, epoch: int, step: int, values: Mapping[str, float]) -> None:
        row = {"stage": stage, "epoch": str(epoch), "step": str(step), **{k: repr(float(v)) for k, v in values.items()}}
        widened = self._widen(row)
        self.rows.append(row)
        if widened or not self.path.exists():
            self._rewrite()
        else:
            self._append(row)

    def _append(self, row: Mapping[str, str]) -> None:
        try:
            with open(self.path, "a", newline="") as handle:
                csv.DictWriter(handle, self.columns, restval="").writerow(row)
        except OSError as error:
            if is_full(error):
                raise UserError(
                    f"Could not write {self.path}: the disk is full. The last checkpoint is intact; free some space "
                    "and start again."
                ) from error
            raise

    def _rewrite(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="")
        writer.writeheader()
        writer.writerows(self.rows)
        with atomic_write(self.path) as temporary:
            temporary.write_text(text.getvalue())

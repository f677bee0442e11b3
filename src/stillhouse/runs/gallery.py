"""Pictures for a run's report: the test samples on which student and teacher differ most, with what is right and what
each of them finds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stillhouse.data import BatchKey
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, Signals, evaluating, to_device
from stillhouse.tasks.base import Task

SHOWN = 8
SEARCHED = 64  # test batches looked through
FOLDER = "pictures"
Columns = dict[str, tuple[list[Tensor], list[str]]]
"""Who finds it -> pictures and captions, one a sample."""


@dataclass
class _Networks:
    product: Student
    teacher: FrozenTeacher | None
    task: Task

    def student(self, batch: Batch) -> Signals:
        task = self.task
        return task.read(task.call(self.product.module, batch), batch)


def write_gallery(run: Run, product: Student) -> None:
    """Write `pictures/` into the run's folder: PNG files and `pictures.json`; nothing for a task that draws none."""
    spec, split = run.judging_data()
    task = product.task
    loader = run.loader(spec, split)
    teachers = [t for t in run.live_teachers if type(t.task) is type(task) and t.task.class_names == task.class_names]
    networks = _Networks(product, teachers[0] if teachers else None, task.ready(product.module))
    with evaluating(product.module):
        device = next(product.module.parameters()).device
        first = to_device(next(iter(loader)), device)
        if not task.pictures(first, networks.student(first)):
            return
        rows = (
            _most_different(networks, islice(loader, SEARCHED), device)
            if networks.teacher
            else np.arange(min(SHOWN, len(loader.dataset)))
        )
        columns: Columns = {}
        for start in range(0, len(rows), loader.batch_size):  # images of several sizes do not fit into one batch
            part = rows[start : start + loader.batch_size]
            batch = to_device(loader.dataset.batch(BatchKey(0, part, 0, len(part)), run.seed), device)
            for name, (pictures, captions) in _columns(networks, batch).items():
                there = columns.setdefault(name, ([], []))
                there[0].extend(pictures)
                there[1].extend(captions)
    write_pictures(run.folder / FOLDER, columns, rows.tolist(), networks.teacher is not None)


def _columns(networks: _Networks, batch: Batch) -> Columns:
    """What is shown of the samples of a batch, by the name of who finds it."""
    task = networks.product.task
    columns = {"truth": (task.truth(batch), task.captions(batch, None))}
    found = {**task.baselines(batch), "student": networks.student(batch)}
    if networks.teacher is not None:
        found["teacher"] = networks.teacher(batch)
    return columns | {name: (task.pictures(batch, out), task.captions(batch, out)) for name, out in found.items()}


def _most_different(networks: _Networks, batches: Iterable[Batch], device: torch.device) -> np.ndarray:
    """Positions of the samples on which the two differ most, most first."""
    found: list[tuple[float, int]] = []
    assert networks.teacher is not None
    for batch in batches:
        batch = to_device(batch, device)
        scores = networks.product.task.disagreement(networks.student(batch), networks.teacher(batch), batch)
        found = sorted([*found, *zip(scores.tolist(), batch["index"].tolist())], reverse=True)[:SHOWN]
    return np.array([index for _, index in found])


def write_pictures(folder: Path, columns: Columns, rows: Sequence[int], compared: bool) -> None:
    """Write pictures and `pictures.json` for the report's section of pictures.

    Args:
        rows: the sample of each picture.
        compared: whether they were chosen as those on which student and teacher differ most.
    """
    from torchvision.utils import save_image

    folder.mkdir(exist_ok=True)
    samples = []
    for i, row in enumerate(rows):
        shown = {}
        for name, (pictures, captions) in columns.items():
            same = name != "truth" and bool(columns["truth"][0]) and torch.equal(pictures[i], columns["truth"][0][i])
            file = f"{i}-{name}.png" if pictures and not same else None
            if file is not None:
                save_image(pictures[i].float() / 255, folder / file)
            if file is not None or captions:
                shown[name] = {"file": file, "caption": captions[i] if captions else ""}
        samples.append({"index": row, "shown": shown})
    (folder / "pictures.json").write_text(json.dumps({"compared": compared, "samples": samples}, indent=1))

"""The public face: what `import stillhouse` promises is there, is what type checkers see, and costs nothing until it is
used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import stillhouse
from stillhouse.config.specs import StoreSpec
from stillhouse.data import IndexedDataset
from stillhouse.data.dataset import PixelInputs
from stillhouse.store import cache


def test_every_name_is_there_and_is_the_one_that_type_checkers_see() -> None:
    tree = ast.parse(Path(stillhouse.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {"__version__", *seen} == set(stillhouse.__all__) <= set(dir(stillhouse))
    for name, path in seen.items():
        module, _, attribute = path.rpartition(".")
        assert getattr(stillhouse, name) is getattr(sys.modules[module], attribute), name


def test_importing_it_imports_no_torch() -> None:
    subprocess.run([sys.executable, "-c", "import sys, stillhouse; assert 'torch' not in sys.modules"], check=True)


def test_a_store_teaches_through_the_face(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (24, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = IndexedDataset(PixelInputs(images, np.arange(24), (0.5,), (0.25,), (4, 4)), np.arange(24) % 3, 3)
    teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(16, 3)) for _ in range(2))
    cache(stillhouse.FrozenTeacher(teacher), data, tmp_path / "store", StoreSpec(), teacher_facts={}, data_facts={})
    store = stillhouse.Store(tmp_path / "store")
    loader = stillhouse.Loader(stillhouse.StoredDataset(data, [store]), 8, shuffle=True)
    before = student[1].weight.detach().clone()
    stillhouse.distill(
        stillhouse.StoredTeacher(store),
        student,
        loader,
        ["kd"],
        train={"epochs": 2, "optimizer": {"lr": 0.5}},
        progress=False,
    )
    assert (student[1].weight - teacher[1].weight).norm() < (before - teacher[1].weight).norm()

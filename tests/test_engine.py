"""What one optimiser step of `fit` is made of: the tokens and samples of accumulated batches weigh alike."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stillhouse
from stillhouse import Distillation
from stillhouse.config.specs import TrainSpec
from stillhouse.data import adapt
from stillhouse.objectives.ce import CrossEntropy
from stillhouse.objectives.gkd import GKD
from stillhouse.signals import Batch
from stillhouse.training.engine import fit

TOKENS = 13


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(TOKENS, 6), nn.Linear(6, TOKENS))


def text(counts: list[int]) -> Batch:
    """Rows of ten tokens, of which so many count."""
    draws = torch.Generator().manual_seed(sum(counts))
    ids, label = (torch.randint(TOKENS, (len(counts), 10), generator=draws) for _ in range(2))
    return {
        "input": ids,
        "label": torch.stack([row.where(torch.arange(10) < n, torch.tensor(-100)) for row, n in zip(label, counts)]),
    }


def together(*batches: Batch) -> Batch:
    return {key: torch.cat([b[key] for b in batches]) for key in batches[0]}


def trained(batches: list[Batch], folder: Path, **train: object) -> Tensor:
    """The student's weights after an epoch of plain gradient descent."""
    module = Distillation(net(0), net(1), [CrossEntropy(), (GKD(), 1.0)])
    optimizer = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    spec = TrainSpec.model_validate({"epochs": 1, "optimizer": optimizer, "schedule": {"name": "constant"}, **train})
    fit(module, adapt(batches), spec, folder=folder, cpu=True)
    module.close()
    return torch.cat([p.detach().flatten() for p in module.student.parameters()])


def test_accumulated_batches_of_unequal_tokens_step_as_one_big_batch(tmp_path: Path) -> None:
    few, many = text([1, 2]), text([10, 9])
    accumulated = trained([few, many], tmp_path / "two", accumulate=2)
    torch.testing.assert_close(accumulated, trained([together(few, many)], tmp_path / "one"))
    assert not torch.equal(accumulated, trained([many, many], tmp_path / "other", accumulate=2))


def test_a_last_step_of_fewer_batches_is_their_mean(tmp_path: Path) -> None:
    first, second, last = text([3, 9]), text([10, 1]), text([2, 4])
    accumulated = trained([first, second, last], tmp_path / "three", accumulate=2)
    torch.testing.assert_close(accumulated, trained([together(first, second), last], tmp_path / "two"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_masks_tokens_are_those_that_count(tmp_path: Path, accumulate: int) -> None:
    batches = [{**text([10, 10]), "mask": torch.arange(10).expand(2, -1) < n} for n in (2, 8)]
    expected = trained([together(*batches)] if accumulate == 2 else batches, tmp_path / "as_one")
    torch.testing.assert_close(trained(batches, tmp_path / "given", accumulate=accumulate), expected)


# ---- samples and tokens weigh the same, however a step's batches cut them --------------------------------------------

LENGTHS = [3, 50, 7, 1]
SIZES = [8, 1, 3]


def rows(lengths: list[int]) -> Batch:
    """Texts of these lengths, padded to the longest; text n is the same in whatever batch it lies."""
    width = max(lengths)
    ids, label = torch.zeros(len(lengths), width, dtype=torch.int64), torch.full((len(lengths), width), -100)
    for i, n in enumerate(lengths):
        draws = torch.Generator().manual_seed(n)
        ids[i, :n], label[i, :n] = (torch.randint(TOKENS, (n,), generator=draws) for _ in range(2))
    return {"input": ids, "label": label}


def points(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Batches of these sizes that cut the same samples."""
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(sum(sizes), 5, generator=draws), torch.randint(3, (sum(sizes),), generator=draws)
    return list(zip(x.split(sizes), y.split(sizes)))


def one_step(batches: list[Any], kind: str) -> Tensor:
    """The weights after one optimiser step over all these batches, clipped as many trainings are, so that the
    gradient's size matters."""
    torch.manual_seed(0)
    student, teacher = (net(0), net(1)) if kind == "tokens" else (nn.Linear(5, 3), nn.Linear(5, 3))
    train = {
        "epochs": 1,
        "accumulate": len(batches),
        "clip": 1.0,
        "optimizer": {"name": "sgd", "lr": 1.0, "weight_decay": 0},
        "schedule": {"name": "constant"},
    }
    stillhouse.distill(teacher, student, batches, ["ce", "kd"], train=train, progress=False)
    return torch.cat([p.detach().flatten() for p in student.parameters()])


def cuts(kind: str) -> tuple[list[Any], list[Any], list[list[Any]]]:
    """One batch of all; one batch for each; and those of two processes."""
    if kind == "tokens":
        return [rows(LENGTHS)], [rows([n]) for n in LENGTHS], [[rows(LENGTHS[:2])], [rows(LENGTHS[2:])]]
    return points([sum(SIZES)]), points(SIZES), [points([7, 5])[:1], points([7, 5])[1:]]


IN_TWO = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_engine
from accelerate import PartialState
rank = PartialState(cpu=True).process_index
torch.save(test_engine.one_step(test_engine.cuts(sys.argv[2])[2][rank], sys.argv[2]), f"{sys.argv[3]}/{rank}.pt")
"""


@pytest.mark.parametrize("kind", ["tokens", "samples"])
def test_one_batch_many_batches_and_two_processes_take_the_same_step(kind: str, tmp_path: Path) -> None:
    as_one, as_many, _ = cuts(kind)
    expected = one_step(as_one, kind)
    torch.testing.assert_close(one_step(as_many, kind), expected, atol=1e-6, rtol=0)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(2):
        launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", **{k: str(v) for k, v in launcher.items()}}
        command = [sys.executable, "-c", IN_TWO, str(Path(__file__).parent), kind, str(tmp_path)]
        started.append(subprocess.Popen(command, env=environment))
    assert [p.wait(timeout=120) for p in started] == [0, 0]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, atol=1e-6, rtol=0)

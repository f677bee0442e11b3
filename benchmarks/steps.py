"""Time of a training step against the hand-written loop: on a pair of networks, and on a step that costs nothing."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sides
import torch
from torch import Tensor, nn
from turns import OURS, Step, Turns, compare

from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Objective, Progress
from stillhouse.signals import Batch, Signals
from stillhouse.training.engine import fit

HAND = "hand_written"


def pair_steps(pair: sides.Pair, batch_size: int, blocks: int, size: int) -> dict[str, Any]:
    """Every side on one pair: {side: milliseconds, ratio, least, most} or {side: missing}, and `gap`, how far the
    students are apart after a block."""
    first = pair.make()
    networks = {OURS: first, HAND: sides.twin(first)}
    steps: dict[str, Step] = {HAND: sides.hand_written(*networks[HAND])}
    missing = {}
    for name, (make, distribution) in sides.PEERS.items():
        networks[name] = sides.twin(first)
        try:
            steps[name] = make(*networks[name])
        except ImportError as error:
            missing[name] = f"not measured ({error}): pip install 'stillhouse[bench]' brings {distribution}"
    gaps: dict[str, float] = {}

    def after_warm_up() -> None:
        gaps.update({name: sides.gap(networks[name][1], networks[HAND][1]) for name in (OURS, *steps) if name != HAND})

    turns = Turns(pair.data(batch_size), steps, blocks, size, after_warm_up)
    sides.stillhouse(*networks[OURS], turns)
    rows = {name: {**asdict(row), "gap": gaps.get(name)} for name, row in compare(turns.seconds, HAND).items()}
    return {
        "teacher": pair.teacher,
        "student": pair.student,
        "batch_size": batch_size,
        "block_steps": size,
        "sides": rows,
        "missing": missing,
    }


class _One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class _Free(Objective):
    """Reads what both networks say and costs one subtraction and one mean."""

    name = "free"
    needs = frozenset({"student.logits", "teacher.logits"})

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        assert student.logits is not None and teacher.logits is not None
        return {"loss": (student.logits - teacher.logits).mean()}


def _free_by_hand(teacher: nn.Module, student: nn.Module) -> Step:
    optimizer = torch.optim.SGD(student.parameters(), **sides.SGD)

    def step(batch: Batch) -> None:
        with torch.no_grad():
            target = teacher(batch["input"])
        (student(batch["input"]) - target).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def free_step(device: torch.device, blocks: int, size: int = 50) -> dict[str, float]:
    """Milliseconds a step of one-parameter networks: ours, by hand, and the difference, which is what Stillhouse's own
    work costs.

    A block of 50 steps holds one log row, as in training.
    """
    networks = [(_One().to(device).eval(), _One().to(device)) for _ in range(2)]
    batch = {"input": torch.ones(2, 1, device=device), "label": torch.zeros(2, dtype=torch.long, device=device)}
    turns = Turns([batch], {HAND: _free_by_hand(*networks[1])}, blocks, size)
    module = Distillation(networks[0][1], networks[0][0], [_Free()])
    with tempfile.TemporaryDirectory() as folder:
        fit(module, turns, sides.options(), folder=Path(folder), cpu=device.type == "cpu")
    rows = compare(turns.seconds, HAND)
    over = sorted(1000 * (a - b) for a, b in zip(turns.seconds[OURS], turns.seconds[HAND]))
    return {
        "stillhouse_ms": rows[OURS].milliseconds,
        "hand_written_ms": rows[HAND].milliseconds,
        "own_ms": over[len(over) // 2],
        "own_least_ms": over[0],
        "own_most_ms": over[-1],
        "blocks": blocks,
        "block_steps": size,
    }

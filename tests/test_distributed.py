"""Two processes (gloo) train as one process with the same global batch, and resume together."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# Equal widths: where they differ, the adapter of nd has batch normalisation and dropout, which see one process's share
# only.
RECIPE = """
data: {name: digits, size: 200, augment: plain, val: 0.2}
teachers:
  teacher: {model: stillhouse:mlp, options: {widths: [24]}, train: {epochs: 2, batch_size: 40, log_every: 2}}
  past: {past_self: true}
student: {model: stillhouse:mlp, options: {widths: [24]}}
objectives:
  - ce
  - kd
  - nd
  - {name: uskd, student_layer: layer1}
  - {name: rkd}
  - {name: dist, weight: 0.5}
  - {name: kd, label: from_past, teacher: past, weight: 0.3}
train: {epochs: 4, batch_size: 40, optimizer: {lr: 0.02}, log_every: 2, checkpoint_seconds: 0, best: accuracy}
"""

# Dies by SIGKILL at the given step of the student, in every process.
DYING = """
import os, signal, sys
from stillhouse.training import engine
collect = engine.Loop._collect
def die(self, i, terms):
    collect(self, i, terms)
    if self.stage == "student" and i == int(os.environ["DIE_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
engine.Loop._collect = die
sys.argv = ["stillhouse", *sys.argv[1:]]
from stillhouse.cli import main
main()
"""


def start(world: int, arguments: list[str], cache: Path, die_at: int | None = None) -> list[int]:
    """Run the command in `world` processes as a launcher would; their exit codes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, *(["-m", "stillhouse"] if die_at is None else ["-c", DYING]), *arguments]
    processes = []
    for rank in range(world):
        environment = {**os.environ, "STILLHOUSE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        if die_at is not None:
            environment["DIE_AT"] = str(die_at)
        if world > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [p.communicate(timeout=300)[0] for p in processes]
    if die_at is None:
        assert [p.returncode for p in processes] == [0] * world, "\n".join(outputs)
    return [p.returncode for p in processes]


def curve(folder: Path) -> list[tuple[str, str, float]]:
    with open(folder / "metrics.csv", newline="") as handle:
        return [
            (r["step"], name, float(r[name]))
            for r in csv.DictReader(handle)
            for name in r
            if name not in ("stage", "epoch", "step") and r[name]
        ]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    work = tmp_path_factory.mktemp("two")
    (work / "recipe.yaml").write_text(RECIPE)
    start(2, ["run", str(work / "recipe.yaml"), "--out", str(work / "two"), "--cpu"], work / "cache-two")
    return work, work / "two"


def test_two_processes_give_the_loss_curve_of_one(two: tuple[Path, Path]):
    work, folder = two
    start(1, ["run", str(work / "recipe.yaml"), "--out", str(work / "one"), "--cpu"], work / "cache-one")
    one, both = curve(work / "one"), curve(folder)
    assert [r[:2] for r in one] == [r[:2] for r in both]
    for (step, name, a), (_, _, b) in zip(one, both):
        assert abs(a - b) <= 1e-4 * max(1, abs(a)), f"step {step}, {name}: one process {a}, two {b}"


def test_two_processes_killed_together_resume_to_the_same_bits(two: tuple[Path, Path]):
    work, folder = two
    arguments = ["run", str(work / "recipe.yaml"), "--out", str(work / "again"), "--cpu"]
    codes = start(2, arguments, work / "cache-again", die_at=9)
    assert -9 in codes
    start(2, arguments, work / "cache-again")
    assert (work / "again" / "metrics.csv").read_bytes() == (folder / "metrics.csv").read_bytes()
    assert (work / "again" / "product" / "model.safetensors").read_bytes() == (
        folder / "product" / "model.safetensors"
    ).read_bytes()

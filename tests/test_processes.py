"""Processes that train together stop together, and what a run leaves behind when it is stopped, killed or started
twice."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import stillhouse
from stillhouse.errors import UserError
from stillhouse.files import atomic_write
from stillhouse.runs import execution, recipe
from stillhouse.runs.execution import execute

LONG = """
data: {name: digits, size: 200, augment: plain}
student: {model: stillhouse:mlp, options: {widths: [8]}}
objectives: [ce]
train: {epochs: 100000, batch_size: 100, log_every: 2, checkpoint_seconds: 0}
"""
SHORT = LONG.replace("epochs: 100000", "epochs: 1")


def start(world: int, arguments: list[str], cache: Path) -> list[subprocess.Popen[str]]:
    """The command in so many processes, as a launcher would start them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(world):
        launcher = (
            {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            if world > 1
            else {}
        )
        environment = {
            **os.environ,
            "STILLHOUSE_CACHE": str(cache),
            "OMP_NUM_THREADS": "1",
            **{k: str(v) for k, v in launcher.items()},
        }
        command = [sys.executable, "-m", "stillhouse", *arguments]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return started


def ended(processes: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    """Exit codes and outputs; fails where one is still there after so long."""
    try:
        out = [p.communicate(timeout=seconds)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, text) for p, text in zip(processes, out)]


def until_trained(folder: Path, processes: list[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + 200
    while not (folder / "checkpoints" / "student.pt").exists():
        assert time.monotonic() < end and all(p.poll() is None for p in processes)
        time.sleep(0.1)


@pytest.mark.parametrize("what", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_one_process_ends_all(what: signal.Signals, recipe_file: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    processes = start(2, ["run", str(recipe_file(LONG)), "--out", str(folder), "--cpu"], tmp_path / "cache")
    until_trained(folder, processes)
    processes[1].send_signal(what)
    (code, text), (other, _) = ended(processes, 60)
    if what == signal.SIGKILL:
        assert (
            (code, other) == (2, -9)
            and "Another process of this training has ended" in text
            and "Traceback" not in text
        )
    else:
        assert code == other == 130, text
    assert (
        torch.load(folder / "checkpoints" / "student.pt", weights_only=True)["done"] > 0
        and not (folder / ".lock").exists()
    )


def test_products_whose_judge_trains_are_judged_by_two_processes(tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "recipes" / "datasets" / "dm.yaml"
    folder = tmp_path / "run"
    processes = start(2, ["run", str(path), "--variant", "smoke", "--out", str(folder), "--cpu"], tmp_path / "cache")
    results = ended(processes, 400)
    assert [code for code, _ in results] == [0, 0], results
    assert (folder / "evaluation.json").exists() and (folder / "report.html").exists()


def test_one_folder_takes_one_run_at_a_time(recipe_file: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = recipe_file(LONG)
    first = start(1, ["run", str(path), "--out", str(folder), "--cpu"], tmp_path / "cache")
    until_trained(folder, first)
    with pytest.raises(UserError, match="Another process is at work in"):
        execute(recipe.load(path), folder, cpu=True)
    first[0].send_signal(signal.SIGTERM)
    assert ended(first, 60)[0][0] == 130
    (folder / ".recipe.yaml.1.partial").touch()  # as a killed writer leaves it
    with pytest.raises(UserError, match="unfinished run of another recipe"):
        execute(recipe.load(recipe_file(SHORT, "short.yaml"), sets=["name=recipe"]), folder, cpu=True)
    execute(recipe.load(recipe_file(SHORT, "short.yaml")), folder, overwrite=True, cpu=True)
    assert (folder / "report.html").exists() and not (folder / ".lock").exists()


def test_a_folder_that_is_refused_is_left_as_it_was(recipe_file: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="is not a run's folder"):
        execute(recipe.load(recipe_file(SHORT)), tmp_path / "mine", cpu=True)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_finished_run_whose_report_failed_makes_its_report(
    recipe_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = recipe.load(recipe_file(SHORT)), tmp_path / "run"

    def fails(folder: Path) -> None:
        raise OSError("no report today")

    with monkeypatch.context() as patched:
        patched.setattr(execution, "write_run_report", fails)
        with pytest.raises(OSError, match="no report today"):
            execute(config, folder, cpu=True)
    before = (folder / "product" / "model.safetensors").stat().st_mtime_ns
    assert execute(config, folder, cpu=True)["accuracy"] > 0
    assert (folder / "report.html").exists() and (folder / "product" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds a finished run"):
        execute(config, folder, cpu=True)


def test_files_have_the_users_mode_and_leftovers_are_swept(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a.safetensors") as temporary:
            save_file({"x": torch.ones(1)}, str(temporary))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {
        "old": f".b.txt.{gone.pid}.partial",
        "young": f".b.txt.{gone.pid + 100000}.partial",
        "alive": f".b.txt.{os.getppid()}.partial",
    }
    for name in names.values():
        (tmp_path / name).touch()
    for name in (names["old"], names["alive"]):
        os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    with atomic_write(tmp_path / "b.txt") as temporary:
        temporary.write_text("b")
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", "b.txt", names["young"], names["alive"]}


def test_a_comparison_ends_its_children(recipe_file: Any, tmp_path: Path) -> None:
    path = recipe_file(LONG)
    command = ["bench", str(path), "--seeds", "0,1", "--jobs", "2", "--out", str(tmp_path / "out"), "--cpu"]
    bench = start(1, command, tmp_path / "cache")
    end = time.monotonic() + 200
    while len(list((tmp_path / "out").rglob("student.pt"))) < 2:
        assert time.monotonic() < end and bench[0].poll() is None, bench[0].communicate()[0]
        time.sleep(0.2)
    bench[0].send_signal(signal.SIGTERM)
    assert ended(bench, 90)[0][0] == 130
    rows = [p.read_bytes() for p in sorted((tmp_path / "out").rglob("metrics.csv"))]
    time.sleep(1)
    assert rows == [p.read_bytes() for p in sorted((tmp_path / "out").rglob("metrics.csv"))], "nobody writes any more"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": "timm:resnet18"}, r"teacher must be an nn.Module.*'timm:resnet18'.*comes from a recipe"),
        ({"student": "timm:resnet18"}, r"student must be an nn.Module.*'timm:resnet18'"),
        ({"teacher": {"big": 3}}, r"teacher 'big' must be .* given: a int"),
        ({"objectives": "kd"}, r'must be a list, such as \["ce", "kd"\]; given: \'kd\''),
        ({"train_loader": 3}, "must be a DataLoader or another iterable"),
        ({"train_loader": "data"}, "must be a DataLoader or another iterable"),
    ],
)
def test_wrong_types_get_a_sentence(given: dict[str, Any], message: str) -> None:
    right = {
        "teacher": nn.Linear(4, 3),
        "student": nn.Linear(4, 3),
        "train_loader": [(torch.ones(2, 4), torch.tensor([0, 1]))],
    }
    with pytest.raises(UserError, match=message):
        stillhouse.distill(**{**right, **given}, progress=False)

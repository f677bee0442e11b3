"""What goes wrong in a run is one sentence, and nothing is lost."""

from __future__ import annotations

import csv
import importlib.util
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Objective
from stillhouse.errors import TrainingDiverged, UserError
from stillhouse.objectives.ce import CrossEntropy as CE
from stillhouse.objectives.kd import KD
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.training.loop import loop

ALONE = """
data: {name: digits, size: 100, test_size: 50}
student: {model: stillhouse:mlp, options: {widths: [8]}}
objectives: [ce]
train: {epochs: 3, batch_size: 20, log_every: 5, checkpoint_seconds: 0}
"""


def run(path: Path, folder: Path, *sets: str) -> dict[str, float]:
    return execute(recipe.load(path, sets=sets), folder, cpu=True)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_terms_and_keeps_the_last_good_checkpoint(
    recipe_file, tmp_path: Path
):
    (tmp_path / "late.py").write_text(
        '''
"""Becomes NaN at the ninth step."""
import torch
from stillhouse.distillation.objective import Objective


class Late(Objective):
    name = "late"

    def forward(self, student, teacher, batch, progress):
        return {"loss": student.logits.mean() * (float("nan") if progress.step == 8 else 0.0)}
'''
    )
    with pytest.raises(TrainingDiverged) as caught:
        run(recipe_file(ALONE), tmp_path / "out", f"objectives=[ce, {{name: 'file:{tmp_path}/late.py'}}]")
    assert "step 9" in str(caught.value) and "late" in str(caught.value) and "ce = " in str(caught.value)
    saved = torch.load(tmp_path / "out" / "checkpoints" / "student.pt", weights_only=True)
    assert saved["done"] == 5 and all(
        torch.isfinite(v).all() for v in saved["state"]["module"].values() if isinstance(v, torch.Tensor)
    )


NAN_GRADIENT = '''
"""A finite loss whose gradient is NaN at the eighth step, while the environment says so."""
import os
import torch
from stillhouse.distillation.objective import Objective


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sum() * 0

    @staticmethod
    def backward(ctx, grad):
        return torch.full((20, 10), float("nan"))


class Late(Objective):
    name = "late"

    def forward(self, student, teacher, batch, progress):
        broken = progress.step == 7 and "NAN_GRADIENT" in os.environ
        return {"loss": Broken.apply(student.logits) if broken else student.logits.sum() * 0}
'''


@pytest.mark.parametrize(("when", "good"), [("a checkpoint", 5), ("an evaluation", 4), ("the end", 4)])
def test_weights_are_checked_before_they_are_stored_and_a_lower_rate_continues(
    recipe_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, good: int
):
    (tmp_path / "late.py").write_text(NAN_GRADIENT)
    sets = [f"objectives=[ce, {{name: 'file:{tmp_path}/late.py'}}]"]
    if when == "an evaluation":
        sets += ["data.val=0.2", "train.best=accuracy", "train.log_every=4", "train.eval_every=1"]
    elif when == "the end":
        sets += ["train.epochs=1", "data.size=160", "train.log_every=4"]  # the eighth step is the last
    else:
        sets += ["train.log_every=4"]
    path, folder = recipe_file(ALONE), tmp_path / "out"
    monkeypatch.setenv("NAN_GRADIENT", "yes")
    with pytest.raises(
        TrainingDiverged,
        match=rf"weights \(module\.student\..*not finite after step 8, though the loss was.*step {good} is good",
    ):
        run(path, folder, *sets)
    saved = torch.load(folder / "checkpoints" / "student.pt", weights_only=True)
    assert saved["done"] == good and not (folder / "product").exists()
    with pytest.raises(TrainingDiverged):  # as it was, it diverges again
        run(path, folder, *sets)
    with pytest.raises(UserError, match=r"another recipe \(train\.batch_size: 20 there, 10 now\)"):
        run(path, folder, *sets, "train.batch_size=10", "train.optimizer.lr=0.01")
    monkeypatch.delenv("NAN_GRADIENT")
    run(path, folder, *sets, "train.optimizer.lr=0.01", "train.clip=1.0")
    with open(folder / "metrics.csv") as handle:
        rates = [float(r["lr"]) for r in csv.DictReader(handle) if r["lr"]]
    assert rates[0] > 0.01 >= rates[-1], "the first steps are those of before"
    changes = json.loads((folder / "environment.json").read_text())["changed after divergence"]
    assert changes == {"train.optimizer.lr": [0.05, 0.01], "train.clip": [None, 1.0]}
    assert not list(folder.rglob("*.diverged"))


def test_values_that_never_were_finite_do_not_stop_a_training(tmp_path: Path):
    module = torch.nn.Linear(2, 2)
    module.register_buffer("lowest", torch.tensor(float("inf")))
    loop(tmp_path, "plain", {"module": module}, lambda i: {}, 2)
    assert (tmp_path / "checkpoints" / "plain.pt").exists()


def test_a_run_in_which_nothing_was_trained_takes_another_recipe(recipe_file, tmp_path: Path):
    path, folder = recipe_file(ALONE), tmp_path / "out"
    with pytest.raises(UserError, match="does not exist"):
        run(path, folder, "student.checkpoint=/nowhere.pt")
    assert run(path, folder)["accuracy"] > 0


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(recipe_file, tmp_path: Path):
    path = recipe_file(ALONE.replace("widths: [8]", "widths: [128]"))
    command = [sys.executable, "-m", "stillhouse", "run", str(path), "--out", str(tmp_path / "out"), "--cpu"]
    limit = 30_000  # bytes a file: room for the recipe and the metrics, not for a checkpoint
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2 and "the disk is full" in done.stderr and "student.pt" in done.stderr, done.stderr
    assert not list((tmp_path / "out").rglob("*.partial")), "no torn file is left"
    figures = run(path, tmp_path / "out")
    assert figures["accuracy"] > 0


def test_a_torn_checkpoint_is_named(recipe_file, tmp_path: Path):
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / "student.pt").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "out" / "recipe.yaml").write_text(recipe.dump(recipe.load(recipe_file(ALONE))))
    with pytest.raises(UserError, match=r"student\.pt cannot be read"):
        run(recipe_file(ALONE), tmp_path / "out")


def test_a_checkpoint_of_another_architecture_is_refused(recipe_file, tmp_path: Path):
    torch.save(nn.Linear(5, 3).state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError, match="weight"):
        run(recipe_file(ALONE), tmp_path / "out", f"student.checkpoint={tmp_path}/other.pt")


def test_a_teacher_without_weights_is_refused(recipe_file, tmp_path: Path):
    with pytest.raises(UserError, match="has no weights"):
        run(recipe_file(ALONE), tmp_path / "out", "teacher=stillhouse:mlp", "objectives=[ce, kd]")


def test_a_batch_of_one_with_batch_norm_is_refused(recipe_file, tmp_path: Path):
    with pytest.raises(UserError, match="batch_size is 1"):
        run(recipe_file(ALONE), tmp_path / "out", "student={model: stillhouse:resnet8}", "train.batch_size=1")


def test_an_early_stop_stops_and_keeps_the_best(recipe_file, tmp_path: Path):
    folder = tmp_path / "out"
    run(
        recipe_file(ALONE),
        folder,
        "data.val=0.3",
        "train={epochs: 40, batch_size: 20, best: accuracy, patience: 2, optimizer: {lr: 0.5}}",
    )
    with open(folder / "metrics.csv") as handle:
        rows = [r for r in csv.DictReader(handle) if r.get("val/accuracy")]
    figures = [float(r["val/accuracy"]) for r in rows]
    best = max(range(len(figures)), key=figures.__getitem__)
    assert len(rows) < 40 and len(rows) == best + 3, "two evaluations after the first best one"


def test_a_tracker_that_is_not_installed_names_its_extra(recipe_file, tmp_path: Path):
    if importlib.util.find_spec("mlflow"):
        pytest.skip("mlflow is installed here")
    with pytest.raises(UserError, match=r"stillhouse\[mlflow\]"):
        run(recipe_file(ALONE), tmp_path / "out", "train.trackers=[mlflow]")


def test_best_without_validation_data_is_refused(recipe_file, tmp_path: Path):
    with pytest.raises(UserError, match=r"data\.val"):
        run(recipe_file(ALONE), tmp_path / "out", "train.best=accuracy")


# ---- wiring faults of a distillation ---------------------------------------------------------------------------------


class Net(nn.Module):
    """A small network with a branch that never runs and a frozen stem."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem, self.body, self.fc, self.unused = (
            nn.Linear(4, 5),
            nn.Linear(5, 5),
            nn.Linear(5, classes),
            nn.Linear(5, 5),
        )
        self.stem.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(self.stem(x)).relu())


class Tapped(Objective):
    """Pulls a tap of the student to 0."""

    def __init__(self, tap: str) -> None:
        super().__init__()
        self.tap = tap
        self.needs = frozenset({f"student.tap:{tap}"})

    def forward(self, student, teacher, batch, progress):
        return {"loss": student.taps[self.tap].pow(2).mean()}


BATCH = {"input": torch.randn(6, 4), "label": torch.tensor([0, 1, 2, 0, 1, 2])}


def test_a_tap_that_does_not_exist_names_the_nearest():
    with pytest.raises(UserError, match=r"'bodi'.*body"):
        Distillation(Net(), None, [Tapped("bodi")]).build(BATCH)


def test_a_tap_that_no_forward_pass_reached_is_an_error():
    with pytest.raises(UserError, match="never reached the tap 'unused'"):
        Distillation(Net(), None, [Tapped("unused")]).build(BATCH)


def test_a_tap_without_gradient_is_an_error():
    from stillhouse.distillation.objective import Progress

    module = Distillation(Net(), None, [CE(), Tapped("stem")]).build(BATCH)
    with pytest.raises(UserError, match="'stem' carries no gradient"):
        module(BATCH, Progress())


def test_different_class_counts_name_both():
    with pytest.raises(UserError, match=r"5 classes.*3"):
        Distillation(Net(3), Net(5), [KD()]).build(BATCH)


def test_an_objective_whose_teacher_is_missing_names_what_there_is():
    kd = KD()
    kd.teacher = "techer"
    with pytest.raises(UserError, match="'teacher'"):
        Distillation(Net(), Net(), [kd]).build(BATCH)
    with pytest.raises(UserError, match="no teacher at all"):
        Distillation(Net(), None, [KD()]).build(BATCH)


def test_two_objectives_of_one_name_need_labels():
    with pytest.raises(UserError, match="label"):
        Distillation(Net(), Net(), [KD(), KD()])


def test_needed_keys_of_the_batch_are_checked():
    class NeedsIndex(Tapped):
        def __init__(self) -> None:
            super().__init__("body")
            self.needs = frozenset({"index"})

    with pytest.raises(UserError, match="`index`"):
        Distillation(Net(), None, [NeedsIndex()]).build(BATCH)


def test_ctrl_c_is_answered_at_once_and_the_next_start_goes_on(recipe_file, tmp_path: Path):
    path, folder = recipe_file(ALONE), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "stillhouse",
        "run",
        str(path),
        "--out",
        str(folder),
        "--cpu",
        "--set",
        "train.epochs=100000",
        "--set",
        "train.log_every=5",
    ]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "student.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130 and "start again to resume" in err and "Traceback" not in err, err
    done = torch.load(folder / "checkpoints" / "student.pt", weights_only=True)["done"]
    again = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while (
        torch.load(folder / "checkpoints" / "student.pt", weights_only=True)["done"] <= done
        and time.monotonic() < deadline + 120
    ):
        time.sleep(0.2)
    again.send_signal(signal.SIGINT)
    _, err = again.communicate(timeout=30)
    assert f"going on from {done}" in err, err

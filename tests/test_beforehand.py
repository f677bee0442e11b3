"""Mistakes that can be known are told before anything is trained: by --dry-run, at the start of a run, before the first
row of a comparison, and by `distill`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import stillhouse
from stillhouse.devices import demanded
from stillhouse.errors import UserError
from stillhouse.runs.folder import seconds_before

RECIPE = """
data: {name: digits, size: 120, test_size: 60}
teacher: {model: stillhouse:mlp, options: {widths: [12]}, train: {epochs: 1, batch_size: 40}}
student: {model: stillhouse:mlp, options: {widths: [8]}}
objectives: [ce, kd]
train: {epochs: 1, batch_size: 40}
variants: {alone: {objectives: [ce], teacher: null}}
"""


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["student.options.num_classes=7"], "The student gives scores of 7 classes"),
        (["student.options.num_classes=7", "objectives=[ce]"], "of 7 classes, but the data has 10"),
        (["teacher.options.num_classes=7"], "the teacher has 7 classes and the student 10"),
        (["teacher.data={name: digits, classes: [0, 1, 2]}"], "the teacher has 3 classes and the student 10"),
        (["objectives=[ce, {name: fitnet, student_layer: lay, teacher_layer: stage:1}]"], "'lay'"),
        (["objectives=[ce, {name: fitnet, student_layer: stage:1, teacher_layer: stage:9}]"], "stage:9"),
        (["teacher={momentum: 0.9}", "objectives=[{name: fitnet, student_layer: lay9, teacher_layer: x}]"], "'lay9'"),
        (["teacher={ensemble: [{model: stillhouse:mlp}]}"], "has no weights"),
        (["teacher.checkpoint=nowhere.pt"], "'nowhere.pt' does not exist"),
        (["teacher={store: nowhere}"], "There is no store at"),
        (["objectives=[{name: kd, teacher: other}]"], "reads the teacher 'other'"),
        (["train.optimizer={name: adamw, betas: [2.0, 0.9]}"], "train.optimizer: adamw does not take these options"),
        (["train.optimizer={name: sgd, momentum: -1}"], "sgd does not take these options: Invalid momentum value"),
        (["train.optimizer={name: sgd, nesterov: true, momentum: 0}"], "Nesterov"),
        (["train.optimizer={name: adam, amsgrad: true, betas: 3}"], "train.optimizer: adam does not take"),
        (["train.optimizer={name: lbfgs, weight_decay: 0}"], "train.optimizer"),
        (["train.optimizer={name: sparseadam}"], "train.optimizer"),
        (["teacher.train.optimizer={name: adamw, eps: -1}"], "teacher.train.optimizer: adamw does not take"),
        (["train.precision=fp16"], "train.precision: fp16 needs a GPU, and this run is on the CPU"),
        (["teacher.train.precision=fp16"], "teacher.train.precision: fp16 needs a GPU"),
        (["train.batch_size=121"], "A batch of 121 samples is larger than the train split of 'digits', which has 120"),
        (["teacher.train.batch_size=500"], "A batch of 500 samples is larger"),
        (["train.trackers=[mlflow]"], "train.trackers: mlflow"),
        (["data.name=nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_a_mistake_that_can_be_known_is_told_before_anything_is_trained(
    sets: list[str], says: str, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "mlflow" in says:
        pytest.importorskip("accelerate")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    Path("recipe.yaml").write_text(RECIPE)
    more = [x for s in sets for x in ("--set", s)]

    def trains(*args: object, **options: object) -> None:
        raise AssertionError("something is trained")

    monkeypatch.setattr("stillhouse.training.loop.Loop.run", trains)
    for arguments in (
        ["run", "recipe.yaml", "--dry-run", "--cpu", *more],
        ["run", "recipe.yaml", "--out", "run", "--cpu", *more],
        ["bench", "recipe.yaml", "--variants", "base", "--seeds", "0,1", "--out", "bench", "--cpu", *more],
    ):
        code, _, err = command(*arguments)
        assert code == 2 and says in err and "Traceback" not in err and err.count("\n") == 1, err
    if "train.optimizer" not in says:
        assert "The row 'recipe'" in err or "recipe.yaml" in err


def test_what_is_right_is_planned_and_leaves_no_trace(command) -> None:
    Path("recipe.yaml").write_text(RECIPE)
    code, out, _ = command("run", "recipe.yaml", "--dry-run", "--device", "cpu")
    assert code == 0 and "student: train the student" in out
    assert [p.name for p in Path().iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("label", "teacher", "student", "objectives", "train", "says"),
    [
        (5, 3, 3, ["ce", "kd"], {}, "the label 5, but the student gives scores of 3 classes"),
        (3, 3, 3, ["ce"], {}, "the label 3, but the student gives scores of 3 classes"),
        (2, 4, 3, ["kd"], {}, "the teacher has 4 classes and the student 3"),
        (2, 3, 3, [{"name": "fitnet", "student_layer": "x", "teacher_layer": "y"}], {}, "no"),
        (2, 3, 3, ["ce"], {"optimizer": {"name": "adamw", "betas": [3, 3]}}, "train.optimizer: adamw does not take"),
        (2, 3, 3, ["ce"], {"optimizer": {"name": "adamw", "nonsense": 3}}, "nonsense"),
        (2, 3, 3, ["ce"], {"precision": "fp16"}, "fp16 needs a GPU"),
    ],
)
def test_distill_tells_before_it_trains(label: int, teacher: int, student: int, objectives, train, says: str) -> None:
    small = nn.Linear(4, student)
    before = small.weight.detach().clone()
    rows = [(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, label])) for _ in range(2)]
    with pytest.raises(UserError) as told:
        stillhouse.distill(
            nn.Linear(4, teacher), small, rows, objectives, train={"epochs": 1, **train}, progress=False, device="cpu"
        )
    assert says in str(told.value) and torch.equal(small.weight, before)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cuda:99", "--device cuda:99: torch sees"),
        ("xpu", "torch sees no xpu device here"),
        ("gpu", "'gpu' names no device"),
        ("", "names no device"),
        ("cuda:x", "names no device"),
        ("meta", "torch sees no meta device here"),
    ],
)
def test_a_device_that_is_not_there_is_a_sentence(name: str, says: str, command) -> None:
    Path("recipe.yaml").write_text(RECIPE)
    for arguments in (
        ["run", "recipe.yaml", "--out", "run"],
        ["run", "recipe.yaml", "--dry-run"],
        ["bench", "recipe.yaml", "--seeds", "0", "--out", "bench"],
        ["cache", "recipe.yaml", "--out", "store"],
    ):
        code, _, err = command(*arguments, "--device", name)
        assert code == 2 and says in err and err.count("\n") == 1, err
    assert not Path("store").exists()
    with pytest.raises(UserError, match="device"):
        stillhouse.distill(None, nn.Linear(2, 2), [(torch.zeros(2, 2), torch.zeros(2).long())], ["ce"], device=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_demanded_where_there_is_none(command) -> None:
    Path("recipe.yaml").write_text(RECIPE)
    _, _, err = command("run", "recipe.yaml", "--device", "cuda")
    assert "--device cuda: torch sees no cuda device here; `stillhouse doctor` prints what it sees" in err
    assert demanded("cpu") == torch.device("cpu")
    code, _, err = command("run", "recipe.yaml", "--device", "cuda", "--cpu")
    assert code == 2


# ---- comparisons and restarts ----------------------------------------------------------------------------------------


def test_a_comparison_starts_rows_of_another_recipe_over_when_asked(command) -> None:
    Path("recipe.yaml").write_text(RECIPE)
    arguments = ["bench", "recipe.yaml", "--variants", "alone,base", "--seeds", "0", "--cpu", "--out", "b"]
    assert command(*arguments)[0] == 0
    kept = Path("b/alone-s0/evaluation.json").stat().st_mtime_ns
    changed = [*arguments, "--set", "teacher.train.epochs=2", "--set", "variants=null"]
    changed = [*arguments[:2], "--variants", "base", *arguments[4:], "--set", "objectives.1.temperature=3"]
    code, _, err = command(*changed)
    assert code == 2 and "The row 'recipe': b/recipe-s0 holds a finished run of another recipe" in err
    assert "'objectives.1.temperature: 4" in err and "--overwrite" in err and err.count("\n") == 1
    assert command(*changed, "--overwrite")[0] == 0
    assert "temperature: 3" in Path("b/recipe-s0/recipe.yaml").read_text()
    assert Path("b/alone-s0/evaluation.json").stat().st_mtime_ns == kept, "only what is another recipe starts over"


def test_the_time_of_a_run_adds_up_over_its_starts(tmp_path: Path) -> None:
    now = time.time()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "environment.json").write_text(json.dumps({"started": now - 500, "seconds before": 40.0}))
    assert seconds_before(tmp_path) == 40.0, "nothing was written since"
    (tmp_path / "checkpoints" / "student.pt").touch()
    os.utime(tmp_path / "checkpoints" / "student.pt", (now - 200, now - 200))
    assert abs(seconds_before(tmp_path) - 340.0) < 1e-3
    for text in ("[]", "{}", "{", '{"started": "x"}'):
        (tmp_path / "environment.json").write_text(text)
        assert seconds_before(tmp_path) == 0.0


def killed_at(code: str, count: int, folder: Path) -> None:
    """Run Python code in a process that is killed at its count-th replacement of a file."""
    start = (
        f"import os, signal\nreal, left = os.replace, [{count}]\n"
        "def replace(*a, **k):\n    left[0] -= 1\n"
        "    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n    return real(*a, **k)\n"
        "os.replace = replace\n"
    )
    done = subprocess.run([sys.executable, "-c", start + code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


BENCH = (
    "import sys; sys.argv = ['stillhouse', 'bench', 'recipe.yaml', '--variants', 'alone', '--seeds', '0', '--cpu', "
    "'--out', 'b', '--evidence', 'e/recipe.json']\nfrom stillhouse.cli import main\nmain()"
)


@pytest.mark.parametrize("count", [2, 8])
def test_a_comparison_that_is_killed_while_it_writes_ends_the_same(count: int, command, tmp_path: Path) -> None:
    Path("recipe.yaml").write_text(RECIPE)
    killed_at(BENCH, count, tmp_path)
    for path in (p for p in tmp_path.rglob("*.json") if not p.name.startswith(".")):
        json.loads(path.read_text())  # none is half written
    arguments = ["bench", "recipe.yaml", "--variants", "alone", "--seeds", "0", "--cpu", "--out", "b"]
    assert command(*arguments, "--evidence", "e/recipe.json")[0] == 0
    assert json.loads(Path("e/recipe.json").read_text())["rows"][0]["seeds"] == [0]
    assert json.loads(Path("b/results.json").read_text())["rows"]


def test_a_folder_that_was_half_removed_is_still_a_runs(command, tmp_path: Path, monkeypatch) -> None:
    Path("recipe.yaml").write_text(RECIPE)
    arguments = ["run", "recipe.yaml", "--variant", "alone", "--out", "r", "--cpu"]
    assert command(*arguments)[0] == 0
    names = sorted(p.name for p in Path("r").iterdir())
    from stillhouse.files import remove

    for kept in range(len(names)):
        left = [kept]

        def removed(path: Path, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            remove(path)

        with monkeypatch.context() as patched:
            patched.setattr("stillhouse.runs.folder.remove", removed)
            code, _, _ = command(*arguments, "--overwrite")
        assert code in (130, 0)
        assert Path("r/recipe.yaml").exists()
    assert command(*arguments, "--overwrite")[0] == 0


def test_evidence_that_is_killed_while_it_writes_is_the_old_or_the_new(command, tmp_path: Path) -> None:
    claims = "claims: [{says: x, figure: accuracy, of: alone, at_least: 1}]\n"
    Path("recipes").mkdir()
    Path("recipes/recipe.yaml").write_text(RECIPE + claims)
    arguments = ["--variants", "alone", "--seeds", "0", "--cpu", "--out", "b", "--evidence", "evidence/recipe.json"]
    assert command("bench", "recipes/recipe.yaml", *arguments)[0] == 0
    results = json.loads(Path("evidence/recipe.json").read_text())
    results["claims"] = []
    Path("evidence/recipe.json").write_text(json.dumps(results))
    code = "import sys; sys.argv = ['stillhouse', 'evidence', '--verdicts']\nfrom stillhouse.cli import main\nmain()"
    killed_at(code, 0, tmp_path)
    assert json.loads(Path("evidence/recipe.json").read_text())["claims"] == []
    assert command("evidence", "--verdicts")[0] == 0
    assert json.loads(Path("evidence/recipe.json").read_text())["claims"]


def test_a_full_disk_is_one_sentence_wherever_it_is_met(command, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("recipe.yaml").write_text(RECIPE)
    real = Path.write_text
    for number in range(12):
        left = [number]

        def full(self: Path, *args: object, left: list[int] = left, **options: object) -> int:
            left[0] -= 1
            if left[0] < 0 and self.suffix != ".lock":
                raise OSError(28, "No space left on device")
            return real(self, *args, **options)  # type: ignore[arg-type]

        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_text", full)
            code, _, err = command("run", "recipe.yaml", "--out", "run", "--cpu", "--variant", "alone", "--overwrite")
        if code == 0:
            break
        assert code == 2 and "disk is full" in err and "Traceback" not in err and err.count("stillhouse: ") == 1, err
    assert number > 3

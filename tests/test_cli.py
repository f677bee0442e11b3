"""The command as its user meets it: exit codes, messages, folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import stillhouse

QUICK = """
data: {name: digits, size: 100, test_size: 100}
teacher: {model: stillhouse:mlp, options: {widths: [24]}, train: {epochs: 1, batch_size: 50}}
student: {model: stillhouse:mlp, options: {widths: [8]}}
objectives: [ce, kd]
train: {epochs: 2, batch_size: 50}
variants: {alone: {objectives: [ce]}}
"""


def test_a_run_leaves_a_folder_with_a_working_product(command, recipe_file, tmp_path: Path):
    code, out, _ = command("run", recipe_file(QUICK), "--cpu")
    folder = tmp_path / "runs" / "recipe-s0"
    assert code == 0 and "accuracy" in out and str(Path("runs/recipe-s0/report.html")) in out
    assert {
        "recipe.yaml",
        "environment.json",
        "metrics.csv",
        "checkpoints",
        "product",
        "evaluation.json",
        "report.html",
    } <= {p.name for p in folder.iterdir()}
    model = stillhouse.load(folder)
    assert not model.training and model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    environment = json.loads((folder / "environment.json").read_text())
    assert (
        environment["seed"] == 0
        and environment["versions"]["torch"] == torch.__version__.partition("+")[0]
        and environment["weights"]["teacher"]
    )


def test_a_finished_run_is_refused_unless_told_and_another_recipe_is_refused(command, recipe_file):
    assert command("run", recipe_file(QUICK), "--cpu", "--out", "x")[0] == 0
    code, _, err = command("run", recipe_file(QUICK), "--cpu", "--out", "x")
    assert code == 2 and "finished run" in err and "--overwrite" in err
    Path("x/evaluation.json").unlink()
    code, _, err = command("run", recipe_file(QUICK), "--cpu", "--out", "x", "--set", "train.epochs=3")
    assert code == 2 and "another recipe" in err and "train.epochs: 2 there, 3 now" in err
    assert command("run", recipe_file(QUICK), "--cpu", "--out", "x", "--overwrite", "--set", "train.epochs=1")[0] == 0
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    for more in ([], ["--overwrite"]):
        code, _, err = command("run", recipe_file(QUICK), "--cpu", "--out", "mine", *more)
        assert code == 2 and Path("mine/thesis.txt").read_text() == "years of work"


def test_dry_run_prints_the_recipe_and_the_plan_and_writes_nothing(command, recipe_file, tmp_path: Path):
    code, out, _ = command("run", recipe_file(QUICK), "--dry-run", "--set", "objectives.2.name=nd")
    assert code == 2, "a list is not extended by --set"
    code, out, _ = command("run", recipe_file(QUICK), "--dry-run", "--set", "objectives=[ce, kd, nd]")
    assert (
        code == 0
        and "temperature: 4" in out
        and "1. teacher" in out
        and "2. student" in out
        and "4 steps" in out
        and "fc:in" in out
        and "parameters" in out
    )
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "nothing.yaml"],
        ["methods", "kdd"],
        ["export", "nowhere"],
        ["report", "nowhere"],
        ["bench", "nothing.yaml"],
    ],
)
def test_a_mistake_exits_2_with_one_sentence(command, arguments: list[str]):
    code, _, err = command(*arguments)
    assert code == 2 and err.startswith("stillhouse: ") and "Traceback" not in err


def test_every_command_has_help_with_an_example(command):
    for name in ("run", "methods", "bench", "evidence", "export", "report", "demo", "schema", "doctor"):
        code, out, _ = command(name, "--help")
        assert code == 0 and f"Example: stillhouse {name}" in out


def test_methods_lists_and_shows_pages(command):
    code, out, _ = command("methods")
    assert code == 0 and "nkd, uskd" in out and "distillation" in out
    code, out, _ = command("methods", "nkd")
    assert code == 0 and "2303.13005" in out and "temperature" in out


def test_bench_compares_resumes_and_writes_evidence(command, recipe_file):
    arguments = [
        "bench",
        recipe_file(QUICK),
        "--seeds",
        "0,1",
        "--cpu",
        "--out",
        "b",
        "--evidence",
        "evidence/quick.json",
    ]
    code, _, err = command(*arguments)
    assert code == 0 and "[4/4]" in err
    results = json.loads(Path("evidence/quick.json").read_text())
    assert results["baseline"] == "alone" and results["slug"] == "quick" and results["teacher"]["metrics"]["accuracy"]
    assert {r["label"]: r["seeds"] for r in results["rows"]} == {"recipe": [0, 1], "alone": [0, 1]}
    assert all(len(r["metrics"]["accuracy"]) == 2 for r in results["rows"])
    code, _, err = command(*arguments)
    assert code == 0 and "[1/" not in err, "what is done is kept"
    assert command("report", "b")[0] == 0
    assert command("report", "evidence/quick.json")[0] == 0 and Path("quick.html").is_file(), (
        "the page is in the working folder"
    )


def test_bench_runs_every_variant_in_every_group_and_compares_within_it(command, recipe_file):
    small, large = (
        {"model": "stillhouse:mlp", "options": {"widths": [4]}},
        {"model": "stillhouse:mlp", "options": {"widths": [64]}},
    )
    recipe = yaml.safe_load(QUICK)
    recipe |= {"groups": {"student": {"small": small, "large": large}}, "evaluate": ["accuracy", "cost", "step"]}
    recipe["variants"] = {"kd": {}, "alone": {"teacher": None, "objectives": ["ce"]}}
    arguments = ["bench", recipe_file(yaml.safe_dump(recipe)), "--seeds", "0,1", "--cpu", "--out", "b"]
    code, out, err = command(*arguments)
    assert code == 0 and "[8/8]" in err and "Group" in out
    results = json.loads(Path("b/results.json").read_text())
    rows = {(r["label"], r["group"]): r["metrics"] for r in results["rows"]}
    assert set(rows) == {(v, g) for v in ("kd", "alone") for g in ("small", "large")} and results["reference"] == "kd"
    assert rows["kd", "large"]["parameters"] > rows["kd", "small"]["parameters"]
    for group in ("small", "large"):
        of_kd = rows["kd", group]
        assert sum(of_kd["step_relative"]) == pytest.approx(2.0), (
            "the reference is its own unit: two seeds around their median"
        )
        assert rows["alone", group]["step_memory_relative"][0] == pytest.approx(
            rows["alone", group]["step_bytes"][0] / of_kd["step_bytes"][0], rel=0.2
        )
    report = Path("b/report.html").read_text()
    assert "At a glance · small" in report and "seed by seed · large" in report and "Step (× kd)" in report


def test_bench_on_ray_gives_the_figures_of_one_process(command, recipe_file):
    pytest.importorskip("ray", reason="ray is not installed (the extra `ray`)")
    found = []
    for more in ([], ["--engine", "ray"]):
        assert command("bench", recipe_file(QUICK), "--seeds", "0", "--cpu", "--out", f"b{len(found)}", *more)[0] == 0
        results = json.loads(Path(f"b{len(found)}/results.json").read_text())
        found.append({r["label"]: (r["metrics"]["accuracy"], r["metrics"]["nll"]) for r in results["rows"]})
    assert found[0] == found[1]


def test_help_and_methods_do_not_import_torch_and_answer_in_time():
    code = (
        "import sys; sys.argv = ['stillhouse', {0!r}]\nfrom stillhouse.cli import main\ntry: main()\nexcept "
        "SystemExit: pass\nassert not {{'torch', 'numpy', 'yaml'}} & set(sys.modules), 'heavy imports'"
    )
    for argument in ("--help", "methods"):
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code.format(argument)],
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "100"},
        )
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - started < 10, "seconds, on a machine however busy; benchmarks/ holds the real figure"

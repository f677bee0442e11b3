"""Recipes that come with the package are found by name, in a clone and from a wheel, and a draft is a recipe that
runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stillhouse.cli import app
from stillhouse.config.shipped import shipped
from stillhouse.errors import UserError
from stillhouse.runs import recipe
from stillhouse.runs.execution import plan

ROOT = Path(__file__).parents[1]


def called(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_every_recipe_has_a_name_of_its_own_and_comes_with_the_wheel() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    files = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert sorted(shipped().values()) == files
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["data-files"]
    assert {f"recipes/{p.parent.name}/*" for p in files} == {p for patterns in listed.values() for p in patterns}


def test_a_recipe_is_printed_listed_and_run_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert called("recipe", "digits") == (ROOT / "recipes/classification/digits.yaml").read_text()
    assert re.search(r"^compression:\n(  .*\n)*  pela ", called("recipe"), re.M)
    monkeypatch.chdir(tmp_path)
    assert "resnet8" in called("run", "digits", "--variant", "smoke", "--dry-run")
    for wrong, near in [("digit", "digits"), ("datasets/kd.yaml", "kd")]:
        with pytest.raises(UserError, match=f"did you mean '{near}', which comes with the package"):
            called("run", wrong)
    Path("digits").write_text("data: digits\nstudent: stillhouse:mlp\nobjectives: [ce]\n")
    assert "resnet8" not in called("run", "digits", "--dry-run")  # a file of the user's comes first


def test_a_draft_is_a_recipe_with_its_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["init", "--data", "digits", "--teacher", "stillhouse:resnet8", "--student", "stillhouse:mlp"]
    assert "Wrote recipe.yaml" in called(*command)
    stages = plan(recipe.load("recipe.yaml"))
    assert [s.name for s in stages] == ["teacher", "student"] and 5000 < (stages[-1].steps or 0) < 8000
    assert "teacher" not in [s.name for s in plan(recipe.load("recipe.yaml", "alone"))]
    with pytest.raises(UserError, match="is there already"):
        called(*command)
    with pytest.raises(UserError, match="did you mean 'stillhouse:mlp'"):
        called(*command[:-1], "stillhouse:mlpp", "--out", "other.yaml")
    assert not Path("other.yaml").exists()


def test_an_installed_wheel_runs_its_recipes_without_a_clone(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("src", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def call(*command: str | Path) -> None:
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)

    call(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source)
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    (site / "libraries.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    (wheel,) = tmp_path.glob("*.whl")
    call(*pip, "--python", python, "install", "-q", "--no-deps", wheel)
    for command in (["recipe", "kd"], ["run", "digits", "--variant", "smoke", "--out", "run", "--cpu"]):
        call(python, "-m", "stillhouse", *command)
    assert (tmp_path / "run" / "report.html").is_file() and (site / "stillhouse" / "cli.py").is_file()

"""The scripts of examples/ run as they are, in seconds, and their students learn."""

from __future__ import annotations

import ast
import os
import re
import runpy
from pathlib import Path

import pytest
import torch

from stillhouse.errors import MissingExtra

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
EXTRAS = ("lightning", "transformers")
LONGEST = 60  # lines


def extras(script: Path) -> set[str]:
    """The optional libraries that a script imports."""
    nodes = list(ast.walk(ast.parse(script.read_text(encoding="utf-8"))))
    names = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    return {name.partition(".")[0] for name in names} & set(EXTRAS)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs_and_its_student_learns(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in extras(script):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state(), dict(os.environ)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except MissingExtra as error:
        pytest.skip(str(error))
    finally:
        torch.set_rng_state(before[0])
        os.environ.clear()
        os.environ.update(before[1])
    shown = capsys.readouterr().out
    accuracies = [
        float(n) for line in re.findall(r"^accuracy: (.*)$", shown, re.MULTILINE) for n in re.findall(r"\d\.\d+", line)
    ]
    perplexities = [float(n) for n in re.findall(r"\d+\.\d+", shown.partition("perplexity")[2])]
    assert accuracies or perplexities, f"{script.name} prints no figure:\n{shown}"
    assert all(a > 0.6 for a in accuracies) and all(p < 25 for p in perplexities), shown


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_short_and_uses_what_users_may(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    modules = {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.module}
    inner = {m for m in modules if m.startswith("stillhouse.") and not m.startswith("stillhouse.integrations.")}
    assert not inner, f"the face lacks what {script.name} imports from {', '.join(inner)}"


def test_the_page_on_examples_names_every_script() -> None:
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\((\w+\.py)\)", page)) == [p.name for p in EXAMPLES]

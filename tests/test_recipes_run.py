"""Every recipe in recipes/ validates in all its variants, and its smoke variant runs end to end and leaves a product
that loads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("recipes/**/*.yaml"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_all_variants_validate(path: Path):
    raw = recipe.read_yaml(path)
    for variant in [None, *(raw.get("variants") or {})]:
        recipe.load(path, variant)
    assert "smoke" in raw["variants"], "every recipe has a variant of seconds"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_smoke_variant_runs_and_leaves_a_product_that_loads(path: Path, tmp_path: Path):
    config = recipe.load(path, "smoke")
    needs_files = [
        name
        for name in ("cifar10", "faust", "tu:", "planetoid:", "cpf:", "sst2", "shakespeare")
        if name in recipe.dump(config)
    ]
    if needs_files and not os.environ.get("STILLHOUSE_DATA"):
        pytest.skip(f"STILLHOUSE_DATA is not set: no {needs_files[0].rstrip(':')} here")
    figures = execute(config, tmp_path / "run", cpu=True)
    assert figures and (tmp_path / "run" / "report.html").exists()
    assert load_product(tmp_path / "run", trust_code=True) is not None

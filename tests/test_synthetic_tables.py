"""The page of tables of data-set distillation: its rows are what they are called, gains are paired by seed, and its
picture shows what the runs made."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from stillhouse.runs import recipe
from stillhouse.synthetic.product import SyntheticSet

ROOT = Path(__file__).parents[1]
HARD = ROOT / "recipes" / "datasets" / "cifar10.yaml"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("synthetic_tables", ROOT / "benchmarks" / "synthetic_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evidence(folder: Path, accuracies: dict[str, dict[int, float]]) -> None:
    rows = [
        {
            "label": label,
            "group": "1",
            "seeds": list(given),
            "metrics": {"accuracy": list(given.values()), "stored_mb": [0.1] * len(given)},
        }
        for label, given in accuracies.items()
    ]
    (folder / "cifar10.json").write_text(json.dumps({"rows": rows}))


@pytest.mark.parametrize("host", ["dm", "datadam", "mtt"])
def test_a_row_called_fyi_is_what_fyi_makes_of_its_host(host: str):
    alone = recipe.load(HARD, host).model_dump(mode="json", exclude={"name", "data", "seed", "variants", "groups"})
    made = recipe.validate({"method": "fyi", "data": recipe.load(HARD).data.model_dump(), "host": alone})._host
    row = recipe.load(HARD, f"{host}_fyi")
    beside = {"name", "variants", "groups"}
    assert made.mirror and made.model_dump(exclude=beside) == row.model_dump(exclude=beside)


def test_all_rows_with_hard_labels_have_one_judge():
    names = [v for v in recipe.read_yaml(HARD)["variants"] if v != "smoke"]
    loaded = [recipe.load(HARD, v) for v in names]
    assert len(loaded) > 8 and all(
        c.evaluate == loaded[0].evaluate and c.network == loaded[0].network and c.data == loaded[0].data for c in loaded
    )


def test_gains_are_paired_by_the_seeds_that_both_rows_have(tables: ModuleType, tmp_path: Path):
    evidence(tmp_path, {"random": {10: 0.2, 11: 0.4, 12: 0.3}, "dm": {11: 0.5, 10: 0.3}})
    assert "| DM | 40.0 ± 14.1 (**+10.0 [+10.0, +10.0]**) |" in tables.page(tmp_path)


def test_a_gain_whose_interval_holds_0_is_not_bold(tables: ModuleType, tmp_path: Path):
    evidence(tmp_path, {"random": {10: 0.2, 11: 0.4}, "dm": {10: 0.1, 11: 0.6}})
    text = tables.page(tmp_path)
    assert "(+5.0 [" in text and "**+5.0" not in text and "DataDAM over DM" not in text


def test_the_picture_has_a_row_a_class_and_a_column_a_method(tables: ModuleType, tmp_path: Path):
    for label, value in (("random", 0.0), ("dm", 7.0)):
        made = SyntheticSet(
            torch.full((2, 3, 8, 8), value), torch.tensor([1, 0]), ["cat", "dog"], (0.5,) * 3, (0.25,) * 3
        )
        made.save(tmp_path / "bench-cifar10" / f"{label}-1-s10" / "product")
    sheet = tables.picture(tmp_path, scale=2)
    assert sheet.size == (70 + 2 * 20, 18 + 2 * 20)
    assert sheet.getpixel((71, 19)) == (128, 128, 128) and sheet.getpixel((91, 39)) == (255, 255, 255)


def test_a_folder_without_runs_gives_no_picture(tables: ModuleType, tmp_path: Path):
    with pytest.raises(SystemExit, match="run the benches first"):
        tables.picture(tmp_path)

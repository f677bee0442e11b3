"""Data formats are found by scheme, ours and those of other packages; keys and options are checked in one place."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import stillhouse
from stillhouse import catalog
from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data import BatchKey, DataBundle, load
from stillhouse.data.format import EVERY_FORMAT
from stillhouse.errors import UserError

OWN = sorted(f.stem for f in (Path(stillhouse.__file__).parent / "data" / "formats").glob("[!_]*.py"))
BREWERY = """
import numpy as np
import torch
from stillhouse.config.specs import Spec
from stillhouse.data.bundle import labelled
from stillhouse.data.source import Source, in_memory

KEYS = frozenset({"augment"})
REST = "BEER"

class Options(Spec):
    bottles: int = 20

def load(rest, spec, options, root):
    images = torch.arange(options.bottles * 16, dtype=torch.uint8).reshape(-1, 1, 4, 4)
    return labelled(Source(in_memory(images, np.arange(options.bottles) % 2), [rest, "water"], (1, 4, 4)), spec)
"""


@pytest.fixture
def brewery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An installed package that adds `brewery:`, and one whose module is no format."""
    package = tmp_path / "brewery-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: brewery\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[stillhouse.data]\nbrewery = brewery_data\ncellar = cellar_data\n")
    (tmp_path / "brewery_data.py").write_text(BREWERY)
    (tmp_path / "cellar_data.py").write_text("KEYS = frozenset()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("brewery_data", "cellar_data"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("scheme", [*OWN, "synthetic"])
def test_every_format_holds_what_a_format_needs(scheme: str):
    found = catalog.data_format(scheme)
    assert found.KEYS.isdisjoint(EVERY_FORMAT) and found.KEYS.issubset(DataSpec.model_fields)
    assert issubclass(found.Options, Spec) and isinstance(found.REST, str) and callable(found.load)


def test_a_format_of_another_package_is_found_by_its_entry_point(brewery: None):
    bundle = load(DataSpec(name="brewery:stout", options={"bottles": 40}, holdout=0.25, augment="plain"))
    assert isinstance(bundle, DataBundle) and bundle.classes == ["stout", "water"]
    assert {s: len(bundle.dataset(s, train=False)) for s in ("train", "holdout", "test")} == {
        "train": 24,
        "holdout": 8,
        "test": 8,
    }
    assert bundle.dataset("train", train=True).batch(BatchKey(0, np.arange(4), 0, 4), 0)["input"].shape == (4, 1, 4, 4)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("brewery:stout", {"mixup": 0.2}, "data.mixup does nothing for 'brewery:stout'.*it takes augment"),
        ("brewery:stout", {"options": {"bottels": 3}}, "unknown key 'bottels'; did you mean 'bottles'"),
        ("brewery", {}, "stands for many data sets; name one as 'brewery:BEER'"),
        ("brewerry:stout", {}, "did you mean 'brewery'"),
        ("cellar:x", {}, "'cellar_data' of data 'cellar:' lacks REST, Options, load"),
        ("digits:x", {}, "'digits' is one data set"),
        ("text:shakespeare", {"classes": [1, 2]}, "data.classes does nothing"),
    ],
)
def test_what_a_format_does_not_take_is_refused(brewery: None, name: str, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        load(DataSpec(name=name, **changes))

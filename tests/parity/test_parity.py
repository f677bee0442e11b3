"""Every array of the authors' own code is reproduced: each oracle file runs through the adapter of its slug and kind.

Files in `oracles/` ship with the repository: each is computed by the reference next to it (see `make_oracle.py`).
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from parity.case import Case, oracle_folder

AUTHORS = sorted(oracle_folder().glob("*/*.npz"))
FILES = [*sorted((Path(__file__).parent / "oracles").glob("*/*.npz")), *AUTHORS]


def adapter(slug: str) -> ModuleType | None:
    """The module `parity/adapters/<slug>.py`, whose `ADAPTERS` maps a kind to a function of the case; None where there
    is none yet."""
    there = (Path(__file__).parent / "adapters" / f"{slug}.py").is_file()
    return importlib.import_module(f"parity.adapters.{slug}") if there else None


FIRST = list({(p.parent.name, re.sub(r"[-_0-9]+$", "", p.stem)): p for p in reversed(FILES)}.values())


@pytest.mark.parametrize("path", FIRST, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_file_may_hold_fewer_arrays(path: Path) -> None:
    """Of a network in evaluation mode there are no gradients, and not every result need be there."""
    full = Case(path)
    module = adapter(full.slug)
    if module is None:
        pytest.skip(f"no adapter yet for {full.slug}/{full.kind}")
    torch.manual_seed(0)
    module.ADAPTERS[full.kind](full)
    results = sorted(name for name in full.compared if not name.startswith("grad"))
    less = Case(path)
    for name in {*full.compared} - {*results, "grad_norms", "grad_output"} | {*results[1:2]} - INPUTS:
        del less.arrays[name]
    torch.manual_seed(0)
    module.ADAPTERS[less.kind](less)


INPUTS = {"aspect_targets"}
"""Results of some files that are the inputs of others."""


@pytest.mark.skipif(bool(AUTHORS), reason="the oracles are there")
def test_oracles_are_found() -> None:
    pytest.skip(f"no oracle files under {oracle_folder()}; set STILLHOUSE_ORACLES")


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_parity(path: Path) -> None:
    case = Case(path)
    module = adapter(case.slug)
    if module is None:
        pytest.skip(f"no adapter yet for {case.slug}/{case.kind}")
    assert case.kind in module.ADAPTERS, (
        f"{case!r}: the adapter of {case.slug} knows the kinds {', '.join(module.ADAPTERS)}, not '{case.kind}'"
    )
    torch.manual_seed(0)
    module.ADAPTERS[case.kind](case)
    left = {name for name in case.arrays if name.startswith(("grad:", "out:", "after:"))} - case.compared
    left -= {name for name in left if name.removeprefix("grad:") == "official"}  # a slip of the released code
    assert not left, f"{case!r}: not compared: {', '.join(sorted(left))}"

"""The catalogue: cards are read as text from files and from folders with `method.py`; what has no complete card is
refused, not passed over."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse import catalog
from stillhouse.catalog.finding import scan
from stillhouse.errors import UserError
from stillhouse.runs.products import KINDS, Product

CARD = (
    '"""Short: one sentence.\n\npaper: On Something\narxiv: 1234.56789\n\nProse.\n"""\n\n'
    'raise RuntimeError("imported")\n'
)


def write(folder: Path, **files: str) -> Path:
    """Write files by their names without `.py`; `a__b` is b in the folder a."""
    for name, text in files.items():
        path = folder.joinpath(*name.split("___")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def found(folder: Path) -> dict[str, catalog.Card]:
    return {c.slug: c for c in scan(folder, "method", "house.methods")}


def test_a_paper_is_a_file_or_a_folder_whose_other_files_are_no_cards(tmp_path: Path):
    write(
        tmp_path,
        __init__='"""Methods."""',
        graphs___one=CARD,
        graphs___two___method=CARD,
        graphs___two___trees='"""Trees."""',
        graphs___two____hidden="",
        three=CARD,
    )
    cards = found(tmp_path)
    assert {s: c.module for s, c in cards.items()} == {
        "one": "house.methods.graphs.one",
        "two": "house.methods.graphs.two",
        "three": "house.methods.three",
    }
    assert cards["two"].file == tmp_path / "graphs" / "two" / "method.py"
    assert cards["two"].title == "Short: one sentence." and cards["two"].text == "Prose."
    assert cards["two"].fields == {"paper": "On Something", "arxiv": "1234.56789"}


@pytest.mark.parametrize(
    "files, named, missing",
    [
        ({"graphs___one": '"""Only a title."""'}, "graphs/one.py", "`paper: …` or `arxiv: …`"),
        ({"graphs___one": "x = 1\n"}, "graphs/one.py", "a title"),
        ({"graphs___one": '"""paper: On Something\narxiv: 1234.56789\n"""'}, "graphs/one.py", "a title"),
        ({"graphs___one___method": '"""A title.\n\ntask: all\n"""'}, "one/method.py", "`paper: …` or `arxiv: …`"),
        ({"graphs___one____init__": CARD}, "graphs/one", "method.py"),
        ({"graphs___one____init__": CARD, "graphs___one___trees": '"""Trees."""'}, "one/trees.py", "method.py"),
    ],
    ids=["no paper", "no docstring", "no title", "folder", "card in __init__", "helpers without method.py"],
)
def test_what_has_no_complete_card_is_refused_by_its_file_and_what_it_lacks(
    tmp_path: Path, files: dict[str, str], named: str, missing: str
):
    with pytest.raises(UserError) as error:
        found(write(tmp_path, graphs___whole=CARD, **files))
    assert f"{named} " in str(error.value) and missing in str(error.value)


def test_what_git_leaves_behind_is_no_method(tmp_path: Path):
    write(tmp_path, one=CARD)
    (tmp_path / "gone" / "__pycache__").mkdir(parents=True)
    (tmp_path / "gone" / "__pycache__" / "gone.cpython-312.pyc").write_bytes(b"")
    assert list(found(tmp_path)) == ["one"]


def test_reading_the_cards_imports_no_torch():
    code = "import sys; from stillhouse import catalog; catalog.cards(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("slug", [c.slug for c in catalog.list_methods() if c.kind == "method"])
def test_a_product_names_the_module_of_its_card_which_gives_its_class(slug: str):
    entry = catalog.card(slug)
    importlib.import_module(entry.module)
    kinds = {
        c.kind: c
        for c in subclasses(Product)
        if f"{c.__module__}.".startswith(f"{entry.module}.") and vars(c).get("kind", c.kind) not in KINDS
    }
    for kind, cls in kinds.items():
        module, _, name = kind.partition(":")
        assert module == entry.module and getattr(sys.modules[module], name) is cls


def subclasses(cls: type) -> set[type]:
    return {cls} | {s for c in cls.__subclasses__() for s in subclasses(c)}

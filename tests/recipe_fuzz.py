"""Mutated recipes, for the test and the benchmark that try them: whatever a recipe holds, the answer is a config or a
sentence."""

from __future__ import annotations

import copy
import random
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stillhouse.errors import UserError
from stillhouse.runs import recipe
from stillhouse.runs.execution import plan

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    7,
    0.5,
    -0.5,
    1e-9,
    1e12,
    float("nan"),
    float("inf"),
    10**9,
    2**70,
    "",
    " ",
    "x",
    "kd",
    "0",
    "1e-3",
    "null",
    "..",
    "../x",
    "/",
    "\u2028",
    "é" * 40,
    "timm:",
    "stillhouse:",
    "hf:",
    "file:",
    "file:x.py:Y",
    "text:",
    "imagefolder:",
    "torchvision:",
    "parquet:",
    "stage:1",
    "stage:99",
    ":",
    "a.b",
    "2024-13-45",
    [],
    {},
    [[]],
    [None],
    [1],
    ["x"],
    ["ce"],
    [1, 2, 3],
    {"": 1},
    {"x": {}},
    {"name": "x"},
    {"name": None},
    {"model": 1},
    {1: 2},
    {None: None},
    [{}],
    [{"name": "ce", "weight": "x"}],
    {"name": "kd", "weight": {"kind": "linear"}},
]
TEXTS = [
    "&a [*a]",
    "*b",
    "!!int y",
    "!!python/object:os.system x",
    "!!set {a}",
    "!!timestamp x",
    "? [a, b]",
    "<<: 3",
    "{",
    "]",
    "'",
    '"\\0"',
    '"\\ud800"',
    "- ",
    "\t",
    "%YAML 9.9",
    "---",
    "...",
    "@",
    "`",
    "!!binary x",
    "0o9",
    "1:60:99",
    ": :",
]


def mutated(text: str, draw: random.Random) -> str:
    """The recipe with one to three faults, in its tree or in its text."""
    tree = yaml.safe_load(text)
    if draw.random() < 0.75:
        for _ in range(draw.randint(1, 3)):
            _change(tree, draw)
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    lines = text.splitlines()
    for _ in range(draw.randint(1, 2)):
        at = draw.randrange(len(lines))
        line, how = lines[at], draw.randrange(6)
        if how == 0:
            lines[at] = line[:-1] if draw.random() < 0.5 else " " + line
        elif how == 1:
            lines.insert(at, line)
        elif how == 2:
            del lines[at]
            lines = lines or [""]
        elif how == 3:
            lines[at] = line.partition(":")[0] + ": " + draw.choice(TEXTS)
        elif how == 4:
            place = draw.randrange(len(line) + 1)
            lines[at] = line[:place] + draw.choice("{}[]:,&*#?|-<>=!%@\\'\"\t\x07é ") + line[place + 1 :]
        else:
            lines[at] = line + draw.choice(TEXTS)
    return "\n".join(lines)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (owner, key) of a tree."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _change(tree: Any, draw: random.Random) -> None:
    places = list(_places(tree))
    if not places:
        return
    owner, key = draw.choice(places)
    how = draw.randrange(7)
    if how <= 2:
        owner[key] = copy.deepcopy(draw.choice(VALUES))
    elif how == 3:
        del owner[key]
    elif how == 4 and isinstance(owner, dict) and isinstance(key, str):
        place = draw.randrange(len(key) + 1)
        owner[key[:place] + draw.choice("aex._") + key[place + 1 :]] = owner.pop(key)
    elif how == 5:
        other, name = draw.choice(places)
        owner[key] = (
            copy.deepcopy(other.get(name) if isinstance(other, dict) else other[name % max(len(other), 1)])
            if other
            else None
        )
    else:
        owner[key] = [owner[key]] if draw.random() < 0.5 else {"name": owner[key]}


@dataclass
class Answer:
    """What became of a mutated recipe: `fault` is a traceback, None where it was a config, a plan or a sentence."""

    text: str
    variant: str | None
    said: str | None
    fault: str | None


def tried(source: Path, seed: int, folder: Path, planned: bool = True) -> Answer:
    """A mutated copy of a recipe, read (and planned) as `stillhouse run --dry-run` does."""
    draw = random.Random(f"{source.name} {seed}")
    text = mutated(source.read_text(), draw)
    path = folder / source.name
    path.write_text(text, encoding="utf-8")
    variant = draw.choice(["smoke", "smoke", None])
    try:
        config = recipe.load(path, variant)
        recipe.dump(config)
        if planned:
            plan(config)
        return Answer(text, variant, None, None)
    except UserError as error:
        return Answer(text, variant, str(error), None)
    except Exception:
        return Answer(text, variant, None, traceback.format_exc())

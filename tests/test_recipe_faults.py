"""Whatever a recipe file holds, the answer is a config or a sentence, within a second; names in it stay in their
folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_fuzz import tried

from stillhouse.config.reading import parse_sets
from stillhouse.errors import UserError
from stillhouse.runs import recipe
from stillhouse.runs.bench import entries

ROOT = Path(__file__).parents[1]
GOOD = "data: {name: digits}\nstudent: stillhouse:mlp\nobjectives: [ce]\ntrain: {epochs: 1}\n"


@pytest.mark.parametrize("first", range(0, 100, 25))
def test_mutated_recipes_are_answered_by_a_config_or_a_sentence(first: int, tmp_path: Path) -> None:
    sources = sorted((ROOT / "recipes").rglob("*.yaml"))
    for number in range(first, first + 25):
        answer = tried(sources[number % len(sources)], number, tmp_path, planned=False)
        assert answer.fault is None, f"mutation {number}:\n{answer.text}\n{answer.fault}"


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join(['*' + before] * 9)}]\n" for before, after in zip("abcdefgh", "bcdefghi")
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{after}: &{after} {{<<: [{', '.join(['*' + before] * 9)}]}}\n" for before, after in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [*a]\n", "line 1, column 4: an anchor that holds itself"),
        ("a: &a {b: {c: *a}}\n", "an anchor that holds itself"),
        (LAUGHS, "more than 20,000 values, with those behind its anchors"),
        (MERGES, "more than 20,000 values, with those behind its anchors"),
        ("a: " + "[" * 5000, "more than 40 mappings and lists inside each other"),
        ("a: " + "{a: " * 300 + "1" + "}" * 300, "more than 40 mappings and lists inside each other"),
        ("\n".join(" " * i + f"a{i}:" for i in range(200)), "more than 40 mappings and lists inside each other"),
        ("a: 1\n" * 2_500_000, "is no recipe: it has 12,500,000 bytes"),
        (GOOD + "# " + "x" * 200_000, "is too long for a recipe: 200,"),
        (GOOD + "seed: !!int y\n", "line 5, column 7: 'y' does not fit its tag '!!int'"),
        (GOOD + "seed: !!float y\n", "does not fit its tag '!!float'"),
        (GOOD + "seed: !!bool 3\n", "does not fit its tag '!!bool'"),
        (GOOD + "seed: !!int ''\n", "does not fit its tag '!!int'"),
        (GOOD + "seed: !!python/object/apply:os.getcwd []\n", "has no meaning in a recipe"),
        (GOOD + "seed: !!set {a}\n", "the tag '!!set' has no meaning in a recipe"),
        (GOOD + "seed: !mine 3\n", "the tag '!mine' has no meaning in a recipe"),
        (GOOD + f"seed: {10**40}\n", "a whole number of more than 63 bits"),
        (GOOD + 'name: "a\\0b"\n', "characters that no file name and no file can hold"),
        (GOOD + 'name: "\\ud800"\n', "characters that no file name and no file can hold"),
        (GOOD + "? [a, b]\n: 1\n", "unhashable key"),
        (GOOD + "<<: 3\n", "expected a mapping or list of mappings for merging"),
        (GOOD + "name: \x07\n", "not valid YAML"),
        (GOOD + "train2: *nowhere\n", "undefined alias"),
        (GOOD + "---\na: 1\n", "expected a single document"),
        (GOOD + "variants: [a, b]\n", "'variants' must be a mapping of names to keys"),
        (GOOD + "variants: fast\n", "'variants' must be a mapping of names to keys"),
        (GOOD + "variants: {fast: [1]}\n", "'variants.fast' must be a mapping of keys to values; given: [1]"),
        (GOOD + "variants: {fast: 3}\n", "'variants.fast' must be a mapping of keys to values; given: 3"),
        (GOOD + "variants: {3: {seed: 1}}\n", "a name in 'variants' must be text; given: 3"),
        (GOOD + "variants: {fast: {1: 2}}\n", "a key in 'variants.fast' must be text; given: 1"),
        (GOOD + "groups: [a]\n", "'groups' must be a mapping of names"),
        (GOOD + "groups: {student: 3}\n", "'groups.student' must be a mapping"),
        (GOOD + "claims: {says: x}\n", "'claims' must be a list"),
        (GOOD + "train.epochs: 3\n", "unknown key 'train.epochs'"),
        (GOOD + "3: 4\n", "3"),
        (GOOD.replace("epochs: 1", "epochs: .inf"), "'train.epochs' must be a"),
        (GOOD.replace("epochs: 1", "optimizer: {lr: .inf}"), "'train.optimizer.lr' must be a finite number"),
        (GOOD.replace("epochs: 1", "optimizer: {lr: .nan}"), "'train.optimizer.lr' must be"),
        (GOOD + "seed: -1\n", "'seed' must be at least 0"),
        (GOOD + "seed: 2024-13-45\n", "'seed' must be a whole number; given: '2024-13-45'"),
    ],
)
def test_a_hostile_file_is_one_sentence_within_a_second(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode())
    with pytest.raises(UserError) as told:
        recipe.load(path)
    assert says in str(told.value) and str(told.value).startswith(str(path)) and "\n" not in str(told.value)
    assert len(str(told.value)) < 400 + len(str(path))


def test_files_in_other_encodings_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(UserError, match="is not text in UTF-8"):
        recipe.load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())  # a byte-order mark is none of its keys
    assert recipe.load(tmp_path / "b.yaml").name == "b"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("seed=!!int y", "--set seed: the value '!!int y' is not valid YAML"),
        ("seed=&a [*a]", "an anchor that holds itself"),
        ("seed=" + "[" * 5000, "more than 40 mappings and lists inside each other"),
        ("seed=[", "is not valid YAML"),
        ("seed=" + "1" * 50, "whole number of more than 63 bits"),
        ("=3", "--set takes KEY=VALUE"),
        (" =3", "--set takes KEY=VALUE"),
        ("a..b=3", "a key is names and numbers with dots between them"),
        (".=3", "a key is names and numbers with dots between them"),
        ("objectives.x=3", "is a list of 1, so 'x' must be a number from 0 to 0"),
        ("objectives.²=3", "is a list of 1, so '²' must be a number"),
        ("objectives.--1=3", "is a list of 1, so '--1' must be a number"),
        ("objectives.7=3", "is a list of 1, so '7' must be a number"),
        ("train.epochs.x=3", "'train.epochs' holds a value, not keys"),
        ("a." * 100 + "b=3", "a key is names and numbers with dots between them"),
    ],
)
def test_a_wrong_override_is_one_sentence(given: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(GOOD)
    with pytest.raises(UserError) as told:
        recipe.load(tmp_path / "recipe.yaml", None, [given])
    assert says in str(told.value) and "\n" not in str(told.value) and len(str(told.value)) < 400


def test_a_date_and_a_time_are_text() -> None:
    assert parse_sets(["name=2024-01-01"]) == {"name": "2024-01-01"}


@pytest.mark.parametrize("name", ["..", "../../x", "/tmp/x", "a/b", "a\\b", "", " ", "x" * 500, "a\nb"])
def test_names_stay_in_their_folders(name: str, tmp_path: Path) -> None:
    import json

    for text in (
        GOOD + f"name: {json.dumps(name)}\n",
        GOOD + f"variants: {{{json.dumps(name)}: {{seed: 1}}}}\n",
        GOOD + f"groups: {{student: {{{json.dumps(name)}: stillhouse:mlp}}}}\n",
    ):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(UserError, match=r"cannot name a folder|a name has 1 to 120 characters"):
            recipe.load(tmp_path / "recipe.yaml")
            entries([tmp_path / "recipe.yaml"])


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("hf:config:gpt2", {"task": "causal", "n_head": 0.0}),
        ("hf:config:resnet", {"depths": [[2]]}),
        ("hf:config:mobilenet_v1", {"depth_multiplier": -1}),
        ("torchvision:vit_b_16", {"image_size": 7}),
        ("stillhouse:mlp", {"widths": [-3]}),
    ],
)
def test_options_that_a_library_refuses_are_a_sentence(model: str, options: dict) -> None:
    from stillhouse.config.specs import ModelSpec
    from stillhouse.models import build

    with pytest.raises(UserError, match=model) as told:
        build(ModelSpec(model=model, options=options), 3, (3, 32, 32))
    assert "\n" not in str(told.value)

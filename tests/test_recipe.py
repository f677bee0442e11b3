"""Recipes: shorthand, overrides, variants, and errors that name the key and the nearest valid one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.errors import UserError
from stillhouse.runs import recipe
from stillhouse.runs.schema import recipe_schema

GOOD = """
data: digits
teacher: {model: stillhouse:resnet8, train: {epochs: 1}}
student: stillhouse:mlp
objectives: [ce, {name: kd, temperature: 2, weight: 0.9}]
train: {epochs: 2, optimizer: {name: adamw, lr: 1e-3, betas: [0.9, 0.95]}}
variants:
  alone: {objectives: [ce]}
  long: {train.epochs: 30, objectives.1.temperature: 8}
"""


def fails(path: Path, *parts: str, variant: str | None = None, sets: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        recipe.load(path, variant, sets)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    return str(caught.value)


def test_shorthand_stands_for_its_mapping(recipe_file):
    config = recipe.load(recipe_file(GOOD))
    assert config.data.name == "digits" and config.student.model == "stillhouse:mlp"
    assert [o.name for o in config.objectives] == ["ce", "kd"]
    assert config.train.optimizer.lr == 1e-3, "YAML reads 1e-3 as text; it must become a number"
    assert config.train.optimizer.arguments()["betas"] == [0.9, 0.95]


def test_published_weights_and_options_are_filled_in(recipe_file):
    config = recipe.load(recipe_file(GOOD))
    assert config.objectives[0].weight == 1.0
    assert config.objectives[0].arguments["label_smoothing"] == 0.0


def test_a_variant_and_then_set_override_the_file(recipe_file):
    config = recipe.load(recipe_file(GOOD), "long", ["train.epochs=7", "student.options.widths=[8, 8]"])
    assert config.train.epochs == 7 and config.objectives[1].arguments["temperature"] == 8
    assert config.student.options == {"widths": [8, 8]}
    assert config.name == "recipe-long"


def test_a_dumped_recipe_loads_to_the_same_config(recipe_file, tmp_path: Path):
    config = recipe.load(recipe_file(GOOD))
    again = tmp_path / "again.yaml"
    again.write_text(recipe.dump(config))
    assert recipe.dump(recipe.load(again)) == recipe.dump(config)


@pytest.mark.parametrize(
    ("sets", "parts"),
    [
        (["train.epohcs=3"], ["'train.epohcs'", "'train.epochs'"]),
        (["objectives.1.temprature=3"], ["'objectives.1.temprature'", "'objectives.1.temperature'"]),
        (["train.optimizer.beta=[0.9, 0.9]"], ["'train.optimizer.beta'", "'train.optimizer.betas'"]),
        (["train.optimizer={name: adamm}"], ["train.optimizer.name", "'adam"]),
        (["train.epochs=many"], ["'train.epochs' must be a whole number; given: 'many'"]),
        (["train.epochs=0"], ["'train.epochs' must be at least 1; given: 0"]),
        (["objectives.1.temperature=hot"], ["'objectives.1.temperature' must be a number; given: 'hot'"]),
        (["teacher.ensemble=[]", "teacher.model=null"], ["teacher", "exactly one of"]),
        (["train.patience=3"], ["train", "patience needs `best`"]),
        (["objectives.0=kdd"], ["objectives.0", "'kdd'", "'kd'"]),
        (["method=distilation"], ["'distilation'", "'distillation'"]),
        (["method=kd"], ["'kd' is an objective"]),
        (["objectives.5.name=kd"], ["list of 2"]),
        (["data.holdout=1.5"], ["'data.holdout' must be below 1"]),
    ],
)
def test_a_mistake_is_named_with_its_path(recipe_file, sets: list[str], parts: list[str]):
    fails(recipe_file(GOOD), *parts, sets=tuple(sets))


def test_a_missing_file_and_broken_yaml_are_one_sentence(recipe_file, tmp_path: Path):
    path = recipe_file(GOOD)
    fails(tmp_path / "recipes.yaml", "recipe.yaml")
    assert "line 2" in fails(recipe_file("data: digits\nstudent: {model: [", "broken.yaml"), "not valid YAML")
    fails(recipe_file("- a\n- b\n", "list.yaml"), "mapping")
    fails(recipe_file("", "empty.yaml"), "nothing")
    fails(path, "no variant 'lnog'", "'long'", variant="lnog")
    fails(path, "KEY=VALUE", sets=("train.epochs",))


def test_the_schema_knows_every_objective_and_its_options():
    schema = recipe_schema()
    shapes = {
        s["properties"]["name"]["const"]: s for s in schema["$defs"]["ObjectiveSpec"]["anyOf"] if "properties" in s
    }
    assert "temperature" in shapes["kd"]["properties"] and "weight" in shapes["kd"]["properties"]
    assert {"ce", "kd", "nkd", "uskd", "pld", "nd"} <= set(shapes)
    assert shapes["kd"]["additionalProperties"] is False
    json.dumps(schema)

"""Stages on disk: what names a result, and that equal content gives equal names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from stillhouse.config.specs import MethodConfig, ModelSpec, TrainSpec
from stillhouse.distillation.teachers import FrozenTeacher, PastSelf
from stillhouse.errors import UserError
from stillhouse.runs.method import Stage
from stillhouse.runs.run import Run
from stillhouse.runs.stages import as_json, cached


def test_json_data_keeps_its_name(tmp_path: Path) -> None:
    uses = {"seed": 0, "widths": (8, 4), "data": "abc", "train": TrainSpec(epochs=3).identity()}
    key = json.dumps({"name": "x", "format": 1, **uses}, sort_keys=True)
    cached(tmp_path, "x", lambda folder: 1, uses)
    assert (tmp_path / f"x-{hashlib.blake2b(key.encode(), digest_size=10).hexdigest()}").is_dir()


def test_equal_objects_share_a_result_and_others_do_not(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("a")
    calls = []

    def compute(network: nn.Module, **changed: object) -> object:
        uses = {
            "teacher": FrozenTeacher(network),
            "network": network,
            "rows": torch.arange(3),
            "model": ModelSpec(model="stillhouse:mlp"),
            "train": TrainSpec(),
            "file": file,
            **changed,
        }
        return cached(tmp_path / "stages", "x", lambda folder: calls.append(1) or len(calls), uses)

    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    copy = nn.Linear(3, 2)
    copy.load_state_dict(network.state_dict())
    assert compute(network) == compute(copy) == compute(network, train=TrainSpec(log_every=7)) == 1
    changes = [{"rows": torch.arange(3).float()}, {"train": TrainSpec(epochs=2)}, {"model": ModelSpec(model="timm:x")}]
    assert [compute(network, **change) for change in changes] == [2, 3, 4]
    file.write_text("b")
    assert compute(network) == 5 and compute(nn.Linear(3, 2)) == 6


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, PastSelf(), Path("/tmp"), len], ids=lambda value: type(value).__name__
)
def test_what_has_no_content_hash_is_refused_with_its_place(value: object) -> None:
    with pytest.raises(UserError, match=r"`uses\.teachers\.1`"):
        as_json({"teachers": [0, value]})


def test_a_stage_of_the_plan_names_its_result(tmp_path: Path) -> None:
    stage = Stage("teacher", "train it")
    assert str(stage.filled(steps=3)) == "teacher" and stage.steps is None
    run = Run(tmp_path, MethodConfig.model_construct(seed=0))
    run.planned = {"teacher"}
    assert run.stage(stage, lambda: {"a": 1}, {}, shared=False) == {"a": 1}
    with pytest.raises(UserError, match="not in the method's plan"):
        run.stage(Stage("student", "train it"), lambda: 0, {}, shared=False)

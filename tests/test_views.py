"""Further views of a sample: drawn by (seed, epoch, index, name), and read by a teacher that asks for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stillhouse.config.specs import DataSpec, MethodConfig, ModelSpec, TeacherSpec
from stillhouse.data import BatchKey, Loader, load
from stillhouse.distillation.own_input import OwnInput, ViewInput
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.runs.run import Run

CROP = {"RandomCrop": {"size": 8, "padding": 2}}
VIEWS = {"strong": [CROP, {"RandomErasing": {"p": 1.0}}], "weak": [CROP], "weaker": [CROP]}


def batch(numbers=(3, 1, 4), epoch=0, seed=0, start=0, **keys):
    dataset = load(DataSpec(name="digits", **{"views": VIEWS, **keys})).dataset("train", train=True)
    return dataset.batch(BatchKey(epoch, np.array(numbers), start, len(numbers)), seed)


def test_a_view_is_a_function_of_seed_epoch_index_and_name():
    whole = batch()
    assert set(whole["views"]) == set(VIEWS)
    assert all(x.shape == whole["input"].shape for x in whole["views"].values())
    assert torch.equal(
        batch((4, 9), views={"strong": VIEWS["strong"]})["views"]["strong"][0], whole["views"]["strong"][2]
    )
    assert torch.equal(batch(start=1)["views"]["weak"], whole["views"]["weak"][1:])
    assert not torch.equal(whole["views"]["weak"], whole["views"]["weaker"])
    assert not torch.equal(whole["views"]["weak"], batch(epoch=1)["views"]["weak"])
    assert not torch.equal(whole["views"]["weak"], batch(seed=1)["views"]["weak"])


def test_views_leave_the_input_as_it_is_and_evaluation_has_none():
    assert torch.equal(batch()["input"], batch(views=None)["input"]) and "views" not in batch(views=None)
    assert "views" not in next(iter(Loader(load(DataSpec(name="digits", views=VIEWS)).dataset("test", train=False), 4)))
    assert load(DataSpec(name="digits", views=VIEWS)).fingerprint == load(DataSpec(name="digits")).fingerprint


def test_a_teacher_reads_its_view():
    one, net = batch(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    own = OwnInput(((0.3055,), (0.3762,)), ((0.5,), (0.5,)))
    frozen = FrozenTeacher(net, prepare=ViewInput("strong", own))
    expected = net(own({"input": one["views"]["strong"]})["input"])
    assert torch.equal(frozen(one).logits, expected)
    without = {k: v for k, v in one.items() if k != "views"}
    assert torch.equal(frozen(without).logits, net(own(without)["input"]))
    assert frozen.fingerprint() != FrozenTeacher(net, prepare=own).fingerprint()
    with pytest.raises(UserError, match=r"no view 'strnog' in this batch.*did you mean 'strong'"):
        FrozenTeacher(net, prepare=ViewInput("strnog"))(one)


def test_a_recipes_teacher_reads_one_of_the_datas_views(tmp_path: Path):
    run, data = Run(tmp_path, MethodConfig()), DataSpec(name="digits", views=VIEWS)
    weights = tmp_path / "teacher.pt"
    torch.save(run.model(ModelSpec(model="stillhouse:mlp"), data).state_dict(), weights)
    found = run.teacher("teacher", TeacherSpec(model="stillhouse:mlp", checkpoint=str(weights), view="strong"), data)
    one = batch()
    assert torch.equal(found(one).logits, found.model(one["views"]["strong"]))
    with pytest.raises(UserError, match=r"no view 'storng' in data.views; did you mean 'strong'"):
        run.teacher("teacher", TeacherSpec(model="stillhouse:mlp", checkpoint=str(weights), view="storng"), data)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mixup": 0.2}, "data.views hold one sample each"),
        ({"views": {"strong": ["RandomCrpo"]}}, r"data.views.strong.0: .*did you mean 'RandomCrop'"),
        ({"name": "text:shakespeare"}, "data.views does nothing"),
    ],
)
def test_views_that_cannot_be_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        load(DataSpec(**{"name": "digits", "views": VIEWS, **keys})).dataset("train", train=True)


def test_a_stored_or_remembered_teacher_has_no_view():
    for keys in ({"past_self": True}, {"model": "stillhouse:mlp", "store": {}}):
        with pytest.raises(ValueError, match=r"view|store"):
            TeacherSpec(view="strong", **keys)

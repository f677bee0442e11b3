"""DHO: which head learns from what, the mixture and its search, a run of labelled and unlabelled images, products."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Progress
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.methods.image_text.dho import (
    ALPHAS,
    BETAS,
    DualHead,
    DualHeadStudent,
    DualHeadTraining,
    distillation_loss,
    mixture,
    search_mixture,
    supervised_loss,
)
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product

SHADES = {"dark": 40, "middle": 120, "bright": 210}


def student(single: bool = False, **options: Any) -> DualHead:
    torch.manual_seed(0)
    return DualHead(nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU()), 6, 3, single, **options)


def batch(labelled: int = 5, unlabelled: int = 7, seed: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(labelled + unlabelled, 3, 2, 2, generator=draw)
    label = torch.randint(0, 3, (labelled,), generator=draw)
    return {"input": x[:labelled], "label": label, "unlabelled": {"input": x[labelled:]}}


def training(net: DualHead, **options: Any) -> DualHeadTraining:
    torch.manual_seed(1)
    module = DualHeadTraining(net, FrozenTeacher(nn.Sequential(nn.Flatten(), nn.Linear(12, 3))), **options)
    module.build(batch())
    return module.train()


def test_each_head_learns_from_its_own_source_and_the_backbone_from_both():
    net = student()
    module, given_batch = training(net), batch()
    before = module(given_batch, Progress())
    for term, own, other in (("ce", net.ce, net.kd), ("kd", net.kd, net.ce)):
        net.zero_grad()
        module(given_batch, Progress())[term].backward()
        assert own is not None and own.weight.grad is not None and own.weight.grad.abs().sum() > 0
        assert other is not None and other.weight.grad is None
        assert net.features[1].weight.grad.abs().sum() > 0
    twice = training(student(), ce_weight=1.0, kd_weight=1.0)(given_batch, Progress())
    torch.testing.assert_close(twice["loss"], 2 * before["loss"])


def test_labelled_and_unlabelled_batches_weigh_the_same_whatever_their_sizes():
    module = training(student())
    whole = batch(4, 4)
    same = {**whole, "unlabelled": {"input": whole["input"]}}
    more = {**whole, "unlabelled": {"input": whole["input"].repeat(3, 1, 1, 1)}}
    torch.testing.assert_close(module(same, Progress())["kd"], module(more, Progress())["kd"])
    order = torch.randperm(4)
    turned = {**whole, "unlabelled": {"input": whole["unlabelled"]["input"][order]}}
    torch.testing.assert_close(module(whole, Progress())["kd"], module(turned, Progress())["kd"])


def test_a_batch_without_one_of_the_two_kinds_has_finite_losses():
    module = training(student())
    none, empty = batch(4, 0), batch(0, 4)
    for terms in (module(none, Progress()), DualHeadTraining.forward(module.eval(), empty, Progress())):
        assert terms["ce"].isfinite() and terms["kd"].isfinite() | (len(empty["label"]) == 0)
    assert supervised_loss(torch.randn(0, 3), torch.zeros(0, dtype=torch.long)) == 0
    with pytest.raises(UserError, match=r"label"):
        supervised_loss(torch.randn(2, 3), torch.tensor([0, 3]))


def test_the_teachers_loss_is_zero_with_zero_gradient_where_the_student_agrees():
    logits = torch.randn(5, 4, requires_grad=True)
    loss = distillation_loss(logits, (logits.detach() / 2).log_softmax(-1), 2.0)
    loss.backward()
    assert loss.abs() < 1e-6 and logits.grad is not None and logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize(("seed", "classes"), [(0, 2), (1, 3), (2, 6), (3, 10)])
def test_the_searched_mixture_is_never_worse_than_a_head_alone(seed: int, classes: int):
    draw = torch.Generator().manual_seed(seed)
    ce, kd = torch.randn(2, 20, classes, generator=draw) * 3
    labels = torch.randint(0, classes, (20,), generator=draw)
    accuracy, alpha, beta = search_mixture(ce, kd, labels)
    alone = [float((x.argmax(-1) == labels).double().mean()) for x in (ce, kd)]
    assert accuracy >= max(alone)
    grid = [(b, a) for b in BETAS for a in ALPHAS]
    equal = [g for g in grid if float((mixture(ce, kd, g[1], g[0]).argmax(-1) == labels).double().mean()) == accuracy]
    assert (beta, alpha) == equal[0]
    for b in BETAS:
        assert torch.equal(mixture(ce, kd, 1.0, b).argmax(-1), ce.argmax(-1))
        assert torch.equal(mixture(ce, kd, 0.0, b).argmax(-1), kd.argmax(-1))


def test_a_student_that_embeds_images_begins_as_its_own_class_vectors():
    net, vectors, h = student(unit_scale=100.0), torch.randn(3, 6), torch.randn(4, 6)
    net.start_from(vectors)
    ce, kd = net.logits(h)
    torch.testing.assert_close(ce, h @ vectors.T)
    torch.testing.assert_close(kd, 100 * F.normalize(h, dim=-1) @ vectors.T)


def test_the_gradient_cosine_is_of_the_labelled_features():
    for single in (False, True):
        net = student(single)
        module, given_batch = training(net), batch()
        found = module(given_batch, Progress())["gradient_cosine"]
        h = net.features(given_batch["input"]).detach().requires_grad_()
        ce, kd = net.logits(h)
        target = module.teachers["teacher"](given_batch).log_probs(2.0)
        losses = F.cross_entropy(ce, given_batch["label"]), distillation_loss(kd, target)
        grads = [torch.autograd.grad(loss, h, retain_graph=True)[0].flatten() for loss in losses]
        torch.testing.assert_close(found, F.cosine_similarity(*grads, dim=0))


# ---- a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, draw = tmp_path_factory.mktemp("shades"), np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 6)):
        for name, shade in SHADES.items():
            (base / split / name).mkdir(parents=True)
            for i in range(count):
                image = np.clip(shade + draw.integers(-30, 30, (8, 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(image).save(base / split / name / f"{i}.png")
    return base


def raw(folder: Path, **keys: Any) -> dict[str, Any]:
    data = {"name": f"imagefolder:{folder}", "image_size": 8, "augment": "plain"}
    adam = {"epochs": 6, "batch_size": 6, "eval_every": 2, "optimizer": {"name": "adamw", "lr": 1e-2}}
    net = {"model": "stillhouse:mlp", "options": {"widths": [16]}}
    return {
        "method": "dho",
        "data": {**data, "size": 24, "val": 0.5, "unlabelled": {"batch_size": 12}},
        "teacher": {**net, "data": data, "train": {**adam, "batch_size": 12}},
        "student": net,
        "train": {**adam, "best": "accuracy"},
        "evaluate": ["quality"],
        **keys,
    }


def test_a_run_leaves_a_mixture_that_loads_and_is_searched_on_validation_data(folder: Path, tmp_path: Path):
    figures = execute(recipe.validate(raw(folder)), tmp_path / "run", cpu=True)
    assert figures["accuracy"] > 0.6, "a third is chance"
    product = load_product(tmp_path / "run")
    assert isinstance(product, DualHeadStudent)
    assert float(product.module.alpha) == pytest.approx(figures["alpha"])
    image = np.full((8, 8, 3), 205, np.uint8)
    found = product.predict([torch.from_numpy(image).permute(2, 0, 1)])[0]
    assert found["label"] in SHADES and sum(found["probs"].values()) == pytest.approx(1, abs=1e-3)
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert "gradient_cosine" in json.dumps(record)


def test_a_teacher_asked_once_gives_what_it_gives_at_every_step(folder: Path, tmp_path: Path):
    plain = {**raw(folder), "train": {**raw(folder)["train"], "epochs": 2}}
    often = execute(recipe.validate(plain), tmp_path / "often", cpu=True)
    once = execute(recipe.validate({**plain, "teacher_once": True}), tmp_path / "once", cpu=True)
    for name in ("accuracy", "gradient_cosine", "nll"):
        assert once[name] == pytest.approx(often[name], rel=1e-4)
    with pytest.raises(UserError, match=r"teacher_once needs data\.augment: plain"):
        recipe.validate({**plain, "data": {**plain["data"], "augment": "standard"}, "teacher_once": True})


def test_baselines_use_one_source_alone(folder: Path, tmp_path: Path):
    labels = execute(recipe.validate(raw(folder, kd_weight=0)), tmp_path / "labels", cpu=True)
    assert labels["alpha"] == 1.0 and "gradient_cosine" not in labels
    teacher = execute(recipe.validate(raw(folder, ce_weight=0)), tmp_path / "teacher", cpu=True)
    assert teacher["alpha"] == 0.0
    assert "alpha" not in execute(recipe.validate(raw(folder, heads="single")), tmp_path / "single", cpu=True)


def test_a_student_of_images_and_texts_needs_no_classifier_of_its_own(folder: Path, tmp_path: Path):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = {"projection_dim": 8, "vision_config": {**small, "patch_size": 4}, "text_config": small}
    captions = {"name": f"captions:imagefolder:{folder}", "image_size": 8, "options": {"tokenizer": "bytes"}}
    adam = {"epochs": 2, "batch_size": 12, "eval_every": 0, "optimizer": {"name": "adamw", "lr": 1e-2}}
    embedder = {"model": "hf:config:clip", "options": clip, "data": captions, "train": adam}
    figures = execute(recipe.validate(raw(folder, student=None, embedder=embedder)), tmp_path / "run", cpu=True)
    product = load_product(tmp_path / "run")
    assert product.module(torch.zeros(2, 3, 8, 8)).shape == (2, 3) and 0 <= figures["accuracy"] <= 1
    assert not any("text" in name for name in product.module.state_dict())


def test_a_recipe_without_unlabelled_data_or_with_two_students_is_refused(folder: Path, tmp_path: Path):
    data = {k: v for k, v in raw(folder)["data"].items() if k != "unlabelled"}
    with pytest.raises(UserError, match=r"data\.unlabelled"):
        execute(recipe.validate(raw(folder, data=data)), tmp_path / "run", cpu=True)
    with pytest.raises(UserError, match="exactly one of student and embedder"):
        recipe.validate(raw(folder, embedder={"model": "hf:config:clip", "pretrained": True}))

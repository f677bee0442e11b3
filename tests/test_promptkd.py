"""PromptKD: what learns and what keeps its bits, prompts of every depth, the adapted teacher, a run without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from stillhouse.config.specs import DataSpec
from stillhouse.data import load
from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.methods.image_text.promptkd import (
    AdaptTraining,
    PromptedStudent,
    PromptedTeacher,
    PromptTraining,
    prompt_distillation_loss,
)
from stillhouse.models.clip import Clip
from stillhouse.models.image_text import prompt_ids
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product

SHAPE = (3, 16, 16)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}


def clip(seed: int = 0, vocabulary: int = 300) -> Clip:
    torch.manual_seed(seed)
    text = {"width": 16, "layers": 3, "heads": 2}
    return Clip({**text, "patch": 8}, text, 8, vocabulary, 24, input_shape=SHAPE).eval()


def unit(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(5))


def student(depth: int = 2, tokens: int = 2, project: bool = True, dim: int = 12) -> PromptedStudent:
    torch.manual_seed(1)
    return PromptedStudent(clip().image, unit(3, dim), 20.0, depth, tokens, project)


class Answers:
    """A teacher with given logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, batch: Any) -> Any:
        from stillhouse.signals import Signals

        return Signals(logits=self.logits)


# ---- the loss and the student --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (4, 3), (3, 9)])
def test_both_reductions_are_one_loss_up_to_the_number_of_classes(rows: int, classes: int):
    student, teacher = torch.randn(rows, classes), torch.randn(rows, classes)
    numel = prompt_distillation_loss(student, teacher, 1000.0)
    torch.testing.assert_close(numel, prompt_distillation_loss(student, teacher, 1000.0 / classes, 1.0, "batchmean"))
    assert prompt_distillation_loss(teacher, teacher).abs() < 1e-4


def test_prompts_and_projector_learn_and_the_clip_keeps_its_bits():
    net = student()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    module = PromptTraining(net, Answers(5 * torch.randn(4, 3)), 100.0).train()
    optimizer = torch.optim.SGD(module.param_groups(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    losses = []
    for _ in range(30):
        loss = module({"input": images()}, Progress())["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = net.state_dict()
    changed = {k.partition(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"prompts", "project"}


@pytest.mark.parametrize(("depth", "tokens"), [(0, 2), (1, 1), (3, 2), (2, 0)])
def test_every_depth_of_prompts_has_as_many_parameters_and_none_is_the_plain_network(depth: int, tokens: int):
    net = student(depth, tokens, project=False, dim=8).eval()
    assert len(net.prompts) == (depth if tokens else 0) and all(p.shape == (tokens, 16) for p in net.prompts)
    plain = F.normalize(clip().image(images()), dim=-1)
    assert torch.equal(net.embed(images()), plain) == (not depth or not tokens)
    torch.testing.assert_close(net.embed(images()).norm(dim=1), torch.ones(4))


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="depth is 4, but the student's image half has 3"):
        student(4)
    with pytest.raises(UserError, match="without a projector the student embeds into 8"):
        student(project=False)
    raw = {"method": "promptkd", "data": "cifar10", "teacher": {"model": "hf:config:clip", "pretrained": True}}
    raw["student"] = raw["teacher"]
    with pytest.raises(UserError, match="nothing to learn"):
        recipe.validate({**raw, "prompts": 0, "projector": False})
    with pytest.raises(UserError, match="source: self needs"):
        recipe.validate({**raw, "source": "self"})


# ---- the adapted teacher -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, draw = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for name, colour in COLOURS.items():
            (base / split / name).mkdir(parents=True)
            for i in range(count):
                image = np.clip(np.array(colour) + draw.integers(-30, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(image).save(base / split / name / f"{i}.png")
    return base


def captions(folder: Path) -> dict[str, Any]:
    options = {"tokenizer": "bytes", "templates": ["{}"], "context": 24}
    return {"name": f"captions:imagefolder:{folder}", "image_size": 16, "augment": "plain", "options": options}


def test_prompts_stand_between_the_begin_mark_and_the_name(folder: Path):
    task = load(DataSpec.model_validate(captions(folder))).task
    ids, ends = prompt_ids(task.tokenizer, ["red", "dark_green"], 4, task.context)
    tokens = task.tokenizer
    assert (ids[:, 0] == tokens.bos_token_id).all() and (ids[torch.arange(2), ends] == tokens.eos_token_id).all()
    assert [tokens.decode(row[5:end]) for row, end in zip(ids, ends)] == ["red.", "dark green."]
    with pytest.raises(UserError, match="more than the 24"):
        prompt_ids(task.tokenizer, ["a" * 30], 4, task.context)


def test_the_teachers_prompts_are_a_gaussian_mean_over_epochs(folder: Path):
    task = load(DataSpec.model_validate(captions(folder))).task
    net = PromptedTeacher(clip(), task, ["red", "green"], 2, 2)
    module = AdaptTraining(net, task.class_vectors(net.clip, ["red", "green"]), mean=3.0, std=1.0)
    for epoch in range(1, 5):
        with torch.no_grad():
            for p in [*net.visual, *net.text]:
                p.fill_(float(epoch))
        module._take(epoch) if epoch < 4 else module.finish(4)
    weights = np.exp(-((np.arange(1, 5) - 3.0) ** 2) / 2)
    expected = float((weights * np.arange(1, 5)).sum() / weights.sum())
    assert all(torch.allclose(p, torch.tensor(expected)) for p in [*net.visual, *net.text])
    terms = module({"input": images(), "label": torch.tensor([0, 1, 0, 1])}, Progress())
    assert terms["loss"].isfinite() and set(terms) == {"loss", "ce", "text", "image", "scores"}


# ---- a run ---------------------------------------------------------------------------------------------------------


def test_a_run_without_labels_reports_base_and_new_and_leaves_a_classifier(folder: Path, tmp_path: Path):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = {"projection_dim": 8, "vision_config": {**small, "patch_size": 8}, "text_config": small}
    adam = {"epochs": 60, "batch_size": 12, "eval_every": 0, "optimizer": {"name": "adamw", "lr": 1e-2}}
    network = {"model": "hf:config:clip", "options": model, "data": captions(folder), "train": adam}
    raw = {
        "method": "promptkd",
        "data": {"name": f"imagefolder:{folder}", "image_size": 16, "augment": "plain"},
        "new": ["blue"],
        "teacher": network,
        "student": {**network, "train": {**adam, "epochs": 2}},
        "depth": 2,
        "prompts": 2,
        "train": {**adam, "epochs": 20},
        "evaluate": ["quality"],
    }
    figures = execute(recipe.validate(raw), tmp_path / "run", cpu=True)
    assert figures["accuracy"] > figures["accuracy_before"] + 0.3 and figures["accuracy_teacher"] > 0.5
    assert {"accuracy_base", "accuracy_new", "accuracy_harmonic", "accuracy_teacher", "accuracy_before"} <= set(figures)
    product = load_product(tmp_path / "run")
    assert not any("text" in k for k in product.module.state_dict())
    assert product.predict([torch.full((3, 16, 16), 128, dtype=torch.uint8)])[0]["label"] in COLOURS
    own = {"source": "self", "vectors": "student", "projector": False}
    execute(recipe.validate({**raw, **own, "train": {**adam, "epochs": 1}}), tmp_path / "self", cpu=True)
    adapt = {"shots": 4, "depth": 2, "tokens": 2, "train": {**adam, "epochs": 4, "batch_size": 4}}
    adapted = execute(recipe.validate({**raw, "adapt": adapt}), tmp_path / "adapted", cpu=True)
    assert adapted["accuracy_teacher"] != figures["accuracy_teacher"] or adapted["nll"] != figures["nll"]
    with pytest.raises(UserError, match=r"class in new.*'bleu'.*blue"):
        execute(recipe.validate({**raw, "new": ["bleu"]}), tmp_path / "wrong", cpu=True)

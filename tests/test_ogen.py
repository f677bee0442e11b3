"""OGEN: what carries gradient to the prompt, neighbours, the window of the past, a run with base and new classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.methods.image_text.ogen import (
    Classes,
    Generator,
    class_statistics,
    few_shots,
    local_mean,
    make_up,
    nearest_others,
    noisy_values,
    reconstruction,
    score_losses,
    window,
)
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "yellow": (210, 200, 40)}


def unit(rows: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def generator() -> Generator:
    torch.manual_seed(0)
    return Generator(8, 2, 0.0)


@pytest.mark.parametrize(("classes", "new", "k"), [(4, 3, 2), (2, 2, 3), (5, 0, 3)])
def test_only_queries_of_new_classes_and_classifiers_carry_gradient_to_the_prompt(classes: int, new: int, k: int):
    features, labels = unit(3 * classes, seed=1), torch.arange(3 * classes) % classes
    mean, std = class_statistics(features, labels, classes)
    stats = Classes(mean, std, nearest_others(mean, k))
    own_k = stats.nearest.shape[1]
    assert own_k == min(k, classes - 1)
    base, others = unit(classes, seed=2).requires_grad_(), unit(new, seed=3).requires_grad_()
    values = noisy_values(stats, labels, torch.rand(1, 8))
    made = make_up(generator(), features, labels, base, others, stats, values, own_k)
    for name in ("unknown", "known"):
        torch.testing.assert_close(getattr(made, name).norm(dim=1), torch.ones(len(getattr(made, name))))
    reconstruction(made, features, 8.0).backward(retain_graph=True)
    assert base.grad is None and others.grad is None
    terms = score_losses(made, features, labels, base, others, 10.0, own_k)
    assert ("new" in terms) == bool(new)
    sum(terms.values()).backward()
    assert base.grad is not None and base.grad.abs().sum() > 0
    assert not new or (others.grad is not None and others.grad.abs().sum() > 0)


def test_neighbours_never_hold_the_class_itself_and_one_class_has_none():
    near = nearest_others(unit(6), 5)
    assert all(i not in row for i, row in enumerate(near.tolist()))
    with pytest.raises(UserError, match="one base class"):
        nearest_others(unit(1), 3)


def test_with_one_key_the_attention_depends_on_the_value_alone():
    net, value = generator().eval(), unit(2, seed=4)[:, None]
    queries = unit(2, seed=5)[:, None]
    first = net.attention(queries, unit(2, seed=6)[:, None], value)[0]
    torch.testing.assert_close(first, net.attention(unit(2, seed=7)[:, None], queries, value)[0])


def test_a_class_of_one_sample_has_no_noise():
    mean, std = class_statistics(unit(2), torch.tensor([0, 1]), 2)
    assert torch.equal(std, torch.zeros(2, 8)) and torch.equal(mean, unit(2))


@pytest.mark.parametrize("epochs", [1, 5, 10, 200])
def test_the_window_grows_from_its_smallest_to_its_largest(epochs: int):
    sizes = [window(t, epochs) for t in range(epochs + 1)]
    assert sizes[0] == 2 and sizes[-1] == 9 and sizes == sorted(sizes)


def test_the_past_is_averaged_from_the_oldest():
    past = torch.tensor([1.0, 2.0, 4.0])
    assert local_mean(past, 0.5) == 0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 4
    assert local_mean(past[-1:], 0.5) == 4.0


def test_few_shots_are_of_base_classes_renumbered():
    labels = torch.arange(40) % 4
    features, own = few_shots(unit(40), labels, [0, 2, 3], 2, 0)
    assert features.shape == (6, 8) and own.bincount().tolist() == [2, 2, 2]


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


def test_a_run_reports_base_and_new_and_its_fall_and_leaves_a_classifier(folder: Path, tmp_path: Path):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = {"projection_dim": 8, "vision_config": {**small, "patch_size": 8}, "text_config": small}
    adam = {"epochs": 10, "batch_size": 12, "eval_every": 0, "optimizer": {"name": "adamw", "lr": 1e-2}}
    data = {"name": f"imagefolder:{folder}", "image_size": 16, "augment": "plain"}
    texts = {"tokenizer": "bytes", "templates": ["{}"], "context": 24}
    raw = {
        "method": "ogen",
        "data": {**data, "val": 0.5},
        "new": ["yellow"],
        "clip": {
            "model": "hf:config:clip",
            "options": model,
            "data": {**data, "name": f"captions:imagefolder:{folder}", "options": texts},
            "train": adam,
        },
        "shots": 4,
        "tokens": 2,
        "heads": 2,
        "train": {"epochs": 6, "batch_size": 6, "eval_every": 1, "optimizer": {"name": "sgd", "lr": 0.05}},
        "evaluate": ["quality"],
    }
    figures = execute(recipe.validate(raw), tmp_path / "run", cpu=True)
    assert {"accuracy_base", "accuracy_new", "accuracy_harmonic", "new_drop", "accuracy_new_before"} <= set(figures)
    curve = (tmp_path / "run" / "metrics.csv").read_text()
    assert "val/accuracy_new" in curve
    product = load_product(tmp_path / "run")
    assert product.module(torch.zeros(2, 3, 16, 16)).shape == (2, 4)
    coop = {**raw, "generator": False, "almt": None}
    plain = execute(recipe.validate(coop), tmp_path / "coop", cpu=True)
    assert plain["nll"] != figures["nll"]
    examples = {**raw, "values": "examples", "neighbours": "text", "new": []}
    execute(recipe.validate(examples), tmp_path / "examples", cpu=True)
    with pytest.raises(UserError, match=r"class in new.*'yelow'"):
        execute(recipe.validate({**raw, "new": ["yelow"]}), tmp_path / "wrong", cpu=True)

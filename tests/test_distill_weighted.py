"""DistillWeighted: PARC and its ties, weights of sources, heads that leave no trace, sources of other label spaces and
sizes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.own_input import OwnInput
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.methods.classification.distill_weighted import (
    Config,
    DistillWeighted,
    chosen,
    parc,
    source_loss,
    source_weights,
)
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.run import Run
from stillhouse.training.context import Progress

RECIPE = Path(__file__).parents[1] / "recipes" / "classification" / "distill_weighted.yaml"
DRAW = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))


# ---- similarity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 5, 7])
def test_features_that_are_the_labels_have_the_highest_similarity(classes: int) -> None:
    labels = np.repeat(np.arange(classes), 6)
    assert parc(np.eye(classes)[labels], labels) == pytest.approx(100, abs=1e-9)
    assert parc(np.eye(classes)[labels], np.eye(classes)[labels]) == pytest.approx(100, abs=1e-9)
    assert abs(parc(DRAW.normal(size=(len(labels), 30)), labels)) < 40


def test_similarity_knows_neither_scale_nor_order() -> None:
    labels = DRAW.integers(0, 3, 25)
    features = DRAW.normal(size=(25, 6)) + np.eye(3)[labels] @ DRAW.normal(size=(3, 6))
    value = parc(features, labels)
    moved = features * DRAW.uniform(0.1, 9, 6) + DRAW.normal(size=6)
    order = DRAW.permutation(25)
    constant = np.concatenate([features, np.full((25, 1), 7.0)], 1)
    assert parc(moved, labels) == pytest.approx(value, abs=1e-6)
    assert parc(features[order], labels[order]) == pytest.approx(value, abs=1e-9)
    assert np.isfinite(parc(constant, labels)) and np.isfinite(parc(features, labels, components=3))


@pytest.mark.parametrize(
    ("features", "labels", "match"),
    [
        (np.ones((2, 4)), [0, 1], "at least three samples"),
        (DRAW.normal(size=(5, 4)), [1, 1, 1, 1, 1], "at least two classes"),
        (np.ones((5, 4)), [0, 1, 0, 1, 0], "are all the same"),
        (DRAW.normal(size=(5, 4)), np.ones((5, 3)), "labels of sample 0 are all the same"),
    ],
)
def test_similarities_that_are_not_defined_are_refused(features: np.ndarray, labels: list, match: str) -> None:
    with pytest.raises(UserError, match=match):
        parc(features, np.array(labels))


@pytest.mark.parametrize(
    ("power", "expected"),
    [(0, [1 / 3] * 3), (1, [0, 1 / 3, 2 / 3]), (2, [0, 0.2, 0.8]), (math.inf, [0, 0, 1])],
)
def test_weights_by_hand(power: float, expected: list[float]) -> None:
    assert source_weights([10, 20, 30], power) == pytest.approx(expected)
    assert source_weights([-3, -1, 1], power) == pytest.approx(expected), "only the order of sizes counts"


def test_weights_at_their_limits() -> None:
    assert source_weights([5.0]) == [1] and source_weights([5.0, 5.0]) == [0.5, 0.5]
    assert source_weights([1, 2, 3, 4], 1, top=2) == pytest.approx([0, 0, 0.4, 0.6])
    with pytest.raises(UserError, match="a similarity for each"):
        source_weights([1.0, math.nan])


def test_a_recipe_chooses_among_its_sources() -> None:
    config: Config = recipe.load(RECIPE, "smoke")  # type: ignore[assignment]
    scores = {"a": 1.0, "near": 3.0, "c": 2.0}

    def weights(**changes: object) -> dict[str, float]:
        return chosen(config.model_copy(update=changes), scores)

    assert weights(weighting="nearest") == {"a": 0, "near": 1, "c": 0}
    assert weights(weighting="worst") == {"a": 1, "near": 0, "c": 0}
    assert weights(weighting="uniform")["a"] == pytest.approx(1 / 3)
    assert weights(only="near") == {"near": 1, "wide": 0}


# ---- training --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, classes: int, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(classes)
        self.body, self.fc = nn.Linear(4, width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).relu())


def batch() -> dict:
    draw = torch.Generator().manual_seed(0)
    pool = {"input": torch.randn(5, 4, generator=draw), "index": torch.tensor([7, 1, 4, 0, 2])}
    return {"input": torch.randn(3, 4, generator=draw), "label": torch.tensor([0, 1, 1]), "unlabelled": pool}


def trained(weights: dict[str, float], sources: dict | None = None, **options: object) -> DistillWeighted:
    stored = {"a": torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), "b": torch.randn(8, 9)}
    module = DistillWeighted(Net(2), weights, sources or stored, **options)
    module.build(batch())
    return module


def test_a_head_for_each_source_that_counts_in_its_own_classes() -> None:
    module = trained({"a": 1.0, "b": 1e-9})
    assert [head.out_features for head in module.heads] == [3]
    assert len(module.param_groups()[0]["params"]) == 4 + 2
    terms = module(batch(), Progress())
    embedding = module.student.body(batch()["unlabelled"]["input"]).relu()
    target = module.outputs_0[batch()["unlabelled"]["index"]].softmax(-1)
    by_hand = F.cross_entropy(module.heads[0](embedding), target)
    torch.testing.assert_close(terms["source_a"], by_hand)
    torch.testing.assert_close(terms["loss"], 0.8 * terms["labels"] + 0.2 * by_hand)


def test_labels_alone_teach_as_plain_training_does() -> None:
    module, plain = trained({"a": 1.0}, label_weight=1.0), Net(2)
    module(batch(), Progress())["loss"].backward()
    F.cross_entropy(plain(batch()["input"]), batch()["label"]).backward()
    for ours, theirs in zip(module.student.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)
    alone = trained({}, pool_loss="none")
    assert not alone.heads
    assert alone(batch(), Progress())["loss"] == F.cross_entropy(plain(batch()["input"]), batch()["label"])


def test_a_head_that_agrees_costs_the_sources_entropy() -> None:
    logits = torch.randn(6, 4)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(source_loss(logits, logits), entropy)
    assert source_loss(torch.randn(6, 4), logits) > entropy
    torch.testing.assert_close(source_loss(logits, logits, hard=True), F.cross_entropy(logits, logits.argmax(-1)))
    soft = source_loss(logits, logits, temperature=2.0)
    torch.testing.assert_close(soft, 4 * source_loss(logits / 2, logits / 2))


def test_one_source_is_the_nearest() -> None:
    one, nearest = trained({"a": 1.0}), trained(dict(zip("ab", source_weights([2.0, 1.0], math.inf))))
    assert one(batch(), Progress())["loss"] == nearest(batch(), Progress())["loss"]


def test_a_live_source_sees_what_the_student_sees_and_does_not_learn() -> None:
    source, pool = Net(3), batch()["unlabelled"]
    outputs = torch.zeros(8, 3)
    outputs[pool["index"]] = source(pool["input"]).detach()
    live, stored = trained({"a": 1.0}, {"a": FrozenTeacher(source)}), trained({"a": 1.0}, {"a": outputs})
    first, second = (m(batch(), Progress())["loss"] for m in (live, stored))
    torch.testing.assert_close(first, second)
    first.backward()
    assert all(p.grad is None for p in source.parameters())
    assert not any("outputs" in name for name in stored.state_dict())


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_a_small_source_for_colour_reads_grey_images_in_its_own_size(tmp_path: Path) -> None:
    config: Config = recipe.load(RECIPE, "smoke")  # type: ignore[assignment]
    from stillhouse import catalog

    run = Run(tmp_path, config, cpu=True)
    source = catalog.method("distill_weighted").source(config, run, "wide")
    prepare = source.readers()[0].prepare
    assert isinstance(prepare, OwnInput) and prepare.size == (32, 32) and len(prepare.own[0]) == 3
    assert source({"input": torch.randn(2, 1, 8, 8)}).require("logits").shape == (2, 2)
    colour = config.model_copy(update={"data": config.sources["wide"].data})
    with pytest.raises(UserError, match="source 'near' reads images of 1 channels, but the target's have 3"):
        catalog.method("distill_weighted").source(colour, run, "near")


def test_a_run_leaves_the_student_alone(tmp_path: Path) -> None:
    config = recipe.load(RECIPE, "smoke", ["precompute=false"])
    figures = execute(config, tmp_path / "run", cpu=True)
    assert {"parc_near", "weight_wide", "accuracy_near_alone"} <= set(figures)
    assert figures["weight_near"] + figures["weight_wide"] == 1
    module = load_product(tmp_path / "run").module
    assert module(torch.zeros(1, 1, 8, 8)).shape == (1, 3) and not any("head" in n for n, _ in module.named_modules())


@pytest.mark.parametrize(
    ("sets", "match"),
    [
        (["only=nobody"], "there is no source 'nobody'"),
        (["data.unlabelled=null"], r"set data\.unlabelled, such as"),
        (["pool_loss=fixmatch"], r"add 'strong' to data\.views"),
        (["sources.near.store={}"], r"sources\.near must be one network"),
        (["sources={}"], "name at least one source"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(sets: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        recipe.load(RECIPE, "smoke", sets)

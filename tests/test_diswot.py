"""DisWOT: what its distances mean, that scores are a function of keys, and that the search finds the best within its
budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from parity.case import oracle_folder
from torch import nn
from torch.nn import functional as F

from stillhouse.config.specs import DataSpec, ModelSpec
from stillhouse.data import Loader, load
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.methods.classification.diswot.method import SimilarityDistillation
from stillhouse.methods.classification.diswot.search import Candidates, Encoding, Space, SpaceSpec, kendall_tau, search
from stillhouse.methods.classification.diswot.similarity import (
    View,
    channel_distance,
    initialise,
    relation_distance,
    semantic_distance,
    semantic_gradient,
    view,
)
from stillhouse.models import build
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate

BATCH = {"input": torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), "label": torch.arange(8) % 10}


def gradients(seed: int, classes: int = 6, width: int = 12) -> torch.Tensor:
    g = torch.randn(classes, width, generator=torch.Generator().manual_seed(seed))
    g[0] = 0  # a class whose gradient vanished
    g[1, :5] = 0
    return g


def test_the_closed_form_is_the_distance_of_the_outer_products():
    s, t = gradients(0), gradients(1)
    outer = lambda g: F.normalize(g[:, :, None] * g[:, None, :], dim=-1)  # noqa: E731
    assert float(semantic_distance(s, t)) == pytest.approx(
        float((outer(s) - outer(t)).square().sum() / s.numel()), rel=1e-5
    )
    tiny = 1e-8 * gradients(2)  # rows shorter than the published 1e-12
    assert float(semantic_distance(tiny, t)) == pytest.approx(
        float((outer(tiny) - outer(t)).square().sum() / t.numel()), rel=1e-5
    )


def test_distances_are_zero_for_the_same_network_and_symmetric():
    s, t = gradients(0), gradients(1)
    x, y = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 2, 5)
    assert (
        semantic_distance(s, s) == pytest.approx(0, abs=1e-6) and relation_distance(x, x) == channel_distance(x, x) == 0
    )
    assert semantic_distance(s, t) == pytest.approx(float(semantic_distance(t, s)), rel=1e-6)
    assert relation_distance(x, y) == pytest.approx(float(relation_distance(y, x)), rel=1e-6)


def test_the_relation_does_not_see_scale_or_rotation():
    x, y = torch.randn(6, 18, dtype=torch.float64), torch.randn(6, 30, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(18, 18, dtype=torch.float64)).Q
    assert float(relation_distance(7 * x @ rotation, y)) == pytest.approx(float(relation_distance(x, y)), rel=1e-10)


def test_the_gradient_without_a_backward_pass_is_the_gradient():
    classifier, h, labels = nn.Linear(12, 5), torch.randn(8, 12), torch.arange(8) % 5
    logits = classifier(h)
    F.cross_entropy(logits, labels).backward()
    assert torch.allclose(semantic_gradient(h, logits.detach(), labels), classifier.weight.grad, atol=1e-6)


def test_dead_maps_are_finite_and_one_sample_is_refused():
    assert torch.isfinite(relation_distance(torch.zeros(4, 3, 2, 2), torch.randn(4, 3, 2, 2)))
    with pytest.raises(UserError, match="at least two"):
        relation_distance(torch.randn(1, 3), torch.randn(1, 3))
    with pytest.raises(UserError, match="classifiers of one shape"):
        semantic_distance(torch.randn(5, 4), torch.randn(5, 6))


def test_a_view_is_a_function_of_its_keys_and_the_teacher_is_nearest_to_itself():
    make = lambda: build(ModelSpec(model="stillhouse:resnet8"), 10, (1, 8, 8))  # noqa: E731
    one, again, other = (view(make, BATCH, seed, "a") for seed in (0, 0, 1))
    assert torch.equal(one.gradient, again.gradient) and torch.equal(one.feature, again.feature)
    assert semantic_distance(one.gradient, other.gradient) > semantic_distance(one.gradient, again.gradient)
    assert one.feature.shape == (8, 64, 2, 2) and one.gradient.shape == (10, 64)


def test_initialisation_is_standard_normal_and_leaves_norms_neutral():
    network = initialise(build(ModelSpec(model="stillhouse:resnet8"), 10, (1, 8, 8)))
    weight = network.layer3[0].conv2.weight
    assert abs(weight.std().item() - 1) < 0.02 and network.training
    assert (network.fc.bias == 0).all() and (network.bn1.weight == 1).all() and (network.bn1.bias == 0).all()


SPACE = Space(SpaceSpec())


def toy_score(encoding: Encoding) -> tuple[float, float, float]:
    return -float(sum((e - 2) ** 2 for e in encoding)), -float(encoding[0]), float(sum(encoding))


def test_the_default_space_is_s1_and_builds_its_members():
    assert len(SPACE) == 64
    network = build(SPACE.model((0, 1, 3)), 100)
    assert [len(getattr(network, f"layer{i}")) for i in (1, 2, 3)] == [1, 3, 7] and network.fc.in_features == 64


@pytest.mark.parametrize(("how", "evaluations"), [("evolution", 40), ("all", 1)])
def test_search_finds_the_best_and_scores_nothing_twice(how: str, evaluations: int):
    found, best = search(
        SPACE,
        toy_score,
        np.random.default_rng(0),
        how=how,
        evaluations=evaluations,
        population=8,
        initial=6,
        combine="semantic",
    )
    assert best == (2, 2, 2) and len(set(found.encodings)) == len(found.encodings) == (40 if how == "evolution" else 64)


def test_evolution_beats_random_search_at_the_same_number_of_scores():
    def value(how: str, seed: int) -> float:
        found, best = search(
            SPACE,
            toy_score,
            np.random.default_rng(seed),
            how=how,
            evaluations=16,
            population=6,
            initial=5,
            parents=3,
            combine="semantic",
        )
        return found.semantic[found.encodings.index(best)]

    assert np.mean([value("evolution", s) for s in range(30)]) > np.mean([value("random", s) for s in range(30)])


def test_budgets_hold_and_an_impossible_one_ends_with_a_sentence():
    small = lambda e: toy_score(e) if sum(e) <= 3 else None  # noqa: E731
    found, _ = search(SPACE, small, np.random.default_rng(0), evaluations=64, initial=5, combine="semantic")
    assert all(sum(e) <= 3 for e in found.encodings)
    with pytest.raises(UserError, match="no candidate of the space is within budget"):
        search(SPACE, lambda e: None, np.random.default_rng(0))


def test_broken_scores_rank_last_and_ranks_weigh_both_metrics_alike():
    scored = Candidates()
    for i, (s, r) in enumerate([(-1.0, -0.03), (-2.0, -0.01), (-1.2, -0.02), (float("nan"), -0.001)]):
        scored.add((i,), s, r, float(i))
    assert scored.scores("sum").argmax() == 0 and scored.scores("relation").argmax() == 3
    assert np.isneginf(scored.scores("sum")[3]) and np.isneginf(scored.scores("rank_sum")[3])
    assert scored.scores("rank_sum")[0] == scored.scores("rank_sum")[1]
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(2 / 3)


def test_other_genes_than_depths_can_be_searched():
    space = Space(
        SpaceSpec(model="stillhouse:mlp", options={}, genes={"widths": [[8], [16, 8]], "model": ["stillhouse:mlp"]})
    )
    assert len(space) == 2 and space.model((1, 0)).options == {"widths": [16, 8]}
    assert space.mutate((0, 0), np.random.default_rng(0), 2) == (1, 0)


@pytest.mark.parametrize("student", ["stillhouse:resnet8", "stillhouse:resnet8x4"])
def test_the_metrics_teach_a_student_whatever_its_last_width(student: str):
    teacher = build(ModelSpec(model="stillhouse:resnet14"), 10, (1, 8, 8))
    module = (
        Distillation(build(ModelSpec(model=student), 10, (1, 8, 8)), teacher, [SimilarityDistillation()])
        .build(BATCH)
        .train()
    )
    terms = module(BATCH, Progress())
    terms["loss"].backward()
    assert {"diswot.relation", "diswot.semantic"} <= set(terms) and module.student.layer1[
        0
    ].conv1.weight.grad.abs().sum() > 0
    module.close()


def recipe(**changes: object) -> dict:
    quick = {"epochs": 1, "batch_size": 32, "optimizer": {"lr": 0.05}, "eval_every": 0}
    return {
        "method": "diswot",
        "data": {"name": "digits", "size": 64, "augment": "plain"},
        "teacher": {"model": "stillhouse:resnet8", "train": quick},
        "space": {
            "options": {"stem": 4, "widths": [4, 8, 64], "depths": [1, 1, 1]},
            "genes": {"depths.0": [1, 2], "widths.0": [4, 8]},
        },
        "score": {"batch": 32, "repeats": 1},
        "search": {"name": "all"},
        "train": quick,
        "evaluate": ["accuracy"],
        **changes,
    }


def test_a_run_keeps_its_student_and_the_ranking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    figures = execute(validate(recipe(correlate=3, distil={})), tmp_path / "run", cpu=True)
    product = load_product(tmp_path / "run")
    scores = [c["score"] for c in product.candidates]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)
    assert product.model.options["depths"][0] == product.candidates[0]["depths.0"] and product.module(
        torch.zeros(1, 1, 8, 8)
    ).shape == (1, 10)
    assert figures["trained"] == 3 and figures["regret"] >= 0 and figures["accuracy"] == figures["test_accuracy"]


def test_recipes_that_cannot_work_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="at least 3 candidates"):
        execute(validate(recipe(correlate=2)), tmp_path / "a", cpu=True)
    with pytest.raises(UserError, match="combine: relation"):
        execute(validate(recipe(teacher={"model": "stillhouse:resnet8x4"})), tmp_path / "b", cpu=True)
    with pytest.raises(UserError, match=r"raise space\.parameters"):
        execute(validate(recipe(space={"parameters": 100})), tmp_path / "c", cpu=True)


def test_the_score_ranks_s1_as_published_distilled_accuracy_does():
    path = oracle_folder() / "diswot" / "s1_reference_accuracies.npz"
    if not path.is_file():
        pytest.skip(f"no oracle at {path}")
    with np.load(path, allow_pickle=False) as table:
        accuracy = dict(zip(map(tuple, table["depths"].tolist()), table["acc_kd"].tolist()))
    images = load(DataSpec(name="digits", augment="plain")).dataset("train", train=False)
    depths = [d for d in accuracy if set(d) <= {1, 7}] + [(3, 3, 3), (5, 5, 5), (3, 5, 7), (7, 5, 3)]
    taus = []
    for seed in range(3):
        labels = torch.randint(100, (64,), generator=torch.Generator().manual_seed(seed))
        batch = {**next(iter(Loader(images, 64, seed=seed, shuffle=True))), "label": labels}

        def seen(name: str, options: dict, batch: dict = batch, seed: int = seed) -> View:
            return view(
                lambda: build(ModelSpec(model=name, options=options), 100, (1, 8, 8)), batch, seed, name, str(options)
            )

        teacher = seen("stillhouse:resnet56", {})
        students = [
            seen("stillhouse:resnet_stages", {"stem": 16, "widths": [16, 32, 64], "depths": list(d)}) for d in depths
        ]
        scores = [
            -float(semantic_distance(s.gradient, teacher.gradient) + relation_distance(s.feature, teacher.feature))
            for s in students
        ]
        taus.append(kendall_tau(scores, [accuracy[d] for d in depths]))
    assert np.mean(taus) >= 0.35

"""Kernel self-distillation: recursion, spectral form and limit agree, the best weight is the best, and both kinds of
chain run from a recipe."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from stillhouse.config.specs import DataSpec
from stillhouse.data import Loader, load
from stillhouse.errors import UserError
from stillhouse.methods.classification.self_distill_kernel import (
    KernelSelfDistillation,
    WeightedTargets,
    optimal_weight,
    pixels,
    weighted_targets_loss,
)
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate

X = torch.linspace(0, 1, 11, dtype=torch.float64)[:, None]
Y = torch.tensor(
    [
        0.384766,
        1.233397,
        1.332322,
        0.692016,
        -0.297561,
        -0.241893,
        -0.796448,
        -0.961648,
        -0.496725,
        -0.346907,
        0.558951,
    ],
    dtype=torch.float64,
)
GRID = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]


def toy(alpha: float | list[float] = 0.35, steps: int = 6) -> KernelSelfDistillation:
    return KernelSelfDistillation("rbf", 80, 0.2, steps, alpha).fit(X, Y)


def test_the_toy_gives_the_published_errors():
    chain, truth = toy(), torch.sin(2 * math.pi * GRID[:, 0])
    errors = [(chain.predict(GRID, t) - truth).square().mean().item() for t in (1, 2, 3, 4, 5, 6, "limit")]
    assert errors == pytest.approx([0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948, 0.14959], abs=6e-6)


def test_every_step_is_what_refitting_by_hand_gives():
    chain = toy([1.0, 0.2, 0.7, 0.0, 0.5, 0.9])
    kernel = chain.gram(X)
    inverse = torch.linalg.inv(kernel + 0.2 * torch.eye(11, dtype=torch.float64))
    before = Y
    for step, alpha in enumerate(chain.alphas, 1):
        target = Y if step == 1 else alpha * Y + (1 - alpha) * before
        assert torch.allclose(chain.predict(GRID, step), chain.gram(GRID) @ inverse @ target, atol=1e-10)
        before = kernel @ inverse @ target
        assert torch.allclose(chain.fitted(step), before, atol=1e-10)


def test_the_limit_is_one_ridge_fit_with_lambda_over_alpha_and_its_own_fixed_point():
    chain, single = toy(0.25), KernelSelfDistillation("rbf", 80, 0.2 / 0.25, 1).fit(X, Y)
    assert torch.allclose(chain.predict(GRID, "limit"), single.predict(GRID), atol=1e-12)
    limit, plain = chain.shrinkage("limit"), chain.shrinkage(1)
    assert torch.allclose(limit, plain * (0.75 * limit + 0.25), atol=1e-14)
    assert torch.allclose(toy(0.25, 80).predict(GRID), chain.predict(GRID, "limit"), atol=1e-8)


def test_labels_alone_change_nothing_and_no_labels_shrink_all_directions():
    assert all(torch.equal(toy(1.0).predict(GRID, t), toy(1.0).predict(GRID, 1)) for t in range(2, 7))
    with pytest.warns(UserWarning, match="shrinks to zero"):
        chain = toy(0.0)
    assert chain.predict(GRID, "limit").abs().max() == 0
    ratios = [(chain.shrinkage(t)[0] / chain.shrinkage(t)[5]).item() for t in range(1, 7)]
    assert all(later > earlier for earlier, later in itertools.pairwise(ratios))


@pytest.fixture(scope="module")
def digits() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    bundle = load(DataSpec(name="digits", size=450, val=1 / 3, label_noise=0.3, augment="plain", seed=2))
    out = {}
    for split in ("train", "val"):
        batch = next(iter(Loader(bundle.dataset(split, train=False), 1000)))
        out[split] = pixels(batch["input"], bundle.mean, bundle.std), F.one_hot(batch["label"], 10).double() - 0.1
    return out


@pytest.mark.parametrize("ridge", [0.02, 0.3])
def test_the_best_weight_is_the_best_of_a_grid_at_every_step(digits: dict, ridge: float):
    x, y = digits["val"]
    chain = KernelSelfDistillation("rbf", 0.05, ridge, 4, 1.0).fit(*digits["train"])
    chain.choose_alphas(x, y)
    chosen = list(chain.alphas)
    for step in (2, 3, 4):
        errors = {}
        for i in range(101):
            chain.alphas[step - 1] = i / 100
            errors[i / 100] = (chain.predict(x, step) - y).square().mean().item()
        chain.alphas = list(chosen)
        best = min(errors, key=errors.__getitem__)
        assert abs(best - chosen[step - 1]) <= 0.00501
        assert (chain.predict(x, step) - y).square().mean().item() <= errors[best] + 1e-12


def test_the_best_chain_has_the_lowest_validation_error_of_all_constant_weights(digits: dict):
    x, y = digits["val"]
    chain = KernelSelfDistillation("rbf", 0.05, 0.02, 5, 1.0).fit(*digits["train"])
    chain.choose_alphas(x, y)
    best = [(chain.predict(x, t) - y).square().mean().item() for t in range(1, 6)]
    for alpha in (0.0, 0.25, 0.5, 1.0):
        chain.alphas = [alpha] * 5
        assert all(b <= (chain.predict(x, t) - y).square().mean().item() + 1e-12 for t, b in enumerate(best, 1))


def test_the_best_weight_on_the_training_points_is_one_or_more():
    chain = toy(0.5)
    assert chain.optimal_alpha(X, Y, 2) >= 1 - 1e-9
    with pytest.warns(UserWarning, match="alpha is 1"):
        assert optimal_weight(Y, Y / 2, Y / 2) == 1.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ridge": 0.0}, "above 0"),
        ({"alpha": 1.2}, "between 0 and 1"),
        ({"alpha": [0.5, 0.5], "steps": 3}, "each of 3 steps"),
        ({"kernel": "rbff"}, "did you mean 'rbf'"),
    ],
)
def test_impossible_chains_are_refused(options: dict, says: str):
    with pytest.raises(UserError, match=says):
        KernelSelfDistillation(**options)
    with pytest.raises(UserError, match="steps 1 to 6"):
        toy().predict(X, 7)
    with pytest.raises(UserError, match="constant alpha"):
        toy([1, 0.2, 0.3, 0.4, 0.5, 0.6]).predict(X, "limit")


def test_duplicate_points_and_one_dimensional_targets_come_back_as_they_are():
    chain = KernelSelfDistillation("rbf", 80, 0.2, 3, 0.3).fit(torch.cat([X, X]), torch.cat([Y, Y]))
    assert chain.predict(GRID).shape == (101,) and torch.isfinite(chain.predict(GRID)).all()


def test_the_loss_between_labels_and_teacher_is_linear_in_the_weight():
    g = torch.Generator().manual_seed(0)
    logits, before, labels = (
        torch.randn(6, 5, generator=g),
        torch.randn(6, 5, generator=g).softmax(-1),
        torch.arange(6) % 5,
    )
    zero, one, half = (weighted_targets_loss(logits, labels, before, a) for a in (0.0, 1.0, 0.5))
    assert half.item() == pytest.approx((zero + one).item() / 2)
    assert torch.equal(one, weighted_targets_loss(logits, labels, None, 0.3)) and zero.item() == pytest.approx(
        F.mse_loss(logits.softmax(-1), before).item()
    )
    assert "teacher.logits" not in WeightedTargets(None).needs


def run(folder: Path, **changes: object) -> dict[str, float]:
    data = {"name": "digits", "size": 300, "augment": "plain", "val": 0.3, "label_noise": 0.2}
    return execute(validate({"method": "self_distill_kernel", "data": data, "steps": 3, **changes}), folder, cpu=True)


def test_a_kernel_machine_is_kept_and_told_by_its_steps(tmp_path: Path):
    figures = run(tmp_path / "run", kernel={"ridge": 0.3, "gamma": 0.05}, alpha=0.25, keep="limit")
    machine = load_product(tmp_path / "run")
    assert figures["accuracy"] == figures["accuracy_limit"] > 0.8
    assert machine.scores(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    other = run(tmp_path / "other", kernel={"ridge": 0.3, "gamma": 0.05}, alpha=0.25, keep="limit", seed=1)
    assert other["val_mse_step1"] != figures["val_mse_step1"]


def test_networks_take_three_trainings_a_step_for_the_best_weight(tmp_path: Path):
    quick = {"epochs": 4, "batch_size": 50, "optimizer": {"name": "adam", "lr": 3e-3}, "eval_every": 0}
    student = {"model": "stillhouse:mlp", "options": {"widths": [16]}}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        figures = run(tmp_path / "run", student=student, train=quick, steps=2, reg_coef=1e-4)
    assert figures["trainings"] == 3 and "alpha_step2" in figures and figures["accuracy"] == figures["accuracy_step2"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "exactly one of kernel and student"),
        ({"kernel": {}, "alpha": [0.1, 0.2]}, "each of 3 steps"),
        ({"kernel": {}, "keep": "limit"}, "one constant alpha"),
        ({"kernel": {}, "data": {"name": "digits", "size": 100}}, r"set data\.val"),
    ],
)
def test_recipes_that_cannot_work_are_refused(tmp_path: Path, changes: dict, says: str):
    with pytest.raises(UserError, match=says):
        run(tmp_path / "run", **changes)

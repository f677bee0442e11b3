"""RAD: the closed form is the game's optimum, batches keep its guarantee, the rules see only what they may, and the
loop spends its budget exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from stillhouse.config.specs import DataSpec, ModelSpec
from stillhouse.data import load
from stillhouse.errors import UserError
from stillhouse.methods.classification.rad.game import (
    draw,
    exact_marginals,
    gains,
    guaranteed,
    marginals,
    solve,
    solve_relative,
)
from stillhouse.methods.classification.rad.method import BudgetedTeacher, least_sure_shuffled
from stillhouse.methods.classification.rad.queries import RULES, Pool
from stillhouse.models import build
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate

G = np.array([0.9, 0.8, 0.5, 0.4, 0.1])


def drawn(n: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.02, 1, n)


@pytest.mark.parametrize(
    ("gain", "correct", "value", "probs"),
    [
        ((1, 0.5, 0.25, 0.2, 0.1), 4, 1 / 3, (1 / 3, 2 / 3, 0, 0, 0)),
        (G, 4, 0.4585987, (0.254777, 0.286624, 0.458599, 0, 0)),
        (G, 3, 0.2914980, (0.161943, 0.182186, 0.291498, 0.364372, 0)),
        (G, 2, 0.1457490, (0.161943, 0.182186, 0.291498, 0.364372, 0)),
        (G, 5, 0.9, (1, 0, 0, 0, 0)),
    ],
)
def test_worked_examples_come_out_as_on_paper(gain: np.ndarray, correct: int, value: float, probs: tuple[float, ...]):
    found = solve(np.array(gain), correct)
    assert found.value == pytest.approx(value, abs=1e-7)
    assert found.probs == pytest.approx(probs, abs=1e-6)
    assert guaranteed(found.probs, np.array(gain), correct) == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("seed", range(20))
def test_the_closed_form_is_the_optimum_of_the_linear_program(seed: int):
    r = np.random.default_rng(seed)
    n = int(r.integers(2, 25))
    g, m = r.uniform(0.01, 1, n), int(r.integers(1, n + 1))
    # max m t - sum s with s_i >= t - p_i g_i, p in the simplex
    cost = np.concatenate([np.zeros(n), np.ones(n), [-m]])
    rows = np.hstack([-np.diag(g), -np.eye(n), np.ones((n, 1))])
    total = np.concatenate([np.ones(n), np.zeros(n + 1)])[None]
    best = linprog(cost, rows, np.zeros(n), total, [1], [(0, 1)] * n + [(0, None)] * n + [(None, None)])
    found = solve(g, m)
    assert found.value == pytest.approx(-best.fun, rel=1e-9)
    assert guaranteed(found.probs, g, m) == pytest.approx(found.value, rel=1e-9)


def test_the_adversary_is_indifferent_on_the_support_and_no_other_sampling_does_better():
    g = drawn()
    found = solve(g, 40)
    products = (found.probs * g)[found.probs > 0]
    assert products == pytest.approx(products[0], rel=1e-12) and found.support == len(products) > 20
    assert found.probs.sum() == pytest.approx(1, abs=1e-12)
    r = np.random.default_rng(1)
    others = [r.dirichlet(np.ones(60)) for _ in range(50)] + [
        0.95 * found.probs + 0.05 * r.dirichlet(np.ones(60)) for _ in range(50)
    ]
    assert max(guaranteed(p, g, 40) for p in others) < found.value


def test_limits_of_a_perfect_teacher_equal_gains_and_a_hopeless_teacher():
    g = drawn()
    assert solve(g, 60).probs.argmax() == g.argmax() and solve(g, 60).support == 1
    equal = solve(np.full(10, 0.7), 6)
    assert equal.probs == pytest.approx(0.1) and equal.value == pytest.approx(0.7 * 6 / 10)
    assert solve(g, 1).value == pytest.approx(1 / (1 / g).sum()) and solve(g, 1).support == 60


def test_the_solution_does_not_depend_on_scale_or_order():
    g, order = drawn(), np.random.default_rng(2).permutation(60)
    found = solve(g, 40)
    assert solve(3 * g, 40).probs == pytest.approx(found.probs) and solve(3 * g, 40).value == pytest.approx(
        3 * found.value
    )
    assert solve(g[order], 40).probs == pytest.approx(found.probs[order])


def test_zero_gains_neither_explode_nor_are_asked_about():
    g = np.concatenate([drawn(20), np.zeros(10)])
    found = solve(g, 25)
    assert np.isfinite(found.probs).all() and found.probs[20:].sum() == 0
    assert solve(np.zeros(5), 3).probs == pytest.approx(0.2)


def test_ties_are_broken_by_the_seed_and_not_by_the_order_of_the_data():
    g = np.ones(50)
    assert len({solve(g, 50, np.random.default_rng(s)).probs.argmax() for s in range(8)}) > 1
    assert (
        solve(g, 50, np.random.default_rng(0)).probs.argmax() == solve(g, 50, np.random.default_rng(0)).probs.argmax()
    )


@pytest.mark.parametrize(
    ("gain", "correct", "says"),
    [
        (-G, 2, "not negative"),
        (G * np.nan, 2, "finite"),
        (G, 0, "between 1 and 5"),
        (G, 6, "between 1 and 5"),
        (np.zeros(0), 1, "at least one"),
    ],
)
def test_impossible_games_are_refused(gain: np.ndarray, correct: int, says: str):
    with pytest.raises(UserError, match=says):
        solve(gain, correct)


@pytest.mark.parametrize("queries", [1, 5, 20, 45, 60])
def test_marginals_are_valid_and_as_good_as_the_linear_program_where_nothing_is_capped(queries: int):
    g = drawn()
    q, best = marginals(solve(g, 40).probs, g, queries), exact_marginals(g, 40, queries)
    for inclusion in (q, best):
        assert inclusion.sum() == pytest.approx(queries) and inclusion.min() >= 0 and inclusion.max() <= 1 + 1e-9
    assert guaranteed(q, g, 40) <= guaranteed(best, g, 40) * (1 + 1e-7)
    if q.max() < 1:
        assert guaranteed(q, g, 40) == pytest.approx(guaranteed(best, g, 40), rel=1e-7)
    with pytest.raises(UserError, match="61 points are to be queried, but the pool holds 60"):
        marginals(q, g, 61)


def test_drawn_points_are_distinct_and_come_as_often_as_their_marginals_say():
    g, r = drawn(30), np.random.default_rng(0)
    q = marginals(solve(g, 18).probs, g, 12)
    counts = np.zeros(30)
    for _ in range(6000):
        points = draw(q, 12, r)
        assert len(points) == len(set(points.tolist())) == 12
        counts[points] += 1
    assert np.abs(counts / 6000 - q).max() < 0.025


def test_the_relative_game_gives_the_values_worked_out_by_hand():
    assert [round(solve_relative(G, m).value, 4) for m in range(1, 6)] == [0.2, 0.25, 0.3945, 0.5389, 1.0]


def test_gains_rise_with_doubt():
    probs = np.array([[1.0, 0, 0], [0.6, 0.3, 0.1], [1 / 3, 1 / 3, 1 / 3]])
    for kind in ("margin", "entropy", "confidence"):
        g = gains(probs, kind)
        assert g[0] == pytest.approx(0, abs=1e-9) and g[0] < g[1] < g[2]
    assert gains(probs)[1] == pytest.approx(0.7)


def pool(n: int = 120) -> Pool:
    r = np.random.default_rng(0)
    x = r.normal(size=(n, 4))
    return Pool(r.dirichlet(np.ones(5), n), x, x[:3] + 5, 80)


@pytest.mark.parametrize("name", list(RULES))
def test_every_rule_takes_as_many_distinct_points_by_its_seed_alone(name: str):
    picks = [RULES[name](pool(), 15, np.random.default_rng(s), "margin", False).points for s in (0, 0, 1)]
    assert len(set(picks[0].tolist())) == 15 and picks[0].min() >= 0 and picks[0].max() < 120
    assert np.array_equal(picks[0], picks[1])


def test_margin_takes_the_largest_gains_and_the_coreset_spreads():
    view, r = pool(), np.random.default_rng(0)
    taken = RULES["margin"](view, 15, r, "margin", False).points
    assert gains(view.probs)[taken].min() >= np.sort(gains(view.probs))[-15]
    spread, chance = (
        np.linalg.norm(view.embedding[RULES[n](view, 15, r, "margin", False).points], axis=1).mean()
        for n in ("coreset", "uniform")
    )
    assert spread > chance


def test_the_budget_is_enforced():
    digits = load(DataSpec(name="digits", size=50, augment="plain"))
    network = build(ModelSpec(model="stillhouse:mlp", options={"widths": [8]}), 10, digits.input_shape)
    teacher = BudgetedTeacher(network, digits.dataset("train", train=False), 20)
    rows = np.arange(15)
    answers = teacher.ask(rows, rows, np.zeros(15))
    assert torch.allclose(answers.sum(1), torch.ones(15)) and teacher.asked == 15
    with pytest.raises(UserError, match="budget of 20 questions"):
        teacher.ask(rows, rows, np.zeros(15))
    assert teacher.asked == 15


def test_corruption_moves_only_the_least_sure_answers():
    logits = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    moved = np.flatnonzero(least_sure_shuffled(logits, 0.3, 0) != np.arange(100))
    doubt = gains(logits.softmax(-1).numpy())
    assert 20 <= len(moved) <= 30 and doubt[moved].min() >= np.sort(doubt)[-30]


def recipe(**changes: object) -> dict:
    quick = {"epochs": 2, "batch_size": 20, "optimizer": {"name": "adam", "lr": 3e-3}, "eval_every": 0}
    return {
        "method": "rad",
        "data": {"name": "digits", "size": 300, "augment": "plain", "val": 0.2},
        "labelled": 40,
        "teacher": {"model": "stillhouse:mlp", "options": {"widths": [16]}, "train": quick},
        "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
        "train": quick,
        "queries": 15,
        "rounds": 2,
        "evaluate": ["accuracy"],
        **changes,
    }


@pytest.mark.parametrize("query", ["rad", "unixkd", "coreset"])
def test_a_run_asks_each_question_once_and_keeps_them_with_its_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: str
):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    figures = execute(validate(recipe(query=query, corrupt=0.2)), tmp_path / "run", cpu=True)
    product = load_product(tmp_path / "run")
    asked = [row for rows in product.queried for row in rows]
    assert len(asked) == len(set(asked)) == 30 == figures["queries"]
    assert 0 <= figures["answer_accuracy"] <= 1 and figures["guarantee_over_uniform"] >= 1
    assert product.module(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_more_questions_than_points_and_a_missing_validation_set_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="more than the 200 pool samples"):
        execute(validate(recipe(queries=150)), tmp_path / "a", cpu=True)
    with pytest.raises(UserError, match=r"set data\.val"):
        execute(validate(recipe(data={"name": "digits", "size": 300})), tmp_path / "b", cpu=True)

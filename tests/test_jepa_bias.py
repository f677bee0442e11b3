"""JEPA bias: the published times and gains, gradients and conserved quantities of the networks, and studies that are
kept, resumed and refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from stillhouse.config.specs import DataSpec
from stillhouse.errors import UserError
from stillhouse.methods.pretraining.jepa_bias.linear import (
    Moments,
    balanced_start,
    descend,
    encoder,
    flow,
    gains,
    gradients,
    leakage,
    loss,
    orthogonal,
    sample_static,
    sample_temporal,
    static_features,
    temporal_features,
)
from stillhouse.methods.pretraining.jepa_bias.method import Simulation
from stillhouse.methods.pretraining.jepa_bias.nonlinear import Learner, NonlinearSpec, knn
from stillhouse.methods.pretraining.jepa_bias.sources import ContentSpec, pairs_of
from stillhouse.methods.pretraining.jepa_bias.theory import (
    KINDS,
    critical_time,
    encoder_gain,
    fixed_point,
    reaching_time,
    trajectory,
    velocity,
)
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load
from stillhouse.runs.recipe import validate
from stillhouse.runs.run import Run

LAM = torch.tensor([1.0, 1.0, 0.5, 0.25], dtype=torch.float64)
RHO = torch.tensor([0.9, 0.4, 0.9, 0.5], dtype=torch.float64)
PAIR = np.array([0.9, 0.3])


@pytest.mark.parametrize(
    ("depth", "scale", "jepa", "mae"),
    [
        (1, 0.03, (34.85, 33.99), (2.904, 2.354)),
        (2, 0.03, (1.300e4, 1.440e4), (31.40, 30.54)),
        (3, 0.1, (2.325e4, 2.839e4), (48.02, 46.57)),
        (5, 0.1, (1.270e8, 1.723e8), (2496, 2491)),
    ],
)
def test_critical_times_are_the_published_ones(depth: int, scale: float, jepa: tuple, mae: tuple):
    for kind, expected in (("jepa", jepa), ("mae", mae)):
        assert critical_time(1.0, PAIR, depth, scale, kind) == pytest.approx(expected, rel=5e-4)


def test_jepa_of_three_layers_learns_the_clean_feature_before_the_strong_one_and_mae_never_does():
    lam, rho, found = np.array([1.0, 0.8]), np.array([0.2, 0.9]), {}
    for kind in KINDS:
        times = [critical_time(lam, rho, depth, 0.05, kind) for depth in (1, 2, 3, 5)]
        found[kind] = [a / b for a, b in times]
    assert found["jepa"] == pytest.approx([0.592, 0.955, 1.040, 1.043], abs=6e-4)
    assert found["mae"] == pytest.approx([0.547, 0.744, 0.791, 0.800], abs=6e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_times_are_the_integral_of_the_flow_and_curves_are_their_inverse(kind: str, depth: int):
    lam, rho, scale = 0.7, 0.6, 0.1
    end = float(fixed_point(rho, depth, kind))
    by_quadrature = quad(lambda w: 1 / velocity(w, lam, rho, depth, kind), scale, 0.8 * end, epsabs=0, epsrel=1e-11)[0]
    assert critical_time(lam, rho, depth, scale, kind, 0.8) == pytest.approx(by_quadrature, rel=1e-9)
    w = np.linspace(0.15, 0.97 * end, 7)
    times = reaching_time(w, lam, rho, depth, scale, kind)
    assert trajectory(times, np.array([lam]), np.array([rho]), depth, scale, kind)[:, 0] == pytest.approx(w, rel=1e-9)


def test_one_layer_mae_has_the_logarithmic_closed_form():
    lam, rho, scale, share = 0.5, 0.7, 0.03, 0.5
    part = [np.log(u / (1 - u / rho)) for u in (share**2 * rho, scale**2)]
    assert critical_time(lam, rho, 1, scale, "mae", share) == pytest.approx((part[0] - part[1]) / (2 * lam), rel=1e-12)


def test_at_equal_covariance_the_gap_grows_with_small_starts_for_jepa_and_stays_for_mae():
    gaps = {
        kind: [np.diff(critical_time(1.0, np.array([0.9, 0.3]), 2, s, kind))[0] for s in (0.02, 0.01, 0.005)]
        for kind in KINDS
    }
    assert np.ptp(gaps["mae"]) < 0.02 * abs(gaps["mae"][0])
    expected = [(1 / 0.3 - 1 / 0.9) / (2 * s**2) for s in (0.02, 0.01, 0.005)]
    assert gaps["jepa"][-1] == pytest.approx(expected[-1], rel=0.05)
    assert gaps["jepa"][2] / gaps["jepa"][1] == pytest.approx(4, rel=0.05)


def test_covariance_scales_time_and_a_feature_without_it_is_never_learned():
    for kind in KINDS:
        assert critical_time(3.0, PAIR, 2, 0.05, kind) == pytest.approx(
            critical_time(1.0, PAIR, 2, 0.05, kind) / 3, rel=1e-12
        )
        never = critical_time(np.array([0.0, -1.0, 1.0]), np.array([0.0, -0.5, 0.5]), 2, 0.05, kind)
        assert np.isinf(never[:2]).all() and np.isfinite(never[2])
        assert np.isnan(trajectory(np.array([1.0]), np.array([-1.0]), np.array([-0.5]), 2, 0.05, kind)).all()
    amplified = trajectory(np.array([1e4]), np.array([1.0]), np.array([1.5]), 2, 0.1, "jepa")
    assert amplified[0, 0] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("kind", "depth", "time", "expected"),
    [
        ("jepa", 1, 20, (0.900, 0.3996, 0.8875, 0.3628)),
        ("jepa", 2, 60, (0.4017, 0.0745, 0.0671, 0.0468)),
        ("mae", 1, 3, (0.9244, 0.6256, 0.6592, 0.3744)),
        ("mae", 2, 6, (0.9289, 0.5392, 0.2247, 0.0797)),
    ],
)
def test_trained_matrices_have_the_published_gains_whatever_the_rotation(
    kind: str, depth: int, time: float, expected: tuple
):
    closed = trajectory(np.array([float(time)]), LAM.numpy(), RHO.numpy(), depth, 0.2, kind)[0] ** depth
    assert closed == pytest.approx(expected, rel=1e-3)  # they were printed from Euler steps
    for basis in (torch.eye(4, dtype=torch.float64), orthogonal(4, "test")):
        moments, start = Moments.of_features(LAM, RHO, basis), balanced_start(basis, depth, 0.2, kind)
        weights, _, _ = flow(start, lambda w, m=moments: gradients(w, m, kind), time, 1e-7, 0.01)
        assert gains(weights, basis).numpy() == pytest.approx(closed, rel=1e-5)
        assert leakage(weights, basis) < 1e-12
    descended = descend(start, lambda w: gradients(w, moments, kind), time, 5e-3)
    assert gains(descended, basis).numpy() == pytest.approx(closed, rel=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_gradients_are_those_of_autograd_with_the_stop_gradient(kind: str):
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(4)]
    x = torch.randn(50, 4, generator=g, dtype=torch.float64)
    moments = Moments.of_samples(
        x,
        x @ torch.randn(4, 4, generator=g, dtype=torch.float64) + torch.randn(50, 4, generator=g, dtype=torch.float64),
    )
    loss(weights, moments, kind).backward()
    with torch.no_grad():
        for w, closed in zip(weights, gradients(weights, moments, kind), strict=True):
            assert torch.allclose(w.grad, closed, rtol=1e-11, atol=1e-11)
    assert loss(weights, moments, kind).item() >= 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_flow_conserves_the_balance_of_neighbouring_layers(kind: str):
    g = torch.Generator().manual_seed(1)
    start = [0.3 * torch.randn(3, 3, generator=g, dtype=torch.float64) for _ in range(4)]  # not balanced, not aligned
    moments = Moments.of_features(LAM[:3], RHO[:3], orthogonal(3, "balance"))

    def balances(w: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([b.T @ b - a @ a.T for a, b in itertools.pairwise(w)])

    end, _, _ = flow(start, lambda w: gradients(w, moments, kind), 5.0, 1e-8, 0.01)
    assert (encoder(end) - encoder(start)).abs().max() > 0.01
    assert torch.allclose(balances(start), balances(end), atol=1e-6)


def test_a_cleaner_feature_takes_the_place_of_a_noisier_one_that_jepa_learned_before():
    lam, rho = torch.tensor([1.0, 0.5], dtype=torch.float64), torch.tensor([0.6, 0.9], dtype=torch.float64)
    own = float(critical_time(0.5, 0.9, 3, 0.13, "jepa"))
    basis = orthogonal(2, "takeover")
    moments = Moments.of_features(lam, rho, basis)
    weights, _, _ = flow(
        balanced_start(basis, 3, 0.13, "jepa"), lambda w: gradients(w, moments, "jepa"), 0.9 * own, 1e-6, 0.01
    )
    closed = trajectory(np.array([0.9 * own]), lam.numpy(), rho.numpy(), 3, 0.13, "jepa")[0] ** 3
    assert closed[1] < 0.02 and gains(weights, basis)[1] == pytest.approx(0.9**3, rel=1e-3)


def test_generative_models_have_the_moments_that_the_theory_assumes():
    variance = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for (lam, rho), (x, y) in (
        (
            static_features(variance, torch.tensor([0.5, 3.0])),
            sample_static(40000, variance, torch.tensor([0.5, 3.0], dtype=torch.float64), 0),
        ),
        (
            temporal_features(variance, torch.tensor([0.9, 0.2])),
            sample_temporal(40000, variance, torch.tensor([0.9, 0.2], dtype=torch.float64), 0),
        ),
    ):
        exact, measured = Moments.of_features(lam, rho), Moments.of_samples(x, y)
        for name in ("xx", "yx", "yy"):
            assert torch.allclose(getattr(exact, name), getattr(measured, name), atol=0.15)


def test_features_are_found_again_under_a_rotation_and_measured_by_the_commutator():
    basis = orthogonal(4, "find")
    moments = Moments.of_features(LAM, RHO, basis)
    found, lam, rho = moments.features()
    assert (
        moments.commutator() < 1e-14
        and torch.allclose(lam, LAM)
        and sorted(rho.tolist()) == pytest.approx(sorted(RHO.tolist()))
    )
    assert torch.allclose((found.T @ moments.xx @ found).diagonal(), lam / rho)
    assert torch.allclose(moments.generalised_rho().sort().values, RHO.sort().values)
    skewed = Moments(moments.xx, moments.yx + torch.diag(torch.ones(3, dtype=torch.float64), 1), moments.yy)
    assert skewed.commutator() > 0.05


def test_fixed_points_on_digits_tell_content_from_nuisance_as_published():
    config = validate({"method": "jepa_bias", "data": {"name": "digits", "augment": "plain"}, "simulate": "modes"})
    held = pairs_of(Run(None, config, cpu=True), DataSpec(name="digits", augment="plain"), ContentSpec())
    lam, rho = (v.numpy() for v in held.numbers())
    assert rho[:4] == pytest.approx([0.94, 0.94, 0.93, 0.90], abs=0.015)
    (x, _, _), (t, _, _) = (held.draw(s, torch.arange(len(held.clean[s])), s) for s in ("train", "test"))
    for depth, jepa, mae in ((1, 0.269, 0.602), (2, 0.020, 0.487), (3, 0.001, 0.429), (5, 0.000, 0.372)):
        accuracy = {}
        for kind, share in (("jepa", jepa), ("mae", mae)):
            a = encoder_gain(rho, depth, kind)
            energy = lam / rho * a**2
            assert energy[30:].sum() / energy.sum() == pytest.approx(share, abs=0.02)
            accuracy[kind] = knn(
                x.numpy() * a, held.labels["train"].numpy(), t.numpy() * a, held.labels["test"].numpy(), 5
            )
        assert depth == 5 or accuracy["jepa"] > accuracy["mae"]


def test_the_target_of_the_nonlinear_jepa_is_detached():
    model = Learner(4, NonlinearSpec(hidden=8, layers=1, dim=3), "jepa")
    x, y = torch.randn(5, 4), torch.randn(5, 4).requires_grad_()
    model(x, y).backward()
    assert y.grad is None and all(p.grad is not None for p in model.parameters())


def study(folder: Path, **changes: object) -> dict[str, float]:
    features = {"lam": [1.0, 0.8], "rho": [0.3, 0.9]}
    return execute(
        validate({"method": "jepa_bias", "features": features, "scale": 0.12, "points": 40, **changes}),
        folder,
        cpu=True,
    )


def test_a_study_is_kept_with_its_curves_and_a_page(tmp_path: Path):
    figures = study(tmp_path / "run", depth=1)
    assert max(figures[f"{k}_{e}"] for k in KINDS for e in ("time_error", "end_error")) < 0.02
    kept = load(tmp_path / "run")
    assert kept.names == ["feature 0", "feature 1"] and kept.order("mae") == [0, 1]
    assert kept.simulated["jepa"].shape == kept.predicted["jepa"].shape == (40, 2)
    assert np.linalg.svd(kept.encoders["mae"])[1] == pytest.approx(sorted(kept.ends["mae"], reverse=True), rel=0.02)
    assert "plot" in (tmp_path / "run" / "dynamics.html").read_text()


def test_orders_swap_between_jepa_and_mae_where_the_strong_feature_is_noisy(tmp_path: Path):
    figures = study(
        tmp_path / "run", features={"lam": [1.0, 0.8], "rho": [0.2, 0.9]}, depth=3, scale=0.05, simulate="modes"
    )
    kept = load(tmp_path / "run")
    assert figures["order_swaps"] == 1 and kept.order("jepa") == [1, 0] and kept.order("mae") == [0, 1]
    assert kept.simulated == {}


def test_a_simulation_that_was_cut_off_goes_on_to_the_same_gains():
    config = validate({"method": "jepa_bias", "features": {"lam": [1.0, 0.8], "rho": [0.3, 0.9]}, "depth": 2})
    moments, grid = Moments.of_features(LAM, RHO), np.linspace(0, 30, 7)
    whole, first, second = (
        Simulation(moments, torch.eye(4, dtype=torch.float64), grid, config, "mae") for _ in range(3)
    )
    for i in range(6):
        whole.step(i)
        (first if i < 3 else second).step(i)
        if i == 2:
            second.load_state_dict(first.state_dict())
    assert second.gains == whole.gains


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"depth": 5, "scale": 0.02}, r"settles at time .* beyond integrator.budget"),
        ({"scale": 0.2, "depth": 1}, "lower the scale"),
        ({"features": {"lam": [0.0, -1.0], "rho": [0.5, 0.5]}}, "variance"),
        ({"features": {"lam": [-1.0], "rho": [-0.5]}}, "none is ever learned"),
        ({"features": {"lam": [1.0], "rho": [0.5, 0.5]}}, "one length"),
        ({"features": {"model": "temporal", "variance": [1.0], "noise": [0.5]}}, "takes `variance` and `gamma`"),
        ({"data": {"name": "digits"}}, "exactly one of features and data"),
        ({"nonlinear": {}}, "needs data"),
        ({"features": None, "data": {"name": "digits"}, "content": {"components": 65}}, "65"),
    ],
)
def test_studies_that_cannot_work_are_refused(tmp_path: Path, changes: dict, says: str):
    with pytest.raises(UserError, match=says):
        study(tmp_path / "run", **changes)

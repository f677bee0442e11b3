"""Distilling diversity and control: where the base stops, the hybrid sampler, adapters that move, a run and its
product."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.functional.diffusion import Sampler, sample, sampling_steps, schedule
from stillhouse.methods.generation.distill_diversity import HybridGenerator
from stillhouse.methods.generation.distill_diversity.adapters import (
    LowRankAdapter,
    adapters_for,
    attached,
    rank_correlation,
)
from stillhouse.methods.generation.distill_diversity.hybrid import correlations, hybrid_sample, stop_index
from stillhouse.methods.generation.distill_diversity.method import ink, thicker, thinner
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.export import export
from stillhouse.runs.prediction import predict
from stillhouse.runs.products import load_product

RECIPE = Path(__file__).parents[1] / "recipes" / "generation" / "distill_diversity.yaml"


def test_the_base_stops_where_the_student_begins():
    four, twenty = sampling_steps(1000, 4), sampling_steps(1000, 20)
    assert [stop_index(four, four, k) for k in range(5)] == [0, 1, 2, 3, 4]
    assert stop_index(twenty, four, 1) == 5 and stop_index(twenty, four, 4) == 20
    assert stop_index([999, 800, 700], [999, 750], 1) == 1, "the first of equals"
    with pytest.warns(UserWarning, match="amount of noise"):
        stop_index([999, 900, 800], [999, 100], 1)
    with pytest.raises(UserError, match="0 to 3"):
        stop_index(four, four, 5)


def networks(kind: str):
    found = schedule("flow" if kind == "flow" else "linear", 1000)
    base = lambda x, t: torch.tanh(x)  # noqa: E731
    student = lambda x, t: 0.5 * x + t.view(-1, 1) / 1000  # noqa: E731
    return found, base, student


@pytest.mark.parametrize("name", ["ddim", "renoise", "lcm", "euler", "euler_ancestral"])
def test_a_hybrid_is_the_student_at_nought_the_base_at_the_end_and_between_takes_over_as_it_is(name):
    found, base, student = networks("eps")
    sampler = Sampler(name, found, "eps", sampling_steps(1000, 4), eta=0.5)
    noise, more = torch.randn(3, 6), torch.randn(4, 3, 6)

    def drawn(begin):
        draws = iter(more)
        return hybrid_sample(base, student, sampler, sampler, noise, begin, fresh=lambda: next(draws))

    def alone(network):
        draws = iter(more)
        return sample(network, sampler, sampler.start(noise), noise=lambda i: next(draws))

    assert torch.equal(drawn(0).x, alone(student)) and torch.equal(drawn(4).x, alone(base))
    both = drawn(1)
    assert len(both.base_sees) == 1 and len(both.student_sees) == 3
    assert torch.equal(both.student_sees[-1], drawn(1).student_sees[-1])
    assert not torch.equal(both.x, alone(student)) and not torch.equal(both.x, alone(base))
    assert drawn(0).base_sees.shape == (0, 3, 6)


def test_samplers_that_hold_noise_otherwise_are_not_mixed():
    found, base, student = networks("eps")
    steps = sampling_steps(1000, 4)
    with pytest.raises(UserError, match="do not agree"):
        hybrid_sample(
            base,
            student,
            Sampler("euler", found, "eps", steps),
            Sampler("lcm", found, "eps", steps),
            torch.ones(1, 2),
            1,
        )


def test_what_is_seen_is_correlated_with_the_end():
    final = torch.randn(5, 12)
    common = torch.randn(12)  # of all samples, which decides nothing
    seen = torch.stack([torch.randn(5, 12), final + 0.1 * torch.randn(5, 12), 3 * final + common])
    found = correlations(seen, final)
    assert found[0] < found[1] < found[2] and found[2] == pytest.approx(1)


class Net(nn.Module):
    def __init__(self, seed: int, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.step = nn.Linear(2, 2)
        self.body = nn.Sequential(nn.Conv2d(2, width, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(4 * width, 3))

    def forward(self, x):
        return self.body(x)


def test_an_adapter_moves_to_another_network_of_one_form_and_leaves_no_trace():
    first, second, x = Net(0), Net(1), torch.randn(2, 2, 4, 4)
    adapters = adapters_for(first, ["step"], 4, 1.0)
    assert sorted(adapters) == ["body/0", "body/2"]
    for p in adapters.parameters():
        nn.init.normal_(p)
    before = second(x)
    with attached(second, dict(adapters.items()), 0.0):
        assert torch.allclose(second(x), before)
    with attached(second, dict(adapters.items()), 1.0):
        moved = second(x)
    with attached(second, dict(adapters.items()), torch.tensor([0.0, 1.0])):
        mixed = second(x)
    assert torch.allclose(mixed[0], before[0], atol=1e-6) and torch.allclose(mixed[1], moved[1], atol=1e-5)
    assert not torch.allclose(moved, before) and torch.equal(second(x), before)
    layer = nn.Linear(3, 2)
    adapter = LowRankAdapter(layer, 8, 3.0)
    assert adapter.ratio == 1.5 and adapter.up.weight.shape == (2, 2), "a rank of at most the layer's sides"
    assert not adapter(torch.randn(1, 3).half()).any() and adapter(torch.ones(1, 3).half()).dtype == torch.float16


def test_adapters_that_do_not_fit_are_refused():
    adapters = dict(adapters_for(Net(0), ["step"], 4, 1.0).items())
    with (
        pytest.raises(UserError, match=r"no layers for 2 of 2 adapters, such as 'body\.0'"),
        attached(nn.Sequential(nn.Linear(2, 2)), adapters, 1.0),
    ):
        pass
    with pytest.raises(UserError, match=r"'body\.0' is for a layer of 6 outputs"), attached(Net(0, 8), adapters, 1.0):
        pass
    with pytest.raises(UserError, match="plain convolution"):
        LowRankAdapter(nn.ReLU())
    with pytest.raises(UserError, match="no layer"):
        adapters_for(Net(0), ["step", "body"], 4, 1.0)


def test_thick_strokes_hold_more_ink_than_thin_ones():
    image = torch.full((1, 1, 8, 8), -1.0)
    image[..., 2:6, 3:5] = 1
    amounts = [float(f(image).mean()) for f in (thinner, lambda x: x, thicker)]
    assert amounts == sorted(amounts) and amounts[0] < amounts[2]
    assert float(ink(torch.full((1, 1, 2, 2), 51, dtype=torch.uint8))) == pytest.approx(0.2)
    assert rank_correlation([-1, 0, 1], [3, 2, 1]) == pytest.approx(-1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("distill_diversity")
    patch = pytest.MonkeyPatch()
    patch.setenv("STILLHOUSE_CACHE", str(folder / "cache"))
    figures = execute(recipe.load(RECIPE, "smoke"), folder / "run", cpu=True)
    yield folder, figures
    patch.undo()


def test_a_run_reports_the_whole_curve_what_is_seen_and_what_slides(run):
    folder, figures = run
    for name in ("modes", "frechet", "diversity", "prompt_accuracy"):
        assert all(math.isfinite(figures[f"{name}_{k}"]) for k in ("k0", "k1", "k2", "base"))
    assert figures["modes"] == figures["modes_k1"] and figures["frechet"] == pytest.approx(figures["frechet_k1"])
    assert figures["dt_student_2"] == pytest.approx(1) and "dt_base_half" in figures
    assert {f"slide_{a}_to_{b}" for a in ("base", "student") for b in ("base", "student")} <= set(figures)
    assert (folder / "run" / "seen-student.png").is_file() and (folder / "run" / "pictures" / "0-base.png").is_file()


def test_a_variant_takes_the_trained_networks_and_begins_elsewhere(run):
    folder, figures = run
    student = execute(recipe.load(RECIPE, "smoke", {"hybrid.begin": 0}), folder / "student", cpu=True)
    assert student["modes"] == figures["modes_k0"] and student["slide_base_to_student"] == pytest.approx(
        figures["slide_base_to_student"]
    )


def test_a_loaded_product_draws_the_same_slides_and_exports(run):
    folder, _ = run
    first, second = (load_product(folder / "run") for _ in range(2))
    assert isinstance(first, HybridGenerator)
    assert torch.equal(first.samples("odd", 3), second.samples("odd", 3))
    assert not torch.equal(first.samples("odd", 3), first.samples("odd", 3, seed=1))
    noise, label = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    assert torch.equal(first.sampled(noise, label, slide=0.0).x, first.draw(noise, label))
    for p in first.slider.parameters():
        nn.init.normal_(p)
    assert not torch.equal(first.sampled(noise, label, slide=2.0).x, first.draw(noise, label))
    assert list(predict(folder / "run", ["odd", "even"], folder / "found"))
    assert len(list(export(folder / "run", "samples", folder / "grids").glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hybrid.begin": 3}, "hybrid.begin"),
        ({"hybrid.base_sampler": {"name": "euler"}}, "do not agree"),
        ({"slider.scales": [1]}, "slider.scales"),
        ({"prompts": {"odd": ["1", "11"]}}, "11"),
        ({"base.train": None}, "no weights"),
        ({"base.model": "stillhouse:mlp", "base.options": {}}, "no denoiser"),
    ],
)
def test_mistakes_are_told_in_a_sentence(changes, says, tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=says):
        execute(recipe.load(RECIPE, "smoke", changes), tmp_path / "run", cpu=True)

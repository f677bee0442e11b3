"""Diffusion: schedules, parametrisations and their weights, samplers, a diffusion transformer, figures of samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.evaluation.generation import frechet_distance, modes, pairwise_distance
from stillhouse.functional.diffusion import (
    Sampler,
    Schedule,
    clean,
    converted,
    denoising_loss,
    guided,
    min_snr_weights,
    sample,
    sampling_steps,
    schedule,
    target,
)
from stillhouse.generation.config import Prompts
from stillhouse.models import build
from stillhouse.models.dit import DiT

PRESERVING = ("eps", "x0", "v")


def noisy(found: Schedule, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(6, 2, 4, 4, generator=draw), torch.randn(6, 2, 4, 4, generator=draw)
    t = torch.tensor([0, 10, 300, 500, 900, found.steps - 1])
    levels = found.at(t, x0)
    return x0, eps, found.add_noise(x0, eps, t), levels


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "flow"])
def test_schedules_take_samples_to_noise(name):
    found = schedule(name, 1000)
    total = found.alpha + found.sigma if found.straight else found.alpha.square() + found.sigma.square()
    assert torch.allclose(total, torch.ones(1000), atol=1e-5)
    assert (found.sigma.diff() >= 0).all() and found.sigma[-1] > 0.99 and found.sigma[0] < 0.05


@pytest.mark.parametrize("kind", [*PRESERVING, "flow"])
def test_a_right_output_gives_back_the_sample_and_its_noise(kind):
    found = schedule("flow" if kind == "flow" else "cosine", 1000)
    x0, eps, x, levels = noisy(found)
    seen = clean(kind, target(kind, x0, eps, *levels), x, *levels)
    some = slice(0, 5)  # with eps, nothing of the sample is left in the last one
    assert torch.allclose(seen.x0[some], x0[some], atol=2e-4) and torch.allclose(seen.eps[1:], eps[1:], atol=2e-4)


def test_weighted_losses_are_equal_whatever_the_parametrisation():
    """One random prediction as eps, x0 and v: the weighted losses agree, and a teacher that predicts v compares with a
    student that predicts eps in one space."""
    found = schedule("linear", 1000)
    x0, eps, x, levels = noisy(found)
    output = target("v", x0, eps, *levels) + torch.randn_like(x0)
    losses = [
        float(denoising_loss(kind, converted(output, "v", kind, x, *levels).double(), x0.double(), eps.double(),
                             *[v.double() for v in levels], gamma=5.0))
        for kind in PRESERVING
    ]  # fmt: skip
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    snr = (levels[0] / levels[1]).square()
    assert torch.allclose(min_snr_weights("v", *levels), snr.clamp(max=5) / (snr + 1))
    assert torch.allclose(min_snr_weights("eps", *levels), snr.clamp(max=5) / snr)
    nothing_left = torch.zeros(1), torch.ones(1)
    assert min_snr_weights("v", *nothing_left) == 0 and min_snr_weights("eps", *nothing_left) == 1


def test_flow_weights_count_errors_of_clean_samples():
    found = schedule("flow", 1000, shift=3.0)
    x0, eps, x, levels = noisy(found)
    output = target("flow", x0, eps, *levels) + 0.1
    wrong = clean("flow", output, x, *levels).x0 - x0
    weighted = min_snr_weights("flow", *levels) * (output - target("flow", x0, eps, *levels)).square()
    snr = (levels[0] / levels[1]).square()
    assert torch.allclose(weighted, snr.clamp(max=5) * wrong.square(), atol=1e-4)


@pytest.mark.parametrize("name", ["ddim", "renoise", "lcm", "euler", "euler_ancestral"])
@pytest.mark.parametrize("kind", PRESERVING)
def test_every_sampler_draws_from_a_known_distribution(name, kind):
    """The best denoiser of N(2, 0.5^2) in closed form: samples have its mean, and of the deterministic its spread."""
    found = schedule("linear", 1000)

    def denoise(x, t):
        a, s = found.at(t, x)
        gain = a * 0.25 / (a.square() * 0.25 + s.square())
        x0 = 2 + gain * (x - 2 * a)
        return target(kind, x0, (x - a * x0) / s, a, s)

    sampler = Sampler(name, found, kind, sampling_steps(1000, 100), eta=0.5)
    torch.manual_seed(0)
    x = sample(denoise, sampler, sampler.start(torch.randn(4000, 1)))
    assert float(x.mean()) == pytest.approx(2, abs=0.06)
    if name in ("ddim", "euler"):
        assert float(x.std()) == pytest.approx(0.5, abs=0.04)


def test_a_sampler_may_be_left_and_taken_up_and_shows_what_it_sees():
    found, shown = schedule("flow", 1000), []
    sampler = Sampler("ddim", found, "flow", sampling_steps(1000, 8))
    denoise = lambda x, t: torch.tanh(x) + t[:, None] / 1000  # noqa: E731
    whole = sample(denoise, sampler, torch.ones(2, 3), seen=lambda i, x0: shown.append((i, x0)))
    half = sample(denoise, sampler, torch.ones(2, 3), end=3)
    assert torch.equal(sample(denoise, sampler, half, begin=3), whole)
    assert [i for i, _ in shown] == list(range(8)) and torch.equal(shown[-1][1], whole)


def test_steps_are_spaced_as_named():
    assert sampling_steps(1000, 4) == [999, 749, 499, 249]
    assert sampling_steps(1000, 6, "leading", 1) == [831, 665, 499, 333, 167, 1]
    assert sampling_steps(1000, 3, "linspace") == [999, 500, 0] and sampling_steps(1000, 1) == [999]
    assert sampling_steps(1000, 4, "consistency") == [999, 759, 499, 259]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: schedule("cosin"), "cosine"),
        (lambda: sampling_steps(1000, 0), "1 to 1000"),
        (lambda: Sampler("ddim", schedule("flow"), "flow", [3, 5]), "fall"),
        (lambda: Sampler("ddim", schedule("flow"), "flow", [1000]), "0 to 999"),
        (lambda: Sampler("euler", schedule("flow"), "flow", [999]), "ddim"),
        (lambda: Sampler("renoise", schedule("flow"), "flow", [9], eta=2), "0 to 1"),
        (lambda: clean("velocity", *[torch.zeros(1)] * 4), "parametrisation"),
        (lambda: frechet_distance(torch.zeros(1, 2), torch.zeros(5, 2)), "two samples"),
        (lambda: DiT(patch=5), "does not divide"),
        (lambda: DiT(heads=5), "divide the width"),
        (lambda: Prompts.read({"a": ["kat"]}, ["cat", "dog"]), "cat"),
        (lambda: Prompts.read({"a": ["cat"], "b": ["cat"]}, ["cat", "dog"]), "two of them"),
    ],
)
def test_mistakes_are_told_in_a_sentence(wrong, says):
    with pytest.raises(UserError, match=says):
        wrong()


def test_guidance_moves_away_from_the_unconditional():
    assert guided(torch.tensor(2.0), torch.tensor(1.0), 3.0) == 4


class OwnValues(nn.Module):
    def forward(self, q, k, v):
        return v


@pytest.mark.parametrize(("frames", "tube"), [(1, 1), (4, 1), (4, 2)])
def test_a_diffusion_transformer_begins_at_nothing_and_reads_step_and_class(frames, tube):
    torch.manual_seed(0)
    options = {"width": 16, "depth": 2, "heads": 2, "frames": frames, "tube": tube}
    net = build(ModelSpec(model="stillhouse:dit", options=options), 3, (2 * frames, 8, 8))
    assert isinstance(net, DiT)
    x, t, label = torch.randn(2, 2 * frames, 8, 8), torch.tensor([5, 900]), torch.tensor([0, 2])
    assert torch.equal(net.images(net.tokens(x)), x) and net.tokens(x).shape[1] == math.prod(net.grid)
    assert not net(x, t, label).any()
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    out = net(x, t, label)
    assert out.shape == x.shape
    assert not torch.allclose(out, net(x, t, net.unconditional(label)))
    assert not torch.allclose(out, net(x, t + 50, label))
    net.mix_by(OwnValues())
    assert not torch.allclose(out, net(x, t, label))


def test_the_frechet_distance_is_that_of_normal_distributions():
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 3, generator=draw, dtype=torch.float64)
    b = 2 * torch.randn(20000, 3, generator=draw, dtype=torch.float64) + torch.tensor([1.0, 0, 0])
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, b) == pytest.approx(1 + 3 * (1 - 2) ** 2, rel=0.05)
    assert frechet_distance(a[:, :1], a[:, :1] + 3) == pytest.approx(9)


def test_modes_are_counted_and_distances_grow_with_variety():
    assert modes(torch.tensor([2] * 10), 5) == 1
    assert modes(torch.arange(5).repeat(3), 5) == pytest.approx(5)
    assert pairwise_distance(torch.zeros(5, 2)) == 0 and pairwise_distance(torch.eye(4)) == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("name", "options"), [("DDIMScheduler", {}), ("EulerDiscreteScheduler", {}), ("LCMScheduler", {})]
)
def test_samplers_agree_with_the_library_of_diffusers(name, options):
    diffusers = pytest.importorskip("diffusers")
    settings = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "timestep_spacing": "trailing",
    }
    if name == "LCMScheduler":
        del settings["timestep_spacing"]
    theirs = (
        getattr(diffusers, name)(num_train_timesteps=1000, clip_sample=False, **settings)
        if name == "DDIMScheduler"
        else getattr(diffusers, name)(num_train_timesteps=1000, **settings)
    )
    theirs.set_timesteps(4)
    ours = {"DDIMScheduler": "ddim", "EulerDiscreteScheduler": "euler", "LCMScheduler": "lcm"}[name]
    sampler = Sampler(
        ours, Schedule.preserving(theirs.alphas_cumprod), "eps", [round(float(t)) for t in theirs.timesteps],
        to_first=ours == "ddim" and not theirs.config.get("set_alpha_to_one", True),
    )  # fmt: skip
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x, y = sampler.start(noise), noise * theirs.init_noise_sigma
    for i, t in enumerate(theirs.timesteps):
        output = torch.tanh(sampler.seen(x, i))
        fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        x = sampler.step(output, i, x, fresh).x
        arguments = {} if ours == "ddim" else {"generator": torch.Generator().manual_seed(i)}
        y = theirs.step(torch.tanh(theirs.scale_model_input(y, t)), t, y, **arguments).prev_sample
        assert torch.allclose(x, y, atol=1e-3), (name, i)

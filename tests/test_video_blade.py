"""Video-BLADE: the curve, sparse attention and its gradients, trajectories, a run that resumes, a product."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.functional.diffusion import Clean, schedule
from stillhouse.generation.denoising import Denoiser
from stillhouse.generation.trajectory import (
    Matching,
    MatchingSpec,
    check_matching,
    draw_times,
    fake_terms,
    roll_out,
    student_loss,
    student_step,
    trajectory_times,
)
from stillhouse.methods.generation.video_blade import SparseGenerator, method
from stillhouse.methods.generation.video_blade.attention import (
    AdaptiveAttention,
    Sparsity,
    block_mask,
    block_scores,
    gathered_attention,
    kept_counts,
    masked_attention,
    merged,
    window_attention,
)
from stillhouse.methods.generation.video_blade.measuring import jerk, timed
from stillhouse.methods.generation.video_blade.order import hilbert_order
from stillhouse.methods.generation.video_blade.product import SparsitySpec, make_sparse
from stillhouse.models.dit import DiT
from stillhouse.nn.dit import attend
from stillhouse.runs import recipe, staging
from stillhouse.runs.execution import execute
from stillhouse.runs.prediction import predict
from stillhouse.runs.products import load_product
from stillhouse.training import loop

RECIPE = Path(__file__).parents[1] / "recipes" / "generation" / "video_blade.yaml"
SMALL = Sparsity(block=8, sampled=3, least=0.1, most=0.5, window=4)


def qkv(length: int = 64, seed: int = 0):
    return torch.randn(3, 2, 2, length, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("box", [(8, 4, 3), (4, 4, 4), (5, 3, 2), (2, 7, 6), (1, 1, 9), (16, 16, 8), (52, 30, 5)])
def test_the_curve_visits_every_token_once_and_stays_near(box):
    order, inverse = hilbert_order(*box)
    width, height, _ = box
    assert torch.equal(order.sort().values, torch.arange(math.prod(box))) and torch.equal(
        order[inverse], torch.arange(len(order))
    )
    x, y, z = order % width, order // width % height, order // (width * height)
    steps = torch.stack([x, y, z], 1).diff(dim=0).abs()
    assert steps.max() <= 2, "a diagonal step now and then, where sides are odd"


@pytest.mark.parametrize("length", [64, 61])
def test_gathered_blocks_are_the_masked_ones_with_their_gradients(length):
    found = []
    for attention in (masked_attention, gathered_attention):
        q, k, v = (x.clone().requires_grad_() for x in qkv(length))
        positions = torch.tensor([0, 2, 5]).expand(2, 2, 3)
        mask = block_mask(block_scores(q, k, positions, positions, 8), SMALL)
        kept = attention(q, k, v, mask, 8)
        out = merged(kept, window_attention(q, k, v, 4), 4)
        out.square().sum().backward()
        found.append((kept.out, kept.lse, q.grad, k.grad, v.grad))
    for a, b in zip(*found):
        assert torch.allclose(a, b, atol=2e-5)
        assert a.isfinite().all()


def test_all_blocks_are_dense_attention_and_windows_of_one_token_change_nothing():
    q, k, v = qkv()
    everything = torch.ones(2, 2, 8, 8, dtype=torch.bool)
    kept = masked_attention(q, k, v, everything, 8)
    assert torch.allclose(kept.out, attend(q, k, v), atol=1e-5)
    means = window_attention(q, k, v, 1)
    assert torch.allclose(merged(kept, means, 1), attend(q, k, v), atol=1e-5)


def test_the_paper_keeps_one_block_more_than_its_code_and_bounds_hold():
    p = torch.tensor([[0.5, 0.3, 0.16, 0.04]])[None, None].expand(1, 1, 4, 4)
    free = {"block": 8, "sampled": 3, "least": 0.01, "most": 1.0}
    assert kept_counts(p, Sparsity(**free))[0, 0, 0] == 2
    assert kept_counts(p, Sparsity(**free, inclusive=True))[0, 0, 0] == 3
    assert kept_counts(p, Sparsity(block=8, most=0.25, energy=1.0))[0, 0, 0] == 1
    assert block_mask(p, Sparsity(**free)).sum(-1).min() == 2
    ends = block_mask(p, Sparsity(**free, kept_at_end=1))
    assert ends[..., -1].all() and ends[..., -1, :].all()


def test_errors_fall_with_the_share_of_blocks_and_the_global_branch_helps():
    q, k, v = qkv(128)
    errors = []
    for window in (8, 0):
        row = []
        for share in (0.13, 0.25, 0.5, 1.0):
            s = Sparsity(block=8, sampled=8, least=share, most=share, window=window, energy=1.0)
            mix = AdaptiveAttention(s, (2, 8, 8), "raster").eval()
            row.append(float((mix(q, k, v) - attend(q, k, v)).norm()))
            assert float(mix.kept) == pytest.approx(int(16 * share) / 16)
        errors.append(row)
    assert errors[1] == sorted(errors[1], reverse=True) and errors[1][-1] < 1e-4
    assert errors[0][0] < errors[1][0]


def test_evaluation_draws_the_same_tokens_and_training_others():
    q, k, v = qkv()
    mix = AdaptiveAttention(SMALL, (4, 4, 4))
    assert torch.equal(mix.eval()(q, k, v), mix(q, k, v))
    assert torch.equal(mix(q[:1], k[:1], v[:1]), mix(q, k, v)[:1]), "whatever else is in the batch"
    a, b = (mix.train().positions(q)[0] for _ in range(2))
    assert not torch.equal(a, b)


def toy(x, t):
    return Clean(0.5 * x + t.view(-1, 1) / 2000, 0.8 * x)


@pytest.mark.parametrize("kind", ["linear", "flow"])
def test_trajectories_follow_their_times(kind):
    found = schedule(kind, 1000)
    torch.manual_seed(0)
    noise, fresh = torch.randn(64, 6), torch.randn(4, 64, 6)
    states = roll_out(toy, found, noise, fresh, 4, 0.9)
    assert states.shape == (5, 64, 6) and torch.equal(states[4], noise)
    assert torch.equal(states[0], toy(states[1], torch.full((64,), 249)).x0)
    times = draw_times(64, 1000, 4, 980)
    assert set(times.given.tolist()) <= {249, 499, 749, 999} and (times.middle == times.given - 249).all()
    assert (times.noisy >= times.middle).all() and times.noisy.max() < 980
    reached = student_step(toy, found, states, times, torch.randn(64, 6), torch.randn(64, 6), 0.9)
    assert reached.noisy.isfinite().all() and not reached.noisy.requires_grad
    at_once = draw_times(8, 1000, 1, 980)
    assert (at_once.middle == 0).all()


def test_the_student_stays_where_teacher_and_fake_agree_and_moves_by_their_difference():
    x0 = torch.randn(4, 6, requires_grad=True)
    real = torch.randn(4, 6)
    loss, target, _ = student_loss(x0, real, real, 1e-6, 5.0)
    assert float(loss) == pytest.approx(0, abs=1e-6) and torch.allclose(target, x0.detach())
    fake = real - 0.5
    loss, target, divisor = student_loss(x0, real, fake, 1e-9, 5.0)
    loss.backward()
    assert torch.allclose(x0.grad, -1 / (24 * divisor.expand(4, 6)), rtol=1e-3)
    same, _, divisor = student_loss(real.clone().requires_grad_(), real, real, 1e-6, 5.0)
    assert same.isfinite() and (divisor > 0).all()


def test_the_fake_networks_loss_is_of_velocities_for_a_flow():
    found = schedule("flow", 1000)
    x, x0, t = torch.randn(3, 6), torch.randn(3, 6), torch.tensor([100, 500, 900])
    s = found.at(t, x)[1]
    velocity = torch.randn(3, 6)
    fake = Clean(x - s * velocity, x)
    first, _ = fake_terms(fake, method_reached(x0, x), found, t)
    assert torch.allclose(first, (velocity - (x - x0) / s).square().mean(1), rtol=1e-3)


def method_reached(x0, noisy):
    from stillhouse.generation.trajectory import Reached

    return Reached(x0, noisy, noisy)


def network() -> DiT:
    torch.manual_seed(0)
    net = DiT(width=8, depth=1, heads=2, patch=2, frames=4, num_classes=3, input_shape=(4, 8, 8))
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net


def test_each_network_of_a_matching_learns_by_its_own_optimiser():
    teacher = Denoiser(network().requires_grad_(False).eval(), "v", schedule("linear", 1000, zero_terminal=True), 3)
    student = network()
    make_sparse(student, SparsitySpec(block=8, sampled=3, least=0.1, most=0.5, window=4))
    before = [p.clone() for p in teacher.module.parameters()]
    matching = Matching(MatchingSpec(batch_size=4, warmup=0, lr=1e-2, fake_lr=2e-2), teacher, student, (4, 8, 8))
    fakes = [p.clone() for p in matching.fake.module.parameters()]
    terms = matching.step(0)
    assert all(t.isfinite() and not t.requires_grad for t in terms.values())
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.module.parameters()))
    for now in (matching.fake.module, matching.student.module):
        assert any(not torch.equal(a, b) for a, b in zip(fakes, now.parameters()))
    assert not {id(p) for p in matching.fake.module.parameters()} & {id(p) for p in student.parameters()}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: trajectory_times(1000, 3), "divide"),
        (lambda: check_matching(MatchingSpec(steps=8, highest=800), schedule("flow")), "highest"),
        (lambda: AdaptiveAttention(Sparsity(), (2, 8, 8)), "two blocks"),
        (lambda: AdaptiveAttention(Sparsity(block=8, sampled=9), (4, 8, 8)), "sampled"),
        (lambda: AdaptiveAttention(Sparsity(block=8, sampled=2, least=0.5, most=0.1), (4, 8, 8)), "least"),
        (lambda: make_sparse(nn.Linear(2, 2), SparsitySpec()), "stillhouse:dit"),
        (lambda: recipe.load(RECIPE, "smoke", {"match.eta": 2}), "eta"),
        (lambda: execute(recipe.load(RECIPE, "smoke", {"data.options.frames": 2}), "/nonexistent"), "frames"),
        (lambda: execute(recipe.load(RECIPE, "smoke", {"base.predicts": "flow"}), "/nonexistent"), "go with"),
    ],
)
def test_mistakes_are_told_in_a_sentence(wrong, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(method, "__name__", method.__name__)
    if "execute" in wrong.__code__.co_names:
        real = execute
        monkeypatch.setitem(globals(), "execute", lambda config, folder: real(config, tmp_path / "run", cpu=True))
    with pytest.raises(UserError, match=says):
        wrong()


def test_even_motion_has_no_jerk_and_times_are_taken():
    clip = torch.zeros(1, 5, 16, 16, dtype=torch.uint8)
    for frame in range(5):
        clip[0, frame, 4 + frame, 2 + 2 * frame] = 255
    assert jerk(clip, 5) < 1e-2 < jerk(clip[:, [0, 3, 1, 4, 2]], 5)
    found = timed(64, 2, 8, SparsitySpec(block=8, sampled=3, window=4), 1, torch.device("cpu"))
    assert found["attention_speedup_64"] > 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("video_blade")
    patch = pytest.MonkeyPatch()
    patch.setenv("STILLHOUSE_CACHE", str(folder / "cache"))
    figures = execute(recipe.load(RECIPE, "smoke"), folder / "whole", cpu=True)
    yield folder, figures
    patch.undo()


def test_a_run_leaves_a_sparse_generator_that_draws_the_same_when_loaded(run):
    folder, figures = run
    assert 0 < figures["blocks_kept"] <= 0.5 and math.isfinite(figures["frechet"])
    assert figures["sparsity"] == pytest.approx(1 - figures["blocks_kept"] - 1 / 8)
    product = load_product(folder / "whole")
    assert isinstance(product, SparseGenerator)
    assert all(isinstance(a.mix, AdaptiveAttention) for a in product.module.attentions)
    assert torch.equal(product.samples("circle", 3), load_product(folder / "whole").samples("circle", 3))
    lines = list(predict(folder / "whole", ["circle", "cross"], folder / "found"))
    assert len(lines) == 2 and (folder / "found" / "circle.png").is_file()
    with pytest.raises(UserError, match="circle"):
        product.samples("circel")
    assert (folder / "whole" / "pictures" / "0-student.png").is_file()


def test_an_interrupted_matching_resumes_to_the_same_student(run, monkeypatch):
    """Student, fake, both optimisers and the average are in the checkpoint."""
    folder, _ = run
    plain = loop.loop
    monkeypatch.setattr(staging, "loop", lambda *a, **k: plain(*a, **{**k, "log_every": 1, "checkpoint_seconds": 0.0}))
    config = recipe.load(RECIPE, "smoke", {"match.iterations": 4, "match.lr": 2e-3, "match.average": 0.5})
    weights = []
    for name, at in (("unbroken", None), ("broken", 3)):
        monkeypatch.setenv("STILLHOUSE_CACHE", str(folder / f"cache of {name}"))
        done, true = [], Matching.step

        def failing(self, i, true=true, done=done, at=at):
            done.append(i)
            if len(done) == at:
                raise RuntimeError("power")
            return true(self, i)

        monkeypatch.setattr(Matching, "step", failing)
        if at is not None:
            with pytest.raises(RuntimeError, match="power"):
                execute(config, folder / name, cpu=True)
        execute(config, folder / name, cpu=True)
        monkeypatch.setattr(Matching, "step", true)
        assert sorted(set(done)) == [0, 1, 2, 3] and len(done) == 4 + (at is not None)
        weights.append(load_product(folder / name).module.state_dict())
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])

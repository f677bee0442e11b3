"""Losses in chunks equal the plain loss on full logits, in value and gradient, and never make a full tensor of
logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.chunked import linear_cross_entropy, linear_divergence
from stillhouse.functional.counting import counted_mean
from stillhouse.functional.heads import Head
from stillhouse.functional.token_losses import coarse_log_probs, coarse_logits, jsd_rows
from stillhouse.signals import TopK

B, L, V, D, K = 3, 5, 41, 8, 6
BETAS = (0.0, 0.3, 1.0)


class World:
    """A student's head with leaves, a teacher of another width, and a mask."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.leaves = [torch.randn(*shape).to(dtype).requires_grad_() for shape in ((B, L, D), (V, D), (V,))]
        self.student = Head(*self.leaves)
        self.teacher = Head(torch.randn(B, L, 6).to(dtype), torch.randn(V, 6).to(dtype), torch.randn(V).to(dtype))
        self.mask = torch.rand(B, L) > 0.3

    def top(self) -> TopK:
        log_probs, indices = self.teacher.logits().float().log_softmax(-1).topk(K)
        return TopK(log_probs, indices, 1 - log_probs.exp().sum(-1))

    def same(self, mine: Tensor, plain: Tensor, rtol: float = 1e-5) -> None:
        """Equal values, and equal gradients with respect to hidden states, matrix and bias, each of 3 times the
        loss."""
        torch.testing.assert_close(mine, plain, rtol=rtol, atol=1e-6)
        for a, b in zip(torch.autograd.grad(3 * mine, self.leaves), torch.autograd.grad(3 * plain, self.leaves)):
            assert (a - b).abs().max() <= rtol * b.abs().max()


@pytest.mark.parametrize("rows", [1, 4, None])
def test_cross_entropy_in_chunks_is_the_plain_one(rows: int | None) -> None:
    world = World()
    labels = torch.randint(V, (B, L)).masked_fill(~world.mask, -100)
    plain = F.cross_entropy(world.student.logits().flatten(0, 1) / 1.7, labels.flatten())
    world.same(linear_cross_entropy(world.student, labels, temperature=1.7, rows=rows), plain)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("given", ["head", "logits"])
def test_divergences_in_chunks_are_the_plain_ones(beta: float, given: str) -> None:
    world = World()
    logits = world.teacher.logits()
    plain = counted_mean(jsd_rows(world.student.logits() / 2, (logits / 2).log_softmax(-1), beta), world.mask)
    source = world.teacher if given == "head" else logits
    world.same(linear_divergence(world.student, source, beta=beta, temperature=2.0, mask=world.mask, rows=4), plain)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_top_k_teacher_in_chunks_is_the_plain_one(beta: float, temperature: float) -> None:
    world, top = World(), World().top()
    rows = jsd_rows(
        coarse_logits(world.student.logits(), top.indices, temperature), coarse_log_probs(top, V, temperature), beta
    )
    mine = linear_divergence(world.student, top, beta=beta, temperature=temperature, mask=world.mask, rows=4)
    world.same(mine, counted_mean(rows, world.mask))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_row_that_names_fewer_than_k_tokens_is_the_row_of_those_tokens(beta: float) -> None:
    shorter, world = World(), World()
    top = world.top()
    fewer = TopK(
        top.log_probs[..., :2], top.indices[..., :2], (1 - top.log_probs[..., :2].exp().sum(-1)).clamp_min(1e-6)
    )
    padded_probs, padded_indices = top.log_probs.clone(), top.indices.clone()
    padded_probs[..., 2:], padded_indices[..., 2:] = -math.inf, top.indices[..., :1]
    padded = TopK(padded_probs, padded_indices, fewer.tail)
    # the tail's share of the other classes does not matter at temperature 1
    a, b = (
        linear_divergence(world.student, padded, beta=beta, rows=4),
        linear_divergence(shorter.student, fewer, beta=beta, rows=4),
    )
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    a.backward(), b.backward()
    torch.testing.assert_close(world.student.weight.grad, shorter.student.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_top_k_teacher_that_leaves_one_class_out_is_the_full_teacher() -> None:
    world = World()
    logits = world.teacher.logits()
    log_probs, indices = logits.log_softmax(-1).topk(V - 1)
    top = TopK(log_probs, indices, (logits.log_softmax(-1).exp().amin(-1)))
    for temperature in (1.0, 3.0):
        exact = linear_divergence(world.student, logits, temperature=temperature)
        torch.testing.assert_close(
            linear_divergence(world.student, top, temperature=temperature), exact, rtol=1e-4, atol=1e-6
        )


def test_a_teacher_without_tail_or_with_masked_tokens_gives_finite_gradients() -> None:
    world, top = World(), World().top()
    top = TopK(top.log_probs - top.log_probs.logsumexp(-1, keepdim=True), top.indices, torch.zeros(B, L))
    masked = world.teacher.logits().index_fill(-1, torch.tensor([0, 7]), -float("inf"))
    for beta in BETAS[:2]:
        for source in (top, masked):
            grads = torch.autograd.grad(linear_divergence(world.student, source, beta=beta), world.leaves)
            assert all(g.isfinite().all() for g in grads)


def test_half_precision_multiplies_in_half_and_sums_in_float32() -> None:
    world = World(torch.bfloat16)
    plain = jsd_rows(world.student.logits(), world.teacher.logits().float().log_softmax(-1), 0.5).mean()
    mine = linear_divergence(world.student, world.teacher, beta=0.5, rows=4)
    assert mine.dtype == torch.float32
    world.same(mine, plain, rtol=2e-2)


def test_autocast_takes_float32_weights_and_returns_float32_gradients() -> None:
    world = World()
    plain = linear_divergence(world.student, world.teacher)
    with torch.autocast("cpu", torch.bfloat16):
        mine = linear_divergence(world.student, world.teacher)
    assert mine.dtype == torch.float32
    world.same(mine, plain, rtol=3e-2)


def test_the_sum_over_the_count_of_two_halves_is_the_mean_of_the_whole() -> None:
    world = World()
    whole = linear_divergence(world.student, world.teacher, mask=world.mask)
    parts = [
        linear_divergence(
            Head(world.student.hidden[i], world.student.weight, world.student.bias),
            Head(world.teacher.hidden[i], world.teacher.weight, world.teacher.bias),
            mask=world.mask[i],
            reduction="sum",
        )
        for i in range(B)
    ]
    world.same(torch.stack(parts).sum() / world.mask.sum(), whole)


def test_tokens_that_do_not_count_are_not_looked_at() -> None:
    world = World()
    world.teacher.hidden[~world.mask] = float("nan")
    loss = linear_divergence(world.student, world.teacher, mask=world.mask)
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, world.leaves))
    assert linear_divergence(world.student, world.teacher, mask=torch.zeros(B, L, dtype=torch.bool)) == 0


def test_a_frozen_matrix_gets_no_gradient_and_evaluation_makes_none() -> None:
    world = World()
    frozen = Head(world.leaves[0], world.leaves[1].detach())
    linear_divergence(frozen, world.teacher).backward()
    assert world.leaves[0].grad is not None and world.leaves[1].grad is None
    with torch.no_grad():
        assert not linear_divergence(world.student, world.teacher).requires_grad


def test_a_second_backward_is_refused_instead_of_wrong() -> None:
    world = World()
    loss = linear_divergence(world.student, world.teacher)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_no_full_logits_are_held() -> None:
    """4,096 rows of 2,000 tokens are 31 MiB; the chunks, the gradient of the matrix and of the hidden states together
    are under an eighth."""
    student = Head(torch.randn(4096, 8, requires_grad=True), torch.randn(2000, 8, requires_grad=True))
    teacher = Head(torch.randn(4096, 8), torch.randn(2000, 8))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_divergence(student, teacher, rows=64).backward()
    held = most = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        most = max(most, held)
    assert 0 < most < 4096 * 2000 * 4 / 8


def test_what_does_not_fit_is_said_with_its_shapes() -> None:
    world = World()
    with pytest.raises(UserError, match="vocabulary has 41 tokens but the teacher's 40"):
        linear_divergence(world.student, world.teacher.logits()[..., :40])
    with pytest.raises(UserError, match="one width D"):
        linear_cross_entropy(Head(torch.randn(2, 3), torch.randn(4, 5)), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="labels must be from 0 to 40"):
        linear_cross_entropy(world.student, torch.full((B, L), 41))
    with pytest.raises(UserError, match="beta must be from 0"):
        linear_divergence(world.student, world.teacher, beta=1.5)
    with pytest.raises(UserError, match=r"positions of shape \(3, 5\) but the teacher \(15,\)"):
        linear_divergence(world.student, world.teacher.logits().flatten(0, 1))
    with pytest.raises(UserError, match="are all of the 41 classes"):
        linear_divergence(world.student, TopK(torch.zeros(B, L, V), torch.arange(V).expand(B, L, V), torch.zeros(B, L)))
    with pytest.raises(UserError, match="must have one type"):
        linear_cross_entropy(Head(world.leaves[0].bfloat16(), world.leaves[1]), torch.zeros(B, L, dtype=torch.long))

"""GKD and sequence-level KD: the ends of beta, which tokens count, and the same loss from logits, top k and hidden
states."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stillhouse import catalog
from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.functional.counting import step_count
from stillhouse.objectives.gkd import GKD, gkd_loss
from stillhouse.objectives.seq_kd import SeqKD, seq_kd_loss
from stillhouse.signals import Signals, TopK

B, L, V, D = 3, 4, 11, 5
SPAN = Progress()


class World:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.hidden, self.weight = torch.randn(B, L, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
        self.teacher = torch.randn(B, L, V)
        self.label = torch.randint(V, (B, L))
        self.label[0, 2:] = -100

    @property
    def logits(self) -> torch.Tensor:
        return self.hidden @ self.weight.t()

    @property
    def headless(self) -> Signals:
        return Signals(parts={"hidden": self.hidden, "output_weight": self.weight})


def test_its_ends_are_the_forward_and_the_reverse_kl() -> None:
    world = World()
    log_q, log_p = world.logits.log_softmax(-1), world.teacher.log_softmax(-1)
    forward, reverse = (
        F.kl_div(a, b, log_target=True, reduction="none").sum(-1).mean() for a, b in ((log_q, log_p), (log_p, log_q))
    )
    torch.testing.assert_close(gkd_loss(world.logits, world.teacher, 0.0), forward)
    torch.testing.assert_close(gkd_loss(world.logits, world.teacher, 1.0), reverse)
    torch.testing.assert_close(gkd_loss(world.logits, world.teacher, 1e-4) / 1e-4, forward, rtol=1e-2, atol=0)
    torch.testing.assert_close(gkd_loss(world.logits, world.teacher, 1 - 1e-4) / 1e-4, reverse, rtol=1e-2, atol=0)


def test_the_half_is_symmetric_and_bounded_by_log_two() -> None:
    world = World()
    one, other = gkd_loss(world.logits, world.teacher), gkd_loss(world.teacher, world.logits)
    torch.testing.assert_close(one, other)
    assert 0 < gkd_loss(50 * world.logits, 50 * world.teacher) <= torch.log(torch.tensor(2.0)) + 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_hidden_states_give_the_loss_and_gradient_of_logits(beta: float) -> None:
    world = World()
    batch, objective = {"label": world.label}, GKD(beta, temperature=2.0)
    plain = objective(Signals(logits=world.logits), Signals(logits=world.teacher), batch, SPAN)["loss"]
    chunked = objective(world.headless, Signals(logits=world.teacher), batch, SPAN)["loss"]
    torch.testing.assert_close(chunked, plain)
    for a, b in zip(*(torch.autograd.grad(x, (world.hidden, world.weight)) for x in (chunked, plain))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("headless", [False, True])
def test_a_teachers_top_k_teach_and_more_of_them_come_nearer_to_all(headless: bool) -> None:
    world = World()
    student = world.headless if headless else Signals(logits=world.logits)
    losses = []
    for k in (1, 4, V - 1):
        log_probs, indices = world.teacher.log_softmax(-1).topk(k)
        top = TopK(log_probs, indices, 1 - log_probs.exp().sum(-1))
        losses.append(GKD(0.0)(student, Signals(top=top), {"label": world.label}, SPAN)["loss"])
    exact = gkd_loss(world.logits, world.teacher, 0.0, mask=world.label != -100)
    assert losses[0] < losses[1] <= losses[2] + 1e-6
    torch.testing.assert_close(losses[2], exact, rtol=1e-4, atol=1e-6)


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    world = World()
    mask = world.label != -100
    objective = GKD()
    whole = objective(Signals(logits=world.logits), Signals(logits=world.teacher), {"label": world.label}, SPAN)["loss"]
    parts = [
        objective(
            Signals(logits=world.logits[i]),
            Signals(logits=world.teacher[i]),
            {"mask": mask[i], "token_count": mask.sum()},
            SPAN,
        )["loss"]
        for i in range(B)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_the_count_is_of_what_counts_and_never_zero() -> None:
    rows = torch.zeros(2, 3)
    assert step_count({}, rows) == 6
    assert step_count({}, rows, torch.tensor([[True, False, False]] * 2)) == 2
    assert step_count({}, rows, torch.zeros(2, 3, dtype=torch.bool)) == 1
    assert step_count({"token_count": 40}, rows) == 40


def test_no_token_that_counts_gives_zero_and_no_gradient() -> None:
    world = World()
    for student in (Signals(logits=world.logits), world.headless):
        loss = GKD()(student, Signals(logits=world.teacher), {"label": torch.full((B, L), -100)}, SPAN)["loss"]
        assert loss == 0
        assert torch.autograd.grad(loss, world.hidden)[0].abs().sum() == 0


def test_sequence_level_kd_is_the_likelihood_of_the_teachers_tokens() -> None:
    world = World()
    token = SeqKD()(Signals(logits=world.logits), Signals(), {"label": world.label}, SPAN)["loss"]
    torch.testing.assert_close(token, F.cross_entropy(world.logits.flatten(0, 1), world.label.flatten()))
    sequence = SeqKD("sequence")(Signals(logits=world.logits), Signals(), {"label": world.label}, SPAN)["loss"]
    torch.testing.assert_close(
        sequence, F.cross_entropy(world.logits.flatten(0, 1), world.label.flatten(), reduction="sum") / B
    )
    for average, plain in (("token", token), ("sequence", sequence)):
        chunked = SeqKD(average)(world.headless, Signals(), {"label": world.label}, SPAN)["loss"]
        torch.testing.assert_close(chunked, plain)


def test_mistakes_are_said() -> None:
    world = World()
    with pytest.raises(UserError, match="beta must be from 0"):
        GKD(beta=-0.1)
    with pytest.raises(UserError, match="vocabulary has 11 tokens but the teacher's 10"):
        GKD()(Signals(logits=world.logits), Signals(logits=world.teacher[..., :10]), {}, SPAN)
    with pytest.raises(UserError, match="neither logits nor the part 'output_weight'"):
        GKD()(Signals(parts={"hidden": world.hidden}), Signals(logits=world.teacher), {}, SPAN)
    with pytest.raises(UserError, match="seq_kd: tokens must have shape"):
        seq_kd_loss(world.logits, world.label[:, :2])
    with pytest.raises(UserError, match="seq_kd: labels must be class ids from 0 to 10"):
        seq_kd_loss(world.logits, world.label.clamp_min(0) + V)


@pytest.mark.parametrize("name", ["gkd", "seq_kd", "taid", "token_divergence", "sinkd"])
def test_no_step_reads_a_value_back_from_the_device(name: str) -> None:
    objective = catalog.objective(name)(**({"tokens": 4} if name == "sinkd" else {})).to("meta")
    student = torch.randn(B, L, V, device="meta", requires_grad=True)
    teacher = torch.randn(B, L, V, device="meta")
    batch = {"label": torch.zeros(B, L, dtype=torch.long, device="meta")}
    terms = objective(Signals(logits=student), Signals(logits=teacher), batch, SPAN)
    torch.stack([v for k, v in terms.items() if not k.startswith("log:")]).sum().backward()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_no_chunk_reads_a_value_back_from_the_device(beta: float) -> None:
    made = lambda *shape: torch.randn(*shape, device="meta", requires_grad=True)  # noqa: E731
    student = Signals(parts={"hidden": made(B, L, D), "output_weight": made(V, D), "output_bias": made(V)})
    teacher = Signals(parts={"hidden": made(B, L, 2), "output_weight": made(V, 2)})
    top = Signals(top=TopK(made(B, L, 3), torch.zeros(B, L, 3, dtype=torch.long, device="meta"), made(B, L)))
    batch = {"label": torch.zeros(B, L, dtype=torch.long, device="meta")}
    for source in (teacher, top):
        GKD(beta).to("meta")(student, source, batch, SPAN)["loss"].backward()
    SeqKD()(student, Signals(), batch, SPAN)["loss"].backward()

"""TAID: where its target lies, how t moves and is kept, and the divergences it is compared with."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.functional.token_losses import cross_entropy_rows, reverse_kl_rows, total_variation_rows
from stillhouse.objectives.taid import TAID, taid_rows, taid_target
from stillhouse.objectives.token_divergence import TokenDivergence, divergence_rows
from stillhouse.signals import Signals, TopK

B, L, V = 2, 4, 7


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, L, V, requires_grad=True), 2 * torch.randn(B, L, V)


def steps(taid: TAID, losses: int, teacher: torch.Tensor, batch: dict | None = None) -> list[float]:
    """t after each of some calls on students that come nearer to the teacher."""
    seen = []
    for step in range(losses):
        student = teacher * (0.2 + 0.6 * step / losses)
        taid(
            Signals(logits=student),
            Signals(logits=teacher),
            batch or {},
            Progress(step=step, batch=step, steps_per_epoch=losses),
        )
        seen.append(taid.t.item())
    return seen


def test_at_one_it_is_the_forward_cross_entropy(logits) -> None:
    student, teacher = logits
    torch.testing.assert_close(taid_rows(student, teacher, 1.0), cross_entropy_rows(student, teacher.log_softmax(-1)))


def test_at_zero_the_gradient_is_zero_and_the_loss_the_students_entropy(logits) -> None:
    student, teacher = logits
    rows = taid_rows(student, teacher, 0.0)
    q = student.softmax(-1)
    torch.testing.assert_close(rows, -(q * q.log()).sum(-1))
    assert torch.autograd.grad(rows.sum(), student)[0].abs().max() < 1e-6


def test_the_gradient_is_that_of_q_minus_the_target_whichever_value_is_reported(logits) -> None:
    student, teacher = logits
    expected = student.softmax(-1) - taid_target(student, teacher, 0.3).exp()
    for value in ("ce", "kl"):
        grad = torch.autograd.grad(taid_rows(student, teacher, 0.3, value).sum(), student)[0]
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)
    assert (taid_rows(student, teacher, 0.3, "kl") >= -1e-6).all()


def test_masked_classes_have_no_probability_and_break_nothing(logits) -> None:
    student, teacher = (x.detach().clone() for x in logits)
    student[..., 2] = -math.inf
    teacher[..., 4] = -math.inf
    student.requires_grad_()
    for t in (0.0, 0.4, 1.0):
        rows = taid_rows(student, teacher, t)
        assert rows.isfinite().all() and torch.autograd.grad(rows.sum(), student)[0].isfinite().all()
        assert taid_target(student, teacher, t).exp()[..., [2, 4]].sum() == 0


def test_t_never_falls_stays_above_the_ramp_and_ends_at_its_end(logits) -> None:
    taid = TAID(t_start=0.2, alpha=0.3, beta=0.9)
    seen = steps(taid, 20, logits[1])
    assert seen[0] == pytest.approx(0.2)  # the first call only looks
    assert all(a <= b for a, b in pairwise(seen)) and seen[-1] <= 1.0
    assert all(t >= 0.2 + 0.8 * step / 20 - 1e-6 for step, t in enumerate(seen) if step)


def test_without_adaptation_t_is_the_ramp(logits) -> None:
    seen = steps(TAID(t_start=0.2, adaptive=False, total_steps=10), 10, logits[1])
    torch.testing.assert_close(torch.tensor(seen), torch.tensor([0.2 + 0.08 * step for step in range(10)]))


def test_a_restored_objective_goes_on_where_it_was(logits) -> None:
    whole = TAID(alpha=0.1, beta=0.9)
    expected = steps(whole, 12, logits[1])
    first, second = TAID(alpha=0.1, beta=0.9), TAID(alpha=0.1, beta=0.9)
    teacher = logits[1]
    for step in range(12):
        taid = first if step < 5 else second
        if step == 5:
            second.load_state_dict(first.state_dict())
        student = teacher * (0.2 + 0.6 * step / 12)
        taid(Signals(logits=student), Signals(logits=teacher), {}, Progress(step=step, batch=step, steps_per_epoch=12))
        assert taid.t.item() == expected[step]


def test_evaluation_empty_batches_and_broken_losses_leave_t_alone(logits) -> None:
    student, teacher = logits
    taid = TAID(alpha=0.5)
    steps(taid, 3, teacher)
    kept = [x.clone() for x in taid.buffers()]
    nothing = {"mask": torch.zeros(B, L, dtype=torch.bool)}
    assert taid(Signals(logits=student), Signals(logits=teacher), nothing, Progress())["loss"] == 0
    taid(Signals(logits=student * math.nan), Signals(logits=teacher), {}, Progress())
    taid.eval()(Signals(logits=student), Signals(logits=teacher), {}, Progress(step=9))
    assert all(torch.equal(a, b) for a, b in zip(taid.buffers(), kept))


def test_only_tokens_that_count_are_in_the_mean(logits) -> None:
    student, teacher = logits
    label = torch.zeros(B, L, dtype=torch.long)
    label[0] = -100
    by_label = TAID()(Signals(logits=student), Signals(logits=teacher), {"label": label}, Progress())["loss"]
    by_mask = TAID()(Signals(logits=student), Signals(logits=teacher), {"mask": label == 0}, Progress())["loss"]
    alone = TAID()(Signals(logits=student[1:]), Signals(logits=teacher[1:]), {}, Progress())["loss"]
    torch.testing.assert_close(by_label, alone)
    torch.testing.assert_close(by_mask, alone)


def test_the_target_of_one_bump_starts_at_the_student_and_ends_at_forward_kl() -> None:
    """A teacher of two modes and a student of one (mean and width): along t the same training goes from no gradient to
    the moments of the teacher."""
    places = torch.arange(60.0)
    teacher = torch.logaddexp(-((places - 15) ** 2) / 18, -((places - 45) ** 2) / 18)
    shape = torch.tensor([0.0, 1.5], requires_grad=True)  # of the mean in units of 10 around 30, and of the log width

    def student() -> torch.Tensor:
        return -((places - 30 - 10 * shape[0] - 2) ** 2) / (2 * (2 * shape[1]).exp())

    assert torch.autograd.grad(taid_rows(student(), teacher, 0.0), shape)[0].abs().max() < 1e-5
    optimizer = torch.optim.Adam([shape], lr=0.05)
    for step in range(400):
        optimizer.zero_grad()
        taid_rows(student(), teacher, min(1.0, step / 200)).backward()
        optimizer.step()
    p, q = teacher.softmax(0), student().softmax(0)
    assert (q @ places - p @ places).abs() < 1 and (q @ (places - 30) ** 2 / (p @ (places - 30) ** 2) - 1).abs() < 0.1


@pytest.mark.parametrize("value", ["ce", "kl"])
def test_hidden_states_give_the_loss_gradient_and_t_of_logits(value: str) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(B, L, 5, requires_grad=True), torch.randn(V, 5, requires_grad=True)]
    teacher = Signals(parts={"hidden": torch.randn(B, L, 3), "output_weight": torch.randn(V, 3)})
    logits = Signals(logits=teacher.parts["hidden"] @ teacher.parts["output_weight"].t())
    plain, chunked = (TAID(alpha=0.3, value=value) for _ in range(2))  # type: ignore[arg-type]
    batch = {"mask": torch.rand(B, L) > 0.3}
    for step in range(4):
        hidden, weight = leaves[0] * (1 + step), leaves[1]
        at = Progress(step=step, batch=step, steps_per_epoch=10)
        a = plain(Signals(logits=hidden @ weight.t()), logits, batch, at)["loss"]
        for source in (teacher, logits):
            b = chunked.eval()(Signals(parts={"hidden": hidden, "output_weight": weight}), source, batch, at)["loss"]
            torch.testing.assert_close(b, a)
            for x, y in zip(
                torch.autograd.grad(b, leaves, retain_graph=True), torch.autograd.grad(a, leaves, retain_graph=True)
            ):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        chunked.train()(Signals(parts={"hidden": hidden, "output_weight": weight}), teacher, batch, at)
        torch.testing.assert_close(chunked.t, plain.t)


def test_baselines_keep_their_identities(logits) -> None:
    student, teacher = logits
    p = teacher.log_softmax(-1)
    entropy = -(p.exp() * p).sum(-1)
    torch.testing.assert_close(divergence_rows(teacher, p, "reverse"), torch.zeros(B, L), rtol=0, atol=1e-5)
    torch.testing.assert_close(divergence_rows(teacher, p, "js"), torch.zeros(B, L), rtol=0, atol=1e-5)
    for name in ("forward", "skew_forward"):
        torch.testing.assert_close(divergence_rows(teacher, p, name), entropy)
    assert (divergence_rows(student, p, "skew_reverse") < reverse_kl_rows(student, p)).all()
    assert (total_variation_rows(student, p) <= 1).all()
    weighted = divergence_rows(student, p, "adaptive")
    ends = torch.stack([divergence_rows(student, p, "forward"), divergence_rows(student, p, "reverse")])
    assert (weighted <= ends.amax(0) + 1e-5).all() and (weighted >= ends.amin(0) - 1e-5).all()


def test_half_precision_is_computed_in_float32(logits) -> None:
    half = [x.detach().bfloat16() for x in logits]
    with torch.autocast("cpu", torch.bfloat16):
        rows = taid_rows(*half, 0.4)
    torch.testing.assert_close(rows, taid_rows(*[x.float() for x in half], 0.4))


def test_mistakes_are_said(logits) -> None:
    with pytest.raises(UserError, match="t_start must be from 0 to below 1"):
        TAID(t_start=0.9, t_end=0.5)
    with pytest.raises(UserError, match="alpha must be from 0 to 1"):
        TAID(alpha=2.0)
    with pytest.raises(UserError, match="vocabulary has 7 tokens but the teacher's 9"):
        TAID()(Signals(logits=logits[0]), Signals(logits=torch.randn(B, L, 9)), {}, Progress())
    with pytest.raises(UserError, match="mask has shape"):
        TAID()(
            Signals(logits=logits[0]), Signals(logits=logits[1]), {"mask": torch.ones(B, dtype=torch.bool)}, Progress()
        )
    with pytest.raises(UserError, match="did you mean 'reverse'"):
        TokenDivergence("revers")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="share is between 0 and 1"):
        TokenDivergence("forward", 0.3)


def test_an_ensemble_teaches(logits) -> None:
    student, teacher = logits
    several = Signals(members=(Signals(logits=teacher), Signals(logits=teacher)))
    alone = TAID()(Signals(logits=student), Signals(logits=teacher), {}, Progress())["loss"]
    torch.testing.assert_close(TAID()(Signals(logits=student), several, {}, Progress())["loss"], alone)
    assert F.cross_entropy(student.flatten(0, 1), teacher.flatten(0, 1).softmax(-1)) != alone


@pytest.mark.parametrize(
    "objective",
    [
        TAID(adaptive=False),
        *map(TokenDivergence, ("forward", "reverse", "js", "total_variation", "skew_reverse")),
    ],
    ids=lambda o: getattr(o, "divergence", o.name),
)
def test_all_but_one_of_a_teachers_classes_teach_as_all_of_them(objective, logits) -> None:
    student, teacher = logits
    log_probs, indices = teacher.log_softmax(-1).topk(V - 1)
    top = TopK(log_probs, indices, (1 - log_probs.exp().sum(-1)).clamp_min(0))
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, 0] = False
    exact, known = (
        objective(Signals(logits=student), given, {"mask": mask}, Progress())["loss"]
        for given in (Signals(logits=teacher), Signals(top=top))
    )
    torch.testing.assert_close(known, exact, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(known, student), torch.autograd.grad(exact, student)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_place_of_which_a_teacher_told_nothing_counts_for_nothing(logits) -> None:
    student, teacher = logits
    log_probs, indices = teacher.log_softmax(-1).topk(3)
    tail = 1 - log_probs.exp().sum(-1)
    log_probs[0, 1:] = -math.inf
    for objective in (TAID(adaptive=False), TokenDivergence("reverse")):
        signals = Signals(top=TopK(log_probs, indices, tail))
        loss = objective(Signals(logits=student), signals, {}, Progress())["loss"]
        grad = torch.autograd.grad(loss, student)[0]
        assert grad.isfinite().all() and not grad[0, 1:].any() and grad[0, 0].any()

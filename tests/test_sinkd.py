"""SinKD: the plan's identities, what the distance measures, and the objective on samples and on tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.objectives.sinkd import SinKD, annealed, sinkhorn_cost, sinkhorn_distance, sinkhorn_plan
from stillhouse.signals import Signals

N, C = 12, 5


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (3 * torch.randn(N, C)).requires_grad_(), 3 * torch.randn(N, C)


def test_columns_of_the_plan_sum_to_one_and_its_mass_is_the_batch(logits) -> None:
    plan = sinkhorn_plan(sinkhorn_cost(logits[0].softmax(1), logits[1].softmax(1)))
    torch.testing.assert_close(plan.sum(0), torch.ones(N), rtol=1e-5, atol=1e-5)
    assert (plan.sum(1) - 1).abs().max() < 0.1


def test_one_sample_costs_its_l1_distance() -> None:
    student, teacher = torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([[0.0, 0.5, 3.0]])
    expected = ((student / 2).softmax(1) - (teacher / 2).softmax(1)).abs().sum()
    torch.testing.assert_close(sinkhorn_distance(student, teacher), expected)


def test_the_distance_is_one_of_sets_and_ignores_constants(logits) -> None:
    student, teacher = logits
    whole = sinkhorn_distance(student, teacher)
    torch.testing.assert_close(sinkhorn_distance(student, teacher[torch.randperm(N)]), whole)
    torch.testing.assert_close(sinkhorn_distance(student[torch.randperm(N)], teacher + 7), whole)
    assert 0 < whole <= 2 * N


def test_a_large_epsilon_gives_the_mean_cost(logits) -> None:
    cost = sinkhorn_cost(logits[0].softmax(1), logits[1].softmax(1))
    plan = sinkhorn_plan(cost, epsilon=1e5)
    torch.testing.assert_close(plan, torch.full((N, N), 1 / N), rtol=1e-4, atol=1e-6)


def test_logarithms_give_the_plan_of_the_plain_form_and_stand_a_tiny_epsilon(
    logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = sinkhorn_cost(logits[0].softmax(1), logits[1].softmax(1))
    plain = sinkhorn_plan(cost, 0.1)
    monkeypatch.setattr("stillhouse.objectives.sinkd.LOG_DOMAIN", 1.0)
    torch.testing.assert_close(sinkhorn_plan(cost, 0.1), plain, rtol=1e-5, atol=1e-6)
    loss = sinkhorn_distance(*logits, epsilon=1e-3)
    loss.backward()
    assert loss.isfinite() and logits[0].grad.isfinite().all()


def test_descending_the_distance_brings_the_cloud_to_the_teachers(logits) -> None:
    torch.manual_seed(0)
    student, teacher = (0.1 * torch.randn(N, C)).requires_grad_(), logits[1]
    floor = sinkhorn_distance(teacher, teacher)
    before = sinkhorn_distance(student, teacher).item()
    optimizer = torch.optim.Adam([student], lr=0.2)
    for _ in range(150):
        optimizer.zero_grad()
        sinkhorn_distance(student, teacher).backward()
        optimizer.step()
    after = sinkhorn_distance(student, teacher).item()
    assert after < floor.item() + 0.1 * (before - floor.item())
    nearest = sinkhorn_cost((student / 2).softmax(1), (teacher / 2).softmax(1)).amin(0)  # of each teacher's row
    assert nearest.median() < 0.25


def test_the_distance_stays_bounded_where_kl_grows_without_end() -> None:
    student, teacher = torch.eye(2)[[0, 0]], torch.eye(2)[[1, 1]]
    far = [F.kl_div((s * student).log_softmax(1), (s * teacher).softmax(1), reduction="batchmean") for s in (50, 100)]
    assert far[1] > 1.9 * far[0]
    assert sinkhorn_distance(100 * student, 100 * teacher) <= 4 + 1e-5


def test_the_gradient_through_the_plan_is_another_than_through_the_cost_alone(logits) -> None:
    student, teacher = logits
    through = torch.autograd.grad(sinkhorn_distance(student, teacher), student)[0]
    alone = torch.autograd.grad(sinkhorn_distance(student, teacher, detach_plan=True), student)[0]
    assert (through - alone).abs().max() > 1e-3 * through.abs().max()


def test_the_mean_is_the_sum_over_the_batch(logits) -> None:
    torch.testing.assert_close(sinkhorn_distance(*logits, reduction="mean"), sinkhorn_distance(*logits) / N)


@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_rows_that_do_not_count_are_as_if_absent(logits, epsilon: float) -> None:
    student, teacher = logits
    counts = torch.arange(N) % 3 > 0
    masked = sinkhorn_distance(student, teacher, epsilon=epsilon, reduction="mean", counts=counts)
    without = sinkhorn_distance(student[counts], teacher[counts], epsilon=epsilon, reduction="mean")
    torch.testing.assert_close(masked, without, rtol=1e-4, atol=1e-6)
    grad = torch.autograd.grad(masked, student)[0]
    assert grad.isfinite().all() and (grad[~counts] == 0).all()


def test_tokens_that_count_are_drawn_and_padding_is_not() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 9, C, requires_grad=True), torch.randn(4, 9, C)
    label = torch.full((4, 9), -100)
    label[:, 3:6] = 1
    terms = SinKD(tokens=8)(Signals(logits=student), Signals(logits=teacher), {"label": label}, Progress())
    terms["sinkhorn"].backward()
    touched = student.grad.abs().sum(-1) > 0
    assert touched.sum() == 8 and not touched[label == -100].any()


def test_the_temperature_is_annealed_to_one_and_one_epoch_does_not_divide_by_zero() -> None:
    assert annealed(4.0, 0, 4) == 4.0 and annealed(4.0, 3, 4) == 1.0 and annealed(4.0, 0, 1) == 4.0


def test_regression_heads_get_a_squared_distance_and_a_warning() -> None:
    student, teacher = torch.tensor([[1.0], [3.0]], requires_grad=True), torch.tensor([[0.0], [1.0]])
    with pytest.warns(UserWarning, match="one class"):
        terms = SinKD(alpha=1.0, kd_temperature=1.0)(Signals(logits=student), Signals(logits=teacher), {}, Progress())
    torch.testing.assert_close(terms["kd"], torch.tensor(2.5))
    assert terms["sinkhorn"] == 0


def test_half_precision_is_computed_in_float32(logits) -> None:
    half = [x.detach().bfloat16() for x in logits]
    with torch.autocast("cpu", torch.bfloat16):
        loss = sinkhorn_distance(*half)
    torch.testing.assert_close(loss, sinkhorn_distance(*[x.float() for x in half]))


def test_mistakes_are_said(logits) -> None:
    student, teacher = logits
    with pytest.raises(UserError, match="epsilon must be above 0"):
        SinKD(epsilon=0.0)
    with pytest.raises(UserError, match="iterations must be above 0"):
        sinkhorn_plan(torch.zeros(2, 2), iterations=0)
    with pytest.raises(UserError, match="5 tokens but the teacher's 4"):
        sinkhorn_distance(student, teacher[:, :4])
    with pytest.raises(UserError, match="both must score the same classes"):
        sinkhorn_distance(student, teacher[:4])
    with pytest.raises(UserError, match=r"shape \(N, C\)"):
        sinkhorn_distance(student[0], teacher[0])


def test_training_with_the_term_brings_predictions_of_other_batches_nearer() -> None:
    """Digits: a student with KD and the term against one with KD alone, by the distance from the teacher on images that
    neither saw."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)

    def trained(widths: list[int], loss, epochs: int) -> torch.nn.Sequential:
        torch.manual_seed(0)
        layers = [m for a, b in zip([64, *widths], [*widths, 10]) for m in (torch.nn.Linear(a, b), torch.nn.ReLU())]
        network = torch.nn.Sequential(*layers[:-1])
        optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
        for step in range(epochs * 15):
            part = torch.arange(64) + 64 * (step % 15)
            optimizer.zero_grad()
            loss(network(x[part]), part).backward()
            optimizer.step()
        return network.requires_grad_(False)

    teacher = trained([64], lambda z, part: F.cross_entropy(z, y[part]), 8)

    def distance(scale: float) -> float:
        objective = SinKD(alpha=1.0, reduction="mean", scale=scale)

        def loss(z: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
            return sum(objective(Signals(logits=z), Signals(logits=teacher(x[part])), {}, Progress()).values())

        student = trained([8], loss, 12)
        return sum(
            sinkhorn_distance(student(x[part]), teacher(x[part])).item() for part in torch.arange(1000, 1768).split(64)
        )

    assert distance(1.0) < 0.95 * distance(0.0)

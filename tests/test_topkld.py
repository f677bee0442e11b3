"""TopKLD: the card's worked values, its limits, its gradient, which tokens count; and a run on words."""

from __future__ import annotations

import math

import pytest
import torch

from stillhouse import catalog
from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.functional.token_losses import forward_kl_rows, reverse_kl_rows
from stillhouse.objectives.topkld import TopKLD, top_mask, topkld_rows
from stillhouse.signals import Signals

P, Q = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.5, 0.3, 0.2]).log()


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(*shape, generator=draw, dtype=dtype) for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.mark.parametrize(
    ("top", "value"),
    [
        ("reverse", 0.5 * math.log(0.5 / 0.7) + 0.2 + 0.2 * math.log(2 / 3) + 0.1 + 0.1 * math.log(0.5) + 0.1),
        ("forward", 0.7 * math.log(1.4) - 0.2 + 0.3 * math.log(1.5) - 0.1 + 0.2 * math.log(2) - 0.1),
    ],
)
def test_a_case_by_hand(top: str, value: float) -> None:
    assert topkld_rows(Q, P, 1, top).item() == pytest.approx(value, abs=1e-6)
    assert value == pytest.approx({"reverse": 0.0813562, "forward": 0.0957995}[top], abs=1e-6)


def test_its_limits_are_the_reverse_and_the_forward_kl() -> None:
    student, teacher = drawn(4, 5, 9)
    log_p = teacher.log_softmax(-1)
    for k, rows in ((9, reverse_kl_rows), (20, reverse_kl_rows), (0, forward_kl_rows), (-1, forward_kl_rows)):
        torch.testing.assert_close(topkld_rows(student, teacher, k), rows(student, log_p))
    torch.testing.assert_close(topkld_rows(student, teacher, 9, "forward"), forward_kl_rows(student, log_p))
    torch.testing.assert_close(topkld_rows(student, teacher, 9, plain=True), reverse_kl_rows(student, log_p))


@pytest.mark.parametrize("k", range(8))
def test_it_is_never_negative_and_both_directions_add_up(k: int) -> None:
    student, teacher = drawn(50, 7)
    one, other = (topkld_rows(student, teacher, k, top) for top in ("reverse", "forward"))
    assert bool((one >= 0).all()) and bool((other >= 0).all())
    log_p = teacher.log_softmax(-1)
    torch.testing.assert_close(one + other, forward_kl_rows(student, log_p) + reverse_kl_rows(student, log_p))


def test_without_the_further_terms_it_can_be_negative() -> None:
    assert topkld_rows(Q, P, 1, plain=True) < 0


def test_equal_distributions_cost_nothing_and_pull_nowhere() -> None:
    _, teacher = drawn(3, 6)
    student = (teacher + 1.5).requires_grad_()
    loss = topkld_rows(student, teacher, 2).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    assert abs(loss.item()) < 1e-12 and gradient.abs().max() < 1e-12
    assert topkld_rows(teacher + torch.eye(6)[0], teacher, 2).min() > 1e-3


def test_it_does_not_depend_on_the_order_of_tokens_or_a_constant() -> None:
    student, teacher = drawn(5, 8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    expected = topkld_rows(student, teacher, 3)
    torch.testing.assert_close(topkld_rows(student[:, order], teacher[:, order], 3), expected)
    torch.testing.assert_close(topkld_rows(student - 2, teacher + 7, 3), expected)


@pytest.mark.parametrize("top", ["reverse", "forward"])
def test_the_gradient_is_that_of_the_formula(top: str) -> None:
    student, teacher = drawn(6, 7)
    (gradient,) = torch.autograd.grad(topkld_rows(student, teacher, 3, top).sum(), student)
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    part = top_mask(teacher, 3) == (top == "reverse")
    g = torch.where(part, (q / p).log(), 1 - p / q)
    torch.testing.assert_close(gradient, q * (g - (q * g).sum(-1, keepdim=True)))


def test_k_is_counted_on_the_teacher_and_ties_go_by_index() -> None:
    mask = top_mask(torch.tensor([[0.0, 1.0, 1.0, 1.0]]), 2)
    assert mask.tolist() == [[False, True, True, False]]
    student, teacher = drawn(2, 4)
    changed = student.detach().flip(-1)
    assert torch.equal(top_mask(teacher, 2), top_mask(teacher + 0 * changed, 2))


def test_half_precision_and_tiny_probabilities_are_finite() -> None:
    teacher = torch.tensor([[0.0, -60.0, -90.0, 30.0]], dtype=torch.float16)
    student = torch.tensor([[30.0, 0.0, 20.0, -60.0]], dtype=torch.float16).requires_grad_()
    for k in (0, 1, 2, 4):
        loss = topkld_rows(student, teacher, k).sum()
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.dtype == torch.float32 and loss.isfinite() and gradient.isfinite().all()


def test_padding_leaves_the_mean() -> None:
    student, teacher = drawn(2, 3, 10, dtype=torch.float32)
    label = torch.zeros(2, 3, dtype=torch.long)
    label[1, 1:] = -100
    value = TopKLD(k=2)(Signals(logits=student), Signals(logits=teacher), {"label": label}, Progress())["loss"]
    rows = topkld_rows(student, teacher, 2)
    torch.testing.assert_close(value, rows[label == 0].mean())
    assert TopKLD().size(4096) == 901 and TopKLD(share=0.02).size(64) == 1 and TopKLD(k=900).size(4096) == 900


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"top": "both"}, "direction of topkld"), ({"share": 1.5}, "from 0 to 1"), ({"temperature": 0.0}, "above 0")],
)
def test_mistakes_get_a_sentence(options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        TopKLD(**options)


def test_k_must_be_a_whole_number_and_vocabularies_equal() -> None:
    with pytest.raises(UserError, match="whole number"):
        topkld_rows(Q, P, 1.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="vocabulary"):
        TopKLD(k=1)(Signals(logits=Q[None]), Signals(logits=torch.zeros(1, 4)), {}, Progress())
    assert catalog.objective("topkld") is TopKLD

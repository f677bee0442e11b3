"""BD-KD: both divergences, which one a sample stresses, and that neither network reaches into the other."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.distillation.teachers import CoTrainedTeacher
from stillhouse.errors import UserError
from stillhouse.objectives.bd_kd import BDKD, balanced_divergence, divergences, peer_divergence, surer
from stillhouse.signals import Batch


def logits(seed: int, n: int = 16, classes: int = 5) -> Tensor:
    return 3 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def module(batch: Batch, teacher: nn.Module | None = None, **options: float) -> Distillation:
    torch.manual_seed(0)
    student, peer = nn.Linear(6, 5), nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 5))
    return Distillation(student, teacher or CoTrainedTeacher(peer), [BDKD(**options)]).build(batch)


@pytest.fixture
def batch() -> Batch:
    return {"input": logits(5, classes=6), "label": torch.arange(16) % 5}


def test_the_divergences_match_a_hand_calculation() -> None:
    teacher, student = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.6, 0.4]]).log()
    forward, reverse = divergences(student, teacher)
    assert forward.item() == pytest.approx(0.8 * math.log(4 / 3) + 0.2 * math.log(1 / 2), abs=1e-6)
    assert reverse.item() == pytest.approx(0.6 * math.log(3 / 4) + 0.4 * math.log(2), abs=1e-6)
    assert not surer(student, teacher).item()
    assert balanced_divergence(student, teacher, temperature=1.0, delta=2.0).item() == pytest.approx(
        0.3008155, abs=1e-6
    )
    assert balanced_divergence(student, teacher, 1.0, 2.0, rule="swap").item() == pytest.approx(
        2 * 0.0915162 + 0.1046496, abs=1e-6
    )


def test_equal_predictions_teach_nothing() -> None:
    z = logits(0).requires_grad_()
    value = balanced_divergence(z, z.detach().clone())
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(z.grad, torch.zeros_like(z), rtol=0, atol=1e-6)


def test_delta_one_is_the_plain_sum_of_both_divergences() -> None:
    s, t = logits(0), logits(1)
    forward, reverse = divergences(s, t, 3.0)
    for rule in ("default", "swap"):
        torch.testing.assert_close(balanced_divergence(s, t, 3.0, delta=1.0, rule=rule), 9 * (forward + reverse).mean())


def test_exchanging_the_networks_exchanges_the_divergences_and_the_rule() -> None:
    s, t = logits(0), logits(1)
    torch.testing.assert_close(divergences(s, t), divergences(t, s)[::-1])
    assert torch.equal(surer(s, t), ~surer(t, s))
    torch.testing.assert_close(balanced_divergence(s, t, 2.0, 5.0), balanced_divergence(t, s, 2.0, 5.0))


def test_a_sure_student_is_held_by_the_forward_divergence() -> None:
    sharp, flat = torch.tensor([[6.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.5]])
    forward, reverse = divergences(sharp, flat)
    torch.testing.assert_close(balanced_divergence(sharp, flat, 1.0, 10.0), (10 * forward + reverse).mean())
    forward, reverse = divergences(flat, sharp)
    torch.testing.assert_close(balanced_divergence(flat, sharp, 1.0, 10.0), (forward + 10 * reverse).mean())


def test_the_gradients_are_the_closed_forms() -> None:
    temperature = 2.5
    s, t = logits(0).double().requires_grad_(), logits(1).double()
    p_s, p_t = (s / temperature).softmax(1).detach(), (t / temperature).softmax(1)
    forward, reverse = divergences(s, t, temperature)
    (grad_f,) = torch.autograd.grad(forward.sum(), s, retain_graph=True)
    (grad_r,) = torch.autograd.grad(reverse.sum(), s)
    torch.testing.assert_close(grad_f, (p_s - p_t) / temperature)
    torch.testing.assert_close(grad_r, p_s * (p_s.log() - p_t.log() - reverse.detach()[:, None]) / temperature)


def test_a_certain_teacher_gives_a_finite_reverse_term() -> None:
    s = torch.tensor([[0.0, 0.0]], requires_grad=True)
    value = balanced_divergence(s, torch.tensor([[1000.0, -1000.0]]), 1.0)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(s.grad).all()


def test_neither_side_sends_gradient_into_the_other(batch: Batch) -> None:
    trained = module(batch)
    peer = trained.teachers["teacher"].model
    for term, learns, rests in (
        ("student", trained.student, peer),
        ("peer", peer, trained.student),
        ("peer_ce", peer, trained.student),
    ):
        trained.zero_grad()
        trained(batch, Progress())["bd_kd." + term].backward()
        assert all(p.grad.abs().sum() > 0 for p in learns.parameters()), term
        assert all(p.grad is None or not p.grad.any() for p in rests.parameters()), term


def test_both_networks_are_optimised_and_saved(batch: Batch) -> None:
    trained = module(batch, temperature=2.0)
    held = {id(p) for g in trained.param_groups() for p in g["params"]}
    assert held == {id(p) for p in (*trained.student.parameters(), *trained.teachers["teacher"].parameters())}
    assert len(trained.state_dict()) >= 6
    terms = trained(batch, Progress())
    said = trained.teachers["teacher"].model(batch["input"])
    torch.testing.assert_close(terms["bd_kd.peer_ce"], F.cross_entropy(said, batch["label"]))
    torch.testing.assert_close(terms["bd_kd.peer"], peer_divergence(trained.student(batch["input"]), said, 2.0))
    torch.testing.assert_close(terms["loss"], terms["bd_kd.student"] + terms["bd_kd.peer_ce"] + terms["bd_kd.peer"])


def test_a_frozen_teacher_a_shared_network_and_wrong_options_get_a_sentence(batch: Batch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="peer:"):
        module(batch, nn.Linear(6, 5)).train()(batch, Progress())
    with pytest.raises(UserError, match="3 classes"):
        module(batch, CoTrainedTeacher(nn.Linear(6, 3)))
    for wrong in ({"delta": -1.0}, {"temperature": 0.0}, {"entropy_temperature": -2.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            BDKD(**wrong)
    same = nn.Linear(6, 5)
    with pytest.raises(UserError, match="shares"):
        Distillation(same, CoTrainedTeacher(same), [BDKD()]).build(batch)

"""PS-KD: targets, the growing share, the past by index, and what must stop a user."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.distillation.teachers import PastSelf
from stillhouse.errors import UserError
from stillhouse.objectives.ps_kd import PSKD, calibration, ps_kd_loss, refined_targets, share
from stillhouse.signals import Batch


class Here:
    """The part of a training context that the objective reads."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student


def data(n: int = 12, classes: int = 4) -> Batch:
    torch.manual_seed(0)
    return {"input": torch.randn(n, 5), "label": torch.arange(n) % classes, "index": torch.arange(n)}


def trainer(objective: PSKD, batch: Batch) -> Distillation:
    torch.manual_seed(1)
    past = PastSelf()
    past.start(batch["label"], 4)
    module = Distillation(nn.Linear(5, 4), past if objective.past == "table" else None, [objective])
    module.build(batch)
    return module


def epoch(module: Distillation, sgd: torch.optim.Optimizer, batch: Batch, number: int, epochs: int) -> Tensor:
    progress = Progress(epoch=number, epochs=epochs)
    terms = module(batch, progress)
    sgd.zero_grad()
    terms["loss"].backward()
    sgd.step()
    module.after_step(batch, progress, True)
    return terms["loss"].detach()


def test_alpha_zero_is_plain_cross_entropy() -> None:
    batch = data()
    logits = torch.randn(12, 4)
    past = torch.softmax(torch.randn(12, 4), 1)
    torch.testing.assert_close(ps_kd_loss(logits, batch["label"], past, 0.0), F.cross_entropy(logits, batch["label"]))


def test_targets_sum_to_one_and_the_last_epoch_has_the_whole_share() -> None:
    targets = refined_targets(torch.tensor([0, 2]), torch.softmax(torch.randn(2, 4), 1), share(0.7, 3, 9))
    torch.testing.assert_close(targets.sum(1), torch.ones(2))
    assert share(0.7, 8, 9) == pytest.approx(0.7)
    assert [share(0.5, e, 5) for e in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_the_gradient_is_prediction_less_target() -> None:
    logits = torch.randn(6, 4, requires_grad=True)
    labels, past = torch.arange(6) % 4, torch.softmax(torch.randn(6, 4), 1)
    ps_kd_loss(logits, labels, past, 0.6).backward()
    torch.testing.assert_close(
        logits.grad, (torch.softmax(logits, 1) - refined_targets(labels, past, 0.6)).detach() / 6
    )


def test_the_first_epoch_trains_on_labels_and_the_second_on_what_training_said() -> None:
    batch = data()
    module = trainer(PSKD(0.8), batch)
    sgd = torch.optim.SGD(module.student.parameters(), 0.1)
    before = module.student(batch["input"]).detach()
    torch.testing.assert_close(epoch(module, sgd, batch, 0, 2), F.cross_entropy(before, batch["label"]))
    torch.testing.assert_close(module.teachers["teacher"].table, before.softmax(1))  # before the step, not after
    now = module.student(batch["input"]).detach()
    torch.testing.assert_close(epoch(module, sgd, batch, 1, 2), ps_kd_loss(now, batch["label"], before.softmax(1), 0.8))


def test_resumed_training_reaches_the_same_weights() -> None:
    batch = data()

    def run(stop: int | None) -> Tensor:
        module = trainer(PSKD(0.8), batch)
        sgd = torch.optim.SGD(module.student.parameters(), 0.5, momentum=0.9)
        for number in range(5):
            if number == stop:
                saved = copy.deepcopy((module.state_dict(), sgd.state_dict()))
                module = trainer(PSKD(0.8), batch)
                sgd = torch.optim.SGD(module.student.parameters(), 0.5, momentum=0.9)
                module.load_state_dict(saved[0])
                sgd.load_state_dict(saved[1])
            epoch(module, sgd, batch, number, 5)
        return module.student.weight.detach()

    assert torch.equal(run(None), run(3))


def test_the_snapshot_is_the_network_of_the_last_epoch() -> None:
    batch = data()
    del batch["index"]
    objective = PSKD(0.8, past="snapshot")
    module = trainer(objective, batch)
    objective.prepare(Here(module.student))
    sgd = torch.optim.SGD(module.student.parameters(), 0.1)
    objective.begin_epoch(Here(module.student))
    torch.testing.assert_close(
        epoch(module, sgd, batch, 0, 2),
        F.cross_entropy(nn.functional.linear(batch["input"], *objective.snapshot.parameters()), batch["label"]),
    )
    objective.begin_epoch(Here(module.student))
    epoch(module, sgd, batch, 1, 3)  # a step inside the epoch leaves the snapshot alone
    held = objective.snapshot(batch["input"]).softmax(1)
    now = module.student(batch["input"]).detach()
    mixed = batch | {"label": F.one_hot(batch["label"], 4).float().roll(1, 0)}
    torch.testing.assert_close(epoch(module, sgd, mixed, 1, 2), ps_kd_loss(now, mixed["label"], held, 0.8))
    assert all(not p.requires_grad for p in objective.snapshot.parameters())


def test_mixed_labels_and_wrong_options_get_a_sentence() -> None:
    batch = data()
    module = trainer(PSKD(), batch)
    with pytest.raises(UserError, match="mixup"):
        module(batch | {"label": F.one_hot(batch["label"], 4).float()}, Progress())
    with pytest.raises(UserError, match=r"alpha.*1\.2"):
        PSKD(1.2)
    with pytest.raises(UserError, match="index"):
        Distillation(nn.Linear(5, 4), module.teachers["teacher"], [PSKD()]).build(
            {k: v for k, v in batch.items() if k != "index"}
        )


def test_a_perfect_ranking_has_no_excess_risk() -> None:
    confidence = torch.linspace(0.9, 0.55, 10, dtype=torch.float64)
    figures = calibration(torch.stack([confidence, 1 - confidence], 1), torch.tensor([0] * 8 + [1] * 2))
    assert figures["eaurc"] == pytest.approx(0, abs=1e-9)
    assert figures["aurc"] == pytest.approx(1000 * (1 / 9 + 2 / 10) / 10)

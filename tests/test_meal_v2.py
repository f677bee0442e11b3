"""MEAL V2: the averaged teachers, the discriminator, what is trained with which decay, and what must stop a user."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.distillation.teachers import Ensemble, FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.methods.classification.meal_v2 import Config, Discriminator, MealV2, averaged
from stillhouse.runs.recipe import validate
from stillhouse.signals import Batch, Signals


def logits(seed: int, n: int = 6, classes: int = 16) -> Tensor:
    return 2 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def terms(objective: MealV2, z: Tensor, teachers: list[Tensor], batch: Batch | None = None) -> dict[str, Tensor]:
    torch.manual_seed(3)
    said = (
        Signals(members=tuple(Signals(logits=t) for t in teachers))
        if len(teachers) > 1
        else Signals(logits=teachers[0])
    )
    objective.build(Signals(logits=z), said, {})
    return objective(Signals(logits=z), said, batch or {}, Progress())


def test_probabilities_are_averaged_and_not_logits() -> None:
    target, mean = averaged(torch.tensor([[[10.0, 0.0]], [[0.0, 2.0]]]))
    torch.testing.assert_close(
        target[0, 0], (torch.sigmoid(torch.tensor(10.0)) + torch.sigmoid(torch.tensor(-2.0))) / 2
    )
    torch.testing.assert_close(mean, torch.tensor([[5.0, 1.0]]))


def test_copies_of_a_teacher_are_that_teacher() -> None:
    z, t = logits(0), logits(1)
    torch.testing.assert_close(terms(MealV2(reduction=2), z, [t, t, t]), terms(MealV2(reduction=2), z, [t]))


def test_a_student_that_says_what_the_teachers_say_pays_only_their_entropy() -> None:
    a, b = logits(0), logits(1)
    p = (a.softmax(1) + b.softmax(1)) / 2
    found = terms(MealV2(discriminator=False), p.log(), [a, b])
    torch.testing.assert_close(found["similarity"], -(p * p.log()).sum(1).mean())
    assert set(found) == {"similarity"}


def test_a_silent_discriminator_costs_ln_two_and_moves_nothing() -> None:
    objective, z = MealV2(reduction=4), logits(0).requires_grad_()
    terms(objective, z, [logits(1)])
    for p in objective.discriminator.parameters():
        nn.init.zeros_(p)
    found = objective(Signals(logits=z), Signals(logits=logits(1)), {}, Progress())["discriminator"]
    found.backward()
    assert found.item() == pytest.approx(math.log(2))
    assert not z.grad.any()


def test_adversarial_reverses_the_students_gradient_alone() -> None:
    grads = []
    for adversarial in (False, True):
        objective, z = MealV2(reduction=2, adversarial=adversarial), logits(0).requires_grad_()
        found = terms(objective, z, [logits(1)])["discriminator"]
        found.backward()
        grads.append((found.detach(), z.grad, objective.discriminator.conv1.weight.grad))
    torch.testing.assert_close(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], -grads[1][1])
    torch.testing.assert_close(grads[0][2], grads[1][2])
    assert grads[0][1].abs().sum() > 0


def test_labels_enter_only_where_asked() -> None:
    z, t, label = logits(0), logits(1), torch.arange(6)
    found = terms(MealV2(0.25, discriminator=False), z, [t], {"label": label})["similarity"]
    soft = F.cross_entropy(z, t.softmax(1))
    torch.testing.assert_close(found, 0.75 * soft + 0.25 * F.cross_entropy(z, label))
    assert "label" not in MealV2().needs
    with pytest.raises(UserError, match="class ids"):
        terms(MealV2(0.5, discriminator=False), z, [t], {"label": label + 11})


def test_few_classes_leave_the_discriminator_a_width_of_one() -> None:
    assert [layer.out_features for layer in Discriminator(10, 8).children()] == [1, 1, 2]
    assert Discriminator(3, 8)(torch.randn(1, 3)).shape == (1, 2)


def test_the_discriminator_is_trained_beside_the_student() -> None:
    torch.manual_seed(0)
    batch = {"input": torch.randn(4, 5)}
    teacher = Ensemble([FrozenTeacher(nn.Linear(5, 8)), FrozenTeacher(nn.Linear(5, 8))])
    module = Distillation(nn.Linear(5, 8), teacher, [MealV2(reduction=2, lr=1e-4)]).build(batch)
    groups = module.param_groups()
    assert [g.get("lr") for g in groups] == [None, 1e-4]
    assert sum(len(g["params"]) for g in groups) == 2 + 6
    module(batch, Progress())["loss"].backward()
    assert all(p.grad is not None for p in module.parameters())


def test_teachers_with_other_classes_or_without_logits_get_a_sentence() -> None:
    batch = {"input": torch.randn(4, 5)}
    with pytest.raises(UserError, match="same classes"):
        Distillation(
            nn.Linear(5, 8), Ensemble([FrozenTeacher(nn.Linear(5, 8)), FrozenTeacher(nn.Linear(5, 7))]), [MealV2()]
        ).build(batch)
    with pytest.raises(UserError, match="9 classes"):
        Distillation(nn.Linear(5, 8), nn.Linear(5, 9), [MealV2()]).build(batch)
    known = Signals(probs=logits(1).softmax(1))
    objective = MealV2()
    objective.build(Signals(logits=logits(0)), known, {})
    with pytest.raises(UserError, match="sees: probabilities"):
        objective(Signals(logits=logits(0)), known, {}, Progress())


def test_fine_tuning_decays_no_weight_unless_told() -> None:
    tree = {
        "method": "meal_v2",
        "data": "digits",
        "teacher": "stillhouse:mlp",
        "student": "stillhouse:mlp",
        "train": {"epochs": 2},
    }
    config = validate(tree)
    assert isinstance(config, Config)
    assert (config.train.optimizer.lr, config.train.optimizer.weight_decay) == (0.01, 0.0)
    told = validate({**tree, "train": {"optimizer": {"name": "adamw", "lr": 0.002, "weight_decay": 0.1}}})
    assert (told.train.optimizer.lr, told.train.optimizer.weight_decay) == (0.002, 0.1)
    with pytest.raises(UserError, match=r"discriminator\.reducton.*reduction"):
        validate({**tree, "discriminator": {"reducton": 2}})

"""OFA-KD: the enhanced targets, the branches of every kind of student, and the errors a user meets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.models import build
from stillhouse.objectives.ofa_kd import OFAKD, ofa_loss, token_branch

SHAPE = (3, 16, 16)


def net(name: str, **options: object) -> nn.Module:
    return build(ModelSpec(model=f"stillhouse:{name}", options=options), 5, SHAPE)


def batch() -> dict[str, Tensor]:
    return {
        "input": torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)),
        "label": torch.tensor([0, 1, 2, 4]),
    }


def logits(*key: int) -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(*key))


def test_eps_of_one_is_cross_entropy_with_the_teacher() -> None:
    s, t, y = logits(1), logits(2), torch.arange(6) % 5
    expected = -(t.softmax(1) * s.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(ofa_loss(s, t, y), expected)


def test_a_certain_teacher_gives_a_multiple_of_the_cross_entropy() -> None:
    s, y = logits(1), torch.arange(6) % 5
    t = 200 * F.one_hot(y, 5).float()
    torch.testing.assert_close(ofa_loss(s, t, y, eps=1.5), (2**1.5 - 1) * F.cross_entropy(s, y))


def test_the_papers_form_leaves_other_classes_and_holds_the_label() -> None:
    s, t, y = logits(1), logits(2), torch.arange(6) % 5
    code = ofa_loss(s, t, y, eps=1.5, nontarget_exponent=False)
    paper = ofa_loss(s, t, y, eps=1.5, nontarget_exponent=False, include_hard=True)
    torch.testing.assert_close(paper - code, F.cross_entropy(s, y))


def test_large_half_precision_logits_stay_finite() -> None:
    s, t = (300 * logits(1)).half().requires_grad_(), (300 * logits(2)).half()
    value = ofa_loss(s, t, torch.arange(6) % 5, eps=1.2)
    value.backward()
    assert value.isfinite() and s.grad.isfinite().all()


STUDENTS = {
    "convnet4": ({}, {"width": 8}),
    "resnet8": ({"stages": [2, 3, 4]}, {}),
    "vit": ({"grid": 4}, {"dim": 16, "depth": 4, "heads": 2}),
    "mixer": ({"grid": 4}, {"dim": 16, "depth": 4}),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_every_family_of_student_learns_from_all_its_branches(name: str) -> None:
    options, sizes = STUDENTS[name]
    student, teacher = (
        net(name, **sizes),
        net(
            "resnet8" if name in ("vit", "mixer") else "mixer",
            **({} if name in ("vit", "mixer") else {"dim": 16, "depth": 2}),
        ),
    )
    module = Distillation(student, teacher, [OFAKD(**options)]).build(batch())
    plain = set(net(name, **sizes).state_dict())
    terms = module(batch(), Progress())
    terms["ofa_kd.branches"].backward()
    branches = module.objectives[0].branches
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for b in branches.values() for p in b[-1].parameters())
    first = next(student.parameters())
    assert first.grad is not None and first.grad.abs().sum() > 0
    assert set(student.state_dict()) == plain
    assert f"ofa_kd.accuracy_stage{module.objectives[0].stages[0]}" in terms


def test_patches_are_merged_beside_a_class_token() -> None:
    branch = token_branch(2, 65, 8, 8, 5, grid=4)
    x = torch.randn(2, 65, 8)
    merged = branch[0](x)
    assert merged.shape == (2, 17, 8) and torch.equal(merged[:, 0], x[:, 0])
    assert branch(x).shape == (2, 5)


def test_mixed_labels_count_as_their_largest_class() -> None:
    s, t = logits(1), logits(2)
    y = torch.arange(6) % 5
    mixed = 0.7 * F.one_hot(y, 5).float() + 0.3 * F.one_hot((y + 1) % 5, 5).float()
    torch.testing.assert_close(ofa_loss(s, t, mixed, eps=1.3), ofa_loss(s, t, y, eps=1.3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eps": 0.0}, "eps must be above 0"),
        ({"eps": [1.0, 1.2]}, "or 5: one per stage"),
        ({"stages": [0, 1]}, "stages must be different ones of 1, 2, 3, 4"),
        ({"layers": ["layer1"]}, "one layer for each of the 4 stages"),
    ],
)
def test_wrong_options_are_told_in_a_sentence(options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        OFAKD(**options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((2, 60, 8, 8, 5), "square grid"),
        ((2, 225, 8, 8, 5, 0), "cannot be halved"),
        ((4, 49, 8, 16, 5), "must be equal"),
        ((4, 49, 6, 6, 5), "do not divide"),
    ],
)
def test_tokens_that_fit_no_branch_are_told_in_a_sentence(arguments: tuple[int, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        token_branch(*arguments)


def test_a_student_without_a_first_of_four_stages_is_told() -> None:
    with pytest.raises(UserError, match="has 3 stages"):
        Distillation(net("resnet8"), net("resnet8"), [OFAKD()]).build(batch())

"""ProC-KD: what the prototypes do not depend on, teachers of other classes and widths, and the errors a user meets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stillhouse.config.specs import ModelSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.models import build
from stillhouse.objectives.proc_kd import ProCKD, Prototypes, vlad
from stillhouse.training.context import TrainingContext

SHAPE = (3, 16, 16)


def vit(classes: int, dim: int = 16, depth: int = 3, patch: int = 4) -> nn.Module:
    options = {"dim": dim, "depth": depth, "heads": 2, "patch": patch}
    return build(ModelSpec(model="stillhouse:vit", options=options), classes, SHAPE)


def batch() -> dict[str, Tensor]:
    return {
        "input": torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)),
        "label": torch.tensor([0, 1, 2, 4]),
    }


def built(student: nn.Module, teacher: nn.Module, **options: object) -> Distillation:
    module = Distillation(student, teacher, [ProCKD(prototypes=6, **options)]).build(batch())
    module.prepare(TrainingContext(module, Progress(), {}, 0, torch.device("cpu"), None, None))
    return module


def parts_and_tokens() -> tuple[Prototypes, list[Tensor]]:
    torch.manual_seed(0)
    return Prototypes([8, 8, 8], 12, 6), [torch.randn(2, 10, 8) for _ in range(3)]


def everything(parts: Prototypes, layers: list[Tensor]) -> Tensor:
    fused = parts.fused(layers)
    return parts.augmented(parts.described(fused, parts.assignment(fused)))


def test_a_teacher_of_other_classes_and_width_teaches() -> None:
    student, teacher = vit(5), vit(3, dim=24, depth=6)
    module = built(student, teacher)
    terms = module(batch(), Progress())
    terms["loss"].backward()
    assert {"proc_kd.prototype", "proc_kd.augmented", "proc_kd.consistency", "proc_kd.features"} <= set(terms)
    prototypes = module.objectives[0].parts.prototypes
    assert prototypes.grad is not None and prototypes.grad.abs().sum() > 0
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_students_norm_and_head_are_shared_and_optimised_once() -> None:
    student = vit(5)
    module = built(student, vit(3))
    counted = [p for group in module.param_groups() for p in group["params"]]
    assert len(counted) == len({id(p) for p in counted})
    assert not any("head" in name for name in module.objectives.state_dict())


def test_plain_logits_follow_the_augmented_ones_and_not_the_reverse() -> None:
    module = built(vit(5), vit(3), prototype_weight=0.0, augmented_weight=0.0, feature_weight=0.0)
    module(batch(), Progress())["loss"].backward()
    grad = module.objectives[0].parts.encode.weight.grad
    assert grad is None or grad.abs().sum() == 0


def test_the_order_of_prototypes_does_not_matter() -> None:
    parts, layers = parts_and_tokens()
    before = everything(parts, layers)
    order = torch.randperm(6)
    with torch.no_grad():
        parts.prototypes.copy_(parts.prototypes[order])
        parts.assign.weight.copy_(parts.assign.weight[order])
        parts.assign.bias.copy_(parts.assign.bias[order])
        parts.describe.weight.copy_(parts.describe.weight.view(12, 6, 12)[:, order].reshape(12, 72))
    torch.testing.assert_close(everything(parts, layers), before)


def test_permuted_tokens_give_permuted_outputs() -> None:
    parts, layers = parts_and_tokens()
    order = torch.randperm(10)
    torch.testing.assert_close(everything(parts, [x[:, order] for x in layers]), everything(parts, layers)[:, order])


def test_the_descriptor_ignores_the_scale_of_tokens() -> None:
    parts, layers = parts_and_tokens()
    fused = parts.fused(layers)
    describe = lambda x: vlad(nn.functional.normalize(x, dim=-1), parts.assignment(x), parts.prototypes)  # noqa: E731
    torch.testing.assert_close(describe(7 * fused), describe(fused))


def test_the_descriptor_is_the_sum_of_residuals() -> None:
    x, c = torch.randn(2, 10, 12), torch.rand(6, 12)
    a = torch.randn(2, 10, 6).softmax(-1)
    residuals = (a[..., None] * (x[:, :, None] - c)).sum(1)  # (B, P, D)
    expected = nn.functional.normalize(nn.functional.normalize(residuals, dim=-1).flatten(1), dim=-1)
    torch.testing.assert_close(vlad(x, a, c), expected)


def test_tokens_of_zeros_stay_finite() -> None:
    parts, layers = parts_and_tokens()
    out = everything(parts, [torch.zeros_like(x) for x in layers])
    out.sum().backward()
    assert out.isfinite().all() and parts.prototypes.grad.isfinite().all()


def test_frozen_prototypes_stay_as_drawn() -> None:
    module = built(vit(5), vit(3), learn_prototypes=False)
    prototypes = module.objectives[0].parts.prototypes
    assert not any(p is prototypes for group in module.param_groups() for p in group["params"])


def test_unequal_patches_are_told_unless_features_are_off() -> None:
    with pytest.raises(UserError, match="the student has 17 tokens but the teacher 65"):
        built(vit(5), vit(3, patch=2))
    built(vit(5), vit(3, patch=2), feature_weight=0.0)(batch(), Progress())["loss"].backward()


def test_a_wrong_head_is_told_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'head'"):
        built(vit(5), vit(3), head="heads")


def test_a_convolutional_student_is_told_that_it_has_no_norm() -> None:
    student = build(ModelSpec(model="stillhouse:resnet8"), 5, SHAPE)
    with pytest.raises(UserError, match="no submodule 'norm'"):
        built(student, vit(3))

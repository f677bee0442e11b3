"""ACAM-KD: the identities of masks, fusion and terms, on maps of classifiers, segmenters and transformers, and the
errors a user meets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stillhouse.config.specs import ModelSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.models import build
from stillhouse.objectives.acam_kd import ACAMKD, Level, cross_attention, mask_overlap, masked_losses
from stillhouse.signals import Signals
from stillhouse.training.context import TrainingContext

SHAPE = (3, 16, 16)


def net(name: str, **options: object) -> nn.Module:
    return build(ModelSpec(model=f"stillhouse:{name}", options=options), 5, SHAPE)


def batch() -> dict[str, Tensor]:
    return {
        "input": torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)),
        "label": torch.tensor([0, 1, 2, 4]),
    }


def maps(channels: int = 6, other: int | None = None) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, other or channels, 4, 4), torch.randn(2, channels, 4, 4)


def pixels(logits: Tensor) -> Signals:
    """Signals whose logits are a map (B, C, H, W), the class axis last."""
    return Signals(logits=logits.movedim(1, -1))


def terms_on(student: Tensor, teacher: Tensor, objective: ACAMKD | None = None, **options: object) -> dict[str, Tensor]:
    if objective is None:
        objective = ACAMKD(["logits"], ["logits"], **options)
        objective.build(pixels(student), pixels(teacher), {})
    return objective(pixels(student), pixels(teacher), {}, Progress())


def test_masks_of_ones_give_the_mean_squared_error() -> None:
    d = torch.randn(2, 6, 16)
    spatial, channel = masked_losses(d, torch.ones(2, 3, 16), torch.ones(2, 3, 6))
    torch.testing.assert_close(spatial, d.square().mean())
    torch.testing.assert_close(channel, d.square().mean())


def test_units_of_zeros_give_half_the_mean_squared_error() -> None:
    student, teacher = maps()
    objective = ACAMKD(["logits"], ["logits"])
    objective.build(pixels(student), pixels(teacher), {})
    with torch.no_grad():
        objective.levels[0].channel_units.zero_()
        objective.levels[0].spatial_units.zero_()
    terms = terms_on(student, teacher, objective)
    half = 0.5 * (teacher - student).square().mean()
    torch.testing.assert_close(terms["spatial"], half, rtol=1e-4, atol=0)
    torch.testing.assert_close(terms["channel"], half, rtol=1e-4, atol=0)
    torch.testing.assert_close(terms["diversity"], torch.tensor(2.0))


def test_equal_maps_cost_nothing_whatever_the_masks() -> None:
    student, _ = maps()
    terms = terms_on(student, student.clone())
    assert terms["spatial"] == 0 and terms["channel"] == 0


def test_overlap_is_one_for_equal_and_zero_for_disjoint_masks() -> None:
    equal = torch.rand(2, 1, 10).expand(2, 4, 10)
    torch.testing.assert_close(mask_overlap(equal), torch.tensor(1.0))
    torch.testing.assert_close(mask_overlap(equal, "joint"), torch.tensor(3.0))
    assert mask_overlap(torch.eye(4)[None]) == 0 and mask_overlap(torch.rand(2, 1, 10)) == 0


def test_constant_keys_fuse_the_mean_so_that_spatial_masks_are_flat() -> None:
    student, teacher = maps()
    level = Level(6, 6)
    with torch.no_grad():
        level.to_key.weight.zero_()
    fused = level.fuse(student, teacher)
    torch.testing.assert_close(
        fused, level.to_value(student).mean((2, 3), keepdim=True).expand_as(fused), rtol=1e-4, atol=1e-5
    )
    spatial, _ = level.masks(fused)
    torch.testing.assert_close(spatial, spatial[..., :1].expand_as(spatial))


def test_permuted_positions_leave_the_terms_unchanged() -> None:
    student, teacher = maps()
    objective = ACAMKD(["logits"], ["logits"])
    objective.build(pixels(student), pixels(teacher), {})
    order = torch.randperm(16)
    moved = [x.flatten(2)[..., order].reshape(x.shape) for x in (student, teacher)]
    before, after = terms_on(student, teacher, objective), terms_on(*moved, objective)
    for name in ("spatial", "channel", "diversity"):
        torch.testing.assert_close(before[name], after[name])


def test_fused_attention_is_the_explicit_softmax() -> None:
    q, k, v = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 4), torch.randn(2, 6, 2, 4)
    scores = torch.einsum("bcl,bcm->blm", q.flatten(2), k.flatten(2)) / math.sqrt(3)
    expected = torch.einsum("blm,bcm->bcl", scores.softmax(-1), v.flatten(2)).view(2, 6, 4, 4)
    torch.testing.assert_close(cross_attention(q, k, v), expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    level = Level(4, 4, units=2).double()
    teacher = torch.randn(1, 4, 3, 3, dtype=torch.float64)

    def total(student: Tensor) -> Tensor:
        spatial, channel = level.masks(level.fuse(student, teacher))
        return (
            sum(masked_losses((teacher - student).flatten(2), spatial, channel))
            + mask_overlap(spatial)
            + mask_overlap(channel)
        )

    assert torch.autograd.gradcheck(total, torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True))


def test_other_widths_and_sizes_are_aligned_to_the_teacher() -> None:
    student, teacher = torch.randn(2, 3, 2, 2, requires_grad=True), torch.randn(2, 6, 4, 4)
    sum(v for k, v in terms_on(student, teacher).items() if not k.startswith("log:")).backward()
    assert student.grad.abs().sum() > 0


def test_large_maps_pool_their_keys() -> None:
    student, teacher = maps()
    assert not torch.equal(Level(6, 6, max_tokens=4).fuse(student, teacher), Level(6, 6).fuse(student, teacher))
    assert Level(6, 6, max_tokens=4).fuse(student, teacher).shape == teacher.shape


@pytest.mark.parametrize("source", ["cooperative", "teacher", "student", "none"])
def test_every_source_of_masks_trains_a_classifier(source: str) -> None:
    student, teacher = net("resnet8"), net("vit", dim=16, depth=2, heads=2)
    module = Distillation(student, teacher, [ACAMKD(mask_source=source)]).build(batch())
    module(batch(), Progress())["loss"].backward()
    assert next(student.parameters()).grad.abs().sum() > 0
    units = module.objectives[0].levels[0].spatial_units.grad
    assert (units is None) == (source == "none")


@pytest.mark.parametrize("detach", [False, True])
def test_masks_move_the_student_unless_detached(detach: bool) -> None:
    student, teacher = maps()
    student.requires_grad_()
    overlap = terms_on(student, teacher, detach_student_in_fusion=detach)["diversity"]
    (grad,) = torch.autograd.grad(overlap, student, allow_unused=True)
    assert (grad is None) == detach


def test_ignored_pixels_do_not_count() -> None:
    student, teacher = maps()
    label = torch.zeros(2, 4, 4, dtype=torch.long)
    label[:, :2] = 255
    teacher = torch.where((label == 255)[:, None], student + 9, teacher)
    objective = ACAMKD(["logits"], ["logits"], mask_source="none", ignore_index=255)
    objective.build(pixels(student), pixels(teacher), {})
    value = objective(pixels(student), pixels(teacher), {"label": label}, Progress())["mse"]
    torch.testing.assert_close(value, (teacher - student)[:, :, 2:].square().mean() / 2)


def test_the_student_inherits_what_fits_of_the_teacher() -> None:
    student, teacher = net("resnet8"), net("resnet14")
    module = Distillation(student, teacher, [ACAMKD(inherit=["fc"])]).build(batch())
    module.prepare(TrainingContext(module, Progress(), {}, 0, torch.device("cpu"), None, None))
    assert torch.equal(student.fc.weight, teacher.fc.weight)
    for names, said in ((["head"], "no submodule"), (["fc"], "no layer under 'fc'")):
        other = Distillation(net("resnet8"), net("resnet8x4"), [ACAMKD(inherit=names)]).build(batch())
        with pytest.raises(UserError, match=said):
            other.prepare(TrainingContext(other, Progress(), {}, 0, torch.device("cpu"), None, None))


def test_vectors_are_refused_as_maps() -> None:
    with pytest.raises(UserError, match="must give maps"):
        Distillation(net("resnet8"), net("resnet8"), [ACAMKD(["logits"], ["logits"])]).build(batch())

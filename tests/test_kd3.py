"""KD^3: which images it selects, its losses' identities, batches that follow the selection, and a product that holds
all it needs."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stillhouse.config.specs import DataSpec, MethodConfig, ModelSpec
from stillhouse.data import load
from stillhouse.data.dataset import BatchKey
from stillhouse.data.joined import JoinedDataset, unlabelled
from stillhouse.distillation.objective import Progress
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.methods.classification.kd3.alignment import (
    contrast,
    disagreement_weights,
    mix_distribution,
    select,
    teacher_share,
)
from stillhouse.methods.classification.kd3.method import AlignmentTraining, Config, at_least, pool_logits
from stillhouse.methods.classification.kd3.pool import PoolPart, SelectedBatches, pool_images
from stillhouse.methods.classification.kd3.student import SharedStudent, last_map, make_shared
from stillhouse.models import build
from stillhouse.runs.products import load as load_run
from stillhouse.runs.run import Run
from stillhouse.tasks.classification import Classification

SHAPE = (1, 8, 8)


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build(ModelSpec(model="stillhouse:resnet8"), 10, SHAPE)


def digits(size: int = 100) -> JoinedDataset:
    target = load(DataSpec(name="digits", size=size))
    return JoinedDataset([unlabelled(target, target, train=False)])


def sharing(**options: object) -> tuple[AlignmentTraining, dict[str, Tensor]]:
    images = digits()
    probe = images.batch(BatchKey(0, np.arange(4), 0, 4), 0)
    teacher = FrozenTeacher(resnet(1))
    shared, tap = make_shared(resnet(2), teacher.model, probe, 2)
    teacher.attach([f"tap:{tap}"], probe, shared)
    module = AlignmentTraining(shared, teacher, tap, images, batch_size=16, say=lambda _: None, **options)  # type: ignore[arg-type]
    module.train()
    return module, images.batch(BatchKey(0, np.arange(12), 0, 12), 0)


def test_the_share_of_the_teacher_is_the_published_schedule() -> None:
    for epoch, expected in ((1, 0.9924), (60, 0.8525), (119, 0.2684), (120, 0.0), (240, 0.0)):
        assert teacher_share(epoch) == pytest.approx(expected, abs=5e-5)


def test_selection_follows_the_images_when_they_are_reordered() -> None:
    t, s, order = 3 * torch.randn(80, 6), 3 * torch.randn(80, 6), torch.randperm(80)
    assert torch.equal(select(t, s, 0.6)[0][order], select(t[order], s[order], 0.6)[0])


def test_with_equal_logits_selection_does_not_depend_on_the_share() -> None:
    t = 2 * torch.randn(60, 4)
    assert torch.equal(select(t, t, 0.9)[0], select(t, t, 0.1)[0])


def test_a_rare_class_has_a_lower_threshold_and_an_absent_one_does_no_harm() -> None:
    logits = torch.zeros(100, 5)
    logits[:90, 0], logits[90:, 1] = 3.0, 3.0  # confidence 0.83 throughout
    chosen = select(logits, logits, 1.0)[0]
    assert not chosen[:90].any() and chosen[90:].all()


def test_too_few_selected_images_are_filled_up_by_the_most_confident_with_a_warning() -> None:
    confidence, said = torch.rand(50), []
    mask = at_least(torch.zeros(50, dtype=torch.bool), confidence, 8, said.append)
    assert (
        set(mask.nonzero()[:, 0].tolist()) == set(confidence.topk(8).indices.tolist())
        and "fewer than a batch" in said[0]
    )


def test_equal_logits_weigh_one_half_and_far_ones_nearly_one_outside_autograd() -> None:
    z = torch.randn(3, 16, requires_grad=True)
    distance, weights = disagreement_weights(z, z)
    torch.testing.assert_close(distance, torch.full((3,), 4e-6), atol=1e-8, rtol=1e-3)
    assert weights.tolist() == pytest.approx([0.5] * 3, abs=1e-5) and not weights.requires_grad
    assert disagreement_weights(z, z + 10)[1].min() > 0.999


def test_own_statistics_and_equal_partners_leave_images_as_they_are() -> None:
    x, order = torch.randn(5, 3, 6, 6), torch.randperm(5)
    torch.testing.assert_close(mix_distribution(x, torch.ones(5, 1, 1, 1), order), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(mix_distribution(x, torch.rand(5, 1, 1, 1), torch.arange(5)), x, atol=1e-5, rtol=0)


def test_mixed_images_carry_the_partners_statistics_and_flat_ones_stay_finite() -> None:
    x = torch.cat([torch.randn(1, 3, 8, 8), 4 + 2 * torch.randn(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.5)])
    out = mix_distribution(x, torch.zeros(3, 1, 1, 1), torch.tensor([1, 0, 1]))
    torch.testing.assert_close(out[0].mean((1, 2)), x[1].mean((1, 2)), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(out[0].std((1, 2)), x[1].std((1, 2)), atol=1e-3, rtol=1e-3)
    assert torch.isfinite(out).all()
    with pytest.raises(UserError, match="more than one pixel"):
        mix_distribution(x[..., :1, :1], torch.ones(3, 1, 1, 1), torch.arange(3))


def test_the_contrast_of_orthogonal_pairs_is_known() -> None:
    views = torch.eye(6)
    assert contrast(views, views, 0.3).item() == pytest.approx(math.log(1 + 10 * math.exp(-1 / 0.3)), rel=1e-5)
    with pytest.raises(UserError, match="at least two"):
        contrast(views[:1], views[:1])


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_1", "mobilenet_v2"])
def test_the_map_before_the_classifier_is_found(name: str) -> None:
    net, probe = build(ModelSpec(model=f"stillhouse:{name}"), 10, (3, 32, 32)), {"input": torch.randn(2, 3, 32, 32)}
    found = last_map(net, probe)
    assert found is not None and found[1].shape[2] > 1
    torch.testing.assert_close(net.fc(found[1].mean((2, 3))), net.eval()(probe["input"]), atol=1e-4, rtol=1e-4)


def test_a_teacher_whose_classifier_reads_no_pooled_map_is_refused() -> None:
    net = build(ModelSpec(model="stillhouse:mlp"), 10, SHAPE)
    with pytest.raises(UserError, match="one linear layer on the mean"):
        make_shared(resnet(), net, {"input": torch.randn(2, *SHAPE)}, 2)


def test_a_student_with_a_larger_map_is_averaged_to_the_teachers() -> None:
    student = build(ModelSpec(model="stillhouse:convnet2", options={"width": 8}), 10, (3, 32, 32))
    teacher = build(ModelSpec(model="stillhouse:resnet18"), 10, (3, 32, 32))
    shared, _ = make_shared(student, teacher, {"input": torch.randn(2, 3, 32, 32)}, 2)
    assert shared.size == (4, 4) and shared(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_step_trains_backbone_and_transfer_and_never_the_teachers_classifier() -> None:
    module, batch = sharing()
    terms = module(batch, Progress())
    assert terms["loss"].item() == pytest.approx((terms["features"] + 0.001 * terms["contrast"]).item(), rel=1e-5)
    terms["loss"].backward()
    student, teacher = module.student, module._teacher[0].model
    assert student.cls.weight.grad is None and torch.equal(student.cls.weight, teacher.fc.weight)
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in student.named_parameters()
        if n.endswith("conv1.weight") or "transfer.0" in n
    )
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
    assert "contrast" not in sharing(contrast_weight=0)[0](batch, Progress())


def test_selection_is_made_before_an_epoch_and_is_part_of_the_state() -> None:
    module, _ = sharing(cutoff=0.3)

    class Now:
        progress = Progress(epoch=3, epochs=10)

    module.begin_epoch(Now())
    module.train()
    assert module.history[0]["alpha"] == pytest.approx(teacher_share(96)) and sum(module.history[0]["classes"]) == int(
        module.selected.sum()
    )
    other, _ = sharing()
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    assert torch.equal(other.selected, module.selected) and other.history == module.history
    fixed, _ = sharing(dynamic=False)
    fixed.begin_epoch(Now())
    assert fixed.selected.all()


def test_looking_at_the_pool_leaves_the_student_as_it_was() -> None:
    module, _ = sharing()
    before = copy.deepcopy(module.student.state_dict())
    logits = pool_logits(module.student, digits(), torch.device("cpu"))
    assert logits.shape == (100, 10) and not logits.requires_grad and module.student.training
    assert all(torch.equal(v, before[k]) for k, v in module.student.state_dict().items())


def test_batches_hold_only_what_is_selected_as_the_epoch_begins() -> None:
    mask = torch.zeros(100, dtype=torch.bool)
    mask[:40] = True
    batches = SelectedBatches(digits(), lambda: mask, 20, seed=0)
    stream = batches.batches(0, 0, 2)
    first = torch.cat([next(stream)["index"] for _ in range(len(batches))])
    assert len(batches) == 5 and first.max() < 40 and sorted(first.bincount().unique().tolist()) == [2, 3]
    mask[:40], mask[40:] = False, True
    second = torch.cat([b["index"] for b in stream])
    assert second.min() >= 40 and len(second) == 100


def test_batches_are_the_same_from_the_middle_of_an_epoch() -> None:
    mask = torch.rand(100, generator=torch.Generator().manual_seed(0)) < 0.6
    batches = SelectedBatches(digits(), lambda: mask, 20, seed=5)
    whole = list(batches.batches(0, 0, 2))
    later = list(batches.batches(1, 2, 2))
    assert len(later) == 3 and all(torch.equal(a["input"], b["input"]) for a, b in zip(whole[7:], later))


def test_a_styled_pool_keeps_each_images_style_over_epochs(tmp_path: Path) -> None:
    config = MethodConfig(method="kd3")
    part = PoolPart(name="digits", holdout=0.2, split="holdout", style=[{"RandomInvert": {"p": 0.5}}])
    run, target = Run(tmp_path, config, cpu=True), DataSpec(name="digits", holdout=0.2)
    pool = pool_images([part], target, run, train=False)
    first, later = (pool.batch(BatchKey(e, np.arange(50), 0, 50), s)["input"] for e, s in ((0, 0), (3, 7)))
    plain = run.data(target).dataset("holdout", train=False).batch(BatchKey(0, np.arange(50), 0, 50), 0)["input"]
    same = (first - plain).abs().amax((1, 2, 3)) < 0.02
    assert torch.equal(first, later) and 10 < int(same.sum()) < 40


def test_the_product_brings_all_three_parts_back(tmp_path: Path) -> None:
    module, batch = sharing()
    x, student = batch["input"], module.student.eval()
    product = SharedStudent(
        student,
        ModelSpec(model="stillhouse:resnet8"),
        Classification(tuple(map(str, range(10))), SHAPE, (0.3,), (0.4,)),
    )
    product.save(tmp_path / "product")
    loaded = load_run(tmp_path)
    assert torch.equal(loaded(x), student(x)) and torch.equal(copy.deepcopy(loaded)(x), student(x))


def test_the_baseline_cannot_select_by_a_student_that_shares_no_classifier() -> None:
    with pytest.raises(ValueError, match="selection: all or teacher"):
        Config.model_validate(
            {
                "data": "digits",
                "pool": [{"name": "digits"}],
                "teacher": "stillhouse:resnet8",
                "student": "stillhouse:resnet8",
                "loss": "kd",
            }
        )

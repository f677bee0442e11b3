"""RT-DETRv4: the injector sits behind the transformer of real detectors, and its weight brings the gradient's share
into the band from both sides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_detection import RT_DETR, TASK
from torch import Tensor, nn

from stillhouse.config.specs import ModelSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.models import build
from stillhouse.objectives.rt_detrv4 import RTDETRv4, gradient_share, injection_loss, modulated
from stillhouse.runs import recipe
from stillhouse.tasks.base import Task
from stillhouse.training.context import Progress, TrainingContext

ROOT = Path(__file__).parents[1]
TARGET = {"boxes": torch.tensor([[10.0, 10.0, 30.0, 30.0]]), "labels": torch.tensor([1])}


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- mathematics -----------------------------------------------------------------------------------------------------


def test_the_loss_is_zero_for_equal_directions_and_two_for_opposite_ones():
    x = maps(2, 5, 3, 4)
    assert injection_loss(3 * x, x).item() == pytest.approx(0, abs=1e-6)
    assert injection_loss(-x, x).item() == pytest.approx(2, abs=1e-6)


def test_a_rectangular_teacher_is_resized_to_the_detectors_grid():
    constant = maps(2, 5, 1, 1).expand(2, 5, 6, 9)
    assert injection_loss(constant[..., :3, :4], constant).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="rt_detrv4"):
        injection_loss(maps(2, 4, 3, 4), constant)


def test_the_share_does_not_depend_on_the_scale_of_the_gradient():
    encoder, others = [maps(3, 4), maps(5, seed=1)], [maps(7, seed=2)]
    share = gradient_share(encoder, encoder + others)
    expected = 100 * sum(g.abs().sum() for g in encoder) / sum(g.abs().sum() for g in encoder + others)
    assert share.item() == pytest.approx(expected.item(), rel=1e-5)
    scaled = [[65536 * g for g in gs] for gs in (encoder, encoder + others)]
    assert gradient_share(*scaled).item() == pytest.approx(share.item(), rel=1e-5)
    assert gradient_share([], []).item() == 0.0


@pytest.mark.parametrize("start", [0.1, 1.0, 100.0])
def test_the_weight_crosses_into_the_band_where_the_rest_is_fixed(start: float):
    """With the share w / (w + rest), as the formula takes it, two updates bring any weight within two decades."""
    weight, rest = start, 90.0
    for _ in range(3):
        weight = modulated(weight, 100 * weight / (weight + rest), rho=11, delta=1)
    assert abs(100 * weight / (weight + rest) - 11) <= 1 + 1e-6


def test_the_weight_stays_in_the_band_and_moves_at_most_tenfold():
    assert modulated(7.0, 11.9, 11, 1) == 7.0
    assert modulated(1.0, 0.01, 11, 1) == 10.0 and modulated(1.0, 99.9, 11, 1) == 0.1
    assert modulated(5.0, 0.0, 11, 1, fallback=20) == 20 and modulated(5.0, 0.0, 11, 1) == 5.0
    assert modulated(5.0, 50.0, 11, 1, fallback=20, final=True) == 20
    assert modulated(0.0, 5.0, 11, 1) == 0.0, "a weight of nothing cannot be scaled"


@pytest.mark.parametrize(
    ("options", "sentence"), [({"delta": 12}, "band"), ({"rho": -1}, "rho"), ({"start": -1}, "start")]
)
def test_wrong_options_get_a_sentence(options: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        RTDETRv4(**options)


# ---- behind a real detector ------------------------------------------------------------------------------------------


def world(**options: object) -> tuple[Distillation, TrainingContext, dict]:
    torch.manual_seed(0)
    student = TASK.build(ModelSpec(model="hf:config:rt_detr", options={**RT_DETR, "num_denoising": 0}))
    vit = {"patch": 16, "dim": 12, "depth": 1, "heads": 2}
    teacher = build(ModelSpec(model="stillhouse:vit", options=vit), 5, (3, 64, 96))
    objective = RTDETRv4(teacher_layer="norm", **options)
    module = Distillation(student, FrozenTeacher(teacher, task=Task()), ["own", objective], task=TASK)
    batch = {"input": maps(2, 3, 64, 96), "target": [TARGET, TARGET]}
    module.build(batch).train()
    ctx = TrainingContext(module, Progress(epochs=9, steps_per_epoch=1), {}, 0, torch.device("cpu"), Path(), None)
    module.prepare(ctx)
    return module, ctx, batch


def test_the_share_is_that_of_the_total_gradient_of_the_transformer():
    module, ctx, batch = world(start=3.0)
    module(batch, ctx.progress)["loss"].backward()
    module.before_update(ctx)
    objective = module.entries[1].objective
    inside = sum(p.grad.abs().sum() for p in module.student.model.encoder.aifi.parameters())
    total = sum(p.grad.abs().sum() for m in (module.student, objective) for p in m.parameters() if p.grad is not None)
    assert objective.sums[0].item() == pytest.approx(100 * (inside / total).item(), rel=1e-4)
    assert objective.sums[1] == 1 and objective.projector.weight.grad.abs().sum() > 0


def test_a_gradient_that_is_not_finite_does_not_count():
    module, ctx, batch = world()
    module(batch, ctx.progress)["loss"].backward()
    next(module.student.parameters()).grad = torch.full_like(next(module.student.parameters()), float("nan"))
    module.before_update(ctx)
    assert module.entries[1].objective.sums[:2].tolist() == [0.0, 0.0]


def test_the_weight_moves_once_an_epoch_and_is_restored():
    module, ctx, batch = world(start=0.001, rho=20.0, delta=2.0)
    objective = module.entries[1].objective
    assert isinstance(objective, RTDETRv4)
    weights = []
    for epoch in range(3):
        ctx.progress.epoch = epoch
        module.begin_epoch(ctx)
        weights.append(objective.weight.item())
        module(batch, ctx.progress)["loss"].backward()
        module.before_update(ctx)
        module.zero_grad()
    assert weights == pytest.approx([0.001, 0.01, 0.1]), "tenfold each epoch, as it is far below the band"
    other = world(start=5.0)[0]
    other.load_state_dict(module.state_dict())
    restored = other.entries[1].objective
    assert isinstance(restored, RTDETRv4)
    assert restored.weight.item() == objective.weight.item() and restored.figures() == objective.figures()


def test_a_missing_encoder_is_told_by_name():
    module, ctx, _ = world()
    objective = module.entries[1].objective
    assert isinstance(objective, RTDETRv4)
    objective.encoder = "model.encoder.aify"
    with pytest.raises(UserError, match=r"nearest: model\.encoder\.aifi"):
        module.prepare(ctx)


def test_nothing_of_teacher_and_projector_is_in_the_product():
    module, *_ = world()
    names = set(module.student.state_dict())
    assert not any("projector" in n for n in names) and isinstance(module.student, nn.Module)
    fresh = TASK.build(ModelSpec(model="hf:config:rt_detr", options={**RT_DETR, "num_denoising": 0}))
    assert names == set(fresh.state_dict())


@pytest.mark.parametrize(
    ("variant", "millions"), [("paper", 10.2), ("paper_m", 19.2), ("paper_l", 31), ("paper_x", 62)]
)
def test_the_papers_detectors_are_built_at_their_sizes(variant: str, millions: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    config = recipe.load(ROOT / "recipes/dense/rt_detrv4.yaml", variant)
    task = type(TASK)(tuple(map(str, range(80))), (640, 640), TASK.mean, TASK.std)
    with torch.device("meta"):
        student = task.build(config.student)
    assert sum(p.numel() for p in student.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)
    student.get_submodule(config.objectives[1].arguments.get("student_layer", "model.encoder.aifi.0"))

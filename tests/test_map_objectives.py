"""Objectives on maps in dense recipes: PKD is one minus the correlation, CWD and ACAM-KD serve detectors' pyramids and
segmenters' logits, and the recipes name them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from stillhouse.config.specs import ModelSpec, ObjectiveSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.errors import UserError
from stillhouse.functional.counting import IGNORED
from stillhouse.tasks.base import Task
from stillhouse.tasks.detection import Detection
from stillhouse.tasks.segmentation import Segmentation

FILE = Path(__file__).parents[1] / "recipes" / "dense" / "map_objectives.py"
NORMAL = ((0.5,) * 3, (0.5,) * 3)
DETECTION = Detection(("a", "b"), (64, 96), *NORMAL)
SEGMENTATION = Segmentation(("a", "b", "c"), (64, 96), *NORMAL)
MAPS = {"student_layers": ["stage:1", "stage:2"], "teacher_layers": ["stage:1", "stage:2"]}
LOGITS = {"student_layers": ["logits"], "teacher_layers": ["logits"]}


@pytest.fixture(scope="module")
def file() -> ModuleType:
    spec = importlib.util.spec_from_file_location("map_objectives", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["map_objectives"] = module
    spec.loader.exec_module(module)
    return module


def test_pkd_is_one_minus_the_correlation(file: ModuleType):
    first, second = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    rows = [
        torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        for a, b in zip(*[x.movedim(1, 0) for x in (first, second)])
    ]
    torch.testing.assert_close(file.pearson_distance(first, second), 1 - torch.stack(rows).mean())
    moved = second * torch.tensor([1.0, 3.0, 0.5, 9.0]).view(1, 4, 1, 1) + 7
    torch.testing.assert_close(file.pearson_distance(first, moved), file.pearson_distance(first, second))
    assert file.pearson_distance(torch.ones(1, 2, 3, 3), second[:1, :2, :3, :3]).isfinite(), "a constant map"


def networks(task: Task, name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    options = {"backbone": "lcnet_050"} | ({"strides": [4, 8, 16]} if name == "pyramid_segmenter" else {})
    specs = (ModelSpec(model=f"stillhouse:{name}", options={**options, "width": w}) for w in (8, 12))
    return tuple(task.build(spec) for spec in specs)  # type: ignore[return-value]


@pytest.mark.parametrize("name", [f"file:{FILE}:CWD", f"file:{FILE}:PKD", "acam_kd", "at"])
@pytest.mark.parametrize("task", [DETECTION, SEGMENTATION], ids=lambda t: t.name)
def test_maps_teach_detectors_and_segmenters(name: str, task: Task):
    detects = task is DETECTION
    student, teacher = networks(task, "pyramid_detector" if detects else "pyramid_segmenter")
    layers = LOGITS if not detects and name != "at" else MAPS
    objective = objective_from_spec(ObjectiveSpec.model_validate({"name": name, **layers}))
    target = {"boxes": torch.tensor([[10.0, 10.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
    label = torch.full((2, 16, 24), IGNORED)
    batch = {"input": torch.randn(2, 3, 64, 96), **({"target": [target] * 2} if detects else {"label": label})}
    module = Distillation(student, teacher.eval(), ["own" if detects else "ce", objective], task=task)
    terms = module.build(batch).train()(batch, Progress())
    terms["loss"].backward()
    assert terms["loss"].isfinite() and student.lateral[0][0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    module.close()


def test_layers_go_in_pairs(file: ModuleType):
    with pytest.raises(UserError, match="as many student_layers"):
        file.CWD(["stage:1", "stage:2"], ["stage:1"])


def test_the_papers_retinanet_has_its_pyramid_in_named_maps(file: ModuleType):
    with torch.device("meta"):
        names = dict(file.RetinaNet(80, "resnet101").named_modules())
    assert {f"backbone.fpn.layer_blocks.{i}" for i in range(3)} | {"backbone.fpn.extra_blocks.p7", "head"} <= set(names)

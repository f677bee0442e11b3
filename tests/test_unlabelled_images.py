"""Images without labels: a backbone learns from another's features, is judged by probes, and loads in timm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stillhouse.config.specs import DataSpec
from stillhouse.data import load
from stillhouse.errors import UserError
from stillhouse.evaluation.features import FeatureMeter
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate
from stillhouse.signals import Signals

RECIPE = {
    "data": {"name": "images:digits", "size": 400, "augment": "plain"},
    "teacher": {
        "model": "stillhouse:convnet2",
        "options": {"width": 16},
        "data": {"name": "digits", "augment": "plain"},
        "train": {"epochs": 4, "batch_size": 50, "optimizer": {"name": "adamw", "lr": 1e-2}},
    },
    "student": {"model": "stillhouse:convnet2", "options": {"width": 8}},
    "objectives": [{"name": "pkt", "weight": 1000}, "fitnet"],
    "train": {"epochs": 6, "batch_size": 50, "optimizer": {"name": "adamw", "lr": 1e-2}},
}


def test_a_backbone_learns_from_a_teacher_without_a_label(tmp_path: Path):
    found = execute(validate(RECIPE), tmp_path / "run", cpu=True)
    untrained = {**RECIPE, "train": {**RECIPE["train"], "epochs": 1, "optimizer": {"name": "adamw", "lr": 1e-9}}}
    before = execute(validate(untrained), tmp_path / "untrained", cpu=True)
    assert found["linear_probe"] > before["linear_probe"] and found["knn"] > before["knn"] + 0.02
    assert found["effective_rank"] > 2
    product = load_product(tmp_path / "run")
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    assert len(product.task.predict(product.module, [image])[0]["embedding"]) == product.module.width


def test_labels_are_not_there_to_be_read(tmp_path: Path):
    bundle = load(DataSpec(name="images:digits", size=100))
    batch = bundle.dataset("train", train=True)[0]
    assert batch["label"] == -1 and bundle.dataset("test", train=False)[0]["label"] >= 0
    with pytest.raises(UserError, match="label"):
        execute(validate({**RECIPE, "objectives": ["ce"]}), tmp_path, cpu=True)


def photos(folder: Path, count: int) -> None:
    for i in range(count):
        path = folder / f"{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (7 * i % 256, 90, 255 - 5 * i % 256)).save(path)


def test_a_tree_of_images_gives_a_backbone_that_timm_loads(tmp_path: Path):
    timm = pytest.importorskip("timm")
    photos(tmp_path / "photos", 40)
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "teacher.safetensors")
    tree = {
        **RECIPE,
        "data": {"name": f"images:{tmp_path / 'photos'}", "image_size": 32, "augment": "plain"},
        "teacher": {"model": "timm:resnet10t", "checkpoint": str(tmp_path / "teacher.safetensors")},
        "student": {"model": "timm:test_vit"},
        "objectives": ["pkt"],
        "train": {"epochs": 1, "batch_size": 9},
    }
    assert set(execute(validate(tree), tmp_path / "run", cpu=True)) >= {"effective_rank", "parameters"}
    file = tmp_path / "run" / "product" / "model.safetensors"
    network = timm.create_model("test_vit", num_classes=0, img_size=32, checkpoint_path=str(file)).eval()
    module = load_product(tmp_path / "run").module
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(x), module(x))


def test_a_collapse_shows_in_the_effective_rank():
    def rank(x: torch.Tensor) -> float:
        meter = FeatureMeter()
        meter.add({"label": torch.full((len(x),), -1)}, Signals(embedding=x))
        return meter.figures()["effective_rank"]

    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    assert rank(x) > 7.5 and rank(x[:, :1] * torch.ones(8)) == pytest.approx(1, abs=1e-3)

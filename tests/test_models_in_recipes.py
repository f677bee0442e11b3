"""Models of other libraries, and of the user's own file, through whole recipes: teacher and student, taps, the product
and its loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import stillhouse
from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.models import build
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute, plan
from stillhouse.runs.products import load_product
from stillhouse.signals import read_logits

VIT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}
OWN_NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return {"out": self.head(self.body(x)), "extra": x}
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of two classes, dark and bright, of odd sizes."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in [("train", 12), ("val", 4)]:
        for label, level in [("bright", 180), ("dark", 40)]:
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (36 + i, 44, 3)) + level
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / label / f"{i}.png")
    return root


def run(tree: dict[str, Any], folder: Path, data_root: Path | None = None) -> dict[str, float]:
    config = recipe.validate(
        {"train": {"epochs": 1, "batch_size": 8, "optimizer": {"lr": 0.01}}, "evaluate": ["accuracy"], **tree}
    )
    return execute(config, folder, data_root=None if data_root is None else str(data_root), cpu=True)


def on_pictures(root: Path, teacher: str, student: dict[str, Any] | str, objectives: list[Any]) -> dict[str, Any]:
    trained = {"model": teacher, "train": {"epochs": 1, "batch_size": 8}}
    return {
        "data": {"name": f"imagefolder:{root}", "image_size": 32},
        "teacher": trained,
        "student": student,
        "objectives": objectives,
    }


def answer(folder: Path, shape: tuple[int, ...], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return read_logits(stillhouse.load(folder, **options)(torch.zeros(3, *shape)))


@pytest.mark.parametrize(
    ("student", "objectives"),
    [
        ("timm:test_efficientnet", ["ce", "kd", "fitnet", "nd"]),
        ("timm:test_vit", ["ce", "nd", {"name": "fitnet", "student_layer": "blocks.1", "teacher_layer": "layer2"}]),
    ],
    ids=["to a cnn", "to a vit"],
)
def test_timm_teaches_timm_on_a_folder_of_images(
    student: str, objectives: list[Any], pictures: Path, tmp_path: Path
) -> None:
    figures = run(on_pictures(pictures, "timm:test_resnet", student, objectives), tmp_path / "run")
    assert 0 <= figures["accuracy"] <= 1
    assert answer(tmp_path / "run", (3, 32, 32)).shape == (3, 2)
    assert load_product(tmp_path / "run").classes == ["bright", "dark"]


def test_a_tap_that_the_teacher_lacks_is_told_by_name(pictures: Path, tmp_path: Path) -> None:
    tree = on_pictures(
        pictures, "timm:test_vit", "timm:test_resnet", ["ce", {"name": "fitnet", "teacher_layer": "block.1"}]
    )
    with pytest.raises(UserError, match=r"The teacher has no submodule 'block\.1' to tap; nearest: blocks\.1"):
        run(tree, tmp_path / "run")


def test_a_plan_shows_which_submodules_are_tapped(pictures: Path) -> None:
    tree = on_pictures(
        pictures, "timm:test_vit", "timm:test_resnet", ["ce", "nd", {"name": "fitnet", "student_layer": "stage:1"}]
    )
    (_, student) = plan(recipe.validate({**tree, "train": {"batch_size": 8}}))
    assert student.taps == {
        "student embedding": "fc:in",
        "student stage:1": "layer1",
        "teacher embedding": "head:in",
        "teacher stage:2": "blocks.2",
    }
    assert student.models["student"].startswith("timm:test_resnet, 3")


def test_torchvision_teaches_a_transformers_model(pictures: Path, tmp_path: Path) -> None:
    objectives = ["ce", "kd", "nd", {"name": "uskd", "student_layer": "stage:1"}]
    run(
        on_pictures(pictures, "torchvision:shufflenet_v2_x0_5", {"model": "hf:config:vit", "options": VIT}, objectives),
        tmp_path / "run",
    )
    assert answer(tmp_path / "run", (3, 32, 32)).shape == (3, 2)


def test_a_users_own_file_trains_and_loads_only_when_trusted(tmp_path: Path, data_root: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN_NET)
    tree = {
        "data": {"name": "digits", "size": 200},
        "teacher": {"model": "stillhouse:mlp", "train": {"epochs": 1}},
        "student": {"model": f"file:{file}:Net", "options": {"width": 6}},
        "objectives": ["ce", "kd", "nd"],
    }
    run(tree, tmp_path / "run", data_root)
    with pytest.raises(UserError, match="trust_code=True if you trust that file"):
        stillhouse.load(tmp_path / "run")
    file.unlink()  # the product holds a copy of what builds it
    model = stillhouse.load(tmp_path / "run", trust_code=True)
    assert model.head.in_features == 6 and model(torch.zeros(3, 1, 8, 8))["out"].shape == (3, 10)


def test_two_recipes_with_one_teacher_train_it_once(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    first = on_pictures(pictures, "timm:test_efficientnet", "timm:test_resnet", ["ce", "kd"])
    run(first, tmp_path / "first")
    (result,) = (tmp_path / "cache").rglob("teacher-*/result.json")
    made = result.stat().st_mtime_ns
    run({**first, "student": "timm:test_vit"}, tmp_path / "second")
    (again,) = (tmp_path / "cache").rglob("teacher-*/result.json")
    assert again == result and again.stat().st_mtime_ns == made


def test_a_student_with_too_few_channels_is_told_what_to_use(tmp_path: Path, data_root: Path) -> None:
    tree = {"data": {"name": "digits", "size": 50}, "student": "torchvision:resnet18", "objectives": ["ce"]}
    with pytest.raises(UserError, match="take 3 channels, but the data has 1; use a timm: or stillhouse: model"):
        run(tree, tmp_path / "run", data_root)


def test_a_teachers_checkpoint_is_fine_tuned_with_a_new_classifier_where_the_recipe_trains_it(
    pictures: Path, tmp_path: Path
) -> None:
    torch.save(build(ModelSpec(model="stillhouse:resnet8"), 5).state_dict(), tmp_path / "five.pt")
    data = {"name": f"imagefolder:{pictures}", "image_size": 32}
    teacher = {"model": "stillhouse:resnet8", "checkpoint": str(tmp_path / "five.pt")}
    tree = {"data": data, "teacher": teacher, "student": "stillhouse:resnet8", "objectives": ["ce", "kd"]}
    with pytest.raises(UserError, match="Only the classifier differs"):
        run(tree, tmp_path / "frozen")
    trained = {**teacher, "train": {"epochs": 1, "batch_size": 8, "optimizer": {"lr": 1e-9}}}
    run({**tree, "teacher": trained}, tmp_path / "tuned")
    # features of another label space need no classifier at all
    features = {**teacher, "checkpoint": {"path": str(tmp_path / "five.pt"), "classifier": "none"}}
    run({**tree, "teacher": features, "objectives": ["ce", "fitnet"]}, tmp_path / "features")
    with pytest.raises(UserError, match="the teacher has 1 classes and the student 2"):
        run({**tree, "teacher": features}, tmp_path / "scores")


def test_a_student_starts_from_a_checkpoint_of_other_classes(pictures: Path, tmp_path: Path) -> None:
    source = build(ModelSpec(model="stillhouse:resnet8"), 5)
    torch.save(source.state_dict(), tmp_path / "five.pt")
    data = {"name": f"imagefolder:{pictures}", "image_size": 32}
    student = {"model": "stillhouse:resnet8", "checkpoint": str(tmp_path / "five.pt")}
    train = {"epochs": 1, "batch_size": 8, "optimizer": {"lr": 1e-9}}
    run({"data": data, "student": student, "objectives": ["ce"], "train": train}, tmp_path / "run")
    network = stillhouse.load(tmp_path / "run")
    assert torch.allclose(network.conv1.weight, source.conv1.weight) and network.fc.out_features == 2

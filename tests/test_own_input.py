"""A teacher sees the images as it was trained to see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse import Distillation, FrozenTeacher
from stillhouse.config.specs import DataSpec, TeacherSpec
from stillhouse.distillation.own_input import OwnInput
from stillhouse.errors import UserError
from stillhouse.models import sources
from stillhouse.runs import recipe
from stillhouse.runs.run import Run

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pixels() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def normalised(x: Tensor, mean: Any, std: Any) -> Tensor:
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def test_the_teachers_normalisation_takes_the_place_of_the_students() -> None:
    given = ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    student = {"input": normalised(pixels(), *given), "label": torch.tensor([0, 1])}
    read = OwnInput(given, IMAGENET)(student)
    torch.testing.assert_close(read["input"], normalised(pixels(), *IMAGENET))
    assert read["label"] is student["label"]
    torch.testing.assert_close(OwnInput(((), ()), IMAGENET).image(pixels()), normalised(pixels(), *IMAGENET))


def test_images_are_pooled_and_resized_and_grey_ones_get_the_teachers_channels() -> None:
    x = pixels()
    torch.testing.assert_close(OwnInput(pool=2).image(x), nn.functional.avg_pool2d(x, 2))
    assert OwnInput(size=(12, 10)).image(x).shape == (2, 3, 12, 10)
    grey = OwnInput(((0.5,), (0.5,)), IMAGENET).image((x[:, :1] - 0.5) / 0.5)
    torch.testing.assert_close(grey, normalised(x[:, :1].expand(-1, 3, -1, -1), *IMAGENET))
    named = OwnInput(pool=2)({"input": {"pixel_values": x, "mask": torch.ones(2)}})["input"]
    assert named["pixel_values"].shape == (2, 3, 4, 4) and torch.equal(named["mask"], torch.ones(2))
    with pytest.raises(UserError, match="is for images"):
        OwnInput(pool=2).image(torch.zeros(2, 5))
    with pytest.raises(UserError, match="2 channels, but the images have 3"):
        OwnInput(own=((0.5, 0.5), (1.0, 1.0))).image(x)


class Seen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        return self.head(x.mean((2, 3)))


def test_taps_and_embedding_come_from_the_teachers_own_input_and_the_student_keeps_its_own() -> None:
    teacher, student = Seen(), Seen()
    batch = {"input": pixels(), "label": torch.tensor([0, 1])}
    own = FrozenTeacher(teacher, prepare=OwnInput(size=(4, 4)))
    module = Distillation(student, own, ["ce", "kd", "rkd"]).build(batch)
    assert {x.shape[-1] for x in teacher.inputs} == {4} and {x.shape[-1] for x in student.inputs} == {8}
    module.close()
    assert own.fingerprint() != FrozenTeacher(teacher).fingerprint()


def teacher_of(run: Run, spec: dict[str, Any]) -> FrozenTeacher:
    return run.teacher("teacher", TeacherSpec.model_validate(spec), run.config.data)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    tree = {"data": {"name": "cifar10", "size": 100}, "student": "stillhouse:mlp", "objectives": ["ce"]}
    return Run(tmp_path, recipe.validate(tree), cpu=True)


@pytest.mark.parametrize("kind", ["timm", "torchvision", "hf"])
def test_published_normalisation_is_used_for_published_weights(
    kind: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights themselves are not at hand: what is tried is which normalisation a network gets that has them."""
    names = {"timm": "timm:vit_tiny_patch16_224", "torchvision": "torchvision:resnet18", "hf": f"hf:{tmp_path}/folder"}
    expected = {"timm": ((0.5,) * 3, (0.5,) * 3), "torchvision": IMAGENET, "hf": ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))}[
        kind
    ]
    if kind == "hf":
        transformers = pytest.importorskip("transformers")
        sizes = {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "patch_size": 8,
            "image_size": 32,
        }
        transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=10)).save_pretrained(
            tmp_path / "folder"
        )
        (tmp_path / "folder" / "preprocessor_config.json").write_text(
            '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
        )
    else:
        pytest.importorskip(kind)
        name = f"from_{kind}"
        fresh = getattr(sources, name)
        monkeypatch.setattr(
            sources, name, lambda model, classes, shape, given, pretrained: fresh(model, classes, shape, given, False)
        )
    made = teacher_of(run, {"model": names[kind], "pretrained": True})
    prepare = made.readers()[0].prepare
    assert (
        isinstance(prepare, OwnInput)
        and prepare.own == expected
        and prepare.given == run.data(run.config.data).task.normalisation
    )
    given = teacher_of(
        run, {"model": names[kind], "pretrained": True, "input": {"mean": [0, 0, 0], "std": [1, 1, 1], "size": 16}}
    )
    assert given.readers()[0].prepare == OwnInput(prepare.given, ((0, 0, 0), (1, 1, 1)), (16, 16))


def test_other_teachers_see_the_students_input(run: Run) -> None:
    made = teacher_of(run, {"model": "stillhouse:mlp", "train": {"epochs": 1, "batch_size": 50}})
    assert made.readers()[0].prepare is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": [0.5]}, "give mean and std together"),
        ({"std": [0.0], "mean": [0.1]}, "above 0"),
        ({"sise": 3}, "sise"),
    ],
)
def test_wrong_inputs_are_refused(given: dict[str, Any], message: str) -> None:
    tree = {
        "data": "digits",
        "teacher": {"model": "stillhouse:mlp", "checkpoint": "x.pt", "input": given},
        "student": "stillhouse:mlp",
        "objectives": ["kd"],
    }
    with pytest.raises(UserError, match=message):
        recipe.validate(tree)


def test_a_method_that_runs_the_network_itself_says_that_it_takes_no_input(run: Run) -> None:
    spec = TeacherSpec.model_validate({"model": "stillhouse:mlp", "checkpoint": "x.pt", "input": {"size": 16}})
    with pytest.raises(UserError, match="runs its network on the data's"):
        run.network("teacher", spec, DataSpec(name="cifar10"))

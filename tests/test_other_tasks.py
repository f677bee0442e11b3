"""A network of another task is refused when training begins, whoever it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stillhouse
from stillhouse.errors import UserError

DATA = [(torch.randn(4, 3, 16, 16), torch.arange(4) % 3)]


class Classifier(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


class Segmenter(nn.Module):
    """As torchvision's: a mapping with a map of scores, as wide as the image."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(3, 21, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.classifier(x)}


class Detector(nn.Module):
    """As torchvision's: boxes, labels and scores of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [{"boxes": self.head(i.mean((1, 2)))[None], "scores": torch.ones(1)} for i in x]


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            Segmenter,
            r"gives scores of shape \(2, 21, 16, 16\) for 2 samples that have one class each.*another task, such as "
            r"segmentation",
        ),
        (Detector, "a list of dict with boxes, scores: it may be a network of another task, such as detection"),
        (Tokens, r"gives scores of shape \(2, 256, 3\)"),
    ],
)
def test_another_task_is_refused_as_teacher_and_as_student(other: type[nn.Module], message: str) -> None:
    for objectives, teacher, student in [
        (["ce"], None, other()),
        (["ce", "kd"], other(), Classifier()),
        (["kd"], Classifier(), other()),
    ]:
        with pytest.raises(UserError, match=message):
            stillhouse.distill(teacher, student, DATA, objectives, train={"epochs": 1}, progress=False)


def test_soft_labels_say_as_much() -> None:
    with pytest.raises(UserError, match="another task"):
        stillhouse.distill(
            None, Segmenter(), [(DATA[0][0], torch.full((4, 3), 1 / 3))], ["ce"], train={"epochs": 1}, progress=False
        )

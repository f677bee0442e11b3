"""L1: the mean absolute error of an image, to the true one or to the teacher's.

paper: none; the loss of supervised image restoration
task: restoration
family: supervision
use when: a network restores images; with `of: teacher` it learns what a larger one makes of them
needs: a network that gives images, and true images or a teacher

L = mean |x_s - x|, over all pixels and channels. The true image x is the batch's label. With `of: teacher` it is the
teacher's output for the same input, clamped to [0, 1], and labels are not read.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals


@full_precision
def l1_loss(images: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of images (B, C, H, W), one shape. Raises `UserError` for two shapes."""
    if images.shape != target.shape:
        raise UserError(f"l1: the images have shape {tuple(images.shape)}, but the target {tuple(target.shape)}.")
    return F.l1_loss(images, target.detach())


class L1(Objective):
    """Mean absolute error.

    Args:
        of: `label`, the true image; or `teacher`, the teacher's.
    """

    name = "l1"

    def __init__(self, of: Literal["label", "teacher"] = "label") -> None:
        super().__init__()
        self.of = of
        self.needs = frozenset({"student.part:image", "label" if of == "label" else "teacher.part:image"})

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        self._target(teacher, batch)

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"loss": l1_loss(student.require("part:image"), self._target(teacher, batch))}

    def _target(self, teacher: Signals, batch: Batch) -> Tensor:
        if self.of == "label":
            label: Tensor = batch["label"]
            return label
        return teacher.require("part:image").clamp(0, 1)

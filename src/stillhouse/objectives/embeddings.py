"""Embeddings: images and texts are embedded where the teacher embeds them.

paper: none; feature distillation of networks that embed images and texts
task: image and text
family: features
use when: the teacher's space is to be taken over, so that its vectors of texts or classes serve the student too
needs: a teacher that embeds images and texts into as many dimensions as the student

The loss is the mean of 1 - cosine over the images, plus the same over the texts. Images and texts need not belong
together, so that texts without images may be among them (data.options.phrases).
"""

from __future__ import annotations

from torch import Tensor

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals


@full_precision
def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine of the rows of unit embeddings (B, D); the teacher is detached.

    Raises:
        UserError: embeddings of different widths.
    """
    if student.shape != teacher.shape:
        raise UserError(
            f"embeddings: the student embeds into {student.shape[-1]} dimensions and the teacher into "
            f"{teacher.shape[-1]}; give both as many (projection_dim, dim)."
        )
    return 1 - (student * teacher.detach()).sum(-1).mean()


class Embeddings(Objective):
    """Cosine distance of the embeddings of images and of texts.

    Args:
        image, text: weights of the two.
    """

    name = "embeddings"
    needs = frozenset({"student.part:image", "student.part:text", "teacher.part:image", "teacher.part:text"})

    def __init__(self, image: float = 1.0, text: float = 1.0) -> None:
        super().__init__()
        self.weights = {"image": image, "text": text}

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {
            name: weight * cosine_distance(student.require(f"part:{name}"), teacher.require(f"part:{name}"))
            for name, weight in self.weights.items()
            if weight
        }

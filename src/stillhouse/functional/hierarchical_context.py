"""The hierarchical context loss of knowledge review (arXiv 2104.09044): maps compared at several sizes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision


@full_precision
def hcl_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Hierarchical context loss of one stage: mean squared errors at full size (weight 1) and pooled to those of 4, 2,
    1 that are below the map's height (1/2, 1/4, 1/8 in turn), divided by the sum of the weights.

    Args:
        student, teacher: maps (B, C, H, W) of one shape; the teacher's is a constant.

    Raises:
        UserError: maps of two shapes, or of another number of axes.
    """
    if student.shape != teacher.shape or student.ndim != 4:
        raise UserError(
            "The hierarchical context loss takes maps of one shape (B, C, H, W); "
            f"the student's has {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}."
        )
    error = student - teacher.detach()  # the mean of differences is the difference of means
    loss, weight, total = error.square().mean(), 1.0, 1.0
    for size in (4, 2, 1):
        if size < student.shape[2]:
            weight /= 2
            total += weight
            pooled = F.adaptive_avg_pool2d(error, size)
            loss = loss + weight * pooled.square().mean()
            if student.shape[2] % 4 == student.shape[3] % 4 == 0:  # pools of equal size nest
                error = pooled
    return loss / total

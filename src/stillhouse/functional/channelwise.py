"""Channel-wise distillation of maps: each channel is a distribution over positions (Shu et al., ICCV 2021, arXiv
2011.13256)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from stillhouse.functional import checks
from stillhouse.functional.precision import full_precision


@full_precision
def channelwise_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 times the cross-entropy of the teacher's distribution over positions and the student's, mean over channels
    and samples.

    It is not a divergence: for equal maps it is the teacher's entropy.

    Args:
        student, teacher: (B, C, H, W), the teacher's detached.
        temperature: divides both.

    Raises:
        UserError: maps of different shapes.
    """
    checks.same_shape("channel-wise distillation", student, teacher)
    log_q = F.log_softmax(student.flatten(2) / temperature, dim=-1)
    p = F.softmax(teacher.detach().flatten(2) / temperature, dim=-1)
    return -(temperature**2) * (p * log_q).sum(-1).mean()


@full_precision
def channelwise_divergence(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 times KL(softmax(t / T) || softmax(s / T)) over the positions of a channel, mean over channels and samples.

    Its gradient is that of the cross-entropy; for equal maps it is 0.

    Args:
        student, teacher: (B, C, H, W), the teacher's detached.
        temperature: T.

    Raises:
        UserError: maps of different shapes.
    """
    checks.same_shape("channel-wise distillation", student, teacher)
    log_q = F.log_softmax(student.flatten(2) / temperature, dim=-1)
    log_p = F.log_softmax(teacher.detach().flatten(2) / temperature, dim=-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()

"""RKD: distances between samples, and angles of three, are in the student's embedding as in the teacher's.

paper: Relational Knowledge Distillation
venue: CVPR 2019
arxiv: 1904.05068
task: classification, metric learning
family: relations
use when: the geometry of the embedding counts (retrieval), or embeddings differ in width
needs: embeddings of student and teacher

L = 25 * smooth-L1 of pairwise distances, each divided by its mean, + 50 * smooth-L1 of the cosines of all angles. Over
many processes the batch is that of all ranks. Memory grows with B^2 D for the angles. Labels are not used.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.functional import checks
from stillhouse.functional.gather import gather
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals


@full_precision
def rkd_distance_loss(student: Tensor, teacher: Tensor, squared: bool = False) -> Tensor:
    """Smooth L1 between the pairwise distances, each divided by its mean over positive entries (eqs. 5 and 7).

    Args:
        student, teacher: embeddings (B, D) and (B, D').
        squared: use squared distances.
    """
    checks.same_rows("rkd", student, teacher)
    return F.smooth_l1_loss(_relative(distances(student, squared)), _relative(distances(teacher.detach(), squared)))


@full_precision
def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between the cosines of the angles of all triplets (eqs. 9 and 10). Embeddings (B, D) and (B, D')."""
    checks.same_rows("rkd", student, teacher)
    return F.smooth_l1_loss(cosines(student), cosines(teacher.detach()))


@full_precision
def distances(x: Tensor, squared: bool = False, eps: float = 1e-12) -> Tensor:
    """(B, D) -> (B, B) Euclidean distances: 0 on the diagonal, at least sqrt(eps) elsewhere (squared: eps)."""
    lengths = x.square().sum(1)
    found = (lengths[:, None] + lengths[None, :] - 2 * x @ x.t()).clamp_min(eps)
    return (found if squared else found.sqrt()) * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))


@full_precision
def cosines(x: Tensor) -> Tensor:
    """(B, D) -> (B, B, B): at [i, j, k] the cosine of the angle at sample i between j and k."""
    unit = F.normalize(x[None, :] - x[:, None], dim=2)
    return unit @ unit.transpose(1, 2)


def _relative(found: Tensor) -> Tensor:
    return found / (found.sum() / (found > 0).sum().clamp_min(1)).clamp_min(1e-12)


class RKD(Objective):
    """Relational distillation.

    Args:
        distance_weight, angle_weight: weights of the two parts; a part of weight 0 is not computed.
        squared: use squared distances.
    """

    name = "rkd"
    needs = frozenset({"student.embedding", "teacher.embedding"})

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0, squared: bool = False) -> None:
        super().__init__()
        checks.options(
            "rkd",
            non_negative={"distance_weight": distance_weight, "angle_weight": angle_weight},
            positive={"distance_weight + angle_weight": distance_weight + angle_weight},
        )
        self.distance_weight, self.angle_weight, self.squared = distance_weight, angle_weight, squared

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        f_s, f_t = gather(student.require("embedding")), gather(teacher.require("embedding").detach())
        terms = {}
        if self.distance_weight:
            terms["distance"] = self.distance_weight * rkd_distance_loss(f_s, f_t, self.squared)
        if self.angle_weight:
            terms["angle"] = self.angle_weight * rkd_angle_loss(f_s, f_t)
        return terms

"""PKT: the probability that a sample is a neighbour of another is in the student's embedding as in the teacher's.

paper: Learning Deep Representations with Probabilistic Knowledge Transfer
venue: ECCV 2018
arxiv: 1803.10837
task: classification, retrieval
family: relations
use when: the geometry of the embedding counts, or embeddings differ in width
needs: embeddings of student and teacher

p = (cosine + 1) / 2 between the samples of a batch, rows summing to 1; L = mean p_t log(p_t / p_s), weight 30000. Over
many processes the batch is that of all ranks. Labels are not used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.functional import checks
from stillhouse.functional.gather import gather
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals


@full_precision
def pkt_loss(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """Mean over all pairs of p_t log((p_t + eps) / (p_s + eps)) (eqs. 3 to 6). Embeddings (B, D) and (B, D')."""
    checks.same_rows("pkt", student, teacher)
    p_t, p_s = neighbourhood(teacher.detach(), eps), neighbourhood(student, eps)
    return (p_t * torch.log((p_t + eps) / (p_s + eps))).mean()


@full_precision
def neighbourhood(x: Tensor, eps: float = 1e-7) -> Tensor:
    """(B, D) -> (B, B) of (cosine + 1) / 2, rows divided by their sum."""
    unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + eps)
    alike: Tensor = (unit @ unit.t() + 1) / 2
    return alike / alike.sum(1, keepdim=True)


class PKT(Objective):
    """Probabilistic knowledge transfer."""

    name = "pkt"
    needs = frozenset({"student.embedding", "teacher.embedding"})
    default_weight = 30000.0

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"loss": pkt_loss(gather(student.require("embedding")), gather(teacher.require("embedding").detach()))}

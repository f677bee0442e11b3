"""DML: two networks learn together, each from the labels and from the other's current prediction.

paper: Deep Mutual Learning
venue: CVPR 2018
arxiv: 1706.00384
task: classification
family: online
use when: there is no trained teacher, and a second network can be trained along
needs: labels; a co-trained peer as the teacher

The student's own cross-entropy is the objective `ce`; the terms here are the student's KL to its peer, and the peer's
cross-entropy and KL to the student. Each side takes the other's prediction as a constant. Both networks step at once,
where the paper updates them in turn on each batch. Soft labels are used as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional import checks
from stillhouse.functional.divergences import kl_divergence
from stillhouse.functional.precision import full_precision
from stillhouse.objectives.ce import cross_entropy
from stillhouse.signals import Batch, Signals


@full_precision
def mutual_loss(student_logits: Tensor, peer_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(peer || student) with the peer as a constant; (B, C) and (B, C) -> scalar. Eqs. 4 and 5 of the paper at
    temperature 1."""
    checks.same_classes("dml", student_logits, peer_logits)
    return temperature**2 * kl_divergence(
        student_logits, F.log_softmax(peer_logits.detach() / temperature, dim=-1), temperature
    )


class DML(Objective):
    """Mutual learning of a student and a peer.

    Args:
        temperature: of the divergences in both directions.
    """

    name = "dml"
    needs = frozenset({"student.logits", "teacher.logits", "label"})

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        checks.options("dml", positive={"temperature": temperature})
        self.temperature = temperature

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        mine, peer = student.require("logits"), teacher.logits
        if peer is None or (torch.is_grad_enabled() and not peer.requires_grad):
            raise UserError(
                f"dml: the teacher '{self.teacher}' must be a network that trains along: give it as `peer:`, not as "
                "`model:`."
            )
        return {
            "student_kl": mutual_loss(mine, peer, self.temperature),
            "peer_ce": cross_entropy(peer, batch["label"]),
            "peer_kl": mutual_loss(peer, mine, self.temperature),
        }

"""Own losses: what a network computes itself from its targets, such as a detector's.

task: detection
paper: none; the network's own
family: supervision
use when: the student is a detector; add it to the objectives that distil it
needs: a network that gives losses of its own, and its targets

Which they are depends on the network: boxes, objectness and classes of our one-stage detectors; those of torchvision's
detectors by name; for transformers' DETR family the weighted sum over all decoder layers, with the last layer's terms
in the log.
"""

from __future__ import annotations

from torch import Tensor

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError
from stillhouse.signals import Batch, Signals


class Own(Objective):
    """The sum of `Signals.losses`."""

    name = "own"
    needs = frozenset({"student.losses"})

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        if not student.losses:
            raise UserError(
                "The objective 'own' needs losses that the network computes itself, but this one gives none; take a "
                "task whose networks do, such as detection, or another objective, such as ce."
            )
        return dict(student.losses)

"""PS-KD: the student learns from a mix of the label and its own prediction of one epoch ago, whose share grows over
training.

paper: Self-Knowledge Distillation with Progressive Refinement of Targets
venue: ICCV 2021
arxiv: 2006.12000
task: classification
family: self-distillation
use when: there is no teacher, and better calibrated confidences are wanted at no cost in compute
needs: labels; the sample index and `teacher: {past_self: true}`, or `past: snapshot` and no teacher

The loss takes the place of the cross-entropy: list it alone. Published settings: alpha 0.8 on CIFAR-100; about 0.3 on
ImageNet (not confirmed by code).
The released code is followed: the past prediction is the one that training itself gave last epoch, in a table of N
x C probabilities (in the first
epoch the labels). `past: snapshot` is the paper's other view, the network of the last epoch called on the present
input: no table, no index, a second forward; it runs in evaluation mode (a choice). Soft labels of mixup need the
snapshot, as a table row belongs to an unmixed sample; they are mixed with its prediction of the mixed input. The share
grows with the epoch of all epochs, so stopping early also stops it short. `calibration` gives ECE, AURC and E-AURC in
the paper's units.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Context, Objective, Progress
from stillhouse.errors import UserError
from stillhouse.evaluation.classification import aurc, excess_aurc, expected_calibration_error
from stillhouse.functional import checks
from stillhouse.functional.divergences import soft_cross_entropy
from stillhouse.functional.labels import check_label, is_soft
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals, call_model, read_logits


def share(alpha: float, epoch: int, epochs: int) -> float:
    """The past's share of the target in an epoch (from 0): alpha (epoch + 1) / epochs; eq. 6 of the paper.

    >>> share(0.8, 0, 4), share(0.8, 3, 4)
    (0.2, 0.8)
    """
    return max(0.0, alpha * (epoch + 1) / max(epochs, 1))


@full_precision
def refined_targets(labels: Tensor, past: Tensor, share: float) -> Tensor:
    """(1 - share) label + share * past prediction; labels (B,) or soft (B, C), past (B, C) probabilities -> (B, C). Eq.
    5 of the paper.

    Raises:
        UserError: labels that do not fit, or (on the CPU) a class id out of range.
    """
    check_label("ps_kd", labels, past)
    one_hot = labels if is_soft(labels) else F.one_hot(labels, past.shape[1])
    return (1 - share) * one_hot + share * past


@full_precision
def ps_kd_loss(student_logits: Tensor, labels: Tensor, past: Tensor, share: float) -> Tensor:
    """Cross-entropy with the refined targets, temperature 1; (B, C) logits, (B,) labels, (B, C) past probabilities ->
    scalar."""
    checks.same_classes("ps_kd", student_logits, past)
    return soft_cross_entropy(student_logits, refined_targets(labels, past, share))


def calibration(probs: Tensor, labels: Tensor, bins: int = 10) -> dict[str, float]:
    """The paper's figures of probabilities (N, C) and labels (N,): `ece` in percent over equal bins, `aurc` and `eaurc`
    times 1000.

    Of samples with equal confidence the released code takes an arbitrary order, this their expectation.
    """
    correct, confidence = probs.argmax(-1) == labels, probs.amax(-1)
    return {
        "ece": 100 * expected_calibration_error(probs, labels, bins),
        "aurc": 1000 * aurc(confidence, correct),
        "eaurc": 1000 * excess_aurc(confidence, correct),
    }


class PSKD(Objective):
    """Progressive self-knowledge distillation, in place of the cross-entropy.

    Args:
        alpha: the past's share of the target in the last epoch, in [0, 1]; 0 is plain cross-entropy.
        past: `table`: what the `past_self` teacher remembers of each sample; `snapshot`: the network as it was when the
            epoch began.
    """

    name = "ps_kd"

    def __init__(self, alpha: float = 0.8, past: Literal["table", "snapshot"] = "table") -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UserError(f"ps_kd: alpha must lie between 0 and 1; given: {alpha}.")
        self.alpha, self.past = alpha, past
        self.needs = frozenset(
            {"student.logits", "label"} | ({"teacher.logits", "index"} if past == "table" else set())
        )
        self.snapshot: nn.Module | None = None

    def prepare(self, ctx: Context) -> None:
        if self.past == "snapshot":
            self.snapshot = copy.deepcopy(ctx.student).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> PSKD:
        super().train(mode)
        if self.snapshot is not None:
            self.snapshot.eval()
        return self

    @torch.no_grad()
    def begin_epoch(self, ctx: Context) -> None:
        if self.snapshot is not None:
            for mine, theirs in zip(self.snapshot.state_dict().values(), ctx.student.state_dict().values()):
                mine.copy_(theirs)

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        labels, logits = batch["label"], student.require("logits")
        growing = share(self.alpha, progress.epoch, progress.epochs)
        if self.past == "table":
            if is_soft(labels):
                raise UserError(
                    "ps_kd: the table remembers unmixed samples, but labels are soft; turn mixup and cutmix off, or "
                    "set past: snapshot."
                )
            return {"loss": ps_kd_loss(logits, labels, teacher.log_probs().exp().detach(), growing)}
        if self.snapshot is None or progress.epoch == 0:  # the first epoch has no past: its target is the label
            return {"loss": ps_kd_loss(logits, labels, torch.zeros_like(logits, dtype=torch.float32), 0.0)}
        with torch.no_grad():
            previous = torch.softmax(read_logits(call_model(self.snapshot, batch)).float(), dim=-1)
        return {"loss": ps_kd_loss(logits, labels, previous, growing)}

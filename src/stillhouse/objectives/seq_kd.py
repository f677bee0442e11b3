"""Sequence-level KD: the student learns the sequences that the teacher would write, as if they were the data.

paper: Sequence-Level Knowledge Distillation
venue: EMNLP 2016
arxiv: 1606.07947
task: language
family: logits
use when: the teacher can generate but its logits cannot be had, or its vocabulary is another
needs: labels, which are tokens that the teacher generated

L = -log q(y) of the teacher's output y (beam search in the paper), which stands for the whole distribution over
sequences. The data must already be the teacher's: `label` (B, L) holds its tokens, -100 where none counts. `average:
sequence` is the paper's sum over a sequence, mean over sequences; `token` weighs every token alike, as is usual since.
Where the student gives the taps `hidden` and `output_weight` in the place of logits, no tensor of logits is ever made.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional.chunked import linear_cross_entropy
from stillhouse.functional.counting import IGNORED, Reduction, both, counted, counted_mean, step_count
from stillhouse.functional.heads import head_of
from stillhouse.functional.labels import check_range
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals


@full_precision
def seq_kd_loss(
    student_logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    count: Tensor | float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """-log q of the teacher's tokens, (B, L, V) and (B, L) -> scalar: the mean over the tokens that are not -100, or
    their sum; eq. 7 of the paper.

    Raises:
        UserError: tokens of another shape, or (on the CPU) out of range.
    """
    if tokens.shape != student_logits.shape[:-1]:
        raise UserError(
            f"seq_kd: tokens must have shape {tuple(student_logits.shape[:-1])}, one a position; given: "
            f"{tuple(tokens.shape)}."
        )
    counts = both(mask, tokens != IGNORED)
    targets = tokens.masked_fill(~counts, 0)
    check_range("seq_kd", targets, student_logits.shape[-1])
    rows = F.cross_entropy(student_logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
    return counted_mean(rows, counts, count, reduction)


class SeqKD(Objective):
    """Cross-entropy with the teacher's sequences.

    Args:
        average: over all tokens that count, or over sequences (of the sum of each).
    """

    name = "seq_kd"
    needs = frozenset({"student.logits", "label"})
    positions = True
    reads_hidden = True

    def __init__(self, average: Literal["token", "sequence"] = "token") -> None:
        super().__init__()
        self.average = average

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        tokens: Tensor = batch["label"]
        counts = counted(batch, tokens.shape)
        count = (
            step_count(batch, tokens, counts, share=self.training) if self.average == "token" else float(len(tokens))
        )
        if student.logits is None:
            return {"loss": linear_cross_entropy(head_of(student, "student"), tokens, mask=counts, count=count)}
        return {"loss": seq_kd_loss(student.logits, tokens, counts, count)}

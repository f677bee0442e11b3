"""CE: cross-entropy with the labels, hard or soft, with label smoothing.

task: classification
family: supervision
use when: labels are there; most recipes put it beside a distillation objective
needs: labels

Label smoothing is that of Szegedy et al. (CVPR 2016, arXiv 1512.00567). Soft labels (B, C) of mixup are used as they are. Logits (B, L, V) of a
language model take labels (B, L); logits (B, C, H, W) of a segmenter take labels (B, H, W). Of hard labels, the batch's `mask` says which count. Where the
student gives the taps `hidden` and `output_weight` in the place of logits, no tensor of logits is ever made.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional import checks
from stillhouse.functional.chunked import linear_cross_entropy
from stillhouse.functional.heads import head_of
from stillhouse.functional.labels import check_range, is_soft
from stillhouse.functional.precision import full_precision
from stillhouse.functional.token_losses import counted, step_count
from stillhouse.signals import Batch, Signals


@full_precision
def cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, ignore_index: int = -100, count: Tensor | float | None = None
) -> Tensor:
    """Mean cross-entropy of the samples (tokens, pixels) whose label is not `ignore_index`.

    Args:
        logits: (B, C), (B, L, V) or (B, C, H, W).
        labels: class ids (B,), (B, L) or (B, H, W); or soft labels (B, C).
        count: what the sum is divided by instead of the number of those samples (see `stillhouse.functional.token_losses.step_count`).

    Raises:
        UserError: shapes that do not fit, or (on the CPU) a class id out of range.
    """
    if logits.ndim == 3:
        logits, labels = logits.flatten(0, 1), labels.flatten()
    expected = (len(logits), *logits.shape[2:])
    if is_soft(labels):
        if labels.shape != logits.shape:
            raise UserError(f"ce: soft labels must have the logits' shape {tuple(logits.shape)}; given: {tuple(labels.shape)}.")
    elif labels.shape != expected:
        raise UserError(f"ce: labels must be class ids of shape {expected} for logits of shape {tuple(logits.shape)}; given: {tuple(labels.shape)}.")
    else:
        check_range("ce", labels[labels != ignore_index] if labels.device.type == "cpu" else labels, logits.shape[1])
    if count is not None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, ignore_index=ignore_index, reduction="sum") / count
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, ignore_index=ignore_index)


class CrossEntropy(Objective):
    """Cross-entropy with the batch's labels.

    Args:
        label_smoothing: share of the label's mass spread evenly over all classes.
        ignore_index: the class id that counts for nothing (padding, unlabelled pixels).
    """

    name = "ce"
    needs = frozenset({"student.logits", "label"})

    def __init__(self, label_smoothing: float = 0.0, ignore_index: int = -100) -> None:
        super().__init__()
        checks.options("ce", share={"label_smoothing": label_smoothing})
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.reads_hidden = label_smoothing == 0

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        label, count = batch["label"], None
        tokens = student.logits is None or student.logits.ndim == 3
        if not is_soft(label):
            mask = counted(batch, label.shape) if batch.get("mask") is not None else None
            if mask is not None:
                label = label.masked_fill(~mask, self.ignore_index)
            if tokens:  # each weighs the same in a step of several batches
                count = step_count(batch, label, label != self.ignore_index, share=self.training)
        if student.logits is None:
            return {"loss": linear_cross_entropy(head_of(student, "student"), label, ignore_index=self.ignore_index, count=count)}
        return {"loss": cross_entropy(student.logits, label, self.label_smoothing, self.ignore_index, count)}

"""CE: cross-entropy with the labels, hard or soft, with label smoothing.

task: classification
paper: none; the loss of supervised learning
family: supervision
use when: labels are there; most recipes add it to a distillation objective
needs: labels

Label smoothing is that of Szegedy et al. (CVPR 2016, arXiv 1512.00567). Soft labels (B, C) of mixup are used as they
are. Logits (B, L, V) of a language model take labels (B, L); logits (B, H, W, C) of a segmenter take labels (B, H, W).
The mean is over the labels that are not -100. Where the student gives the taps `hidden` and `output_weight` in the
place of logits, no tensor of logits is ever made.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional import checks
from stillhouse.functional.chunked import linear_cross_entropy
from stillhouse.functional.counting import IGNORED, counted, counted_mean, step_count
from stillhouse.functional.heads import head_of
from stillhouse.functional.labels import check_range, is_soft
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals


@full_precision
def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORED,
    counts: Tensor | None = None,
    count: Tensor | float | None = None,
) -> Tensor:
    """Mean cross-entropy of the samples (tokens, pixels) that count; 0 where none does.

    Args:
        logits: class axis last, (B, C), (B, L, V) or (B, H, W, C); or (B, C, H, W) with labels (B, H, W), as PyTorch's
            own networks give pixels.
        labels: class ids (B,), (B, L) or (B, H, W), which count where they are not `ignore_index`; or soft labels of
            the logits' shape.
        counts: of the shape of class ids, True where a position counts; default: all.
        count: what the sum is divided by instead of the number that counts (see
            `stillhouse.functional.counting.step_count`).

    Raises:
        UserError: shapes that do not fit, or (on the CPU) a class id out of range.
    """
    soft = is_soft(labels)
    if soft and labels.shape != logits.shape:
        raise UserError(
            f"ce: soft labels must have the logits' shape {tuple(logits.shape)}; given: {tuple(labels.shape)}."
        )
    if not soft and labels.shape != logits.shape[:-1]:
        if logits.ndim < 4 or labels.shape != logits.shape[:1] + logits.shape[2:]:
            raise UserError(
                f"ce: labels must be class ids of shape {tuple(logits.shape[:-1])} for logits of shape "
                f"{tuple(logits.shape)}; "
                f"given: {tuple(labels.shape)}."
            )
        logits = logits.movedim(1, -1)
    if not soft:
        ignored = labels == ignore_index if counts is None else (labels == ignore_index) | ~counts
        labels, counts = labels.masked_fill(ignored, ignore_index), ~ignored
        check_range("ce", labels[counts] if labels.device.type == "cpu" else labels, logits.shape[-1])
    if count is None:
        count = float(max(logits[..., 0].numel(), 1)) if counts is None else counts.sum().clamp_min(1)
    if logits.ndim > 3:  # pixels, which lie in memory class by class
        logits, labels = logits.movedim(-1, 1), labels.movedim(-1, 1) if soft else labels
    elif logits.ndim == 3:
        logits, labels = logits.flatten(0, 1), labels.flatten(0, 1)
    if soft and counts is not None:
        rows = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
        return counted_mean(rows.view(counts.shape), counts, count)
    return (
        F.cross_entropy(logits, labels, label_smoothing=label_smoothing, ignore_index=ignore_index, reduction="sum")
        / count
    )


class CrossEntropy(Objective):
    """Cross-entropy with the batch's labels.

    Args:
        label_smoothing: share of the label's mass spread evenly over all classes.
        ignore_index: the class id that counts for nothing (padding, unlabelled pixels).
    """

    name = "ce"
    needs = frozenset({"student.logits", "label"})
    positions = True

    def __init__(self, label_smoothing: float = 0.0, ignore_index: int = -100) -> None:
        super().__init__()
        checks.options("ce", share={"label_smoothing": label_smoothing})
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.reads_hidden = label_smoothing == 0

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        label: Tensor = batch["label"]
        like = label[..., 0] if is_soft(label) else label
        counts = counted(batch, like.shape, self.ignore_index)
        count = step_count(batch, like, counts, share=self.training)
        if student.logits is None:
            return {
                "loss": linear_cross_entropy(
                    head_of(student, "student"), label, mask=counts, ignore_index=self.ignore_index, count=count
                )
            }
        return {"loss": cross_entropy(student.logits, label, self.label_smoothing, self.ignore_index, counts, count)}

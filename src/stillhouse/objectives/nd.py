"""ND: pulls the student's embedding towards its class's mean teacher embedding, and its norm up to the teacher's.

paper: Improving Knowledge Distillation via Regularizing Feature Norm and Direction
venue: ECCV 2024
arxiv: 2305.17007
task: classification
family: features
use when: a gain on top of kd, dkd, dist or review_kd is wanted (KD++, DKD++, DIST++, ReviewKD++)
needs: labels; embeddings of student and teacher; one pass of the teacher over the training set

KD++ is ce + kd (weight with a linear warm-up of 20 epochs, 5 on ImageNet) + nd. Published weights of nd lie between 0.5
and 4 by pair of networks, 1 without tuning. Class means come from one pass of the teacher in evaluation mode under
evaluation transforms (the released script uses the training ones), or from the authors' table. Where widths differ an
adapter brings the student's embedding to the teacher's; logits do not pass through it. Class ids only. Watch
`log:norm_ratio` and `log:cosine`: both rise where the term is at work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Context, Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional import checks
from stillhouse.functional.labels import check_range, hard_only
from stillhouse.functional.precision import full_precision
from stillhouse.signals import Batch, Signals

Variant = Literal["nd", "cosine", "norm"]


@full_precision
def nd_loss(student: Tensor, teacher: Tensor, class_means: Tensor, labels: Tensor, variant: Variant = "nd") -> Tensor:
    """Mean of 1 - <f_s, e_y> / max(|f_s|, |f_t|), with e_y the unit vector along the mean of class y (eq. 8 of the
    paper, with the constant 1).

    Args:
        student, teacher: embeddings (B, D).
        class_means: (K, D), of any length; NaN for a class without samples.
        labels: class ids (B,).
        variant: `nd`; or the paper's ablations `cosine`, 1 - cos(f_s, e_y), and `norm`, max(0, 1 - |f_s| / |f_t|).

    Raises:
        UserError: embeddings of unequal shape, soft labels, or (on the CPU) a class out of range or without a mean.
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise UserError(
            f"nd: embeddings must have one shape (B, D); the student's has {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)}."
        )
    hard_only("nd", labels)
    check_range("nd", labels, len(class_means))
    if labels.device.type == "cpu":
        absent = labels[class_means[labels, 0].isnan()]
        if len(absent):
            raise UserError(f"nd: class {int(absent[0])} has no mean embedding: no training sample of it was seen.")
    norm_s, norm_t = student.norm(dim=1), teacher.detach().norm(dim=1)
    if variant == "norm":
        return F.relu(1 - norm_s / norm_t.clamp_min(1e-12)).mean()
    along = (student * F.normalize(class_means, dim=1)[labels]).sum(1)
    # torch.where takes the student's norm on a tie, as the released code does; torch.maximum would halve the gradient
    longer = torch.where(norm_s >= norm_t, norm_s, norm_t) if variant == "nd" else norm_s
    return (1 - along / longer.clamp_min(1e-12)).mean()


@full_precision
def class_means(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean embedding of each class, (K, D), summed in float64; NaN where a class has no sample.

    Args:
        embeddings: (N, D) of the teacher over the training set.
        labels: class ids (N,).
    """
    counts = torch.bincount(labels, minlength=num_classes)
    sums = torch.zeros(num_classes, embeddings.shape[1], dtype=torch.float64, device=embeddings.device)
    return (sums.index_add_(0, labels, embeddings.double()) / counts[:, None]).to(embeddings.dtype)


def read_class_means(path: str | Path, num_classes: int, width: int) -> Tensor:
    """The authors' table, JSON `{"0": [D numbers], …}`, as (K, D); classes that it lacks are NaN. Raises `UserError`
    for another form."""
    try:
        table = {int(k): [float(x) for x in row] for k, row in json.loads(Path(path).read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"nd: class_means: {path} is no table of the form {{class id: [numbers]}} ({error}).") from None
    wrong = [k for k, row in table.items() if not 0 <= k < num_classes or len(row) != width]
    if wrong:
        raise UserError(
            f"nd: class_means: {path} must hold classes 0 to {num_classes - 1} with {width} numbers each; class "
            f"{wrong[0]} does not fit."
        )
    means = torch.full((num_classes, width), float("nan"))
    for k, row in table.items():
        means[k] = torch.tensor(row)
    return means


def adapter(student_width: int, teacher_width: int, dropout: float = 0.5, std: float | None = None) -> nn.Sequential:
    """BatchNorm1d, Dropout, Linear, as published: weights of PyTorch's default and zero bias, or with `std` both normal
    (0.01 on ImageNet)."""
    linear = nn.Linear(student_width, teacher_width)
    if std is None:
        nn.init.zeros_(linear.bias)
    else:
        nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(linear.bias, std=std)
    return nn.Sequential(nn.BatchNorm1d(student_width), nn.Dropout(dropout), linear)


class ND(Objective):
    """Regularises the norm and the direction of the student's embedding.

    Args:
        variant: `nd`, or one half of it: `cosine` (direction only), `norm` (norm only).
        adapter_dropout: of the adapter that is made where student and teacher embeddings differ in width.
        adapter_std: standard deviation of the adapter's initial weights; default: PyTorch's own (CIFAR). ImageNet:
            0.01.
        class_means: a JSON table of class means to use instead of a pass over the training set.
    """

    name = "nd"
    needs = frozenset({"student.logits", "student.embedding", "teacher.embedding", "label"})
    means: Tensor

    def __init__(
        self,
        variant: Variant = "nd",
        adapter_dropout: float = 0.5,
        adapter_std: float | None = None,
        class_means: str | None = None,
    ) -> None:
        super().__init__()
        checks.options(
            "nd", share={"adapter_dropout": adapter_dropout}, non_negative={"adapter_std": adapter_std or 0.0}
        )
        self.variant, self.adapter_dropout, self.adapter_std, self.table = (
            variant,
            adapter_dropout,
            adapter_std,
            class_means,
        )
        self.adapter: nn.Sequential | None = None

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        width, wanted = (signals.require("embedding").shape[-1] for signals in (student, teacher))
        classes = student.require("logits").shape[-1]
        if width != wanted:
            self.adapter = adapter(width, wanted, self.adapter_dropout, self.adapter_std)
        means = torch.zeros(classes, wanted) if self.table is None else read_class_means(self.table, classes, wanted)
        self.register_buffer("means", means)

    def prepare(self, ctx: Context) -> None:
        if self.table is None:
            means, counts = ctx.class_mean("embedding", of=self.teacher)
            self.means.fill_(float("nan"))
            self.means[: len(means)] = torch.where(counts[:, None] > 0, means, float("nan"))

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        f_s, f_t = student.require("embedding"), teacher.require("embedding")
        if self.adapter is not None:
            if self.training and len(f_s) == 1:
                raise UserError(
                    "nd: the adapter's batch norm cannot train on a batch of one sample; drop the last incomplete "
                    "batch."
                )
            f_s = self.adapter(f_s)
        loss = nd_loss(f_s, f_t, self.means, batch["label"], self.variant)
        with torch.no_grad():
            f_s, f_t = f_s.float(), f_t.float()
            ratio = (f_s.norm(dim=1) / f_t.norm(dim=1).clamp_min(1e-12)).mean()
            cosine = F.cosine_similarity(f_s, self.means[batch["label"]], dim=1).mean()
        return {"loss": loss, "log:norm_ratio": ratio, "log:cosine": cosine}

"""Figures of a classifier: accuracy and calibration over a loader, and the pure functions behind them.

All figures are fractions, not percent. Calibration error as in Guo et al. 2017 (arXiv 1706.04599); risk and coverage as in Geifman et al. 2019
(arXiv 1805.08206). Papers print ECE times 100 and AURC times 1000.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError, unknown
from stillhouse.signals import Batch, call_model, evaluating, read_logits, to_device

GROUPS = ("accuracy", "calibration")


def evaluate_classifier(
    model: nn.Module, loader: Iterable[Batch], device: torch.device | str = "cpu", groups: Sequence[str] = GROUPS
) -> dict[str, float]:
    """Figures of a classifier over a loader, as fractions.

    Args:
        model: any classifier on `device`; its mode (training or evaluation, submodule by submodule) is as before afterwards.
        loader: yields batches with `input` (tensor or mapping of tensors) and `label` (B,) class indices.
        device: where batches are moved to. Outputs stay there until the last batch, then move to the host once.
        groups: `accuracy` gives `accuracy`, and `accuracy_top5` where there are more than 5 classes; `calibration` gives `nll` (mean negative
            log-likelihood, in nats), `ece` (15 bins), `brier` and `aurc`.

    Raises:
        UserError: an unknown group, an empty loader, outputs that are not (B, C), labels that are not (B,) or not in 0 … C-1, or NaN in the outputs.
    """
    for group in groups:
        if group not in GROUPS:
            raise unknown("evaluation group", group, GROUPS)
    logits, labels = collect_logits(model, loader, device)
    correct = logits.argmax(-1) == labels
    out: dict[str, float] = {}
    if "accuracy" in groups:
        out["accuracy"] = correct.double().mean().item()
        if logits.shape[1] > 5:
            out["accuracy_top5"] = (logits.topk(5).indices == labels[:, None]).any(-1).double().mean().item()
    if "calibration" in groups:
        probs = logits.softmax(-1)
        out["nll"] = nll(logits, labels)
        out["ece"] = expected_calibration_error(probs, labels)
        out["brier"] = brier(probs, labels)
        out["aurc"] = aurc(probs.amax(-1), correct)
    return out


def collect_logits(model: nn.Module, loader: Iterable[Batch], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Logits (N, C) in float32 and labels (N,) of a whole loader, on the host. Raises as `evaluate_classifier`."""
    parts: list[Tensor] = []
    targets: list[Tensor] = []
    with evaluating(model):
        for batch in loader:
            given = {"input": to_device(batch["input"], device)}
            logits, label = read_logits(call_model(model, given)), batch["label"]
            if logits.ndim != 2 or label.shape != logits.shape[:1]:
                raise UserError(
                    f"Evaluating a classifier needs logits of shape (B, C) and class indices of shape (B,); "
                    f"got logits {tuple(logits.shape)} and labels {tuple(label.shape)}."
                )
            parts.append(logits.float())
            targets.append(label)
    if not parts:
        raise UserError("There is nothing to evaluate on: the loader gave no batch; take a larger test set or a smaller batch.")
    everything, labels = torch.cat(parts).cpu(), torch.cat([t.cpu() for t in targets]).long()
    low, high, width = int(labels.min()), int(labels.max()), everything.shape[1]
    if low < 0 or high >= width:
        raise UserError(
            f"Labels run from {low} to {high}, but the model has {width} classes (0 to {width - 1}); give it as many classes as the data has."
        )
    broken = int(everything.isnan().any(-1).sum())
    if broken:
        raise UserError(
            f"The model's outputs are NaN for {broken} of {len(labels)} samples, so it cannot be judged; train with a lower learning rate."
        )
    return everything, labels


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood in nats of logits (N, C) (log-probabilities serve as well) and labels (N,)."""
    return F.nll_loss(F.log_softmax(logits, dim=-1), labels, reduction="none").double().mean().item()


def brier(probs: Tensor, labels: Tensor) -> float:
    """Brier score: the squared distance of probabilities (N, C) from the one-hot label, summed over classes, mean over samples; in [0, 2]."""
    return (probs - F.one_hot(labels, probs.shape[-1])).double().square().sum(-1).mean().item()


@dataclass(frozen=True)
class Reliability:
    """What a reliability diagram shows: samples by confidence, in equal-width bins. Each tensor is (bins,); an empty bin holds zeros."""

    share: Tensor  # of all samples, in the bin
    confidence: Tensor  # mean in the bin
    accuracy: Tensor  # mean in the bin


def reliability(probs: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Accuracy against confidence (the largest probability) of probabilities (N, C) and labels (N,), in bins (i/bins, (i+1)/bins]."""
    confidence, predicted = probs.max(-1)
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    where = torch.bucketize(confidence, edges[1:-1])
    mean_over = torch.bincount(where, minlength=bins).double()

    def mean_in_bin(x: Tensor) -> Tensor:
        return torch.zeros(bins, dtype=torch.double, device=x.device).index_add_(0, where, x.double()) / mean_over.clamp_min(1)

    return Reliability(mean_over / len(labels), mean_in_bin(confidence), mean_in_bin(predicted == labels))


def expected_calibration_error(probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: the gap between confidence and accuracy, mean over equal-width bins weighted by their samples; in [0, 1].

    Args:
        probs: probabilities (N, C).
        labels: class indices (N,).
        bins: how many; 15 is usual, some papers take 10.

    >>> expected_calibration_error(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
    0.25
    """
    r = reliability(probs, labels, bins)
    return (r.share * (r.confidence - r.accuracy).abs()).sum().item()


def aurc(confidence: Tensor, correct: Tensor) -> float:
    """Area under the risk-coverage curve: the error rate among the k most confident samples, mean over k = 1 … N; in [0, 1], lower is better.

    Equal confidences count as if in random order (its expectation), so the figure does not depend on the order of the data.

    Args:
        confidence: (N,).
        correct: (N,), bool.
    """
    confidence, order = confidence.sort(descending=True)
    _, tie, size = torch.unique_consecutive(confidence, return_inverse=True, return_counts=True)
    wrong = 1.0 - correct[order].double()
    wrong = (torch.zeros(len(size), dtype=torch.double, device=wrong.device).index_add_(0, tie, wrong) / size)[tie]
    seen = torch.arange(1, len(wrong) + 1, dtype=torch.double, device=wrong.device)
    return float((wrong.cumsum(0) / seen).mean())


def excess_aurc(confidence: Tensor, correct: Tensor) -> float:
    """E-AURC: `aurc` less that of the best possible ranking with as many errors (all errors least confident); 0 is a perfect ranking."""
    best = torch.arange(len(correct), dtype=torch.double, device=correct.device)
    return aurc(confidence, correct) - aurc(-best, best < correct.sum())


def kendall_tau(student: Tensor, teacher: Tensor, labels: Tensor, chunk: int = 2**24) -> float:
    """How much student and teacher agree on the order of the classes other than the label: Kendall's tau-b of their logits, mean over samples.

    Args:
        student: logits (N, C), C >= 3.
        teacher: logits (N, C) in the same class order; log-probabilities serve as well.
        labels: class indices (N,); each sample's own label is left out of its ranking.
        chunk: pairs of classes compared at once, a bound on memory.

    Returns:
        From -1 (reversed) to 1 (the same order). Samples where one side has all classes equal have no order and are left out.

    Raises:
        UserError: logits of different shapes, or fewer than three classes.
    """
    if student.shape != teacher.shape or student.ndim != 2 or student.shape[1] < 3:
        raise UserError(f"Kendall's tau needs two (N, C) logits with C >= 3; got {tuple(student.shape)} and {tuple(teacher.shape)}.")
    n, classes = student.shape
    others = F.one_hot(labels, classes) == 0
    s, t = student[others].view(n, classes - 1), teacher[others].view(n, classes - 1)
    taus = []
    for a, b in zip(s.split(max(1, chunk // classes**2)), t.split(max(1, chunk // classes**2))):
        x, y = (torch.sign(v[:, :, None] - v[:, None, :]) for v in (a, b))
        taus.append((x * y).sum((1, 2)) / (x.abs().sum((1, 2)) * y.abs().sum((1, 2))).sqrt())
    return torch.cat(taus).double().nanmean().item()

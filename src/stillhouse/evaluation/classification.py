"""Figures of a classifier: accuracy and calibration over a loader, and the pure functions behind them.

All figures are fractions, not percent. Calibration error as in Guo et al. 2017 (arXiv 1706.04599); risk and coverage as
in Geifman et al. 2019 (arXiv 1805.08206). Papers print ECE times 100 and AURC times 1000.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError, unknown
from stillhouse.evaluation.judge import judge, measured, one_sample
from stillhouse.signals import Batch, Signals, call_model, read_logits

GROUPS = ("accuracy", "calibration")
FREQUENCY = "frequency"
"""The group of figures by how many training samples a class has."""
MANY, FEW = 100, 20
"""Classes of more than `MANY` training samples, and of fewer than `FEW`; as in Liu et al., CVPR 2019 (arXiv
1904.05160)."""


class ClassificationMeter:
    """Figures of a classifier, as fractions. Logits stay on their device until the last batch, then move to the host
    once.

    Args:
        groups: `accuracy` gives `accuracy`, and `accuracy_top5` where there are more than 5 classes; `calibration`
            gives `nll` (mean negative log-likelihood, in nats), `ece` (15 bins), `brier` and `aurc`; `frequency` gives
            `accuracy_many`, `accuracy_medium` and `accuracy_few` over the test samples of such classes, where there are
            any.
        counts: training samples of each class, for `frequency`.
    """

    def __init__(self, groups: Sequence[str] = GROUPS, counts: Sequence[int] = ()) -> None:
        known = (*GROUPS, FREQUENCY) if counts else GROUPS
        for group in groups:
            if group not in known:
                raise unknown("evaluation group", group, known)
        self.groups, self._counts = groups, counts
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, batch: Batch, outputs: Signals) -> None:
        """Take the logits (B, C) of a batch and its `label` (B,) class indices."""
        logits, label = outputs.logits, batch["label"]
        shape = None if logits is None else tuple(logits.shape)
        if logits is None or logits.ndim != 2 or label.shape != logits.shape[:1]:
            raise UserError(
                f"Evaluating a classifier needs logits of shape (B, C) and class indices of shape (B,); "
                f"got logits {shape} and labels {tuple(label.shape)}."
            )
        self._logits.append(logits.float())
        self._labels.append(label)

    def collected(self) -> tuple[Tensor, Tensor]:
        """Logits (N, C) in float32 and labels (N,) of all batches, on the host."""
        if not self._logits:
            raise UserError(
                "There is nothing to evaluate on: the loader gave no batch; take a larger test set or a smaller batch."
            )
        logits, labels = torch.cat(self._logits).cpu(), torch.cat([t.cpu() for t in self._labels]).long()
        low, high, width = int(labels.min()), int(labels.max()), logits.shape[1]
        if low < 0 or high >= width:
            raise UserError(
                f"Labels run from {low} to {high}, but the model has {width} classes (0 to {width - 1}); give it as "
                "many classes as the data has."
            )
        broken = int(logits.isnan().any(-1).sum())
        if broken:
            raise UserError(
                f"The model's outputs are NaN for {broken} of {len(labels)} samples, so it cannot be judged; train "
                "with a lower learning rate."
            )
        return logits, labels

    def figures(self) -> dict[str, float]:
        """Figures of the groups."""
        logits, labels = self.collected()
        correct = logits.argmax(-1) == labels
        out: dict[str, float] = {}
        if "accuracy" in self.groups:
            out["accuracy"] = correct.double().mean().item()
            if logits.shape[1] > 5:
                out["accuracy_top5"] = (logits.topk(5).indices == labels[:, None]).any(-1).double().mean().item()
        if "calibration" in self.groups:
            probs = logits.softmax(-1)
            out["nll"] = nll(logits, labels)
            out["ece"] = expected_calibration_error(probs, labels)
            out["brier"] = brier(probs, labels)
            out["aurc"] = aurc(probs.amax(-1), correct)
        if FREQUENCY in self.groups:
            out |= accuracy_by_frequency(correct, labels, torch.tensor(self._counts))
        return out


class PlainClassifier:
    """How a classifier is judged where nothing else is known of it: called as it is, its logits read."""

    prefers_chunks = False

    def call(self, model: nn.Module, batch: Batch, *, losses: bool = False) -> Any:
        return call_model(model, batch)

    def read(self, output: Any, batch: Batch) -> Signals:
        return Signals(logits=read_logits(output))

    def meter(self, groups: Sequence[str]) -> ClassificationMeter:
        return ClassificationMeter(groups)

    def one(self, batch: Batch) -> Batch:
        return one_sample(batch)

    def ready(self, model: nn.Module) -> PlainClassifier:
        return self

    def chunked(self, models: Mapping[str, nn.Module], probe: Batch) -> str:
        return "its scores are made whole"


PLAIN = PlainClassifier()


def evaluate_classifier(
    model: nn.Module, loader: Iterable[Batch], device: torch.device | str = "cpu", groups: Sequence[str] = GROUPS
) -> dict[str, float]:
    """Figures of a classifier over a loader (see `ClassificationMeter`), whatever its task is called."""
    return judge(PLAIN, model, loader, device, groups)


def collect_logits(
    model: nn.Module, loader: Iterable[Batch], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Logits (N, C) in float32 and labels (N,) of a whole loader, on the host. Raises as `ClassificationMeter`."""
    return measured(PLAIN, model, loader, device, ClassificationMeter()).collected()


def accuracy_by_frequency(correct: Tensor, labels: Tensor, counts: Tensor) -> dict[str, float]:
    """`accuracy_many`, `accuracy_medium` and `accuracy_few`: accuracy over the samples whose class has more than
    `MANY`, `FEW` to `MANY`, or fewer than `FEW` training samples. A group without samples is left out.

    Args:
        correct: (N,) bool.
        labels: (N,) class ids.
        counts: (C,) training samples of each class.
    """
    of_label = counts[labels]
    among = {
        "many": of_label > MANY,
        "medium": (of_label >= FEW) & (of_label <= MANY),
        "few": of_label < FEW,
    }
    return {f"accuracy_{name}": correct[own].double().mean().item() for name, own in among.items() if own.any()}


def gains_by_frequency(head: Tensor, tail: Tensor, labels: Tensor, counts: Tensor) -> dict[str, float]:
    """Of two predictions, what one wins where classes are rare and the other elsewhere: `tail_gain`, the accuracy of
    `tail` above that of `head` over samples of classes with fewer than `FEW` training samples, and `head_gain`, the
    opposite over all others. A group without samples is left out.

    Args:
        head, tail: (N,) bool, whether they are right.
        labels: (N,) class ids.
        counts: (C,) training samples of each class.
    """
    gain, rare = tail.double() - head.double(), counts[labels] < FEW
    parts = {"tail_gain": gain[rare], "head_gain": -gain[~rare]}
    return {name: part.mean().item() for name, part in parts.items() if len(part)}


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood in nats of logits (N, C) (log-probabilities serve as well) and labels (N,)."""
    return F.nll_loss(F.log_softmax(logits, dim=-1), labels, reduction="none").double().mean().item()


def brier(probs: Tensor, labels: Tensor) -> float:
    """Brier score: the squared distance of probabilities (N, C) from the one-hot label, summed over classes, mean over
    samples; in [0, 2]."""
    return (probs - F.one_hot(labels, probs.shape[-1])).double().square().sum(-1).mean().item()


@dataclass(frozen=True)
class Reliability:
    """What a reliability diagram shows: samples by confidence, in equal-width bins. Each tensor is (bins,); an empty
    bin holds zeros."""

    share: Tensor  # of all samples, in the bin
    confidence: Tensor  # mean in the bin
    accuracy: Tensor  # mean in the bin


def reliability(probs: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Accuracy against confidence (the largest probability) of probabilities (N, C) and labels (N,), in bins (i/bins,
    (i+1)/bins]."""
    confidence, predicted = probs.max(-1)
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    where = torch.bucketize(confidence, edges[1:-1])
    mean_over = torch.bincount(where, minlength=bins).double()

    def mean_in_bin(x: Tensor) -> Tensor:
        return torch.zeros(bins, dtype=torch.double, device=x.device).index_add_(
            0, where, x.double()
        ) / mean_over.clamp_min(1)

    return Reliability(mean_over / len(labels), mean_in_bin(confidence), mean_in_bin(predicted == labels))


def expected_calibration_error(probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: the gap between confidence and accuracy, mean over equal-width bins weighted by their
    samples; in [0, 1].

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
    """Area under the risk-coverage curve: the error rate among the k most confident samples, mean over k = 1 … N; in
    [0, 1], lower is better.

    Equal confidences count as if in random order (its expectation), so the figure does not depend on the order of the
    data.

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
    """E-AURC: `aurc` less that of the best possible ranking with as many errors (all errors least confident); 0 is a
    perfect ranking."""
    best = torch.arange(len(correct), dtype=torch.double, device=correct.device)
    return aurc(confidence, correct) - aurc(-best, best < correct.sum())


def kendall_tau(student: Tensor, teacher: Tensor, labels: Tensor, chunk: int = 2**24) -> float:
    """How much student and teacher agree on the order of the classes other than the label: Kendall's tau-b of their
    logits, mean over samples.

    Args:
        student: logits (N, C), C >= 3.
        teacher: logits (N, C) in the same class order; log-probabilities serve as well.
        labels: class indices (N,); each sample's own label is left out of its ranking.
        chunk: pairs of classes compared at once, a bound on memory.

    Returns:
        From -1 (reversed) to 1 (the same order). Samples where one side has all classes equal have no order and are
        left out.

    Raises:
        UserError: logits of different shapes, or fewer than three classes.
    """
    if student.shape != teacher.shape or student.ndim != 2 or student.shape[1] < 3:
        raise UserError(
            f"Kendall's tau needs two (N, C) logits with C >= 3; got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    n, classes = student.shape
    others = F.one_hot(labels, classes) == 0
    s, t = student[others].view(n, classes - 1), teacher[others].view(n, classes - 1)
    taus = []
    for a, b in zip(s.split(max(1, chunk // classes**2)), t.split(max(1, chunk // classes**2))):
        x, y = (torch.sign(v[:, :, None] - v[:, None, :]) for v in (a, b))
        taus.append((x * y).sum((1, 2)) / (x.abs().sum((1, 2)) * y.abs().sum((1, 2))).sqrt())
    return torch.cat(taus).double().nanmean().item()

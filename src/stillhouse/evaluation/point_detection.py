"""Average precision of boxes in space, as KITTI has it: at 40 recalls, seen from above and in space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.errors import UserError, unknown
from stillhouse.functional.rotated_boxes import pairwise_overlaps
from stillhouse.signals import Batch, Signals

GROUPS = ("detection", "classes")
RECALLS = 40


class PointDetectionMeter:
    """`ap_bev` and `ap_3d`, means over the classes that occur of AP|R40; with `classes`, `ap_bev_class_NAME` and
    `ap_3d_class_NAME`.

    Of a cloud only its boxes stay in memory. A true box that is `ignored` is found or not, and counts for nothing.

    Args:
        classes: names, in label order.
        groups: of figures.
        overlap: of each class, the intersection over union from which a box is right.
    """

    def __init__(self, classes: Sequence[str], groups: Sequence[str], overlap: Sequence[float]) -> None:
        for group in groups:
            if group not in GROUPS:
                raise unknown("evaluation group", group, GROUPS)
        self.classes, self.groups, self.overlap = classes, groups, overlap
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []
        self._true: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, batch: Batch, outputs: Signals) -> None:
        """Take the parts `boxes` (B, N, 7), `scores` (B, N) and `labels` (B, N) of a batch, and its `target`."""
        parts = [outputs.require(f"part:{name}").float().cpu() for name in ("boxes", "scores", "labels")]
        self._found += zip(*parts)
        for target in batch["target"]:
            labels = target["labels"].cpu()
            ignored = target.get("ignored", torch.zeros(len(labels), dtype=torch.bool)).cpu()
            self._true.append((target["boxes"].float().cpu(), labels, ignored))

    def figures(self) -> dict[str, float]:
        """All figures. Raises `UserError` without a true box, or for boxes that are not finite."""
        if not any((~ignored).any() for _, _, ignored in self._true):
            raise UserError("There is no box to judge by: no cloud of this split has one, or there are no clouds.")
        if not all(bool(torch.isfinite(b).all() and torch.isfinite(s).all()) for b, s, _ in self._found):
            raise UserError("The network gives boxes or scores that are not finite (NaN); did its training diverge?")
        each: dict[str, dict[str, float]] = {"ap_bev": {}, "ap_3d": {}}
        for label, name in enumerate(self.classes):
            pairs = [self._overlaps(i, label) for i in range(len(self._found))]
            if not any((~ignored).any() for _, _, _, ignored in pairs):
                continue
            for kind, which in (("ap_bev", 0), ("ap_3d", 1)):
                rows = [(scores, (above, space)[which], ignored) for scores, above, space, ignored in pairs]
                each[kind][name] = average_precision(rows, self.overlap[label])
        out: dict[str, float] = {}
        for kind, values in each.items():
            if "detection" in self.groups:
                out[kind] = sum(values.values()) / len(values)
            if "classes" in self.groups:
                out |= {f"{kind}_class_{name}": value for name, value in values.items()}
        return out

    def _overlaps(self, cloud: int, label: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of a cloud and class: scores (D,), overlaps (D, T) from above and in space, and which are ignored (T,)."""
        boxes, scores, labels = self._found[cloud]
        true, theirs, ignored = self._true[cloud]
        mine = (labels == label) & (scores > 0)
        wanted = theirs == label
        above, space = pairwise_overlaps(boxes[mine].double(), true[wanted].double())
        return scores[mine], above, space, ignored[wanted]


def average_precision(clouds: Sequence[tuple[Tensor, Tensor, Tensor]], threshold: float) -> float:
    """The mean, over 40 recalls from 1/40 to 1, of the best precision at that recall or more.

    In each cloud, boxes from the best down take the free true box that they overlap most, if by the threshold.

    Args:
        clouds: of each, scores (D,), overlaps (D, T), and which true boxes are ignored (T,).
        threshold: of the overlap.
    """
    scores, right, counts = [], [], []
    total = 0
    for own, overlap, ignored in clouds:
        total += int((~ignored).sum())
        free = torch.ones(len(ignored), dtype=torch.bool)
        for i in own.argsort(descending=True, stable=True).tolist():
            best, which = (overlap[i] * free).max(0) if len(free) else (torch.tensor(0.0), torch.tensor(0))
            hit = bool(best >= threshold)
            if hit:
                free[which] = False
            scores.append(float(own[i]))
            right.append(hit)
            counts.append(not (hit and bool(ignored[which])))
    kept = torch.tensor(counts, dtype=torch.bool)
    order = torch.tensor(scores)[kept].argsort(descending=True, stable=True)
    hits = torch.tensor(right, dtype=torch.float64)[kept][order].cumsum(0)
    if not len(hits) or not total:
        return 0.0
    precision = hits / torch.arange(1, len(hits) + 1)
    best_after = precision.flip(0).cummax(0).values.flip(0)
    needed = torch.arange(1, RECALLS + 1, dtype=torch.float64) / RECALLS * total
    place = torch.searchsorted(hits, needed - 1e-9)
    reached = place < len(hits)
    return float((best_after[place.clamp_max(len(hits) - 1)] * reached).mean())

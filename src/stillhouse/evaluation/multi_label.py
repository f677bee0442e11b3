"""Figures of a classifier whose samples have any number of labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.errors import UserError, unknown
from stillhouse.functional.counting import IGNORED
from stillhouse.signals import Batch, Signals

GROUPS = ("labels", "classes")


class MultiLabelMeter:
    """`map`, `f1` (of all labels together, at a probability of one half) and `exact_match`; with `classes`,
    `ap_class_NAME`. Labels that are not known count for nothing, and a label that no sample has, or every, has no AP.

    Scores stay on their device until the last batch.
    """

    def __init__(self, classes: Sequence[str], groups: Sequence[str] = GROUPS[:1]) -> None:
        for group in groups:
            if group not in GROUPS:
                raise unknown("evaluation group", group, GROUPS)
        self.classes, self.groups = classes, groups
        self._scores: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, batch: Batch, outputs: Signals) -> None:
        """Take the logits (B, C, 2) of a batch, and its `label` (B, C): 0, 1, or -100 where it is not known."""
        logits = outputs.require("logits")
        self._scores.append((logits[..., 1] - logits[..., 0]).float())
        self._labels.append(batch["label"])

    def figures(self) -> dict[str, float]:
        """All figures. Raises `UserError` for scores that are NaN, or without a label that tells samples apart."""
        from sklearn.metrics import average_precision_score

        if not self._scores:
            raise UserError("There is nothing to evaluate on: the loader gave no batch; take a larger test set.")
        scores, labels = torch.cat(self._scores).cpu(), torch.cat(self._labels).cpu()
        if scores.isnan().any():
            raise UserError("The model's outputs are NaN, so it cannot be judged; train with a lower learning rate.")
        known, found = labels != IGNORED, scores > 0
        precision: dict[str, float] = {}
        for name, score, label, counts in zip(self.classes, scores.T, labels.T, known.T):
            if len(label[counts].unique()) == 2:
                precision[name] = float(average_precision_score(label[counts], score[counts]))
        if not precision:
            raise UserError("No label tells the test samples apart: each of them has it, or none; take a larger set.")
        right = int((found & (labels == 1)).sum())
        pairs = int((found & known).sum()) + int((labels == 1).sum())
        out = {
            "map": sum(precision.values()) / len(precision),
            "f1": 2 * right / max(pairs, 1),
            "exact_match": ((found == (labels == 1)) | ~known).all(1).double().mean().item(),
        }
        if "classes" in self.groups:
            out |= {f"ap_class_{name}": value for name, value in precision.items()}
        return out

"""What embeddings are worth, without training the network that makes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.errors import UserError, unknown
from stillhouse.evaluation.probes import Features, knn_accuracy, linear_probe, probe_accuracy
from stillhouse.signals import Batch, Signals

GROUPS = ("features",)


class FeatureMeter:
    """`effective_rank`: exp of the entropy of the normalised singular values of the centred embeddings (Roy and
    Vetterli 2007), by which a collapse shows. Where the images have labels, also `linear_probe` and `knn`: the share of
    every second image that a probe of the others gets right.

    Embeddings stay on their device until the last batch.
    """

    def __init__(self, groups: Sequence[str] = GROUPS) -> None:
        for group in groups:
            if group not in GROUPS:
                raise unknown("evaluation group", group, GROUPS)
        self._embeddings: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, batch: Batch, outputs: Signals) -> None:
        """Take the embeddings (B, D) of a batch, and its `label` (B,), -1 where there is none."""
        self._embeddings.append(outputs.require("embedding").float())
        self._labels.append(batch["label"])

    def figures(self) -> dict[str, float]:
        """All figures. Raises `UserError` without two images, or for embeddings that are NaN."""
        if sum(map(len, self._embeddings)) < 2:
            raise UserError("There is nothing to evaluate on: features are judged by two test images or more.")
        x, y = torch.cat(self._embeddings).cpu(), torch.cat(self._labels).cpu()
        if x.isnan().any():
            raise UserError("The model's outputs are NaN, so it cannot be judged; train with a lower learning rate.")
        spectrum = torch.linalg.svdvals((x - x.mean(0)).double())
        share = spectrum / spectrum.sum().clamp_min(1e-300)
        out = {"effective_rank": float(torch.special.entr(share).sum().exp())}
        x, y = x[y >= 0], y[y >= 0]
        if len(y.unique()) > 1:
            order = y.argsort(stable=True)  # every second of each class
            probed, tested = (Features(x[order[i::2]], y[order[i::2]]) for i in (0, 1))
            probe = linear_probe(probed, int(y.max()) + 1)
            out |= {"linear_probe": probe_accuracy(probe, tested), "knn": knn_accuracy(probed, tested)}
        return out

"""How predictions of tokens are judged: perplexity and accuracy over the tokens that count."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.chunked import linear_scores
from stillhouse.functional.counting import IGNORED
from stillhouse.functional.heads import Head, head_of
from stillhouse.signals import Batch, Signals


class TokenMeter:
    """`perplexity` (exp of the mean negative log-likelihood in nats), `nll` and `accuracy` over all tokens whose label
    counts.

    Networks that give hidden states and an output matrix in the place of logits are scored some tokens at a time.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, batch: Batch, outputs: Signals) -> None:
        """Take the logits (B, L, V) of a batch, or their parts, and its `label` (B, L), which stands where its
        prediction stands."""
        label = batch["label"]
        counted = label != IGNORED
        losses, right = _scores(outputs, label, counted)
        sums = torch.stack([losses.double().sum(), right.double().sum(), counted.double().sum()])
        self._sums = sums if self._sums is None else self._sums + sums

    def figures(self) -> dict[str, float]:
        """The figures. Raises `UserError` where no token counts, or outputs were NaN."""
        if self._sums is None or not self._sums[2] > 0:
            raise UserError("There is no token to judge by: the loader gave none whose label counts.")
        nll, accuracy = (self._sums[:2] / self._sums[2]).tolist()
        if math.isnan(nll):
            raise UserError("The model's outputs are NaN, so it cannot be judged; train with a lower learning rate.")
        return {"perplexity": math.exp(min(nll, 700.0)), "nll": nll, "accuracy": accuracy}


def _scores(outputs: Signals, label: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each counted token, and whether it is the most probable."""
    if outputs.logits is None:
        head = head_of(outputs, "model")
        return linear_scores(Head(head.hidden[counted], head.weight, head.bias), label[counted])
    logits = outputs.logits
    if logits.ndim != 3 or logits.shape[:2] != label.shape:
        raise UserError(
            f"Judging tokens needs logits (B, L, V) and labels (B, L); got {tuple(logits.shape)} and "
            f"{tuple(label.shape)}."
        )
    chosen, target = logits[counted].float(), label[counted]
    return F.cross_entropy(chosen, target, reduction="none"), chosen.argmax(-1) == target

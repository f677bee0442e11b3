"""How language models are judged: perplexity and accuracy over counted tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional import heads
from stillhouse.functional.chunked import linear_scores
from stillhouse.functional.heads import Head
from stillhouse.models.language import can_be_headless, headless
from stillhouse.signals import Batch, call_model, evaluating, read_logits, to_device


def evaluate_tokens(
    model: nn.Module, loader: Iterable[Batch], device: torch.device | str = "cpu", *, vocabulary: int | None = None, ignore_index: int = -100
) -> dict[str, float]:
    """Figures over all tokens of a loader that count: `perplexity` (exp of the mean negative log-likelihood in nats), `nll`, and `accuracy`.

    A big vocabulary is scored some tokens at a time where the model allows it, without a tensor of all logits.

    Args:
        model: gives logits (B, L, V); its mode is as before afterwards.
        loader: batches whose `label` (B, L) stands where its prediction stands.
        device: where batches are moved to.
        vocabulary: logits beyond so many tokens are left out (padded rows of an embedding).
        ignore_index: the label that counts for nothing.

    Raises:
        UserError: logits and labels that do not fit, no token that counts, or NaN in the outputs.
    """
    totals: Tensor | None = None
    chunked: bool | None = None
    with evaluating(model):
        for batch in loader:
            inputs, label = to_device(batch["input"], device), to_device(batch["label"], device)
            counted = label != ignore_index
            if chunked is None:
                chunked = (vocabulary or 0) >= heads.BIG_VOCABULARY and isinstance(inputs, Mapping) and can_be_headless(model, inputs)
            scores = _scores_in_chunks if chunked else _scores
            losses, right = scores(model, inputs, label, counted, vocabulary)
            sums = torch.stack([losses.double().sum(), right.double().sum(), counted.double().sum()])
            totals = sums if totals is None else totals + sums
    if totals is None or not totals[2] > 0:
        raise UserError("There is no token to judge by: the loader gave none whose label counts.")
    nll, accuracy = (totals[:2] / totals[2]).tolist()
    if math.isnan(nll):
        raise UserError("The model's outputs are NaN, so it cannot be judged; train with a lower learning rate.")
    return {"perplexity": math.exp(min(nll, 700.0)), "nll": nll, "accuracy": accuracy}


def _scores(model: nn.Module, inputs: Any, label: Tensor, counted: Tensor, vocabulary: int | None) -> tuple[Tensor, Tensor]:
    """The loss of each counted token, and whether it is the most probable."""
    logits = read_logits(call_model(model, {"input": inputs}))
    if logits.ndim != 3 or logits.shape[:2] != label.shape:
        raise UserError(f"Judging tokens needs logits (B, L, V) and labels (B, L); got {tuple(logits.shape)} and {tuple(label.shape)}.")
    chosen, target = logits[counted][:, :vocabulary].float(), label[counted]
    return F.cross_entropy(chosen, target, reduction="none"), chosen.argmax(-1) == target


def _scores_in_chunks(model: nn.Module, inputs: Any, label: Tensor, counted: Tensor, vocabulary: int | None) -> tuple[Tensor, Tensor]:
    """The same from hidden states."""
    head = headless(model, inputs)
    bias = None if head.bias is None else head.bias[:vocabulary]
    return linear_scores(Head(head.hidden[counted], head.weight[:vocabulary], bias), label[counted])

"""How language models are judged: perplexity and accuracy over counted tokens, and the evaluator of products of kind `language`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.evaluation import cost, evaluates
from stillhouse.evaluation.mode import evaluating, move
from stillhouse.signals import Batch, call_model, read_logits

if TYPE_CHECKING:
    from stillhouse.run import Run


def evaluate_tokens(
    model: nn.Module, loader: Iterable[Batch], device: torch.device | str = "cpu", *, vocabulary: int | None = None, ignore_index: int = -100
) -> dict[str, float]:
    """Figures over all tokens of a loader that count: `perplexity` (exp of the mean negative log-likelihood in nats), `nll`, and `accuracy`.

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
    with evaluating(model):
        for batch in loader:
            logits, label = read_logits(call_model(model, {"input": move(batch["input"], device)})), move(batch["label"], device)
            if logits.ndim != 3 or logits.shape[:2] != label.shape:
                raise UserError(f"Judging tokens needs logits (B, L, V) and labels (B, L); got {tuple(logits.shape)} and {tuple(label.shape)}.")
            counted = label != ignore_index
            chosen, target = logits[counted][:, :vocabulary].float(), label[counted]
            losses = F.cross_entropy(chosen, target, reduction="none")
            sums = torch.stack([losses.double().sum(), (chosen.argmax(-1) == target).double().sum(), counted.double().sum()])
            totals = sums if totals is None else totals + sums
    if totals is None or not totals[2] > 0:
        raise UserError("There is no token to judge by: the loader gave none whose label counts.")
    nll, accuracy = (totals[:2] / totals[2]).tolist()
    if math.isnan(nll):
        raise UserError("The model's outputs are NaN, so it cannot be judged; train with a lower learning rate.")
    return {"perplexity": math.exp(min(nll, 700.0)), "nll": nll, "accuracy": accuracy}


@evaluates("language")
def judge(product: Any, run: Run) -> dict[str, float]:
    """Figures of a run's language model or text classifier on its test split, and its parameters and file size."""
    data, split = run.judging_data()
    device = next(product.module.parameters()).device
    out = run.data(data).evaluate(product.module, run.loader(data, split, 64), device, ["accuracy", "calibration"])
    out["parameters"] = cost.parameters(product.module)
    out["file_bytes"] = cost.file_size(run.folder / "product" / "model" / "model.safetensors")
    return out

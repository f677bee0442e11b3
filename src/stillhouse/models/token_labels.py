"""Labels of tokens, moved to where their predictions stand.

Here `label[:, i]` is what the prediction at position i is compared with. A transformers batch has `labels` instead: for
a causal model they name the input tokens themselves, and the model shifts them inside; a decoder makes its inputs of
them. This is the one place that turns the one into the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.functional.counting import IGNORED
from stillhouse.signals import Batch

TOKEN_LABELS = "labels"
"""The key of a batch under which token labels are as transformers has them, until `place` moves them to `label`."""


def are_of_tokens(labels: Any) -> TypeGuard[Tensor]:
    """Whether labels are ids of tokens, (B, L)."""
    return isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()


def place(batch: Batch, student: nn.Module, shifted: bool | None = None) -> Batch:
    """Turn a batch's `labels`, if it has any, into its `label`, in place; and give a decoder its inputs.

    Args:
        batch: as `stillhouse.data.loader.as_batch` reads it.
        student: the model that makes the predictions.
        shifted: whether labels name the input tokens, so that each position learns the next one's; None: for causal
            models of transformers.
    """
    if TOKEN_LABELS not in batch:
        return batch
    labels: Tensor = batch.pop(TOKEN_LABELS)
    model = _unwrapped(student)
    if predicts_next(model) if shifted is None else shifted:
        batch["label"] = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
        return batch
    batch["label"] = labels
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if _encodes_first(model) and make is not None and "decoder_input_ids" not in batch["input"]:
        batch["input"] = {**batch["input"], "decoder_input_ids": make(labels=labels)}
    return batch


def predicts_next(model: nn.Module) -> bool:
    """Whether a model is one of transformers that generates text from left to right, without an encoder."""
    generates = getattr(_unwrapped(model), "can_generate", None)
    return generates is not None and generates() and not _encodes_first(model)


def refuse_copies(batch: Batch, student: nn.Module) -> None:
    """Raises `UserError` where each counted label is the input token at its own place, which a network learns by
    repeating its input.

    A text of one token repeated, and transformers' encoders and encoder-decoders, whose labels are what they are, are
    let through.
    """
    if hasattr(_unwrapped(student), "can_generate") and not predicts_next(student):
        return
    given, label = batch["input"], batch.get("label")
    ids = given.get("input_ids") if isinstance(given, Mapping) else given
    if not are_of_tokens(label) or not are_of_tokens(ids) or ids.shape != label.shape:
        return
    counts = label != IGNORED
    copied = bool(((ids == label) | ~counts).all()) and bool(counts.any())
    if copied and bool(((ids[:, 1:] != ids[:, :-1]) & counts[:, :-1]).any()):
        raise UserError(
            "The labels are the input's own tokens, each at its own place, so the student would learn to repeat its "
            "input. A label stands where its "
            "prediction stands: of a causal model, label[:, i] is input_ids[:, i + 1]. A mapping "
            "{'input_ids': …, 'labels': …} is shifted for causal "
            "models of transformers."
        )


def _encodes_first(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _unwrapped(model: nn.Module) -> Any:
    """The model inside torch.compile, DDP and adapters of peft."""
    inner: Any = getattr(model, "_orig_mod", model)
    inner = inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner

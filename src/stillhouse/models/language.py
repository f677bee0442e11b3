"""The parts of language models of transformers: hidden states and an output layer, other tokenizers' ids, padding
for generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.functional.heads import Head
from stillhouse.functional.vocabularies import TokenMap, mapped
from stillhouse.models.tokenizer import encode, marks, tokenizer
from stillhouse.signals import evaluating, read_logits

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@torch.no_grad()
def keeps_apart(model: nn.Module) -> bool:
    """Whether a causal model reads two samples packed in one row as it reads each alone; tried on six tokens."""
    device = next(model.parameters()).device
    ids, positions = (
        torch.tensor([[1, 2, 3, 3, 1, 2]], device=device),
        torch.tensor([[0, 1, 2, 0, 1, 2]], device=device),
    )
    with evaluating(model):
        together = read_logits(model(input_ids=ids, position_ids=positions, use_cache=False))[:, 3:]
        alone = read_logits(model(input_ids=ids[:, 3:], use_cache=False))
    return torch.allclose(together, alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))


def own_tokenizer(name: str) -> Any:
    """The tokenizer that a model's folder or repository holds; None where there is none."""
    place = name.removeprefix("hf:")
    if not name.startswith("hf:") or place.startswith("config:"):
        return None
    folder = Path(place).expanduser()
    if folder.is_dir() and not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")):
        return None
    return tokenizer(name)


class OtherIds(nn.Module):
    """A model that numbers the same tokens otherwise: the student's ids go in translated, and its logits come out in
    the student's order.

    For a teacher whose vocabulary holds every token of the student's, by its string (characters within a larger set, a
    pruned vocabulary). Tokens that only the teacher has are left out, which renormalises its probabilities over the
    shared ones.
    """

    ids: Tensor

    def __init__(self, model: nn.Module, ids: TokenMap) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("ids", ids.ids, persistent=False)

    def forward(self, **inputs: Any) -> Tensor:
        return read_logits(self.model(**self.translated(inputs)))[..., self.ids]

    def translated(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs in the model's own ids."""
        return {name: self.ids[x] if name in ("input_ids", "decoder_input_ids") else x for name, x in inputs.items()}


def headless(model: nn.Module, inputs: Mapping[str, Any]) -> Head:
    """The factors of a language model's logits: its last hidden states, and the matrix (the live parameter) and bias
    of its output layer.

    Raises:
        UserError: a model that is not of transformers, or whose output layer is not the linear layer of
            `get_output_embeddings`.
    """
    if isinstance(model, OtherIds):
        head = headless(model.model, model.translated(inputs))
        return Head(head.hidden, head.weight[model.ids], None if head.bias is None else head.bias[model.ids])
    body, last = body_and_output(model)
    output = body(**{"use_cache": False, **inputs})
    return Head(output.last_hidden_state, last.weight, last.bias)


def body_and_output(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """What gives a language model's last hidden states, and its output layer. Raises as `headless`."""
    whole: Any = model.model if isinstance(model, OtherIds) else model
    if hasattr(whole, "get_base_model"):  # of peft
        whole = whole.get_base_model()
    last = whole.get_output_embeddings() if hasattr(whole, "get_output_embeddings") else None
    body = getattr(whole, "base_model", whole)
    if type(last) is not nn.Linear or body is whole:
        raise UserError(f"a {type(whole).__name__} has no linear output layer apart from its body")
    return body, last


@torch.no_grad()
def check_headless(model: nn.Module, inputs: Mapping[str, Any], tokens: int = 8) -> None:
    """Raise `UserError` where the logits are not hidden states times the matrix of the output layer (scaled or capped
    ones); tried on a few tokens."""
    config = getattr(model, "config", None)
    capped = any(getattr(config, name, None) for name in CAPS)  # of which small logits would show nothing
    few = {name: x[:1, :tokens] if isinstance(x, Tensor) and x.ndim > 1 else x for name, x in inputs.items()}
    with evaluating(model):
        computed, logits = headless(model, few).logits(), read_logits(model(**few))
    if (
        capped
        or computed.shape != logits.shape
        or not torch.allclose(computed.float(), logits.float(), rtol=1e-2, atol=1e-2 * float(logits.abs().max()))
    ):
        raise UserError(f"a {type(model).__name__} changes its logits after the output layer (it scales or caps them)")


def can_be_headless(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether `headless` gives the factors of the model's logits."""
    try:
        check_headless(model, inputs)
    except UserError:
        return False
    return True


def as_teacher(model: nn.Module, theirs: Any, ours: Any, task: str) -> nn.Module:
    """A teacher as the student's tokenizer needs it: as it is where both number tokens alike, else translated by
    string.

    Args:
        model: the teacher.
        theirs, ours: tokenizers of the teacher and of the student.
        task: of the data; a classifier's ids are translated, its logits are not.

    Raises:
        UserError: tokens of the student that the teacher lacks (see `stillhouse.functional.vocabularies.mapped`).
    """
    ids = mapped(ours.get_vocab(), theirs.get_vocab())
    if ids.same:
        return model
    if task == "classify":
        raise UserError(
            f"The teacher's tokenizer ({len(theirs)} tokens) and the student's ({len(ours)}) differ; a text "
            "classifier needs its own tokenizer."
        )
    return OtherIds(model, ids)


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bars, which files of a second do not need."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def prompt_rows(tokens: Any, prompts: Sequence[str], task: str, room: int) -> list[list[int]]:
    """The ids of prompts as a model reads them before it writes: with the tokenizer's special tokens, of a causal model
    without those that end a text.

    Args:
        tokens: the model's tokenizer.
        prompts: texts; one that is too long loses its beginning.
        task: causal or seq2seq.
        room: tokens of a row at most.
    """
    before, after = marks(tokens)
    after = after if task == "seq2seq" else []
    room = max(room - len(before) - len(after), 1)
    begin = tokens.bos_token_id if tokens.bos_token_id is not None else tokens.eos_token_id
    return [before + ids[-room:] + after or [begin] for ids in encode(tokens, prompts)]


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> Mapping[str, Tensor]:
    """`input_ids` and `attention_mask` (B, L) of rows padded at their beginning, as generation needs them."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}

"""Generation with a causal model or an encoder-decoder: prompts out of a batch, and the written text as a batch. No
loop over samples."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError
from stillhouse.functional.counting import IGNORED
from stillhouse.signals import Batch, evaluating


class Generation(Spec):
    """How text is written."""

    max_new_tokens: int = Field(64, ge=1, description="Tokens written at most.")
    temperature: float = Field(1.0, ge=0, description="Of the draw; 0: the most probable token each time.")
    top_k: int = Field(0, ge=0, description="Draw among the k most probable tokens; 0: all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw among the most probable tokens of so much mass.")
    beams: int = Field(1, ge=1, description="Beam search of this width, where temperature is 0.")
    prompt: int = Field(16, ge=1, description="Tokens given of a text that has no prompt.")

    def arguments(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`."""
        if self.temperature == 0:
            return {"do_sample": False, "num_beams": self.beams}
        return {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


class TextWriter:
    """Continues the prompts of batches.

    Args:
        tokenizer: of the model.
        task: causal | seq2seq.
        context: tokens that the model reads at most.
        how: length and draw.
        vocabulary: tokens that the tokenizer knows; ids beyond it are never written.

    Raises:
        UserError: a task that does not write, or beams with a draw.
    """

    def __init__(self, tokenizer: Any, task: str, context: int, how: Generation, vocabulary: int) -> None:
        if task not in ("causal", "seq2seq"):
            raise UserError(f"Only causal and seq2seq models write text; this data's task is {task}.")
        if how.beams > 1 and how.temperature > 0:
            raise UserError("generation.beams needs generation.temperature: 0, as a draw has no beams.")
        self.tokenizer, self.task, self.context, self.how, self.vocabulary = tokenizer, task, context, how, vocabulary

    def prompts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of a causal batch: the ids of its prompts, padded at their beginning (B, P), and where they are (B, P) bool.

        A prompt is what comes before the first counted label, or the first `prompt` tokens of a text that has none.
        """
        ids, label = batch["input"]["input_ids"], batch["label"]
        if "position_ids" in batch["input"]:
            raise UserError("Samples packed into rows have no prompts to write from; set data.options.pack: false.")
        counted = label != IGNORED
        first = counted.int().argmax(1)
        rows = first + counted.sum(1)  # tokens of a row that are read
        lengths = torch.where(first > 0, first + 1, torch.full_like(first, self.how.prompt)).minimum(rows)
        width = int(lengths.max())
        source = torch.arange(width, device=ids.device)[None, :] - (width - lengths)[:, None]
        inside = source >= 0
        return ids.gather(1, source.clamp_min(0)).masked_fill(~inside, self.tokenizer.pad_token_id), inside

    @torch.no_grad()
    def write(self, model: Any, inputs: dict[str, Tensor], room: int) -> Tensor:
        """What the model writes after (causal) or for (seq2seq) the inputs, (B, N), drawn from torch's default
        generator.

        Args:
            room: tokens that may be written at most.
        """
        if not hasattr(model, "generate"):
            raise UserError(
                f"Writing needs a transformers model that generates (hf:…); this one is a {type(model).__name__}."
            )
        rows = getattr(model.config, "vocab_size", self.vocabulary)
        unused = {"suppress_tokens": list(range(self.vocabulary, rows))} if rows > self.vocabulary else {}
        ends = {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.pad_token_id}
        with evaluating(model):
            written = model.generate(
                **inputs, **self.how.arguments(), **unused, **ends, max_new_tokens=min(self.how.max_new_tokens, room)
            )
        return written[:, inputs["input_ids"].shape[1] :] if self.task == "causal" else written[:, 1:]

    def answers(self, model: nn.Module, batch: Batch) -> list[list[int]]:
        """The ids that the model writes after or for each prompt of a batch, up to the end token; as many as the
        longest right answer has, and one more, at most."""
        inputs = batch["input"]
        longest = int((batch["label"] != IGNORED).sum(1).max()) + 1
        if self.task == "seq2seq":
            given = {k: inputs[k] for k in ("input_ids", "attention_mask") if k in inputs}
            written = self.write(model, given, longest)
        else:
            ids, inside = self.prompts(batch)
            room = min(self.context + 1 - ids.shape[1], longest)
            if room < 1:
                return [[] for _ in ids]
            written = self.write(model, {"input_ids": ids, "attention_mask": inside.long()}, room)
        return [row[counts].tolist() for row, counts in zip(written.cpu(), self._counted(written).cpu())]

    def rewritten(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with the model's own writing in place of the completions; labels count what it wrote, up to the end
        token. As it was, where no room is left."""
        inputs = batch["input"]
        if self.task == "seq2seq":
            written = self.write(
                model, {k: inputs[k] for k in ("input_ids", "attention_mask") if k in inputs}, self.context
            )
            label = written.masked_fill(~self._counted(written), IGNORED)
            start = inputs["decoder_input_ids"][:, :1]
            decoder = torch.cat([start, written[:, :-1]], 1)
            return {**batch, "input": {**inputs, "decoder_input_ids": decoder}, "label": label}
        ids, inside = self.prompts(batch)
        room = self.context + 1 - ids.shape[1]
        if room < 1:
            return batch
        written = self.write(model, {"input_ids": ids, "attention_mask": inside.long()}, room)
        ours = self._counted(written)
        every, real = torch.cat([ids, written], 1), torch.cat([inside, ours], 1)
        order = (
            (~real).int().argsort(dim=1, stable=True)
        )  # what is real to the front: padded at the end, as training has it
        every, real = every.gather(1, order), real.gather(1, order)
        new = torch.cat([torch.zeros_like(inside), ours], 1).gather(1, order)
        label = every[:, 1:].masked_fill(~new[:, 1:], IGNORED)
        return {**batch, "input": {"input_ids": every[:, :-1], "attention_mask": real[:, :-1].long()}, "label": label}

    def _counted(self, written: Tensor) -> Tensor:
        """Which written tokens count: all up to the first end token, with it."""
        if self.tokenizer.eos_token_id is None:
            return torch.ones_like(written, dtype=torch.bool)
        ends = (written == self.tokenizer.eos_token_id).int()
        return ends.cumsum(1) - ends == 0

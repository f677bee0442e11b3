"""`TokenDataset`: rows of tokens, of different lengths or packed, which makes padded batches as a function of (seed,
epoch, indices).

A batch's `label` (B, L) stands where its prediction stands (see `stillhouse.data.text`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.dataset import BatchKey
from stillhouse.errors import UserError
from stillhouse.files import digest
from stillhouse.functional.counting import IGNORED
from stillhouse.functional.ragged import RaggedArray
from stillhouse.models.tokenizer import size
from stillhouse.randomness import key as keys
from stillhouse.randomness import uniforms
from stillhouse.signals import Batch


@dataclass
class Rows:
    """What a split is made of: `inputs`, and where the task has them `labels` (tokens), `positions` (packed rows),
    `classes` (N,)."""

    inputs: RaggedArray
    labels: RaggedArray | None = None
    positions: RaggedArray | None = None
    classes: np.ndarray | None = None

    @property
    def identity(self) -> str:
        parts = [
            p
            for r in (self.inputs, self.labels, self.positions)
            for p in ((r.values, r.starts) if r is not None else (None,))
        ]
        return digest(*parts, self.classes)


class TokenDataset:
    """The rows of a split.

    Args:
        rows: the split.
        task: causal | masked | classify | seq2seq.
        tokenizer: whose ids they are.
        decoder_start: seq2seq: the id that a decoder begins with.
        masked_share: masked: share of tokens to be guessed.
    """

    def __init__(
        self, rows: Rows, task: str, tokenizer: Any, decoder_start: int = 0, masked_share: float = 0.15
    ) -> None:
        self.rows, self.task, self.tokenizer, self.decoder_start, self.masked_share = (
            rows,
            task,
            tokenizer,
            decoder_start,
            masked_share,
        )

    def __len__(self) -> int:
        return len(self.rows.inputs)

    def labels(self) -> Tensor:
        """(n,) classes, in index order. Raises `UserError` for tokens, of which a sample has many."""
        if self.rows.classes is None:
            raise UserError(
                "A sample of a language model's data has no class: objectives that look at classes need "
                "data.options.task: classify."
            )
        return torch.from_numpy(self.rows.classes)

    def __getitem__(self, index: int) -> Batch:
        """One sample, as a training step of seed 0 and epoch 0 would see it."""
        made = self.batch(BatchKey(0, np.array([index % len(self)]), 0, 1), 0)
        return {
            "input": {k: v[0] for k, v in made["input"].items()},
            "label": made["label"][0],
            "index": made["index"][0],
        }

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """`input` (a mapping that transformers models take), `label` (B, L), or (B,) of classes, `index` (B,)."""
        which = key.indices[key.start : key.stop]
        rows, tokens, task = self.rows, self.tokenizer, self.task
        x: dict[str, Any] = {"input_ids": rows.inputs.padded(which, tokens.pad_token_id)}
        lengths = torch.from_numpy(rows.inputs.lengths[which])
        inside = torch.arange(x["input_ids"].shape[1])[None, :] < lengths[:, None]
        if rows.positions is not None:
            x["position_ids"] = _packed_positions(rows.positions.padded(which, -1), inside)
            x["use_cache"] = False  # with a cache, transformers does not look for packed samples
        elif not bool(inside.all()) or task != "causal":
            x["attention_mask"] = inside.to(torch.int64)
        if rows.classes is not None:
            label = torch.from_numpy(rows.classes[which])
        elif task == "masked":
            x["input_ids"], label = self._masked(x["input_ids"], inside, which, key.epoch, seed)
        else:
            assert rows.labels is not None
            label = rows.labels.padded(which, IGNORED)
        if task == "seq2seq":
            x["decoder_input_ids"] = shifted_right(label, tokens.pad_token_id, self.decoder_start)
        return {"input": x, "label": label, "index": torch.from_numpy(which)}

    def _masked(self, ids: Tensor, inside: Tensor, which: np.ndarray, epoch: int, seed: int) -> tuple[Tensor, Tensor]:
        """Of the tokens drawn (at least one a sample), 80 % become the mask, 10 % any token, 10 % stay. BERT, arXiv
        1810.04805, section 3.1."""
        draws = torch.from_numpy(uniforms(keys(seed, "mask", epoch), which, 3 * ids.shape[1])).view(3, len(which), -1)
        first = draws[0].masked_fill(~inside, 2.0)
        drawn = inside & (
            first <= torch.maximum(first.amin(1, keepdim=True), torch.tensor(self.masked_share, dtype=first.dtype))
        )
        tokens, mask = size(self.tokenizer), self.tokenizer.mask_token_id
        out = torch.where(drawn & (draws[1] < 0.8), mask, ids)
        out = torch.where(drawn & (draws[1] >= 0.9), (draws[2] * tokens).to(torch.int64), out)
        return out, ids.masked_fill(~drawn, IGNORED)


def shifted_right(label: Tensor, pad: int, start: int) -> Tensor:
    """What a decoder reads: `start`, then the labels (B, L) but the last, with `pad` where they are -100."""
    return torch.cat(
        [torch.full_like(label[:, :1], start), label[:, :-1].masked_fill(label[:, :-1] == IGNORED, pad)], 1
    )


def _packed_positions(positions: Tensor, inside: Tensor) -> Tensor:
    """Positions that begin at 0 with each sample; padding at a row's end is a sample of its own, so that it sees
    nothing else."""
    padding = (~inside).cumsum(1) - 1
    return torch.where(inside, positions, padding)


def taken(rows: Rows, which: np.ndarray) -> Rows:
    def part(r: RaggedArray | None) -> RaggedArray | None:
        return None if r is None else RaggedArray.of([r.values[r.starts[i] : r.starts[i + 1]] for i in which])

    inputs = part(rows.inputs)
    assert inputs is not None
    return Rows(inputs, part(rows.labels), part(rows.positions), None if rows.classes is None else rows.classes[which])


def packed(rows: Rows, context: int) -> Rows:
    """Samples joined in their order into rows of at most `context` tokens, with positions that start again at each."""
    if rows.labels is None or not len(rows.inputs):
        return rows
    row, used, fills = [], 0, []
    for length in rows.inputs.lengths.tolist():
        if used + length > context and used:
            fills.append(used)
            used = 0
        row.append(len(fills))
        used += length
    starts = np.cumsum([0, *fills, used], dtype=np.int64)
    positions = np.arange(len(rows.inputs.values)) - np.repeat(rows.inputs.starts[:-1], rows.inputs.lengths)
    return Rows(
        RaggedArray(rows.inputs.values, starts),
        RaggedArray(rows.labels.values, starts),
        RaggedArray(positions.astype(np.int64), starts),
    )

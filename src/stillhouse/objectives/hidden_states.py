"""Hidden states: layers of two language models of any depth and width are compared, and attention maps where both are
encoders.

paper: none; what PKD (arXiv 1908.09355), TinyBERT (arXiv 1909.10351) and others have in common
task: language
family: features
use when: teacher and student read the same tokens, and the student should also represent them as the teacher does
needs: hidden states of transformers models; for attention, encoders of BERT's kind

For each pair of layers the mean over real tokens of the squared difference (`mse`), of 1 - cosine (`cos`), or of the
cross-entropy over the width (`ce`); `pkd` compares token 0 alone, as unit vectors (arXiv 1908.09355). Padded tokens
count for nothing. Where widths differ, a linear map of the student's states is learned with it, and left out of the
product. Attention maps are made of queries and keys, so that networks keep their fast attention, and averaged over the
heads, so that networks with different heads can be compared: mean squared difference over pairs of real tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional.token_features import (
    attention_maps,
    attention_mse,
    first_token_distance,
    hidden_ce,
    hidden_cosine,
    hidden_mse,
)
from stillhouse.signals import Batch, Signals

LOSSES = {"mse": hidden_mse, "cos": hidden_cosine, "ce": hidden_ce, "pkd": first_token_distance}


class HiddenStates(Objective):
    """Distances of hidden states and attention maps in pairs of layers.

    Args:
        layers: [student's, teacher's] hidden states; 0 is the embeddings', -1 the last layer's.
        loss: mse, cos, ce or pkd.
        attention: [student's, teacher's] layers, from 0, whose attention maps are compared.
        attention_weight: of these.
        heads: [student's, teacher's] attention heads, for attention maps.
    """

    name = "hidden_states"

    def __init__(
        self,
        layers: list[list[int]] | None = None,
        loss: Literal["mse", "cos", "ce", "pkd"] = "mse",
        attention: list[list[int]] | None = None,
        attention_weight: float = 1.0,
        heads: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.attention = [[-1, -1]] if layers is None else layers, attention or []
        for key, pairs in (("layers", self.layers), ("attention", self.attention)):
            if any(len(pair) != 2 for pair in pairs):
                raise UserError(f"hidden_states: {key} must be pairs [student's, teacher's]; given: {pairs}.")
        if not self.layers and not self.attention:
            raise UserError("hidden_states: name pairs in layers or attention; there is nothing to compare.")
        if self.attention and (heads is None or len(heads) != 2 or min(heads) < 1):
            raise UserError("hidden_states: attention needs heads: [student's, teacher's].")
        self.loss, self.attention_weight, self.heads = loss, attention_weight, heads or [1, 1]
        needs = {f"{side}.tap:hidden:{n}" for pair in self.layers for side, n in zip(("student", "teacher"), pair)}
        for pair in self.attention:
            for side, n in zip(("student", "teacher"), pair):
                needs |= {f"{side}.tap:query:{n}", f"{side}.tap:key:{n}"}
        self.needs = frozenset(needs)
        self.maps = nn.ModuleDict()

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        for place, (s, t) in enumerate(self.layers):
            mine, theirs = student.taps[f"hidden:{s}"], teacher.taps[f"hidden:{t}"]
            if mine.shape[:2] != theirs.shape[:2]:
                raise UserError(
                    f"hidden_states: the student reads {mine.shape[1]} tokens of a text and the teacher "
                    f"{theirs.shape[1]}; both need one tokenizer."
                )
            if mine.shape[-1] != theirs.shape[-1]:
                self.maps[str(place)] = nn.Linear(mine.shape[-1], theirs.shape[-1])

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        out = {}
        tapped = next(iter(student.taps.values()))
        inputs = batch.get("input")
        given = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        mask = torch.ones(tapped.shape[:2], device=tapped.device) if given is None else given
        if self.layers:
            parts = []
            for place, (s, t) in enumerate(self.layers):
                mine = student.taps[f"hidden:{s}"]
                mapped = self.maps[str(place)](mine) if str(place) in self.maps else mine
                parts.append(LOSSES[self.loss](mapped, teacher.taps[f"hidden:{t}"], mask))
            out["states"] = torch.stack(parts).sum()
        if self.attention:
            parts = []
            for s, t in self.attention:
                own, other = (
                    attention_maps(signals.taps[f"query:{n}"], signals.taps[f"key:{n}"], heads, mask).mean(1, True)
                    for signals, n, heads in ((student, s, self.heads[0]), (teacher, t, self.heads[1]))
                )
                parts.append(attention_mse(own, other, mask))
            out["attention"] = self.attention_weight * torch.stack(parts).sum()
        return out

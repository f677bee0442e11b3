"""The losses of a Distiller pipeline: of the predictions, and of hidden states or attention maps in matched layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision
from stillhouse.functional.token_features import (
    Pairing,
    attention_ce,
    attention_maps,
    attention_mse,
    attention_pairs,
    first_token_distance,
    hidden_ce,
    hidden_cosine,
    hidden_mse,
    hidden_pairs,
)
from stillhouse.methods.language.distiller.information import FirstTokenCritic, SequenceCritic, mi_alpha_bound
from stillhouse.signals import Batch, Signals

HiddenLoss = Literal["mse", "ce", "cos", "pkd", "mi"]
AttentionLoss = Literal["attention_mse", "attention_ce"]
Strategy = Literal["skip", "last", "emd"]
Critic = Literal["sequence", "first_token"]
STATES = {"mse": hidden_mse, "ce": hidden_ce, "cos": hidden_cosine, "pkd": first_token_distance}
MAPS = {"attention_mse": attention_mse, "attention_ce": attention_ce}


@full_precision
def prediction_loss(
    student: Tensor, teacher: Tensor, kind: Literal["ce", "mse"] = "ce", temperature: float = 1.0
) -> Tensor:
    """Cross-entropy of the softened classes, mean over the batch, without T^2; or the mean squared difference of
    logits / T. (B, C) and (B, C)."""
    s, t = student / temperature, teacher.detach() / temperature
    if kind == "mse":
        return F.mse_loss(s, t)
    return -(t.softmax(-1) * s.log_softmax(-1)).sum(-1).mean()


@torch.no_grad()
def transport(cost: Tensor) -> Tensor:
    """(N, M) the flow of least total cost between N and M equal weights; exact.

    Both sides are repeated to the least common multiple, which makes it an assignment. Costs may be negative.
    """
    from scipy.optimize import linear_sum_assignment

    n, m = cost.shape
    size = math.lcm(n, m)
    plain = cost.double().cpu().numpy()
    rows, columns = linear_sum_assignment(plain.repeat(size // n, 0).repeat(size // m, 1))
    flow = np.zeros((n, m))
    np.add.at(flow, (rows // (size // n), columns // (size // m)), 1 / size)
    return torch.from_numpy(flow).to(cost)


def transport_loss(cost: Tensor) -> Tensor:
    """The earth mover's distance for costs (N, M); the flow is a constant."""
    return (transport(cost) * cost).sum()


def mask_of(batch: Batch, states: Tensor) -> Tensor:
    """(B, L) 1 where a token is real; all of them where the batch has no mask."""
    mask = batch["input"].get("attention_mask")
    return torch.ones(states.shape[:2], device=states.device) if mask is None else mask


class HiddenStates(Objective):
    """Distances of hidden states in matched layers, summed over the pairs.

    Args:
        student, teacher: taps of the hidden states, the embeddings' first.
        kind: of `STATES`, or mi.
        strategy: which are paired; emd: all, by optimal transport, besides the embeddings.
        alpha: of mi.
        critic: what scores pairs for mi: one for all pairs of skip and last, one for each pair of emd.
        hidden, out: of a first-token critic.
        heads, feed_forward: of a sequence critic.

    Raises:
        UserError: a teacher that is not as deep, widths that cannot be compared, emd with another loss than mse and mi.
    """

    name = "intermediate"

    def __init__(
        self,
        student: Sequence[str],
        teacher: Sequence[str],
        kind: HiddenLoss = "mi",
        strategy: Strategy = "skip",
        alpha: float = 0.9,
        critic: Critic | None = None,
        hidden: int = 512,
        out: int = 64,
        heads: int = 8,
        feed_forward: int = 512,
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = list(student), list(teacher)
        self.kind, self.strategy, self.alpha = kind, strategy, alpha
        if strategy == "emd" and kind not in ("mse", "mi"):
            raise UserError(f"intermediate: strategy emd is for the losses mse and mi, not for {kind}.")
        depth: Pairing = "skip" if strategy == "emd" else strategy
        self.pairs = hidden_pairs(len(teacher) - 1, len(student) - 1, depth)
        self.critic = critic or ("first_token" if strategy == "emd" else "sequence")
        self.sizes = {"hidden": hidden, "out": out, "heads": heads, "feed_forward": feed_forward}
        self.needs = frozenset({*(f"student.tap:{t}" for t in student), *(f"teacher.tap:{t}" for t in teacher)})
        self.projections, self.critics = nn.ModuleDict(), nn.ModuleDict()
        if strategy == "emd":
            self.host_step = "the optimal transport between layers is solved on the host"

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        mine, theirs = student.taps[self.student_taps[0]], teacher.taps[self.teacher_taps[0]]
        widths = [student.taps[t].shape[-1] for t in self.student_taps]
        target = teacher.taps[self.teacher_taps[-1]].shape[-1]
        if mine.shape[1] != theirs.shape[1]:
            raise UserError(
                f"The student reads {mine.shape[1]} tokens of a text and the teacher {theirs.shape[1]}: hidden states "
                "are compared token by token, so both need one tokenizer."
            )
        if self.kind == "mi":
            if self.strategy == "emd":
                last, first = len(self.teacher_taps), len(self.student_taps)
                for s in range(1, first):
                    for t in range(1, last):
                        self.critics[f"{s}_{t}"] = self._critic(widths[s], target)
                self.critics["embeddings"] = FirstTokenCritic(widths[0], theirs.shape[-1], 128, self.sizes["out"])
            else:
                self.critics["all"] = self._critic(widths[-1], target)
            return
        for i, width in enumerate(widths):
            if width > target:
                raise UserError(
                    f"intermediate: the student's states are {width} wide and the teacher's {target}; {self.kind} maps "
                    "the student's to the teacher's width, which must not be smaller (mi takes any)."
                )
            if width < target:
                layer = nn.Linear(width, target)
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
                self.projections[str(i)] = layer

    def _critic(self, student: int, teacher: int) -> nn.Module:
        if self.critic == "first_token":
            return FirstTokenCritic(student, teacher, self.sizes["hidden"], self.sizes["out"])
        return SequenceCritic(student, teacher, heads=self.sizes["heads"], feed_forward=self.sizes["feed_forward"])

    def _distance(self, student: Tensor, teacher: Tensor, mask: Tensor, at: int, critic: str) -> Tensor:
        if self.kind != "mi":
            mapped = self.projections[str(at)](student) if str(at) in self.projections else student
            return STATES[self.kind](mapped, teacher, mask)
        scores, baseline = self.critics[critic](student, teacher.detach(), mask)
        return -mi_alpha_bound(scores, baseline, self.alpha)

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        mine = [student.taps[t] for t in self.student_taps]
        theirs = [teacher.taps[t] for t in self.teacher_taps]
        mask = mask_of(batch, mine[0])
        if self.strategy != "emd":
            parts = [self._distance(mine[s], theirs[t], mask, s, "all") for t, s in self.pairs]
            return {"loss": torch.stack(parts).sum()}
        cost = torch.stack(
            [
                torch.stack([self._distance(mine[s], theirs[t], mask, s, f"{s}_{t}") for t in range(1, len(theirs))])
                for s in range(1, len(mine))
            ]
        )
        return {"loss": transport_loss(cost) + self._distance(mine[0], theirs[0], mask, 0, "embeddings")}


class AttentionMaps(Objective):
    """Distances of attention maps in matched layers, summed over the pairs. Maps are made of queries and keys, so that
    networks keep their fast attention.

    Args:
        student, teacher: for each layer the taps of its queries and of its keys.
        student_heads, teacher_heads: of each network; the same number.
        kind: attention_mse or attention_ce.
        strategy: skip or last.

    Raises:
        UserError: emd, other heads, or a teacher that is not as deep.
    """

    name = "intermediate"

    def __init__(
        self,
        student: Sequence[tuple[str, str]],
        teacher: Sequence[tuple[str, str]],
        student_heads: int,
        teacher_heads: int,
        kind: AttentionLoss = "attention_mse",
        strategy: Strategy = "skip",
    ) -> None:
        super().__init__()
        if strategy == "emd":
            raise UserError("intermediate: strategy emd is for hidden states (mse and mi), not for attention maps.")
        if student_heads != teacher_heads:
            raise UserError(
                f"intermediate: attention maps need as many heads in both networks; the student has {student_heads}, "
                f"the teacher {teacher_heads}."
            )
        self.heads, self.kind = student_heads, kind
        self.pairs = [(student[s], teacher[t]) for t, s in attention_pairs(len(teacher), len(student), strategy)]
        self.needs = frozenset(
            {
                f"{side}.tap:{name}"
                for pair in self.pairs
                for side, own in zip(("student", "teacher"), pair)
                for name in own
            }
        )

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        parts = []
        for own, other in self.pairs:
            q, k = (student.taps[name] for name in own)
            mask = mask_of(batch, q)
            theirs = attention_maps(teacher.taps[other[0]], teacher.taps[other[1]], self.heads, mask)
            parts.append(MAPS[self.kind](attention_maps(q, k, self.heads, mask), theirs, mask))
        return {"loss": torch.stack(parts).sum()}


class Predictions(Objective):
    """The distance of the predictions (see `prediction_loss`)."""

    name = "prediction"
    needs = frozenset({"student.logits", "teacher.logits"})

    def __init__(self, kind: Literal["ce", "mse"] = "ce", temperature: float = 1.0) -> None:
        super().__init__()
        self.kind, self.temperature = kind, temperature

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        mine, theirs = student.require("logits"), teacher.require("logits")
        return {"loss": prediction_loss(mine, theirs, self.kind, self.temperature)}


class Labels(Objective):
    """Cross-entropy with the labels of the batch's own samples; those that were mixed from two have none."""

    name = "labels"
    needs = frozenset({"student.logits", "label"})

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        label = batch["label"]
        return {"loss": F.cross_entropy(student.require("logits")[: len(label)].float(), label)}

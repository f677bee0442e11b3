"""The losses of a Distiller pipeline: of the predictions, and of hidden states or attention maps in matched layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

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
        strategy: which layers are matched.
        alpha: of mi.
        critic: what scores pairs of states for mi: one critic for all layers.
        hidden, out: of a first-token critic.
        heads, feed_forward: of a sequence critic.

    Raises:
        UserError: a teacher that is not as deep, or widths that cannot be compared.
    """

    name = "intermediate"

    def __init__(
        self,
        student: Sequence[str],
        teacher: Sequence[str],
        kind: HiddenLoss = "mi",
        strategy: Pairing = "skip",
        alpha: float = 0.9,
        critic: Critic = "sequence",
        hidden: int = 512,
        out: int = 64,
        heads: int = 8,
        feed_forward: int = 512,
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = list(student), list(teacher)
        self.kind, self.alpha, self.critic = kind, alpha, critic
        self.pairs = hidden_pairs(len(teacher) - 1, len(student) - 1, strategy)
        self.sizes = {"hidden": hidden, "out": out, "heads": heads, "feed_forward": feed_forward}
        self.needs = frozenset({*(f"student.tap:{t}" for t in student), *(f"teacher.tap:{t}" for t in teacher)})
        self.projections, self.critics = nn.ModuleDict(), nn.ModuleDict()

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        mine = [student.taps[t] for t in self.student_taps]
        theirs = [teacher.taps[t] for t in self.teacher_taps]
        if mine[0].shape[1] != theirs[0].shape[1]:
            raise UserError(
                f"The student reads {mine[0].shape[1]} tokens of a text and the teacher {theirs[0].shape[1]}: hidden "
                "states are compared token by token, so both need one tokenizer."
            )
        if self.kind == "mi":
            self.make_critics(mine[-1].shape[-1], theirs[-1].shape[-1])
            return
        target = theirs[-1].shape[-1]
        for i, width in enumerate(x.shape[-1] for x in mine):
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

    def make_critics(self, student: int, teacher: int) -> None:
        """Critics of states of these widths."""
        self.critics["all"] = self.new_critic(student, teacher)

    def new_critic(self, student: int, teacher: int) -> nn.Module:
        """A critic of the chosen kind."""
        sizes = self.sizes
        if self.critic == "first_token":
            return FirstTokenCritic(student, teacher, sizes["hidden"], sizes["out"])
        return SequenceCritic(student, teacher, heads=sizes["heads"], feed_forward=sizes["feed_forward"])

    def distance(self, student: Tensor, teacher: Tensor, mask: Tensor, at: int, critic: str) -> Tensor:
        """The loss of one pair of states (B, L, D): of student layer `at`, scored by the critic of that name."""
        if self.kind != "mi":
            mapped = self.projections[str(at)](student) if str(at) in self.projections else student
            return STATES[self.kind](mapped, teacher, mask)
        scores, baseline = self.critics[critic](student, teacher.detach(), mask)
        return -mi_alpha_bound(scores, baseline, self.alpha)

    def states(self, student: Signals, teacher: Signals) -> tuple[list[Tensor], list[Tensor]]:
        """The hidden states of both."""
        return [student.taps[t] for t in self.student_taps], [teacher.taps[t] for t in self.teacher_taps]

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        mine, theirs = self.states(student, teacher)
        mask = mask_of(batch, mine[0])
        parts = [self.distance(mine[s], theirs[t], mask, s, "all") for t, s in self.pairs]
        return {"loss": torch.stack(parts).sum()}


class TransportedStates(HiddenStates):
    """Distances of all pairs of layers, weighed by the optimal transport between them, and that of the embeddings. For
    mi there is a critic for each pair.

    Raises:
        UserError: another loss than mse and mi.
    """

    host_step = "the optimal transport between layers is solved on the host"

    def __init__(self, student: Sequence[str], teacher: Sequence[str], kind: HiddenLoss = "mi", **options: Any) -> None:
        if kind not in ("mse", "mi"):
            raise UserError(f"intermediate: strategy emd is for the losses mse and mi, not for {kind}.")
        super().__init__(student, teacher, kind, **options)

    def make_critics(self, student: int, teacher: int) -> None:
        for s in range(1, len(self.student_taps)):
            for t in range(1, len(self.teacher_taps)):
                self.critics[f"{s}_{t}"] = self.new_critic(student, teacher)
        self.critics["embeddings"] = FirstTokenCritic(student, teacher, 128, self.sizes["out"])

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        mine, theirs = self.states(student, teacher)
        mask = mask_of(batch, mine[0])
        rows = [
            torch.stack([self.distance(mine[s], theirs[t], mask, s, f"{s}_{t}") for t in range(1, len(theirs))])
            for s in range(1, len(mine))
        ]
        return {"loss": transport_loss(torch.stack(rows)) + self.distance(mine[0], theirs[0], mask, 0, "embeddings")}


class AttentionMaps(Objective):
    """Distances of attention maps in matched layers, summed over the pairs. Maps are made of queries and keys, so that
    networks keep their fast attention.

    Args:
        student, teacher: for each layer the taps of its queries and of its keys.
        student_heads, teacher_heads: of each network; the same number.
        kind: attention_mse or attention_ce.
        strategy: skip or last.

    Raises:
        UserError: other heads, or a teacher that is not as deep.
    """

    name = "intermediate"

    def __init__(
        self,
        student: Sequence[tuple[str, str]],
        teacher: Sequence[tuple[str, str]],
        student_heads: int,
        teacher_heads: int,
        kind: AttentionLoss = "attention_mse",
        strategy: Pairing = "skip",
    ) -> None:
        super().__init__()
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

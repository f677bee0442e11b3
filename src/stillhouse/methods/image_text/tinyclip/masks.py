"""Learned masks of automatic inheritance: hard-concrete samples, expected size, the Lagrangian of a target sparsity
(section 3.3 of the paper, after CoFi, ACL 2022, and Louizos et al., ICLR 2018)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.nn.clip import Encoder, EncoderShape, Masks
from stillhouse.signals import Batch, Signals
from stillhouse.training.context import Context

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
EPS = 1e-6
SOFTNESS = 0.8
BOUNDS = (math.log(0.01), math.log(100.0))


def sampled(logits: Tensor, uniform: Tensor) -> Tensor:
    """Hard-concrete masks in [0, 1] of mask logits, from uniforms in (0, 1) of the same shape."""
    s = torch.sigmoid((uniform.log() - (1 - uniform).log() + logits) / TEMPERATURE)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def drawn(logits: Tensor) -> Tensor:
    """`sampled` with uniforms from torch's default generator."""
    return sampled(logits, torch.empty_like(logits).uniform_(EPS, 1 - EPS))


def open_probability(logits: Tensor) -> Tensor:
    """The probability that a sampled mask is not 0."""
    at_zero = (0 - LOW) / (HIGH - LOW)
    logit = math.log(at_zero) - math.log(1 - at_zero)
    return 1 - torch.sigmoid(logit * TEMPERATURE - logits).clamp(EPS, 1 - EPS)


def settled(logits: Tensor) -> Tensor:
    """The mask of evaluation, of one vector of logits: sigmoid(logits / b * 0.8), whose smallest are 0, as many as are
    expected to be closed."""
    soft = torch.sigmoid(logits / TEMPERATURE * SOFTNESS)
    closed = round(len(logits) - float(open_probability(logits.detach()).sum()))
    if closed <= 0:
        return soft
    return soft.index_fill(0, soft.topk(min(closed, len(soft)), largest=False).indices, 0.0)


def head_parameters(shape: EncoderShape) -> int:
    """Weights of one attention head, with its share of the biases."""
    return 4 * shape.width * shape.head_dim + 4 * shape.head_dim


def prunable(shape: EncoderShape) -> int:
    """Weights of a transformer that masks may take away: its attention and perceptrons, not its norms and
    embeddings."""
    perceptrons = sum(2 * shape.width * m + shape.width + m for m in shape.hidden)
    return sum(shape.heads) * head_parameters(shape) + perceptrons


def expected_parameters(
    channels: Tensor | None, heads: Sequence[Tensor], hidden: Sequence[Tensor], shape: EncoderShape
) -> Tensor:
    """How many of the prunable weights are expected to stay, (), from the probabilities of being open.

    Args:
        channels: (W,); None: all stay.
        heads, hidden: of each layer, (H,) and (M,).
    """
    attention = torch.stack([h.sum() for h in heads]).sum() * head_parameters(shape)
    units = torch.stack([m.sum() for m in hidden]).sum()
    if channels is None:
        return attention + units * (2 * shape.width + 1)
    open_channels = channels.sum()
    return attention * open_channels / shape.width + 2 * units * open_channels


class MaskLogits(nn.Module):
    """The mask logits of one transformer: of its channels, of the heads and of the hidden units of each layer.

    Args:
        shape: of the transformer.
        start: their first value; at 10 nearly every mask is open.
    """

    def __init__(self, shape: EncoderShape, start: float = 10.0) -> None:
        super().__init__()
        self.shape = shape
        self.channels = nn.Parameter(torch.full((shape.width,), float(start)))
        self.heads = nn.ParameterList(torch.full((h,), float(start)) for h in shape.heads)
        self.hidden = nn.ParameterList(torch.full((m,), float(start)) for m in shape.hidden)

    def samples(self) -> Masks:
        """One draw for a forward pass of training."""
        return Masks(drawn(self.channels), [drawn(x) for x in self.heads], [drawn(x) for x in self.hidden])

    @torch.no_grad()
    def settle(self) -> Masks:
        """The masks of evaluation; one channel at least stays."""
        channels = settled(self.channels)
        if not bool((channels != 0).any()):
            best = self.channels.argmax()
            channels[best] = torch.sigmoid(self.channels[best] / TEMPERATURE * SOFTNESS)
        return Masks(channels, [settled(x) for x in self.heads], [settled(x) for x in self.hidden])

    def expected(self) -> Tensor:
        """The expected number of prunable weights that stay, ()."""
        heads, hidden = ([open_probability(x) for x in part] for part in (self.heads, self.hidden))
        return expected_parameters(open_probability(self.channels), heads, hidden, self.shape)

    @torch.no_grad()
    def clamp(self) -> None:
        """Put the logits into [log 0.01, log 100]."""
        for parameter in self.parameters():
            parameter.clamp_(*BOUNDS)


def lagrangian(target: float | Tensor, sparsity: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """first * d + second * d^2 of what is lacking to the target sparsity, d = max(target - sparsity, 0)."""
    lacking = (target - sparsity).clamp_min(0)
    return first * lacking + second * lacking.square()


@dataclass(frozen=True)
class Ramp:
    """A target sparsity that rises linearly from `start` to `target` over `steps` optimiser steps."""

    start: float
    target: float
    steps: int

    def at(self, step: int) -> float:
        return self.start + (self.target - self.start) * min(1.0, step / max(self.steps, 1))


class Sparsity(Objective):
    """The masks of both transformers, and the constraint that as much as the target goes: one for both, so that they
    share what stays.

    Masks descend the loss, the two multipliers ascend it, each in an optimiser of its own, before each step of the
    network's.

    Args:
        encoders: the transformers, by name.
        total: prunable weights of the original network, to which sparsity refers.
        ramp: the target over the steps.
        lr: of the masks and of the multipliers.
        start: first mask logits.
        multiplier: first value of both multipliers.
    """

    name = "sparsity"
    needs = frozenset()

    def __init__(
        self,
        encoders: dict[str, Encoder],
        total: int,
        ramp: Ramp,
        lr: float = 0.02,
        start: float = 10.0,
        multiplier: float = 10.0,
    ) -> None:
        super().__init__()
        self.masks = nn.ModuleDict({name: MaskLogits(e.shape, start) for name, e in encoders.items()})
        self.multipliers = nn.ParameterList(torch.tensor(multiplier) for _ in range(2))
        self.total, self.ramp = total, ramp
        self._steps = (
            self.keep_optimizer("masks", torch.optim.AdamW(self.masks.parameters(), lr=lr, weight_decay=0.0)),
            self.keep_optimizer(
                "multipliers", torch.optim.AdamW(self.multipliers.parameters(), lr=lr, weight_decay=0.0, maximize=True)
            ),
        )

    def sparsity(self) -> Tensor:
        """The expected share of the original's prunable weights that is gone, ()."""
        stays = torch.stack([m.expected() for m in self._all()]).sum()
        return 1 - stays / self.total

    def _all(self) -> list[MaskLogits]:
        return [m for m in self.masks.values() if isinstance(m, MaskLogits)]

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        sparsity, (first, second) = self.sparsity(), tuple(self.multipliers)
        return {
            "loss": lagrangian(self.ramp.at(progress.step), sparsity, first, second),
            "log:sparsity": sparsity,
        }

    def before_update(self, ctx: Context) -> None:
        for optimizer in self._steps:
            optimizer.step()
            optimizer.zero_grad()
        for masks in self._all():
            masks.clamp()

    def param_groups(self) -> list[dict[str, object]]:
        return []

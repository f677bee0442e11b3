"""The factorised prior of latents (Ballé et al., arXiv 1802.01436, appendix 6.1), and its integer tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.functional.precision import full_precision
from stillhouse.methods.compression.entropic_student.layers import lower_bound

FILTERS = (3, 3, 3, 3)
SCALE = 10.0
TAIL = 1e-9
"""The mass that the quantiles leave out."""
LEAST = 1e-9
"""The least likelihood."""
PRECISION = 16
"""Bits of a table's frequencies."""


# ---- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """How often each symbol of each channel is expected, in integers, which encoder and decoder share.

    Attributes:
        cumulative: (C, most) int32, of each channel 0, f_0, f_0 + f_1, … up to 2^16, and zeros where the channel has
            fewer symbols than the most; the last symbol stands for all others.
        lengths: (C,) int32, how many entries of `cumulative` count.
        offsets: (C,) int32, the latent integer of each channel's symbol 0.
    """

    cumulative: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray

    def frequencies(self, channel: int) -> np.ndarray:
        """(symbols + 1,) int64, of the channel's symbols and, last, of all others; their sum is 2^16."""
        return np.diff(self.cumulative[channel, : self.lengths[channel]].astype(np.int64))


def integer_frequencies(mass: np.ndarray, precision: int = PRECISION) -> np.ndarray:
    """Integers that are proportional to a probability mass, each at least 1, and whose sum is 2^precision.

    A symbol that would get 0 takes 1 from the rarest symbol that has more than 1.

    >>> integer_frequencies(np.array([0.5, 0.5, 0.0]), 4)
    array([7, 8, 1])
    """
    whole = 1 << precision
    counts = np.floor(mass * mass.dtype.type(whole) + mass.dtype.type(0.5)).astype(np.int64)
    counts = counts * whole // counts.sum()
    counts[-1] += whole - counts.sum()
    for i in np.flatnonzero(counts == 0):
        richer = np.where(counts > 1, counts, whole + 1)
        counts[richer.argmin()] -= 1
        counts[i] = 1
    return counts


# ---- the density -----------------------------------------------------------------------------------------------------


def cumulative_logits(
    values: Tensor, matrices: list[Tensor], biases: list[Tensor], factors: list[Tensor], detached: bool = False
) -> Tensor:
    """F(v), the logits of each channel's cumulative distribution, which rise with v; shape (C, 1, N).

    v -> softplus(H_i) v + b_i, and but for the last layer v -> v + tanh(a_i) tanh(v).

    Args:
        values: (C, 1, N).
        matrices, biases, factors: H_i, b_i, a_i.
        detached: the gradient stops at them.
    """
    for i, (matrix, bias) in enumerate(zip(matrices, biases)):
        matrix, bias = (matrix.detach(), bias.detach()) if detached else (matrix, bias)
        values = F.softplus(matrix) @ values + bias
        if i < len(factors):
            factor = factors[i].detach() if detached else factors[i]
            values = values + factor.tanh() * values.tanh()
    return values


def interval_mass(lower: Tensor, upper: Tensor) -> Tensor:
    """sigmoid(upper) - sigmoid(lower), computed on the side of 0 where it is precise."""
    sign = -(lower + upper).sign().detach()
    return ((sign * upper).sigmoid() - (sign * lower).sigmoid()).abs()


class FactorisedPrior(nn.Module):
    """A density of each channel, learned; called, it gives bits.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (1, *FILTERS, 1)
        scale = SCALE ** (1 / (len(FILTERS) + 1))
        self.matrices, self.biases, self.factors = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            start = math.log(math.expm1(1 / scale / outputs))
            self.matrices.append(nn.Parameter(torch.full((channels, outputs, inputs), start)))
            self.biases.append(nn.Parameter(torch.empty(channels, outputs, 1).uniform_(-0.5, 0.5)))
            if i < len(FILTERS):
                self.factors.append(nn.Parameter(torch.zeros(channels, outputs, 1)))
        self.quantiles = nn.Parameter(torch.tensor([-SCALE, 0.0, SCALE]).repeat(channels, 1, 1))

    @property
    def medians(self) -> Tensor:
        """(1, C, 1, 1), constants."""
        return self.quantiles[:, :, 1:2].detach().view(1, -1, 1, 1)

    def _logits(self, values: Tensor, detached: bool = False) -> Tensor:
        return cumulative_logits(values, list(self.matrices), list(self.biases), list(self.factors), detached)

    def likelihood(self, latent: Tensor) -> Tensor:
        """P(y) = sigmoid(F(y + 1/2)) - sigmoid(F(y - 1/2)), at least 1e-9; (B, C, H, W), float32 or float64."""
        return self._likelihood(latent.double() if latent.dtype == torch.float64 else latent.float())

    @full_precision
    def _likelihood(self, latent: Tensor) -> Tensor:
        values = latent.movedim(1, 0).flatten(1).unsqueeze(1)
        mass = interval_mass(self._logits(values - 0.5), self._logits(values + 0.5))
        shape = (latent.shape[1], latent.shape[0], *latent.shape[2:])
        return lower_bound(mass, LEAST).view(shape).movedim(0, 1)

    def forward(self, latent: Tensor) -> Tensor:
        """(B,) bits of each sample, -sum log2 P(y)."""
        return -self.likelihood(latent).log2().flatten(1).sum(1)

    @full_precision
    def auxiliary_loss(self) -> Tensor:
        """sum |F(q) - (-t, 0, t)| over the three quantiles q of each channel, t = log(2 / 1e-9 - 1); it moves them
        alone."""
        bound = math.log(2 / TAIL - 1)
        wanted = torch.tensor([-bound, 0.0, bound], device=self.quantiles.device)
        return (self._logits(self.quantiles, detached=True) - wanted).abs().sum()

    @torch.no_grad()
    def tables(self) -> Tables:
        """The integer tables, computed on the CPU: of each channel, the integers between the outer quantiles."""
        prior = FactorisedPrior(len(self.quantiles))
        prior.load_state_dict({k: v.detach().float().cpu() for k, v in self.state_dict().items()})
        low, medians, high = prior.quantiles[:, 0, :].unbind(1)
        below = (medians - low).ceil().clamp_min(0).long()
        counts = below + (high - medians).ceil().clamp_min(0).long() + 1
        most = int(counts.max())
        values = torch.arange(most)[None, None] - below[:, None, None] + medians[:, None, None]
        lower, upper = prior._logits(values - 0.5), prior._logits(values + 0.5)
        mass = interval_mass(lower, upper)[:, 0].numpy()
        tails = (lower[:, 0, 0].sigmoid() + (-upper[:, 0, -1]).sigmoid()).numpy()
        cumulative = np.zeros((len(counts), most + 2), np.int32)
        for i, count in enumerate(counts.tolist()):
            frequencies = integer_frequencies(np.append(mass[i, :count], tails[i]))
            cumulative[i, 1 : count + 2] = frequencies.cumsum()
        return Tables(cumulative, counts.numpy().astype(np.int32) + 2, -below.numpy().astype(np.int32))

"""The diffusion head of a masked generator (MAR, Li et al., arXiv 2406.11838): a small perceptron that draws one
continuous token given what the transformer says of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError, unknown
from stillhouse.functional.diffusion import guided
from stillhouse.functional.precision import full_precision
from stillhouse.nn.dit import step_embedding

ANGLES = 256
STEPS = 1000


def head_betas(name: Literal["cosine", "linear"] = "cosine", steps: int = STEPS) -> Tensor:
    """(steps,) float64: beta of the cosine schedule, at most 0.999, or of DDPM's linear one, rescaled to so many steps.

    Raises:
        UserError: another name.
    """
    if name == "linear":
        return torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    if name != "cosine":
        raise unknown("schedule of a diffusion head", name, ["cosine", "linear"])
    bar = [math.cos((u / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for u in range(steps + 1)]
    return torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(bar)], dtype=torch.float64)


class Tables(NamedTuple):
    """What a diffusion of T steps computes with, (T,) each: factors of sample and noise; of the posterior's mean, those
    of the clean and the noisy sample; the smallest and the largest log variance."""

    sample: Tensor
    noise: Tensor
    clean: Tensor
    noisy: Tensor
    low: Tensor
    high: Tensor


def tables(betas: Tensor) -> Tables:
    """Of float64 betas (T,)."""
    bar = (1 - betas).cumprod(0)
    before = torch.cat([bar.new_ones(1), bar[:-1]])
    variance = betas * (1 - before) / (1 - bar)
    low = torch.cat([variance[1:2], variance[1:]]) if len(variance) > 1 else variance
    return Tables(
        bar.sqrt(),
        (1 - bar).sqrt(),
        betas * before.sqrt() / (1 - bar),
        (1 - before) * (1 - betas).sqrt() / (1 - bar),
        low.clamp_min(1e-20).log(),
        betas.log(),
    )


def respaced(betas: Tensor, count: int) -> tuple[list[int], Tensor]:
    """Steps evenly from the first to the last of T, rising, and the betas (count,) of a diffusion that takes these
    alone.

    Raises:
        UserError: fewer than one step, or more than T.
    """
    total = len(betas)
    if not 1 <= count <= total:
        raise UserError(f"A diffusion head of {total} steps is sampled in 1 to {total} of them; given: {count}.")
    stride = (total - 1) / (count - 1) if count > 1 else 1.0
    steps = [round(i * stride) for i in range(count)]
    bar = (1 - betas).cumprod(0)[steps]
    return steps, 1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])


class ResidualBlock(nn.Module):
    """h + gate * MLP(LN(h) (1 + scale) + shift), all three of the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(condition)).chunk(3, -1)
        return h + gate * self.mlp(self.norm(h) * (1 + scale) + shift)


class HeadTerms(NamedTuple):
    """Of n tokens: `noisy` (n, C), the network's `output` (n, 2 C), its noise `eps` (n, C); `mse` and `vb` (n,), the
    square error of the noise and the variational bound in bits per number, which trains the variance alone."""

    noisy: Tensor
    output: Tensor
    eps: Tensor
    mse: Tensor
    vb: Tensor


class DiffusionHead(nn.Module):
    """Tokens of C numbers, given vectors of Z.

    Args:
        channels, condition: C and Z.
        width, depth: of the perceptron, and its residual blocks.
        steps, schedule: T, and how its betas rise.
    """

    table: Tensor

    def __init__(
        self,
        channels: int,
        condition: int,
        width: int,
        depth: int,
        steps: int = STEPS,
        schedule: Literal["cosine", "linear"] = "cosine",
    ) -> None:
        super().__init__()
        self.channels = channels
        self.time = nn.Sequential(nn.Linear(ANGLES, width), nn.SiLU(), nn.Linear(width, width))
        self.condition, self.enter = nn.Linear(condition, width), nn.Linear(channels, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation, self.leave = nn.Linear(width, 2 * width), nn.Linear(width, 2 * channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.time[0], self.time[2]):
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=0.02)
        zero: list[nn.Module] = [self.modulation, self.leave]
        zero += [block.modulation for block in self.blocks if isinstance(block, ResidualBlock)]
        for linear in zero:
            assert isinstance(linear, nn.Linear)
            nn.init.zeros_(linear.weight)
        self._betas = head_betas(schedule, steps)
        self.register_buffer("table", torch.stack(tables(self._betas)).float(), persistent=False)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Noisy tokens (n, C) at steps (n,) given (n, Z) -> (n, 2 C): the noise, and where the log variance lies
        between its bounds (-1 to 1)."""
        condition = self.time(step_embedding(t, ANGLES)) + self.condition(z)
        h = self.enter(x)
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(F.silu(condition)).chunk(2, -1)
        found: Tensor = self.leave(self.norm(h) * (1 + scale) + shift)
        return found

    def terms(self, x: Tensor, z: Tensor, t: Tensor, noise: Tensor) -> HeadTerms:
        """The terms of clean tokens (n, C) with this noise at steps (n,)."""
        at = Tables(*self.table[:, t][..., None].unbind(0))
        noisy = at.sample * x + at.noise * noise
        output = self(noisy, t, z)
        eps = output[:, : self.channels]
        mse = (noise - eps.float()).square().mean(-1)
        return HeadTerms(noisy, output, eps, mse, variational_bound(x, noisy, output, t, at))

    def loss(self, x: Tensor, z: Tensor, mask: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The mean of mse + vb over tokens (n, C) whose mask (n,) is 1; 0 where none is."""
        terms = self.terms(x, z, t, noise)
        return ((terms.mse + terms.vb) * mask).sum() / mask.sum().clamp_min(1)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        draws: Callable[[int], Tensor],
        steps: int = 100,
        temperature: float = 1.0,
        guidance: float = 1.0,
    ) -> Tensor:
        """Tokens (n, C) drawn for vectors (n, Z).

        Args:
            z: with a guidance other than 1, the second half is that of no text, for the same tokens.
            noise: (n, C), or (n / 2, C) with guidance: standard normal.
            draws: call of the network, from 0 -> standard normal noise (n, C).
            temperature: factor of that noise.

        Returns:
            With guidance, the second half is that of the same tokens with its own variance; the first is the result.
        """
        two = guidance != 1
        x = torch.cat([noise, noise]) if two else noise
        places, betas = respaced(self._betas, steps)
        table = Tables(*tables(betas))
        for number, i in enumerate(reversed(range(steps))):
            t = torch.full((len(x),), places[i], device=x.device)
            if two:
                half = x[: len(x) // 2]
                output = self(torch.cat([half, half]), t, z)
                eps, share = output.split(self.channels, -1)
                first, second = eps.chunk(2)
                mixed = guided(first, second, guidance)
                eps = torch.cat([mixed, mixed])
            else:
                eps, share = self(x, t, z).split(self.channels, -1)
            clean = (x - float(table.noise[i]) * eps) / float(table.sample[i])
            mean = float(table.clean[i]) * clean + float(table.noisy[i]) * x
            part = (share + 1) / 2
            log_variance = part * float(table.high[i]) + (1 - part) * float(table.low[i])
            x = mean if i == 0 else mean + (0.5 * log_variance).exp() * temperature * draws(number)
        return x


# ---- the variational bound -------------------------------------------------------------------------------------------


@full_precision
def variational_bound(x: Tensor, noisy: Tensor, output: Tensor, t: Tensor, at: Tables) -> Tensor:
    """(n,) bits per number: the KL divergence of the true posterior from the predicted one, with the mean held fixed;
    at step 0 the negative log-likelihood of x on a grid of 256 values (Nichol and Dhariwal, arXiv 2102.09672).

    Args:
        x, noisy: (n, C).
        output: (n, 2 C) of the head.
        t: (n,).
        at: tables at these steps, (n, 1) each.
    """
    eps, share = output.chunk(2, -1)
    share = (share + 1) / 2
    log_variance = share * at.high + (1 - share) * at.low
    clean = (noisy - at.noise * eps.detach()) / at.sample
    mean, true = (at.clean * s + at.noisy * noisy for s in (clean, x))
    kl = 0.5 * (
        -1 + log_variance - at.low + (at.low - log_variance).exp() + (true - mean).square() * (-log_variance).exp()
    )
    first = -grid_log_likelihood(x, mean, 0.5 * log_variance)
    return torch.where(t == 0, first.mean(-1), kl.mean(-1)) / math.log(2)


def grid_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of the bin of width 2 / 255 around x in [-1, 1] of a normal distribution; the outermost bins are
    open."""
    centred, inverse = x - mean, (-log_scale).exp()
    above, below = (normal_below(inverse * (centred + s / 255)) for s in (1, -1))
    inside = (above - below).clamp_min(1e-12).log()
    lowest, highest = above.clamp_min(1e-12).log(), (1 - below).clamp_min(1e-12).log()
    return torch.where(x < -0.999, lowest, torch.where(x > 0.999, highest, inside))


def normal_below(x: Tensor) -> Tensor:
    """The share of a standard normal distribution below x, by the tanh approximation."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def recorded(noises: Sequence[Tensor]) -> Callable[[int], Tensor]:
    """Draws of `DiffusionHead.sample` that are there already."""
    return lambda i: noises[i]

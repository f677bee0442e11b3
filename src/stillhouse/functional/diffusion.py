"""Diffusion and flow models: noise schedules, what a denoiser predicts, weights of its loss, and samplers.

A sample with noise is `x = a(t) x0 + s(t) eps` at a step t of 0 to T - 1, with more noise at larger t. What an
output means is its parametrisation: `eps` the noise, `x0` the sample, `v` = a eps - s x0 (Salimans and Ho, arXiv
2202.00512), `flow` = eps - x0 (velocity of a straight path, a = 1 - s). The formulas are those of DDPM (arXiv
2006.11239), DDIM (2010.02502), EDM's Euler steps (2206.00364), latent consistency models (2310.04378) and min-SNR
weights (2303.09556).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from stillhouse.errors import UserError, unknown

Parametrisation = Literal["eps", "x0", "v", "flow"]
ScheduleName = Literal["linear", "scaled_linear", "cosine", "flow"]
Spacing = Literal["leading", "trailing", "linspace", "consistency"]
SamplerName = Literal["ddim", "renoise", "lcm", "euler", "euler_ancestral"]
Denoise = Callable[[Tensor, Tensor], Tensor]
"""A denoiser whose condition is settled: samples (B, ...) and steps (B,) -> its output, shaped as the samples."""


# ---- schedules -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How much of a sample and of noise there is at each of T steps.

    Attributes:
        alpha: (T,) a, the factor of the sample.
        sigma: (T,) s, the factor of the noise.
        straight: whether a = 1 - s (flow), not a^2 + s^2 = 1 (variance preserving).
    """

    alpha: Tensor
    sigma: Tensor
    straight: bool = False

    @classmethod
    def preserving(cls, alphas_cumprod: Tensor) -> Schedule:
        """The variance-preserving schedule with a^2 = `alphas_cumprod` (T,)."""
        return cls(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())

    @classmethod
    def flow(cls, steps: int = 1000, shift: float = 1.0) -> Schedule:
        """The straight path: s = u shift / (1 + (shift - 1) u) at u = (t + 1) / T."""
        u = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        sigma = (u * shift / (1 + (shift - 1) * u)).float()
        return cls(1 - sigma, sigma, straight=True)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.alpha)

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a and s at steps (B,), shaped (B, 1, ...) to multiply `like` (B, ...), in its precision unless theirs is
        higher."""
        shape = (-1, *(1,) * (like.ndim - 1))
        alpha, sigma = (x.to(like.device)[t].view(shape) for x in (self.alpha, self.sigma))
        return alpha, sigma

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """a x0 + s eps at steps (B,)."""
        alpha, sigma = self.at(t, x0)
        return (alpha * x0 + sigma * eps).to(x0.dtype)

    def snr(self, t: Tensor) -> Tensor:
        """(a / s)^2 at steps (B,)."""
        alpha, sigma = self.alpha.to(t.device)[t], self.sigma.to(t.device)[t]
        return (alpha / sigma).square()


def schedule(
    name: ScheduleName,
    steps: int = 1000,
    *,
    beta: tuple[float, float] = (1e-4, 0.02),
    shift: float = 1.0,
    zero_terminal: bool = False,
) -> Schedule:
    """A schedule by name.

    Args:
        name: `linear` (DDPM: betas evenly from the first of `beta` to the last), `scaled_linear` (Stable Diffusion:
            their roots), `cosine` (iDDPM, betas of at most 0.999) or `flow`.
        steps: T.
        beta: the first and the last beta, of the two linear schedules; of 1,000 steps, and multiplied by 1,000 / T
            for others.
        shift: of `flow`.
        zero_terminal: rescale so that nothing of the sample is left at the last step (arXiv 2305.08891).

    Raises:
        UserError: an unknown name, or what does not go together.
    """
    if name not in get_args(ScheduleName):
        raise unknown("noise schedule", name, get_args(ScheduleName))
    if steps < 1:
        raise UserError(f"A noise schedule has one step or more; given: {steps}.")
    if name == "flow":
        if not shift > 0:
            raise UserError(f"The shift of a flow schedule must be above 0; given: {shift}.")
        return Schedule.flow(steps, shift)
    if name == "cosine":
        bar = [math.cos((u / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for u in range(steps + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in itertools.pairwise(bar)], dtype=torch.float64)
    else:
        low, high = (b * 1000 / steps for b in beta)
        if not 0 < low <= high < 1:
            raise UserError(f"beta: two numbers between 0 and 1, the smaller first; of {steps} steps: {low}, {high}.")
        betas = (
            torch.linspace(low, high, steps, dtype=torch.float64)
            if name == "linear"
            else torch.linspace(low**0.5, high**0.5, steps, dtype=torch.float64).square()
        )
    bar_alpha = (1 - betas).cumprod(0)
    if zero_terminal:
        root = bar_alpha.sqrt()
        bar_alpha = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return Schedule.preserving(bar_alpha.float())


# ---- parametrisations ----------------------------------------------------------------------------------------------


class Clean(NamedTuple):
    """What an output says of a noisy sample: its clean sample and its noise."""

    x0: Tensor
    eps: Tensor


def clean(kind: Parametrisation, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Clean:
    """The clean sample and the noise by a denoiser's output.

    Args:
        kind: what the output is.
        output, x: (B, ...).
        alpha, sigma: as of `Schedule.at`.
    """
    if kind == "eps":
        return Clean((x - sigma * output) / alpha, output)
    if kind == "flow":
        return Clean(x - sigma * output, x + alpha * output)
    if kind == "v":
        x0 = alpha * x - sigma * output
    elif kind == "x0":
        x0 = output
    else:
        raise unknown("parametrisation", kind, get_args(Parametrisation))
    return Clean(x0, (x - alpha * x0) / sigma)


def target(kind: Parametrisation, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a denoiser should give for the sample `x0` with the noise `eps`."""
    if kind == "eps":
        return eps
    if kind == "x0":
        return x0
    if kind == "v":
        return alpha * eps - sigma * x0
    if kind == "flow":
        return eps - x0
    raise unknown("parametrisation", kind, get_args(Parametrisation))


def converted(
    output: Tensor, of: Parametrisation, to: Parametrisation, x: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """An output of one parametrisation in another, so that networks of both can be compared."""
    return output if of == to else target(to, *clean(of, output, x, alpha, sigma), alpha, sigma)


def min_snr_weights(kind: Parametrisation, alpha: Tensor, sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """Weights of the squared error of an output by which the errors of clean samples count min(SNR, gamma), whatever
    the parametrisation (arXiv 2303.09556): x0 min(S, g), eps min(S, g) / S, v min(S, g) / (S + 1), flow
    min(S, g) s^2.

    The error of x0 is s/a times that of eps, and s times that of v and of flow; s^2 = 1 / (S + 1) where variance is
    preserved.
    """
    snr = (alpha / sigma).square()
    weight = snr.clamp(max=gamma)
    if kind == "eps":
        return torch.where(snr > 0, weight / snr.clamp_min(1e-30), torch.ones_like(snr))
    if kind in ("v", "flow"):
        return weight * sigma.square()
    if kind == "x0":
        return weight
    raise unknown("parametrisation", kind, get_args(Parametrisation))


def denoising_loss(
    kind: Parametrisation,
    output: Tensor,
    x0: Tensor,
    eps: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    gamma: float | None = None,
) -> Tensor:
    """Mean squared error of a denoiser's output, with min-SNR weights where `gamma` is given: a scalar."""
    error = (output - target(kind, x0, eps, alpha, sigma)).square()
    return error.mean() if gamma is None else (min_snr_weights(kind, alpha, sigma, gamma) * error).mean()


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): u + scale (c - u)."""
    return unconditional + scale * (conditional - unconditional)


# ---- samplers ------------------------------------------------------------------------------------------------------


def sampling_steps(total: int, count: int, spacing: Spacing = "trailing", offset: int = 0) -> list[int]:
    """The steps at which a sampler asks its denoiser, falling.

    Args:
        total: T of the schedule.
        count: how many.
        spacing: `trailing`: T - 1, then every T / count; `leading`: multiples of T // count, plus `offset`;
            `linspace`: from 0 to T - 1 evenly; `consistency`: of 50 steps a latent consistency model was distilled at,
            evenly.
        offset: of `leading`.

    Raises:
        UserError: fewer than one step, or more than there are.
    """
    highest = 50 if spacing == "consistency" else total
    if not 1 <= count <= highest:
        raise UserError(f"A sampler of a schedule of {total} steps takes 1 to {highest} of them; given: {count}.")
    if spacing == "trailing":
        return [round(total - i * total / count) - 1 for i in range(count)]
    if spacing == "leading":
        return [i * (total // count) + offset for i in reversed(range(count))]
    if spacing == "linspace":
        if count == 1:
            return [0]
        return [round(i * (total - 1) / (count - 1)) for i in reversed(range(count))]
    if spacing == "consistency":
        learned = [(i + 1) * (total // 50) - 1 for i in range(50)][::-1]
        return [learned[math.floor(i * 50 / count)] for i in range(count)]
    raise unknown("spacing of steps", spacing, get_args(Spacing))


class Stepped(NamedTuple):
    """After a step of a sampler: the next sample with noise, and the clean one that the network sees now."""

    x: Tensor
    x0: Tensor


class Sampler:
    """Takes samples from noise to none, step by step.

    A sample's noise is either that of its schedule (`preserving`) or scaled up so that x = x0 + sigma eps (`scaled`,
    of the Euler samplers): two samplers can continue one another only where they agree in this.

    Args:
        name: `ddim`: as the output says, without new noise (for a flow, Euler's steps); `renoise`: with a share of
            the noise drawn newly, eta eps + sqrt(1 - eta^2) xi; `lcm`: of latent consistency models, all noise newly;
            `euler` and `euler_ancestral` with scaled noise.
        schedule: of the network.
        kind: what the network's output is.
        steps: falling, as `sampling_steps` gives them.
        eta: of `renoise`, the share of noise that stays.
        sigmas: of the Euler samplers: the levels, one more than steps, 0 at the end; default: of the steps.
        to_first: end with the noise of the schedule's first step, as the settings of Stable Diffusion's DDIM have it,
            not with none.

    Raises:
        UserError: an unknown name, steps that do not fall, or options that do not go together.
    """

    def __init__(
        self,
        name: SamplerName,
        schedule: Schedule,
        kind: Parametrisation,
        steps: Sequence[int],
        *,
        eta: float = 1.0,
        sigmas: Sequence[float] | None = None,
        to_first: bool = False,
    ) -> None:
        if name not in get_args(SamplerName):
            raise unknown("sampler", name, get_args(SamplerName))
        if not steps or any(a <= b for a, b in itertools.pairwise(steps)):
            raise UserError(f"A sampler's steps fall; given: {list(steps)}.")
        if not 0 <= steps[-1] <= steps[0] < schedule.steps:
            raise UserError(f"A sampler's steps lie in 0 to {schedule.steps - 1}; given: {list(steps)}.")
        if not 0 <= eta <= 1:
            raise UserError(f"eta, the share of noise that stays, lies in 0 to 1; given: {eta}.")
        self.name, self.schedule, self.kind, self.steps, self.eta = name, schedule, kind, list(steps), eta
        self.scaled, self.to_first = name.startswith("euler"), to_first
        if self.scaled and (schedule.straight or kind == "flow"):
            raise UserError("The Euler samplers are for variance-preserving schedules; of a flow, take ddim.")
        own = [float(schedule.sigma[t] / schedule.alpha[t]) for t in steps] if self.scaled and sigmas is None else []
        self.sigmas = [*own, 0.0] if sigmas is None else list(sigmas)

    def __len__(self) -> int:
        return len(self.steps)

    def start(self, noise: Tensor) -> Tensor:
        """The first sample, of standard normal noise."""
        return noise * self.sigmas[0] if self.scaled else noise

    def draws(self, i: int) -> bool:
        """Whether step i needs noise."""
        last = i + 1 == len(self)
        if self.name == "euler_ancestral":
            return True
        return not last and (self.name == "lcm" or (self.name == "renoise" and self.eta < 1))

    def seen(self, x: Tensor, i: int) -> Tensor:
        """What the network is given at step i."""
        return x / math.sqrt(self.sigmas[i] ** 2 + 1) if self.scaled else x

    def at(self, i: int, x: Tensor) -> Tensor:
        """(B,) the step of the schedule."""
        return torch.full((len(x),), self.steps[i], device=x.device)

    def step(self, output: Tensor, i: int, x: Tensor, noise: Tensor | None = None) -> Stepped:
        """One step.

        Args:
            output: (B, ...) of the network for `seen(x, i)`.
            i: the number of the step, from 0.
            x: (B, ...) the sample.
            noise: (B, ...) standard normal, where `draws(i)`.
        """
        if self.scaled:
            return self._euler(output, i, x, noise)
        t = self.at(i, x)
        alpha, sigma = self.schedule.at(t, x)
        x0, eps = clean(self.kind, output, x, alpha, sigma)
        if self.name == "lcm":
            at = 10.0 * self.steps[i]
            skip, out = 0.25 / (at**2 + 0.25), at / math.sqrt(at**2 + 0.25)
            x0 = out * x0 + skip * x
        if i + 1 == len(self):
            return Stepped(self.schedule.add_noise(x0, eps, torch.zeros_like(t)) if self.to_first else x0, x0)
        if self.name == "lcm":
            eps = _given(noise, i)
        elif self.draws(i):
            eps = self.eta * eps + math.sqrt(1 - self.eta**2) * _given(noise, i)
        return Stepped(self.schedule.add_noise(x0, eps, self.at(i + 1, x)), x0)

    def _euler(self, output: Tensor, i: int, x: Tensor, noise: Tensor | None) -> Stepped:
        now, then = self.sigmas[i], self.sigmas[i + 1]
        if self.kind == "eps":
            x0 = x - now * output
        else:
            root = math.sqrt(now**2 + 1)  # x / root has the schedule's noise: a = 1 / root, s = now / root
            level = [torch.tensor(v, dtype=x.dtype, device=x.device) for v in (1 / root, now / root)]
            x0 = clean(self.kind, output, x / root, level[0], level[1]).x0
        direction = (x - x0) / now
        if self.name == "euler":
            return Stepped(x + direction * (then - now), x0)
        up = math.sqrt(then**2 * (now**2 - then**2) / now**2)
        down = math.sqrt(then**2 - up**2)
        return Stepped(x + direction * (down - now) + up * _given(noise, i), x0)


def _given(noise: Tensor | None, i: int) -> Tensor:
    if noise is None:
        raise UserError(f"Step {i} of this sampler needs noise.")
    return noise


def sample(
    denoise: Denoise,
    sampler: Sampler,
    x: Tensor,
    *,
    noise: Callable[[int], Tensor] | None = None,
    begin: int = 0,
    end: int | None = None,
    seen: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Steps `begin` to `end` of a sampler, without autograd.

    Args:
        denoise: the network with its condition.
        sampler: how.
        x: (B, ...) the sample at step `begin`: `sampler.start(noise)` for the first.
        noise: step -> standard normal noise, where the sampler draws; default: torch's generator.
        end: the step not taken any more; default: all are.
        seen: called with each step and its clean sample.

    Returns:
        The sample after the last step taken.
    """
    with torch.no_grad():
        for i in range(begin, len(sampler) if end is None else end):
            output = denoise(sampler.seen(x, i), sampler.at(i, x))
            fresh = None
            if sampler.draws(i):
                fresh = torch.randn_like(x) if noise is None else noise(i)
            x, x0 = sampler.step(output, i, x, fresh)
            if seen is not None:
                seen(i, x0)
    return x

"""A small hierarchical VAE, trained on the spot, and three ways to make it an augmentor (as in the VDVAE package of
HARD's first author).

Standard deviations are elu(r) + 1 throughout, in the divergence too. Pixels follow a mixture of logistics (Salimans et
al., arXiv 1701.05517), here with independent channels within a component.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.signals import Batch
from stillhouse.training.module import TrainingModule

FLOOR = 1e-3
Edit = Literal["posterior", "latent", "finetune"]


def spread(r: Tensor) -> Tensor:
    """elu(r) + 1, held above a floor: a standard deviation that is 1 at 0 and grows only linearly."""
    return F.elu(r) + 1 + FLOOR


def gaussian_kl(m_q: Tensor, s_q: Tensor, m_p: Tensor, s_p: Tensor) -> Tensor:
    """KL(N(m_q, s_q^2) || N(m_p, s_p^2)) of every entry."""
    return torch.log(s_p / s_q) + (s_q.square() + (m_q - m_p).square()) / (2 * s_p.square()) - 0.5


def pixel_nll(pixels: Tensor, weights: Tensor, means: Tensor, scales: Tensor) -> Tensor:
    """Negative log-likelihood of 256 grey levels under a mixture of logistics, in nats, per sample.

    Args:
        pixels: (B, C, H, W) in [-1, 1].
        weights: (B, M, H, W) logits of the components.
        means, scales: (B, M, C, H, W).
    """
    x, half = pixels[:, None], 1 / 255
    above, below = (x - means + half) / scales, (x - means - half) / scales
    inside = (torch.sigmoid(above) - torch.sigmoid(below)).clamp_min(1e-12).log()
    log_p = torch.where(x < -1 + half, F.logsigmoid(above), torch.where(x > 1 - half, F.logsigmoid(-below), inside))
    return -torch.logsumexp(log_p.sum(2) + F.log_softmax(weights, 1), 1).sum((1, 2))


def draw_pixels(weights: Tensor, means: Tensor, scales: Tensor) -> Tensor:
    """A differentiable draw from the mixture: a soft Gumbel-softmax over components (tau 1), logistic noise, clamped to
    [-1, 1]. -> (B, C, H, W)."""
    share = F.gumbel_softmax(weights, tau=1.0, hard=False, dim=1)[:, :, None]
    uniform = torch.rand_like(means[:, 0]).clamp(1e-5, 1 - 1e-5)
    return ((share * means).sum(1) + (share * scales).sum(1) * torch.logit(uniform)).clamp(-1, 1)


class Block(nn.Module):
    """One latent of the top-down path: a prior from above, a posterior from above and the image."""

    def __init__(self, width: int, latent: int) -> None:
        super().__init__()
        self.prior = nn.Sequential(nn.GELU(), nn.Conv2d(width, 2 * latent + width, 3, padding=1))
        self.posterior = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, 2 * latent, 1)
        )
        self.spell = nn.Sequential(nn.Conv2d(latent, width, 1))
        self.after = nn.Sequential(nn.GELU(), nn.Conv2d(width, width, 3, padding=1))
        self.latent = latent


class VAE(nn.Module):
    """Levels of halved resolution, a latent block at each (coarsest first), and a mixture of logistics for every pixel.

    Args:
        input_shape: (C, H, W).
        mean, std: (C,) of the normalisation of the images it will be given.
        width: channels.
        latent: channels of each latent.
        levels: resolutions.
        components: of the pixels' mixture.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        input_shape: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        width: int = 32,
        latent: int = 4,
        levels: int = 3,
        components: int = 10,
    ) -> None:
        super().__init__()
        channels, height, breadth = input_shape
        if min(height, breadth) % 2 ** (levels - 1):
            raise UserError(
                f"vae.levels: {levels} levels halve the image {levels - 1} times, but it is {height} x {breadth} "
                "pixels."
            )
        self.shape, self.components = tuple(input_shape), components
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.encoder = nn.ModuleList(
            nn.Sequential(nn.GELU(), nn.Conv2d(width, width, 3, 1 if i == 0 else 2, 1)) for i in range(levels)
        )
        self.start = nn.Parameter(torch.zeros(width, height >> (levels - 1), breadth >> (levels - 1)))
        self.latent = latent
        self.blocks = nn.ModuleList(Block(width, latent) for _ in range(levels))
        last = nn.Conv2d(width, components * (1 + 2 * channels), 3, padding=1)
        self.head = nn.Sequential(nn.GELU(), last)
        assert last.bias is not None
        nn.init.uniform_(last.bias, -1.0, 1.0)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Normalised images to [-1, 1]."""
        return 2 * (images * self.std + self.mean) - 1

    def to_images(self, pixels: Tensor) -> Tensor:
        """[-1, 1] to normalised images."""
        return ((pixels + 1) / 2 - self.mean) / self.std

    def encode(self, images: Tensor) -> list[Tensor]:
        """Features of the image, coarsest level first."""
        h, found = self.stem(self.to_pixels(images)), []
        for layer in self.encoder:
            h = layer(h)
            found.append(h)
        return found[::-1]

    def decode(
        self, features: list[Tensor], edit: _Edit | None = None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        """The mixture (see `pixel_nll`), the divergence from the prior (B,), and the penalty of the edit."""
        h = self.start.expand(len(features[0]), -1, -1, -1)
        divergence = features[0].new_zeros(len(features[0]))
        penalty = features[0].new_zeros(())
        for level, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if level:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            m_p, r_p, more = block.prior(h).split([block.latent, block.latent, h.shape[1]], 1)
            m_q, r_q = block.posterior(torch.cat([h, features[level]], 1)).chunk(2, 1)
            s_p, s_q = spread(r_p), spread(r_q)
            divergence = divergence + gaussian_kl(m_q, s_q, m_p, s_p).flatten(1).sum(1)
            if edit is None:
                z = m_q + s_q * torch.randn_like(m_q)
            else:
                z, cost = edit.draw(level, m_q, r_q, m_p, s_p)
                penalty = penalty + cost
            h = h + more + block.spell(z)
            h = h + block.after(h)
        out = self.head(h)
        m, c = self.components, self.shape[0]
        weights, means, scales = out.split([m, m * c, m * c], 1)
        return (weights, means.unflatten(1, (m, c)), spread(scales.unflatten(1, (m, c)))), divergence, penalty

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """`pixels` and `divergence`, both in nats per dimension, batch means."""
        mixture, divergence, _ = self.decode(self.encode(images))
        size = images[0].numel()
        return {
            "pixels": pixel_nll(self.to_pixels(images), *mixture).mean() / size,
            "divergence": divergence.mean() / size,
        }


class _Edit:
    """What an augmentor does with the latent of a level."""

    def draw(self, level: int, m_q: Tensor, r_q: Tensor, m_p: Tensor, s_p: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class VAEAugmentor(nn.Module, _Edit):
    """HARD-VAE: images from edited latents of their own posterior.

    Args:
        vae: trained; frozen here, except for `finetune`.
        edit: `posterior`: (m, r) of levels start ... end - 1 pass through a learned map before the draw, levels before
            keep theirs, levels from `end` on are drawn from the prior. `latent`: the drawn z passes through a learned
                map, with a penalty that keeps it likely under the posterior.
            `finetune`: all weights of the VAE are learned.
        start, end: levels, coarsest first; end None: all.
        edited: latent: share of the batch that is edited.
        penalty: latent: its weight.
    """

    def __init__(
        self,
        vae: VAE,
        edit: Edit = "posterior",
        start: int = 0,
        end: int | None = None,
        edited: float = 1.0,
        penalty: float = 1e-3,
    ) -> None:
        super().__init__()
        self.vae, self.edit, self.start, self.end = vae, edit, start, len(vae.blocks) if end is None else end
        self.edited, self.penalty = edited, penalty
        vae.requires_grad_(edit == "finetune")
        width = {"posterior": 2, "latent": 1, "finetune": 0}[edit] * vae.latent
        maps = [nn.Conv2d(width, width, 1) for _ in range(self.start, self.end) if width]
        for layer in maps:
            assert layer.bias is not None
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.maps = nn.ModuleList(maps)

    def draw(self, level: int, m_q: Tensor, r_q: Tensor, m_p: Tensor, s_p: Tensor) -> tuple[Tensor, Tensor]:
        noise, nothing = torch.randn_like(m_q), m_q.new_zeros(())
        if level >= self.end:
            return m_p + s_p * noise, nothing
        if self.edit == "finetune" or level < self.start:
            return m_q + spread(r_q) * noise, nothing
        layer = self.maps[level - self.start]
        if self.edit == "posterior":
            m, r = layer(torch.cat([m_q, r_q], 1)).chunk(2, 1)
            return m + spread(r) * noise, nothing
        s = spread(r_q)
        z = m_q + s * noise
        chosen = (torch.arange(len(z), device=z.device) < self.edited * len(z))[:, None, None, None]
        moved = torch.where(chosen, layer(z), z)
        cost = ((moved - m_q).square() - (z - m_q).square()) / s
        return moved, self.penalty * cost.flatten(1).sum(1).mean()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mixture, _, penalty = self.vae.decode(self.vae.encode(images), self)
        return self.vae.to_images(draw_pixels(*mixture)), penalty


class VAEFit(TrainingModule):
    """Training of a VAE on images, for `run.fit`."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.student = vae

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        terms = self.student(batch["input"])
        return {**terms, "loss": terms["pixels"] + terms["divergence"]}

"""A tokenizer of images: features of patches or of a small convolutional encoder, as codes of one codebook, at one
scale or as residuals from coarse to fine (VAR, Tian et al., arXiv 2404.02905)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError


class TokenizerSpec(Spec):
    """How images become tokens, and how that is learned first."""

    codes: int = Field(64, ge=2, description="V, tokens of the vocabulary.")
    patch: int = Field(2, ge=1, description="Pixels a side that become channels before anything else.")
    widths: list[int] = Field(
        default_factory=list,
        description="Channels of the convolutional encoder, each of which halves the sides; [] has none, so that codes "
        "are the means of patches (k-means).",
    )
    channels: int | None = Field(None, ge=1, description="Of a code; default: those of a patch. Others need `widths`.")
    scales: list[int] | None = Field(
        None,
        description="Sides of the grids of tokens from coarse to fine, predicted a grid at a time (VAR); default: the "
        "finest alone, predicted token by token.",
    )
    steps: int = Field(300, ge=1, description="Training steps.")
    batch_size: int = Field(128, ge=1, description="Images of a step.")
    lr: float = Field(1e-3, gt=0, description="Of Adam, for the convolutions; codes are running means.")
    decay: float = Field(0.95, gt=0, lt=1, description="Of the codes' running means.")
    commitment: float = Field(0.25, ge=0, description="Weight of the distance of features to their codes.")

    @model_validator(mode="after")
    def _fits(self) -> TokenizerSpec:
        if self.channels is not None and not self.widths:
            raise ValueError("channels is of an encoder: without `widths`, a code has the channels of a patch")
        if self.scales is not None and (
            not self.scales or sorted(set(self.scales)) != self.scales or self.scales[0] < 1
        ):
            raise ValueError("scales are sides of grids, each larger than the one before")
        return self


class Residual(nn.Module):
    """Two convolutions with group norm, and a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        groups = next(g for g in (8, 4, 2, 1) if width % g == 0)
        self.body = nn.Sequential(
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ImageTokenizer(nn.Module):
    """Images (B, C, H, W) to codes (B, L) and back.

    Args:
        spec: see `TokenizerSpec`.
        shape: (C, H, W) of the images.

    Raises:
        UserError: images that patches and halvings do not divide, or scales that do not end at the grid's side.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, spec: TokenizerSpec, shape: Sequence[int]) -> None:
        super().__init__()
        channels, height, width = shape
        factor = spec.patch * 2 ** len(spec.widths)
        if height % factor or width % factor or height != width:
            raise UserError(
                f"tokenizer: images must be square with a side that {factor} divides (patch times 2 for each of "
                f"`widths`); given: {height} x {width}."
            )
        self.side = height // factor
        self.scales = list(spec.scales or [self.side])
        if self.scales[-1] != self.side:
            raise UserError(f"tokenizer.scales end at the side of the grid, {self.side}; given: {self.scales}.")
        inner = channels * spec.patch**2
        self.channels = spec.channels or (spec.widths[-1] if spec.widths else inner)
        self.encoder, self.decoder = _convolutions(inner, spec.widths, self.channels)
        self.patch = spec.patch
        # of residuals, what a coarse grid adds is smoothed by a convolution, as in VAR
        several = len(self.scales) > 1 and spec.widths
        self.smooth = nn.Conv2d(self.channels, self.channels, 3, padding=1) if several else None
        self.register_buffer("codebook", torch.randn(spec.codes, self.channels))
        self.register_buffer("counts", torch.zeros(spec.codes))
        self.register_buffer("sums", torch.zeros(spec.codes, self.channels))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each scale."""
        return [side * side for side in self.scales]

    @property
    def length(self) -> int:
        """L, tokens of an image."""
        return sum(self.lengths)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D, side, side)."""
        found: Tensor = self.encoder(F.pixel_unshuffle(x, self.patch))
        return found

    def image(self, features: Tensor) -> Tensor:
        """(B, D, side, side) to (B, C, H, W)."""
        return F.pixel_shuffle(self.decoder(features), self.patch)

    def nearest(self, rows: Tensor) -> Tensor:
        """(n, D) to the index of the nearest code, (n,)."""
        return (self.codebook.square().sum(1) - 2 * rows @ self.codebook.t()).argmin(1)

    def enlarged(self, codes: Tensor, scale: int) -> Tensor:
        """What the codes (B, s * s) of a scale add to the features, (B, D, side, side)."""
        side = self.scales[scale]
        grid = self.codebook[codes].transpose(1, 2).unflatten(-1, (side, side))
        if side != self.side:
            grid = F.interpolate(grid, self.side, mode="bicubic")
        return grid if self.smooth is None else 0.5 * grid + 0.5 * self.smooth(grid)

    def quantised(self, features: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Features as codes: what the codes stand for (B, D, side, side), the codes (B, s * s) of each scale, and the
        rows (B * s * s, D) that they are nearest to."""
        rest, total = features, torch.zeros_like(features)
        codes, rows = [], []
        for i, side in enumerate(self.scales):
            small = rest if side == self.side else F.interpolate(rest, side, mode="area")
            rows.append(small.detach().flatten(2).transpose(1, 2).reshape(-1, self.channels))
            codes.append(self.nearest(rows[-1]).view(len(features), -1))
            added = self.enlarged(codes[-1], i)
            total, rest = total + added, rest - added
        return total, codes, rows

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to codes (B, L), scale by scale, each in row-major order."""
        return torch.cat(self.quantised(self.features(x))[1], 1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, L) to images (B, C, H, W)."""
        parts = codes.split(self.lengths, 1)
        return self.image(torch.stack([self.enlarged(c, i) for i, c in enumerate(parts)]).sum(0))

    def inputs_of_scales(self, codes: Tensor) -> list[Tensor]:
        """What is known before each scale but the first, at that scale's size: (B, s * s, D) each, from the codes
        (B, …) of the scales before, as far as they go."""
        total = torch.zeros(len(codes), self.channels, self.side, self.side, device=codes.device)
        found, start = [], 0
        for i, count in enumerate(self.lengths[:-1]):
            if codes.shape[1] < start + count:
                break
            total = total + self.enlarged(codes[:, start : start + count], i)
            start += count
            side = self.scales[i + 1]
            small = total if side == self.side else F.interpolate(total, side, mode="area")
            found.append(small.flatten(2).transpose(1, 2))
        return found

    # ---- training ----------------------------------------------------------------------------------------------------

    def loss(self, x: Tensor, commitment: float) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
        """`image`, the mean square error of images, and `commitment`, the weighted one of features; then the codes and
        the rows, for `follow`."""
        features = self.features(x)
        total, codes, rows = self.quantised(features)
        straight = features + (total - features).detach()
        if self.smooth is not None:  # which learns from the images too
            straight = straight + total - total.detach()
        terms = {"image": F.mse_loss(self.image(straight), x)}
        terms["commitment"] = commitment * F.mse_loss(features, total.detach())
        return terms, codes, rows

    @torch.no_grad()
    def follow(self, codes: Sequence[Tensor], rows: Sequence[Tensor], decay: float) -> None:
        """Move each code towards the mean of the rows that took it; one that hardly any row takes becomes a row drawn
        by torch's generator."""
        every, x = torch.cat([c.reshape(-1) for c in codes]), torch.cat(list(rows))
        chosen = F.one_hot(every, len(self.codebook)).to(x)
        self.counts.mul_(decay).add_(chosen.sum(0), alpha=1 - decay)
        self.sums.mul_(decay).add_(chosen.t() @ x, alpha=1 - decay)
        fresh = x[torch.randint(len(x), (len(self.codebook),), device=x.device)]
        unused = (self.counts < 0.01 * len(x) / len(self.codebook))[:, None]
        mean = self.sums / self.counts.clamp_min(1e-8)[:, None]
        self.codebook.copy_(torch.where(unused, fresh, mean))
        self.sums.copy_(torch.where(unused, fresh * len(x) / len(self.codebook), self.sums))
        self.counts.copy_(torch.where(unused[:, 0], len(x) / len(self.codebook), self.counts))


def _convolutions(inner: int, widths: Sequence[int], channels: int) -> tuple[nn.Module, nn.Module]:
    """An encoder from `inner` to `channels` with a halving a width, and its mirror."""
    if not widths:
        return nn.Identity(), nn.Identity()
    down: list[nn.Module] = [nn.Conv2d(inner, widths[0], 3, padding=1)]
    up: list[nn.Module] = [nn.Conv2d(widths[0], inner, 3, padding=1)]
    before = widths[0]
    for width in widths:
        down += [Residual(before), nn.Conv2d(before, width, 4, 2, 1)]
        up += [Residual(before), nn.ConvTranspose2d(width, before, 4, 2, 1)]
        before = width
    down += [Residual(before), nn.Conv2d(before, channels, 1)]
    up += [Residual(before), nn.Conv2d(channels, before, 1)]
    return nn.Sequential(*down), nn.Sequential(*up[::-1])

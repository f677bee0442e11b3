"""LightGen's generator: a masked autoencoder of continuous tokens whose decoder reads text by cross-attention, with a
diffusion head (Fluid and MAR in a small form)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError
from stillhouse.functional.masking import take_tokens
from stillhouse.methods.generation.lightgen.head import DiffusionHead
from stillhouse.nn.masked_vit import layer_norm


class NetworkSpec(Spec):
    """The generator's size."""

    patch: int = Field(4, ge=1, description="Pixels (or latents) a side of a token.")
    width: int = Field(64, ge=4, description="D.")
    encoder: int = Field(2, ge=0, description="Blocks of the encoder.")
    decoder: int = Field(2, ge=0, description="Blocks of the decoder.")
    cross: int = Field(2, ge=1, description="Blocks that read the text.")
    text: int = Field(1, ge=0, description="Blocks of the text's aligner.")
    heads: int = Field(4, ge=1, description="Attention heads; divide the width.")
    mlp_ratio: float = Field(4.0, gt=0, description="Width of perceptrons over D.")
    dropout: float = Field(0.1, ge=0, lt=1, description="In attention and projections.")
    head_width: int = Field(96, ge=4, description="Of the diffusion head.")
    head_depth: int = Field(2, ge=1, description="Its residual blocks.")
    repeat: int = Field(4, ge=1, description="Draws of step and noise for each token (diffusion_batch_mul).")
    least_masked: float = Field(0.7, ge=0, le=1, description="The smallest share of masked tokens.")


class SamplingSpec(Spec):
    """How images are drawn."""

    iterations: int = Field(8, ge=1, description="S: passes of the transformer.")
    steps: int = Field(20, ge=1, description="Of the diffusion head, for each token.")
    guidance: float = Field(2.0, ge=0, description="cfg; 1: none.")
    schedule: Literal["constant", "linear"] = Field("constant", description="Of the guidance over the iterations.")
    temperature: float = Field(1.0, ge=0, description="Factor of the head's noise.")


def patchify(latents: Tensor, patch: int) -> Tensor:
    """(B, c, H, W) to (B, N, c p^2): tokens row by row, each channel by channel.

    Raises:
        UserError: sides that the patch does not divide.
    """
    b, c, height, width = latents.shape
    if height % patch or width % patch:
        raise UserError(f"Tokens of {patch} do not divide latents of {height} x {width}; choose a divisor of both.")
    parts = latents.view(b, c, height // patch, patch, width // patch, patch)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch**2)


def unpatchify(tokens: Tensor, patch: int, channels: int) -> Tensor:
    """The inverse, for a square grid."""
    side = math.isqrt(tokens.shape[1])
    parts = tokens.view(len(tokens), side, side, channels, patch, patch)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), channels, side * patch, side * patch)


def mask_of(orders: Tensor, count: int) -> Tensor:
    """(B, N) 1 at the first `count` places of orders (B, N), which are masked, and 0 elsewhere."""
    return torch.zeros(orders.shape, device=orders.device).scatter_(1, orders[:, :count], 1.0)


def masked_count(length: int, ratio: float) -> int:
    """ceil(N r)."""
    return math.ceil(length * ratio)


def drawn_ratio(least: float) -> float:
    """A masking ratio from a normal of mean 1 and deviation 0.25, cut to [least, 1]; by torch's generator."""
    if least >= 1:
        return 1.0
    return float(nn.init.trunc_normal_(torch.empty(1), 1.0, 0.25, least, 1.0))


def remaining(length: int, iteration: int, iterations: int, masked: int) -> int:
    """How many of N tokens stay masked after an iteration: floor(N cos(pi/2 (s + 1) / S)), at least 1 and fewer than
    are masked now."""
    wanted = math.floor(length * math.cos(math.pi / 2 * (iteration + 1) / iterations))
    return max(1, min(masked - 1, wanted))


def guidance_at(spec: SamplingSpec, length: int, left: int) -> float:
    """cfg of an iteration after which so many tokens stay masked."""
    if spec.schedule == "constant":
        return spec.guidance
    return 1 + (spec.guidance - 1) * (length - left) / length


class TextAligner(nn.Module):
    """Features of a frozen text encoder, (B, M, Dt) to (B, M, D)."""

    def __init__(self, inputs: int, width: int, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(inputs, width), nn.Linear(width, width)
        self.blocks, self.norm = blocks, layer_norm(width)

    def forward(self, text: Tensor) -> Tensor:
        x = self.linear2(F.gelu(self.linear1(text), approximate="tanh"))
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.norm(x)
        return found


class CrossAttention(nn.Module):
    """Image tokens (B, N, D) ask text tokens (B, M, D)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.proj(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)


class CrossBlock(nn.Module):
    """q~ = LN(q); y = q~ + CA(q~, LN(text)); y + MLP(LN(y)): the residual begins at the normalised q."""

    def __init__(self, width: int, heads: int, ratio: float, dropout: float) -> None:
        super().__init__()
        self.norm_query, self.norm_text, self.norm = (layer_norm(width) for _ in range(3))
        self.attention = CrossAttention(width, heads, dropout)
        inner = int(width * ratio)
        self.fc1, self.fc2, self.dropout = nn.Linear(width, inner), nn.Linear(inner, width), dropout

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.norm_query(x)
        x = x + self.attention(x, self.norm_text(text))
        hidden = F.dropout(F.gelu(self.fc1(self.norm(x))), self.dropout, self.training)
        return x + F.dropout(self.fc2(hidden), self.dropout, self.training)


class Draws(NamedTuple):
    """What a training step draws for B images of N tokens, each `repeat` times.

    Attributes:
        mask: (B, N), 1 where masked.
        t: (repeat * B * N,) steps of the head.
        noise: (repeat * B * N, c p^2).
    """

    mask: Tensor
    t: Tensor
    noise: Tensor


class MaskedGenerator(nn.Module):
    """Draws images of texts.

    Args:
        spec: its size.
        channels, side: of the latents, c and H = W.
        text_width: Dt.

    Raises:
        UserError: heads or patches that do not divide.
    """

    def __init__(self, spec: NetworkSpec, channels: int, side: int, text_width: int) -> None:
        super().__init__()
        width, heads = spec.width, spec.heads
        if width % heads:
            raise UserError(f"network.heads: {heads} heads do not divide the width {width}.")
        if side % spec.patch:
            raise UserError(f"network.patch: tokens of {spec.patch} do not divide latents of {side} x {side}.")
        self.spec, self.channels, self.side, self.text_width = spec, channels, side, text_width
        self.length = (side // spec.patch) ** 2
        numbers = channels * spec.patch**2

        def blocks(depth: int) -> nn.ModuleList:
            options: dict[str, Any] = {
                "qkv_bias": True,
                "norm_layer": layer_norm,
                "proj_drop": spec.dropout,
                "attn_drop": spec.dropout,
            }
            return nn.ModuleList(Block(width, heads, spec.mlp_ratio, **options) for _ in range(depth))

        def positions() -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(1, self.length, width))

        self.text = TextAligner(text_width, width, blocks(spec.text))
        self.no_text = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.enter, self.enter_norm = nn.Linear(numbers, width), layer_norm(width)
        self.encoder_positions, self.decoder_positions, self.cross_positions = positions(), positions(), positions()
        self.encoder_blocks, self.encoder_norm = blocks(spec.encoder), layer_norm(width)
        self.decoder_embed, self.mask_token = nn.Linear(width, width), nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.decoder_blocks, self.decoder_norm = blocks(spec.decoder), layer_norm(width)
        self.cross_embed = nn.Linear(width, width)
        cross = (CrossBlock(width, heads, spec.mlp_ratio, spec.dropout) for _ in range(spec.cross))
        self.cross_blocks, self.cross_norm = nn.ModuleList(cross), layer_norm(width)
        self.head = DiffusionHead(numbers, width, spec.head_width, spec.head_depth)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("head."):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def positions(self, table: Tensor, count: int) -> Tensor:
        """Positions (1, N, D) of a grid of so many tokens: the table, or where its size differs, that interpolated."""
        if table.shape[1] == count:
            return table
        own, side = math.isqrt(table.shape[1]), math.isqrt(count)
        grid = table.transpose(1, 2).unflatten(-1, (own, own))
        scale = (side + 0.1) / own
        return F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic").flatten(2).transpose(1, 2)

    def condition(self, text: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Text features (B, M, Dt) to (B, M, D); of dropped samples (B,) bool, the vector of no text at all places."""
        if text.shape[-1] != self.text_width:
            raise UserError(f"The text has features of {text.shape[-1]}, but the generator reads {self.text_width}.")
        found: Tensor = self.text(text)
        return found if dropped is None else torch.where(dropped[:, None, None], self.no_text, found)

    def vectors(self, tokens: Tensor, mask: Tensor, condition: Tensor, masked: int) -> Tensor:
        """z (B, N, D) of all places, from the tokens (B, N, c p^2) whose mask (B, N) is 0 and text (B, M, D).

        Args:
            masked: tokens masked in each sample; all of them leaves the encoder nothing to read.
        """
        count = tokens.shape[1]
        order = mask.argsort(dim=1, stable=True)  # visible first, row by row
        visible, hidden = order[:, : count - masked], order[:, count - masked :]
        x = take_tokens(self.enter_norm(self.enter(tokens) + self.positions(self.encoder_positions, count)), visible)
        if masked < count:
            for block in self.encoder_blocks:
                x = block(x)
        x = self.decoder_embed(self.encoder_norm(x))
        filler = self.mask_token.to(x.dtype).expand(len(x), masked, -1)
        back = torch.cat([visible, hidden], 1).argsort(1)
        x = take_tokens(torch.cat([x, filler], 1), back) + self.positions(self.decoder_positions, count)
        for block in self.decoder_blocks:
            x = block(x)
        x = self.cross_embed(self.decoder_norm(x)) + self.positions(self.cross_positions, count)
        for block in self.cross_blocks:
            x = block(x, condition)
        found: Tensor = self.cross_norm(x)
        return found

    def draws(self, like: Tensor, ratio: float) -> tuple[Draws, int]:
        """Mask, steps and noise for tokens (B, N, c p^2), and how many of N are masked; by torch's generator."""
        b, n, numbers = like.shape
        masked = masked_count(n, ratio)
        orders = torch.rand(b, n, device=like.device).argsort(1)
        t = torch.randint(len(self.head.table[0]), (self.spec.repeat * b * n,), device=like.device)
        noise = torch.randn(self.spec.repeat * b * n, numbers, device=like.device)
        return Draws(mask_of(orders, masked), t, noise), masked

    def loss(self, latents: Tensor, condition: Tensor, draws: Draws, masked: int) -> Tensor:
        """The head's loss over masked tokens: a scalar."""
        tokens = patchify(latents, self.spec.patch)
        z = self.vectors(tokens, draws.mask, condition, masked)
        times = len(draws.t) // (tokens.shape[0] * tokens.shape[1])
        x, z = (v.flatten(0, 1).repeat(times, 1) for v in (tokens, z))
        return self.head.loss(x, z, draws.mask.flatten().repeat(times), draws.t, draws.noise)

    def noise_error(self, latents: Tensor, condition: Tensor, draws: Draws, masked: int) -> Tensor:
        """(B,) square error of the predicted noise over masked tokens and their numbers, without the bound."""
        tokens = patchify(latents, self.spec.patch)
        z = self.vectors(tokens, draws.mask, condition, masked)
        times = len(draws.t) // (tokens.shape[0] * tokens.shape[1])
        x, z = (v.flatten(0, 1).repeat(times, 1) for v in (tokens, z))
        at = self.head.table[:, draws.t]
        noisy = at[0][:, None] * x + at[1][:, None] * draws.noise
        eps = self.head(noisy, draws.t, z)[:, : self.head.channels].float()
        error = (draws.noise - eps).square().mean(-1).view(times, *draws.mask.shape)
        return (error * draws.mask).sum((0, 2)) / (times * draws.mask.sum(1)).clamp_min(1)

    @torch.no_grad()
    def sample(self, text: Tensor, orders: Tensor, spec: SamplingSpec, normal: Callable[..., Tensor]) -> Tensor:
        """Latents (B, c, H, W) of texts (B, M, Dt).

        Args:
            orders: (B, N) permutations; what stands last is drawn first.
            normal: shape -> standard normal numbers, on the texts' device.
        """
        count, b = orders.shape[1], len(text)
        tokens = torch.zeros(b, count, self.head.channels, device=text.device)
        condition, masked = self.condition(text), count
        both = torch.cat([condition, self.no_text.expand_as(condition)])
        for iteration in range(spec.iterations):
            left = 0 if iteration + 1 == spec.iterations else remaining(count, iteration, spec.iterations, masked)
            guidance = guidance_at(spec, count, max(left, 1))
            mask = mask_of(orders, masked)
            places = orders[:, left:masked]
            if guidance == 1:
                z = take_tokens(self.vectors(tokens, mask, condition, masked), places)
            else:
                twice = torch.cat([tokens, tokens]), torch.cat([mask, mask]), both
                z = take_tokens(self.vectors(*twice, masked), torch.cat([places, places]))
            z = z.flatten(0, 1)
            numbers = (b * places.shape[1], self.head.channels)

            def again(i: int, rows: int = len(z)) -> Tensor:
                return normal(rows, self.head.channels)

            drawn = self.head.sample(z, normal(*numbers), again, spec.steps, spec.temperature, guidance)
            drawn = drawn[: numbers[0]].view(b, -1, self.head.channels)
            tokens = tokens.scatter(1, places[..., None].expand_as(drawn), drawn)
            masked = left
            if not left:
                break
        return unpatchify(tokens, self.spec.patch, self.channels)

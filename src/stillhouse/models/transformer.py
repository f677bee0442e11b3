"""A small vision transformer (Dosovitskiy et al., arXiv 2010.11929) and an MLP-Mixer (Tolstikhin et al., arXiv
2105.01601) for any image size.

Blocks are `blocks.0` …, each with `attn` or `tokens`, then `mlp`; stages are four blocks evenly over the depth; the
classifier is `head`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.models.anatomy import quarters
from stillhouse.models.registry import register


class FeedForward(nn.Sequential):
    """Linear, GELU, linear, on the last dimension."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class Attention(nn.Module):
    """Multi-head self-attention, (B, L, D) to (B, L, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and feed-forward with residuals."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MixerBlock(nn.Module):
    """Feed-forward over the tokens (inner width D / 2), then over the channels (4 D), both pre-norm with residuals."""

    def __init__(self, dim: int, length: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.tokens = FeedForward(length, dim // 2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    """Square patches of an image, each mapped to D channels: (B, C, H, W) to (B, L, D)."""

    def __init__(self, patch: int, dim: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        channels, height, width = input_shape
        if patch < 1 or height % patch or width % patch:
            raise UserError(
                f"options.patch: patches of {patch} px do not divide an image of {height} x {width}; choose a divisor "
                "of both."
            )
        self.proj = nn.Conv2d(channels, dim, patch, patch)
        self.length = (height // patch) * (width // patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


@register({"vit": {}})
class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, pre-norm blocks, `norm`, and `head` on the class token. The defaults
    are the size of ViT-Tiny.

    Args:
        patch: side of a patch in pixels; divides the image.
        dim: channels of a token.
        depth: blocks.
        heads: attention heads; divide `dim`.
        num_classes: C.
        input_shape: (channels, height, width).
    """

    def __init__(
        self,
        patch: int = 4,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        num_classes: int = 10,
        input_shape: tuple[int, ...] = (3, 32, 32),
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise UserError(f"options.heads: {heads} heads do not divide options.dim {dim}.")
        self.patch_embed = Patches(patch, dim, input_shape)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.length, dim))
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        self.stage_names = [f"blocks.{i}" for i in quarters(depth)]
        _initialise(self)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, classes) logits."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


@register({"mixer": {}})
class Mixer(nn.Module):
    """Patches, mixer blocks, `norm`, mean over tokens, `head`.

    Args:
        patch: side of a patch in pixels; divides the image.
        dim: channels of a token.
        depth: blocks.
        num_classes: C.
        input_shape: (channels, height, width).
    """

    def __init__(
        self,
        patch: int = 4,
        dim: int = 192,
        depth: int = 8,
        num_classes: int = 10,
        input_shape: tuple[int, ...] = (3, 32, 32),
    ) -> None:
        super().__init__()
        self.patch_embed = Patches(patch, dim, input_shape)
        self.blocks = nn.Sequential(*(MixerBlock(dim, self.patch_embed.length) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        self.stage_names = [f"blocks.{i}" for i in quarters(depth)]
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, classes) logits."""
        return self.head(self.norm(self.blocks(self.patch_embed(x))).mean(1))


def _initialise(model: nn.Module) -> None:
    """Linear layers to a truncated normal of deviation 0.02, biases to 0 (as DeiT); the patch projection stays at
    torch's default."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

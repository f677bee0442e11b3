"""ConViT, the hybrid encoder of ConvMAE (Gao et al., NeurIPS 2022, arXiv 2205.03892): two stages of masked
convolutions, then a ViT.

Stages are `stage1`, `stage2` and `blocks`; the classifier is `head`, on the mean of the tokens. It has no class token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.functional.masking import Masking, take_tokens
from stillhouse.models.anatomy import quarters
from stillhouse.models.registry import register
from stillhouse.nn.masked_vit import layer_norm, sincos_positions


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvBlock(nn.Module):
    """Residual 1x1, 5x5 depthwise and 1x1 convolutions, then a residual feed-forward; the depthwise one sees no hidden
    patch."""

    def __init__(self, width: int, mlp_ratio: float) -> None:
        super().__init__()
        inner = int(width * mlp_ratio)
        self.norm1 = ChannelNorm(width, eps=1e-6)
        self.conv1 = nn.Conv2d(width, width, 1)
        self.mix = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.norm2 = ChannelNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Conv2d(width, inner, 1), nn.GELU(), nn.Conv2d(inner, width, 1))

    def forward(self, x: Tensor, shown: Tensor | None = None) -> Tensor:
        """(B, C, H, W) maps; `shown` (B, 1, H, W) is 1 where a patch is visible."""
        h = self.conv1(self.norm1(x))
        x = x + self.conv2(self.mix(h if shown is None else h * shown))
        return x + self.mlp(self.norm2(x))


class Downsample(nn.Sequential):
    """A strided convolution, channel norm and GELU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, stride, stride), ChannelNorm(outputs, eps=1e-6), nn.GELU())


@register({"conv_vit": {}})
class ConvViT(nn.Module):
    """Convolutional stages with masks, whose maps are added to the tokens at the end; fixed sine-cosine positions; mean
    over tokens; `head`.

    Args:
        widths: channels of the three stages; 4 divides the last.
        depths: blocks of the three stages.
        heads: attention heads of the last stage.
        strides: of the three stages; their product is the side of a patch.
        mlp_ratios: inner over outer width of the feed-forwards, by stage.
        num_classes: C.
        input_shape: (channels, height, width).

    Raises:
        UserError: options that are not three numbers each, or patches that do not divide the image.
    """

    positions: Tensor

    def __init__(
        self,
        widths: Sequence[int] = (256, 384, 768),
        depths: Sequence[int] = (2, 2, 11),
        heads: int = 12,
        strides: Sequence[int] = (4, 2, 2),
        mlp_ratios: Sequence[float] = (4, 4, 4),
        num_classes: int = 10,
        input_shape: tuple[int, ...] = (3, 32, 32),
    ) -> None:
        super().__init__()
        for name, given in (("widths", widths), ("depths", depths), ("strides", strides), ("mlp_ratios", mlp_ratios)):
            if len(given) != 3:
                raise UserError(f"options.{name} takes one number for each of three stages; given: {list(given)}.")
        channels, height, width = input_shape
        self.patch, self.embed_dim = prod(strides), widths[2]
        if height % self.patch or width % self.patch:
            product = " x ".join(map(str, strides))
            raise UserError(f"options.strides: patches of {product} px do not divide an image of {height} x {width}.")
        self.grid = (height // self.patch, width // self.patch)
        self.scales = [prod(strides[i + 1 :]) for i in range(2)]  # of a token's side, over that of a stage's pixel
        sizes = list(pairwise([channels, *widths]))
        self.down1, self.down2, self.down3 = (Downsample(a, b, s) for (a, b), s in zip(sizes, strides))
        self.stage1 = nn.ModuleList(ConvBlock(widths[0], mlp_ratios[0]) for _ in range(depths[0]))
        self.stage2 = nn.ModuleList(ConvBlock(widths[1], mlp_ratios[1]) for _ in range(depths[1]))
        self.fuse1, self.fuse2 = (nn.Conv2d(w, widths[2], s, s) for w, s in zip(widths, self.scales))
        self.project = nn.Linear(widths[2], widths[2])
        self.register_buffer("positions", sincos_positions(widths[2], self.grid, prefix=0))
        options = {"qkv_bias": True, "norm_layer": layer_norm}
        self.blocks = nn.Sequential(*(Block(widths[2], heads, mlp_ratios[2], **options) for _ in range(depths[2])))
        self.norm = layer_norm(widths[2])
        self.head = nn.Linear(widths[2], num_classes)
        self.stage_names = [f"blocks.{i}" for i in quarters(depths[2])]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def encode(self, images: Tensor, masking: Masking | None = None) -> Tensor:
        """(B, K, D) normalised tokens of the visible patches, in the order of `ids_keep`, or of all.

        Args:
            images: (B, C, H, W).
            masking: hidden patches are 0 to the depthwise convolutions, and no tokens.
        """

        def shown(scale: int) -> Tensor | None:
            if masking is None:
                return None
            visible = (1 - masking.mask).view(-1, 1, *self.grid)
            return visible.repeat_interleave(scale, 2).repeat_interleave(scale, 3)

        def tokens(maps: Tensor) -> Tensor:
            flat = maps.flatten(2).transpose(1, 2)
            return flat if masking is None else take_tokens(flat, masking.ids_keep)

        x, fused = images, []
        stages = zip((self.down1, self.down2), (self.stage1, self.stage2), (self.fuse1, self.fuse2), self.scales)
        for down, stage, fuse, scale in stages:
            x, mask = down(x), shown(scale)
            for block in stage:
                x = block(x, mask)
            fused.append(tokens(fuse(x)))
        whole = self.project(self.down3(x).flatten(2).transpose(1, 2)) + self.positions
        visible = whole if masking is None else take_tokens(whole, masking.ids_keep)
        return self.norm(self.blocks(visible) + torch.stack(fused).sum(0))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, classes) logits."""
        return self.head(self.encode(x).mean(1))

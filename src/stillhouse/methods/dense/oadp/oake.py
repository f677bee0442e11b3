"""What the teacher says of an image: objects, each read by a token that sees nothing but it (OAKE, section 3.2),
blocks, and the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.models.clip import Clip
from stillhouse.models.hybrid_clip import StemPatches
from stillhouse.nn.clip import Attention, ImageEncoder, Layer

BLOCKED = -100.0
"""Added to the attention scores of patches outside of an object."""


def windows(boxes: Tensor, size: tuple[int, int], ratio: float = 8.0) -> Tensor:
    """(n, 4) squares around boxes, `ratio` times as large, moved into the image where it is larger than they are.

    Args:
        boxes: (n, 4) corners.
        size: (width, height) of the image.
        ratio: of the areas.
    """
    sides = (ratio * (boxes[:, 2:] - boxes[:, :2]).prod(1)).sqrt()[:, None]
    middle, edge = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes.new_tensor(size)
    low, high = middle - sides / 2, middle + sides / 2
    moved = (-low).clamp_min(0) - (high - edge).clamp_min(0)
    shift = torch.where(sides <= edge, moved, torch.zeros_like(moved))
    return torch.cat([low + shift, high + shift], 1)


def outside(boxes: Tensor, crops: Tensor, grid: int) -> Tensor:
    """(n, 1, grid, grid): 1 where a patch of a crop lies outside of its box, else 0. A box between all patches has the
    one nearest to its centre.

    Args:
        boxes: (n, 4) corners in the image.
        crops: (n, 4) squares in the image.
        grid: patches a side.
    """
    sides = (crops[:, 2] - crops[:, 0]).ceil().clamp_min(1)
    places = (torch.arange(grid, device=boxes.device) * sides[:, None] / grid).floor()  # the pixel that stands for it
    own = boxes - crops[:, :2].repeat(1, 2)
    x = (places >= own[:, 0:1]) & (places <= own[:, 2:3])
    y = (places >= own[:, 1:2]) & (places <= own[:, 3:4])
    mask = 1 - (y[:, :, None] & x[:, None, :]).to(boxes.dtype)
    middle = (own[:, :2] + own[:, 2:]) / 2 / sides[:, None] * grid
    column, row = middle.floor().clamp(0, grid - 1).long().unbind(1)
    empty = mask.flatten(1).amin(1) == 1
    nearest = F.one_hot(row * grid + column, grid * grid).view(-1, grid, grid).to(mask.dtype)
    return torch.where(empty[:, None, None], 1 - nearest, mask)[:, None]


def object_token(layers: Sequence[nn.Module], tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A further token through a transformer's layers, which attends to itself and to the patches of its object alone,
    and which no other token sees.

    Args:
        layers: pre-norm layers.
        tokens: (B, 1 + P, W), the class token first, as they go into the first layer.
        mask: (B, P), 1 for patches outside of the object.

    Returns:
        (B, W), and the other tokens (B, 1 + P, W), both after the last layer.
    """
    own = tokens[:, :1]
    bias = BLOCKED * torch.cat([mask, mask.new_zeros(len(mask), 1)], 1)[:, None, None]
    for layer in layers:
        assert isinstance(layer, Layer)
        seen = layer.norm1(torch.cat([tokens[:, 1:], own], 1))
        own = own + _attended(layer.attention, seen[:, -1:], seen, bias)
        own = own + layer.fc2(layer._act(layer.fc1(layer.norm2(own))))
        tokens = layer(tokens)
    return own[:, 0], tokens


def _attended(attention: Attention, query: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """(B, 1, W) of queries (B, 1, W) on keys (B, L, W), with a bias (B, 1, 1, L) on the scores."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attention.heads, attention.head_dim)).transpose(1, 2)

    q, k, v = split(attention.query(query)), split(attention.key(keys)), split(attention.value(keys))
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
    out: Tensor = attention.out(found.transpose(1, 2).flatten(2))
    return out


class ObjectReader(nn.Module):
    """A CLIP's image encoder as OAKE uses it: patches twice as dense, and an object token.

    Args:
        clip: its image half is read.
        dense: patches at half the stride, and positions interpolated.
    """

    def __init__(self, clip: Clip, dense: bool = True) -> None:
        super().__init__()
        self.image: ImageEncoder = clip.image
        self.dense = dense
        grid = round((len(self.image.positions) - 1) ** 0.5)
        self.grid = 2 * grid if dense else grid

    @torch.no_grad()
    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """(B, dim) unit embeddings of objects in images (B, C, H, W), of masks (B, 1, grid, grid)."""
        net = self.image
        patches = (
            dense_patches(net.patches, images)[..., : self.grid, : self.grid] if self.dense else net.patches(images)
        )
        x = patches.flatten(2).transpose(1, 2)
        x = torch.cat([net.first.expand(len(x), 1, -1), x], 1) + self.positions()
        own, _ = object_token(list(net.encoder.layers), net.norm_before(x), mask.flatten(1))
        return F.normalize(net.projection(net.norm_after(own)).float(), dim=-1)

    def positions(self) -> Tensor:
        """(1 + grid * grid, W): those of the class token and of the patches, interpolated."""
        first, rest = self.image.positions[:1], self.image.positions[1:]
        if not self.dense:
            return self.image.positions
        side = round(len(rest) ** 0.5)
        square = rest.T.reshape(1, -1, side, side)
        larger = F.interpolate(square, (self.grid, self.grid), mode="bilinear", align_corners=False)
        return torch.cat([first, larger[0].flatten(1).T])


def dense_patches(patches: nn.Module, images: Tensor) -> Tensor:
    """(B, W, 2 g, 2 g) of images: what a layer of patches gives at half its stride.

    Raises:
        UserError: patches of another kind than a convolution or a stem.
    """
    if isinstance(patches, StemPatches):
        return patches.dense(images)
    if not isinstance(patches, nn.Conv2d):
        raise UserError(
            f"oadp: patches made by a {type(patches).__name__} cannot be made denser; set oake.dense: false."
        )
    side = patches.kernel_size[0]
    half = side // 2
    pad = ((side - 1) // 2, (side - 1) // 2 + side)  # as many as twice the grid needs, whatever the side
    padded = F.pad(images, (*pad, *pad))
    return F.conv2d(padded, patches.weight, patches.bias, half)


def steps(length: int, block: int, stride: int) -> list[int]:
    """Where blocks begin along a side: as evenly as whole pixels allow, no further apart than `stride`; [] where the
    side is shorter than a block.

    >>> steps(480, 224, 112)
    [0, 86, 171, 256]
    """
    if length < block:
        return []
    number = math.ceil((length - block) / stride)
    each, rest = divmod(length - block, max(number, 1))
    out = [0]
    for i in range(number):
        out.append(out[-1] + each + (i < rest))
    return out


def blocks(
    width: int, height: int, block: int = 224, stride: int = 112, rescale: float = 1.5
) -> list[tuple[float, tuple[int, int], tuple[int, int]]]:
    """Blocks of an image and of its smaller copies: (scale, (width, height) of the copy, (left, top) of the block)."""
    scale = 1.0
    out: list[tuple[float, tuple[int, int], tuple[int, int]]] = []
    while True:
        places = [(x, y) for x in steps(width, block, stride) for y in steps(height, block, stride)]
        if not places:
            return out
        out += [(scale, (width, height), place) for place in places]
        width, height, scale = int(width / rescale), int(height / rescale), scale * rescale


def block_boxes(width: int, height: int, block: int = 224, stride: int = 112, rescale: float = 1.5) -> Tensor:
    """(m, 4) corners of the blocks, in pixels of the image."""
    rows = [
        [x * s, y * s, (x + block) * s, (y + block) * s]
        for s, _, (x, y) in blocks(width, height, block, stride, rescale)
    ]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)

"""`Clip`: the image and the text transformer of CLIP (Radford et al., ICML 2021, arXiv 2103.00020), whose layers may
differ in heads and in hidden units, with places for masks and for prompts.

Torch only. `stillhouse.models.clip` makes one from a network of transformers or from weights in OpenAI's names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class EncoderShape:
    """The size of a transformer.

    Attributes:
        width: channels of a token.
        heads, hidden: attention heads, and units of the perceptron, of each layer.
        head_dim: channels of a head.
        activation: gelu or quick_gelu.
        eps: of the layer norms.
    """

    width: int
    heads: tuple[int, ...]
    hidden: tuple[int, ...]
    head_dim: int
    activation: str = "gelu"
    eps: float = 1e-5


@dataclass
class Masks:
    """What of a transformer is multiplied by what: None leaves it as it is.

    Attributes:
        channels: (W,) shared by all layers.
        heads: of each layer, (H,).
        hidden: of each layer, (M,), the units of its perceptron.
    """

    channels: Tensor | None = None
    heads: Sequence[Tensor] | None = None
    hidden: Sequence[Tensor] | None = None

    def of_layer(self, i: int) -> tuple[Tensor | None, Tensor | None]:
        """The masks of the heads and of the hidden units of layer i."""
        return None if self.heads is None else self.heads[i], None if self.hidden is None else self.hidden[i]


NO_MASKS = Masks()


def masked_norm(x: Tensor, norm: nn.LayerNorm, channels: Tensor | None) -> Tensor:
    """A layer norm whose statistics are of the channels whose mask is not 0; the others come out as 0.

    Args:
        x: (..., W).
        channels: (W,); None: all.
    """
    if channels is None:
        found: Tensor = norm(x)
        return found
    kept = (channels != 0).to(x.dtype)
    count = kept.sum().clamp_min(1)
    centred = (x - (x * kept).sum(-1, keepdim=True) / count) * kept
    scale = (centred.square().sum(-1, keepdim=True) / count + norm.eps).rsqrt()
    return centred * scale * norm.weight + norm.bias * kept


def scaled(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (..., W) times a mask (W,), or x."""
    return x if mask is None else x * mask


class Attention(nn.Module):
    """Self-attention of `heads` heads, possibly none: then its output is the bias of the last layer."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim, inner = heads, head_dim, heads * head_dim
        self.query, self.key, self.value = (_linear(width, inner) for _ in range(3))
        self.out = _linear(inner, width)

    def forward(self, x: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
        """(B, L, W) -> (B, L, W); `mask` (heads,) multiplies the heads' outputs."""
        batch, length, _ = x.shape
        if not self.heads:
            return self.out(x.new_zeros(batch, length, 0))
        split = (batch, length, self.heads, self.head_dim)
        q, k, v = (f(x).view(split).transpose(1, 2) for f in (self.query, self.key, self.value))
        found = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        if mask is not None:
            found = found * mask[:, None, None]
        return self.out(found.transpose(1, 2).reshape(batch, length, -1))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, shape: EncoderShape, i: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.attention = Attention(shape.width, shape.heads[i], shape.head_dim)
        self.norm2 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.fc1 = _linear(shape.width, shape.hidden[i])
        self.fc2 = _linear(shape.hidden[i], shape.width)
        self._act = ACTIVATIONS[shape.activation]

    def forward(self, x: Tensor, causal: bool = False, masks: Masks = NO_MASKS, number: int = 0) -> Tensor:
        """(B, L, W) -> (B, L, W), as layer `number` of the masks."""
        z, (heads, hidden) = masks.channels, masks.of_layer(number)
        x = x + scaled(self.attention(masked_norm(x, self.norm1, z), causal, heads), z)
        units = scaled(self._act(self.fc1(masked_norm(x, self.norm2, z))), hidden)
        return x + scaled(self.fc2(units), z)


class Encoder(nn.Module):
    """Layers one after the other."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(Layer(shape, i) for i in range(len(shape.heads)))

    def forward(
        self,
        x: Tensor,
        causal: bool = False,
        masks: Masks = NO_MASKS,
        prompts: Sequence[Tensor] = (),
        at: slice | None = None,
    ) -> Tensor:
        """Tokens (B, L, W) through all layers.

        Args:
            prompts: of the layers 1, 2, …: before each, the tokens at `at` are replaced by its prompt (n, W).
            at: a slice of positions, n long.
        """
        for i, layer in enumerate(self.layers):
            if 0 < i <= len(prompts) and at is not None:
                x = replaced(x, prompts[i - 1], at)
            x = layer(x, causal, masks, i)
        return x


def replaced(x: Tensor, tokens: Tensor, at: slice) -> Tensor:
    """x (B, L, W) with the tokens (n, W) in the place of those at a slice of n positions."""
    first, last, _ = at.indices(x.shape[1])
    return torch.cat([x[:, :first], tokens.to(x.dtype).expand(len(x), -1, -1), x[:, last:]], 1)


class ImageEncoder(nn.Module):
    """A vision transformer with a class token, whose normalised output is projected to `dim`.

    Args:
        shape: of its layers.
        size: pixels a side.
        patch: pixels of a patch a side.
        dim: of the embedding.
        channels: of an image.
    """

    def __init__(self, shape: EncoderShape, size: int, patch: int, dim: int, channels: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, shape.width, patch, patch, bias=False)
        self.first = nn.Parameter(torch.empty(shape.width))
        self.positions = nn.Parameter(torch.empty((size // patch) ** 2 + 1, shape.width))
        self.norm_before = nn.LayerNorm(shape.width, eps=shape.eps)
        self.encoder = Encoder(shape)
        self.norm_after = nn.LayerNorm(shape.width, eps=shape.eps)
        self.projection = nn.Linear(shape.width, dim, bias=False)
        for parameter in (self.first, self.positions):
            nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.patches.weight, std=0.02)
        nn.init.normal_(self.projection.weight, std=shape.width**-0.5)

    def forward(self, images: Tensor, masks: Masks = NO_MASKS, prompts: Sequence[Tensor] = ()) -> Tensor:
        """(B, C, H, W) -> (B, dim).

        Args:
            prompts: tokens (n, W) that are put after the patches, and, from the second on, in the place of what became
                of them, before the layers 1, 2, … (PromptKD, arXiv 2403.02781).
        """
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), 1, -1), x], 1) + self.positions
        x = scaled(x, masks.channels)
        if prompts:
            x = torch.cat([x, prompts[0].to(x.dtype).expand(len(x), -1, -1)], 1)
        x = masked_norm(x, self.norm_before, masks.channels)
        at = slice(x.shape[1] - len(prompts[0]), x.shape[1]) if prompts else None
        x = self.encoder(x, masks=masks, prompts=prompts[1:], at=at)
        return self.projection(masked_norm(x[:, 0], self.norm_after, masks.channels))


class TextEncoder(nn.Module):
    """A causal transformer, whose output at the end mark, normalised, is projected to `dim`.

    Args:
        shape: of its layers.
        vocabulary: tokens.
        context: positions.
        dim: of the embedding.
    """

    def __init__(self, shape: EncoderShape, vocabulary: int, context: int, dim: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, shape.width)
        self.positions = nn.Parameter(torch.empty(context, shape.width))
        self.encoder = Encoder(shape)
        self.norm_after = nn.LayerNorm(shape.width, eps=shape.eps)
        self.projection = nn.Linear(shape.width, dim, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.projection.weight, std=shape.width**-0.5)

    def forward(self, ids: Tensor, inside: Tensor, masks: Masks = NO_MASKS, prompts: Sequence[Tensor] = ()) -> Tensor:
        """(T, L) ids, and 1 where a token is not padding -> (T, dim): the output at the last token inside.

        Args:
            prompts: tokens (n, W) in the place of positions 1 … n, before positions are added; and, from the second on,
                again before the layers 1, 2, ….
        """
        return self.from_embedded(self.tokens(ids), inside.sum(1) - 1, masks, prompts)

    def from_embedded(self, x: Tensor, ends: Tensor, masks: Masks = NO_MASKS, prompts: Sequence[Tensor] = ()) -> Tensor:
        """As `forward`, of token embeddings (T, L, W) and the positions (T,) of the end marks."""
        at = slice(1, 1 + len(prompts[0])) if prompts else None
        if at is not None:
            x = replaced(x, prompts[0], at)
        x = scaled(x + self.positions[: x.shape[1]], masks.channels)
        x = self.encoder(x, causal=True, masks=masks, prompts=prompts[1:], at=at)
        x = x[torch.arange(len(x), device=x.device), ends]
        return self.projection(masked_norm(x, self.norm_after, masks.channels))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer, which may have no inputs or no outputs."""
    if inputs and outputs:
        return nn.Linear(inputs, outputs)
    layer = nn.Linear(1, max(outputs, 1))
    layer.in_features, layer.out_features = inputs, outputs
    layer.weight = nn.Parameter(torch.empty(outputs, inputs))
    layer.bias = nn.Parameter(torch.zeros(outputs))
    return layer

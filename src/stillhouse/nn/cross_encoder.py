"""BERT's layers (Devlin et al., arXiv 1810.04805), which may read a second sequence by cross-attention after they read
their own; and its head for masked words.

Submodules are named as transformers names those of its BERT, so that its weights load; its own layers take
cross-attention as causal decoders alone, and these read both ways.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-12
STD, BASE = 0.02, 768


class Projections(nn.Module):
    """Queries, keys and values of multi-head attention.

    Args:
        width: of the queries, and of what comes out.
        source: of the tokens that keys and values are made of.
        heads: heads.
    """

    def __init__(self, width: int, source: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(source, width), nn.Linear(source, width)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """(B, L, W) and source (B, S, W') -> (B, L, W); `mask` (B, 1, 1, S) is true where a token may be read."""
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f, y in ((self.query, x), (self.key, source), (self.value, source))
        )
        return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(2)


class Added(nn.Module):
    """A linear layer and dropout, added to the residual stream, and layer norm."""

    def __init__(self, inputs: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        found: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + residual)
        return found


class CrossAttention(nn.Module):
    """Attention to a sequence, its own or another, added to the residual stream."""

    def __init__(self, width: int, source: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self = Projections(width, source, heads)
        self.output = Added(width, width, dropout)
        self._dropout = dropout

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        found: Tensor = self.output(self.self(x, source, mask, self._dropout if self.training else 0.0), x)
        return found


class Intermediate(nn.Module):
    """Linear and GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class CrossLayer(nn.Module):
    """Self-attention, cross-attention where the layer has it, and feed-forward, each with its residual and a layer norm
    after it.

    Args:
        width, heads, hidden: its size.
        source: width of the other sequence; None: the layer reads its own alone.
        dropout: of attention and of what is added.
    """

    def __init__(self, width: int, heads: int, hidden: int, source: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = CrossAttention(width, width, heads, dropout)
        self.crossattention = None if source is None else CrossAttention(width, source, heads, dropout)
        self.intermediate = Intermediate(width, hidden)
        self.output = Added(hidden, width, dropout)

    def forward(self, x: Tensor, mask: Tensor | None, source: Tensor | None = None) -> Tensor:
        """(B, L, W), `mask` (B, 1, 1, L), the other sequence (B, S, W') -> (B, L, W)."""
        x = self.attention(x, x, mask)
        if self.crossattention is not None and source is not None:
            x = self.crossattention(x, source, None)
        found: Tensor = self.output(self.intermediate(x), x)
        return found


class TextEmbeddings(nn.Module):
    """Embeddings of tokens, positions and one segment, normalised."""

    def __init__(self, vocabulary: int, context: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(context, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """(T, L) -> (T, L, W)."""
        places = self.position_embeddings.weight[: ids.shape[1]] + self.token_type_embeddings.weight[0]
        found: Tensor = self.dropout(self.LayerNorm(self.word_embeddings(ids) + places))
        return found


class WordHead(nn.Module):
    """Scores of all words after a linear layer, GELU and layer norm.

    Args:
        width: of the tokens.
        vocabulary: words.
        tied: whether words are scored by their embeddings; else by vectors of the head's own.
    """

    def __init__(self, width: int, vocabulary: int, tied: bool = True) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.weight = None if tied else nn.Parameter(0.02 * torch.randn(vocabulary, width))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """(…, W) and the embeddings (V, W) -> (…, V)."""
        return F.linear(self.LayerNorm(F.gelu(self.dense(x))), words if self.weight is None else self.weight, self.bias)


def begin(module: nn.Module) -> None:
    """BERT's first weights: normal with a standard deviation of 0.02, of linear layers as many times more as they are
    narrower than BERT's base, in the square root; biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=STD)
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=STD * (BASE / part.in_features) ** 0.5)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)

"""Attention whose projections are linear layers of their own, so that each can be replaced: `nn.MultiheadAttention` and
fused `qkv` layers taken apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError


class SeparateAttention(nn.Module):
    """`nn.MultiheadAttention` as four linear layers `q`, `k`, `v` and `out`; same arguments, same outputs.

    Args:
        attention: whose weights are copied; without `add_bias_kv` and `add_zero_attn`.
    """

    in_proj_bias = None  # so torch's encoder layers take no fused path, which reads weights of nn.MultiheadAttention

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn:
            raise UserError(
                "An nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot be taken apart into linear layers.",
            )
        self.heads, self.batch_first, self.dropout = attention.num_heads, attention.batch_first, attention.dropout
        width = attention.embed_dim
        fused = attention.in_proj_weight
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        weights = weights if fused is None else fused.split(width)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.split(width)
        self.q, self.k, self.v = (linear(weight, bias) for weight, bias in zip(weights, biases))
        self.out = linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`: the output, and the attention weights (B, L, S) (each head's, (B, H, L, S),
        unless averaged) where they are needed."""
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        projected = self.q(query), self.k(key), self.v(value)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            attention = F.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
            mixed = attention @ v
            weights = attention.mean(1) if average_attn_weights else attention
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as numbers to add to scores (B, H, L, S)."""
        total: Tensor | None = None
        for mask, view in ((attention, "attention"), (padding, "padding")):
            if mask is None:
                continue
            added = mask.to(q.dtype)
            if mask.dtype == torch.bool:
                added = torch.zeros_like(added).masked_fill(mask, -torch.inf)
            if view == "padding":
                added = added[:, None, None, :]
            elif added.ndim == 3:
                added = added.unflatten(0, (-1, self.heads))
            total = added if total is None else total + added
        return total


class SeparateProjections(nn.Module):
    """A fused linear layer, whose output is cut in even parts by its user, as one layer a part: `parts`; same output.

    Args:
        fused: the layer, such as the `qkv` of a vision transformer.
        count: parts.
    """

    def __init__(self, fused: nn.Linear, count: int = 3) -> None:
        super().__init__()
        width = fused.out_features // count
        if width * count != fused.out_features:
            raise UserError(f"A linear layer of {fused.out_features} outputs has no {count} even parts.")
        biases = (None,) * count if fused.bias is None else fused.bias.split(width)
        self.parts = nn.ModuleList(linear(weight, bias) for weight, bias in zip(fused.weight.split(width), biases))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with a copy of these weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def separate_attention(network: nn.Module) -> nn.Module:
    """Put a `SeparateAttention` in the place of every `nn.MultiheadAttention` of a network, one for each that is
    shared; returns the network."""
    replaced: dict[int, SeparateAttention] = {}
    for module in list(network.modules()):
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # its own fused path, likewise
        for name, child in list(module._modules.items()):
            if isinstance(child, nn.MultiheadAttention):
                if id(child) not in replaced:
                    replaced[id(child)] = SeparateAttention(child)
                setattr(module, name, replaced[id(child)])
    return network

"""Low-rank adapters of the queries and values of a fused `qkv` layer (LoRA, Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError


class QueryValueAdapter(nn.Module):
    """qkv(x) with B_q A_q x added to the queries and B_v A_v x to the values; nothing is scaled.

    Args:
        qkv: the layer, of D to 3 D.
        rank: of A (rank, D) and B (D, rank); B begins at 0.
        dropout: of the layer's own output, not of the adapters'.
        train_qkv: whether the layer itself is trained too, as the released list of parameters has it.
    """

    def __init__(self, qkv: nn.Linear, rank: int, dropout: float = 0.0, train_qkv: bool = False) -> None:
        super().__init__()
        width = qkv.in_features
        if qkv.out_features != 3 * width:
            raise UserError(
                f"An adapter of queries and values needs a layer of D to 3 D; this is of {width} to {qkv.out_features}."
            )
        self.qkv = qkv.requires_grad_(train_qkv)
        self.linear_a_q, self.linear_a_v = (nn.Linear(width, rank, bias=False) for _ in range(2))
        self.linear_b_q, self.linear_b_v = (nn.Linear(rank, width, bias=False) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        for a, b in ((self.linear_a_q, self.linear_b_q), (self.linear_a_v, self.linear_b_v)):
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            nn.init.zeros_(b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., 3 D)."""
        q, k, v = self.dropout(self.qkv(x)).chunk(3, -1)
        return torch.cat([q + self.linear_b_q(self.linear_a_q(x)), k, v + self.linear_b_v(self.linear_a_v(x))], -1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One layer that gives the same without dropout."""
        width = self.qkv.in_features
        out = nn.Linear(width, 3 * width, bias=self.qkv.bias is not None).to(self.qkv.weight)
        out.weight.copy_(self.qkv.weight)
        if self.qkv.bias is not None:
            out.bias.copy_(self.qkv.bias)
        out.weight[:width] += self.linear_b_q.weight @ self.linear_a_q.weight
        out.weight[2 * width :] += self.linear_b_v.weight @ self.linear_a_v.weight
        return out


def adapted(network: nn.Module, rank: int, dropout: float, train_qkv: bool = False) -> int:
    """Freeze a network and give each `qkv` layer an adapter; how many. Raises `UserError` where there are none."""
    network.requires_grad_(False)
    found = [module for module in network.modules() if isinstance(getattr(module, "qkv", None), nn.Linear)]
    for module in found:
        module.qkv = QueryValueAdapter(module.qkv, rank, dropout, train_qkv)  # type: ignore[arg-type]
    if not found:
        raise UserError("student.trains: adapters needs a network with `qkv` layers, such as a vision transformer.")
    return len(found)


def merge(network: nn.Module) -> nn.Module:
    """The network with each adapter merged into its layer."""
    for module in network.modules():
        if isinstance(getattr(module, "qkv", None), QueryValueAdapter):
            module.qkv = module.qkv.merged()  # type: ignore[operator, union-attr]
    return network.requires_grad_(True)

"""The tokenizer of VQGraph: a graph network whose nodes pass through a codebook, and must give back edges, embeddings and classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision
from stillhouse.models.graph import convolutions, linear, propagation

ROWS = 1 << 16


class Codebook(nn.Module):
    """Codes in the space of the embeddings, found by cosine and moved by running means; buffers, not parameters.

    Args:
        codes: M, at least 2. dim: D. decay: of the running means. commitment: weight of the pull of embeddings to their codes.
    """

    codes: Tensor
    cluster_size: Tensor

    def __init__(self, codes: int, dim: int, decay: float = 0.8, commitment: float = 0.25) -> None:
        super().__init__()
        if codes < 2:
            raise UserError(f"vqgraph: a codebook needs at least 2 codes; given: {codes}.")
        self.decay, self.commitment = decay, commitment
        first = torch.empty(codes, dim)
        nn.init.kaiming_uniform_(first)
        self.register_buffer("codes", F.normalize(first, dim=-1))
        self.register_buffer("cluster_size", torch.zeros(codes))

    def scores(self, x: Tensor) -> Tensor:
        """Cosine of embeddings (N, D) with every code: (N, M)."""
        return F.normalize(x, dim=-1) @ F.normalize(self.codes, dim=-1).t()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes of embeddings (N, D).

        Returns:
            (N, D) codes, through which the gradient of `x` passes unchanged; (N,) their indices; the commitment loss, 0 in evaluation mode; and the
            codebook (M, D) that was read, before training moved it.
        """
        with torch.no_grad():
            index = torch.cat([self.scores(rows).argmax(-1) for rows in x.split(ROWS)])  # never all of (N, M) at once
        read = self.codes
        quantized = read[index]
        if not self.training:
            return quantized, index, x.new_zeros(()), read
        loss = self.commitment * F.mse_loss(x, quantized.detach())
        self._move(x.detach(), index)
        return x + (quantized - x).detach(), index, loss, read

    def _move(self, x: Tensor, index: Tensor) -> None:
        """Move each used code towards the mean direction of its embeddings (the unused stay, normalised)."""
        count = torch.bincount(index, minlength=len(self.codes)).to(x.dtype)
        total = torch.zeros_like(self.codes).index_add(0, index, F.normalize(x, dim=-1))
        mean = torch.where(count[:, None] > 0, F.normalize(total / count.clamp_min(1)[:, None], dim=-1), F.normalize(self.codes, dim=-1))
        self.cluster_size.lerp_(count, 1 - self.decay)
        self.codes = torch.lerp(self.codes, mean, 1 - self.decay)


class _OfCodes(torch.autograd.Function):
    """`linear(x + stopgrad(codes[index] - x))` with the product taken over the codes in use rather than over all nodes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, index: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        used, inverse = torch.unique(index, return_inverse=True)
        table = codes[used]
        ctx.save_for_backward(table, inverse, weight)
        return F.linear(table, weight, bias)[inverse]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        table, inverse, weight = ctx.saved_tensors
        (grad,) = grads
        summed = torch.zeros(len(table), grad.shape[1], dtype=grad.dtype, device=grad.device).index_add(0, inverse, grad)
        return grad @ weight, None, None, summed.t() @ table, summed.sum(0)


class Tokenizer(nn.Module):
    """Two graph convolutions with a codebook between them.

    Args:
        inputs: D, of the features and of the codes. width: of the second convolution. classes: C. codes: M.
        dropout: after the first convolution.
        by_code: take the decoders' products over the codes in use rather than over all nodes: a third of the work, and the same up to rounding. Rounding
            decides which of the nodes of one code the largest and smallest entries of P, and so their gradients, belong to; the released code leaves it so.
    """

    def __init__(self, inputs: int, width: int, classes: int, codes: int, dropout: float = 0.8, by_code: bool = True) -> None:
        super().__init__()
        geometric = convolutions()
        self.encode = geometric.GCNConv(inputs, inputs, normalize=False, add_self_loops=False)
        self.codebook = Codebook(codes, inputs)
        self.to_edges, self.to_nodes = nn.Linear(inputs, inputs), nn.Linear(inputs, inputs)
        self.classify = geometric.GCNConv(inputs, width, normalize=False, add_self_loops=False)
        self.fc = nn.Linear(width, classes)
        self.dropout, self.by_code = dropout, by_code

    def embed(self, x: Tensor, along: Tensor) -> Tensor:
        """(N, D) features to (N, D) embeddings, before the codebook."""
        return F.dropout(F.relu(self.encode(x, along)), self.dropout, self.training)

    def forward(self, x: Tensor, along: Tensor) -> dict[str, Tensor]:
        """(N, D) features and `along`, D^-1/2 (A + I) D^-1/2, to `logits` (N, C), `embedding`, `quantized`, `to_edges`, `to_nodes` (N, D), `hidden`
        (N, width), `index` (N,) and `commitment`."""
        return self.decode(self.embed(x, along), along)

    def decode(self, h: Tensor, along: Tensor) -> dict[str, Tensor]:
        """What `forward` gives, from embeddings (N, D)."""
        quantized, index, commitment, read = self.codebook(h)
        decoders = (self.to_edges, self.to_nodes)
        z_edges, z_nodes = (_OfCodes.apply(h, read, index, d.weight, d.bias) if self.by_code else d(quantized) for d in decoders)
        hidden = F.relu(self.classify(z_edges, along))
        return {
            "logits": linear(self.fc, hidden),
            "embedding": h,
            "quantized": quantized,
            "to_edges": z_edges,
            "to_nodes": z_nodes,
            "hidden": hidden,
            "index": index,
            "commitment": commitment,
        }

    @staticmethod
    def propagation(edges: Tensor, nodes: int) -> Tensor:
        """`along` for edges (2, E), both directions, without self loops."""
        return propagation(edges, nodes, "gcn")

    def losses(self, out: dict[str, Tensor], edges: Tensor, edge_weight: float, node_weight: float, sample: int | None = None) -> dict[str, Tensor]:
        """The reconstruction and commitment terms of an output on a graph's edges; `sample`: of so many nodes for the edge term."""
        return {
            "nodes": node_weight * node_loss(out["embedding"], out["to_nodes"]),
            "edges": edge_weight * edge_loss(out["to_edges"], edges, sample),
            "commitment": out["commitment"],
        }


@full_precision
def node_loss(embedding: Tensor, decoded: Tensor) -> Tensor:
    """mean((h - z)^2) over N * D entries, with gradient on both sides: a scalar."""
    return F.mse_loss(embedding, decoded)


@full_precision
def edge_loss(decoded: Tensor, edges: Tensor, sample: int | None = None) -> Tensor:
    """sqrt(mean((A - P)^2)) with P = z z^T, scaled over the whole matrix to [0, 1], and A with ones on its diagonal: a scalar.

    Args:
        decoded: z, (N, D). edges: (2, E), both directions, without self loops.
        sample: take so many nodes, drawn anew, and the edges among them: time and memory then grow with E and sample^2 rather than N^2.

    Raises:
        UserError: fewer than two nodes.
    """
    n = len(decoded)
    if n < 2:
        raise UserError(f"vqgraph: reconstructing edges needs at least two nodes; given: {n}.")
    if sample is not None and sample < n:
        nodes = torch.randperm(n)[:sample].to(edges.device)
        number = torch.full((n,), -1, device=edges.device)
        number[nodes] = torch.arange(sample, device=edges.device)
        edges = number[edges]
        edges, decoded, n = edges[:, (edges >= 0).all(0)], decoded[nodes], sample
    adjacency = torch.eye(n, dtype=decoded.dtype, device=decoded.device)
    adjacency[edges[0], edges[1]] = 1.0
    p = decoded @ decoded.t()
    low, high = p.min(), p.max()
    return ((p - low) / (high - low).clamp_min(1e-12) - adjacency).square().mean().clamp_min(1e-24).sqrt()

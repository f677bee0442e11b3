"""Linear layers as products of two thin ones, by truncated singular value decomposition (Guo et al., PELA, arXiv
2310.10700)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.nn.attention import separate_attention

Dense = nn.Linear | nn.Conv2d


def rank_of(inputs: int, outputs: int, ratio: float) -> int:
    """The rank at which two factors hold `ratio` times fewer weights than the matrix: floor(inputs * outputs / (ratio *
    (inputs + outputs)))."""
    if not ratio > 0:
        raise UserError(f"The compression ratio must be above 0; given: {ratio}.")
    return math.floor(inputs * outputs / (ratio * (inputs + outputs)))


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) whose product B A is the best approximation of rank r to the weight (out, in); A A^T =
    B^T B holds the singular values.

    In double precision, as single precision misses the product by 1e-4.
    """
    u, s, v = torch.linalg.svd(weight.double().T, full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).T.to(weight.dtype), (root.unsqueeze(1) * v[:rank]).T.to(weight.dtype)


class LowRank(nn.Sequential):
    """A linear layer (or 1x1 convolution) as two: `0` to r channels without bias, and `1` back, with the bias.

    Args:
        dense: the layer; its bias is copied.
        rank: r.
        approximate: start at the singular value decomposition; False: at random, for weights that are loaded later.
    """

    def __init__(self, dense: Dense, rank: int, approximate: bool = True) -> None:
        bias = dense.bias is not None
        first: Dense
        second: Dense
        if isinstance(dense, nn.Linear):
            first = nn.Linear(dense.in_features, rank, bias=False)
            second = nn.Linear(rank, dense.out_features, bias=bias)
        else:
            first = nn.Conv2d(dense.in_channels, rank, 1, stride=dense.stride[0], bias=False)
            second = nn.Conv2d(rank, dense.out_channels, 1, bias=bias)
        super().__init__(first.to(dense.weight), second.to(dense.weight))
        if approximate:
            a, b = factors(dense.weight.detach().flatten(1), rank)
            with torch.no_grad():
                first.weight.copy_(a.view_as(first.weight))
                second.weight.copy_(b.view_as(second.weight))
                if dense.bias is not None and second.bias is not None:
                    second.bias.copy_(dense.bias)
        self.train(dense.training)

    @property
    def first(self) -> Tensor:
        """A (r, in)."""
        return self._weight(0)

    @property
    def second(self) -> Tensor:
        """B (out, r)."""
        return self._weight(1)

    def _weight(self, which: int) -> Tensor:
        layer = self[which]
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        return layer.weight.flatten(1)

    @property
    def weight(self) -> Tensor:
        """The matrix B A that the two layers apply, in the shape of the dense layer's weight, for code that reads
        it."""
        product = self.second @ self.first
        return product if isinstance(self[0], nn.Linear) else product[:, :, None, None]

    @property
    def bias(self) -> Tensor | None:
        layer = self[1]
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        return layer.bias

    @property
    def in_features(self) -> int:
        return self.first.shape[1]

    @property
    def out_features(self) -> int:
        return self.second.shape[0]


@dataclass(frozen=True)
class Replacement:
    """A layer that was replaced: its name, what stands there now, and the weight (out, in) that it had."""

    name: str
    layer: LowRank
    weight: Tensor


def decompose(
    network: nn.Module,
    ratio: float,
    omit: Sequence[str] = (),
    keep: Sequence[str] = (),
    min_outputs: int = 10,
    pointwise: bool = False,
    approximate: bool = True,
) -> list[Replacement]:
    """Replace the linear layers of a network by low-rank ones, in place; attention is taken apart first (see
    `nn.attention`).

    A layer that stands at several places is replaced by one low-rank layer at all of them, and layers that share a
    weight share its factors. A layer whose weight something else uses too (an embedding tied to the output layer), or
    that would not become smaller, stays.

    Args:
        network: any.
        ratio: how many times fewer weights a layer shall have (see `rank_of`).
        omit: layers whose dotted name contains one of these stay.
        keep: layers of exactly these names stay.
        min_outputs: layers with fewer outputs stay.
        pointwise: 1x1 convolutions too.
        approximate: see `LowRank`.

    Returns:
        What was replaced, in the order of the network; weights are constants.
    """
    separate_attention(network)
    owners: dict[int, list[nn.Module]] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    layers_by_id: dict[int, LowRank] = {}
    replaced: list[Replacement] = []
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if not name or name in keep or any(part in name for part in omit):
            continue
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        if id(module) not in layers_by_id:
            rank = _rank(module, ratio, min_outputs, pointwise, owners[id(module.weight)])
            if rank is None:
                continue
            layer = LowRank(module, rank, approximate)
            twin = next(
                (layers_by_id[id(other)] for other in owners[id(module.weight)] if id(other) in layers_by_id), None
            )
            if twin is not None:
                layer[0].weight, layer[1].weight = twin[0].weight, twin[1].weight
            else:
                replaced.append(Replacement(name, layer, module.weight.detach().flatten(1).clone()))
            layers_by_id[id(module)] = layer
        parent, _, short = name.rpartition(".")
        setattr(network.get_submodule(parent), short, layers_by_id[id(module)])
    return replaced


def _is_pointwise(module: nn.Conv2d) -> bool:
    even = len(set(module.stride)) == 1
    return module.kernel_size == (1, 1) and module.groups == 1 and module.padding == (0, 0) and even


def _rank(module: Dense, ratio: float, min_outputs: int, pointwise: bool, owners: Sequence[nn.Module]) -> int | None:
    """The rank of a layer's replacement; None where it stays."""
    if isinstance(module, nn.Conv2d) and not (pointwise and _is_pointwise(module)):
        return None
    if not all(type(owner) is type(module) for owner in owners):
        return None
    outputs, inputs = module.weight.shape[:2]
    rank = rank_of(inputs, outputs, ratio)
    return rank if outputs >= min_outputs and rank >= 1 and rank * (inputs + outputs) <= inputs * outputs else None


def repeated_blocks(names: Sequence[str]) -> list[str]:
    """The innermost numbered modules around layers of these names, without repetition: `blocks.0` of
    `blocks.0.mlp.fc1`.

    >>> repeated_blocks(["blocks.0.attn.qkv", "blocks.0.mlp.0", "layers.1.blocks.2.mlp.fc1"])
    ['blocks.0', 'layers.1.blocks.2']
    """
    found: dict[str, None] = {}
    for name in names:
        path = name.split(".")[:-1]
        while path and not path[-1][-1].isdigit():
            path.pop()
        if path:
            found[".".join(path)] = None
    return list(found)

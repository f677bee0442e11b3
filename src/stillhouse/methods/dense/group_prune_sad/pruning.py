"""Which channels go: the pull on batch norm's scales, thresholds by group, shortcuts that share a mask; and the network
without them, whose constants moved on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.models.layer_graph import IMAGE, ConvBlock, Layer, LayerGraph

Masks = dict[int, Tensor]
"""Layer -> (C,) bool, True where a channel stays."""


# ---- sparse training -------------------------------------------------------------------------------------------------


def largest(gammas: Sequence[Tensor], percent: float = 0.65) -> list[Tensor]:
    """Which scales are, of all pooled, above the share `percent` of them by absolute value: the protected ones."""
    pooled = torch.cat([g.detach().abs().flatten() for g in gammas])
    threshold = pooled.sort().values[min(int(percent * len(pooled)), len(pooled) - 1)]
    return [g.detach().abs() >= threshold for g in gammas]


def pulled(
    gradient: Tensor, gamma: Tensor, strength: float, protected: Tensor | None = None, relief: float = 0.99
) -> Tensor:
    """The gradient of scales (C,) with the pull towards 0, strength * sign(gamma), of which the protected ones feel the
    share 1 - relief."""
    pull = strength * gamma.detach().sign()
    gradient = gradient + pull
    return gradient if protected is None else gradient - relief * pull * protected.to(pull.dtype)


# ---- masks -----------------------------------------------------------------------------------------------------------


def prunable(plan: Sequence[Layer]) -> list[int]:
    """Layers with batch norm whose channels may go: not those that an upsampling or a pooling layer reads."""
    fixed = {s for layer in plan if layer.kind in ("upsample", "pool") for s in layer.sources}
    return [i for i, layer in enumerate(plan) if layer.kind == "conv" and i not in fixed]


def threshold(gammas: Sequence[Tensor], ratio: float) -> Tensor:
    """Of the absolute scales of a group, sorted, the entry int(n * ratio).

    Raises:
        UserError: no scales, or a ratio that leaves none.
    """
    if not gammas or not 0 <= ratio < 1:
        raise UserError(
            f"group_prune_sad: a group needs layers that can be pruned and a ratio in [0, 1); given: {len(gammas)} "
            f"layers, ratio {ratio}."
        )
    pooled = torch.cat([g.detach().abs().flatten() for g in gammas]).sort().values
    return pooled[min(int(len(pooled) * ratio), len(pooled) - 1)]


def kept_channels(gamma: Tensor, above: Tensor, layer_keep: float = 0.01, fewest: int = 16) -> Tensor:
    """(C,) bool: the scales above the threshold; where these are too few, the largest: int(C * layer_keep) of them, or
    `fewest` where that is 0, at most C."""
    size = gamma.detach().abs()
    least = min(int(len(size) * layer_keep) or fewest, len(size))
    mask = size > above
    best = torch.zeros_like(mask)
    best[size.topk(least).indices] = True
    return mask if int(mask.sum()) >= least else best


def majority(masks: Sequence[Tensor]) -> Tensor:
    """The one mask of layers whose outputs are added: a channel stays that stays in half of them."""
    return torch.stack([m.to(torch.int64) for m in masks]).sum(0) >= len(masks) / 2


def one_source(layer: Layer) -> bool:
    """Whether a layer is a route of one source: that map again."""
    return layer.kind == "concat" and len(layer.sources) == 1


def chains(plan: Sequence[Layer]) -> list[list[int]]:
    """Groups of convolutions whose outputs are added somewhere, each in order: they must share a mask."""
    roots: dict[int, int] = {}

    def root(i: int) -> int:
        while roots.setdefault(i, i) != i:
            i = roots[i]
        return i

    def source(i: int) -> int:
        """The convolution that the channels of a layer are."""
        while i != IMAGE and (plan[i].kind in ("upsample", "pool", "add") or one_source(plan[i])):
            i = plan[i].sources[0]
        return i

    for i, layer in enumerate(plan):
        if layer.kind == "add":
            ends = [source(s) for s in layer.sources]
            if any(e == IMAGE or plan[e].kind == "concat" for e in ends):
                raise UserError(f"group_prune_sad: layer {i} adds what is no convolution's output alone.")
            for other in ends[1:]:
                roots[root(other)] = root(ends[0])
    members: dict[int, list[int]] = {}
    for i in sorted(roots):
        members.setdefault(root(i), []).append(i)
    return [m for m in members.values() if len(m) > 1]


def masks_of(
    graph: LayerGraph,
    ratios: Mapping[str, float],
    *,
    by_group: bool = True,
    layer_keep: float = 0.01,
    fewest: int = 16,
) -> Masks:
    """The mask of each convolution with batch norm.

    Args:
        graph: with trained scales.
        ratios: the share of channels that goes, by group; with `by_group` false, the first is that of all.
        layer_keep, fewest: of `kept_channels`.

    Raises:
        UserError: a group of the network without a ratio, or without layers that can be pruned.
    """
    layers = prunable(graph.plan)
    group_of = {i: graph.plan[i].group if by_group else "" for i in layers}
    gammas = {i: norm(graph, i).weight for i in layers}
    wanted = dict(ratios) if by_group else {"": next(iter(ratios.values()))}
    missing = sorted(set(group_of.values()) - set(wanted))
    if missing:
        raise UserError(f"group_prune_sad: prune.ratios has none for the group '{missing[0]}'.")
    above = {g: threshold([gammas[i] for i in layers if group_of[i] == g], r) for g, r in wanted.items()}
    masks = {
        i: torch.ones(layer.channels, dtype=torch.bool) for i, layer in enumerate(graph.plan) if layer.kind == "conv"
    }
    for i in layers:
        masks[i] = kept_channels(gammas[i], above[group_of[i]], layer_keep, fewest).cpu()
    for chain in chains(graph.plan):
        shared = majority([masks[i] for i in chain])
        if not all(i in group_of for i in chain) or not shared.any():
            shared = torch.ones_like(shared)
        masks |= dict.fromkeys(chain, shared)
    return masks


def norm(graph: LayerGraph, i: int) -> nn.BatchNorm2d:
    """The batch norm of a convolution of the graph."""
    block = graph.layers[i]
    assert isinstance(block, ConvBlock)
    return block.norm


# ---- surgery ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def mask_network(graph: LayerGraph, masks: Masks) -> None:
    """Set scales and shifts of the channels that go to 0, in place. What such a channel would still give, the constant
    act(shift), moves on to its readers: into the running mean of their batch norm, or the bias of an output.

    At the image's border this is approximate, as convolutions pad with zeros.
    """
    constants: dict[int, Tensor] = {}
    for i, (layer, module) in enumerate(zip(graph.plan, graph.layers)):
        given = [torch.zeros(graph.channels) if s == IMAGE else constants[s] for s in layer.sources]
        if layer.kind in ("conv", "out"):
            convolution = module.conv if isinstance(module, ConvBlock) else module
            assert isinstance(convolution, nn.Conv2d)
            offset = convolution.weight.sum((2, 3)) @ given[0].to(convolution.weight)
            if isinstance(module, ConvBlock):
                mean = module.norm.running_mean
                assert mean is not None
                mean -= offset
                gone = ~masks[i].to(offset.device)
                constants[i] = module.act(module.norm.bias * gone) * gone
                module.norm.weight[gone] = 0.0
                module.norm.bias[gone] = 0.0
            else:
                assert convolution.bias is not None
                convolution.bias += offset
                constants[i] = torch.zeros_like(convolution.bias)
        elif layer.kind == "concat":
            constants[i] = torch.cat(given)
        else:
            constants[i] = torch.stack(given).sum(0) if layer.kind == "add" else given[0]


def channel_masks(graph: LayerGraph, masks: Masks) -> list[Tensor]:
    """(C,) bool of every layer's channels: of shortcuts that of their source, of routes those of their sources one
    after the other."""
    out: list[Tensor] = []
    for i, layer in enumerate(graph.plan):
        if layer.kind == "conv":
            out.append(masks[i])
        elif layer.kind == "out":
            out.append(torch.ones(layer.channels, dtype=torch.bool))
        else:
            parts = [torch.ones(graph.channels, dtype=torch.bool) if s == IMAGE else out[s] for s in layer.sources]
            out.append(torch.cat(parts) if layer.kind == "concat" else parts[0])
    return out


def widths_of(graph: LayerGraph, masks: Masks) -> list[int]:
    """Channels that stay of each convolution with batch norm, in order."""
    return [int(masks[i].sum()) for i, layer in enumerate(graph.plan) if layer.kind == "conv"]


@torch.no_grad()
def copy_kept(graph: LayerGraph, masks: Masks, compact: LayerGraph) -> None:
    """Copy what stays of a masked network's weights into one that is built with the widths that stay."""
    kept = channel_masks(graph, masks)
    for i, (layer, old, new) in enumerate(zip(graph.plan, graph.layers, compact.layers)):
        if layer.kind not in ("conv", "out"):
            continue
        source = layer.sources[0]
        inputs = torch.ones(graph.channels, dtype=torch.bool) if source == IMAGE else kept[source]
        pairs: list[tuple[Any, Any]] = [(old, new)]
        if layer.kind == "conv":
            pairs = [(old.conv, new.conv), (old.norm, new.norm)]
        for before, after in pairs:
            after.load_state_dict({name: _sliced(v, kept[i], inputs) for name, v in before.state_dict().items()})


def _sliced(value: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """A weight, bias, scale or statistic without the channels that go."""
    if value.ndim == 0:
        return value
    chosen = value[outputs.to(value.device)]
    return chosen[:, inputs.to(value.device)] if value.ndim == 4 else chosen

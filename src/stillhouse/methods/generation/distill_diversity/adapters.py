"""Adapters of low rank on linear and convolutional layers, which move between networks of one form; and sliders, such
adapters trained so that their scale moves one attribute (Gandikota et al., arXiv 2311.12092)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError


class LowRankAdapter(nn.Module):
    """What is added to a layer's output: scale * alpha / r * up(down(x)). It begins as nothing.

    Args:
        layer: the layer, linear or 2-D convolution without groups.
        rank: r, at most the layer's inputs or outputs.
        alpha: as above.

    Raises:
        UserError: another layer.
    """

    def __init__(self, layer: nn.Module, rank: int = 4, alpha: float = 1.0) -> None:
        super().__init__()
        self.down: nn.Module
        self.up: nn.Module
        if isinstance(layer, nn.Linear):
            rank = min(rank, layer.in_features, layer.out_features)
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        elif isinstance(layer, nn.Conv2d) and layer.groups == 1:
            rank = min(rank, layer.in_channels, layer.out_channels)
            place = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            self.down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, bias=False, **place)  # type: ignore[arg-type]
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            raise UserError(f"An adapter needs a linear layer or a plain convolution, not a {type(layer).__name__}.")
        self.ratio = alpha / rank
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's input -> what is added to its output at a scale of 1, in the input's precision."""
        added: Tensor = self.up(self.down(x.to(self.up.weight.dtype)))  # type: ignore[arg-type]
        return (self.ratio * added).to(x.dtype)


def adapters_for(module: nn.Module, without: Sequence[str], rank: int, alpha: float) -> nn.ModuleDict:
    """Adapters for every linear and convolutional layer of a network whose name begins with none of `without`; a dot in
    a name is a slash here."""
    found = {}
    for name, layer in module.named_modules():
        plain = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        if plain and not any(part in name for part in without):
            found[name.replace(".", "/")] = LowRankAdapter(layer, rank, alpha)
    if not found:
        raise UserError(f"The network has no layer for an adapter (left out: {', '.join(without) or 'none'}).")
    return nn.ModuleDict(found)


def check_fit(adapters: Mapping[str, nn.Module], module: nn.Module) -> None:
    """Raises `UserError` for adapters whose layers another network does not have, or has in other sizes."""
    layers = dict(module.named_modules())
    missing = [name.replace("/", ".") for name in adapters if name.replace("/", ".") not in layers]
    if missing:
        raise UserError(
            f"The network has no layers for {len(missing)} of {len(adapters)} adapters, such as '{missing[0]}': "
            "adapters move between networks with layers of the same names."
        )
    for name, adapter in adapters.items():
        layer = layers[name.replace("/", ".")]
        wanted = [(p.shape[0], *p.shape[2:]) if p.ndim == 4 else (p.shape[0],) for p in adapter.up.parameters()]  # type: ignore[union-attr]
        its = tuple(layer.weight.shape) if isinstance(layer, nn.Linear | nn.Conv2d) else ()
        inputs = [p.shape[1:] for p in adapter.down.parameters()]  # type: ignore[union-attr]
        if not its or its[0] != wanted[0][0] or tuple(its[1:]) != tuple(inputs[0]):
            raise UserError(
                f"The adapter of '{name.replace('/', '.')}' is for a layer of {wanted[0][0]} outputs and inputs "
                f"{tuple(inputs[0])}, but the network's has weights {its}."
            )


@contextmanager
def attached(module: nn.Module, adapters: Mapping[str, nn.Module], scale: float | Tensor) -> Iterator[None]:
    """Inside, the network's layers have the adapters at a scale: a number, 0 for off and below 0 for the opposite, or
    one for each sample (B,).

    Raises:
        UserError: as `check_fit`.
    """
    check_fit(adapters, module)

    def hook(adapter: nn.Module) -> object:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            factor = scale.view(-1, *(1,) * (output.ndim - 1)) if isinstance(scale, Tensor) else scale
            return output + factor * adapter(inputs[0])

        return add

    layers = dict(module.named_modules())
    hooks = [layers[name.replace("/", ".")].register_forward_hook(hook(adapter)) for name, adapter in adapters.items()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's correlation of two sequences without ties in the first."""
    a, b = (torch.tensor(values, dtype=torch.float64).argsort().argsort().double() for values in (xs, ys))
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])

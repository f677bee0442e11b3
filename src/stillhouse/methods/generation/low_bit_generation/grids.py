"""Grids of few bits for weights and activations: integers and floating point, scaled in groups along a layer's inputs;
smoothing of activations (SmoothQuant, arXiv 2211.10438) and rounding that makes up for its own error (GPTQ, arXiv
2210.17323)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision
from stillhouse.nn import quantise
from stillhouse.nn.quantise import Levels, PackedTensor

SMALLEST = 1e-8
"""The least scale: of a group of zeros."""
SCALE_BITS = 16
"""What the scale of a group counts in a model's total bits."""


# ---- number formats --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A number format of b bits, before scaling.

    Attributes:
        bits: of a code.
        exponent, mantissa: bits of a floating-point format; 0 and 0 for integers.
        symmetric: of integers: -2^(b-1) … 2^(b-1) - 1 around 0; else 0 … 2^b - 1 from the group's minimum.
    """

    bits: int
    exponent: int = 0
    mantissa: int = 0
    symmetric: bool = True

    @property
    def is_float(self) -> bool:
        return self.exponent > 0

    @property
    def largest(self) -> float:
        """What the largest magnitude of a group is scaled to.

        As in the formats of OCP: E4M3 has no infinities and one NaN (448), E5M2 is like IEEE's (57,344), and smaller
        ones use every code for a number (E2M1: 6).
        """
        if not self.is_float:
            return float(2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1)
        return float(self.points()[-1])

    def points(self) -> Tensor:
        """(levels,) float32, sorted: the numbers that codes stand for."""
        if not self.is_float:
            low = -(2 ** (self.bits - 1)) if self.symmetric else 0
            return torch.arange(low, low + 2**self.bits).float()
        bias = 2 ** (self.exponent - 1) - 1
        values = []
        for code in range(2 ** (self.exponent + self.mantissa)):
            power, rest = divmod(code, 2**self.mantissa)
            if self.bits == 8 and self.exponent == 5 and power == 2**self.exponent - 1:
                break  # infinity and NaN
            if self.bits == 8 and self.exponent == 4 and code == 2 ** (self.exponent + self.mantissa) - 1:
                break  # NaN
            share = rest / 2**self.mantissa
            values.append(share * 2.0 ** (1 - bias) if power == 0 else (1 + share) * 2.0 ** (power - bias))
        positive = torch.tensor(values)
        return torch.cat([-positive.flip(0)[:-1], positive])

    def nearest(self, x: Tensor) -> Tensor:
        """x, already scaled, at the nearest number of the format; a tie goes to the even one."""
        if not self.is_float:
            low = -(2 ** (self.bits - 1)) if self.symmetric else 0
            return x.round().clamp(low, low + 2**self.bits - 1)
        lowest = 2 - 2 ** (self.exponent - 1)  # the exponent of subnormals
        _, power = torch.frexp(x.abs())
        step = torch.exp2((power - 1).clamp_min(lowest).to(x.dtype) - self.mantissa)
        return ((x / step).round() * step).clamp(-self.largest, self.largest)


def number_format(name: str) -> Format:
    """The format of a name: int3 (symmetric), uint3 (from the group's minimum), e2m1 (floating point).

    Raises:
        UserError: another name, or more than 8 bits.

    >>> number_format("e2m1").points().tolist()[7:]
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    integer, floating = re.fullmatch(r"(u?)int([2-8])", name), re.fullmatch(r"e([1-5])m([0-6])", name)
    if integer:
        return Format(int(integer[2]), symmetric=not integer[1])
    if floating and 2 <= 1 + int(floating[1]) + int(floating[2]) <= 8:
        e, m = int(floating[1]), int(floating[2])
        return Format(1 + e + m, e, m)
    raise UserError(
        f"There is no number format '{name}': int2 to int8 (symmetric), uint2 to uint8 (from the minimum), or eEmM of "
        "2 to 8 bits, such as e2m1 and e4m3."
    )


# ---- weights ---------------------------------------------------------------------------------------------------------


def scales(rows: Tensor, kind: Format) -> tuple[Tensor, Tensor]:
    """The scale and the offset (n, 1) of each group (n, G): a code c stands for scale * c + offset."""
    if kind.symmetric:
        scale = (rows.abs().amax(1, keepdim=True) / kind.largest).clamp_min(SMALLEST)
        return scale, torch.zeros_like(scale)
    low, high = rows.aminmax(dim=1, keepdim=True)
    scale = ((high - low) / kind.largest).clamp_min(SMALLEST)
    return scale, -scale * (-low / scale).round()


@full_precision
def on_grid(rows: Tensor, kind: Format, scale: Tensor, offset: Tensor) -> Tensor:
    """The code, as a number of the format, of each element of groups (n, G)."""
    return kind.nearest((rows - offset) / scale)


class GroupLevels(Levels):
    """A linear layer's weight on a grid; the gradient passes straight through.

    Scales follow the weight, without a gradient, unless they are given.

    Args:
        kind: the number format.
        group: consecutive inputs of one output that share a scale; divides the layer's inputs.
        given: (scale, offset), each (n, 1), of the groups.
    """

    scale: Tensor | None
    offset: Tensor | None

    def __init__(self, kind: Format, group: int, given: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.kind, self.group = kind, group
        self.register_buffer("scale", None if given is None else given[0])
        self.register_buffer("offset", None if given is None else given[1])

    def _groups(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = weight.detach().float().reshape(-1, self.group)
        if self.scale is not None and self.offset is not None:
            return rows, self.scale, self.offset
        return rows, *scales(rows, self.kind)

    def forward(self, weight: Tensor) -> Tensor:
        rows, scale, offset = self._groups(weight)
        quantised = (scale * on_grid(rows, self.kind, scale, offset) + offset).view(weight.shape).to(weight.dtype)
        return quantise.straight_through(weight, quantised)

    @torch.no_grad()
    def pack(self, weight: Tensor) -> PackedTensor:
        rows, scale, offset = self._groups(weight)
        points = self.kind.points().to(rows.device)
        codes = torch.searchsorted(points, on_grid(rows, self.kind, scale, offset))
        return quantise.packed(codes, len(points), scale, offset, weight.shape, self.group, points)


# ---- activations -----------------------------------------------------------------------------------------------------


def token_quantise(x: Tensor, bits: int) -> Tensor:
    """(..., D) with each row on a symmetric grid of its own largest magnitude; the gradient passes straight through."""
    with torch.no_grad():
        kind = Format(bits)
        rows = x.float()
        scale = (rows.abs().amax(-1, keepdim=True) / kind.largest).clamp_min(SMALLEST)
        value = (scale * kind.nearest(rows / scale)).to(x.dtype)
    return quantise.straight_through(x, value)


class InputGrid(nn.Module):
    """What a linear layer's input goes through: divided by `smooth`, then on a grid for each token.

    Args:
        inputs: D.
        bits: of activations; None: they stay as they are.
    """

    smooth: Tensor

    def __init__(self, inputs: int, bits: int | None) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("smooth", torch.ones(inputs))

    def forward(self, x: Tensor) -> Tensor:
        x = x / self.smooth.to(x.dtype)
        return x if self.bits is None else token_quantise(x, self.bits)


class GridLinear(nn.Linear):
    """A linear layer with a grid before it; `weight` and `bias` are those of the layer that it replaces."""

    input_grid: InputGrid

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.input_grid(x), self.weight, self.bias)


def add_input_grids(network: nn.Module, names: Sequence[str], bits: int | None) -> None:
    """Give the linear layers of these names a grid for their inputs, in place; their parameters stay where they are."""
    for name in names:
        layer = network.get_submodule(name)
        assert type(layer) is nn.Linear, name
        layer.__class__ = GridLinear
        assert isinstance(layer, GridLinear)
        layer.input_grid = InputGrid(layer.in_features, bits).to(layer.weight.device)


@torch.no_grad()
def smooth(network: nn.Module, names: Sequence[str], largest: Mapping[str, Tensor], power: float) -> None:
    """Move the range of activations into weights, in place; what the network computes stays the same.

    Args:
        names: of layers with input grids.
        largest: name -> (D,) the largest magnitude of each input over calibration batches.
        power: a in s = max|x|^a / max|w|^(1 - a); 0.5 shares the range evenly.
    """
    for name in names:
        layer = network.get_submodule(name)
        assert isinstance(layer, GridLinear)
        weights = layer.weight.abs().amax(0).clamp_min(SMALLEST)
        factor = largest[name].to(weights).clamp_min(SMALLEST) ** power / weights ** (1 - power)
        factor = factor.clamp_min(1e-5)
        layer.input_grid.smooth.mul_(factor)
        layer.weight.mul_(factor)


# ---- which layers, and what they are given ---------------------------------------------------------------------------


def chosen_layers(network: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Names of the linear layers whose name matches one of `include` and none of `exclude` (regular expressions that
    may match anywhere).

    Raises:
        UserError: no layer is left.
    """
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    found = [n for n in linear if any(re.search(i, n) for i in include) and not any(re.search(e, n) for e in exclude)]
    if not found:
        raise UserError(
            f"quantise.include {list(include)} and quantise.exclude {list(exclude)} leave no linear layer of "
            f"{', '.join(linear[:6])}…."
        )
    return found


def group_of(layer: nn.Linear, name: str, group: int | None) -> int:
    """Inputs that share a scale. Raises `UserError` where they do not divide the layer's."""
    size = layer.in_features if group is None else group
    if layer.in_features % size:
        raise UserError(f"quantise.group: groups of {size} do not divide the {layer.in_features} inputs of '{name}'.")
    return size


@contextmanager
def inputs_of(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, what the linear layers of these names are given is collected: name -> one (n, D) a call."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def collecting(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            found[name].append(given[0].detach().reshape(-1, given[0].shape[-1]))

        return hook

    hooks = [network.get_submodule(name).register_forward_pre_hook(collecting(name)) for name in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


# ---- GPTQ ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def gptq(weight: Tensor, x: Tensor, kind: Format, group: int, damp: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """A weight whose elements were rounded one input at a time, what each rounding adds to the output being taken out
    by the inputs not yet rounded.

    Args:
        weight: (O, D).
        x: (n, D) inputs of the layer.
        group: inputs that share a scale, which is that of the weight as it stands when the group begins.
        damp: share of the mean of the Hessian's diagonal that is added to it.

    Returns:
        (O, D) on the grid, and the scale and offset (O * D / group, 1) of its groups.
    """
    inputs = weight.shape[1]
    w = weight.double().clone()
    hessian = 2 * x.double().t() @ x.double()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    hessian += damp * hessian.diagonal().mean() * torch.eye(inputs, dtype=w.dtype, device=w.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    out, scale, offset = torch.zeros_like(w), [], []
    for j in range(inputs):
        if j % group == 0:
            s, o = scales(w[:, j : j + group].float(), kind)
            scale.append(s)
            offset.append(o)
        rounded = scale[-1] * on_grid(w[:, j : j + 1].float(), kind, scale[-1], offset[-1]) + offset[-1]
        out[:, j] = rounded[:, 0].double()
        error = (w[:, j] - out[:, j]) / upper[j, j]
        w[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return (
        out.to(weight.dtype),
        torch.stack(scale, 1).reshape(-1, 1),
        torch.stack(offset, 1).reshape(-1, 1),
    )


# ---- bits ------------------------------------------------------------------------------------------------------------


def total_bits(parameters: Mapping[str, Tensor], bits: Mapping[str, tuple[int, int]], full: int = 16) -> int:
    """Bits of parameters by name: b for each weight of a quantised layer and 16 for each scale (and each offset of a
    format that has one), `full` for everything else.

    Args:
        bits: name of a parameter -> (its bits, numbers stored for its groups).
    """
    total = 0
    for name, parameter in parameters.items():
        if name in bits:
            b, stored = bits[name]
            total += parameter.numel() * b + SCALE_BITS * stored
        else:
            total += parameter.numel() * full
    return total


def multiply_bits(macs: float, quantised_share: float, weights: int, activations: int, full: int = 16) -> float:
    """Multiply-adds weighted by the bits of both factors, of a network of which a share is quantised."""
    return macs * (quantised_share * weights * activations + (1 - quantised_share) * full * full)

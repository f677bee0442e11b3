"""Weights on a grid: bucketed linear scaling, uniform levels, straight-through training, and packed storage (Polino et
al., arXiv 1802.05668).

A tensor is flattened and cut into buckets of k consecutive elements; each bucket is scaled to [0, 1] by its minimum
`beta` and its range `alpha`, and every scaled element becomes one of s levels. `attach` makes a network compute with
quantised weights while its parameters stay in full precision (torch's parametrizations): nothing is overwritten, so
nothing has to be restored after an error, an interrupt or a kill.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stillhouse.errors import UserError
from stillhouse.files import atomic_write
from stillhouse.functional.precision import full_precision

CONSTANT = 1e-10
"""A bucket whose range is smaller is constant: it is scaled by 1, and reproduced exactly."""
MOST_BITS = 16


# ---- mathematics -----------------------------------------------------------------------------------------------------


def buckets(x: Tensor, size: int | None) -> Tensor:
    """The elements of x in rows of `size`, the last row filled up with the last element; one shorter row where x is
    smaller; one row for None."""
    flat = x.reshape(-1)
    if size is None or len(flat) <= size:
        return flat.unsqueeze(0)
    return torch.cat([flat, flat[-1:].expand(-len(flat) % size)]).view(-1, size)


@full_precision
def scale(x: Tensor, bucket: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled elements in [0, 1] (n, k), and the range alpha and the minimum beta of each of the n buckets, (n, 1);
    alpha is 1 for a constant bucket."""
    rows = buckets(x, bucket)
    beta, top = rows.aminmax(dim=1, keepdim=True)
    alpha = top - beta
    alpha = torch.where(alpha < CONSTANT, torch.ones_like(alpha), alpha)
    return (rows - beta) / alpha, alpha, beta


def unscale(scaled: Tensor, alpha: Tensor, beta: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `scale`: (n, k) back to a tensor of that shape, without the filling."""
    return (alpha * scaled + beta).reshape(-1)[: math.prod(shape)].view(*shape)


def uniform_codes(scaled: Tensor, levels: int, stochastic: bool = False) -> Tensor:
    """The level, 0 … levels - 1 (as floats), of each scaled element: the nearest one (a tie goes to the even one), or
    at random so that the mean is unchanged."""
    steps = scaled * (levels - 1)
    return (steps + torch.rand_like(steps)).floor().clamp_max(levels - 1) if stochastic else steps.round()


@full_precision
def quantise_uniform(x: Tensor, levels: int, bucket: int | None, stochastic: bool = False) -> Tensor:
    """x with each element at one of `levels` evenly spaced values of its bucket; the smallest and the largest of a
    bucket are reproduced.

    Args:
        x: any shape, finite.
        levels: s, at least 2.
        bucket: k; None: one for the whole tensor.
        stochastic: round up with the probability of the remainder, which is unbiased, in place of to the nearest.
    """
    scaled, alpha, beta = scale(x, bucket)
    return unscale(uniform_codes(scaled, levels, stochastic) / (levels - 1), alpha, beta, x.shape)


def nearest_points(scaled: Tensor, points: Tensor) -> Tensor:
    """The index of the nearest of sorted points (p,) for each scaled element; an element half-way between two takes the
    upper one."""
    return torch.bucketize(scaled.detach(), ((points[1:] + points[:-1]) / 2).detach(), right=True)


class _StraightThrough(torch.autograd.Function):
    """The quantised tensor, with the gradient of the identity; that of elements outside [-limit, limit] is zero where
    there is a limit."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, quantised: Tensor, limit: float | None) -> Tensor:
        if limit is not None:
            ctx.save_for_backward(x.abs() <= limit)
        return quantised

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        inside = ctx.saved_tensors  # type: ignore[attr-defined]
        return (gradients[0] * inside[0] if inside else gradients[0]), None, None


def straight_through(x: Tensor, quantised: Tensor, limit: float | None = None) -> Tensor:
    """`quantised`, to the last bit, with the gradient of x; that of elements outside [-limit, limit] is zero."""
    result: Tensor = _StraightThrough.apply(x, quantised, limit)
    return result


# ---- levels of a tensor ----------------------------------------------------------------------------------------------


class Levels(nn.Module):
    """The levels of one weight tensor, as a parametrization of it: `forward` gives the quantised weight, `pack` what is
    stored."""

    def pack(self, weight: Tensor) -> PackedTensor:
        """Codes and scales of a full-precision weight."""
        raise NotImplementedError


class UniformLevels(Levels):
    """Evenly spaced levels; the gradient passes straight through.

    Args:
        levels: s, at least 2.
        bucket: k, or None for the whole tensor.
        stochastic: round at random in training mode (see `quantise_uniform`).
        limit: clamp weights to [-limit, limit] first, without gradient outside.
    """

    def __init__(self, levels: int, bucket: int | None, stochastic: bool = False, limit: float | None = None) -> None:
        super().__init__()
        check(levels, bucket)
        self.levels, self.bucket, self.stochastic, self.limit = levels, bucket, stochastic, limit

    def _clamped(self, weight: Tensor) -> Tensor:
        return weight.detach() if self.limit is None else weight.detach().clamp(-self.limit, self.limit)

    def forward(self, weight: Tensor) -> Tensor:
        quantised = quantise_uniform(
            self._clamped(weight),
            self.levels,
            self.bucket,
            self.stochastic and self.training,
        ).to(weight.dtype)
        return straight_through(weight, quantised, self.limit)

    @torch.no_grad()
    def pack(self, weight: Tensor) -> PackedTensor:
        scaled, alpha, beta = scale(self._clamped(weight), self.bucket)
        return packed(uniform_codes(scaled, self.levels), self.levels, alpha, beta, weight.shape, self.bucket)


def check(levels: int, bucket: int | None) -> None:
    """Raises `UserError` for levels or a bucket that cannot be."""
    if not 2 <= levels <= 2**MOST_BITS:
        raise UserError(f"A tensor is quantised to 2 … {2**MOST_BITS} levels; given: {levels}.")
    if bucket is not None and bucket < 1:
        raise UserError(f"A bucket holds at least one element; given: {bucket}.")


# ---- a network with quantised weights --------------------------------------------------------------------------------


def attach(network: nn.Module, levels: Mapping[str, Levels]) -> None:
    """Make a network compute with quantised weights; its parameters stay in full precision and collect the gradient
    taken at the quantised ones.

    Args:
        network: changed in place; its parameters are named `….parametrizations.NAME.original` from now on.
        levels: by name of a parameter, as in `network.named_parameters()`; a tied parameter is named once and quantised
            wherever it is used.

    Raises:
        UserError: weights that are not finite, or of a recurrent layer, whose kernel reads copies of its weights.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((module, name))
    parameters = dict(network.named_parameters())
    for name, level in levels.items():
        if not bool(torch.isfinite(parameters[name]).all()):
            raise UserError(f"The weights '{name}' are not finite, so they cannot be quantised.")
        for module, short in places[id(parameters[name])]:
            if isinstance(module, nn.RNNBase):
                raise UserError(
                    f"'{name}' belongs to a recurrent layer ({type(module).__name__}), whose kernel reads its own "
                    "copies.",
                )
            parametrize.register_parametrization(module, short, level)


def quantisable(
    network: nn.Module,
    only: Callable[[Tensor], bool] | None = None,
    first_and_last: bool = True,
) -> list[str]:
    """Names of the parameters to quantise, in the order in which they are registered.

    Args:
        only: which of them; default: all.
        first_and_last: False leaves out the first and the last parameter tensor (the last is usually a bias).
    """
    names = [name for name, _ in network.named_parameters()]
    chosen = {name for name, p in network.named_parameters() if only is None or only(p)}
    return [n for n in (names if first_and_last else names[1:-1]) if n in chosen]


def attached(network: nn.Module) -> dict[str, tuple[Levels, Tensor]]:
    """The levels and the full-precision weight of every quantised parameter, by the name that it has without them; a
    tied one under all its names."""
    found: dict[str, tuple[Levels, Tensor]] = {}
    for path, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], Levels):
            found[path.replace(".parametrizations.", ".").removeprefix("parametrizations.")] = (
                module[0],
                module.original,
            )
    return found


def detach(network: nn.Module, quantised: bool = True) -> dict[str, PackedTensor]:
    """Take the levels off a network, which is left with its quantised (or full-precision) weights; returns the codes of
    each, a tied one once."""
    codes: dict[str, PackedTensor] = {}
    seen: set[int] = set()
    for name, (level, weight) in attached(network).items():
        if id(weight) not in seen:
            codes[name] = level.pack(weight)
        seen.add(id(weight))
    for name, (_, weight) in attached(network).items():
        path, _, short = name.rpartition(".")
        module = network.get_submodule(path)
        parametrize.remove_parametrizations(module, short, leave_parametrized=False)
        if quantised and name in codes:
            with torch.no_grad():
                weight.copy_(codes[name].unpack())
    return codes


# ---- storage ---------------------------------------------------------------------------------------------------------


@dataclass
class PackedTensor:
    """A quantised tensor as it is stored.

    Attributes:
        codes: (ceil(n * bits / 8),) uint8, the codes of the n elements one after another, `bits` each, lowest bit
            first.
        levels: s; bits = ceil(log2 s).
        alpha, beta: (buckets,) float32.
        shape, bucket: of the tensor.
        points: (s,) float32, the levels in scaled space; None: evenly spaced.
    """

    codes: Tensor
    levels: int
    alpha: Tensor
    beta: Tensor
    shape: tuple[int, ...]
    bucket: int | None
    points: Tensor | None = None

    @property
    def bits(self) -> int:
        return bits_of(self.levels)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def indices(self) -> Tensor:
        """(n,) the codes as integers."""
        bits = np.unpackbits(self.codes.numpy(), count=self.count * self.bits, bitorder="little").reshape(
            self.count,
            self.bits,
        )
        codes = np.zeros(self.count, np.int64)
        for place in range(self.bits):
            codes |= bits[:, place].astype(np.int64) << place
        return torch.from_numpy(codes)

    def unpack(self) -> Tensor:
        """The quantised tensor, float32."""
        indices = self.indices
        scaled = indices.float() / (self.levels - 1) if self.points is None else self.points[indices]
        return unscale(buckets(scaled, self.bucket), self.alpha.unsqueeze(1), self.beta.unsqueeze(1), self.shape)


def bits_of(levels: int) -> int:
    """Bits of a code of fixed length."""
    return max(1, math.ceil(math.log2(levels)))


def packed(
    codes: Tensor,
    levels: int,
    alpha: Tensor,
    beta: Tensor,
    shape: Sequence[int],
    bucket: int | None,
    points: Tensor | None = None,
) -> PackedTensor:
    """Codes in rows (n, k) with their scales, packed; on the CPU."""
    flat = codes.reshape(-1)[: math.prod(shape)].to("cpu", torch.int32).numpy()
    bits = np.stack([(flat >> place & 1).astype(np.uint8) for place in range(bits_of(levels))], axis=1)
    packed = torch.from_numpy(np.packbits(bits.reshape(-1), bitorder="little"))
    alpha, beta = (v.detach().reshape(-1).float().cpu() for v in (alpha, beta))
    return PackedTensor(
        packed,
        levels,
        alpha,
        beta,
        tuple(shape),
        bucket,
        None if points is None else points.detach().float().cpu(),
    )


def save(codes: Mapping[str, PackedTensor], others: Mapping[str, Tensor], path: Path) -> None:
    """Write quantised tensors, and others as they are, into one safetensors file; the layout of the codes is in its
    header."""
    from safetensors.torch import save_file

    tensors = {f"other:{name}": value.contiguous() for name, value in others.items()}
    if codes:
        tensors["codes"] = torch.cat([c.codes for c in codes.values()])
        tensors["scales"] = torch.cat([torch.stack([c.alpha, c.beta]) for c in codes.values()], dim=1)
    points = [c.points for c in codes.values() if c.points is not None]
    if points:
        tensors["points"] = torch.cat(points)
    layout = [[name, list(c.shape), c.levels, c.bucket, c.points is not None] for name, c in codes.items()]
    with atomic_write(path) as temporary:
        save_file(tensors, str(temporary), {"layout": json.dumps(layout)})


def load(path: Path) -> tuple[dict[str, PackedTensor], dict[str, Tensor]]:
    """What `save` wrote: the quantised tensors and the others."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        layout = json.loads((file.metadata() or {}).get("layout", "[]"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    codes: dict[str, PackedTensor] = {}
    at = rows = point = 0
    for name, shape, levels, bucket, learned in layout:
        count = math.prod(shape)
        size, own = -(-count * bits_of(levels) // 8), 1 if bucket is None else max(1, -(-count // bucket))
        alpha, beta = tensors["scales"][:, rows : rows + own]
        points = tensors["points"][point : point + levels] if learned else None
        codes[name] = PackedTensor(tensors["codes"][at : at + size], levels, alpha, beta, tuple(shape), bucket, points)
        at, rows, point = at + size, rows + own, point + levels * learned
    return codes, {name.removeprefix("other:"): value for name, value in tensors.items() if name.startswith("other:")}

"""The order of a clip's tokens along a generalised Hilbert curve, which fills a box of any sides: tokens that follow
each other are neighbours in space and time, so that a block of them is compact."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

Vector = tuple[int, int, int]


def _plus(*vectors: Vector) -> Vector:
    x, y, z = (sum(parts) for parts in zip(*vectors))
    return x, y, z


def _minus(a: Vector, b: Vector) -> Vector:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def _length(a: Vector) -> int:
    return abs(sum(a))


def _unit(a: Vector) -> Vector:
    x, y, z = ((v > 0) - (v < 0) for v in a)
    return x, y, z


def _half(a: Vector) -> Vector:
    """Half an axis, of an even length where that is not too short."""
    x, y, z = (v // 2 for v in a)
    half = (x, y, z)
    return _plus(half, _unit(a)) if _length(half) % 2 and _length(a) > 2 else half


def _along(start: Vector, a: Vector, b: Vector, c: Vector) -> Iterator[Vector]:
    """The points of the box that `start` and three axes span, from `start` to the far end of the axis `a`."""
    lengths = w, h, d = _length(a), _length(b), _length(c)
    if 0 in lengths:  # the rest of an axis of one
        return
    if sorted(lengths)[:2] == [1, 1]:
        axis = max((a, b, c), key=_length)
        at = start
        for _ in range(_length(axis)):
            yield at
            at = _plus(at, _unit(axis))
        return
    ua, ub, uc = _unit(a), _unit(b), _unit(c)
    a2, b2, c2 = _half(a), _half(b), _half(c)
    nothing: Vector = (0, 0, 0)
    end_a, end_c = _minus(a, ua), _minus(c, uc)  # to the last point along an axis
    rest_a, rest_b, rest_c = _minus(a, a2), _minus(b, b2), _minus(c, c2)
    back = lambda v: _minus(nothing, v)  # noqa: E731
    if 2 * w > 3 * h and 2 * w > 3 * d:  # long: halves, one after the other
        parts = [(nothing, a2, b, c), (a2, rest_a, b, c)]
    elif 3 * h > 4 * d:  # flat in the third axis
        turned = _plus(end_a, _minus(b2, ub))
        parts = [(nothing, b2, c, a2), (b2, a, rest_b, c), (turned, back(b2), c, back(rest_a))]
    elif 3 * d > 4 * h:  # flat in the second
        turned = _plus(end_a, _minus(c2, uc))
        parts = [(nothing, c2, a2, b), (c2, a, b, rest_c), (turned, back(c2), back(rest_a), b)]
    else:
        parts = [
            (nothing, b2, c2, a2),
            (b2, c, a2, rest_b),
            (_plus(_minus(b2, ub), end_c), a, back(b2), back(rest_c)),
            (_plus(end_a, b2, end_c), back(c), back(rest_a), rest_b),
            (_plus(end_a, _minus(b2, ub)), back(b2), c2, back(rest_a)),
        ]
    for offset, first, second, third in parts:
        yield from _along(_plus(start, offset), first, second, third)


@lru_cache(maxsize=16)
def hilbert_order(width: int, height: int, depth: int) -> tuple[Tensor, Tensor]:
    """The tokens of a box in the order of the curve: positions x + width (y + height z), (L,) int64; and where each
    token stands in that order, (L,).

    The curve begins along the longest axis.
    """
    axes: list[Vector] = [(width, 0, 0), (0, height, 0), (0, 0, depth)]
    longest = max(range(3), key=lambda i: (width, height, depth)[i])
    a, b, c = axes[longest], *(axis for i, axis in enumerate(axes) if i != longest)
    order = torch.tensor([x + width * (y + height * z) for x, y, z in _along((0, 0, 0), a, b, c)])
    return order, order.argsort()

"""The exact learning curves of deep linear JEPA and MAE from a balanced, aligned start (2407.03475), feature by
feature, in float64.

A feature has a covariance lam of x and y and a regression coefficient rho = lam / var x. Every layer and the predictor
carry one scalar w(t): JEPA dw/dt = lam w^(2L) (1 - w / rho), MAE dw/dt = lam w^L (1 - w^(L+1) / rho), from
w(0) = scale. The encoder's gain is a = w^L.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from stillhouse.errors import UserError

Kind = Literal["jepa", "mae"]
Array = np.ndarray[Any, np.dtype[np.float64]]
KINDS: tuple[Kind, ...] = ("jepa", "mae")
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def velocity(w: Array, lam: Array, rho: Array, depth: int, kind: Kind) -> Array:
    """dw/dt of the layer scale w; all arrays broadcast."""
    return lam * w ** (2 * depth) * (1 - w / rho) if kind == "jepa" else lam * w**depth * (1 - w ** (depth + 1) / rho)


def fixed_point(rho: Array | float, depth: int, kind: Kind) -> Array:
    """Where w ends: rho for JEPA, rho^(1 / (L + 1)) for MAE; the encoder's gain there is its L-th power.

    Features with rho <= 0 end at 0.
    """
    found = np.maximum(np.asarray(rho, dtype=np.float64), 0.0)
    return found if kind == "jepa" else found ** (1 / (depth + 1))


def encoder_gain(rho: Array | float, depth: int, kind: Kind) -> Array:
    """The final gain of the encoder: rho^L for JEPA, rho^(L / (L + 1)) for MAE."""
    return fixed_point(rho, depth, kind) ** depth


def learned(lam: Array, rho: Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which features grow from a positive start: those with lam > 0 and rho > 0."""
    return (np.asarray(lam) > 0) & (np.asarray(rho) > 0)


def check(depth: int, scale: float, rho: Array, share: float, kind: Kind) -> None:
    """Raise `UserError` for options out of range, and where the start is not below `share` of every learned feature's
    end."""
    if depth < 1:
        raise UserError(f"jepa_bias: depth must be at least 1; given: {depth}.")
    if not scale > 0:
        raise UserError(f"jepa_bias: scale must be above 0; given: {scale}.")
    if not 0 < share < 1:
        raise UserError(f"jepa_bias: share must lie between 0 and 1; given: {share}.")
    positive = np.asarray(rho, dtype=np.float64).reshape(-1)
    positive = positive[positive > 0]
    if positive.size:
        end = float(fixed_point(positive.min(), depth, kind))
        if scale >= share * end:
            raise UserError(
                f"jepa_bias: the layer scale {scale:g} must be below {share:g} of where the slowest feature (rho "
                f"{positive.min():g}) ends under "
                f"{kind}, {share * end:.4g}; lower the scale."
            )


def critical_time(
    lam: Array | float,
    rho: Array | float,
    depth: int,
    scale: float,
    kind: Kind,
    share: float = 0.5,
    *,
    of: Literal["layer", "gain"] = "layer",
) -> Array:
    """The time at which a feature reaches a share of its end: closed form for JEPA, closed form plus a smooth
    quadrature for MAE.

    Args:
        lam, rho: of the features; broadcast.
        depth: L, layers of the encoder (the predictor is one more).
        scale: w(0).
        share: p of p w*.
        of: `layer`: w reaches p w*, the published reading; `gain`: w^L reaches p w*^L.

    Returns:
        Times; infinite for a feature that is never learned (lam <= 0 or rho <= 0).

    Raises:
        UserError: see `check`.
    """
    reach = share if of == "layer" else share ** (1 / depth)
    lam, rho = np.broadcast_arrays(np.asarray(lam, dtype=np.float64), np.asarray(rho, dtype=np.float64))
    check(depth, scale, rho, reach, kind)
    grows = learned(lam, rho)
    x = np.full(lam.shape, np.log(reach) - np.log1p(-reach))
    out = np.full(lam.shape, np.inf)
    out[grows] = _time(x[grows], lam[grows], rho[grows], depth, scale, kind)
    return out


def reaching_time(w: Array, lam: Array, rho: Array, depth: int, scale: float, kind: Kind) -> Array:
    """The exact time at which the layer scale is w, scale <= w < w*; arrays of features that are learned broadcast.

    The inverse of `trajectory`.
    """
    w, lam, rho = np.broadcast_arrays(np.asarray(w, dtype=np.float64), lam, rho)
    return _time(np.log(w) - np.log(fixed_point(rho, depth, kind) - w), lam, rho, depth, scale, kind)


def trajectory(times: Array, lam: Array, rho: Array, depth: int, scale: float, kind: Kind) -> Array:
    """w at given times: (T,) times and (d,) features -> (T, d), the exact t(w) inverted by bisection. NaN for features
    that are never learned.

    Raises:
        UserError: a start that is not below where a learned feature ends.
    """
    lam, rho = np.asarray(lam, dtype=np.float64), np.asarray(rho, dtype=np.float64)
    check(depth, scale, rho, 1 - 1e-9, kind)
    grows = learned(lam, rho)
    out = np.full((len(times), len(lam)), np.nan)
    if not grows.any():
        return out
    a, r = np.broadcast_arrays(lam[grows], rho[grows])
    end = fixed_point(r, depth, kind)
    start = np.log(scale) - np.log(end - scale)
    low, high = (np.broadcast_to(v, (len(times), a.size)).copy() for v in (start, np.maximum(start, 0) + 60))
    wanted = np.asarray(times, dtype=np.float64)[:, None]
    for _ in range(70):
        middle = (low + high) / 2
        early = _time(middle, a, r, depth, scale, kind) < wanted
        low, high = np.where(early, middle, low), np.where(early, high, middle)
    out[:, grows] = end * _sigmoid((low + high) / 2)
    return out


def _time(x: Array, lam: Array, rho: Array, depth: int, scale: float, kind: Kind) -> Array:
    """The time until w = w* sigmoid(x), from w = scale."""
    end = fixed_point(rho, depth, kind)
    first, v = scale / end, _sigmoid(x)
    w = end * v
    odds = x - np.log(first) + np.log1p(-first)  # ln of (v / (1 - v)) over the same at the start
    if kind == "jepa":
        powers = sum((scale**-n - w**-n) / (n * rho ** (2 * depth - 1 - n)) for n in range(1, 2 * depth))
        return (powers + odds / rho ** (2 * depth - 1)) / lam
    # 1 / (w^L (1 - v^(L+1))) = w^-L + (w / rho) / (1 - v^(L+1)), and v / (1 - v^(L+1)) = 1 / ((L+1) (1 - v)) + a smooth
    # rest
    power = np.log(w / scale) if depth == 1 else (scale ** (1 - depth) - w ** (1 - depth)) / (depth - 1)
    singular = (np.logaddexp(0, x) + np.log1p(-first)) / (depth + 1)
    half = (v - first) / 2
    nodes = first[..., None] + half[..., None] * (1 + _NODES)
    geometric = sum(nodes**k for k in range(depth + 1))  # (1 - v^(L+1)) / (1 - v)
    # rest = [v - geometric / (L+1)] / [(1 - v) geometric]; the bracket has the root v = 1, divided out: -sum_j c_j v^j
    bracket = sum(_rest_coefficient(j, depth) * nodes**j for j in range(depth))
    smooth = half * (bracket / geometric * _WEIGHTS).sum(-1)
    return (power + end**2 / rho * (singular + smooth)) / lam


def _rest_coefficient(j: int, depth: int) -> float:
    """Of v^j in [v - (1 + v + … + v^L) / (L+1)] / (1 - v): partial sums of the numerator's coefficients."""
    return float(j >= 1) - (j + 1) / (depth + 1)


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))

"""Functional maps between meshes: descriptors of spectra, the regularised solve and its masks, point maps, ZoomOut.

A functional map C (k, k) takes coefficients in the Laplacian's eigenbasis of shape 1 to those of shape 2. `basis` is
(V, K) eigenvectors, orthonormal under the lumped mass; `evals` (K,) eigenvalues, rising, of meshes of unit area.
Ovsjanikov et al. 2012; descriptors of Sun et al. 2009 (HKS) and Aubry et al. 2011 (WKS); ZoomOut of Melzi et al. 2019.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stillhouse.errors import UserError

CHUNK = 4096  # points whose distances to all others are there at a time


def heat_kernel_signature(evals: Tensor, basis: Tensor, count: int, mass: Tensor | None = None) -> Tensor:
    """(V, count) HKS at times spaced geometrically from 4 ln 10 / the largest to 4 ln 10 / the first positive
    eigenvalue; with `mass` (V,), each column divided by its norm."""
    _spectrum(evals, basis)
    ends = torch.log(4 * math.log(10) / torch.stack([evals[-1], evals[1]]))
    times = torch.linspace(0, 1, count, dtype=evals.dtype, device=evals.device) * (ends[1] - ends[0]) + ends[0]
    weights = torch.exp(-times.exp()[:, None] * evals)
    return _normed((basis.square() @ weights.T) / weights.sum(1), mass)


def wave_kernel_signature(evals: Tensor, basis: Tensor, count: int, mass: Tensor | None = None) -> Tensor:
    """(V, count) WKS over the eigenvalues above 1e-5, with windows of width 7 (ln largest - ln smallest) / count; with
    `mass` (V,), each column divided by its norm."""
    _spectrum(evals, basis)
    positive = evals > 1e-5
    logs, squares = evals[positive].log(), basis[:, positive].square()
    width = 7 * (logs[-1] - logs[0]) / count
    steps = torch.linspace(0, 1, count, dtype=evals.dtype, device=evals.device)
    low, high = logs[0] + 2 * width, logs[-1] - 2 * width
    energies = low + steps * (high - low)
    weights = torch.exp(-((energies[:, None] - logs) ** 2) / (2 * width**2))
    return _normed((squares @ weights.T) / weights.sum(1), mass)


def _spectrum(evals: Tensor, basis: Tensor) -> None:
    if evals.ndim != 1 or basis.ndim != 2 or basis.shape[1] != len(evals) or len(evals) < 3:
        raise UserError(
            f"A spectrum is eigenvalues (K,) and eigenvectors (V, K), K of 3 at least; given: {tuple(evals.shape)} and "
            f"{tuple(basis.shape)}."
        )


def _normed(columns: Tensor, mass: Tensor | None) -> Tensor:
    if mass is None:
        return columns
    return columns / (mass[:, None] * columns.square()).sum(0).sqrt()


def laplacian_mask(evals1: Tensor, evals2: Tensor) -> Tensor:
    """(k, k) squared differences of eigenvalues, shape 2's by row."""
    return (evals2[:, None] - evals1[None]).square()


def resolvent_mask(evals1: Tensor, evals2: Tensor, gamma: float = 0.5) -> Tensor:
    """(k, k) squared distances of the resolvents of eigenvalues over their common largest, to the power gamma (Ren et
    al. 2019)."""
    largest = torch.maximum(evals1.max(), evals2.max())
    one, two = ((evals / largest) ** gamma for evals in (evals1, evals2))
    one, two = one[None], two[:, None]
    real = two / (two.square() + 1) - one / (one.square() + 1)
    imaginary = 1 / (two.square() + 1) - 1 / (one.square() + 1)
    return real.square() + imaginary.square()


def solved_map(
    first: Tensor, second: Tensor, mask: Tensor | None = None, weight: float = 0.0, ridge: float = 0.0
) -> Tensor:
    """The functional map with C A near B: the minimiser of |C A - B|^2 + weight sum_ij D_ij C_ij^2, all rows in one
    batch of solves.

    Args:
        first, second: A and B (k, d), coefficients of d features on shapes 1 and 2.
        mask: D (k, k); None: none.
        ridge: added to the diagonal of A A^T, in shares of its mean, where features are few or alike.
    """
    if first.shape != second.shape or first.ndim != 2:
        raise UserError(
            f"A functional map is solved from coefficients of one shape (k, d); given: {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        )
    gram, cross = first @ first.T, first @ second.T
    if ridge:
        gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if mask is None or not weight:
        return torch.linalg.solve(gram, cross).T
    systems = gram + weight * torch.diag_embed(mask)
    return torch.linalg.solve(systems, cross.T[..., None])[..., 0]


def nearest_rows(among: Tensor, of: Tensor) -> Tensor:
    """(M,) for each row of `of` (M, k) the nearest row of `among` (N, k), some rows at a time."""
    squares = among.square().sum(1)
    found = [(squares - 2 * part @ among.T).argmin(1) for part in of.split(CHUNK)]
    return torch.cat(found)


def point_map(functional: Tensor, basis1: Tensor, basis2: Tensor) -> Tensor:
    """(V2,) for each vertex of shape 2 its vertex of shape 1: argmin_i |Phi1_i C^T - Phi2_j|."""
    k2, k1 = functional.shape
    return nearest_rows(basis1[:, :k1] @ functional.T, basis2[:, :k2])


def soft_point_map(functional: Tensor, basis1: Tensor, basis2: Tensor, temperature: float = 0.07) -> Tensor:
    """(V2, V1) softmax over shape 1's vertices of (Phi2 C) Phi1^T over a temperature."""
    k2, k1 = functional.shape
    return ((basis2[:, :k2] @ functional) @ basis1[:, :k1].T / temperature).softmax(1)


def map_of_points(points: Tensor, basis1: Tensor, basis2: Tensor, mass2: Tensor | None, size: int) -> Tensor:
    """The functional map (size, size) of a point map (V2,): Phi2^T M2 Phi1[points]; without the mass, as of some points
    of a mesh alone, by least squares, Phi2 C = Phi1[points]."""
    second, wanted = basis2[:, :size], basis1[points][:, :size]
    if mass2 is None:
        return torch.linalg.solve(second.T @ second, second.T @ wanted)
    return (second * mass2[:, None]).T @ wanted


def zoomed_out(
    functional: Tensor, basis1: Tensor, basis2: Tensor, mass2: Tensor | None, size: int, step: int = 1
) -> tuple[Tensor, Tensor]:
    """ZoomOut: a functional map refined by turns with its point map, while it grows to `size`; it and its point map.
    Where the bases are those of some points, `mass2` is None."""
    if size > min(basis1.shape[1], basis2.shape[1]):
        raise UserError(
            f"ZoomOut to {size} needs as many eigenvectors; there are {basis1.shape[1]} and {basis2.shape[1]}."
        )
    k = functional.shape[0]
    while k < size:
        k = min(k + step, size)
        functional = map_of_points(point_map(functional, basis1, basis2), basis1, basis2, mass2, k)
    return functional, point_map(functional, basis1, basis2)

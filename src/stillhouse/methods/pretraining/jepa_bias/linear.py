"""Deep linear JEPA and MAE themselves: second moments of pairs, the balanced start, closed-form gradients, and their
flow in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.methods.pretraining.jepa_bias.theory import Kind
from stillhouse.randomness import generator

Weights = list[Tensor]
"""W_1 … W_L and the predictor V, each (d, d) float64."""


@dataclass(frozen=True)
class Moments:
    """E[x x^T], E[y x^T] and E[y y^T] of centred pairs, each (d, d) float64."""

    xx: Tensor
    yx: Tensor
    yy: Tensor

    @classmethod
    def of_features(cls, lam: Tensor, rho: Tensor, basis: Tensor | None = None) -> Moments:
        """Moments of features with covariance lam and coefficient rho (d,), var x = var y = lam / rho, along the
        columns of an orthogonal basis.

        Raises:
            UserError: a feature without variance.
        """
        variance = lam.double() / rho.double()
        if not bool(((variance > 0) & variance.isfinite()).all()):
            raise UserError(
                "jepa_bias: every feature needs a variance lam / rho above 0; one has lam 0, or lam and rho of "
                "opposite sign."
            )
        u = torch.eye(len(lam), dtype=torch.float64) if basis is None else basis.double()
        return cls(u * variance @ u.T, u * lam.double() @ u.T, u * variance @ u.T)

    @classmethod
    def of_samples(cls, x: Tensor, y: Tensor) -> Moments:
        """Estimated from n pairs (n, d), centred here.

        Raises `UserError` for shapes that differ or a coordinate of x that is constant.
        """
        if x.shape != y.shape or x.ndim != 2:
            raise UserError(
                f"jepa_bias: x and y must be (n, d) of one shape; given: {tuple(x.shape)} and {tuple(y.shape)}."
            )
        x, y = (v.double() - v.double().mean(0) for v in (x, y))
        xx = x.T @ x / len(x)
        if not bool((xx.diagonal() > 0).all()):
            raise UserError(
                f"jepa_bias: coordinate {int((xx.diagonal() <= 0).nonzero()[0])} of x is constant, so it has no "
                "regression coefficient."
            )
        return cls(xx, y.T @ x / len(x), y.T @ y / len(x))

    def commutator(self) -> float:
        """||S_xx S_yx - S_yx S_xx|| / (||S_xx|| ||S_yx||), Frobenius: 0 where the exact theory holds."""
        return float(
            torch.linalg.norm(self.xx @ self.yx - self.yx @ self.xx)
            / (torch.linalg.norm(self.xx) * torch.linalg.norm(self.yx))
        )

    def features(self) -> tuple[Tensor, Tensor, Tensor]:
        """The common eigenbasis (d, d), lam and rho (d,), in order of falling lam; approximate where the moments do not
        commute."""
        yx = (self.yx + self.yx.T) / 2
        mixed = self.xx / torch.linalg.norm(self.xx) + 0.7853 * yx / torch.linalg.norm(
            yx
        )  # separates features that agree in one of the two
        basis = torch.linalg.eigh(mixed).eigenvectors
        lam, variance = (torch.einsum("ji,jk,ki->i", basis, s, basis) for s in (yx, self.xx))
        order = lam.argsort(descending=True)
        return basis[:, order], lam[order], (lam / variance)[order]

    def generalised_rho(self) -> Tensor:
        """The generalised eigenvalues of (S_yx, S_xx), falling, (d,): a diagnostic where the moments do not commute."""
        root = torch.linalg.cholesky(self.xx)
        half = torch.linalg.solve_triangular(root, (self.yx + self.yx.T) / 2, upper=False)
        return torch.linalg.eigvalsh(torch.linalg.solve_triangular(root, half.T, upper=False)).flip(0)


def static_features(variance: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """lam and rho of x = z + n, y = z + n': var z and the variance of the noise, (d,) each."""
    return variance, variance / (variance + noise)


def temporal_features(variance: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """lam and rho of neighbours x = z_t, y = z_(t+1) of z' = gamma z + sqrt(1 - gamma^2) xi with the given variances,
    (d,) each."""
    return gamma * variance, gamma


def sample_static(n: int, variance: Tensor, noise: Tensor, *keys: int | str) -> tuple[Tensor, Tensor]:
    """n pairs of the static model, (n, d) each."""
    g, d = generator("static", *keys), len(variance)
    z = torch.randn(n, d, generator=g, dtype=torch.float64) * variance.sqrt()
    x, y = (z + torch.randn(n, d, generator=g, dtype=torch.float64) * noise.sqrt() for _ in range(2))
    return x, y


def sample_temporal(n: int, variance: Tensor, gamma: Tensor, *keys: int | str) -> tuple[Tensor, Tensor]:
    """n independent pairs of neighbours of the temporal model, (n, d) each."""
    g, d = generator("temporal", *keys), len(variance)
    now, new = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2))
    return now * variance.sqrt(), (gamma * now + (1 - gamma.square()).sqrt() * new) * variance.sqrt()


def orthogonal(d: int, *keys: int | str) -> Tensor:
    """A random orthogonal matrix (d, d), float64."""
    return torch.linalg.qr(torch.randn(d, d, generator=generator("orthogonal", *keys), dtype=torch.float64)).Q


def balanced_start(basis: Tensor, depth: int, scale: float, kind: Kind, seed: int = 0) -> Weights:
    """W_l = scale R_(l+1) R_l^T with R_1 the eigenbasis and random orthogonal R_2 …, and V = scale I (JEPA) or scale
    R_1 R_(L+1)^T (MAE)."""
    d = len(basis)
    turns = [basis.double(), *(orthogonal(d, seed, layer) for layer in range(depth))]
    last = scale * torch.eye(d, dtype=torch.float64) if kind == "jepa" else scale * turns[0] @ turns[-1].T
    return [*(scale * b @ a.T for a, b in itertools.pairwise(turns)), last]


def encoder(weights: Sequence[Tensor]) -> Tensor:
    """A = W_L … W_1, (d, d); the last of `weights` is the predictor."""
    out = weights[0]
    for w in weights[1:-1]:
        out = w @ out
    return out


def gains(weights: Sequence[Tensor], basis: Tensor) -> Tensor:
    """|A u_i| for every feature (column of the basis), (d,): the encoder's gain a = w^L where it is aligned."""
    return torch.linalg.norm(encoder(weights) @ basis, dim=0)


def leakage(weights: Sequence[Tensor], basis: Tensor) -> float:
    """The largest |cosine| between what the encoder makes of two features: 0 where they stay apart."""
    made = encoder(weights) @ basis
    made = made / torch.linalg.norm(made, dim=0).clamp_min(1e-300)
    return float((made.T @ made - torch.eye(len(basis), dtype=made.dtype)).abs().max())


def loss(weights: Sequence[Tensor], moments: Moments, kind: Kind) -> Tensor:
    """1/2 E|V A x - sg(A y)|^2 or 1/2 E|V A x - y|^2, a scalar; differentiable, with the stop-gradient in place."""
    a = encoder(weights)
    target = a.detach() if kind == "jepa" else torch.eye(len(a), dtype=a.dtype)
    made = weights[-1] @ a
    return 0.5 * (
        (made @ moments.xx * made).sum()
        - 2 * (made * (target @ moments.yx)).sum()
        + (target @ moments.yy * target).sum()
    )


def gradients(weights: Sequence[Tensor], moments: Moments, kind: Kind) -> Weights:
    """The closed-form gradients: R = V A S_xx - B S_yx, dV = R A^T, dW_l = (W_L … W_(l+1))^T V^T R (W_(l-1) …
    W_1)^T."""
    below = [weights[0]]  # products from the input upwards
    for w in weights[1:-1]:
        below.append(w @ below[-1])
    a, v = below[-1], weights[-1]
    rest = v @ a @ moments.xx - (a @ moments.yx if kind == "jepa" else moments.yx)
    out = [rest @ a.T]
    back = v.T @ rest
    for layer in range(len(weights) - 2, 0, -1):
        out.append(back @ below[layer - 1].T)
        back = weights[layer].T @ back
    return [back, *reversed(out)]


def descend(weights: Weights, derivative: Callable[[Weights], Weights], span: float, step: float) -> Weights:
    """Plain gradient descent over a span of time, in equal steps of at most `step`."""
    count = max(int(-(-span // step)), 1)
    for _ in range(count):
        weights = [w - span / count * g for w, g in zip(weights, derivative(weights))]
    return weights


def flow(
    weights: Weights, derivative: Callable[[Weights], Weights], span: float, tolerance: float, step: float
) -> tuple[Weights, float, int]:
    """The gradient flow over a span of time by Bogacki and Shampine's pair of orders 3 and 2, with steps as long as the
    error allows.

    Args:
        derivative: the gradients; the flow goes against them.
        tolerance: of the error of a step, relative to the largest weight.
        step: the first step to try; the last one is returned, for the next span.

    Returns:
        The weights, the step, and how many were taken.
    """
    done, taken = 0.0, 0
    k1 = derivative(weights)
    while done < span:
        h = min(step, span - done)
        k2 = derivative([w - h / 2 * a for w, a in zip(weights, k1)])
        k3 = derivative([w - 0.75 * h * b for w, b in zip(weights, k2)])
        new = [w - h / 9 * (2 * a + 3 * b + 4 * c) for w, a, b, c in zip(weights, k1, k2, k3)]
        k4 = derivative(new)
        pairs = zip(k1, k2, k3, k4, new)
        error = max(
            float((h * (-5 / 72 * a + b / 12 + c / 9 - d / 8)).abs().max() / w.abs().max()) for a, b, c, d, w in pairs
        )
        grow = 0.9 * (tolerance / max(error, 1e-300)) ** (1 / 3)
        if error <= tolerance:
            weights, k1, done, taken = new, k4, done + h, taken + 1
            step = max(step, h * min(grow, 4)) if h < step else h * min(max(grow, 0.2), 4)
        else:
            step = h * max(grow, 0.2)
    return weights, step, taken

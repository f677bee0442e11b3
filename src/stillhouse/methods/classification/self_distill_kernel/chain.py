"""Kernel ridge regression refitted to its own predictions: every step, the limit and the best weight in closed form (arXiv 2102.13088).

All in float64, from one eigendecomposition K = V D V^T: the predictions of step t on the training points are V B_t V^T Y with B_t diagonal.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from stillhouse.errors import UserError, unknown

Step = int | Literal["limit"]

KERNELS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "rbf": lambda x, y, gamma: torch.exp(-gamma * torch.cdist(x, y).square()),
    "laplace": lambda x, y, gamma: torch.exp(-gamma * torch.cdist(x, y)),
    "linear": lambda x, y, gamma: gamma * (x @ y.T),
    "cubic": lambda x, y, gamma: (gamma * (x @ y.T) + 1) ** 3,
}
"""Name -> k(X, X') of rows (n, p) and (m, p), (n, m)."""


def optimal_weight(target: Tensor, plain: Tensor, pure: Tensor) -> float:
    """The weight alpha of the labels that is best for these targets: <y - g0, g1 - g0> / |g1 - g0|^2, not clipped (eq. of the optimal alpha).

    Args:
        target: validation targets, (n,) or (n, q).
        plain: g1, predictions of the model that was fitted to the labels alone (alpha 1), same shape.
        pure: g0, predictions of the model that was fitted to its predecessor alone (alpha 0), same shape.
    """
    if not target.shape == plain.shape == pure.shape:
        raise UserError(f"Targets and both predictions must have one shape; given: {tuple(target.shape)}, {tuple(plain.shape)}, {tuple(pure.shape)}.")
    y, g1, g0 = target.double(), plain.double(), pure.double()
    apart = g1 - g0
    size = float(apart.square().sum())
    if size <= 1e-24 * max(float(g1.square().sum()), 1e-300):
        warnings.warn("Refitting changes nothing here (the ridge is tiny): every weight is as good, so alpha is 1.", stacklevel=2)
        return 1.0
    return float(((y - g0) * apart).sum()) / size


class KernelSelfDistillation:
    """Iterated self-distillation of kernel ridge regression; step 1 is the ordinary fit.

    Args:
        kernel: a name of `KERNELS`.
        gamma: its scale.
        ridge: lambda > 0, not multiplied by the number of points.
        steps: how many fits.
        alpha: weight of the labels at each refit, in [0, 1]: one number, or one a step (the first is not used: step 1 has no predecessor).

    Raises:
        UserError: an unknown kernel, or options out of range.

    >>> x = torch.linspace(0, 1, 11)[:, None]
    >>> chain = KernelSelfDistillation(gamma=80, ridge=0.2, steps=3, alpha=0.25).fit(x, torch.sin(6.28 * x[:, 0]))
    >>> chain.predict(x, 3).shape, chain.predict(x, "limit").shape
    (torch.Size([11]), torch.Size([11]))
    """

    def __init__(self, kernel: str = "rbf", gamma: float = 1.0, ridge: float = 0.1, steps: int = 6, alpha: float | Sequence[float] = 0.25) -> None:
        if kernel not in KERNELS:
            raise unknown("kernel", kernel, KERNELS)
        if not ridge > 0 or not gamma > 0 or steps < 1:
            raise UserError(f"ridge and gamma must be above 0 and steps at least 1; given: ridge {ridge}, gamma {gamma}, steps {steps}.")
        alphas = [float(alpha)] * steps if isinstance(alpha, int | float) else [float(a) for a in alpha]
        if len(alphas) != steps:
            raise UserError(f"alpha must be one number or one for each of {steps} steps; given: {len(alphas)}.")
        if not all(0 <= a <= 1 for a in alphas):
            raise UserError(f"alpha must lie between 0 and 1; given: {alphas}.")
        if steps > 1 and not any(alphas[1:]):
            warnings.warn("With alpha 0 at every step the chain forgets the labels and shrinks to zero.", stacklevel=2)
        self.kernel, self.gamma, self.ridge, self.steps, self.alphas = kernel, float(gamma), float(ridge), steps, alphas

    def fit(self, x: Tensor, y: Tensor) -> KernelSelfDistillation:
        """Decompose the kernel of the points x (n, p) and take the targets y, (n,) or (n, q)."""
        self.x, self._flat = x.double(), y.ndim == 1
        targets = y.double()[:, None] if self._flat else y.double()
        if len(self.x) != len(targets) or not len(self.x):
            raise UserError(f"x and y must hold as many points, at least one; given: {len(x)} and {len(y)}.")
        values, vectors = torch.linalg.eigh(self.gram(self.x))
        self.eigenvalues, self._vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        self._rotated = self._vectors.T @ targets
        return self

    def gram(self, x: Tensor) -> Tensor:
        """k(x, X): (m, n)."""
        return KERNELS[self.kernel](x.double(), self.x, self.gamma)

    def shrinkage(self, step: Step) -> Tensor:
        """The diagonal of B_t, (n,), by falling eigenvalue: how much of each eigen-direction of the labels is left after so many steps."""
        plain = self.eigenvalues / (self.eigenvalues + self.ridge)
        if step == "limit":
            alpha = self._constant()
            return alpha * self.eigenvalues / (alpha * self.eigenvalues + self.ridge)
        out = plain
        for alpha in self.alphas[1 : self._checked(step)]:
            out = plain * ((1 - alpha) * out + alpha)
        return out

    def coefficients(self, step: Step) -> Tensor:
        """Weights of the training points, (n, q): f(x) = k(x, X) coefficients; without refitting."""
        if step == "limit":
            alpha = self._constant()
            scale = alpha / (alpha * self.eigenvalues + self.ridge)
        else:
            alpha = 1.0 if self._checked(step) == 1 else self.alphas[step - 1]
            before = torch.zeros_like(self.eigenvalues) if step == 1 else self.shrinkage(step - 1)
            scale = ((1 - alpha) * before + alpha) / (self.eigenvalues + self.ridge)
        return self._vectors @ (scale[:, None] * self._rotated)

    def predict(self, x: Tensor, step: Step | None = None) -> Tensor:
        """Predictions at x (m, p), shaped as the targets were; of the last step by default."""
        return self._shaped(self.gram(x) @ self.coefficients(self.steps if step is None else step))

    def fitted(self, step: Step) -> Tensor:
        """Predictions on the training points: the targets of the next step beside the labels."""
        return self._shaped(self._vectors @ (self.shrinkage(step)[:, None] * self._rotated))

    def optimal_alpha(self, x: Tensor, y: Tensor, step: int) -> float:
        """The best weight at a step (from 2 on), given those before it, for validation points; not clipped. Training points would give 1 or more."""
        if self._checked(step) < 2:
            raise UserError("Step 1 is the ordinary fit whatever its weight; ask for the weight of step 2 or later.")
        pure = self._vectors @ ((self.shrinkage(step - 1) / (self.eigenvalues + self.ridge))[:, None] * self._rotated)
        kernel = self.gram(x)
        return optimal_weight(y.double().reshape(len(y), -1), kernel @ self.coefficients(1), kernel @ pure)

    def choose_alphas(self, x: Tensor, y: Tensor) -> list[float]:
        """Set each step's weight to its optimum for validation points x (m, p) and targets y, clipped to [0, 1]; returns the unclipped ones."""
        found = []
        for step in range(2, self.steps + 1):
            found.append(self.optimal_alpha(x, y, step))
            self.alphas[step - 1] = min(max(found[-1], 0.0), 1.0)
        return found

    def _constant(self) -> float:
        weights = set(self.alphas[1:] or self.alphas)
        if len(weights) > 1:
            raise UserError("The limit is known for a constant alpha; here it differs from step to step.")
        return weights.pop()

    def _checked(self, step: Step) -> int:
        if not isinstance(step, int) or not 1 <= step <= self.steps:
            raise UserError(f"This chain has the steps 1 to {self.steps} and 'limit'; given: {step!r}.")
        return step

    def _shaped(self, predictions: Tensor) -> Tensor:
        return predictions[:, 0] if self._flat else predictions

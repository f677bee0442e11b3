"""Matching losses of data-set distillation: feature means (DM), gradients (DC/DSA), parameters after an unrolled
training (MTT).

DM: Zhao and Bilen, arXiv 2110.04181. DC, DSA: arXiv 2006.05929, 2102.08259. MTT: Cazenavette et al., arXiv 2203.11932.
Synthetic and real batches that hold several classes are class-major with equally many images a class, so that all
classes go through a network in one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision

AT_ONCE = {"cpu": 2**13, "cuda": 2**22}
"""Pixels of the images that go through a network at a time: on a CPU, eight images of 32 x 32, whose maps stay in its
cache and are given back to be reused."""


def few(x: Tensor) -> tuple[Tensor, ...]:
    """Images (B, C, H, W) in the parts in which they go through a network that sees each image alone."""
    return x.split(max(1, AT_ONCE.get(x.device.type, 2**22) // (x.shape[2] * x.shape[3])))


def class_means(x: Tensor, classes: int) -> Tensor:
    """Class-major rows (classes * n, ...) -> means (classes, ...). Raises `UserError` where the rows do not divide."""
    if not len(x) or len(x) % classes:
        raise UserError(
            f"A class-major batch needs equally many images of each of {classes} classes; given: {len(x)} images."
        )
    return x.view(classes, -1, *x.shape[1:]).mean(1)


@full_precision
def feature_mean_distance(real: Tensor, synthetic: Tensor, classes: int) -> Tensor:
    """DM: sum over classes and dimensions of (mean real - mean synthetic)^2; the real side has no gradient.

    Args:
        real, synthetic: (classes * n, D) and (classes * m, D), class-major.
    """
    return (class_means(real.detach(), classes) - class_means(synthetic, classes)).square().sum()


Metric = Literal["units", "mse", "cos"]


@full_precision
def gradient_distance(
    real: Sequence[Tensor], synthetic: Sequence[Tensor], metric: Metric = "units", eps: float = 1e-6
) -> Tensor:
    """DC/DSA: the distance of two gradients, a scalar.

    `units`: over weight tensors and their output units, the sum of 1 - <g_r, g_s> / (|g_r| |g_s| + eps); biases and
        norms (1-D) do not count. Of all
    parameters as one vector, `mse`: |g_r - g_s|^2, and `cos`: 1 - <g_r, g_s> / (|g_r| |g_s| + eps).

    Args:
        real, synthetic: gradients of the same parameters, in order; the real ones have no gradient.
    """
    pairs = [(r.detach().flatten(1), s.flatten(1)) for r, s in zip(real, synthetic, strict=True) if r.ndim > 1]
    if metric != "units":
        pairs = [
            (torch.cat([r.detach().flatten() for r in real])[None], torch.cat([s.flatten() for s in synthetic])[None])
        ]
    if not pairs:
        raise UserError("Gradient matching found no weight of two or more dimensions to match.")
    if metric == "mse":
        return (pairs[0][0] - pairs[0][1]).square().sum()
    return torch.stack([(1 - (r * s).sum(-1) / (r.norm(dim=-1) * safe_norm(s) + eps)).sum() for r, s in pairs]).sum()


def safe_norm(x: Tensor, dim: int = -1) -> Tensor:
    """The L2 norm, whose gradient at 0 is 0 and not NaN."""
    squares = x.square().sum(dim)
    none = squares == 0
    return torch.where(none, torch.zeros_like(squares), squares.where(~none, torch.ones_like(squares)).sqrt())


def gradients(network: nn.Module, x: Tensor, labels: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
    """Gradients of the mean cross-entropy w.r.t. the network's parameters, in order; with `create_graph`,
    differentiable in x (B, C, H, W).

    Args:
        network: sees each image alone, as the images go through it a few at a time where no graph is asked for.
    """
    weights = list(network.parameters())
    if create_graph:
        return torch.autograd.grad(F.cross_entropy(network(x), labels), weights, create_graph=True)
    found = [torch.zeros_like(w) for w in weights]
    for part, part_labels in zip(few(x), labels.split(len(few(x)[0]))):
        loss = F.cross_entropy(network(part), part_labels, reduction="sum") / len(x)
        for total, one in zip(found, torch.autograd.grad(loss, weights)):
            total.add_(one)
    return tuple(found)


class Flat:
    """A network as a function of one vector: its parameters in `parameters()` order, each row-major, one after another.

    Args:
        network: without batch statistics (no buffers).

    Raises:
        UserError: a network with buffers.
    """

    def __init__(self, network: nn.Module) -> None:
        if next(network.buffers(), None) is not None:
            raise UserError(
                "Trajectories are of parameters alone, but this network has buffers (batch norm?); take a norm such "
                "as `instance`."
            )
        self.network = network
        self._shapes = {n: p.shape for n, p in network.named_parameters()}
        self._sizes = [p.numel() for p in network.parameters()]

    @property
    def size(self) -> int:
        return sum(self._sizes)

    def vector(self) -> Tensor:
        """(P,) the network's parameters now: a copy."""
        return torch.cat([p.detach().flatten() for p in self.network.parameters()])

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """(P,) by name."""
        if theta.shape != (self.size,):
            raise UserError(
                f"The network has {self.size} parameters, but the vector has shape {tuple(theta.shape)}; is it "
                "another network's?"
            )
        return {n: part.view(shape) for (n, shape), part in zip(self._shapes.items(), theta.split(self._sizes))}

    def load(self, theta: Tensor) -> None:
        """Put (P,) into the network."""
        with torch.no_grad():
            for p, value in zip(self.network.parameters(), self.unflatten(theta).values()):
                p.copy_(value)

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        """Logits of (B, C, H, W) at (P,)."""
        logits: Tensor = functional_call(self.network, self.unflatten(theta), (x,))
        return logits

    def gradient(self, theta: Tensor, x: Tensor, labels: Tensor, create_graph: bool = True) -> Tensor:
        """(P,) of the mean cross-entropy (labels (B,) or (B, C)); theta must require a gradient."""
        return torch.autograd.grad(F.cross_entropy(self(theta, x), labels), theta, create_graph=create_graph)[0]


Batches = Iterable[tuple[Tensor, Tensor]]
Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]


def unroll(gradient: Gradient, theta: Tensor, batches: Batches, lr: Tensor) -> Tensor:
    """theta_{k+1} = theta_k - lr g(theta_k, x_k, y_k) over the batches, with the graph of every step: theta at the end,
    (P,).

    Args:
        gradient: such as `Flat.gradient`, differentiable in all its arguments.
        theta: (P,), the start.
        lr: scalar, possibly learned.
    """
    theta = theta.detach().requires_grad_()
    for x, labels in batches:
        theta = theta - lr * gradient(theta, x, labels)
    return theta


@full_precision
def trajectory_distance(theta: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """MTT: |theta - target|^2 / |start - target|^2, a scalar. NaN where start equals target: an expert that did not
    move."""
    return (theta - target).square().sum() / (start - target).square().sum()


def trajectory_distance_by_steps(
    gradient: Gradient, start: Tensor, target: Tensor, batches: Sequence[tuple[Tensor, Tensor]], lr: Tensor
) -> Tensor:
    """The same distance after the same steps, with a gradient that takes the memory of one step: each step's own, its
    parameters constant.

    Calls backward itself: the tensors that the batches and `lr` depend on collect gradients. With
    d = start - a G - target and w = theta_k constant, step k gives the gradient of
    (a^2 <g, g> + 2 a <g, a (G - g) - start + target>) / |start - target|^2 in its batch, where the second g is a
    constant (FYI's code).

    Returns:
        The distance, detached.
    """
    a, theta, path, taken = lr.detach(), start.detach(), [], []
    for x, labels in batches:
        g = gradient(theta.requires_grad_(), x.detach(), labels).detach()
        path.append(theta.detach())
        taken.append(g)
        theta = theta.detach() - a * g
    total, whole = torch.stack(taken).sum(0), (start - target).square().sum()
    for w, g_k, (x, labels) in zip(path, taken, batches):
        g = gradient(w.requires_grad_(), x, labels)
        step = (a.square() * (g * g).sum() + 2 * a * (g * (a * (total - g_k) - start + target)).sum()) / whole
        step.backward(retain_graph=True)  # batches may depend on the same tensors
    if lr.requires_grad:
        ((start - lr * total - target).square().sum() / whole).backward()
    return (theta.detach() - target).square().sum() / whole

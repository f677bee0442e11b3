"""Adaptive computation modules: learners that add up, a gate that says how many of them, and their place in a
network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision
from stillhouse.nn.attention import SeparateProjections, separate_attention
from stillhouse.signals import Batch, Taps, evaluating
from stillhouse.tasks.base import Task

GATE_WIDTH, GATE_DEPTH, GATE_TEMPERATURE = 16, 3, 0.8
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "identity": lambda x: x}
Activation = Literal["gelu", "identity"]


# ---- learners --------------------------------------------------------------------------------------------------------


def learner_outputs(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, learners: int, activation: Activation = "gelu"
) -> Tensor:
    """s_n(z) = act(z w1_n + b1_n) w2_n of each learner; (..., N, D).

    Args:
        x: z, (..., D).
        w1, b1, w2: (D, N b), (N b,), (N b, D), learner after learner.
        learners: N.
    """
    hidden = ACTIVATIONS[activation](x @ w1 + b1).unflatten(-1, (learners, -1))
    return torch.einsum("...nb,nbd->...nd", hidden, w2.unflatten(0, (learners, -1)))


def cumulative_outputs(outputs: Tensor, detached: bool = False) -> Tensor:
    """h(z, k), the sum of the first k learners, of k = 0 (zeros) to N; (..., N + 1, D).

    Args:
        outputs: (..., N, D).
        detached: a learner gets the gradient of its own k alone (the released code); else of every k from its own on.
    """
    sums = outputs.cumsum(-2)
    if detached:
        sums = (sums - outputs).detach() + outputs
    return torch.cat([torch.zeros_like(sums[..., :1, :]), sums], -2)


@full_precision
def learner_loss(outputs: Tensor, target: Tensor) -> Tensor:
    """The mean squared distance of h(z, k) (..., N + 1, D) to what the replaced module gives (..., D), over all k."""
    return F.mse_loss(outputs, target.detach().unsqueeze(-2).expand_as(outputs))


class Learners(nn.Module):
    """N small two-layer networks whose outputs add up.

    Args:
        dim: D.
        width: b, hidden units of each.
        count: N.
        activation: between the layers.
    """

    def __init__(self, dim: int, width: int, count: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.count, self.width, self.activation = count, width, activation
        self.w1, self.b1 = nn.Parameter(torch.empty(dim, count * width)), nn.Parameter(torch.empty(count * width))
        self.w2 = nn.Parameter(torch.empty(count * width, dim))
        for weight in (self.w1, self.w2):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(dim)
        nn.init.uniform_(self.b1, -bound, bound)

    @property
    def cost(self) -> int:
        """p, multiply-adds of one learner for one token."""
        return 2 * self.w1.shape[0] * self.width

    def all(self, x: Tensor, detached: bool = False) -> Tensor:
        """h(z, k) of every k, (..., N + 1, D)."""
        outputs = learner_outputs(x, self.w1, self.b1, self.w2, self.count, self.activation)
        return cumulative_outputs(outputs, detached)

    def first(self, x: Tensor, count: int) -> Tensor:
        """h(z, count), in one piece."""
        return self.between(x, 0, count)

    def between(self, x: Tensor, start: int, end: int) -> Tensor:
        """The sum of learners start … end - 1, (..., D)."""
        part = slice(start * self.width, end * self.width)
        return ACTIVATIONS[self.activation](x @ self.w1[:, part] + self.b1[part]) @ self.w2[part]


# ---- gates -----------------------------------------------------------------------------------------------------------


@full_precision
def relative_errors(outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """d(n) = |h(z, n) - o|, (..., N + 1), and d(n - 1) / d(n) of n = 1 … N."""
    errors = (outputs - target.unsqueeze(-2)).norm(dim=-1)
    return errors, errors[..., :-1] / errors[..., 1:]


@full_precision
def gate_labels(
    outputs: Tensor, target: Tensor, factor: float = 1.2, rule: Literal["paper", "released"] = "paper"
) -> Tensor:
    """How many learners a token should have: the first n that improves on n - 1 by less than `factor`, or N; (...,)
    int64.

    Args:
        outputs: h(z, k), (..., N + 1, D).
        target: o, (..., D).
        factor: 1 / tau of the paper.
        rule: paper: n from 2 to N; released: from 1, where the first n that is 1 counts as none, so that N is given.
    """
    errors = relative_errors(outputs, target)[0]
    little = factor * errors[..., 1:] >= errors[..., :-1]  # also where both are 0
    if rule == "paper":
        little = torch.cat([torch.zeros_like(little[..., :1]), little[..., 1:]], -1)
    first = little.to(torch.int8).argmax(-1) + 1
    none = ~little.any(-1) | (little[..., 0] if rule == "released" else False)
    return torch.where(none, little.shape[-1], first)


class Gate(nn.Module):
    """Says how many learners a token gets: linear layers without activations between them, as published.

    In training a hard sample with the gradient of the soft one (Gumbel), else the most probable choice; both one-hot
    (..., N + 1), columns 0 … N.

    Args:
        dim: D.
        choices: N + 1.
        least: columns below are never chosen.
        width, depth: of the layers between, and how many there are in all.
        temperature: tau of the soft sample.
    """

    def __init__(
        self,
        dim: int,
        choices: int,
        least: int = 0,
        width: int = GATE_WIDTH,
        depth: int = GATE_DEPTH,
        temperature: float = GATE_TEMPERATURE,
    ) -> None:
        super().__init__()
        widths = [dim, *[width] * (depth - 1), choices - least]
        self.net = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.least, self.temperature = least, temperature

    def logits(self, x: Tensor) -> Tensor:
        """(..., N + 1 - least)."""
        for layer in self.net:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.chosen(self.logits(x))

    def chosen(self, logits: Tensor) -> Tensor:
        """The one-hot choice of logits, float32."""
        logits = logits.float()
        if self.training:
            hard = F.gumbel_softmax(logits, self.temperature, hard=True)
        else:
            hard = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        return F.pad(hard, (self.least, 0))


@full_precision
def gate_loss(logits: Tensor, labels: Tensor, least: int = 0) -> Tensor:
    """The mean cross-entropy of a gate's logits (..., N + 1 - least) with labels (...,); those below the least count as
    it."""
    return F.cross_entropy(logits.flatten(0, -2), (labels - least).clamp_min(0).flatten())


@full_precision
def released_gate_loss(choice: Tensor, labels: Tensor) -> Tensor:
    """The released code's: -log(g_t + 1e-20) of the hard sample g (..., N + 1)."""
    return F.nll_loss((choice + 1e-20).log().flatten(0, -2), labels.flatten())


# ---- losses of the end-to-end phase ----------------------------------------------------------------------------------


def budget_fraction(gates: Sequence[Tensor], costs: Sequence[float]) -> Tensor:
    """The mean cost of the learners that run over that of all: 1 where every token has all, 0 where none has any.

    Args:
        gates: of each module, (B, S, N + 1).
        costs: p of each module.
    """
    spent = torch.stack([cost * executed(gate).mean() for gate, cost in zip(gates, costs)]).sum()
    return spent / sum(cost * (gate.shape[-1] - 1) for gate, cost in zip(gates, costs))


def executed(gate: Tensor) -> Tensor:
    """k of each token, sum_k k g_k; (...,)."""
    return gate @ torch.arange(gate.shape[-1], dtype=gate.dtype, device=gate.device)


def budget_loss(fraction: Tensor, target: float, kind: Literal["l1", "l2"] = "l1") -> Tensor:
    """The distance of a batch's `budget_fraction` from the target, or its square."""
    return (fraction - target).abs() if kind == "l1" else (fraction - target).square()


def entropy_loss(gates: Sequence[Tensor]) -> Tensor:
    """-mean H(a) / log(N + 1) over samples and modules, a the share of a sample's tokens that makes each choice;
    float64."""
    found = []
    for gate in gates:
        share = gate.double().flatten(1, -2).sum(1)
        share = share / share.sum(-1, keepdim=True)
        found.append(-(share * (share + 1e-20).log()).sum(-1) / math.log(gate.shape[-1]))
    return -torch.stack(found).mean()


def diversity_loss(gates: Sequence[Tensor]) -> Tensor:
    """-2 mean_{i, m} |b_i - b_m| over all pairs of samples of a batch; b_i is the mean of k over tokens and modules,
    over N + 1; float64."""
    means = torch.stack([executed(gate.double()).flatten(1).mean(1) / gate.shape[-1] for gate in gates]).mean(0)
    return -2 * (means[:, None] - means[None]).abs().mean()


# ---- the module ------------------------------------------------------------------------------------------------------


class AdaptiveModule(nn.Module):
    """Stands in the place of a module that maps tokens (B, ..., D) to tokens of the same width.

    In training every learner runs, weighted by the gate's choice; else a learner runs for the tokens that have it, and
    none where none has.

    Args:
        dim: D.
        width: b.
        count: N.
        activation: of the learners.
        least: the fewest learners that a token can have.

    Attributes:
        fixed: this many for every token, without the gate.
    """

    def __init__(self, dim: int, width: int, count: int, activation: Activation, least: int) -> None:
        super().__init__()
        self.learners, self.gate = Learners(dim, width, count, activation), Gate(dim, count + 1, least)
        self.fixed: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.fixed is not None:
            return self.learners.first(x, self.fixed)
        gate = self.gate(x)
        if self.training or torch.compiler.is_compiling():
            return (gate.to(x.dtype).unsqueeze(-2) @ self.learners.all(x)).squeeze(-2)
        return self._executed(x.flatten(0, -2), gate.argmax(-1).flatten()).view_as(x)

    def _executed(self, x: Tensor, counts: Tensor) -> Tensor:
        """(T, D) outputs of tokens (T, D) that have so many learners each."""
        order = counts.argsort(descending=True)
        sizes = (len(counts) - counts.bincount(minlength=self.learners.count + 1).cumsum(0)).tolist()
        rows, out, n = x[order], torch.zeros_like(x), 0
        while n < self.learners.count and sizes[n]:
            end = n + 1
            while end < self.learners.count and sizes[end] == sizes[n]:
                end += 1  # learners that the same tokens have run in one piece
            out[: sizes[n]] += self.learners.between(rows[: sizes[n]], n, end)
            n = end
        return torch.empty_like(out).index_copy_(0, order, out)


# ---- in a network ----------------------------------------------------------------------------------------------------


def separated(network: nn.Module, projections: Sequence[str]) -> nn.Module:
    """The network with attention taken apart: `nn.MultiheadAttention` into four linear layers, and fused ones into
    three; in place.

    Args:
        projections: last parts of the names of attention's projections; those that are three times wider than their
            input are fused.
    """
    separate_attention(network)
    for name, module in list(network.named_modules()):
        path, _, last = name.rpartition(".")
        fused = isinstance(module, nn.Linear) and module.out_features == 3 * module.in_features
        if fused and last in projections:
            assert isinstance(module, nn.Linear)
            setattr(network.get_submodule(path), last, SeparateProjections(module))
    return network


class Place(Spec):
    """A module that is replaced: a projection or an MLP, the width of its tokens, and hidden units of a learner."""

    projection: bool
    dim: int
    width: int


class Shape(Spec):
    """Which modules of a network become adaptive, by which a product's network is built again.

    Attributes:
        places: by name.
        count: N.
        projections: last parts of the names of attention's projections.
        fixed: learners that every token has; None: the gates say.
        exits: of the baseline, the blocks after which samples may leave, with the width of their tokens; then nothing
            is replaced.
    """

    places: dict[str, Place]
    count: int
    projections: list[str]
    fixed: int | None = None
    exits: dict[str, int] | None = None

    def applied(self, network: nn.Module) -> dict[str, AdaptiveModule]:
        """Put adaptive modules into a network, in place; by name."""
        separated(network, self.projections)
        out: dict[str, AdaptiveModule] = {}
        for name, place in self.places.items():
            path, _, last = name.rpartition(".")
            parent = network.get_submodule(path)
            old = getattr(parent, last)
            activation: Activation = "identity" if place.projection else "gelu"
            new = AdaptiveModule(place.dim, place.width, self.count, activation, least=int(place.projection))
            new.fixed = self.fixed
            setattr(parent, last, new.to(next(old.parameters()).device).train(old.training))
            out[name] = new
        return out


def shape_of(
    network: nn.Module,
    mlps: Sequence[str],
    projections: Sequence[str],
    count: int,
    total_factor: float,
    task: Task,
    batch: Batch,
) -> Shape:
    """The modules of a network that adaptive ones can replace; the network's attention is taken apart.

    Args:
        mlps, projections: last parts of their names.
        count: N.
        total_factor: cost of all learners over that of what they replace.
        task, batch: a call, which tells the widths.

    Raises:
        UserError: there are none; a module whose input and output differ in shape; learners without a hidden unit.
    """
    found: dict[str, bool] = {}
    for name, module in separated(network, projections).named_modules():
        parts = name.split(".")
        if parts[-1] in mlps:
            found[name] = False
        elif isinstance(module, nn.Linear) and module.in_features == module.out_features:
            own = parts[-3] if parts[-2:-1] == ["parts"] else parts[-1]
            if own in projections and not any(name.startswith(f"{outer}.") for outer in found):
                found[name] = True
    if not found:
        raise UserError(
            f"acm: {type(network).__name__} has no module named {', '.join([*mlps, *projections]) or 'anything'}; give "
            "the last parts of the names of its MLPs in `mlps`, and of its attention's projections in `projections`."
        )
    taps = Taps(network, [tap for name in found for tap in (name, f"{name}:in")])
    with evaluating(network), taps.capture() as got:
        task.call(network, batch)
    taps.remove()
    out: dict[str, Place] = {}
    for name, projection in found.items():
        before, after = got[f"{name}:in"].shape, got[name].shape
        if before != after or len(before) < 2:
            raise UserError(f"acm: '{name}' maps {tuple(before)} to {tuple(after)}; only tokens of one width will do.")
        dim = before[-1]
        inner = next((m.out_features for m in network.get_submodule(name).modules() if isinstance(m, nn.Linear)), 0)
        width = round(total_factor / count * ((dim * dim + dim) / (2 * dim + 1) if projection else inner))
        if width < 1:
            raise UserError(f"acm: {count} learners in the place of '{name}' would have no hidden unit; take fewer.")
        out[name] = Place(projection=projection, dim=dim, width=width)
    return Shape(places=out, count=count, projections=list(projections))

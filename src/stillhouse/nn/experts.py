"""Mixtures of experts: two experts a token, of limited capacity, with a loss that balances their load.

The gate is GShard's top-2 (Lepikhin et al., ICLR 2021, 2006.16668) as DeepSpeed has it; experts begin as copies of one
trained layer (sparse upcycling, Komatsuzaki et al., ICLR 2023, 2212.05055).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision


@dataclass
class Routing:
    """Where tokens go.

    Attributes:
        weights: (S, E) of each expert for each token; a row sums to 1, or to 0 where both experts are full.
        places: (S, E) the place of a token in an expert's queue; meaningless where it does not go there.
        chosen: (S, E) bool, whether a token goes to an expert and there is room for it.
        counts: (E,) tokens that chose each expert, before any was dropped.
        balance: (), E^2 mean_e(mean gate x share of first choices): 1 where the load is even, up to E.
    """

    weights: Tensor
    places: Tensor
    chosen: Tensor
    counts: Tensor
    balance: Tensor


def capacity_of(tokens: int, experts: int, factor: float, least: int = 0) -> int:
    """Places of an expert: twice its even share, times the factor, rounded up; at most all tokens.

    >>> capacity_of(12, 4, 1.5), capacity_of(16, 4, 1.0)
    (9, 8)
    """
    return min(max(least, math.ceil(tokens / experts * 2 * factor)), tokens)


@full_precision
def top2(logits: Tensor, capacity: int, noise: Tensor | None = None) -> Routing:
    """Two experts for each token: the most probable, and the most probable of the others, with noise.

    Places are given in the order of the tokens, first choices of all tokens before second ones; who comes too late is
    dropped by that expert, and the other one gets all the weight.

    Args:
        logits: (S, E) of the router.
        capacity: places of an expert.
        noise: (S, E) added to the logits for the second choice alone, Gumbel in training; None: none.
    """
    experts = logits.shape[1]
    if experts < 2:
        raise UserError(f"A mixture sends a token to two experts, so it needs at least two; given: {experts}.")
    gates = logits.softmax(1)
    first = F.one_hot(gates.argmax(1), experts)
    others = logits if noise is None else logits + noise
    second = F.one_hot(others.masked_fill(first.bool(), -torch.inf).argmax(1), experts)
    balance = experts**2 * (gates.mean(0) * first.to(gates.dtype).mean(0)).mean()
    place_1, place_2 = first.cumsum(0) - 1, second.cumsum(0) - 1 + first.sum(0)
    room_1, room_2 = first.bool() & (place_1 < capacity), second.bool() & (place_2 < capacity)
    kept = gates * (room_1 | room_2)
    weights = kept / kept.sum(1, keepdim=True).clamp_min(torch.finfo(gates.dtype).eps)
    places = torch.where(first.bool(), place_1, place_2)
    return Routing(weights, places, room_1 | room_2, (first + second).sum(0), balance)


def gumbel(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Gumbel(0, 1) noise from torch's default generator."""
    return -torch.empty(shape, device=device).exponential_().log()


class MixtureOfExperts(nn.Module):
    """Copies of one layer, and a router that sends each token to two of them.

    In training, capacity is limited and the second choice noisy; in evaluation there is a place for every token and no
    noise, so that a token's output depends on nothing beside it. `balance` and `dropped` are those of the last forward
    pass in training: the loss that balances the load, and the share of routes that found no room.

    Args:
        layer: maps (..., D) to (..., D); it is copied.
        width: D.
        experts: E.
        factor: of the capacity, in training.
        least: the smallest capacity.
        noisy: whether the second choice is noisy in training.
    """

    def __init__(
        self, layer: nn.Module, width: int, experts: int = 4, factor: float = 1.5, least: int = 0, noisy: bool = True
    ) -> None:
        super().__init__()
        if experts < 2 or factor <= 0:
            raise UserError(f"A mixture needs at least two experts and a factor above 0; given: {experts}, {factor}.")
        self.experts = nn.ModuleList(copy.deepcopy(layer) for _ in range(experts))
        self.router = nn.Linear(width, experts, bias=False)
        self.factor, self.least, self.noisy = factor, least, noisy
        self.balance: Tensor | None = None
        self.dropped: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        tokens = x.reshape(-1, x.shape[-1])
        number, experts = len(tokens), len(self.experts)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(tokens.float(), self.router.weight.float())
        capacity = capacity_of(number, experts, self.factor, self.least) if self.training else number
        noise = gumbel((number, experts), x.device) if self.training and self.noisy else None
        routing = top2(logits, capacity, noise)
        self.balance = self.dropped = None
        if self.training:
            self.balance = routing.balance
            self.dropped = 1 - routing.chosen.sum().detach() / (2 * number)
        return mixed(tokens, routing, capacity, list(self.experts)).view_as(x)


def mixed(tokens: Tensor, routing: Routing, capacity: int, experts: list[nn.Module]) -> Tensor:
    """(S, D) sums of what experts make of tokens (S, D), weighted; each expert sees its queue alone."""
    number = len(tokens)
    padded = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])
    out = torch.zeros_like(padded)
    own = torch.arange(number, device=tokens.device)
    weights = torch.cat([routing.weights, routing.weights.new_zeros(1, len(experts))]).to(tokens.dtype)
    for i, expert in enumerate(experts):
        place = torch.where(routing.chosen[:, i], routing.places[:, i], capacity)
        queue = torch.full((capacity + 1,), number, device=tokens.device).scatter(0, place, own)[:capacity]
        out = out.index_add(0, queue, (weights[queue, i, None] * expert(padded[queue])).to(out.dtype))
    return out[:number]


def mixtures(network: nn.Module) -> Iterator[MixtureOfExperts]:
    """All mixtures of a network."""
    return (m for m in network.modules() if isinstance(m, MixtureOfExperts))


MODES = ("sparse", "first_half", "second_half", "dense")


def sparse_layers(number: int, mode: str) -> list[int]:
    """Which of a network's layers become mixtures: every second from the first ("sparse"), a half, or all ("dense").

    >>> sparse_layers(5, "sparse"), sparse_layers(4, "second_half")
    ([0, 2, 4], [2, 3])
    """
    if mode not in MODES:
        raise UserError(f"A mixture's mode is {', '.join(MODES)}; given: '{mode}'.")
    half = number // 2
    chosen = {"sparse": range(0, number, 2), "first_half": range(half), "second_half": range(half, number)}
    return list(chosen.get(mode, range(number)))


def upcycled(layers: nn.ModuleList, width: int, mode: str, **options: float | bool) -> None:
    """Replace `mlp` of some decoder layers by mixtures of its copies, in place."""
    for i in sparse_layers(len(layers), mode):
        layer = layers[i]
        layer.mlp = MixtureOfExperts(layer.get_submodule("mlp"), width, **options)  # type: ignore[arg-type]

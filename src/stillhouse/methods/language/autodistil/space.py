"""Sub-networks of an encoder: their shape, how they are counted, sorted and drawn (AutoDistil, section 3.1)."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from pydantic import Field

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError


@dataclass(frozen=True, order=True)
class SubNet:
    """The shape of a sub-network, the same in all its layers.

    Attributes:
        depth: layers.
        heads: of attention; a head is as wide as the large network's, whatever the hidden size.
        hidden: width of a token.
        ratio: width of the feed-forward layer over `hidden`.
    """

    depth: int
    heads: int
    hidden: int
    ratio: float

    def __str__(self) -> str:
        return f"{self.depth} layers, hidden {self.hidden}, ratio {self.ratio:g}, {self.heads} heads"


@dataclass(frozen=True)
class Whole:
    """The large network that sub-networks are cut from: `layers`, `heads`, `hidden` size and `intermediate` size, and
    its tables of `vocabulary`, `positions` and token `types`."""

    layers: int
    heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    positions: int
    types: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def feed_forward(self, net: SubNet) -> int:
        """Width of a sub-network's feed-forward layer: hidden x ratio, of the large network's own proportion."""
        return round(net.hidden * net.ratio * self.intermediate / (4 * self.hidden))

    def subnet(self, depth: float, heads: float, hidden: float, ratio: float) -> SubNet:
        """A sub-network from the paper's multipliers: shares of layers, heads and hidden size, and the ratio."""
        return SubNet(round(self.layers * depth), round(self.heads * heads), round(self.hidden * hidden), ratio)

    def check(self, net: SubNet, where: str) -> None:
        """Raises `UserError` where a sub-network is larger than the network along any axis."""
        limits = {
            "depth": (net.depth, self.layers),
            "heads": (net.heads, self.heads),
            "hidden": (net.hidden, self.hidden),
            "ratio": (self.feed_forward(net), self.intermediate),
        }
        for axis, (wanted, there) in limits.items():
            if not 1 <= wanted <= there:
                what = "a feed-forward layer" if axis == "ratio" else axis
                raise UserError(
                    f"{where}.{axis}: a sub-network asks for {what} of {wanted}, but the teacher has {there}; "
                    f"give 1 to {there}."
                )

    def parameter_count(self, net: SubNet) -> float:
        """The paper's formula, by which sub-networks are sorted. It takes the attention as if a head grew with the
        hidden size; the network itself has other numbers (see `encoder_parameters`)."""
        d, share, inner = net.hidden, net.heads / self.heads, net.hidden * net.ratio
        tables = d * (self.vocabulary + self.positions + self.types + 2)
        attention = d**2 + 3 * d**2 * share + 4 * d + 2 * d
        feed_forward = 2 * d * inner + inner + d + 2 * d
        return tables + net.depth * (attention + feed_forward) + d**2 + 2 * d

    def multiply_adds(self, net: SubNet, tokens: int) -> int:
        """Multiply-adds of the layers on one text of so many tokens; embeddings and head are left out."""
        width, inner = net.heads * self.head_size, self.feed_forward(net)
        return net.depth * tokens * (4 * net.hidden * width + 2 * tokens * width + 2 * net.hidden * inner)

    @property
    def itself(self) -> SubNet:
        """The network as a sub-network."""
        return SubNet(self.layers, self.heads, self.hidden, 4.0)


class Space(Spec):
    """Sub-networks that share weights: every combination of these."""

    depth: list[int] = Field(min_length=1, description="Numbers of layers.")
    hidden: list[int] = Field(min_length=1, description="Hidden sizes.")
    ratio: list[float] = Field(min_length=1, description="Widths of the feed-forward layer, over the hidden size.")
    heads: list[int] = Field(min_length=1, description="Numbers of attention heads, each as wide as the teacher's.")

    def members(self, whole: Whole, where: str = "spaces") -> list[SubNet]:
        """All sub-networks, sorted by the paper's count of parameters.

        Raises:
            UserError: one that is larger than the large network.
        """
        every = itertools.product(sorted(set(self.depth)), sorted(set(self.heads)), sorted(set(self.hidden)),
                                  sorted(set(self.ratio)))  # fmt: skip
        nets = [SubNet(*values) for values in every]
        for net in nets:
            whole.check(net, where)
        return sorted(nets, key=lambda net: (whole.parameter_count(net), net))


def drawn(count: int, step: int, between: int = 2) -> list[int]:
    """The sandwich of a step, as indices into the sorted sub-networks: the largest, the smallest, and `between` others,
    drawn without replacement by a generator that the step seeds, so that all processes agree.

    Raises:
        UserError: fewer sub-networks than that.
    """
    if count - 2 < between:
        raise UserError(
            f"A step trains {between} sub-networks besides the largest and the smallest, but the space holds {count} "
            "in all; widen it, or lower `between`."
        )
    return [count - 1, 0, *random.Random(step).sample(range(1, count - 1), between)]


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices, evenly from the first to the last of `count`; all where there are no more."""
    if wanted >= count:
        return list(range(count))
    return sorted({round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)})

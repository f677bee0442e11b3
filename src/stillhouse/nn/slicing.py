"""A small network inside a large one: the leading entries of each weight along every axis, and evenly spread layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from stillhouse.errors import UserError


def corner(weight: Tensor, shape: Sequence[int], name: str = "weight") -> Tensor:
    """The view of the leading entries along every axis, of this shape; its gradient goes to those entries alone.

    Raises:
        UserError: another number of axes, or more entries than there are.

    >>> import torch
    >>> corner(torch.arange(6).view(2, 3), (2, 1)).tolist()
    [[0], [3]]
    """
    if weight.ndim != len(shape) or any(n > have for n, have in zip(shape, weight.shape)):
        raise UserError(
            f"'{name}' has shape {tuple(weight.shape)}, of which {tuple(shape)} cannot be cut; "
            "the small network must be no larger than the large one along any axis."
        )
    return weight[tuple(slice(0, n) for n in shape)]


def spread_layers(layers: int, kept: int) -> list[int]:
    """Which of `layers` layers a network of `kept` layers has: floor(i layers / kept), in whole numbers.

    Raises:
        UserError: more than there are, or none.

    >>> spread_layers(12, 6), spread_layers(3, 2)
    ([0, 2, 4, 6, 8, 10], [0, 1])
    """
    if not 1 <= kept <= layers:
        raise UserError(f"A network of {layers} layers has none of {kept} inside; give 1 to {layers}.")
    return [i * layers // kept for i in range(kept)]


def sliced(
    large: Mapping[str, Tensor], small: Mapping[str, Sequence[int]], layer: str, layers: Sequence[int]
) -> dict[str, Tensor]:
    """A small network's weights as views of a large one's.

    Args:
        large: weights by name.
        small: the small network's shapes by name.
        layer: what stands before the number of a layer in names, such as `encoder.layer.`.
        layers: for each layer of the small network, the one of the large network that it takes.

    Raises:
        UserError: a weight that the large network lacks, or one that is smaller there.
    """
    number = re.compile(rf"(?:^|(?<=\.)){re.escape(layer)}(\d+)(?=\.)")
    out = {}
    for name, shape in small.items():
        source = number.sub(lambda found: f"{layer}{layers[int(found[1])]}", name)
        if source not in large:
            raise UserError(f"The large network has no weight '{source}' for the small one's '{name}'.")
        out[name] = corner(large[source], shape, source)
    return out

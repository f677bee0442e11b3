"""Functional maps: the masked solve in one batch beside a solve a row, with gradients; ZoomOut on all vertices and
on few: `python benchmarks/functional_maps.py` (seconds).

Times are CPU milliseconds of one process, the least of `--rounds`, sides in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from run import keep
from torch import Tensor

from stillhouse.data.meshes import deformed_ellipsoid
from stillhouse.functional.functional_maps import map_of_points, solved_map, zoomed_out
from stillhouse.methods.correspondence.diffumatch.shapes import assembled, computed

WEIGHT = 0.1


def row_by_row(first: Tensor, second: Tensor, mask: Tensor, weight: float) -> Tensor:
    """The masked solve as the layers of functional-map papers have it: an inverse for each row."""
    gram, cross = first @ first.T, first @ second.T
    rows = [torch.inverse(gram + weight * torch.diag(mask[i])) @ cross[:, i] for i in range(len(mask))]
    return torch.stack(rows)


def main() -> None:
    """Measure, print and keep results/functional_maps.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 30, 60], help="k of the maps")
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    solves = {str(k): solve_times(k, options.features, options.rounds) for k in options.sizes}
    figures: dict[str, Any] = {"features": options.features, "solves": solves, "zoomout": zoom_times(options.rounds)}
    for name, row in [*solves.items(), ("ZoomOut", figures["zoomout"])]:
        print(f"{name:<8}", " ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
    keep("functional_maps", figures, "cpu", options.threads)


def solve_times(k: int, features: int, rounds: int) -> dict[str, float]:
    """Milliseconds of the solve and its gradient, and how many times as fast the batch is."""
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randn(k, features, generator=draw, requires_grad=True) for _ in range(2))
    mask = torch.rand(k, k, generator=draw)

    def work(solve: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Callable[[], None]:
        return lambda: solve(first, second, mask, WEIGHT).square().sum().backward()

    torch.testing.assert_close(
        row_by_row(first, second, mask, WEIGHT), solved_map(first, second, mask, WEIGHT), rtol=1e-3, atol=1e-4
    )
    found = least({"batch": work(solved_map), "row_by_row": work(row_by_row)}, rounds)
    return {**found, "ratio": found["row_by_row"] / found["batch"]}


def zoom_times(rounds: int) -> dict[str, float]:
    """Milliseconds of ZoomOut from 20 to 60 by 5 between two meshes of 642 vertices: on all, on 200 of them."""
    shapes = []
    for name in ("a", "b"):
        mesh = deformed_ellipsoid(name).normalised()
        shapes.append(assembled(name, mesh, computed(mesh, 60, 200), torch.device("cpu")))
    one, two = shapes
    start = map_of_points(torch.arange(len(two.points)), one.basis, two.basis, two.mass, 20)
    return least(
        {
            "all": lambda: zoomed_out(start, one.basis, two.basis, two.mass, 60, 5),
            "few": lambda: zoomed_out(start, one.basis[one.few], two.basis[two.few], None, 60, 5),
        },
        rounds,
    )


def least(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """CPU milliseconds of the fastest of so many, each side once a round."""
    found = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, work in sides.items():
            started = time.process_time()
            work()
            found[name] = min(found[name], 1000 * (time.process_time() - started))
    return found


if __name__ == "__main__":
    main()

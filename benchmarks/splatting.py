"""What a step of splatting costs as Gaussians and pixels grow: `python benchmarks/splatting.py`.

Forward and backward of 39 channels on one thread, in CPU milliseconds, which a busy machine does not lengthen (on a
GPU, wall-clock milliseconds), the least of some; and the exponents of growth, 1 being linear. Gaussians of one size in
space lie in a box that fills the image; `pairs` are those of a tile and a Gaussian. Writes
benchmarks/results/splatting.json.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from run import keep

from stillhouse.nn.splatting import TILE, Camera, _pairs, project, splat

GAUSSIANS, SIDES = (1000, 3160, 10_000, 31_600), (64, 128, 256, 512)
CHANNELS, SCALE = 39, 0.003
AT_SIDE, AT_GAUSSIANS = 128, 3160


def main() -> None:
    """Measure both curves and keep them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    curves = {
        "gaussians": [step(n, AT_SIDE, options.device, options.repeats) for n in GAUSSIANS],
        "pixels": [step(AT_GAUSSIANS, side, options.device, options.repeats) for side in SIDES],
    }
    slopes = {name: slope(curve, name) for name, curve in curves.items()}
    print(slopes)
    keep("splatting", {"curves": curves, "slopes": slopes}, options.device, 1)


def step(count: int, side: int, device: str, repeats: int) -> dict[str, Any]:
    """A row of a curve."""
    draw = torch.Generator().manual_seed(0)
    means = (torch.rand(count, 3, generator=draw) - 0.5) * 0.5
    leaves = [
        means,
        torch.full((count, 3), math.log(SCALE)),
        torch.randn(count, 4, generator=draw),
        0.1 + 0.8 * torch.rand(count, generator=draw),
        torch.rand(count, CHANNELS, generator=draw),
    ]
    leaves = [x.to(device).requires_grad_() for x in leaves]
    camera = Camera.at(torch.tensor([0.5, 0.3, 0.6]), side, side, 45.0).to(torch.device(device))
    clock = time.process_time if device == "cpu" else time.perf_counter
    taken = []
    for _ in range(repeats):
        start = clock()
        found = project(leaves[0], leaves[1], leaves[2], camera)
        seen = splat(found, leaves[3], leaves[4], side, side)
        seen.image.square().mean().backward()
        float(leaves[0].grad.sum())  # waits for the device
        taken.append(clock() - start)
    across = -(-side // TILE)
    pairs = len(_pairs(found, leaves[3], (across, across), TILE).gaussian)
    row = {"gaussians": count, "pixels": side * side, "pairs": pairs, "step_ms": 1000 * min(taken)}
    print(row, flush=True)
    return row


def slope(curve: list[dict[str, Any]], over: str) -> float:
    """The exponent between the last two rows."""
    a, b = curve[-2:]
    return math.log(b["step_ms"] / a["step_ms"]) / math.log(b[over] / a[over])


if __name__ == "__main__":
    main()

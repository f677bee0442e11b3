"""What pillars of a real sweep and their local graphs cost: `python benchmarks/point_clouds.py`.

Pillars of 0.16 m of a KITTI sweep (files under STILLHOUSE_DATA), and the neighbours of the 6,000 fullest among all, as
published, in chunks of several sizes: CPU milliseconds on one thread (on a GPU, wall-clock milliseconds), the least of
some, and the largest tensor of distances. Writes benchmarks/results/point_clouds.json.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run import keep

from stillhouse.data.point_scenes import read_sweep
from stillhouse.functional.point_clouds import nearest_rows, rows_at, voxelised

LOW, HIGH, SIZE = (0.0, -39.68, -3.0), (69.12, 39.68, 1.0), (0.16, 0.16, 4.0)
CHANNELS, QUERIES, NEIGHBOURS = 64, 6000, 128
CHUNKS = (64, 256, 1024, QUERIES)


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = next((Path(os.environ.get("STILLHOUSE_DATA", ".")) / "kitti_demo").glob("*.bin"))
    points = torch.from_numpy(read_sweep(path))[None].to(options.device)

    def pillars() -> Any:
        return voxelised(points, LOW, HIGH, SIZE, 32, 16000)

    voxels = pillars()
    there = voxels.counts > 0
    features = torch.randn(1, voxels.counts.shape[1], CHANNELS, generator=torch.Generator().manual_seed(0))
    features = features.to(options.device)
    queries = rows_at(features, voxels.counts.topk(QUERIES, dim=1).indices)
    rows = []
    for chunk in CHUNKS:

        def graph(size: int = chunk) -> Any:
            return nearest_rows(queries, features, NEIGHBOURS, there, size)

        megabytes = chunk * features.shape[1] * 4 / 1e6
        rows.append({"chunk": chunk, "ms": least(graph, options), "distances_mb": megabytes})
    found = {
        "points": points.shape[1],
        "pillars": int(there.sum()),
        "pillars_ms": least(pillars, options),
        "neighbours": rows,
    }
    print(found)
    keep("point_clouds", found, options.device, 1)


def least(work: Callable[[], Any], options: argparse.Namespace) -> float:
    """Milliseconds of the fastest of some repeats."""
    clock, taken = time.process_time if options.device == "cpu" else time.perf_counter, []
    for _ in range(options.repeats):
        start = clock()
        work()
        if options.device == "cuda":
            torch.cuda.synchronize()
        taken.append(clock() - start)
    return 1000 * min(taken)


if __name__ == "__main__":
    main()

"""Look-ups of one shared table beside separate `nn.EmbeddingBag` tables: `python benchmarks/unified_embedding.py`
(under a minute).

Sides take turns in one process; a figure is the median over rounds, in million values a second (features times rows of
a batch). `bags`: a table a feature, ids as they are; `hashed_bags`: the same with ids hashed into tables of the same
rows in all; `unified`: hashing and one gather for all features;
`unified_places`: the same where the loader has hashed already. `train` is a step with gradients and SGD on dense
gradients.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from run import keep
from torch import Tensor, nn

from stillhouse.methods.compression.unified_embedding.hashing import bucket, salt
from stillhouse.methods.compression.unified_embedding.table import Feature, UnifiedEmbedding


def main() -> None:
    """Measure, print and keep results/unified_embedding.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, nargs="+", default=[8, 26, 100])
    parser.add_argument("--values", type=int, default=4000, help="of each feature")
    parser.add_argument(
        "--share", type=float, default=0.1, help="rows of the shared and of the hashed tables, of all values"
    )
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {}
    for count in options.features:
        found[str(count)] = row = measured(count, options)
        print(count, " ".join(f"{k} {v:.3g}" for k, v in row.items()), flush=True)
    shape = {k: vars(options)[k] for k in ("values", "share", "dim", "batch_size", "rounds")}
    keep("unified_embedding", {**shape, "million_values_a_second": found}, options.device, options.threads)


def measured(count: int, options: argparse.Namespace) -> dict[str, float]:
    """Million values a second of every side, read and train."""
    device = torch.device(options.device)
    rows = round(options.share * options.values * count)
    table = UnifiedEmbedding([Feature(str(t)) for t in range(count)], rows, options.dim).to(device)
    bags = nn.ModuleList(nn.EmbeddingBag(options.values, options.dim, mode="sum") for _ in range(count)).to(device)
    small = nn.ModuleList(nn.EmbeddingBag(max(1, rows // count), options.dim, mode="sum") for _ in range(count)).to(
        device
    )
    salts = [torch.tensor(salt(t, 0), device=device) for t in range(count)]
    codes = torch.randint(options.values, (options.batch_size, count), device=device)
    places = table.places(codes[:, table.feature])

    def each(tables: nn.ModuleList, ids: list[Tensor]) -> Tensor:
        return torch.cat([bag(i[:, None]) for bag, i in zip(tables, ids)], 1)

    sides: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "bags": (bags, lambda: each(bags, list(codes.unbind(1)))),
        "hashed_bags": (
            small,
            lambda: each(small, [bucket(c, s, max(1, rows // count)) for c, s in zip(codes.unbind(1), salts)]),
        ),
        "unified": (table, lambda: table(codes)),
        "unified_places": (table, lambda: table.read(places)),
    }
    taken: dict[str, list[float]] = {f"{name}_{what}": [] for what in ("read", "train") for name in sides}
    for _ in range(options.rounds + 1):  # the first warms up
        for name, (module, look_up) in sides.items():
            optimizer = torch.optim.SGD(module.parameters(), 1e-3)

            def train(look_up: Callable[[], Tensor] = look_up, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.zero_grad()
                look_up().square().sum().backward()
                optimizer.step()

            with torch.no_grad():
                taken[f"{name}_read"].append(seconds(look_up, device))
            taken[f"{name}_train"].append(seconds(train, device))
    values = options.batch_size * count
    return {name: values / statistics.median(found[1:]) / 1e6 for name, found in taken.items()}


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, the mean of three."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(3):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / 3


if __name__ == "__main__":
    main()

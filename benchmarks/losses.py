"""Each objective's loss beside the authors' own code or a known port of it: `python benchmarks/losses.py [--mdistiller
FOLDER …]`.

Both sides get the same random signals (features of resnet32x4 and resnet8x4 at 32 px, logits of 100 classes), the same
weights where there are any, and take turns in short blocks of forward and backward passes. torchdistill is an extra
(`bench`); the other peers are imported from checkouts named on the command line.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from objectives import PAIR, seconds
from page import write_page
from peers import CLASSES, PEERS, SHAPES, TRAINING, Loss, LossInputs, one_stage_of_ofa
from run import RESULTS, keep
from torch import Tensor

from stillhouse import catalog
from stillhouse.distillation.objective import Objective, Progress
from stillhouse.evaluation.cost import peak_of_tensors
from stillhouse.functional.feature_maps import LAST_STAGES
from stillhouse.signals import Signals

LATE = Progress(epoch=100, epochs=240, steps_per_epoch=100)  # after every warm-up


class TrainingSet:
    """What an objective may ask about the training set."""

    def labels(self, split: str = "train") -> Tensor:
        return torch.arange(TRAINING) % CLASSES

    def generator(self, *key: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def class_mean(self, what: str, of: str = "teacher") -> tuple[Tensor, Tensor]:
        return torch.randn(CLASSES, SHAPES[-1][0], generator=self.generator()).relu(), torch.full(
            (CLASSES,), TRAINING // CLASSES
        )


def random_signals(batch_size: int) -> LossInputs:
    """What both sides compute on; the student's signals ask for gradients."""
    generator = torch.Generator().manual_seed(0)

    def one(learns: bool) -> Signals:
        draw = lambda *shape: torch.randn(batch_size, *shape, generator=generator)  # noqa: E731
        taps = {name: draw(*shape).relu().requires_grad_(learns) for name, shape in zip(LAST_STAGES, SHAPES)}
        logits, embedding = 3 * draw(CLASSES), draw(SHAPES[-1][0]).relu()
        return Signals(
            logits=logits.requires_grad_(learns),
            embedding=embedding.requires_grad_(learns),
            taps={**taps, "stage:2": taps["stage:-2"]},
        )

    index = torch.randperm(TRAINING, generator=generator)[:batch_size]
    return LossInputs(one(True), one(False), {"label": index % CLASSES, "index": index})


def ours(name: str, on: LossInputs) -> tuple[Objective, Loss]:
    """An objective of the catalogue, built and prepared, and its loss: the sum of its terms, without the published
    weight."""
    torch.manual_seed(0)
    objective = catalog.objective(name)()
    if name == "ofa_kd":  # the networks that it projects with are another matter
        return objective, one_stage_of_ofa(on)
    objective.build(on.student, on.teacher, on.batch)
    objective.prepare(TrainingSet())  # type: ignore[arg-type]

    def loss() -> Tensor:
        terms = [
            value
            for key, value in objective(on.student, on.teacher, on.batch, LATE).items()
            if not key.startswith("log:")
        ]
        return reduce(torch.add, terms)

    return objective, loss


def compare(name: str, peer: str, folder: Path | None, on: LossInputs, rounds: int) -> dict[str, Any]:
    """Our loss and a peer's in turns: milliseconds (medians), their ratio, peaks of memory, and how far the values are
    apart."""
    objective, mine = ours(name, on)
    made, scale = PEERS[peer].make(name, on, objective, folder), PEERS[peer].losses[name]
    theirs = made if scale == 1 else lambda: scale * made()
    leaves = [on.student.logits, on.student.embedding, *on.student.taps.values()]
    cpu = torch.device("cpu")

    def step(loss: Loss) -> float:
        value = loss()
        value.sum().backward()
        for leaf in leaves:
            leaf.grad = None  # type: ignore[union-attr]
        return float(value.detach().sum())

    torch.manual_seed(1)  # what a peer with draws was given is drawn under this
    values = step(mine), step(theirs)
    both = lambda: (step(mine), step(theirs))  # noqa: E731
    calls = max(1, min(100, int(0.1 / max(seconds(both, 1, cpu), 1e-5))))
    blocks = []
    for turn in range(rounds):
        sides = (mine, theirs) if turn % 2 == 0 else (theirs, mine)
        took = {side: seconds(lambda: step(side), calls, cpu) for side in sides}  # noqa: B023
        blocks.append((took[mine], took[theirs]))
    peaks = [peak_of_tensors(lambda: step(side), cpu) / 2**20 for side in (mine, theirs)]  # noqa: B023
    ratios = [a / b for a, b in blocks]
    return {
        "name": name,
        "peer": PEERS[peer].title,
        "authors": name in PEERS[peer].authors,
        "ms": 1000 * statistics.median(a for a, _ in blocks),
        "peer_ms": 1000 * statistics.median(b for _, b in blocks),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "mebibytes": peaks[0],
        "peer_mebibytes": peaks[1],
        "difference": abs(values[0] - values[1]) / max(abs(values[1]), 1e-12),
    }


def main() -> None:
    """Compare with every peer that is there, keep results/losses.json and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for peer in (p for p in PEERS if p != "torchdistill"):
        parser.add_argument(
            f"--{peer.replace('_', '-')}", type=Path, metavar="FOLDER", help=f"a checkout of {PEERS[peer].title}"
        )
    parser.add_argument("--only", nargs="+", help="objectives by name; default: all that a peer has")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each side")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    on, rows = random_signals(options.batch_size), []
    for peer, about in PEERS.items():
        folder = getattr(options, peer, None)
        if peer != "torchdistill" and folder is None:
            continue
        if folder is not None:
            sys.path.append(str(folder))
        for name in (n for n in about.losses if not options.only or n in options.only):
            row = compare(name, peer, folder, on, options.rounds)
            rows.append(row)
            print(
                f"{name:<22} {about.title:<13} {row['ms']:9.3f} ms {row['peer_ms']:9.3f} ms  x{row['ratio']:.3f} "
                f"({row['least']:.2f} to {row['most']:.2f})"
                f"  {row['mebibytes']:.1f} MiB {row['peer_mebibytes']:.1f} MiB  apart {row['difference']:.0e}",
                flush=True,
            )
    if not options.only:
        rows.sort(key=lambda row: (row["name"], row["peer"]))
        figures = {
            "teacher": PAIR[0],
            "student": PAIR[1],
            "batch_size": options.batch_size,
            "classes": CLASSES,
            "losses": rows,
        }
        keep("losses", figures, "cpu", options.threads)
        write_page(RESULTS)


if __name__ == "__main__":
    main()

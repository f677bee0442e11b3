"""How sides are timed: they take turns in short blocks of steps in one process, so that a busy machine slows all of
them alike.

Stillhouse's own `fit` drives: it draws its batches from a `Turns`, which stamps the clock where a block of draws begins
and ends, and between two blocks lets the other sides run theirs while Stillhouse's clock stands. On a CPU the clock is
the process's CPU time; on a GPU it is wall time, synchronised at block ends only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from stillhouse.signals import Batch

OURS = "stillhouse"
Step = Callable[[Batch], None]


class Turns:
    """A loader of one epoch for `stillhouse.training.engine.fit`; the first block of each side warms up and is not
    kept.

    Args:
        batches: what every side trains on, over and over, in this order.
        others: the other sides' steps by name.
        blocks: how many blocks of each side are kept.
        size: steps of a block.
        after_warm_up: called once, when every side has done its first block.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        others: Mapping[str, Step],
        blocks: int,
        size: int,
        after_warm_up: Callable[[], None] = lambda: None,
    ) -> None:
        self.batch_size = len(batches[0].get("label", batches[0]["input"]))
        self.seconds: dict[str, list[float]] = {OURS: [], **{name: [] for name in others}}
        self._batches, self._others, self._blocks, self._size, self._after = (
            batches,
            others,
            blocks,
            size,
            after_warm_up,
        )
        self._cuda = batches[0]["input"].is_cuda

    def __len__(self) -> int:
        """Steps of the one epoch: all blocks, and one more whose draw ends the last block."""
        return (self._blocks + 1) * self._size + 1

    def labels(self) -> None:
        """Class ids are not known before training."""

    def batches(self, epoch: int = 0, batch: int = 0, epochs: int | None = None) -> Iterator[Batch]:
        """The one epoch's batches."""
        names = list(self._others)
        for number in range(self._blocks + 1):
            block = [
                self._batches[i % len(self._batches)] for i in range(number * self._size, (number + 1) * self._size)
            ]
            begin = self._clock()
            yield from map(dict, block)
            self._keep(OURS, number, self._clock() - begin)
            for name in names:
                begin = self._clock()
                for one in map(dict, block):
                    self._others[name](one)
                self._keep(name, number, self._clock() - begin)
            names = names[1:] + names[:1]
            if number == 0:
                self._after()
        yield dict(self._batches[0])

    def _keep(self, name: str, number: int, seconds: float) -> None:
        if number:
            self.seconds[name].append(seconds / self._size)

    def _clock(self) -> float:
        if not self._cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


@dataclass(frozen=True)
class Ratio:
    """A side against the hand-written loop: milliseconds a step (median), and the ratio of blocks run next to each
    other (median, least, most)."""

    milliseconds: float
    ratio: float
    least: float
    most: float
    blocks: int


def compare(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, Ratio]:
    """Every side against `base`, from seconds a step by block."""
    out = {}
    for name, took in seconds.items():
        ratios = [a / b for a, b in zip(took, seconds[base])]
        out[name] = Ratio(
            1000 * statistics.median(took), statistics.median(ratios), min(ratios), max(ratios), len(ratios)
        )
    return out

"""The one resumable loop: it drives any step function, seeds each step, and logs, checks and checkpoints between steps.

Randomness is a function of (seed, stage, keys of the step, rank), so a checkpoint holds no random state and a killed
run resumes to the same bits. Terms stay on the device; every `log_every` steps they are read at once, checked to be
finite, written to metrics.csv, and then a checkpoint may follow.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stillhouse.errors import TrainingDiverged, UserError
from stillhouse.files import atomic_write
from stillhouse.randomness import seed_step
from stillhouse.training.display import Display
from stillhouse.training.metrics import Metrics


class Stateful(Protocol):
    """Anything whose state a checkpoint keeps."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...


class Loop:
    """Runs `step(i)` for i in [start, steps): seeds each, collects its terms, logs, checks, checkpoints, and answers
    Ctrl-C at the next step.

    Args:
        folder: where metrics.csv and checkpoints/ are.
        stage: name of this piece of training, unique in the folder.
        steps: how many.
        state: what a checkpoint holds, by name.
        keys: step -> the keys of its randomness, after (seed, stage); default (step,).
        where: step -> (epoch, step to show) for rows of metrics.csv.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        steps: int,
        state: Mapping[str, Stateful],
        *,
        seed: int = 0,
        log_every: int = 50,
        checkpoint_seconds: float = 20.0,
        accelerator: Any = None,
        keys: Callable[[int], tuple[int | str, ...]] | None = None,
        where: Callable[[int], tuple[int, int]] | None = None,
        live: Display | None = None,
        trackers: bool = False,
    ) -> None:
        self.folder, self.stage, self.steps, self.state = folder, stage, steps, dict(state)
        self.seed, self.log_every, self.checkpoint_seconds = seed, log_every, checkpoint_seconds
        self.accelerator = accelerator
        self.keys = keys or (lambda i: (i,))
        self.where = where or (lambda i: (0, i + 1))
        self.live = live or Display()
        self.trackers = trackers
        self.main = accelerator is None or accelerator.is_main_process
        self.world = 1 if accelerator is None else accelerator.num_processes
        self.path = folder / "checkpoints" / f"{stage}.pt"
        self.metrics = Metrics(folder / "metrics.csv")
        self.done, self.seconds = 0, 0.0
        self.finished = False
        self.extra: dict[str, Any] = {}
        self._window: list[tuple[tuple[str, ...], Tensor]] = []
        self._window_start = 0
        self._last_save = time.monotonic()
        self._interrupted = False
        self._stopping = False
        self._never_finite: set[str] = set()

    def restore(self) -> bool:
        """Load the checkpoint, if there is one; True if so."""
        self._never_finite = set(self._not_finite())
        if not self.path.exists():
            if self.main:
                self.metrics.keep(self.stage, 0)
            return False
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(
                f"The checkpoint {self.path} cannot be read ({type(error).__name__}); remove it to start this stage "
                "again."
            ) from error
        for name, item in self.state.items():
            item.load_state_dict(saved["state"][name])
        self.done, self.seconds, self.finished, self.extra = (
            saved["done"],
            saved["seconds"],
            saved["finished"],
            saved["extra"],
        )
        self._window = [(tuple(names), torch.tensor(values)) for names, values in saved["window"]]
        if self.main:
            self.metrics.keep(self.stage, saved["rows"])
        return True

    def check(self) -> None:
        """Raises `TrainingDiverged` where weights, statistics or an optimiser's state have become NaN or infinite;
        waits for the device."""
        names = self._not_finite() if self.main else []
        broken = [n for n in names if n not in self._never_finite]
        if self._agreed(bool(broken)):
            which = f" ({broken[0]}{f' and {len(broken) - 1} more' if broken[1:] else ''})" if broken else ""
            raise self._diverged(f"weights{which} are not finite after step {self.done}, though the loss was")

    def _not_finite(self) -> list[str]:
        """Names of the tensors that a checkpoint would hold and that are not finite."""
        tensors: dict[str, Tensor] = {}
        for name, item in self.state.items():
            if isinstance(item, nn.Module):
                tensors |= {f"{name}.{k}": v for k, v in item.state_dict().items() if isinstance(v, Tensor)}
            elif isinstance(item, torch.optim.Optimizer):
                states = item.state_dict()["state"].items()
                tensors |= {
                    f"{name}.{i}.{k}": v for i, state in states for k, v in state.items() if isinstance(v, Tensor)
                }
        tensors = {k: v for k, v in tensors.items() if v.is_floating_point() and v.device.type != "meta"}
        finite = torch.stack([v.isfinite().all() for v in tensors.values()]).tolist() if tensors else []
        return [name for name, good in zip(tensors, finite) if not good]

    def _diverged(self, what: str) -> TrainingDiverged:
        """The error for a training that cannot continue, and a mark that lets a run with a lower rate continue from its
        last checkpoint."""
        if self.path.exists():
            step = torch.load(self.path, map_location="cpu", weights_only=True)["done"]
            if self.main:
                diverged_mark(self.path).touch()
            then = (
                f"the checkpoint of step {step} is good, and a start in the same folder with other values of these "
                "continues from it"
            )
        else:
            then = "no checkpoint had been written yet"
        return TrainingDiverged(
            f"{self.stage}: {what}. Lower the learning rate (train.optimizer.lr) or the term's weight, or clip the "
            f"gradient (train.clip); {then}."
        )

    def save(self) -> None:
        """Write a checkpoint now (the main process; the others wait). Raises `TrainingDiverged` as `check` does: a
        stored checkpoint is good."""
        self.check()
        if self.main:
            content = {
                "state": {name: item.state_dict() for name, item in self.state.items()},
                "done": self.done,
                "seconds": self.seconds,
                "finished": self.finished,
                "extra": self.extra,
                "rows": self.metrics.count(self.stage),
                "window": [(list(names), values.tolist()) for names, values in self._window],
            }
            with atomic_write(self.path) as temporary:
                torch.save(content, temporary)
            diverged_mark(self.path).unlink(missing_ok=True)
        if self.world > 1:
            self.accelerator.wait_for_everyone()
        self._last_save = time.monotonic()

    def run(self, step: Callable[[int], Mapping[str, Tensor]], boundary: Callable[[int], bool] | None = None) -> None:
        """Go on to the end. `boundary(done)` is called after every step that ends an epoch (see `ends_epoch`); True
        stops early."""
        if self.finished:
            return
        rank = 0 if self.accelerator is None else self.accelerator.process_index
        self.live.start(self.stage, self.steps, self.done)
        clock = time.monotonic()
        with self._answering_interrupts():
            while self.done < self.steps and not self.finished:
                i = self.done
                seed_step(self.seed, self.stage, *self.keys(i), rank)
                terms = step(i)
                self._collect(i, terms)
                self.done = i + 1
                self.live.advance(self.done)
                at_end = self.ends_epoch(self.done)
                if self.done % self.log_every == 0 or at_end or self.done == self.steps:
                    self._flush()
                    self._stopping = self._stopping or self._any(self._interrupted)
                    if at_end and boundary is not None and boundary(self.done):
                        self.finished = True
                    now = time.monotonic()
                    self.seconds, clock = self.seconds + now - clock, now
                    if self.done < self.steps and not self.finished and self._due(now) and self.whole(self.done):
                        self.save()
                stop = self._interrupted if self.world == 1 else self._stopping  # which all processes know of
                if stop and self.whole(self.done):
                    self.seconds += time.monotonic() - clock
                    self.save()
                    raise KeyboardInterrupt
        self.finished = True
        self.live.stop(self.stage)

    def ends_epoch(self, done: int) -> bool:
        return False

    def whole(self, done: int) -> bool:
        """Whether nothing is half done after so many steps, so that a checkpoint says all."""
        return True

    def _due(self, now: float) -> bool:
        return self._agreed(now - self._last_save >= self.checkpoint_seconds)

    def _any(self, value: bool) -> bool:
        """Whether it is so in any process."""
        if self.world > 1:
            flag = torch.tensor(int(value), device=self.accelerator.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            value = bool(flag.item())
        return value

    def _agreed(self, value: bool) -> bool:
        """The main process's answer, in every process."""
        if self.world > 1:
            flag = torch.tensor(int(value), device=self.accelerator.device)
            torch.distributed.broadcast(flag, 0)
            value = bool(flag.item())
        return value

    def _collect(self, i: int, terms: Mapping[str, Tensor]) -> None:
        if not self._window:
            self._window_start = i
        values = [t.detach() for t in terms.values()]
        if values:
            self._window.append((tuple(terms), torch.stack(values) if len(values) > 1 else values[0].reshape(1)))

    def _flush(self) -> None:
        """Read the window's terms at once, check them, and write their means as one row."""
        if not self._window:
            return
        sums: dict[str, list[float]] = {}
        shape = {names for names, _ in self._window}
        if len(shape) == 1:
            stacked = torch.stack([v.to(self._window[-1][1].device).float() for _, v in self._window])
            if self.world > 1:
                stacked = self.accelerator.reduce(stacked, reduction="mean")
            table = [(self._window[0][0], row) for row in stacked.tolist()]
        else:
            table = [
                (names, (self.accelerator.reduce(v, reduction="mean") if self.world > 1 else v).tolist())
                for names, v in self._window
            ]
        for offset, (names, row) in enumerate(table):
            bad = [n for n, v in zip(names, row) if not math.isfinite(v)]
            if bad:
                at = self._window_start + offset
                values = ", ".join(f"{n} = {v:.4g}" for n, v in zip(names, row))
                self._window.clear()
                raise self._diverged(f"{' and '.join(bad)} not finite at step {at + 1} ({values})")
            for n, v in zip(names, row):
                sums.setdefault(n, []).append(v)
        self._window.clear()
        means = {n: sum(v) / len(v) for n, v in sums.items()}
        means.update(self.row_extras())
        self.log(means)

    def row_extras(self) -> dict[str, float]:
        """Further figures of a row, such as the learning rate."""
        return {}

    def log(self, values: Mapping[str, float]) -> None:
        """A row of metrics.csv, the live display, and the trackers."""
        epoch, shown = self.where(self.done - 1)
        if self.main:
            self.metrics.add(self.stage, epoch, shown, values)
            self.live.figures(values)
            if self.trackers:
                self.accelerator.log({f"{self.stage}/{k}": v for k, v in values.items()}, step=self.done)

    @contextmanager
    def _answering_interrupts(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def answer(number: int, frame: FrameType | None) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            self.live.say("Stopping after this step; start again to resume from here.")

        before = {s: signal.signal(s, answer) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def diverged_mark(checkpoint: Path) -> Path:
    """The empty file that says of a checkpoint that the training after it diverged."""
    return checkpoint.with_suffix(".diverged")


def loop(
    folder: Path,
    stage: str,
    state: Mapping[str, Stateful],
    step: Callable[[int], Mapping[str, Tensor]],
    steps: int,
    *,
    seed: int = 0,
    log_every: int = 50,
    checkpoint_seconds: float = 20.0,
    live: Display | None = None,
) -> float:
    """The same loop where there is no loader: `step(i)` does what the method does and returns named terms. Returns the
    seconds spent."""
    driver = Loop(
        folder, stage, steps, state, seed=seed, log_every=log_every, checkpoint_seconds=checkpoint_seconds, live=live
    )
    driver.restore()
    driver.run(step)
    driver.save()
    return driver.seconds

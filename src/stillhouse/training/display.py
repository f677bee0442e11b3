"""The live display of a run: progress bars in a terminal, a line now and then elsewhere. It never touches the
device."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any


class Display:
    """Shows nothing; the base of the displays."""

    def start(self, stage: str, total: int, done: int) -> None:
        pass

    def advance(self, done: int) -> None:
        pass

    def figures(self, values: Mapping[str, float]) -> None:
        pass

    def stop(self, stage: str) -> None:
        pass

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def _short(values: Mapping[str, float]) -> str:
    shown = [(k, v) for k, v in values.items() if k in ("loss", "val/accuracy") or k.startswith("val/")][:3]
    return "  ".join(f"{k.removeprefix('val/')} {v:.3f}" for k, v in shown)


class Bars(Display):
    """Rich progress bars, one line a stage; outside a terminal, one line a stage and one every ten seconds.

    Of many stages (experts, the networks that judge a set) the last `SHOWN` stay, so that the one at work is always on
    the screen.
    """

    SHOWN = 8

    def __init__(self, prefix: str = "") -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.prefix = prefix
        self._bar: Any = None
        self._task: Any = None
        self._next = 0.0
        self._text = ""
        self._total = 0
        self._stage = ""

    def start(self, stage: str, total: int, done: int) -> None:
        self._stage, self._total, self._text = stage, total, ""
        self._next = time.monotonic() + 10
        label = f"{self.prefix}{stage}"
        if self.console.is_terminal:
            if self._bar is None:
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

                self._bar = Progress(
                    TextColumn("[bold]{task.description:<28}"),
                    BarColumn(24),
                    MofNCompleteColumn(),
                    TimeRemainingColumn(compact=True),
                    TextColumn("{task.fields[text]}"),
                    console=self.console,
                )
                self._bar.start()
            for old in self._bar.task_ids[: -self.SHOWN + 1]:
                self._bar.remove_task(old)
            self._task = self._bar.add_task(label, total=total, completed=done, text="")
        else:
            self.console.print(f"{label}: {total} steps" + (f", going on from {done}" if done else ""), highlight=False)

    def advance(self, done: int) -> None:
        now = time.monotonic()
        if self._bar is not None:
            if now >= self._next or done == self._total:
                self._next = now + 0.1
                self._bar.update(self._task, completed=done, text=self._text)
        elif now >= self._next:
            self._next = now + 10
            self.console.print(f"{self.prefix}{self._stage}: {done}/{self._total}  {self._text}", highlight=False)

    def figures(self, values: Mapping[str, float]) -> None:
        new = _short(values)
        if new:
            self._text = new

    def stop(self, stage: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._total, text=self._text)

    def say(self, text: str) -> None:
        (self._bar.console if self._bar is not None else self.console).print(text, highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

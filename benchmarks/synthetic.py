"""An iteration of data-set distillation beside the authors' own loops: `python benchmarks/synthetic.py --datadam FOLDER
--ncfm FOLDER --mtt FOLDER`.

Both sides take the same real images, network, batches and budget (the recipes' `paper` variants, with fewer classes,
images or inner steps where the table says so) and run their whole loops in turns, an iteration at a time; memory is
that of one iteration in a process of its own. `--growth` times ours alone over images per class and classes. Without a
checkout a method is left out, with a sentence.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from memory import peak_resident
from page import write_page
from run import RESULTS, keep
from synthetic_peers import ENDLESS, PEERS, Begins, PeerImages

from stillhouse import catalog
from stillhouse.runs.recipe import load
from stillhouse.runs.run import Run
from stillhouse.synthetic.pools import experts
from stillhouse.synthetic.real import RealImages, unnormalised

RECIPES = Path(__file__).parents[1] / "recipes" / "datasets"
SETTINGS: dict[str, tuple[str, ...]] = {
    "datadam": ("data.size=2000",),
    "ncfm": ("data.size=2100", "data.classes=[0,1]", "pool.count=1", "pool.epochs=1", "fixed_real=true"),
    "mtt": (
        "data.size=500",
        "zca=false",
        "experts.count=1",
        "experts.epochs=3",
        "experts.batch_size=100",
        "max_start=1",
    ),
}
"""What differs from the recipe's `paper` variant: fewer real images to draw from, fewer experts, and two classes of
NCFM, which takes a step a class."""
CASES: dict[str, dict[str, int]] = {
    "datadam, ipc 1": {"ipc": 1},
    "datadam, ipc 10": {"ipc": 10},
    "datadam, ipc 50": {"ipc": 50},
    "ncfm, ipc 1": {"ipc": 1},
    "ncfm, ipc 10": {"ipc": 10},
    "mtt, ipc 1": {"ipc": 1, "inner_steps": 50},
    "mtt, ipc 10": {"ipc": 10, "inner_steps": 5},
}
GROWTH = {"ipc": (1, 5, 10, 20, 50), "classes": (2, 4, 6, 8, 10)}
SMALL: dict[str, tuple[str, ...]] = {
    "datadam": ("batch_real=16",),
    "ncfm": ("batch_real=16", "frequencies=256", "factor=1", "init=real"),
    "mtt": ("inner_steps=3",),
}
"""For growth: a narrow network, and a real side that does not hide the synthetic one."""


class LoopEnd(BaseException):
    """Ends a loop from where its next iteration would begin."""


class DrivenRun(Run):
    """A run whose main loop says where an iteration begins."""

    def __init__(self, folder: Path, config: Any, begins: Begins) -> None:
        super().__init__(folder, config, cpu=True)
        self.begins = begins

    def loop(
        self, name: str, state: Mapping[str, Any], step: Callable[[int], Any], steps: int, **options: Any
    ) -> float:
        """As the run's, with `begins` at each iteration (of NCFM: every step of every class); the experts' training
        goes through."""
        rounds = steps // ENDLESS

        def told(i: int) -> Any:
            if i % rounds == 0:
                self.begins()
            return step(i)

        return super().loop(name, state, told if rounds else step, steps, **options)


class DrivenLoop:
    """A loop in a thread of its own that stops where each iteration begins; `step()` lets it do one iteration."""

    def __init__(self, loop: Callable[[Begins], Any]) -> None:
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        threads = torch.get_num_threads()

        def run() -> None:
            torch.set_num_threads(threads)  # OpenMP keeps the number thread by thread
            try:
                loop(self._begins)
            except BaseException as error:
                self._error = error
                self._stopped.release()

        threading.Thread(target=run, daemon=True).start()
        self._stopped.acquire()
        self._raise()

    def step(self) -> None:
        self._go.release()
        self._stopped.acquire()
        self._raise()

    def _begins(self) -> None:
        self._stopped.release()
        self._go.acquire()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def config_of(method: str, sets: tuple[str, ...]) -> Any:
    """The recipe's `paper` variant, endless, with these keys set."""
    return load(RECIPES / f"{method}.yaml", "paper", ["data.augment=plain", f"iterations={ENDLESS}", *sets])


def ours(config: Any, scratch: Path, begins: Begins) -> None:
    """The method's own `run`."""
    catalog.method(config.method).run(config, DrivenRun(scratch, config, begins))


def theirs(config: Any, folder: Path, scratch: Path, begins: Begins) -> None:
    """The authors' loop, on the same real images and experts."""
    run = Run(scratch / "data", config, cpu=True)
    real, pool = RealImages.load(run, config.data), getattr(config, "experts", getattr(config, "pool", None))
    paths = [] if pool is None else experts(run, config.network, config.data, real, pool, config.augment)
    pixels = unnormalised(real.images, real.mean, real.std)
    PEERS[config.method][0](
        config, PeerImages(real.images, real.labels, pixels, len(real.classes), paths), folder, scratch, begins
    )


def side(name: str, config: Any, folder: Path, scratch: Path) -> Callable[[Begins], None]:
    """A loop by name, in a folder of its own."""
    (scratch / name).mkdir()
    if name == "ours":
        return lambda begins: ours(config, scratch / name, begins)
    return lambda begins: theirs(config, folder, scratch / name, begins)


def turns(config: Any, folder: Path, scratch: Path, rounds: int) -> list[tuple[float, float]]:
    """CPU seconds of an iteration, (ours, theirs), in turns; the first of each warms up and is not kept."""
    both = {name: DrivenLoop(side(name, config, folder, scratch)) for name in ("ours", "theirs")}
    blocks = []
    for turn in range(rounds + 1):
        took = {}
        for name in both if turn % 2 == 0 else reversed(both):
            began = time.process_time()
            both[name].step()
            took[name] = time.process_time() - began
        blocks.append((took["ours"], took["theirs"]))
    return blocks[1:]


def peaks(loop: Callable[[Begins], None]) -> dict[str, float]:
    """MiB of the third iteration: `tensors`, the most that torch holds beyond what it held before, and `resident`, the
    peak of the whole process."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    begun, found = [0], {}

    def begins() -> None:
        begun[0] += 1
        if begun[0] == 3:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the peak of what came before does not count
            profile.start()
        elif begun[0] == 4:
            found["resident"] = peak_resident()
            profile.stop()
            raise LoopEnd

    with contextlib.suppress(LoopEnd):
        loop(begins)
    held = most = 0
    results: Any = profile.profiler
    for event in sorted(
        (e for e in results.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        most = max(most, held)
    return {"tensors": most / 2**20, **found}


def in_a_process(
    what: str, method: str, sets: tuple[str, ...], folder: Path | None, options: argparse.Namespace
) -> Any:
    """What this file prints when it is called with `--part`: modules of the peers have the same names, and memory is a
    process's."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--part",
        what,
        method,
        str(folder),
        json.dumps(sets),
        "--threads",
        str(options.threads),
    ]
    done = subprocess.run([*command, "--rounds", str(options.rounds)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def part(what: str, method: str, sets: tuple[str, ...], folder: Path, rounds: int) -> Any:
    """One process's figures: `turns`, `alone` (ours, CPU seconds of each iteration), or the peaks of `ours` or
    `theirs`."""
    config = config_of(method, sets)
    with (
        tempfile.TemporaryDirectory() as scratch,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        if what == "turns":
            return turns(config, folder, Path(scratch), rounds)
        if what != "alone":
            return peaks(side(what, config, folder, Path(scratch)))
        mine, took = DrivenLoop(side("ours", config, folder, Path(scratch))), []
        for _ in range(rounds + 1):
            began = time.process_time()
            mine.step()
            took.append(time.process_time() - began)
        return took[1:]


def compare(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A case's row: seconds (medians), ratio ours over theirs, and peaks of memory."""
    method = name.partition(",")[0]
    sets = (*SETTINGS[method], *(f"{key}={value}" for key, value in CASES[name].items()))
    blocks = in_a_process("turns", method, sets, folder, options)
    memory = {who: in_a_process(who, method, sets, folder, options) for who in ("ours", "theirs")}
    ratios = [a / b for a, b in blocks]
    config = config_of(method, sets)
    return {
        "name": method,
        "peer": PEERS[method][1],
        **CASES[name],
        "classes": len(config.data.classes or range(10)),
        "batch_real": None if method == "mtt" else config.batch_real,
        "seconds": statistics.median(a for a, _ in blocks),
        "peer_seconds": statistics.median(b for _, b in blocks),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "mebibytes": memory["ours"],
        "peer_mebibytes": memory["theirs"],
    }


def growth(method: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of our iteration by images per class (10 classes) and by classes (10 images each), and the exponent at
    which they grow."""
    rows = []
    for axis, sizes in GROWTH.items():
        seconds = []
        for size in sizes:
            kept = [s for s in SETTINGS[method] if not s.startswith("data.")]
            count = {
                "ipc": (f"ipc={size}",),
                "classes": ("ipc=10", f"data.classes={list(range(size))}".replace(" ", "")),
            }[axis]
            per_class = 100 * (size if axis == "classes" else 10)
            sets = (*kept, f"data.size={per_class}", "network.options={width: 32}", *SMALL[method], *count)
            seconds.append(statistics.median(in_a_process("alone", method, sets, None, options)))
            print(f"{method:<8} {axis} {size}: {seconds[-1]:.3f} s", flush=True)
        rows.append(
            {"name": method, "axis": axis, "sizes": sizes, "seconds": seconds, "exponent": slope(sizes, seconds)}
        )
    return rows


def slope(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """The exponent of a power law through the points: least squares of logarithms."""
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def kept(name: str) -> dict[tuple[str, Any], dict[str, Any]]:
    """The rows of an earlier run, by method and by images per class or by axis; a run of some of them leaves the others
    as they were."""
    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text())["figures"]["rows"] if path.exists() else []
    return {(row["name"], row.get("axis", row.get("ipc"))): row for row in rows}


def main() -> None:
    """Compare with every peer that is there, keep results/synthetic.json (and, with --growth,
    results/synthetic_growth.json) and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for method, (_, repository) in PEERS.items():
        parser.add_argument(
            f"--{method}",
            type=Path,
            metavar="FOLDER",
            help=f"a checkout of {repository}; default: $STILLHOUSE_PEER_{method.upper()}",
        )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(CASES),
        default=list(CASES),
        metavar="CASE",
        help="cases, such as 'mtt, ipc 1'",
    )
    parser.add_argument(
        "--growth",
        nargs="*",
        choices=list(PEERS),
        metavar="METHOD",
        help="how our cost grows, in the place of the comparison; default: all",
    )
    parser.add_argument("--rounds", type=int, default=7, help="iterations of each side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is chatty
    if options.part:
        what, method, folder, sets = options.part
        print(json.dumps(part(what, method, tuple(json.loads(sets)), Path(folder), options.rounds)))
        return
    if options.growth is not None:
        found = kept("synthetic_growth") | {
            (method, row["axis"]): row for method in options.growth or PEERS for row in growth(method, options)
        }
        keep("synthetic_growth", {"rows": [found[key] for key in sorted(found)]}, "cpu", options.threads)
        write_page(RESULTS)
        return
    rows = kept("synthetic")
    for name in options.only:
        method = name.partition(",")[0]
        given = getattr(options, method) or os.environ.get(f"STILLHOUSE_PEER_{method.upper()}")
        if not given:
            print(
                f"{name}: left out, as the folder of {PEERS[method][1]} is not given (--{method}, or "
                f"STILLHOUSE_PEER_{method.upper()})."
            )
            continue
        rows[method, CASES[name]["ipc"]] = row = compare(name, Path(given).resolve(), options)
        print(
            f"{name:<16} {row['seconds']:8.3f} s {row['peer_seconds']:8.3f} s  x{row['ratio']:.3f} "
            f"({row['least']:.2f} to {row['most']:.2f})"
            f"  {row['mebibytes']['tensors']:.0f} MiB {row['peer_mebibytes']['tensors']:.0f} MiB",
            flush=True,
        )
    keep("synthetic", {"rows": [rows[key] for key in sorted(rows)]}, "cpu", options.threads)
    write_page(RESULTS)


if __name__ == "__main__":
    main()

"""Peak memory of a training step, ours and the hand-written loop's, each in processes of its own.

What torch holds for tensors is the same every time; the process's resident size, interpreter and libraries included,
depends on how the C library reuses what was freed, so it varies by some per cent. `python benchmarks/memory.py SIDE
...` is one of the processes and prints its figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from stillhouse.evaluation.cost import peak_of_tensors


def compare_memory(
    teacher: str,
    student: str,
    device: str,
    batch_size: int,
    steps: int,
    threads: int,
    sides: tuple[str, ...],
    rounds: int,
) -> dict[str, dict[str, list[float]]]:
    """{side: {what: mebibytes, one of each of `rounds` processes}}; the sides take turns."""
    peaks: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
    numbers = [str(v) for v in (batch_size, steps, threads)]
    for side in sides * rounds:
        command = [sys.executable, "-W", "ignore", __file__, side, teacher, student, device, *numbers]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        for what, peak in json.loads(done.stdout.splitlines()[-1]).items():
            peaks[side].setdefault(what, []).append(peak)
    return peaks


def one_side(
    side: str, teacher: str, student: str, device: str, batch_size: int, steps: int, threads: int
) -> dict[str, float]:
    """Train `side` for `steps` steps in this process: its peaks in mebibytes, `tensors` and, on a CPU, `resident`."""
    import sides
    from turns import OURS, Turns

    torch.set_num_threads(threads)
    pair = sides.Pair(teacher, student, torch.device(device))
    batches = pair.data(batch_size)
    networks = pair.make()

    def train() -> None:
        if side == OURS:
            sides.stillhouse(*networks, Turns(batches, {}, blocks=0, size=steps - 1))
            return
        step = (sides.PEERS[side][0] if side in sides.PEERS else sides.hand_written)(*networks)
        for number in range(steps):
            step(dict(batches[number % len(batches)]))

    before = [
        *networks[0].state_dict().values(),
        *networks[1].state_dict().values(),
        *(x for batch in batches for x in batch.values()),
    ]
    held = sum(x.nbytes for x in before) / 2**20
    found = {"tensors": held + peak_of_tensors(train, pair.device) / 2**20}
    return found if device == "cuda" else {**found, "resident": peak_resident()}


def peak_resident() -> float:
    """Mebibytes: peak resident size of this process. On Linux from /proc, as getrusage there starts from the size of
    the process that began this one."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("side", "teacher", "student", "device"):
        parser.add_argument(name)
    for name in ("batch_size", "steps", "threads"):
        parser.add_argument(name, type=int)
    print(json.dumps(one_side(**vars(parser.parse_args()))))

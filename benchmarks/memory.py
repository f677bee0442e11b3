"""Peak memory of a training step, ours and the hand-written loop's, each in a process of its own.

On a CPU the process's peak resident size, interpreter and libraries included; on a GPU the most that torch had allocated. Each process builds the
same networks and data; `python benchmarks/memory.py SIDE ...` is one of them and prints its figure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path


def compare_memory(
    teacher: str, student: str, device: str, batch_size: int, steps: int, threads: int, sides: tuple[str, ...], rounds: int
) -> dict[str, list[float]]:
    """Mebibytes at the peak by side, one for each of `rounds` processes, which take turns."""
    peaks: dict[str, list[float]] = {side: [] for side in sides}
    numbers = [str(v) for v in (batch_size, steps, threads)]
    for side in sides * rounds:
        command = [sys.executable, "-W", "ignore", __file__, side, teacher, student, device, *numbers]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks[side].append(json.loads(done.stdout.splitlines()[-1]))
    return peaks


def one_side(side: str, teacher: str, student: str, device: str, batch_size: int, steps: int, threads: int) -> float:
    """Train `side` for `steps` steps in this process and return its peak in mebibytes."""
    import sides
    import torch
    from turns import OURS, Turns

    torch.set_num_threads(threads)
    pair = sides.Pair(teacher, student, torch.device(device))
    batches = pair.data(batch_size)
    networks = pair.make()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if side == OURS:
        sides.stillhouse(*networks, Turns(batches, {}, blocks=0, size=steps - 1))
    else:
        step = (sides.PEERS[side][0] if side in sides.PEERS else sides.hand_written)(*networks)
        for number in range(steps):
            step(dict(batches[number % len(batches)]))
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident()


def peak_resident() -> float:
    """Peak resident size of this process in mebibytes. On Linux from /proc, as getrusage there starts from the size of the process that began this one."""
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

"""What starting costs: CPU seconds of whole processes, taken in turns."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from pathlib import Path

_SCRIPT = Path(sys.executable).with_name("stillhouse")
_COMMAND = [str(_SCRIPT)] if _SCRIPT.exists() else [sys.executable, "-m", "stillhouse"]
STARTS: dict[str, list[str]] = {
    "python": [sys.executable, "-c", "pass"],
    "import torch": [sys.executable, "-c", "import torch"],
    "import torch, stillhouse": [sys.executable, "-c", "import torch, stillhouse"],
    "import torch; from stillhouse import distill": [
        sys.executable,
        "-c",
        "import torch; from stillhouse import distill",
    ],
    "stillhouse --help": [*_COMMAND, "--help"],
    "stillhouse methods": [*_COMMAND, "methods"],
}


def start_up(rounds: int) -> dict[str, dict[str, float]]:
    """{start: median, least, most CPU seconds, and `over_torch`, the median difference to `import torch` in the same
    round}."""
    seconds: dict[str, list[float]] = {name: [] for name in STARTS}
    for number in range(rounds + 1):
        for name, command in STARTS.items():
            took = _cpu_seconds(command)
            if number:  # the first round fills the caches of files
                seconds[name].append(took)
    torch = seconds["import torch"]
    return {
        name: {
            "seconds": statistics.median(took),
            "least": min(took),
            "most": max(took),
            "over_torch": statistics.median(a - b for a, b in zip(took, torch)),
        }
        for name, took in seconds.items()
    }


def _cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

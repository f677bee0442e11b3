"""`make bench`: Stillhouse's step, memory and start-up against a hand-written loop, torchdistill and NVIDIA Model
Optimizer, measured in one run.

Prints the figures, keeps them in benchmarks/results/ as JSON and writes docs/benchmarks.md. `--only` takes some of the
parts, and the others' figures stay as they were; `python benchmarks/objectives.py` compares the objectives.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PAIRS = {
    "imagenet_stem": ("torchvision:resnet34", "torchvision:resnet18"),
    "cifar_stem": ("stillhouse:resnet34", "stillhouse:resnet18"),
}
PARTS = ("free", "imagenet_stem", "cifar_stem", "memory", "startup")


def main() -> None:
    """Measure the parts asked for, one JSON file each, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; one gives the steadiest CPU time")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--blocks", type=int, default=24, help="blocks of two steps that each side runs on the imagenet_stem pair"
    )
    parser.add_argument(
        "--cifar-blocks",
        type=int,
        default=5,
        help="blocks of one step on the cifar_stem pair, whose steps take seconds on a CPU",
    )
    parser.add_argument("--free-blocks", type=int, default=60, help="blocks of 50 steps that cost nothing")
    parser.add_argument(
        "--memory-rounds", type=int, default=2, help="processes of each side whose peak memory is taken"
    )
    parser.add_argument("--rounds", type=int, default=5, help="starts of each command")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for part in options.only:
        print(f"{part} …", flush=True)
        keep(part, measure(part, options), options.device, options.threads)
    from page import write_page

    print(write_page(RESULTS))


def measure(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one part."""
    from memory import compare_memory
    from sides import Pair
    from startup import start_up
    from steps import HAND, free_step, pair_steps
    from turns import OURS

    if part == "free":
        return free_step(torch.device(options.device), options.free_blocks)
    if part == "startup":
        return start_up(options.rounds)
    if part == "memory":
        teacher, student = PAIRS["cifar_stem"]
        peaks = compare_memory(
            teacher,
            student,
            options.device,
            options.batch_size,
            2,
            options.threads,
            (HAND, OURS),
            options.memory_rounds,
        )
        return {"teacher": teacher, "student": student, "batch_size": options.batch_size, "mebibytes": peaks}
    long = part == "cifar_stem" and options.device == "cpu"
    blocks, size = (options.cifar_blocks, 1) if long else (options.blocks, 2 if options.device == "cpu" else 20)
    return pair_steps(Pair(*PAIRS[part], torch.device(options.device)), options.batch_size, blocks, size)


def keep(part: str, figures: dict[str, Any], device: str, threads: int) -> None:
    """Write results/PART.json (results/PART.cuda.json on a GPU): figures, machine, versions, date."""
    made = {
        "part": part,
        "date": datetime.date.today().isoformat(),
        "machine": machine(device, threads),
        "versions": versions(),
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{part}{'' if device == 'cpu' else '.' + device}.json"
    path.write_text(json.dumps(made, indent=1) + "\n")


def machine(device: str, threads: int) -> str:
    """Where figures were taken, in words."""
    cores = f"{os.cpu_count()} cores"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {cores}"
    return f"CPU, {cores} ({platform.machine()}), {threads} thread{'s' if threads > 1 else ''}"


def versions() -> dict[str, str]:
    """Versions of what was measured, where it is installed."""
    out = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("stillhouse", "torchvision", "accelerate", "torchdistill", "nvidia-modelopt"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out


if __name__ == "__main__":
    main()

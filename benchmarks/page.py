"""docs/benchmarks.md, written from the JSON files that the benchmarks leave."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMES = {"hand_written": "hand-written loop", "stillhouse": "Stillhouse", "torchdistill": "torchdistill", "model_optimizer": "NVIDIA Model Optimizer"}
HEAD = """# Benchmarks

Written by `make bench`; do not edit. Ratios come from blocks of steps that the sides run in turns in one process, so a busy machine slows all alike:
the median over blocks, with the least and the most. Batches are in memory, nobody writes checkpoints, and everybody trains the same weights on the
same data. The peers are used as their documentation shows, torchdistill's loss logger included.
"""


def write_page(results: Path, page: Path | None = None) -> str:
    """Write the page from all results there are, and return its text."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    text = HEAD + "\n## Goals\n\n" + _table(["goal", "at most", "measured"], _goals({name: made["figures"] for name, made in found.items()}))
    for suffix, title in (("", ""), (".cuda", " on a GPU")):
        for part, show in SECTIONS.items():
            if part + suffix in found:
                made = found[part + suffix]
                text += "\n" + show(made["figures"], title) + f"\n{made['date']}; {made['machine']}; {_versions(made['versions'])}.\n"
    page = page or results.parents[1] / "docs" / "benchmarks.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(text)
    return text


def _goals(found: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for part in (p + s for s in ("", ".cuda") for p in ("imagenet_stem", "cifar_stem")):
        if part in found:
            sides = found[part]["sides"]
            rows.append([f"a step on the {part} pair, of the hand-written loop's", "1.02", f"{sides['stillhouse']['ratio']:.3f}"])
            for peer in (p for p in sides if p not in ("stillhouse", "hand_written")):
                rows.append(
                    [f"a step on the {part} pair, below {NAMES[peer]}'s", f"{sides[peer]['ratio']:.3f}", f"{sides['stillhouse']['ratio']:.3f}"]
                )
    for part in (p for p in ("free", "free.cuda") if p in found):
        rows.append([f"our own work a step ({part})", "0.3 ms", f"{found[part]['own_ms']:.3f} ms"])
    for part in (p for p in ("memory", "memory.cuda") if p in found):
        peaks = {side: {what: statistics.median(values) for what, values in figures.items()} for side, figures in found[part]["mebibytes"].items()}
        for what, hand in peaks["hand_written"].items():
            rows.append([f"{part} ({what}), of the hand-written loop's", "1.02", f"{peaks['stillhouse'][what] / hand:.3f}"])
    if "startup" in found:
        started = found["startup"]
        rows.append(["`import stillhouse` over `import torch`", "0.2 s", f"{started['import torch, stillhouse']['over_torch']:+.2f} s"])
        rows += [[f"`{name}`", "0.3 s", f"{row['seconds']:.2f} s"] for name, row in started.items() if name.startswith("stillhouse ")]
    return rows


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _steps(figures: Mapping[str, Any], title: str) -> str:
    rows = []
    for side, row in sorted(figures["sides"].items(), key=lambda item: item[0] != "hand_written"):
        spread = "" if side == "hand_written" else f"{row['least']:.3f} to {row['most']:.3f}"
        gap = "" if row["gap"] is None else f"{row['gap']:.0e}"
        rows.append([NAMES[side], f"{row['milliseconds']:.1f}", f"{row['ratio']:.3f}", spread, gap])
    rows += [[NAMES[side], "", why, "", ""] for side, why in figures["missing"].items()]
    blocks = figures["sides"]["hand_written"]["blocks"]
    return (
        f"## A training step{title}: {figures['teacher']} to {figures['student']}, 32 px, batch {figures['batch_size']}\n\n"
        f"0.1 CE + 0.9 KD (T = 4), SGD with momentum; {blocks} blocks of {figures['block_steps']} step(s). The last column is the relative distance of "
        "the student's weights from the hand-written loop's after a block.\n\n"
        + _table(["side", "ms a step", "ratio to the hand-written loop", "least to most", "distance"], rows)
    )


def _free(figures: Mapping[str, Any], title: str) -> str:
    return (
        f"## A step that costs nothing{title}\n\nA teacher and a student of one parameter: what Stillhouse's own work costs a step "
        f"({figures['blocks']} blocks of {figures['block_steps']} steps).\n\n"
        + _table(
            ["Stillhouse, ms", "hand-written loop, ms", "our own work, ms", "least to most, ms"],
            [
                [
                    *(f"{figures[k]:.3f}" for k in ("stillhouse_ms", "hand_written_ms", "own_ms")),
                    f"{figures['own_least_ms']:.3f} to {figures['own_most_ms']:.3f}",
                ]
            ],
        )
    )


def _memory(figures: Mapping[str, Any], title: str) -> str:
    titles = {"tensors": "torch's tensors", "resident": "the whole process, resident"}
    hand = figures["mebibytes"]["hand_written"]
    rows = []
    for what, found in hand.items():
        for side, peaks in figures["mebibytes"].items():
            middle = statistics.median(peaks[what])
            spread = f"{min(peaks[what]):,.0f} to {max(peaks[what]):,.0f}"
            rows.append([titles[what], NAMES[side], f"{middle:,.0f}", spread, f"{middle / statistics.median(found):.3f}"])
    return (
        f"## Memory{title}\n\n{figures['teacher']} to {figures['student']}, batch {figures['batch_size']}, each side in processes of its own: peaks, the "
        "median of processes. What the C library keeps for later makes resident sizes vary.\n\n"
        + _table(["what", "side", "MiB", "least to most", "ratio"], rows)
    )


def _startup(figures: Mapping[str, Any], title: str) -> str:
    rows = []
    for name, row in figures.items():
        over = f"{row['over_torch']:+.2f}" if "torch" in name and name != "import torch" else ""
        rows.append([f"`{name}`", f"{row['seconds']:.2f}", f"{row['least']:.2f} to {row['most']:.2f}", over])
    return "## Start-up\n\nCPU seconds of a whole process, median of starts taken in turns.\n\n" + _table(
        ["start", "s", "least to most", "over importing torch"], rows
    )


def _objectives(figures: Mapping[str, Any], title: str) -> str:
    rows = []
    for row in figures["objectives"]:
        step = "" if row["step_ratio"] is None else f"{row['step_ratio']:.2f}"
        rows.append([f"`{row['name']}`", row["teacher"], f"{row['loss_ms']:.2f}", f"{row['loss_ratio']:,.1f}", f"{row['mebibytes']:.1f}", step])
    left_out = "".join(f"- `{name}`: {why}\n" for name, why in figures["left_out"].items())
    return (
        f"## What each objective costs{title}\n\n{figures['teacher']} to {figures['student']}, batch {figures['batch_size']}, {figures['classes']} classes, "
        "default options. The loss alone is forward and backward on signals that are already there, and MiB is the most that it holds at a time; the step "
        "is the whole one: both networks forward, backward, inner steps; without the optimiser. Ratios are to `kd`.\n\n"
        + _table(["objective", "teacher", "loss, ms", "loss, ratio", "loss, MiB", "step, ratio"], rows)
        + (f"\nNot measured here:\n\n{left_out}" if left_out else "")
    )


SECTIONS = {"imagenet_stem": _steps, "cifar_stem": _steps, "free": _free, "memory": _memory, "startup": _startup, "objectives": _objectives}

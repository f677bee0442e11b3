"""docs/benchmarks.md, written from the JSON files that the benchmarks leave."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMES = {
    "hand_written": "hand-written loop",
    "stillhouse": "Stillhouse",
    "torchdistill": "torchdistill",
    "model_optimizer": "NVIDIA Model Optimizer",
}
TRAINERS = {
    **NAMES,
    "plain": "hand-written loop",
    "stillhouse": "Stillhouse, `fit`",
    "stillhouse_trainer": "Stillhouse in the Trainer",
    "trl": "TRL",
}
HEAD = """# Benchmarks

Written by `make bench`; do not edit. Ratios come from blocks of steps that the sides run in turns in one process, so a busy machine slows all alike:
the median over blocks, with the least and the most. Batches are in memory, nobody writes checkpoints, and everybody trains the same weights on the
same data. The peers are used as their documentation shows, torchdistill's loss logger included.
"""


def write_page(results: Path, page: Path | None = None) -> str:
    """Write the page from all results there are, and return its text."""
    found = {path.stem: _read(path) for path in sorted(results.glob("*.json"))}
    text = (
        HEAD
        + "\n## Goals\n\n"
        + _table(["goal", "at most", "measured"], _goals({name: made["figures"] for name, made in found.items()}))
    )
    for suffix, title in (("", ""), (".cuda", " on a GPU")):
        for part, show in SECTIONS.items():
            if part + suffix in found:
                made = found[part + suffix]
                text += (
                    "\n"
                    + show(made["figures"], title)
                    + f"\n{made['when']}{made['machine']}; {_versions(made['versions'])}.\n"
                )
    page = page or results.parents[1] / "docs" / "benchmarks.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(text)
    return text


def _read(path: Path) -> dict[str, Any]:
    """Figures, and when, where and of what they were taken; two benchmarks write these beside the figures."""
    made = json.loads(path.read_text())
    if "figures" in made:
        return {**made, "when": f"{made['date']}; "}
    place = made.get("environment", made)
    versions = place.get("versions") or {name: place[name] for name in ("python", "torch") if name in place}
    cores = f", {place['cores']} cores" if "cores" in place else ""
    threads = place.get("threads", 1)
    return {
        "figures": made,
        "when": "",
        "machine": f"CPU{cores}, {threads} thread{'s' if threads > 1 else ''}",
        "versions": versions,
    }


def _goals(found: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for part in (p + s for s in ("", ".cuda") for p in ("imagenet_stem", "cifar_stem")):
        if part in found:
            sides = found[part]["sides"]
            rows.append(
                [
                    f"a step on the {part} pair, of the hand-written loop's",
                    "1.02",
                    f"{sides['stillhouse']['ratio']:.3f}",
                ]
            )
            for peer in (p for p in sides if p not in ("stillhouse", "hand_written")):
                rows.append(
                    [
                        f"a step on the {part} pair, below {NAMES[peer]}'s",
                        f"{sides[peer]['ratio']:.3f}",
                        f"{sides['stillhouse']['ratio']:.3f}",
                    ]
                )
    for task, sides in found.get("dense", {"tasks": {}})["tasks"].items():
        row = sides["stillhouse"]
        text = f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        rows.append([f"a step of {task} under a teacher, of the hand-written loop's", "1.02", text])
    for part in (p for p in ("free", "free.cuda") if p in found):
        rows.append([f"our own work a step ({part})", "0.3 ms", f"{found[part]['own_ms']:.3f} ms"])
    for part in (p for p in ("memory", "memory.cuda") if p in found):
        peaks = {
            side: {what: statistics.median(values) for what, values in figures.items()}
            for side, figures in found[part]["mebibytes"].items()
        }
        for what, hand in peaks["hand_written"].items():
            rows.append(
                [f"{part} ({what}), of the hand-written loop's", "1.02", f"{peaks['stillhouse'][what] / hand:.3f}"]
            )
    for part in (p for p in ("big_vocabulary", "big_vocabulary.cuda") if p in found):
        worst = {
            what: max(row[what] for row in found[part]["losses"].values()) for what in ("time_ratio", "memory_ratio")
        }
        rows.append(
            [f"{part}: time in chunks, of the plain loss's (the worst loss)", "1.0", f"{worst['time_ratio']:.3f}"]
        )
        rows.append(
            [f"{part}: memory in chunks, of the plain loss's (the worst loss)", "0.125", f"{worst['memory_ratio']:.3f}"]
        )
    for run in found.get("store", {}).get("step", ()):
        for side in (s for s in run["sides"] if s.startswith("store")):
            rows.append(
                [
                    f"a step of {run['student']} from a {side}, of the student's alone",
                    "1.05",
                    f"{run['sides'][side]['ratio']:.3f}",
                ]
            )
    for row in found.get("synthetic", {}).get("rows", ()):
        sizes = row["mebibytes"]["tensors"] / row["peer_mebibytes"]["tensors"]
        rows.append(
            [f"an iteration of `{row['name']}`, ipc {row['ipc']}, of its authors' code", "0.667", f"{row['ratio']:.3f}"]
        )
        rows.append([f"its memory, of its authors' code ({row['name']}, ipc {row['ipc']})", "1.0", f"{sizes:.3f}"])
    if "startup" in found:
        started = found["startup"]
        rows.append(
            [
                "`import stillhouse` over `import torch`",
                "0.2 s",
                f"{started['import torch, stillhouse']['over_torch']:+.2f} s",
            ]
        )
        rows += [
            [f"`{name}`", "0.3 s", f"{row['seconds']:.2f} s"]
            for name, row in started.items()
            if name.startswith("stillhouse ")
        ]
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
        f"## A training step{title}: {figures['teacher']} to {figures['student']}, 32 px, batch "
        f"{figures['batch_size']}\n\n"
        f"0.1 CE + 0.9 KD (T = 4), SGD with momentum; {blocks} blocks of {figures['block_steps']} step(s). The last "
        "column is the relative distance of "
        "the student's weights from the hand-written loop's after a block.\n\n"
        + _table(["side", "ms a step", "ratio to the hand-written loop", "least to most", "distance"], rows)
    )


def _free(figures: Mapping[str, Any], title: str) -> str:
    return (
        f"## A step that costs nothing{title}\n\nA teacher and a student of one parameter: what Stillhouse's own work "
        "costs a step "
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
            rows.append(
                [titles[what], NAMES[side], f"{middle:,.0f}", spread, f"{middle / statistics.median(found):.3f}"]
            )
    return (
        f"## Memory{title}\n\n{figures['teacher']} to {figures['student']}, batch {figures['batch_size']}, each side "
        "in processes of its own: peaks, the "
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
        name = f"`{row['name']}`" + (f" ({row['networks']})" if row.get("networks", "the pair") != "the pair" else "")
        rows.append(
            [
                name,
                row["teacher"],
                f"{row['loss_ms']:.2f}",
                f"{row['loss_ratio']:,.1f}",
                f"{row['mebibytes']:.1f}",
                step,
            ]
        )
    left_out = "".join(f"- `{name}`: {why}\n" for name, why in figures["left_out"].items())
    return (
        f"## What each objective costs{title}\n\n{figures['teacher']} to {figures['student']}, batch "
        f"{figures['batch_size']}, {figures['classes']} classes, "
        "default options. The loss alone is forward and backward on signals that are already there, and MiB is the "
        "most that it holds at a time; the step "
        "is the whole one: both networks forward, backward, inner steps; without the optimiser. Ratios are to "
        "`kd`.\n\n"
        + _table(["objective", "teacher", "loss, ms", "loss, ratio", "loss, MiB", "step, ratio"], rows)
        + (f"\nNot measured here:\n\n{left_out}" if left_out else "")
    )


def _losses(figures: Mapping[str, Any], title: str) -> str:
    rows = [
        [
            f"`{row['name']}`",
            row["peer"],
            "authors' own" if row["authors"] else "port",
            f"{row['ms']:.2f}",
            f"{row['peer_ms']:.2f}",
            f"{row['ratio']:.3f}",
            f"{row['least']:.2f} to {row['most']:.2f}",
            f"{row['mebibytes']:.1f}",
            f"{row['peer_mebibytes']:.1f}",
            f"{row['difference']:.0e}",
        ]
        for row in figures["losses"]
    ]
    return (
        f"## Losses beside other code{title}\n\nForward and backward on the signals of {figures['teacher']} and "
        f"{figures['student']}, batch "
        f"{figures['batch_size']}, {figures['classes']} classes, in turns; *ratio* is ours over theirs, *apart* the "
        "relative distance of the values.\n\n"
        + _table(
            [
                "objective",
                "peer",
                "code",
                "ours, ms",
                "theirs, ms",
                "ratio",
                "least to most",
                "ours, MiB",
                "theirs, MiB",
                "apart",
            ],
            rows,
        )
    )


def _big_vocabulary(figures: Mapping[str, Any], title: str) -> str:
    rows = [
        [
            f"`{name}`",
            f"{row['plain_seconds']:.2f}",
            f"{row['chunked_seconds']:.2f}",
            f"{row['time_ratio']:.3f}",
            f"{row['time_least']:.3f} to {row['time_most']:.3f}",
            f"{row['plain_mebibytes']:,.0f}",
            f"{row['chunked_mebibytes']:,.0f}",
            f"{row['memory_ratio']:.3f}",
            f"{row['gradient_gap']:.0e}",
        ]
        for name, row in figures["losses"].items()
    ]
    return (
        f"## Losses of a big vocabulary{title}\n\n{figures['tokens']:,} tokens, a vocabulary of "
        f"{figures['vocabulary']:,}, hidden states of "
        f"{figures['width']} (the teacher's of {figures['teacher_width']}), top {figures['top']}: forward and "
        "backward from hidden states and output "
        f"matrices, all logits at once (plain) against chunks; {figures['rounds']} rounds in turns. Memory is the "
        "most that a loss and its gradients "
        "hold; the last column is the relative distance of the gradients.\n\n"
        + _table(
            [
                "loss",
                "plain, s",
                "chunks, s",
                "ratio",
                "least to most",
                "plain, MiB",
                "chunks, MiB",
                "ratio",
                "distance",
            ],
            rows,
        )
    )


def _language(figures: Mapping[str, Any], title: str) -> str:
    plain = figures["sides"]["plain"]
    rows = [
        [
            TRAINERS.get(side, side),
            f"{1000 * row['seconds']:.1f}",
            f"{row['seconds'] / plain['seconds']:.3f}",
            f"{row['bytes'] / 2**20:,.0f}",
            f"{row['bytes'] / plain['bytes']:.3f}",
        ]
        for side, row in figures["sides"].items()
    ]
    return (
        f"## A step of language models{title}\n\nA small pair, batch {figures['batch_size']} of {figures['length']} "
        "tokens, a vocabulary of "
        f"{figures['vocabulary']:,}; the Jensen-Shannon divergence at beta 0.5 (Model Optimizer: its own KL), AdamW; "
        f"{figures['rounds']} processes of each side "
        "in turns, CPU seconds, medians. Memory is what is held beyond the start.\n\n"
        + _table(["side", "ms a step", "ratio to the hand-written loop", "MiB", "ratio"], rows)
    )


def _store(figures: Mapping[str, Any], title: str) -> str:
    text = f"## A teacher's signals from a store{title}\n"
    rows = [
        [
            run["student"],
            side,
            f"{row['ms']:.1f}",
            f"{row['ratio']:.3f}",
            "" if side == "alone" else f"{row['least']:.3f} to {row['most']:.3f}",
        ]
        for run in figures.get("step", ())
        for side, row in run["sides"].items()
    ]
    if rows:
        sizes = {
            name: kept["bytes_per_sample_and_view"] for run in figures["step"] for name, kept in run["stores"].items()
        }
        text += (
            f"\nA training step, loader included, batch {figures['step'][0]['batch_size']}, in turns: the student "
            "alone, with a stored teacher, with the live "
            "one.\n\n"
            + _table(["student", "side", "ms a step", "ratio to alone", "least to most"], rows)
            + "\nOn disk, a sample and view: "
            + ", ".join(f"{size:.0f} bytes ({name.removeprefix('store, ')})" for name, size in sizes.items())
            + ".\n"
        )
    learned = figures.get("tokens", {}).get("rows", {})
    sizes = figures.get("bytes_per_token", {})
    if sizes or learned:
        rows = [
            [name, f"{sizes[name]:,.1f}" if name in sizes else "", _spread(learned.get(name, {}).get("nll"))]
            for name in {**learned, **sizes}
        ]
        seeds = len(figures["tokens"]["seeds"]) if learned else 0
        text += "\nOf a small language model of 512 tokens, by what is kept" + (
            f", and what its student reaches (mean and standard deviation of {seeds} seeds):\n\n"
            if learned
            else ":\n\n"
        )
        text += (
            _table(["kept", "bytes a token", "test loss, nats a token"], rows)
            if learned
            else _table(["kept", "bytes a token"], [r[:2] for r in rows])
        )
    if "kd_gradient" in figures:
        made = figures["kd_gradient"]
        kept = list(next(iter(made["temperature"].values())))
        text += (
            f"\nHow far the gradient of `kd` is from that of full fp32 logits, relative, over {made['images']:,} "
            "images:\n\n"
            + _table(
                ["temperature", *kept],
                [[t, *(f"{row[name]['distance']:.0e}" for name in kept)] for t, row in made["temperature"].items()],
            )
        )
    return text


def _spread(values: list[float] | None) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _graphs(figures: Mapping[str, Any], title: str) -> str:
    large = figures["million"]
    asked = [
        ("Cora, all neighbours", figures["cora"]),
        *((f"{large['nodes']:,} nodes, neighbours {f}", s) for f, s in large["fan_outs"].items()),
    ]
    rows = [
        [name, size, f"{row['mlp']:.3f}", f"{row['gnn']:.2f}", f"{row['ratio']:.1f}"]
        for name, sizes in asked
        for size, row in sizes.items()
    ]
    return (
        f"## A perceptron in the place of a graph network{title}\n\nCPU milliseconds of inference for some nodes: the "
        "GCN with its neighbours fetched, over the "
        "MLP of its width and depth. Growth with the graph is in [graph-tables.md](graph-tables.md).\n\n"
        + _table(["graph", "nodes asked for", "MLP, ms", "GCN, ms", "ratio"], rows)
    )


def _mirage(figures: Mapping[str, Any], title: str) -> str:
    timed = (
        "distil_seconds",
        "distil_known_support_seconds",
        "epoch_all_seconds",
        "epoch_distilled_seconds",
        "epochs_that_distillation_costs",
    )
    rows = [
        [
            name,
            f"{row['graphs']:,}",
            f"{row['trees']:,}",
            f"{row['top_tenth_covers']:.2f}",
            *(f"{row[k]:.3f}" if k in row else "" for k in timed),
        ]
        for name, row in figures["sets"].items()
    ]
    return (
        f"## Mirage: a set of graphs distilled{title}\n\nCPU seconds at {figures['hops']} hops and a budget of "
        f"{figures['budget']:.0%} of the nodes; "
        "*covers*: the share of nodes whose tree is among the most frequent tenth of trees; the last column is what "
        "distilling costs, in epochs of GIN on "
        "all graphs.\n\n"
        + _table(
            [
                "set",
                "graphs",
                "trees",
                "covers",
                "distil, s",
                "of known support, s",
                "an epoch of all, s",
                "an epoch of the distilled, s",
                "epochs",
            ],
            rows,
        )
    )


def _functional_maps(figures: Mapping[str, Any], title: str) -> str:
    rows = [
        [k, f"{row['batch']:.2f}", f"{row['row_by_row']:.2f}", f"{row['ratio']:.1f}"]
        for k, row in figures["solves"].items()
    ]
    zoom = figures["zoomout"]
    return (
        f"## Functional maps: the masked solve{title}\n\nCPU milliseconds of a map k x k with its gradient, from "
        f"{figures['features']} features, all rows in one batch of solves beside an inverse for each row. ZoomOut from "
        f"20 to 60 takes {zoom['all']:.1f} ms on 642 vertices and {zoom['few']:.1f} ms on 200 of them.\n\n"
        + _table(["k", "batch, ms", "row by row, ms", "ratio"], rows)
    )


def _unified_embedding(figures: Mapping[str, Any], title: str) -> str:
    sides = {
        "bags": "a table a feature",
        "hashed_bags": "a table a feature, hashed",
        "unified": "one shared table",
        "unified_places": "one shared table, hashed by the loader",
    }
    rows = [
        [features, name, f"{found[f'{side}_read']:.2f}", f"{found[f'{side}_train']:.2f}"]
        for features, found in figures["million_values_a_second"].items()
        for side, name in sides.items()
    ]
    return (
        f"## Look-ups of a unified embedding{title}\n\nMillion values a second, batch {figures['batch_size']}, width "
        f"{figures['dim']}, {figures['values']:,} values a "
        f"feature, a table of {figures['share']:.0%} of the rows; {figures['rounds']} rounds in turns, medians. "
        "Training is a step with dense gradients and SGD.\n\n"
        + _table(["features", "side", "reading", "training"], rows)
    )


def _losses(figures: Mapping[str, Any], title: str) -> str:
    rows = []
    for row in figures["losses"]:
        ratio, spread = f"{row['ratio']:.2f}", f"{row['least']:.2f} to {row['most']:.2f}"
        apart = f"{row['difference']:.0e}" if row["difference"] < 0.01 else "another definition"
        peer = row["peer"] + (" (authors)" if row["authors"] else "")
        sizes = [f"{row[k]:.1f}" for k in ("mebibytes", "peer_mebibytes")]
        rows.append(
            [f"`{row['name']}`", peer, f"{row['ms']:.2f}", f"{row['peer_ms']:.2f}", ratio, spread, *sizes, apart]
        )
    return (
        f"## Losses beside others' own code{title}\n\nForward and backward of the loss alone on the same random "
        f"signals (features of {figures['teacher']} and "
        f"{figures['student']}, batch {figures['batch_size']}, {figures['classes']} classes) with the same weights, "
        "in turns. A ratio below 1: Stillhouse is "
        "faster. MiB is the most that a side holds at a time beyond the signals; the last column is the relative "
        "distance of the two values. `ofa_kd` is the "
        "loss of one stage without its projector; `crd` draws its candidates here, its peers are given theirs.\n\n"
        + _table(
            [
                "objective",
                "peer",
                "ours, ms",
                "theirs, ms",
                "ratio",
                "least to most",
                "ours, MiB",
                "theirs, MiB",
                "apart",
            ],
            rows,
        )
    )


def _synthetic(figures: Mapping[str, Any], title: str) -> str:
    rows = []
    for row in figures["rows"]:
        real = (
            f"{row['batch_real']:,} real images a class" if row["batch_real"] else f"{row['inner_steps']} inner steps"
        )
        sizes = [
            f"{row[who][what]:,.0f}" for what in ("tensors", "resident") for who in ("mebibytes", "peer_mebibytes")
        ]
        spread = f"{row['least']:.2f} to {row['most']:.2f}"
        times = [f"{row['seconds']:.2f}", f"{row['peer_seconds']:.2f}", f"{row['ratio']:.2f}", spread]
        rows.append([f"`{row['name']}`", str(row["ipc"]), f"{row['classes']} classes, {real}", *times, *sizes])
    return (
        f"## Data-set distillation beside the authors' code{title}\n\nAn iteration on CIFAR-10 with ConvNet-3 of "
        "width 128: the methods' own loops and the authors' "
        "own loops, on the same real images and, for MTT and NCFM, the same experts, in turns; CPU seconds, medians; "
        "a ratio below 1: Stillhouse is faster. NCFM "
        "takes a step a class, ten in its published setting; MTT's inner steps are 50 and 30 there. NCFM's background "
        "threads load in the foreground here. Memory is "
        "of an iteration in a process of its own: what torch holds beyond what it held before, and the peak of the "
        "whole process.\n\n"
        + _table(
            [
                "method",
                "ipc",
                "setting",
                "ours, s",
                "theirs, s",
                "ratio",
                "least to most",
                *(f"{a}, MiB" for a in ("ours", "theirs", "ours, all", "theirs, all")),
            ],
            rows,
        )
    )


def _synthetic_growth(figures: Mapping[str, Any], title: str) -> str:
    text = (
        f"## How data-set distillation grows{title}\n\nCPU seconds of our iteration, ConvNet-3 of width 32, few real "
        "images. By images per class with 10 classes, by "
        "classes with 10 images each; the exponent is that of a power law through the points (1: linear; below: a "
        "part that does not grow).\n"
    )
    for axis, name in (("ipc", "images per class"), ("classes", "classes")):
        rows = [row for row in figures["rows"] if row["axis"] == axis]
        sizes = [str(size) for size in rows[0]["sizes"]]
        lines = [[f"`{row['name']}`", *(f"{s:.3f}" for s in row["seconds"]), f"{row['exponent']:.2f}"] for row in rows]
        text += "\n" + _table([name, *sizes, "exponent"], lines)
    return text


def _splatting(figures: Mapping[str, Any], title: str) -> str:
    text = (
        f"## Splatting{title}\n\nMilliseconds of a step, forward and backward, of 39 channels. By Gaussians of one size, "
        "and by pixels; the exponent is that between the last two sizes (1: linear).\n"
    )
    for name, curve in figures["curves"].items():
        rows = [
            ["pairs of a tile and a Gaussian", *(f"{row['pairs']:,}" for row in curve), ""],
            ["ms", *(f"{row['step_ms']:.0f}" for row in curve), f"{figures['slopes'][name]:.2f}"],
        ]
        text += "\n" + _table([name, *(f"{row[name]:,}" for row in curve), "exponent"], rows)
    return text


def _point_clouds(figures: Mapping[str, Any], title: str) -> str:
    text = (
        f"## Point clouds{title}\n\n{figures['pillars']:,} pillars of a sweep of {figures['points']:,} points take "
        f"{figures['pillars_ms']:.1f} ms. The 128 nearest of the 6,000 fullest, by how many queries are compared at "
        "once:\n"
    )
    lines = [[f"{r['chunk']:,}", f"{r['ms']:.0f}", f"{r['distances_mb']:.0f}"] for r in figures["neighbours"]]
    return text + "\n" + _table(["queries at once", "ms", "MB of distances"], lines)


def _dense(figures: Mapping[str, Any], title: str) -> str:
    height, width = figures["image_size"]
    text = (
        f"## Segmentation and detection{title}\n\nA step under a teacher, {figures['batch_size']} images of {height} x "
        f"{width}; sides alternate step by step. The median of {figures['steps']} ratios and its 95 % interval. `To the "
        "maps`: a loop whose teacher stops before it looks for boxes, as Stillhouse's does where only maps are read.\n"
    )
    named = {**NAMES, "hand_written_to_the_maps": "hand-written loop, to the maps"}
    rows = [
        [
            task,
            named[side],
            f"{row['milliseconds']:.0f}",
            f"{row['ratio']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
        ]
        for task, sides in figures["tasks"].items()
        for side, row in sides.items()
    ]
    return text + "\n" + _table(["task", "side", "ms", "of the hand-written", "95 %"], rows)


SECTIONS = {
    "imagenet_stem": _steps,
    "cifar_stem": _steps,
    "free": _free,
    "memory": _memory,
    "startup": _startup,
    "objectives": _objectives,
    "losses": _losses,
    "big_vocabulary": _big_vocabulary,
    "language": _language,
    "store": _store,
    "graphs": _graphs,
    "mirage": _mirage,
    "functional_maps": _functional_maps,
    "unified_embedding": _unified_embedding,
    "synthetic": _synthetic,
    "synthetic_growth": _synthetic_growth,
    "splatting": _splatting,
    "dense": _dense,
    "point_clouds": _point_clouds,
}

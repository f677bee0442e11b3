"""A step of a segmenter and of a detector under a teacher beside the same step written by hand: `python
benchmarks/dense.py` (about two minutes).

Sides alternate step by step in one process, and the clock is the process's CPU time. A figure is the median over 50
pairs of steps of the ratio of both, with the 95 % interval of a median, from the order of the ratios. The networks are
those of recipes/dense/segmentation.yaml and detection.yaml, with random weights; maps are caught by hooks. A detector's
step is compared with the faster of two loops by hand: `to the maps` stops the teacher before it looks for boxes, the
other calls it as a whole.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import sides
import torch
from run import keep
from torch import Tensor, nn
from torch.nn import functional as F
from turns import Step, Turns

from stillhouse.config.specs import ModelSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.functional.counting import IGNORED
from stillhouse.objectives.ce import CrossEntropy
from stillhouse.objectives.fitnet import FitNet
from stillhouse.objectives.kd import KD
from stillhouse.objectives.own import Own
from stillhouse.signals import Batch
from stillhouse.tasks.detection import Detection
from stillhouse.tasks.segmentation import Segmentation
from stillhouse.training.engine import fit

HAND, MAPS = "hand_written", "hand_written_to_the_maps"
SIZE, PLACES = (96, 128), (24, 32)
NORMAL = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HINT = 5.0


def main() -> None:
    """Measure, print and keep results/dense.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {}
    for name, measure in (("segmentation", segmentation), ("detection", detection)):
        found[name] = measure(options.batch_size, options.steps)
        print(name, found[name], flush=True)
    shape = {"batch_size": options.batch_size, "steps": options.steps, "image_size": list(SIZE)}
    keep("dense", {**shape, "tasks": found}, "cpu", options.threads)


def interval(ratios: list[float]) -> dict[str, float]:
    """Median of the ratios and its 95 % interval: the order statistics between which it lies (binomial)."""
    ordered, count = sorted(ratios), len(ratios)
    rank = max(math.floor(count / 2 - 0.98 * math.sqrt(count)), 0)
    return {"ratio": statistics.median(ordered), "low": ordered[rank], "high": ordered[count - 1 - rank]}


def compared(turns: Turns, base: str = HAND) -> dict[str, dict[str, float]]:
    """Milliseconds a step of each side, and its ratio to the loop by hand."""
    out = {}
    for name, took in turns.seconds.items():
        ratios = [a / b for a, b in zip(took, turns.seconds[base])]
        out[name] = {"milliseconds": 1000 * statistics.median(took), **interval(ratios)}
    return out


def run_ours(module: Distillation, turns: Turns) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fit(module, turns, sides.options(), folder=Path(folder), cpu=True)
    module.close()


def built(task: Any, model: str, seed: int, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    network: nn.Module = task.build(ModelSpec(model=f"stillhouse:{model}", options=options))
    return network


def segmentation(batch_size: int, steps: int) -> dict[str, dict[str, float]]:
    """Cross-entropy and logit distillation of every pixel."""
    task = Segmentation(tuple(f"class {i}" for i in range(11)), SIZE, *NORMAL)
    teacher = built(task, "pyramid_segmenter", 0, width=32).eval()
    student = built(task, "pyramid_segmenter", 1, backbone="lcnet_050", strides=[4, 8, 16], width=32)
    draw = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        label = torch.randint(0, 11, (batch_size, *PLACES), generator=draw)
        label[:, 0] = IGNORED
        batches.append({"input": torch.randn(batch_size, 3, *SIZE, generator=draw), "label": label})
    theirs, own = copy.deepcopy(teacher), copy.deepcopy(student).train()
    optimizer = torch.optim.SGD(own.parameters(), **sides.SGD)

    def by_hand(batch: Batch) -> None:
        images, label = batch["input"], batch["label"]
        logits = own(images)
        with torch.no_grad():
            wanted = theirs(images).log_softmax(1)
        seen = label != IGNORED
        divergence = F.kl_div(logits.log_softmax(1), wanted, reduction="none", log_target=True).sum(1)
        loss = F.cross_entropy(logits, label, ignore_index=IGNORED) + (divergence * seen).sum() / seen.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    turns = Turns(batches, {HAND: by_hand}, steps, 1)
    run_ours(Distillation(student, teacher, [(CrossEntropy(), 1.0), (KD(1.0), 1.0)], task=task), turns)
    return compared(turns)


def detection(batch_size: int, steps: int) -> dict[str, dict[str, float]]:
    """A detector's own losses, and a hint on the finest map of the pyramid."""
    task = Detection(("red", "white", "platelet"), SIZE, *NORMAL)
    teacher = built(task, "pyramid_detector", 0, width=32).eval()
    student = built(task, "pyramid_detector", 1, backbone="lcnet_050", width=32)
    draw = torch.Generator().manual_seed(0)
    batches = [
        {
            "input": torch.randn(batch_size, 3, *SIZE, generator=draw),
            "target": [objects(draw) for _ in range(batch_size)],
        }
        for _ in range(4)
    ]

    def loop(whole: bool) -> Step:
        theirs, own, convolution = copy.deepcopy(teacher), copy.deepcopy(student).train(), nn.Conv2d(32, 32, 1)
        caught: dict[str, Tensor] = {}
        for name, network in (("teacher", theirs), ("student", own)):
            network.get_submodule("smooth.0").register_forward_hook(
                lambda module, args, output, name=name: caught.update({name: output})
            )
        optimizer = torch.optim.SGD([*own.parameters(), *convolution.parameters()], **sides.SGD)

        def step(batch: Batch) -> None:
            losses = own(batch["input"], batch["target"])
            with torch.no_grad():
                theirs(batch["input"]) if whole else theirs.grids(batch["input"])
            hint = F.mse_loss(convolution(caught["student"]), caught["teacher"])
            (torch.stack(list(losses.values())).sum() + HINT * hint).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    turns = Turns(batches, {HAND: loop(True), MAPS: loop(False)}, steps, 1)
    run_ours(Distillation(student, teacher, [(Own(), 1.0), (FitNet("stage:1", "stage:1"), HINT)], task=task), turns)
    return compared(turns, MAPS)


def objects(draw: torch.Generator, count: int = 12) -> dict[str, Tensor]:
    """Boxes as blood cells have them."""
    corner = torch.rand(count, 2, generator=draw) * torch.tensor([100.0, 70.0])
    sides_of = 8 + 16 * torch.rand(count, 2, generator=draw)
    return {
        "boxes": torch.cat([corner, corner + sides_of], 1),
        "labels": torch.randint(0, 3, (count,), generator=draw),
    }


if __name__ == "__main__":
    main()

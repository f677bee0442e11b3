"""What the signal store costs and saves: `python benchmarks/store.py`, written to benchmarks/results/store.json.

`step`: training from a store against the student alone and against the live teacher, in turns of blocks of steps in one
process (CPU time), loader
included. `bytes`: of a token, by what is kept. `gradient`: what rounding and truncation do to the gradient of `kd`.
`tokens`: the quality of a small language model for the top 8, 32, 128 and full logits, over seeds (minutes).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillhouse import Distillation, FrozenTeacher, Progress
from stillhouse.config.specs import DataSpec, ModelSpec, StoreSpec
from stillhouse.data import BatchKey, Loader, load
from stillhouse.distillation.teachers import StoredTeacher
from stillhouse.models import build
from stillhouse.objectives.kd import kd_loss, kd_top_loss
from stillhouse.runs.execution import execute
from stillhouse.runs.recipe import load as load_recipe
from stillhouse.runs.recipe import validate
from stillhouse.runs.run import Run
from stillhouse.runs.stores import data_facts
from stillhouse.signals import TopK
from stillhouse.store import Store, StoredDataset, cache
from stillhouse.store.format import decode, encode
from stillhouse.store.writing import top_k

RESULTS = Path(__file__).parent / "results" / "store.json"
PARTS = ("step", "bytes", "gradient", "tokens")
KD = {"name": "kd", "weight": 0.9}
LANGUAGE: dict[str, Any] = {
    "data": {
        "name": "text:shakespeare",
        "size": 800,
        "test_size": 400,
        "options": {"tokenizer": "bpe:512", "context": 64},
    },
    "teacher": {
        "model": "hf:config:gpt2",
        "options": {
            "n_layer": 2,
            "n_head": 4,
            "n_embd": 64,
            "n_positions": 128,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        "data": {
            "name": "text:shakespeare",
            "size": 6000,
            "test_size": 400,
            "options": {"tokenizer": "bpe:512", "context": 64},
        },
        "train": {
            "epochs": 3,
            "batch_size": 32,
            "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1},
            "clip": 1.0,
        },
    },
    "student": {
        "model": "hf:config:gpt2",
        "options": {
            "n_layer": 1,
            "n_head": 4,
            "n_embd": 48,
            "n_positions": 128,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    },
    "objectives": [{"name": "kd", "weight": 1.0, "temperature": 1}],
    "train": {
        "epochs": 4,
        "batch_size": 32,
        "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        "clip": 1.0,
    },
    "evaluate": ["accuracy"],
}
KEPT: dict[str, dict[str, Any] | None] = {
    "live": None,
    "full, fp32": {},
    "full, fp16": {"precision": "fp16"},
    "full, int8": {"precision": "int8"},
    "top 128, fp16": {"top": 128, "precision": "fp16"},
    "top 32, fp16": {"top": 32, "precision": "fp16"},
    "top 8, fp16": {"top": 8, "precision": "fp16"},
}


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--blocks", type=int, default=12, help="blocks of steps that each side runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found["environment"] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": 1,
        "cores": os.cpu_count(),
    }
    if "step" in options.only:
        found["step"] = [
            steps("stillhouse:convnet3", options.blocks, width=16),
            steps("stillhouse:resnet20", options.blocks),
        ]
    if "bytes" in options.only:
        found["bytes_per_token"] = bytes_per_token()
    if "gradient" in options.only:
        found["kd_gradient"] = gradient()
    if "tokens" in options.only:
        found["tokens"] = tokens(options.seeds)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def steps(student: str, blocks: int, size: int = 4, batch_size: int = 128, **student_options: Any) -> dict[str, Any]:
    """Milliseconds a step of each side (median over blocks), and its ratio to the student alone (median over pairs of
    blocks, least, most)."""
    spec = DataSpec(name="cifar10", size=2000, test_size=1000)
    bundle = load(spec)
    dataset = bundle.dataset("train", train=True)

    def network(name: str, seed: int, **given: Any) -> torch.nn.Module:
        torch.manual_seed(seed)
        return build(ModelSpec(model=name, options=given), bundle.num_classes, bundle.input_shape)

    teacher = network("stillhouse:convnet3", 0, width=64)
    with tempfile.TemporaryDirectory() as folder:
        stores = {}
        facts = {
            "teacher_facts": {"weights": FrozenTeacher(teacher).fingerprint(), "model": "convnet3"},
            "data_facts": data_facts(spec, bundle),
        }
        for name, keep in {"store, full fp32": {}, "store, top 5 fp16": {"top": 5, "precision": "fp16"}}.items():
            began = time.process_time()
            cache(FrozenTeacher(teacher), dataset, Path(folder) / name, StoreSpec(views=2, **keep), **facts)
            took = time.process_time() - began
            began = time.process_time()
            stores[name] = (Store(Path(folder) / name), took, time.process_time() - began)
        sides: dict[str, Callable[[], None]] = {
            "alone": _side(
                network(student, 1, **student_options), None, Loader(dataset, batch_size, shuffle=True), ["ce"]
            ),
            **{
                name: _side(
                    network(student, 1, **student_options),
                    StoredTeacher(s),
                    Loader(StoredDataset(dataset, [s]), batch_size, shuffle=True),
                    [{"name": "ce", "weight": 0.1}, KD],
                )
                for name, (s, _, _) in stores.items()
            },
            "live": _side(
                network(student, 1, **student_options),
                FrozenTeacher(teacher),
                Loader(dataset, batch_size, shuffle=True),
                [{"name": "ce", "weight": 0.1}, KD],
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(blocks + 1):
            order = list(sides)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                began = time.process_time()
                for _ in range(size):
                    sides[name]()
                if number:  # the first block warms up
                    seconds[name].append((time.process_time() - began) / size)
        rows = {}
        for name, took in seconds.items():
            ratios = [a / b for a, b in zip(took, seconds["alone"])]
            rows[name] = {
                "ms": 1000 * statistics.median(took),
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
            }
        return {
            "student": student,
            "options": student_options,
            "batch_size": batch_size,
            "blocks": blocks,
            "sides": rows,
            "stores": {
                n: {"bytes_per_sample_and_view": s.bytes / (2 * len(s)), "write_s": w, "open_s": o}
                for n, (s, w, o) in stores.items()
            },
        }


def _side(student: torch.nn.Module, teacher: Any, loader: Loader, objectives: list[Any]) -> Callable[[], None]:
    module = Distillation(student.train(), teacher, objectives)
    module.build(next(iter(loader)))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    batches, numbers = loader.batches(), itertools.count()

    def step() -> None:
        number = next(numbers)
        module(
            next(batches), Progress(step=number, epoch=number // len(loader), steps_per_epoch=len(loader), epochs=100)
        )["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def tokens(seeds: list[int]) -> dict[str, Any]:
    """Bytes a token, and the student's test figures over seeds, by what is kept. The students of all stores and of the
    live teacher share their seeds."""
    out: dict[str, Any] = {"seeds": seeds, "vocabulary": 512, "rows": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, keep in KEPT.items():
            figures: list[dict[str, float]] = []
            for seed in seeds:
                tree = {**LANGUAGE, "seed": seed, "teacher": {**LANGUAGE["teacher"], "store": keep}}
                figures.append(execute(validate(tree), Path(folder) / f"{name}-{seed}", cpu=True))
            row: dict[str, Any] = {
                k: [f[k] for f in figures]
                for k in figures[0]
                if k in ("nll", "perplexity", "accuracy", "train_seconds")
            }
            out["rows"][name] = row
            print(name, row, flush=True)
    return out


def bytes_per_token() -> dict[str, float]:
    """Bytes on disk for each learned position of 100 samples, by what is kept; the teacher is not trained, which does
    not matter here."""
    tree = {**LANGUAGE, "data": {**LANGUAGE["data"], "size": 100}}
    config = validate(tree)
    run = Run(None, config, cpu=True)
    bundle, out = run.data(config.data), {}
    teacher = FrozenTeacher(run.model(config.teacher.network, config.data, "teacher", 0))
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, keep) in enumerate(KEPT.items()):
            if keep is not None:
                place, facts = Path(folder) / str(number), data_facts(config.data, bundle)
                cache(
                    teacher,
                    bundle.dataset("train", train=True),
                    place,
                    StoreSpec(**keep),
                    teacher_facts={},
                    data_facts=facts,
                    batch_size=32,
                )
                store = Store(place)
                out[name] = round(store.bytes / (store.tokens or 1), 1)
    return out


def gradient(images: int = 1000) -> dict[str, Any]:
    """The relative distance of kd's gradient on a fresh student's logits from that of full fp32 logits, for the trained
    teacher of store.yaml."""
    config = load_recipe(Path(__file__).parents[1] / "recipes/classification/store.yaml")
    run = Run(None, config, cpu=True)
    teacher = run.teacher("teacher", config.teacher.model_copy(update={"store": None}), config.data)
    batch = run.data(config.data).dataset("train", train=True).batch(BatchKey(0, np.arange(images), 0, images), 0)
    with torch.no_grad():
        scores = torch.cat([teacher({"input": part}).logits for part in batch["input"].split(250)])
        student = run.model(config.student, config.data).eval()(batch["input"])

    def of(loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        leaf = student.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    rows: dict[str, Any] = {}
    for temperature in (1.0, 4.0):
        whole = of(lambda x, t=temperature: kd_loss(x, scores, t))
        row = rows[str(temperature)] = {}
        for precision in ("fp16", "bf16", "int8"):
            held = decode(encode(scores, precision), precision)
            found = of(lambda x, t=temperature, h=held: kd_loss(x, h, t))
            row[precision] = {
                "distance": float((found - whole).norm() / whole.norm()),
                "largest_rounding": float((held - scores).abs().max()),
            }
        for k in (8, 5, 2, 1):
            top = TopK(*top_k(scores, k))
            found = of(lambda x, t=temperature, h=top: kd_top_loss(x, h, t))
            row[f"top{k}"] = {
                "distance": float((found - whole).norm() / whole.norm()),
                "mean_tail": float(top.tail.mean()),
            }
    return {"images": images, "temperature": rows}


if __name__ == "__main__":
    main()

"""One distillation step of a small pair of language models five ways: a hand-written loop, Stillhouse's `fit`, our and
TRL's Trainer, NVIDIA Model Optimizer.

Every side lowers the Jensen-Shannon divergence at beta 0.5 (Model Optimizer: its own KL of all tokens) on the same
unpadded rows by AdamW. Each runs in
processes of its own, taking turns: CPU seconds a step (a GPU is not used) and the most memory held beyond what was held
before the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "language.json"
SIDES = ("plain", "stillhouse", "stillhouse_trainer", "trl", "model_optimizer")
LR, BETA = 1e-3, 0.5


def main() -> None:
    """Measure every side in turn and write benchmarks/results/language.json; with `--side`, measure that one here and
    print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES, help="measure this one in this process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a process, after three that warm up")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--vocabulary", type=int, default=8192)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return
    made: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    arguments = [
        x
        for name in ("steps", "batch_size", "length", "vocabulary")
        for x in (f"--{name.replace('_', '-')}", str(getattr(options, name)))
    ]
    for _ in range(options.rounds):
        for side in SIDES:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", __file__, "--side", side, *arguments],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
            if done.returncode:
                raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
            made[side].append(json.loads(done.stdout.strip().splitlines()[-1]))
    rows = {
        side: {key: statistics.median(r[key] for r in runs) for key in runs[0]} | {"runs": runs}
        for side, runs in made.items()
    }
    facts = {
        "versions": versions(),
        "machine": platform.machine(),
        "threads": 1,
        **{k: v for k, v in vars(options).items() if k != "side"},
    }
    RESULT.write_text(json.dumps({"sides": rows, **facts}, indent=1) + "\n")
    for side, row in rows.items():
        print(
            f"{side:20} {1 / row['seconds']:6.2f} steps/s   {row['bytes'] / 1e6:7.0f} MB   "
            f"{row['seconds'] / rows['plain']['seconds']:.2f} x plain"
        )


def measure(options: argparse.Namespace) -> dict[str, float]:
    """`seconds` of a step (median, CPU time) and `bytes` of one side."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    world = World(options)
    run = {
        "plain": plain,
        "stillhouse": ours,
        "stillhouse_trainer": our_trainer,
        "trl": trl,
        "model_optimizer": model_optimizer,
    }[options.side](world)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    run()
    steps = [b - a for a, b in zip(world.stamps[3:], world.stamps[4:])]
    return {"seconds": statistics.median(steps), "bytes": memory("VmHWM") - before, "steps": float(len(steps))}


class World:
    """The pair, the rows, and a clock that every side stamps once a step."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        def model(layers: int, width: int) -> Any:
            torch.manual_seed(0)
            sizes = {
                "n_layer": layers,
                "n_head": 4,
                "n_embd": width,
                "vocab_size": options.vocabulary,
                "n_positions": options.length,
            }
            return GPT2LMHeadModel(
                GPT2Config(
                    **sizes,
                    attn_pdrop=0.0,
                    embd_pdrop=0.0,
                    resid_pdrop=0.0,
                    bos_token_id=1,
                    eos_token_id=1,
                    pad_token_id=0,
                )
            )

        self.options, self.count = options, options.steps + 4
        self.teacher, self.student = model(4, 256).eval().requires_grad_(False), model(2, 128).train()
        made = torch.Generator().manual_seed(1)
        self.rows = torch.randint(
            5, options.vocabulary, (self.count * options.batch_size, options.length), generator=made
        )
        self.stamps: list[float] = []

    def stamp(self) -> None:
        self.stamps.append(time.process_time())

    def batch(self, i: int) -> Any:
        return self.rows[i * self.options.batch_size : (i + 1) * self.options.batch_size]


def jsd(student: Any, teacher: Any) -> Any:
    """Mean over tokens of 0.5 KL(p || m) + 0.5 KL(q || m), as anybody would write it."""
    import torch
    from torch.nn import functional as F

    p, q = F.log_softmax(teacher, -1), F.log_softmax(student, -1)
    m = torch.logsumexp(torch.stack([p, q]), 0) - torch.log(torch.tensor(2.0))
    rows = BETA * F.kl_div(m, p, reduction="none", log_target=True) + (1 - BETA) * F.kl_div(
        m, q, reduction="none", log_target=True
    )
    return rows.sum(-1).mean()


def plain(world: World) -> Any:
    import torch

    optimizer = torch.optim.AdamW(world.student.parameters(), lr=LR)

    def run() -> None:
        for i in range(world.count):
            ids = world.batch(i)
            with torch.no_grad():
                targets = world.teacher(input_ids=ids).logits[:, :-1]
            jsd(world.student(input_ids=ids).logits[:, :-1], targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            world.stamp()

    return run


def ours(world: World) -> Any:
    import torch

    from stillhouse.config.specs import TrainSpec
    from stillhouse.distillation.distillation import Distillation
    from stillhouse.training.engine import fit

    class Rows:
        batch_size = world.options.batch_size

        def __len__(self) -> int:
            return world.count

        def batches(self, epoch: int = 0, batch: int = 0, epochs: int | None = None) -> Any:
            for i in range(batch, world.count):
                if i:
                    world.stamp()
                ids = world.batch(i)
                label = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
                yield {"input": {"input_ids": ids}, "label": label, "index": torch.arange(len(ids))}
            world.stamp()

    optimizer = {"name": "adamw", "lr": LR, "weight_decay": 0.01}
    spec = TrainSpec.model_validate(
        {"epochs": 1, "batch_size": world.options.batch_size, "optimizer": optimizer, "schedule": {"name": "constant"}}
    )
    module = Distillation(world.student, world.teacher, [{"name": "gkd", "beta": BETA}])
    module.build(next(Rows().batches()))
    folder = tempfile.mkdtemp()
    return lambda: fit(module, Rows(), spec, folder=Path(folder), cpu=True)


def _arguments(cls: Any, world: World, **more: Any) -> Any:
    shared = {
        "max_steps": world.count,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "optim": "adamw_torch",
    }
    quiet = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 50,
        "remove_unused_columns": False,
    }
    precise = {"bf16": False, "max_grad_norm": 0.0}
    return cls(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=world.options.batch_size,
        **shared,
        **quiet,
        **precise,
        **more,
    )


def _collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    ids = torch.stack([torch.as_tensor(r["input_ids"]) for r in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _stamping(world: World) -> Any:
    from transformers import TrainerCallback

    class Stamps(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            world.stamp()

    return Stamps()


def our_trainer(world: World) -> Any:
    from datasets import Dataset
    from transformers import TrainingArguments

    from stillhouse.integrations.transformers import DistillationTrainer

    data = Dataset.from_dict({"input_ids": world.rows.tolist()})
    trainer = DistillationTrainer(
        world.student,
        _arguments(TrainingArguments, world),
        train_dataset=data,
        data_collator=_collate,
        callbacks=[_stamping(world)],
        teachers=world.teacher,
        objectives=[{"name": "gkd", "beta": BETA}],
    )
    return trainer.train


def trl(world: World) -> Any:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from stillhouse.models.tokenizer import tokenizer

    options = {
        "beta": BETA,
        "lmbda": 0.0,
        "temperature": 1.0,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "gradient_checkpointing": False,
    }
    trainer = GKDTrainer(
        model=world.student,
        teacher_model=world.teacher,
        args=_arguments(GKDConfig, world, **options),
        train_dataset=Dataset.from_dict({"input_ids": world.rows.tolist()}),
        data_collator=_collate,
        processing_class=tokenizer("bytes"),
        callbacks=[_stamping(world)],
    )
    return trainer.train


def model_optimizer(world: World) -> Any:
    import modelopt.torch.distill as mtd
    import torch

    loss = mtd.LogitsDistillationLoss(temperature=1.0, reduction="batchmean")
    model = mtd.convert(
        world.student, mode=[("kd_loss", {"teacher_model": world.teacher, "criterion": {("lm_head", "lm_head"): loss}})]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    model.train()

    def run() -> None:
        for i in range(world.count):
            model(input_ids=world.batch(i))
            model.compute_kd_loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            world.stamp()

    return run


def memory(name: str) -> int:
    """Bytes of this process by a name of /proc/self/status."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def versions() -> dict[str, str]:
    out = {}
    for package in ("torch", "transformers", "trl", "nvidia-modelopt", "stillhouse"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            continue
    return out


if __name__ == "__main__":
    main()

"""Run by test_resume.py in a process of its own: one unbroken run, then runs that are killed with SIGKILL at given
moments and started again.

Prints one JSON line: for each moment, whether the weights and the metrics are the unbroken run's to the byte. Children
are forked, so that importing torch is paid once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import plotly.graph_objects  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch

import stillhouse.data
import stillhouse.models.anatomy
import stillhouse.reporting.run_report  # noqa: F401
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.training import engine

RECIPE = """
data: {{name: digits, size: 200, val: 0.2, workers: {workers}, mixup: 0.2}}
teachers:
  teacher: {{model: stillhouse:mlp, options: {{widths: [32]}}, 
    train: {{epochs: 2, batch_size: 20, checkpoint_seconds: 0, log_every: 3}}}}
  average: {{momentum: 0.9}}
  past: {{past_self: true}}
student: {{model: stillhouse:mlp, options: {{widths: [24]}}}}
objectives:
  - ce
  - {{name: kd, weight: {{kind: linear, end: 0.9}}}}
  - {{name: kd, label: from_average, teacher: average, weight: 0.3}}
  - {{name: kd, label: from_past, teacher: past, weight: 0.3}}
  - {{name: "file:{inner}"}}
train: {{epochs: 4, batch_size: 20, optimizer: {{lr: 0.1}}, ema: 0.9, best: accuracy, log_every: 3,
  checkpoint_seconds: 0, accumulate: 2}}
"""

INNER = '''
"""An objective with layers and an optimiser of its own, stepped before each step, and with draws of its own."""
import torch
from torch.nn import functional as F
from stillhouse.distillation.objective import Objective


class Inner(Objective):
    name = "inner"
    needs = frozenset({"student.embedding", "teacher.embedding"})

    def build(self, student, teacher, batch):
        self.layer = torch.nn.Linear(teacher.embedding.shape[1], student.embedding.shape[1])
        self.register_buffer("seen", torch.zeros(()))
        self.optimizer = self.keep_optimizer("layer", torch.optim.Adam(self.layer.parameters(), lr=1e-2))

    def param_groups(self):
        return []

    def begin_epoch(self, ctx):
        self.seen += 1

    def before_step(self, batch, teacher, ctx):
        loss = self.layer(teacher.embedding + 0.1 * torch.randn_like(teacher.embedding)).pow(2).mean() * self.seen
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def forward(self, student, teacher, batch, progress):
        return {"loss": F.mse_loss(student.embedding, self.layer(teacher.embedding).detach())}
'''


def child(work: Path, folder: Path, cache: Path, workers: int, moment: str | None) -> int:
    """Fork, run, and die at the moment: `step:N`, `save:N` (while the N-th checkpoint is being written), `eval:N`;
    returns the exit status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        os.environ["STILLHOUSE_CACHE"] = str(cache)
        os.dup2(os.open(work / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        what, _, number = (moment or "never:0").partition(":")
        seen = {"step": 0, "save": 0, "eval": 0}

        def die(kind: str) -> None:
            seen[kind] += 1
            if kind == what and seen[kind] == int(number):
                os.kill(os.getpid(), signal.SIGKILL)

        collect, save, log = engine.Loop._collect, torch.save, engine.Loop.log

        def torn_save(content, path):
            save(content, path)
            seen["save"] += 1
            if what == "save" and seen["save"] == int(number):
                with open(path, "r+b") as handle:
                    handle.truncate(100)
                os.kill(os.getpid(), signal.SIGKILL)

        engine.Loop._collect = lambda self, i, terms: (collect(self, i, terms), die("step"))[0]
        engine.Loop.log = lambda self, values: (log(self, values), die("eval") if "val/accuracy" in values else None)[0]
        torch.save = torn_save
        text = RECIPE.format(workers=workers, inner=work / "inner.py")
        (work / "trial.yaml").write_text(text)
        execute(recipe.load(work / "trial.yaml"), folder, cpu=True)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(3)
    os._exit(0)


def main(work: Path, workers: int, moments: list[str]) -> None:
    torch.set_num_threads(1)
    (work / "inner.py").write_text(INNER)
    (work / "warm.yaml").write_text(RECIPE.format(workers=workers, inner=work / "inner.py"))
    recipe.load(work / "warm.yaml")  # imports, once for all children, what a run imports
    out = {}
    whole = work / "whole"
    assert child(work, whole, work / "cache-whole", workers, None) == 0, (work / "log.txt").read_text()
    for moment in moments:
        folder, cache = work / moment.replace(":", "-"), work / f"cache-{moment.replace(':', '-')}"
        first = child(work, folder, cache, workers, moment)
        second = child(work, folder, cache, workers, None)
        same = (
            {
                f: (folder / f).read_bytes() == (whole / f).read_bytes()
                for f in ("product/model.safetensors", "metrics.csv")
            }
            if second == 0
            else {}
        )
        out[moment] = {"killed": os.WIFSIGNALED(first), "finished": second == 0, **same}
    print(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","))

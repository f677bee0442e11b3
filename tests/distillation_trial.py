"""Run by test_killed_distillation.py in a process of its own: one unbroken distillation, then ones that are killed with
SIGKILL and started again.

Prints one JSON line: for each moment, whether the run was killed and went on where it was, and whether its files are
the unbroken run's to the byte. Children are forked, so that importing torch is paid once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch

from stillhouse.runs.execution import execute
from stillhouse.runs.recipe import validate
from stillhouse.training import loop

RECIPE = {
    "method": "datadam",
    "data": {"name": "digits", "augment": "plain", "size": 200, "test_size": 100},
    "network": {"model": "stillhouse:convnet2", "options": {"width": 4}},
    "augment": {"groups": "crop_scale"},
    "iterations": 25,
    "batch_real": 5,
    "evaluate": {"networks": 2, "epochs": 60, "best_every": 20},
}
FILES = ("product/images.safetensors", "metrics.csv", "evaluation.json")


def child(work: Path, name: str, moment: str | None) -> int:
    """Fork, distil, and die at the moment: `step:N` (after the N-th step), `save:N` (while the N-th checkpoint is being
    written); the exit status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        os.environ["STILLHOUSE_CACHE"] = str(work / f"cache-{name}")
        os.dup2(os.open(work / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        what, _, number = (moment or "never:0").partition(":")
        seen = {"step": 0, "save": 0}
        collect, save = loop.Loop._collect, torch.save

        def collected(self: loop.Loop, i: int, terms: Any) -> None:
            collect(self, i, terms)
            seen["step"] += 1
            if what == "step" and seen["step"] == int(number):
                os.kill(os.getpid(), signal.SIGKILL)

        def torn(content: Any, path: Any) -> None:
            save(content, path)
            seen["save"] += 1
            if what == "save" and seen["save"] == int(number):
                os.truncate(path, 100)
                os.kill(os.getpid(), signal.SIGKILL)

        loop.Loop._collect, torch.save = collected, torn  # type: ignore[method-assign, assignment]
        loop.loop.__kwdefaults__["checkpoint_seconds"] = (
            0.0  # at every log point: a distillation has one every 10 steps
        )
        execute(validate(RECIPE), work / name, cpu=True)
        (work / f"{name}.steps").write_text(str(seen["step"]))
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(3)
    os._exit(0)


def kept(folder: Path, file: str) -> Any:
    """What a file says, but for what was measured by a clock."""
    if file != "evaluation.json":
        return (folder / file).read_bytes()
    return {k: v for k, v in json.loads((folder / file).read_text()).items() if "seconds" not in k and "peak" not in k}


def main(work: Path, moments: list[str]) -> None:
    torch.set_num_threads(1)
    validate(RECIPE)  # imports, once for all children, what a run imports
    assert child(work, "whole", None) == 0, (work / "log.txt").read_text()
    out = {}
    for moment in moments:
        name = moment.replace(":", "-")
        first, second = child(work, name, moment), child(work, name, None)
        same = {f: kept(work / name, f) == kept(work / "whole", f) for f in FILES} if second == 0 else {}
        steps = [int((work / f"{n}.steps").read_text()) for n in (name, "whole")] if second == 0 else [0, 0]
        out[moment] = {"killed": os.WIFSIGNALED(first), "went on": steps[0] < steps[1], **same}
    print(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","))

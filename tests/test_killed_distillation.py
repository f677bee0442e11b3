"""A distillation killed with SIGKILL at any moment, and its judge, go on to the same set and the same figures as one
that was not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TRIAL = Path(__file__).parent / "distillation_trial.py"
MOMENTS = "step:13,save:2,step:100"  # of 25 steps of learning, and then of 60 steps a network


def test_a_killed_distillation_ends_in_the_same_set_and_figures(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(TRIAL), str(tmp_path), MOMENTS], capture_output=True, text=True, timeout=300
    )
    log = (tmp_path / "log.txt").read_text() if (tmp_path / "log.txt").exists() else ""
    assert done.returncode == 0, done.stderr + log
    same = {
        "killed": True,
        "went on": True,
        "product/images.safetensors": True,
        "metrics.csv": True,
        "evaluation.json": True,
    }
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(MOMENTS.split(","), same), log[-3000:]

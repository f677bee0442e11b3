"""A run killed with SIGKILL at any moment and started again ends with the same bits as the unbroken run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRIAL = Path(__file__).parent / "resume_trial.py"
MOMENTS = {
    # teacher: 16 steps in 2 epochs of 8; student: 32 batches in 4 epochs of 8
    0: "step:5,step:8,step:16,step:17,step:24,step:25,step:37,step:48,save:3,save:9,eval:3,eval:6",
    2: "step:19,step:26,save:10",
}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumes_to_the_same_weights_and_metrics(tmp_path: Path, workers: int):
    done = subprocess.run(
        [sys.executable, str(TRIAL), str(tmp_path), str(workers), MOMENTS[workers]],
        capture_output=True,
        text=True,
        timeout=600,
    )
    log = (tmp_path / "log.txt").read_text() if (tmp_path / "log.txt").exists() else ""
    assert done.returncode == 0, done.stderr + log
    results = json.loads(done.stdout.splitlines()[-1])
    assert set(results) == set(MOMENTS[workers].split(","))
    for moment, result in results.items():
        assert result == {"killed": True, "finished": True, "product/model.safetensors": True, "metrics.csv": True}, (
            f"killed at {moment}: {result}\n{log[-3000:]}"
        )

"""What a model and its training step cost: parameters, multiply-adds, latency, bytes on disk, time and memory of a
step. For after training."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stillhouse.errors import UserError
from stillhouse.evaluation.classification import PLAIN
from stillhouse.evaluation.judge import JudgedTask
from stillhouse.signals import Batch, call_model, evaluating, read_logits


def parameters(model: nn.Module) -> int:
    """Numbers that the model has learned or could learn, frozen ones included; a shared parameter counts once."""
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: nn.Module, batch: Batch, task: JudgedTask = PLAIN) -> int:
    """Multiply-adds of one forward pass for ONE sample (the first of the batch): convolutions, matrix products,
    attention and recurrent layers.

    Element-wise work, normalisation and pooling are not counted, as is usual. Half of what `torch.utils.flop_counter`
    calls FLOPs.

    Args:
        model: on the batch's device; a compiled model is counted as it was before.
        batch: its `input` is a tensor or a mapping of tensors, (B, …).
        task: how the model is called.
    """
    inner = getattr(model, "_orig_mod", model)
    counter = FlopCounterMode(display=False)
    with evaluating(inner), _unfused(), counter:
        task.call(inner, task.one(batch))
    return int(counter.get_total_flops()) // 2


def latency(
    model: nn.Module, batch: Batch, task: JudgedTask = PLAIN, repeats: int = 30, warmup: int = 5
) -> dict[str, float]:
    """Milliseconds of a forward pass for one sample (the first of the batch): the `median` over repeats, with `low` and
    `high`, its 10th and 90th percentile.

    On a CPU with one thread (the setting is put back), on a GPU waiting for the device each time.

    Args:
        model: on the batch's device.
        batch: its `input` is a tensor or a mapping of tensors, (B, …).
        task: how the model is called.
        repeats: how many passes are timed, at least 1.
        warmup: how many run first, untimed.
    """
    if repeats < 1:
        raise UserError(f"latency: repeats must be at least 1; given: {repeats}.")
    sample = task.one(batch)
    device = _device_of(sample["input"])
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    times = []
    with evaluating(model), _one_thread():
        for i in range(warmup + repeats):
            wait()
            start = time.perf_counter()
            task.call(model, sample)
            wait()
            if i >= warmup:
                times.append(1000 * (time.perf_counter() - start))
    low, median, high = (
        torch.tensor(times, dtype=torch.double).quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.double)).tolist()
    )
    return {"median": median, "low": low, "high": high}


def file_size(path: str | Path) -> int:
    """Bytes of a file, or of all files in a folder. Raises `UserError` where there is nothing."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no file or folder '{path}' to measure.")
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files if f.is_file())


def step_cost(module: Any, batch: Batch, ctx: Any, rounds: int = 5) -> dict[str, float]:
    """The cost of a training step of a built and prepared module, and its ratio to a plain cross-entropy step of its
    student on the same batch; the two are taken in turns.

    Forward passes of all networks, inner steps and the backward pass count; the optimiser does not. The student's
    weights and statistics are put back.

    Args:
        module: a `Distillation` after its fit.
        batch: a training batch with `label` (B,) or (B, C), on the module's device.
        ctx: what the module's `before_step` asks of a fit; `ctx.progress` says where.
        rounds: how many of each are timed; CPU time on a CPU, wall time on a GPU.

    Returns:
        `step_ms` and `step_ratio` (over the cross-entropy step), medians; `step_bytes`: the most that torch holds at a
        time beyond what was allocated before.
    """
    student = module.student
    before = {k: v.clone() for k, v in student.state_dict().items()}

    def whole() -> None:
        module.before_step(dict(batch), ctx)
        module(dict(batch), ctx.progress)["loss"].backward()
        module.after_step(dict(batch), ctx.progress, True)
        module.zero_grad()

    def plain() -> None:
        nn.functional.cross_entropy(read_logits(call_model(student, batch)).float(), batch["label"]).backward()
        student.zero_grad()

    module.train()
    device = _device_of(batch["input"])
    for work in (whole, plain):
        work()
    times = [(_seconds(whole, device), _seconds(plain, device)) for _ in range(rounds)]
    found = {
        "step_ms": 1000 * statistics.median(mine for mine, _ in times),
        "step_ratio": statistics.median(mine / theirs for mine, theirs in times),
        "step_bytes": float(peak_of_tensors(whole, device)),
    }
    student.load_state_dict(before)
    return found


def times_in_turns(works: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int = 7) -> dict[str, float]:
    """Median seconds of each call by name, taken in turns after one untimed round; CPU time on a CPU, wall time on a
    GPU."""
    for work in works.values():
        work()
    times = [{name: _seconds(work, device) for name, work in works.items()} for _ in range(rounds)]
    return {name: statistics.median(taken[name] for taken in times) for name in works}


def peak_of_tensors(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes: the most that torch holds at a time during a call, beyond what was allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is chatty
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    current = most = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        current += event.nbytes()
        most = max(most, current)
    return most


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _device_of(x: Any) -> torch.device:
    tensors = [x] if isinstance(x, Tensor) else [v for v in x.values() if isinstance(v, Tensor)]
    return tensors[0].device


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _unfused() -> Iterator[None]:
    """Inside, transformer and recurrent layers run as the matrix products they consist of: their fused kernels count as
    nothing."""
    kernels: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    before = [k.enabled for k in kernels]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for k in kernels:
            k.enabled = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for k, enabled in zip(kernels, before):
            k.enabled = enabled

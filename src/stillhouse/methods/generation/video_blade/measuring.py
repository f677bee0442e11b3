"""What is measured of sparse attention: how far it is from dense attention, by the share that is kept; how fast it is;
and how smoothly things move in clips."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.generation.denoising import Denoiser
from stillhouse.methods.generation.video_blade.attention import (
    AdaptiveAttention,
    Sparsity,
    adaptive_attention,
    block_mask,
    block_scores,
    sampled_positions,
)
from stillhouse.methods.generation.video_blade.product import SparsitySpec, as_dit
from stillhouse.nn.dit import attend
from stillhouse.randomness import generator
from stillhouse.signals import evaluating

SHARES = (0.125, 0.25, 0.5, 0.75)  # of blocks kept, at which errors are measured


class _Recorder(nn.Module):
    """Dense attention that notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.calls.append((q, k, v))
        return attend(q, k, v)


def attended_to(base: Denoiser, x: Tensor, t: Tensor, label: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values (B, heads, L, D) of each attention of a dense network."""
    net, recorder = as_dit(base.module), _Recorder()
    before = [attention.mix for attention in net.attentions]
    net.mix_by(recorder)
    try:
        with evaluating(net):
            base.output(x, t, label)
    finally:
        for attention, mix in zip(net.attentions, before):
            attention.mix = mix
    return recorder.calls


def relative_error(mix: AdaptiveAttention, calls: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
    """|sparse - dense| / |dense|, over all calls."""
    pairs = [(mix.eval()(q, k, v), attend(q, k, v)) for q, k, v in calls]
    wrong = sum(float((a - b).square().sum()) for a, b in pairs)
    return (wrong / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def error_curves(
    spec: SparsitySpec, grid: tuple[int, int, int], calls: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> dict[str, float]:
    """Relative errors by the share of blocks that is kept: with the settings of `spec` (`attention_error_25`: a quarter
    is kept), without the global branch (`…_25_no_means`) and with tokens in raster order (`…_25_raster`).

    `means_gain_25` and `order_gain_25`: the error without the branch, and in raster order, over that with both.
    """
    found = {}
    for share in SHARES:
        fixed = {"least": share, "most": share}
        kinds: dict[str, dict[str, Any]] = {"": {}, "_no_means": {"window": 0}, "_raster": {"order": "raster"}}
        for name, changes in kinds.items():
            if not (name == "_no_means" and not spec.window):
                mix = spec.mix(grid, **fixed, **changes).to(calls[0][0].device)
                found[f"attention_error_{int(100 * share)}{name}"] = relative_error(mix, calls)
    for share in (int(100 * s) for s in SHARES):
        error = max(found[f"attention_error_{share}"], 1e-12)
        for gain, other in (("means", "no_means"), ("order", "raster")):
            if f"attention_error_{share}_{other}" in found:
                found[f"{gain}_gain_{share}"] = found[f"attention_error_{share}_{other}"] / error
    return found


@torch.no_grad()
def timed(
    tokens: int, heads: int, width: int, spec: SparsitySpec, repeats: int, device: torch.device
) -> dict[str, float]:
    """Milliseconds of dense attention and of gathered blocks, mask included, for one clip of random queries, keys and
    values; medians of turns taken in alternation. The speed-up is dense over sparse: below 1 it is slower.

    Random numbers have no structure, so the most blocks that may be kept are kept.
    """
    draw = generator("timing", tokens)
    q, k, v = torch.randn(3, 1, heads, tokens, width, generator=draw).to(device)
    facts = spec.model_dump(exclude={"order", "gather"})
    sparsity = Sparsity(**facts)
    positions = [sampled_positions(torch.rand(1, heads, 1, spec.block, generator=draw).to(device), spec.sampled)] * 2

    def sparse() -> None:
        mask = block_mask(block_scores(q, k, positions[0], positions[1], spec.block), sparsity)
        adaptive_attention(q, k, v, mask, sparsity, gather=True)

    kinds: dict[str, Callable[[], Any]] = {"dense": lambda: attend(q, k, v), "sparse": sparse}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(repeats + 1):
        for name, call in kinds.items():
            started = _now(device)
            call()
            if turn:  # the first is to warm up
                times[name].append(1000 * (_now(device) - started))
    dense, thin = (statistics.median(times[name]) for name in kinds)
    return {
        f"attention_dense_ms_{tokens}": dense,
        f"attention_sparse_ms_{tokens}": thin,
        f"attention_speedup_{tokens}": dense / thin,
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def jerk(images: Tensor, frames: int) -> float:
    """How unevenly what is bright moves in clips (n, frames * C, H, W) uint8: the mean length of the second difference
    of its centre from frame to frame, in pixels; 0 for even motion.

    Raises nothing: an empty frame's centre is the picture's.
    """
    light = images.float().unflatten(1, (frames, -1)).mean(2) + 1e-3
    rows, columns = (torch.arange(light.shape[axis], dtype=torch.float32) for axis in (-2, -1))
    total = light.sum((-2, -1))
    centre = torch.stack([(light.sum(-1) * rows).sum(-1), (light.sum(-2) * columns).sum(-1)], -1) / total[..., None]
    if frames < 3:
        return 0.0
    return float(centre.diff(dim=1).diff(dim=1).norm(dim=-1).mean())

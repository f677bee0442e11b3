"""What counts: one rule for every loss, whatever the number of axes, and the mean over what it leaves.

Predictions have their class axis last and a label stands where its prediction stands: logits (B, C) with labels (B,),
tokens (B, L, V) with (B, L), pixels (B, H, W, C) with (B, H, W). A label of -100 counts for nothing, and neither does a
position that the batch's `mask` leaves out. A class id of -1 says
that a sample has no label: it counts where no label is read, as it can still be distilled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.signals import Batch

IGNORED = -100
"""The label of what counts for nothing: padding, prompts, pixels of no class, nodes outside the split."""

Reduction = Literal["mean", "sum"]


def counted(batch: Batch, shape: torch.Size | tuple[int, ...], ignore_index: int = IGNORED) -> Tensor | None:
    """Which predictions of logits (*shape, C) count: (*shape) bool, or None for all.

    Args:
        batch: its `label`, where that has class ids of this shape, and its `mask` (*shape), where it has one.
        shape: of the logits, without the class axis.
        ignore_index: the label that counts for nothing.

    Raises:
        UserError: a mask of another shape, or class ids with as many axes but another shape.

    >>> counted({"label": torch.tensor([[3, -100], [-100, 5]])}, (2, 2))
    tensor([[ True, False],
            [False,  True]])
    """
    shape, counts = torch.Size(shape), None
    label, mask = batch.get("label"), batch.get("mask")
    if isinstance(label, Tensor) and not label.is_floating_point() and label.ndim == len(shape):
        if label.shape != shape:
            raise UserError(
                f"Labels of shape {tuple(label.shape)} do not stand where the predictions stand, {tuple(shape)}: "
                "logits have their class axis last, "
                "and without it the shape of the labels. Of a network that gives (B, C, H, W), `logits.movedim(1, "
                "-1)` is that."
            )
        counts = label != ignore_index
    if mask is None:
        return counts
    if mask.shape != shape:
        raise UserError(
            f"The batch's mask has shape {tuple(mask.shape)}, but the predictions have shape {tuple(shape)}; they "
            "must be equal."
        )
    return mask.bool() if counts is None else counts & mask.bool()


def both(counts: Tensor | None, others: Tensor) -> Tensor:
    """What counts by both masks; None stands for all."""
    return others if counts is None else counts & others


def counted_mean(
    values: Tensor, counts: Tensor | None = None, count: Tensor | float | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """The mean over the positions that count, or with `reduction="sum"` the sum; 0 where none counts.

    Args:
        values: (...,) one value a position; or (..., C) terms of positions `counts` (...,), which are added up.
        counts: (...,) True where a position counts; default: every value is a position that counts.
        count: what to divide by instead of the number of counted positions (see `step_count`).
    """
    if counts is not None:
        values = values.masked_fill(~counts if values.ndim == counts.ndim else ~counts[..., None], 0.0)
    total = values.sum()
    if reduction == "sum":
        return total
    if count is None:
        count = max(values.numel(), 1) if counts is None else counts.sum().clamp_min(1)
    return total / count


def step_count(batch: Batch, like: Tensor, counts: Tensor | None = None, share: bool = True) -> Tensor:
    """What the sum over a batch is divided by so that the mean is over all counted positions of the optimiser step.

    `batch["token_count"]`, where a loop that accumulates gives it (see `weigh_positions_alike`); else the positions
    that count here. Where the loop weighs the batch's loss by its size itself (`batch["weighed"]`), it is not shared
    over processes.

    Args:
        like: (...,) one value a position.
        counts: (...,) True where a position counts; default: all.
        share: over several processes, whose gradients are averaged, take the mean of their numbers, so that every
            position weighs the same wherever it lies. Every process must then call this.
    """
    given = batch.get("token_count", like.numel() if counts is None else counts.sum())
    count = torch.ones(1, device=like.device) * given
    if (
        share
        and not batch.get("weighed")
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    ):
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count[0].clamp_min(1)


def has_positions(batch: Batch) -> bool:
    """Whether the batch's labels are of positions: class ids of tokens (B, L), of pixels (B, H, W), …"""
    label = batch.get("label")
    return isinstance(label, Tensor) and label.ndim >= 2 and not label.is_floating_point()


def weigh_positions_alike(batches: Sequence[Batch]) -> None:
    """Give the batches of one optimiser step, whose losses are averaged, the `token_count` with which every counted
    position weighs the same; in place."""
    counts = [counted(batch, batch["label"].shape) for batch in batches]
    mean = torch.stack([c.sum() for c in counts if c is not None]).sum() / len(batches)
    for batch in batches:
        batch["token_count"] = mean

"""`Objective`: one loss, or a loss with a few learned parts, with six hooks; and `WeightSchedule`, its weight over
training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stillhouse.signals import Batch, Signals
from stillhouse.training.context import Context, Progress

__all__ = ["Context", "Objective", "Progress", "WeightSchedule"]


class Objective(nn.Module):
    """A loss on signals. Subclasses take keyword options in `__init__` (their types and defaults ARE the recipe's keys)
    and implement `forward`.

    Attributes:
        needs: what must be there: `"label"`, `"index"`, `"holdout"`, `"student.logits"`, `"student.embedding"`,
            `"student.tap:NAME"`, `"student.losses"` (the network's own, in training), `"teacher.logits"` (any form of
            full class probabilities), `"teacher.embedding"`, `"teacher.tap:NAME"`, `"student.part:NAME"`,
            `"teacher.part:NAME"` (what networks of the task give besides). NAME of a tap is a dotted submodule, or
            `stage:N` (1-based; negative counts from the end) for the model's N-th stage. Set it in `__init__` where it
            depends on options. Checked at start; what is not named is not captured.
        default_weight: the published weight, used where the recipe gives none.
        reads_top: whether the k most probable classes with the mass of all others (`Signals.top`) will do where `needs`
            says `"teacher.logits"`.
        reads_hidden: whether hidden states and the output matrix (the taps `hidden`, `output_weight`, `output_bias`)
            will do in the place of logits.
        top_in_chunks: whether they will do for a teacher's top k as well.
        positions: whether it takes one prediction a position (a token, a pixel) and counts them by
            `stillhouse.functional.counting.counted`. Objectives that read logits and mean one prediction a sample, (B,
            C), leave it; `Distillation.build` refuses others for them.
        host_step: why a training step of it waits for the device or computes on the host; None: it does neither.
        teacher: the name of the teacher that it reads.
    """

    needs: frozenset[str] = frozenset({"student.logits"})
    default_weight: ClassVar[float] = 1.0
    reads_top: bool = False
    reads_hidden: bool = False
    top_in_chunks: bool = True
    positions: ClassVar[bool] = False
    host_step: ClassVar[str | None] = None
    teacher: str = "teacher"

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        """Make own layers to size, from a two-sample probe (evaluation mode, no autograd). Called once, before the
        optimiser exists."""

    def prepare(self, ctx: Context) -> None:
        """Once before training: class means, thresholds. What it sets must be buffers or be computed again: a resumed
        run calls it again."""

    def begin_epoch(self, ctx: Context) -> None:
        """At the start of each epoch, before its first batch. What it sets must be buffers: a run resumed in mid-epoch
        does not call it again."""

    def before_step(self, batch: Batch, teacher: Signals, ctx: Context) -> None:
        """Before each training step: an inner (bilevel, adversarial) step with an optimiser of its own (see
        `keep_optimizer`)."""

    def before_update(self, ctx: Context) -> None:
        """Before each optimiser step: the gradients are there, reduced over processes and unscaled, not yet clipped.
        What it reads stays on the device."""

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Named terms, scalars on the device, whose sum is the loss. A key that starts with `log:` is logged, not
        summed."""
        raise NotImplementedError

    def figures(self) -> dict[str, float]:
        """After training: figures of the objective itself, such as a weight that it found, for the run's."""
        return {}

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups of own parameters: the default is one group with the run's settings; a group may set `lr` or
        `weight_decay`; [] means an optimiser of its own."""
        params = [p for p in self.parameters() if p.requires_grad]
        return [{"params": params}] if params else []

    _own_optimizers: dict[str, torch.optim.Optimizer]

    def keep_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Register an inner optimiser, so that its state is in the checkpoint and is restored with it."""
        self.__dict__.setdefault("_own_optimizers", {})[name] = optimizer
        return optimizer

    def get_extra_state(self) -> dict[str, Any]:
        return {name: o.state_dict() for name, o in self.__dict__.get("_own_optimizers", {}).items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.__dict__.get("_own_optimizers", {}).items():
            if name in state:
                optimizer.load_state_dict(state[name])


@dataclass(frozen=True)
class WeightSchedule:
    """The weight of an objective over training.

    Args:
        kind: `constant` (end); `linear` from start to end over the span, then end; `cosine` likewise along half a
            cosine; `warmup`: linear from 0 to end.
        start, end: weights at both ends.
        epochs, steps: the span; neither means the whole training. Epochs count whole epochs (the weight is constant
            inside one), steps are smooth.
    """

    kind: Literal["constant", "linear", "cosine", "warmup"] = "constant"
    start: float = 0.0
    end: float = 1.0
    epochs: float | None = None
    steps: int | None = None

    def at(self, progress: Progress) -> float:
        if self.kind == "constant":
            return self.end
        if self.steps is not None:
            share = progress.step / max(self.steps, 1)
        elif self.epochs is not None:
            share = progress.epoch / max(self.epochs, 1e-12)
        else:
            share = progress.fraction
        share = min(max(share, 0.0), 1.0)
        if self.kind == "cosine":
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        start = 0.0 if self.kind == "warmup" else self.start
        return start + (self.end - start) * share

"""Optimisers by name, any of torch.optim, and the schedule of the learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from stillhouse.config.specs import TrainSpec
from stillhouse.errors import UserError, unknown


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """A class of torch.optim by its name in any case. Raises `UserError` with the nearest names."""
    classes = {
        n.lower(): c for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer) and n != "Optimizer"
    }
    if name.lower() not in classes:
        raise unknown("optimizer", name, classes)
    return classes[name.lower()]


def trained_in_float32(student: nn.Module) -> None:
    """Turn a student whose trained weights are in half precision to float32, in place.

    In half precision an update smaller than about 1/256 (bfloat16) of a weight rounds to nothing, and float16 overflows. Frozen weights alone, such as
    those under adapters, stay as they are. For speed there is mixed precision (`train.precision: bf16`).
    """
    if any(p.requires_grad and p.dtype in (torch.float16, torch.bfloat16) for p in student.parameters()):
        student.float()
        config = getattr(student, "config", None)  # of a transformers model, which saves its precision by it
        if hasattr(config, "dtype"):
            config.dtype = torch.float32


def make_optimizer(groups: list[dict[str, Any]], spec: TrainSpec) -> torch.optim.Optimizer:
    """The optimiser that a recipe names, any of torch.optim, over parameter groups that may set their own lr and weight_decay."""
    try:
        return optimizer_class(spec.optimizer.name)(groups, **spec.optimizer.arguments())
    except TypeError as error:
        raise UserError(f"train.optimizer: {spec.optimizer.name} takes no such option: {str(error).split('.__init__() ')[-1]}.") from None


def rate_factor(spec: TrainSpec, progress_epochs: float) -> float:
    """The factor on the learning rate after so many (fractional) epochs."""
    s = spec.schedule
    if progress_epochs < s.warmup_epochs:
        return progress_epochs / s.warmup_epochs
    if s.name == "step":
        return s.gamma ** sum(progress_epochs >= m for m in s.milestones)
    if s.name == "constant":
        return 1.0
    share = min((progress_epochs - s.warmup_epochs) / max(spec.epochs - s.warmup_epochs, 1e-9), 1.0)
    floor = s.min_lr / spec.optimizer.lr
    falling = 0.5 * (1 + math.cos(math.pi * share)) if s.name == "cosine" else 1 - share
    return floor + (1 - floor) * falling

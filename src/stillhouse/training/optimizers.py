"""Optimisers by name, any of torch.optim, and the schedule of the learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from stillhouse.config.specs import TrainSpec
from stillhouse.errors import UserError, unknown
from stillhouse.models.anatomy import depths_of


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """A class of torch.optim by its name in any case. Raises `UserError` with the nearest names."""
    classes = {
        n.lower(): c
        for n, c in vars(torch.optim).items()
        if isinstance(c, type) and issubclass(c, torch.optim.Optimizer) and n != "Optimizer"
    }
    if name.lower() not in classes:
        raise unknown("optimizer", name, classes)
    return classes[name.lower()]


def check_optimizer(name: str, arguments: dict[str, Any]) -> None:
    """Make and step the optimiser once, on a weight of its own. Raises `UserError` for a value that its class refuses,
    and for one that cannot be stepped by gradients alone."""
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.zeros_like(weight)
    try:
        optimizer = optimizer_class(name)([weight], **arguments)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).split(".__init__() ")[-1].rstrip(".") or type(error).__name__
        raise UserError(f"{name} does not take these options: {reason}.") from None
    try:
        optimizer.step()
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{name} cannot train here with these options: {reason}.") from None


def trained_in_float32(student: nn.Module) -> None:
    """Turn a student whose trained weights are in half precision to float32, in place.

    In half precision an update smaller than about 1/256 (bfloat16) of a weight rounds to nothing, and float16
    overflows. Frozen weights alone, such as those under adapters, stay as they are. For speed there is mixed precision
    (`train.precision: bf16`).
    """
    if any(p.requires_grad and p.dtype in (torch.float16, torch.bfloat16) for p in student.parameters()):
        student.float()
        config: Any = getattr(student, "config", None)  # of a transformers model, which saves its precision by it
        if hasattr(config, "dtype"):
            config.dtype = torch.float32


def make_optimizer(
    groups: list[dict[str, Any]], spec: TrainSpec, student: nn.Module | None = None
) -> torch.optim.Optimizer:
    """The optimiser that a recipe names, any of torch.optim, over parameter groups that may set their own lr and
    weight_decay.

    Args:
        groups: options and parameters.
        spec: the training; its optimiser's `decay` and `layer_decay` divide the groups.
        student: whose layers `layer_decay` counts, and whose `no_weight_decay()` names parameters that `decay:
            matrices` leaves out.
    """
    groups = _divided(groups, spec, student)
    try:
        check_optimizer(spec.optimizer.name, spec.optimizer.arguments())
    except UserError as error:
        raise UserError(f"train.optimizer: {error}") from None
    return optimizer_class(spec.optimizer.name)(groups, **spec.optimizer.arguments())


def _divided(groups: list[dict[str, Any]], spec: TrainSpec, student: nn.Module | None) -> list[dict[str, Any]]:
    """Groups cut by whether weights decay and by depth, in the order of their parameters; as they are where neither is
    asked for."""
    options = spec.optimizer
    if options.decay == "all" and options.layer_decay is None:
        return groups
    names = {} if student is None else {id(p): n for n, p in student.named_parameters()}
    skipped = set(getattr(student, "no_weight_decay", set)())
    depths = depths_of(student) if student is not None and options.layer_decay is not None else {}
    deepest = max(depths.values(), default=0)
    out: list[dict[str, Any]] = []
    for group in groups:
        cut: dict[tuple[bool, int], list[nn.Parameter]] = {}
        for p in group["params"]:
            name = names.get(id(p), "")
            decays = options.decay == "all" or (p.ndim > 1 and name not in skipped)
            cut.setdefault((decays, depths.get(name, deepest)), []).append(p)
        for (decays, depth), params in cut.items():
            rate = group.get("lr", options.lr) * (options.layer_decay or 1.0) ** (deepest - depth)
            out.append({**group, "params": params, "lr": rate} | ({} if decays else {"weight_decay": 0.0}))
    return out


def rate_factor(spec: TrainSpec, progress_epochs: float) -> float:
    """The factor on the learning rate after so many (fractional) epochs."""
    s = spec.schedule
    floor = s.min_lr / spec.optimizer.lr
    if s.name == "onecycle":
        return _one_cycle(progress_epochs, s.warmup_epochs or 0.3 * spec.epochs, spec.epochs, floor)
    if progress_epochs < s.warmup_epochs:
        return progress_epochs / s.warmup_epochs
    if s.name == "step":
        return s.gamma ** sum(progress_epochs >= m for m in s.milestones)
    if s.name == "constant":
        return 1.0
    if s.name == "exponential":
        return max(s.gamma ** math.floor(progress_epochs - s.warmup_epochs), floor)
    share = min((progress_epochs - s.warmup_epochs) / max(spec.epochs - s.warmup_epochs, 1e-9), 1.0)
    falling = {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "poly": (1 - share) ** s.power}[
        s.name
    ]
    return floor + (1 - floor) * falling


def _one_cycle(epoch: float, rise: float, epochs: float, end: float) -> float:
    """The factor of torch's OneCycleLR with its defaults: from 1/25 up to 1 at `rise`, then down to `end`, or to
    1/250,000."""
    start, end = 1 / 25, end or 1 / 25 / 1e4
    if epoch < rise:
        low, share = start, 1 - epoch / rise
    else:
        low, share = end, min((epoch - rise) / max(epochs - rise, 1e-9), 1.0)
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share))

"""Full precision for losses: half-precision inputs are computed in float32, whatever the autocast region around the
call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(loss: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of tensors and lists of them: they arrive as float32, or where one of them is float64, all as
    float64, and autocast is off inside.

    >>> @full_precision
    ... def total(x: Tensor) -> Tensor:
    ...     return x.sum()
    >>> total(torch.ones(3, dtype=torch.bfloat16)).dtype
    torch.float32
    """

    @functools.wraps(loss)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        given = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, list) else [a])]
        tensors = [t for t in given if isinstance(t, Tensor)]
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        raised = [_raise(a, dtype) for a in args]
        named = {k: _raise(v, dtype) for k, v in kwargs.items()}
        device = tensors[0].device.type if tensors else "cpu"
        with without_autocast(device):
            return loss(*raised, **named)

    return run


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context without autocast on a type of device, whether or not that has it."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _raise(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_raise(v, dtype) for v in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

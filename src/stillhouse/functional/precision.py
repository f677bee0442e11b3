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
    """Decorate a function of tensors and lists of them: float16 and bfloat16 arguments arrive as float32 and autocast
    is off inside; float32 and float64 stay as they are.

    >>> @full_precision
    ... def total(x: Tensor) -> Tensor:
    ...     return x.sum()
    >>> total(torch.ones(3, dtype=torch.bfloat16)).dtype
    torch.float32
    """

    @functools.wraps(loss)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        raised = [_raise(a) for a in args]
        named = {k: _raise(v) for k, v in kwargs.items()}
        given = [b for a in (*raised, *named.values()) for b in (a if isinstance(a, list) else [a])]
        device = next((a.device.type for a in given if isinstance(a, Tensor)), "cpu")
        with without_autocast(device):
            return loss(*raised, **named)

    return run


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context without autocast on a type of device, whether or not that has it."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _raise(value: Any) -> Any:
    if isinstance(value, list):
        return [_raise(v) for v in value]
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value

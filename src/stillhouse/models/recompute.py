"""Gradient checkpointing: a network computes its activations again in the backward pass instead of keeping them, which
saves memory for about a third more time. Networks of transformers and timm have it, each in its own way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stillhouse.errors import UserError


@contextmanager
def recomputed(model: Any) -> Iterator[None]:
    """Inside, the network keeps no activations of its blocks in training.

    Raises:
        UserError: a network that cannot.
    """
    if getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        off = model.gradient_checkpointing_disable
    elif hasattr(model, "set_grad_checkpointing"):
        try:
            model.set_grad_checkpointing(True)
        except AssertionError:  # of timm's networks that have the function and not the feature
            raise _cannot(model) from None
        off = lambda: model.set_grad_checkpointing(False)  # noqa: E731
    else:
        raise _cannot(model)
    try:
        yield
    finally:
        off()


def _cannot(model: Any) -> UserError:
    return UserError(
        f"train.gradient_checkpointing: a {type(model).__name__} cannot compute activations again; most networks of "
        "transformers (hf:…) and timm (timm:…) can. Leave it out, or take train.accumulate with a smaller batch."
    )

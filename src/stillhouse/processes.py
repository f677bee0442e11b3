"""Processes that train together: the rank of this one, decisions that all share, and waiting for each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from stillhouse.errors import UserError

PATIENCE = timedelta(days=14)
"""How long a process waits for another, which may train a network meanwhile."""


@contextmanager
def together(cpu: bool = False) -> Iterator[None]:
    """Inside, this process is one of those that train together, and each waits for the others as long as they live.

    Raises:
        UserError: one of the others has ended.
    """
    import torch
    from accelerate import PartialState

    PartialState(cpu=cpu, timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:
        lost = (
            isinstance(error, torch.distributed.DistError)
            or "Connection closed by peer" in str(error)
            or "Connection reset" in str(error)
        )
        if rank_world()[1] == 1 or not lost:
            raise
        raise UserError(
            "Another process of this training has ended, so this one ends too; its own message says why. Start all of "
            "them again to resume."
        ) from error


def rank_world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    from accelerate import PartialState

    state = PartialState()
    return state.process_index, state.num_processes


def share() -> dict[str, int]:
    """The same as `rank` and `world`, which a `Loader` takes."""
    return dict(zip(("rank", "world"), rank_world()))


def agreed(value: bool) -> bool:
    """The main process's value, in every process."""
    if rank_world()[1] == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return bool(broadcast_object_list([value])[0])


def wait() -> None:
    """Wait until all processes have arrived."""
    if rank_world()[1] > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()

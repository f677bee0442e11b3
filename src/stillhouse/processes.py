"""The processes that train together: which of them this is, what all of them take for true, and waiting for each other."""

from __future__ import annotations


def rank_world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    from accelerate import PartialState

    state = PartialState()
    return state.process_index, state.num_processes


def share() -> dict[str, int]:
    """The same as `rank` and `world`, which a `Loader` takes."""
    return dict(zip(("rank", "world"), rank_world()))


def agreed(value: bool) -> bool:
    """The main process's answer, in every process."""
    if rank_world()[1] == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return bool(broadcast_object_list([value])[0])


def wait() -> None:
    """Until all processes are here."""
    if rank_world()[1] > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()

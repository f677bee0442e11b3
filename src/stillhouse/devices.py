"""The device that a run works on: the first that torch sees, or the one that was demanded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stillhouse.errors import UserError

if TYPE_CHECKING:
    import torch


def demanded(name: str) -> torch.device:
    """A device by name: `cpu`, `cuda`, `cuda:1`, `mps`, or another kind of this torch.

    Raises:
        UserError: a name that torch does not know, or a device that is not there.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: '{name}' names no device; take cpu, cuda, cuda:0 or mps.") from None
    if device.type == "cpu":
        return torch.device("cpu")
    library = torch.backends.mps if device.type == "mps" else getattr(torch, device.type, None)
    there = bool(getattr(library, "is_available", lambda: False)())
    count = getattr(library, "device_count", lambda: 1)() if there else 0
    if count <= (device.index or 0):
        seen = f"torch sees {count} of that kind" if count else f"torch sees no {device.type} device here"
        raise UserError(
            f"--device {name}: {seen}; `stillhouse doctor` prints what it sees, and without --device a run takes the "
            "first that there is."
        )
    if device.index is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--device {name}: each of several processes takes its own device, so give {device.type}.")
    return device


@contextmanager
def on_device(name: str | None, cpu: bool = False) -> Iterator[bool]:
    """Inside, what asks Accelerate for a device gets the one that was demanded (None: the first that there is); gives
    whether that is the CPU.

    Raises:
        UserError: as `demanded`; a device other than the CPU together with `cpu`.
    """
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    given = "cpu" if cpu and name is None else name
    wanted = None if given is None else demanded(given)
    if wanted is not None and cpu and wanted.type != "cpu":
        raise UserError(f"--cpu and --device {name} contradict each other; give one of them.")
    cpu = wanted is not None and wanted.type == "cpu"
    if PartialState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(True)  # an earlier run of this process may have taken another device
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if wanted is not None and not cpu and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(wanted)
    try:
        yield cpu
    finally:
        if before is None:
            os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        else:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before

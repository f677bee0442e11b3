"""The two halves of a network as files, and what runs them: device -> string of bytes -> server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse import catalog
from stillhouse.errors import UserError
from stillhouse.files import atomic_write
from stillhouse.methods.compression.entropic_student.coding import FixedCoder, RangeCoder
from stillhouse.methods.compression.entropic_student.network import Bottleneck, DevicePart, ServerPart, Split
from stillhouse.methods.compression.entropic_student.prior import Tables
from stillhouse.tasks.base import Task

DEVICE, SERVER, TABLES, FACTS = "device.pt2", "server.pt2", "tables.safetensors", "split.json"


def write_halves(network: nn.Module, split: Split, task: Task, folder: Path) -> list[str]:
    """Write a folder with the device's half and the server's half (torch.export), the tables of both, and `split.json`,
    which has what the rest of a program must know: sizes, normalisation, classes.

    Returns:
        sentences for the user.

    Raises:
        UserError: a folder that is there already.
    """
    if folder.exists():
        raise UserError(f"'{folder}' is there already; name another folder.")
    network = network.eval()
    bottleneck = network.get_submodule(split.at)
    assert isinstance(bottleneck, Bottleneck)
    example = task.example()["input"].repeat_interleave(2, 0)
    device, server = DevicePart(bottleneck).eval(), ServerPart(network, split.at, example.shape[1:], task).eval()
    with torch.no_grad():
        symbols = device(example)
    folder.mkdir(parents=True)
    for part, given, name in ((device, example, DEVICE), (server, symbols, SERVER)):
        program = torch.export.export(part, (given,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        with atomic_write(folder / name) as temporary, open(temporary, "wb") as file:
            torch.export.save(program, file)
    extra = bottleneck.code.extra_tensors()
    if extra:
        from safetensors.torch import save_file

        with atomic_write(folder / TABLES) as temporary:
            save_file(extra, str(temporary))
    mean, std = task.normalisation
    facts = {
        "codec": split.codec,
        "bits": split.bits,
        "image": list(example.shape[1:]),
        "latent": list(symbols.shape[1:]),
        "outputs": list(server.names),
        "mean": list(mean),
        "std": list(std),
        "task": {"name": task.name, **task.facts(folder)},
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=1))
    return [
        f"Wrote {folder}",
        f"The device's half is {(folder / DEVICE).stat().st_size / 1e3:,.0f} kB, the server's "
        f"{(folder / SERVER).stat().st_size / 1e3:,.0f} kB",
        f"Try both: python -m {__package__} {folder} IMAGE",
    ]


class _Half:
    """What device and server share.

    Args:
        folder: that `write_halves` wrote.

    Raises:
        UserError: no such folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / FACTS).is_file():
            raise UserError(
                f"'{folder}' holds no halves of a network; write them with stillhouse export RUN --to split."
            )
        self.facts: dict[str, Any] = json.loads((self.folder / FACTS).read_text())
        self.coder = self._coder()

    def _coder(self) -> RangeCoder | FixedCoder:
        if self.facts["codec"] != "learned":
            return FixedCoder(self.facts["bits"])
        from safetensors.numpy import load_file

        stored = load_file(str(self.folder / TABLES))
        return RangeCoder(Tables(stored["cumulative"], stored["lengths"], stored["offsets"]))

    def _program(self, name: str) -> Any:
        return torch.export.load(str(self.folder / name)).module()


class Device(_Half):
    """The device: images to strings. Reads its own file and the tables."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.program = self._program(DEVICE)

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[bytes]:
        """A string for each of the normalised images (B, C, H, W)."""
        return [self.coder.encode(symbols) for symbols in self.program(images).numpy()]


class Server(_Half):
    """The server: strings to the network's output. Reads its own file and the tables."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.program = self._program(SERVER)

    @torch.no_grad()
    def decode(self, strings: Sequence[bytes]) -> Any:
        """The logits of strings; where the network gives several tensors, such as boxes and scores, a mapping of
        them."""
        symbols = np.stack([self.coder.decode(s, self.facts["latent"]) for s in strings])
        output = self.program(torch.from_numpy(symbols))
        return output if isinstance(output, Tensor) else dict(zip(self.facts["outputs"], output))


class RoundTrip(nn.Module):
    """Both halves in one process, as a network that takes images.

    Attributes:
        sent: lengths of the strings of the last call.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.device_half, self.server_half = Device(folder), Server(folder)
        self.anchor = nn.Parameter(torch.zeros(()))  # a place for who asks on which device this is
        self.sent: list[int] = []

    @property
    def task(self) -> Task:
        """What is predicted."""
        facts = dict(self.server_half.facts["task"])
        return catalog.task(facts.pop("name")).restored(facts, self.server_half.folder)

    def forward(self, images: Tensor, targets: None = None) -> Any:
        strings = self.device_half.encode(images)
        self.sent = [len(s) for s in strings]
        return self.server_half.decode(strings)

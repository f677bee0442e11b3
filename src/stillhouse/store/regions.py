"""What a teacher says of regions of images: boxes with vectors and further values, as many rows for each image as it
has, on disk.

Files of some images each (`regions-0.safetensors`, …), written one after the other, so that an interrupted writing
resumes at the first that is missing; read by memory mapping.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.files import atomic_write

INDEX = "regions.json"
LENGTHS = "lengths"
Rows = Mapping[str, Tensor]
"""Values of an image by name, each (m, ...) with one m."""


def write_regions(
    folder: Path,
    count: int,
    make: Callable[[range], Sequence[Rows]],
    images: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write the rows of images 0 to count - 1, or what of them is missing.

    Args:
        folder: is made where it is not there.
        make: the rows of a range of images; all have the same names.
        images: of a file.
        progress: is told how many images are done.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, first in enumerate(range(0, count, images)):
        path = folder / f"regions-{number}.safetensors"
        files.append(path.name)
        if not path.is_file():
            rows = make(range(first, min(first + images, count)))
            lengths = torch.tensor([len(next(iter(r.values()))) for r in rows])
            joined = {name: torch.cat([r[name].cpu() for r in rows]).contiguous() for name in rows[0]}
            with atomic_write(path) as temporary:
                save_file({**joined, LENGTHS: lengths}, str(temporary))
        progress(min(first + images, count))
    with atomic_write(folder / INDEX) as temporary:
        temporary.write_text(json.dumps({"count": count, "images": images, "files": files}))


class RegionStore:
    """The rows that `write_regions` wrote; files are opened when they are read, in each process for itself.

    Raises:
        UserError: no such rows there, or not all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise UserError(f"'{folder}' holds no regions, or their writing was interrupted; run its recipe again.")
        index = json.loads((self.folder / INDEX).read_text())
        self.count, self._images = int(index["count"]), int(index["images"])
        self._files: list[str] = index["files"]
        self._open: dict[int, tuple[Any, list[int]]] = {}

    def __len__(self) -> int:
        return self.count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def rows(self, image: int) -> dict[str, Tensor]:
        """Values (m, ...) of an image, by name."""
        if not 0 <= image < self.count:
            raise IndexError(image)
        number, place = divmod(image, self._images)
        if number not in self._open:
            from safetensors import safe_open

            file = safe_open(str(self.folder / Path(self._files[number]).name), "pt")
            starts = [0, *file.get_tensor(LENGTHS).cumsum(0).tolist()]
            self._open[number] = (file, starts)
        file, starts = self._open[number]
        part = slice(starts[place], starts[place + 1])
        return {name: file.get_slice(name)[part] for name in file.keys() if name != LENGTHS}  # noqa: SIM118

"""`PackedSet`: a synthetic set of real images, several whole ones stored in each; the product of PCA."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from stillhouse.files import atomic_write
from stillhouse.methods.datasets.pca.packing import cut
from stillhouse.runs.products import read_meta
from stillhouse.synthetic.product import SyntheticSet


@dataclass
class PackedSet(SyntheticSet):
    """A synthetic set of real images, several whole ones in each.

    Attributes:
        grid: tiles a side.
        size: (H, W) of what networks are trained on.
        confined: whether crops stay inside a tile.
        random_images: as many random whole images, to compare with; not saved.
    """

    kind: ClassVar[str] = "stillhouse.methods.datasets.pca:PackedSet"
    grid: int = 1
    size: tuple[int, int] = (0, 0)
    confined: bool = True
    random_images: PackedSet | None = None

    @property
    def geometry(self) -> dict[str, Any]:
        """How stored images are read, as JSON data."""
        return {"grid": self.grid, "size": list(self.size), "confined": self.confined}

    def training_images(self) -> tuple[Tensor, Tensor]:
        """(N * grid^2, C, H, W) and (N * grid^2,): every tile as a whole image, those of a stored image one after
        another."""
        tiles = cut(self.images, self.grid).flatten(0, 1)
        return F.interpolate(
            tiles, size=self.size, mode="bilinear", align_corners=False
        ), self.labels.repeat_interleave(self.grid**2)

    def save(self, folder: Path) -> None:
        super().save(folder)
        meta = read_meta(folder)
        with atomic_write(folder / "product.json") as temporary:
            temporary.write_text(json.dumps({**meta, "geometry": self.geometry}, indent=1))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> PackedSet:
        base, geometry = super().load(folder), read_meta(folder)["geometry"]
        assert isinstance(base, cls)
        base.grid, base.size, base.confined = geometry["grid"], tuple(geometry["size"]), geometry["confined"]
        return base

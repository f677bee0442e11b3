"""`ImageMatcher`: a network whose patch features match across images, to keep; and points found by features."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec
from stillhouse.data.images import open_image
from stillhouse.errors import UserError
from stillhouse.files import atomic_write
from stillhouse.methods.correspondence.distilldift.losses import correspondences
from stillhouse.methods.correspondence.distilldift.networks import PatchNetwork, StemSpec
from stillhouse.runs.products import Product, read_meta

WEIGHTS = "network.safetensors"
GRID = 10  # points a side that `predict` looks for


@dataclass
class ImageMatcher(Product):
    """The product of DistillDIFT.

    Attributes:
        module: gives patch features; adapters are merged into its layers.
        model: how its network is built.
        window: of the soft argmax around the best place, in pixels; 0: none.
        stem: what gives the network's patches, if not its own first layer.
        figures: of its making; saved with the run, not with the product.
    """

    kind: ClassVar[str] = "stillhouse.methods.correspondence.distilldift:ImageMatcher"
    reads = "files"
    formats: ClassVar[Mapping[str, str]] = {"safetensors": WEIGHTS}
    module: PatchNetwork
    model: ModelSpec
    window: int = 0
    stem: StemSpec | None = None
    figures: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def matched(self, source: Tensor, target: Tensor, points: Tensor) -> Tensor:
        """(N, 2) where points (N, 2) of one uint8 image (3, H, W), rows and columns, are in another."""
        side, device = self.module.side, next(self.module.parameters()).device
        maps = [self.module(image[None].to(device)) for image in (source, target)]
        scales = [torch.tensor(image.shape[-2:], device=device) / side for image in (source, target)]
        here = ((points.to(device) + 0.5) / scales[0] - 0.5)[None]
        found = correspondences(maps[0], maps[1], here, ((side, side), (side, side)), self.window)[0]
        return (found + 0.5) * scales[1] - 0.5

    def found_in(self, files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
        if len(files) != 2:
            raise UserError(f"This product matches two images; {len(files)} were given.")
        source, target = (
            torch.from_numpy(np.array(open_image(path).convert("RGB"))).permute(2, 0, 1) for path in files
        )
        axes = [(torch.arange(GRID) + 0.5) / GRID * size - 0.5 for size in source.shape[-2:]]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        found = self.matched(source, target, points).cpu()
        yield (
            f"{files[0].stem}-{files[1].stem}",
            {
                "found": f"{len(points)} points of {files[0].name} in {files[1].name}",
                "points": points.round(decimals=1).tolist(),
                "places": found.round(decimals=1).tolist(),
                "picture": with_points((source, target), (points, found)),
            },
        )

    def save(self, folder: Path) -> None:
        self._write(folder / WEIGHTS)
        meta = {
            "kind": self.kind,
            "format": 1,
            "model": _without_weights(self.model).model_dump(mode="json"),
            "stem": self.stem
            and {"network": _without_weights(self.stem.network).model_dump(mode="json"), "blocks": self.stem.blocks},
            "side": self.module.side,
            "mean": self.module.mean,
            "std": self.module.std,
            "window": self.window,
        }
        (folder / "product.json").write_text(json.dumps(meta, indent=1))

    def _write(self, path: Path) -> None:
        from safetensors.torch import save_model

        with atomic_write(path) as temporary:
            save_model(self.module, str(temporary))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> ImageMatcher:
        from safetensors.torch import load_file

        meta = read_meta(folder)
        model = ModelSpec.model_validate(meta["model"])
        if model.model.startswith("file:") and not trust_code:
            raise UserError(
                f"The product in {folder} is built by the Python file '{model.model}'; load it with trust_code=True if "
                "you trust that file."
            )
        stem = StemSpec.model_validate(meta["stem"]) if meta.get("stem") else None
        module = PatchNetwork(model, meta["side"], tuple(meta["mean"]), tuple(meta["std"]), stem)
        module.load_state_dict(load_file(str(folder / WEIGHTS)))
        return cls(module.eval(), model, meta["window"], stem)

    def export(self, to: str, path: Path) -> list[str]:
        """`safetensors`: the network's tensors."""
        self._write(path)
        return [f"Wrote {path}"]


def _without_weights(spec: ModelSpec) -> ModelSpec:
    return spec.model_copy(update={"checkpoint": None, "pretrained": False})


def with_points(images: tuple[Tensor, Tensor], points: tuple[Tensor, Tensor], side: int = 240) -> Tensor:
    """(3, side, 2 side) uint8: two images side by side, each with its points (N, 2) as dots, one colour for the two
    places of a point."""
    shown = []
    count = max(len(points[0]), 1)
    for image, places in zip(images, points):
        large = F.interpolate(image[None].float(), (side, side), mode="bilinear", antialias=True)[0].round()
        at = (places + 0.5) * side / torch.tensor(image.shape[-2:])
        for i, (row, column) in enumerate(at.round().long().tolist()):
            colour = torch.tensor(colorsys.hsv_to_rgb(i / count, 1.0, 1.0)) * 255
            for reach, tone in ((4, torch.zeros(3)), (3, colour)):
                area = slice(max(row - reach, 0), row + reach + 1), slice(max(column - reach, 0), column + reach + 1)
                large[:, area[0], area[1]] = tone[:, None, None]
        shown.append(large.clamp(0, 255).to(torch.uint8))
    return torch.cat(shown, 2)

"""`ShapeMatcher`: a denoiser of functional maps to keep, which matches any two meshes; and the pairs of its run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.mesh_views import drawn, place_colours
from stillhouse.data.meshes import Mesh, read_mesh
from stillhouse.errors import UserError
from stillhouse.files import atomic_write
from stillhouse.methods.correspondence.diffumatch.denoising import Denoiser, DenoiserSpec
from stillhouse.methods.correspondence.diffumatch.matching import MatchSpec, PairFit, refined
from stillhouse.methods.correspondence.diffumatch.shapes import Shape, assembled, computed
from stillhouse.randomness import keyed, seed_step
from stillhouse.runs.products import Product, read_meta

WEIGHTS, MATCHES = "denoiser.safetensors", "matches.safetensors"


@dataclass
class ShapeMatcher(Product):
    """The product of DiffuMatch.

    Attributes:
        module: the denoiser.
        denoiser: how it is built.
        size: k, of its maps.
        eigenpairs: of a mesh, that are solved for.
        match: how a pair is matched.
        matches: (first, second) -> the point map (V2,) of the run's test pairs.
        figures: of its making; saved with the run, not with the product.
    """

    kind: ClassVar[str] = "stillhouse.methods.correspondence.diffumatch:ShapeMatcher"
    reads = "files"
    formats: ClassVar[Mapping[str, str]] = {"matches": "matches", "safetensors": WEIGHTS}
    module: Denoiser
    denoiser: DenoiserSpec
    size: int
    eigenpairs: int
    match: MatchSpec
    matches: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def shape(self, mesh: Mesh, name: str = "mesh") -> Shape:
        """What matching reads of a mesh. Raises `UserError` for one whose spectrum means nothing (see `Mesh.check`)."""
        whole = mesh.normalised()
        device = next(self.module.parameters()).device
        return assembled(name, whole, computed(whole, self.eigenpairs, self.match.few or 10), device)

    def matched(self, first: Shape, second: Shape, seed: int = 0) -> tuple[Tensor, Tensor]:
        """The functional map after ZoomOut, and for each vertex of the second its vertex of the first (V2,)."""
        with keyed("match", seed):
            fit = PairFit(first, second, self.match, self.size, self.module)
            if fit.learns:
                for i in range(self.match.steps):
                    seed_step(seed, "match", i)
                    fit.step(i)
            seed_step(seed, "match", "result")
            found = fit.result()
        return refined(self.match, found.raw if fit.learns else found.masked, first, second)

    def found_in(self, files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
        if len(files) != 2:
            raise UserError(f"This product matches two meshes; {len(files)} files were given.")
        first, second = (self.shape(read_mesh(path), path.stem) for path in files)
        functional, points = self.matched(first, second)
        picture = side_by_side(first.mesh, second.mesh, points)
        words = f"{len(points):,} vertices matched to {len(points.unique()):,} of {len(first.points):,}"
        yield (
            f"{second.name}-{first.name}",
            {
                "found": words,
                "points": points.tolist(),
                "map": [[round(x, 5) for x in row] for row in functional[: self.size, : self.size].tolist()],
                "picture": picture,
            },
        )

    def save(self, folder: Path) -> None:
        self._write(folder / WEIGHTS, self.module.state_dict())
        if self.matches:
            self._write(folder / MATCHES, {"/".join(pair): points for pair, points in self.matches.items()})
        meta = {
            "kind": self.kind,
            "format": 1,
            "denoiser": self.denoiser.model_dump(mode="json"),
            "size": self.size,
            "eigenpairs": self.eigenpairs,
            "match": self.match.model_dump(mode="json"),
        }
        (folder / "product.json").write_text(json.dumps(meta, indent=1))

    @staticmethod
    def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        with atomic_write(path) as temporary:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(temporary))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> ShapeMatcher:
        from safetensors.torch import load_file

        meta = read_meta(folder)
        spec, match = DenoiserSpec.model_validate(meta["denoiser"]), MatchSpec.model_validate(meta["match"])
        module = spec.build(meta["size"])
        module.load_state_dict(load_file(str(folder / WEIGHTS)))
        there = load_file(str(folder / MATCHES)) if (folder / MATCHES).is_file() else {}
        matches = {(k.partition("/")[0], k.partition("/")[2]): v for k, v in there.items()}
        return cls(module.eval(), spec, meta["size"], meta["eigenpairs"], match, matches)

    def export(self, to: str, path: Path) -> list[str]:
        """`matches`: the point maps of the run's pairs as NumPy files; `safetensors`: the denoiser's tensors."""
        if to == "safetensors":
            self._write(path, self.module.state_dict())
            return [f"Wrote {path}"]
        path.mkdir(parents=True, exist_ok=True)
        for (first, second), points in self.matches.items():
            np.save(path / f"{second}-{first}.npy", points.cpu().numpy())
        return [f"Wrote the point maps of {len(self.matches)} pairs to {path}"]


def side_by_side(first: Mesh, second: Mesh, points: Tensor, side: int = 240) -> Tensor:
    """(3, side, 2 side) uint8: the first shape coloured by place, and the second with the colours of the vertices that
    its own are matched to."""
    colours = place_colours(first.vertices)
    return torch.cat([drawn(first, colours, side), drawn(second, colours[points.cpu().numpy()], side)], 2)

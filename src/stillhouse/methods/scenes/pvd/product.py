"""`SceneField`: a radiance field to keep, which renders views; and how it is marched."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError, unknown
from stillhouse.files import atomic_write
from stillhouse.nn.radiance_fields import FORMS, FieldPoints, RadianceField, density
from stillhouse.nn.rays import RAYS_AT_ONCE, Rays, Seen, camera_rays, composite, sampled
from stillhouse.runs.products import Product, read_meta

WEIGHTS = "field.safetensors"
ORBIT = 12  # views of an export


class FieldSpec(Spec):
    """A radiance field by its form."""

    form: str = Field(description="mlp (NeRF), hash (Instant-NGP), vm (TensoRF) or plenoxel.")
    options: dict[str, Any] = Field(default_factory=dict, description="Arguments of the form's class.")

    def build(self) -> RadianceField:
        """A new field, initialised by torch's generator. Raises `UserError` for an unknown form or option."""
        if self.form not in FORMS:
            raise unknown("form of radiance field", self.form, FORMS)
        try:
            return FORMS[self.form](**self.options)
        except TypeError as error:
            raise UserError(f"A field of the form {self.form} does not take these options: {error}.") from None


@dataclass(slots=True)
class Marched:
    """Samples of R rays with S steps, and which of them lie in occupied cells."""

    points: Tensor  # (M, 3) those that do
    directions: Tensor  # (M, 3)
    occupied: Tensor  # (R, S) bool
    delta: Tensor  # (R, S)


def marched(field: RadianceField, rays: Rays, steps: int, offsets: Tensor | None = None) -> Marched:
    """Where a field is asked along rays: in its occupied cells."""
    points, _, delta = sampled(rays, field.bound, steps, offsets)
    occupied = field.is_occupied(points)
    seen = rays.directions[:, None].expand_as(points)
    return Marched(points[occupied], seen[occupied], occupied, delta)


def rendered_points(found: FieldPoints, where: Marched, background: Tensor) -> Seen:
    """What rays see of a field's points; elsewhere nothing is."""
    sigma = torch.zeros_like(where.delta).masked_scatter(where.occupied, density(found.log_density))
    empty = torch.zeros(*where.delta.shape, 3, dtype=found.color.dtype, device=found.color.device)
    color = empty.masked_scatter(where.occupied[..., None].expand_as(empty), found.color)
    return composite(sigma, color, where.delta, background)


@torch.no_grad()
def render(field: RadianceField, rays: Rays, steps: int, background: float = 1.0) -> Tensor:
    """(R, 3) what rays see of a field, some at a time."""
    parts = []
    for some in rays.split(RAYS_AT_ONCE):
        where = marched(field, some, steps)
        found = field(where.points, where.directions)
        parts.append(rendered_points(found, where, torch.full((3,), background, device=where.delta.device)).image)
    return torch.cat(parts)


@dataclass
class SceneField(Product):
    """The product of PVD.

    Attributes:
        module: the field.
        spec: its form and options.
        steps: samples of a ray.
        view: how it is shown: `side`, `angle`, `radius`.
        figures: of its making; saved with the run, not with the product.
    """

    kind: ClassVar[str] = "stillhouse.methods.scenes.pvd:SceneField"
    formats: ClassVar[Mapping[str, str]] = {"views": "views", "safetensors": WEIGHTS}
    module: RadianceField
    spec: FieldSpec
    steps: int
    view: dict[str, float]
    figures: dict[str, float] = field(default_factory=dict)

    def look(self, centre: Tensor, side: int | None = None) -> Tensor:
        """(3, side, side) uint8: the view of a camera at `centre` (3,) that looks at the middle, over white."""
        pixels = int(side or self.view["side"])
        image = render(self.module, camera_rays(centre, pixels, self.view["angle"]), self.steps)
        return (image.clamp(0, 1) * 255).round().to(torch.uint8).view(pixels, pixels, 3).permute(2, 0, 1)

    def save(self, folder: Path) -> None:
        self._write_weights(folder / WEIGHTS)
        meta = {"kind": self.kind, "format": 1, "field": self.spec.model_dump(), "steps": self.steps, "view": self.view}
        (folder / "product.json").write_text(json.dumps(meta, indent=1))

    def _write_weights(self, path: Path) -> None:
        from safetensors.torch import save_model

        with atomic_write(path) as temporary:
            save_model(self.module, str(temporary))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> SceneField:
        from safetensors.torch import load_file

        meta = read_meta(folder)
        spec = FieldSpec.model_validate(meta["field"])
        module = spec.build()
        module.load_state_dict(load_file(str(Path(folder) / WEIGHTS)))
        return cls(module.eval(), spec, meta["steps"], meta["view"])

    def export(self, to: str, path: Path) -> list[str]:
        """`views`: a turn around the scene as PNG files; `safetensors`: the field's tensors."""
        if to == "safetensors":
            self._write_weights(path)
            return [f"Wrote {path}"]
        from torchvision.io import write_png

        path.mkdir(parents=True, exist_ok=True)
        height = math.sin(math.radians(25))
        for i in range(ORBIT):
            turn, flat = 2 * math.pi * i / ORBIT, math.cos(math.radians(25))
            centre = self.view["radius"] * torch.tensor([flat * math.cos(turn), flat * math.sin(turn), height])
            write_png(self.look(centre, 4 * int(self.view["side"])), str(path / f"{i:02d}.png"))
        return [f"Wrote {ORBIT} views of a turn around the scene to {path}"]

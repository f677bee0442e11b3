"""The field: Gaussians with colour, opacity and features, how they are seen, and the network that lifts features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.nn.radiance_fields import spherical_harmonics
from stillhouse.nn.splatting import Camera, Projected, multiplied, project, quaternion, rotations, splat

FLAT = 0.28209479177387814  # the harmonic of degree 0
NAMES = ("means", "log_scales", "quats", "opacity", "harmonics", "features")


@dataclass(slots=True)
class Seen:
    """What a camera sees of Gaussians: `color`, `normal` and `features` (H, W, C) over nothing, `depth` and its
    standard deviation `spread` (H, W), which is large where a pixel sees two surfaces, `alpha` (H, W) how opaque;
    `found` where they are in the image."""

    color: Tensor
    depth: Tensor
    spread: Tensor
    normal: Tensor
    features: Tensor
    alpha: Tensor
    found: Projected


class Gaussians(nn.Module):
    """N ellipsoids.

    Attributes:
        means: (N, 3) in metres.
        log_scales: (N, 3).
        quats: (N, 4) w, x, y, z; of length 1 when they are used.
        opacity: (N,) logits.
        harmonics: (N, (degree + 1) ** 2, 3) of colour by the direction of view.
        features: (N, D).
    """

    def __init__(self, count: int, degree: int = 4, width: int = 32) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.zeros(count, 3))
        self.log_scales = nn.Parameter(torch.zeros(count, 3))
        self.quats = nn.Parameter(torch.tensor([1.0, 0, 0, 0]).repeat(count, 1))
        self.opacity = nn.Parameter(torch.zeros(count))
        self.harmonics = nn.Parameter(torch.zeros(count, (degree + 1) ** 2, 3))
        self.features = nn.Parameter(torch.zeros(count, width))

    def __len__(self) -> int:
        return len(self.means)

    @property
    def degree(self) -> int:
        """Of the harmonics."""
        return int(self.harmonics.shape[1] ** 0.5) - 1

    @torch.no_grad()
    def begin(self, points: Tensor, colors: Tensor, opacity: float = 0.1) -> None:
        """Place one at each point (N, 3) with its colour (N, 3), as wide as the mean distance to the three nearest."""
        from scipy.spatial import cKDTree

        where = points.detach().cpu().double().numpy()
        distances = cKDTree(where).query(where, k=min(4, len(where)))[0].reshape(len(where), -1)[:, 1:]
        width = (
            torch.from_numpy(distances.mean(-1)).float().clamp_min(1e-4) if len(where) > 1 else torch.full((1,), 0.01)
        )
        quats = torch.randn(len(points), 4)
        self.means.copy_(points)
        self.log_scales.copy_(width.log()[:, None].expand(-1, 3))
        self.quats.copy_(quats / quats.norm(dim=-1, keepdim=True))
        self.opacity.fill_(torch.tensor(opacity).logit().item())
        self.harmonics.zero_()
        self.harmonics[:, 0] = (colors.to(self.harmonics) - 0.5) / FLAT
        self.features.copy_(2 * torch.rand(self.features.shape) - 1)

    def colors(self, camera: Camera, degree: int) -> Tensor:
        """(N, 3) as seen from a camera, with harmonics up to a degree; clamped to [0, 1]."""
        used = (min(degree, self.degree) + 1) ** 2
        ray = (self.means - camera.centre).detach()
        values = spherical_harmonics(ray / ray.norm(dim=-1, keepdim=True).clamp_min(1e-9), min(degree, self.degree) + 1)
        return ((self.harmonics[:, :used] * values[..., None]).sum(1) + 0.5).clamp(0, 1)

    def normals(self, towards: Tensor | None = None) -> Tensor:
        """(N, 3) the axis of the smallest scale; with `towards` (3,), a camera's place, turned to it."""
        axis = self.log_scales.argmin(-1)[:, None, None].expand(-1, 3, 1)
        normal = rotations(self.quats).gather(2, axis)[..., 0]
        if towards is None:
            return normal
        away = (normal * (towards - self.means)).sum(-1, keepdim=True) < 0
        return torch.where(away, -normal, normal)

    def seen(
        self,
        camera: Camera,
        degree: int | None = None,
        *,
        flip: bool = True,
        depth_background: float | None = None,
        screen: Tensor | None = None,
    ) -> Seen:
        """The view of a camera.

        Args:
            degree: of the harmonics that are used; None: all.
            flip: turn normals to the camera.
            depth_background: the depth behind everything; None: depth is divided by opacity instead.
            screen: (N, 2) added to the places in the image, whose gradient is then theirs.
        """
        found = project(self.means, self.log_scales, self.quats, camera)
        if screen is not None:
            found = Projected(found.uv + screen, found.cov, found.depth)
        color = self.colors(camera, self.degree if degree is None else degree)
        normal = self.normals(camera.centre if flip else None)
        depths = torch.stack([found.depth, found.depth.detach() ** 2], -1)
        channels = torch.cat([color, depths, normal, self.features], -1)
        out = splat(found, self.opacity.sigmoid(), channels, camera.width, camera.height)
        color, depth, normal, features = out.image.split([3, 2, 3, self.features.shape[1]], -1)
        alpha = 1 - out.transmittance
        mean, square = (depth.detach() / alpha.detach().clamp_min(1e-3)[..., None]).unbind(-1)
        spread = (square - mean**2).clamp_min(0).sqrt()
        if depth_background is None:
            depth = depth[..., 0] / alpha.clamp_min(1e-3)
        else:
            depth = depth[..., 0] + depth_background * out.transmittance
        return Seen(color, depth, spread, normal, features, alpha, found)

    @torch.no_grad()
    def move(self, which: Tensor, rotation: Tensor, shift: Tensor, about: Tensor) -> None:
        """Move some rigidly: turn them about a point (3,) by a rotation (3, 3), and shift them by (3,). Colours that
        change with the direction of view keep to the world's directions."""
        centre = self.means[which] - about
        self.means[which] = centre @ rotation.T + about + shift
        self.quats[which] = multiplied(quaternion(rotation).to(self.quats), F.normalize(self.quats[which], dim=-1))

    def resize(self, tensors: dict[str, Tensor]) -> None:
        """Take other Gaussians, whose number may be another."""
        for name in NAMES:
            parameter = getattr(self, name)
            parameter.data = tensors[name].detach().to(parameter.device, parameter.dtype).clone()
            parameter.grad = None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        given = {name: state_dict[prefix + name] for name in NAMES if prefix + name in state_dict}
        if len(given) == len(NAMES) and len(given["means"]) != len(self):
            self.resize(given)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def lifting(width: int, hidden: tuple[int, ...] | list[int], dim: int) -> nn.Sequential:
    """The network that takes features (…, width) to the image encoder's space (…, dim): layers with ReLU between."""
    widths = [width, *hidden, dim]
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        layers += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])

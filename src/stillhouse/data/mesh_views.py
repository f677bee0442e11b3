"""Views of triangle meshes: a pinhole camera, a z-buffer, and pictures of coloured bodies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.meshes import Mesh


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: a point x of the world is at `rotation` (3, 3) x + `translation` (3,) before it, with x to the
    right, y down and z away; `focal` and the centre are in pixels of a picture (height, width)."""

    rotation: np.ndarray
    translation: np.ndarray
    focal: float
    height: int
    width: int

    def before(self, points: np.ndarray) -> np.ndarray:
        """(N, 3) points of the world as the camera has them."""
        return points @ self.rotation.T + self.translation

    def projected(self, points: np.ndarray) -> np.ndarray:
        """(N, 3) of points of the world: row and column in pixels, where the first pixel's middle is 0.5, and depth."""
        x, y, z = self.before(points).T
        safe = np.where(np.abs(z) < 1e-9, 1e-9, z)
        return np.stack([self.focal * y / safe + self.height / 2, self.focal * x / safe + self.width / 2, z], 1)

    def unprojected(self, pixels: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """(N, 3) points of the world at rows and columns (N, 2), in pixels, and depths (N,)."""
        y = (pixels[:, 0] - self.height / 2) * depth / self.focal
        x = (pixels[:, 1] - self.width / 2) * depth / self.focal
        return (np.stack([x, y, depth], 1) - self.translation) @ self.rotation


def camera_around(
    centre: np.ndarray, distance: float, azimuth: float, elevation: float, angle: float, side: int
) -> Camera:
    """A camera that looks at `centre` (3,) from a distance, the world's y axis upwards in a picture (side, side).

    Args:
        azimuth, elevation: in degrees; at 0 and 0 it stands along the z axis.
        angle: of view, in degrees.
    """
    a, e = np.deg2rad(azimuth), np.deg2rad(elevation)
    back = np.array([np.cos(e) * np.sin(a), np.sin(e), np.cos(e) * np.cos(a)])
    right = np.array([np.cos(a), 0.0, -np.sin(a)])
    rotation = np.stack([right, -np.cross(back, right), -back])
    place = centre + distance * back
    return Camera(rotation, -rotation @ place, side / 2 / np.tan(np.deg2rad(angle) / 2), side, side)


@dataclass(frozen=True)
class View:
    """What a camera sees of a mesh: at each pixel (H, W) the `face` (-1: none), the corners' `weights` (H, W, 3) there,
    right in perspective, and the `depth` (0: nothing)."""

    face: np.ndarray
    weights: np.ndarray
    depth: np.ndarray

    @property
    def covered(self) -> np.ndarray:
        """(H, W) bool, where there is a surface."""
        return self.face >= 0

    def interpolated(self, mesh: Mesh, values: np.ndarray) -> np.ndarray:
        """(H, W, C) of values (V, C) of the vertices; 0 where there is nothing."""
        corners = values[mesh.faces[np.maximum(self.face, 0)]]
        return (corners * self.weights[..., None]).sum(2) * self.covered[..., None]

    def nearest_vertex(self, mesh: Mesh) -> np.ndarray:
        """(H, W) int64 the corner with the largest weight; -1 where there is nothing."""
        corners = mesh.faces[np.maximum(self.face, 0)]
        nearest = np.take_along_axis(corners, self.weights.argmax(-1)[..., None], -1)[..., 0]
        return np.where(self.covered, nearest, -1)


def seen(mesh: Mesh, camera: Camera) -> View:
    """The nearest surface at the middle of each pixel. Triangles that reach behind the camera are left out."""
    projected = camera.projected(mesh.vertices)
    corners = projected[mesh.faces]  # (F, 3, 3) row, column, depth
    before = (corners[..., 2] > 1e-6).all(1)
    low = np.ceil(np.where(before[:, None], corners[..., :2].min(1), 0) - 0.5).astype(np.int64).clip(min=0)
    high = np.floor(np.where(before[:, None], corners[..., :2].max(1), -1) - 0.5).astype(np.int64)
    high = np.minimum(high, [camera.height - 1, camera.width - 1])
    spans = (high - low + 1).clip(min=0)
    counts = spans.prod(1)
    face = np.repeat(np.arange(len(counts)), counts)
    offset = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    row = low[face, 0] + offset // np.maximum(spans[face, 1], 1)
    column = low[face, 1] + offset % np.maximum(spans[face, 1], 1)
    a, b, c = (corners[face, i] for i in range(3))

    def side(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return (q[:, 1] - p[:, 1]) * (row + 0.5 - p[:, 0]) - (q[:, 0] - p[:, 0]) * (column + 0.5 - p[:, 1])

    parts = np.stack([side(b, c), side(c, a), side(a, b)], 1)
    total = parts.sum(1)
    flat = np.abs(total) < 1e-12
    share = parts / np.where(flat, 1, total)[:, None]
    inside = (share >= -1e-9).all(1) & ~flat
    face, row, column, share = face[inside], row[inside], column[inside], share[inside]
    inverse = share / corners[face, :, 2]
    depth = 1 / inverse.sum(1)
    place = row * camera.width + column
    order = np.lexsort((face, depth, place))
    first = order[np.unique(place[order], return_index=True)[1]]
    shape = (camera.height, camera.width)
    faces, weights, depths = np.full(shape, -1), np.zeros((*shape, 3)), np.zeros(shape)
    at = (row[first], column[first])
    faces[at], depths[at] = face[first], depth[first]
    weights[at] = inverse[first] * depth[first][:, None]
    return View(faces, weights, depths)


def place_colours(vertices: np.ndarray) -> np.ndarray:
    """(V, 3) colours in [0, 1] by where vertices are in their box."""
    low, high = vertices.min(0), vertices.max(0)
    return 0.15 + 0.8 * (vertices - low) / (high - low).clip(min=1e-9)


def drawn(mesh: Mesh, colours: np.ndarray, side: int = 240, azimuth: float = 20.0) -> Tensor:
    """(3, side, side) uint8: a mesh with vertices coloured (V, 3) in [0, 1], under a light at the camera, on white."""
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    centre, size = (low + high) / 2, float(np.linalg.norm(high - low))
    camera = camera_around(centre, 1.45 * size, azimuth, 10.0, 34.0, side)
    view = seen(mesh, camera)
    towards = view.interpolated(mesh, -(mesh.normals() @ camera.rotation[2])[:, None]).clip(0, 1)
    image = view.interpolated(mesh, colours) * (0.35 + 0.65 * towards) + ~view.covered[..., None]
    return torch.from_numpy((image.clip(0, 1) * 255).round().astype(np.uint8)).permute(2, 0, 1).contiguous()

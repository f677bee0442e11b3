"""Triangle meshes: reading, their Laplacian and its spectrum, distances along edges.

Meshes are centred and scaled to unit area. The Laplacian is the weak, positive semi-definite cotangent one, the mass a
third of the adjacent triangles' areas; eigenpairs are solved in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sparse
from scipy.sparse.csgraph import connected_components, dijkstra
from scipy.sparse.linalg import eigsh

from stillhouse.errors import UserError

SHIFT = 1e-8


@dataclass(frozen=True)
class Mesh:
    """V `vertices` (V, 3) float64 and `faces` (F, 3) int64; `correspondence` (T,) int64, for each vertex of a template
    its vertex here, where that is known."""

    vertices: np.ndarray
    faces: np.ndarray
    correspondence: np.ndarray | None = None

    def __post_init__(self) -> None:
        v, f = self.vertices, self.faces
        if v.ndim != 2 or v.shape[1] != 3 or f.ndim != 2 or f.shape[1] != 3 or not len(f):
            raise UserError(f"A mesh is vertices (V, 3) and faces (F, 3); given: {v.shape} and {f.shape}.")
        if not np.isfinite(v).all():
            raise UserError("A mesh has vertices that are NaN or infinite.")
        if f.min() < 0 or f.max() >= len(v):
            raise UserError(f"A face names vertex {int(f.max())}, but there are {len(v)}.")

    @property
    def areas(self) -> np.ndarray:
        """(F,) areas of the triangles."""
        a, b, c = (self.vertices[self.faces[:, i]] for i in range(3))
        return 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1)

    def normalised(self) -> Mesh:
        """Centred on the mean vertex, of area 1."""
        area = self.areas.sum()
        if not area > 0:
            raise UserError("A mesh has no area.")
        return Mesh((self.vertices - self.vertices.mean(0)) / np.sqrt(area), self.faces, self.correspondence)

    def check(self) -> None:
        """Raises `UserError` for what spectra cannot be compared of: loose vertices, several components, edges of more
        than two faces, triangles without area."""
        loose = len(self.vertices) - len(np.unique(self.faces))
        if loose:
            raise UserError(f"{loose} vertices of a mesh belong to no face; remove them.")
        parts = connected_components(self._edges(), directed=False)[0]
        if parts > 1:
            raise UserError(f"A mesh has {parts} components, so its spectrum mixes them; take one.")
        if self._edges().max() > 2:
            raise UserError("An edge of a mesh belongs to more than two faces; mend it.")
        flat = int((self.areas <= 1e-14 * self.areas.mean()).sum())
        if flat:
            raise UserError(f"{flat} triangles of a mesh have no area; remove them.")

    def _edges(self) -> sparse.csr_matrix:
        """(V, V) how many faces each edge has, in both directions."""
        pairs = np.concatenate([self.faces[:, [0, 1]], self.faces[:, [1, 2]], self.faces[:, [2, 0]]])
        pairs = np.concatenate([pairs, pairs[:, ::-1]])
        count = len(self.vertices)
        return sparse.coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (count, count)).tocsr()

    def distances_from(self, sources: np.ndarray) -> np.ndarray:
        """(S, V) lengths of the shortest paths along edges from these vertices."""
        graph = self._edges().tocoo()
        lengths = np.linalg.norm(self.vertices[graph.row] - self.vertices[graph.col], axis=1)
        weighted = sparse.csr_matrix((lengths, (graph.row, graph.col)), graph.shape)
        return dijkstra(weighted, directed=False, indices=sources)


def read_mesh(path: Path) -> Mesh:
    """The mesh of an .npz file with `vertices`, `faces` and maybe `correspondence`. Raises `UserError` for another."""
    if not path.is_file():
        raise UserError(f"There is no mesh '{path}'.")
    with np.load(path, allow_pickle=False) as file:
        lacking = [name for name in ("vertices", "faces") if name not in file.files]
        if lacking:
            raise UserError(f"'{path}' holds no mesh: it lacks {', '.join(lacking)}.")
        known = file["correspondence"].astype(np.int64) if "correspondence" in file.files else None
        return Mesh(file["vertices"].astype(np.float64), file["faces"].astype(np.int64), known)


def laplacian(mesh: Mesh) -> tuple[sparse.csr_matrix, np.ndarray]:
    """The weak cotangent Laplacian (V, V) and the lumped mass (V,)."""
    rows, columns, values = [], [], []
    for i in range(3):
        at, one, two = (mesh.faces[:, (i + j) % 3] for j in range(3))
        u, v = mesh.vertices[one] - mesh.vertices[at], mesh.vertices[two] - mesh.vertices[at]
        half = 0.5 * (u * v).sum(1) / (np.linalg.norm(np.cross(u, v), axis=1) + 1e-10)
        rows += [one, two, one, two]
        columns += [two, one, one, two]
        values += [-half, -half, half, half]
    count = len(mesh.vertices)
    place = (np.concatenate(rows), np.concatenate(columns))
    weak = sparse.coo_matrix((np.concatenate(values), place), (count, count)).tocsr()
    mass = np.bincount(mesh.faces.ravel(), np.repeat(mesh.areas / 3, 3), count)
    return weak, mass + 1e-8 * mass.mean()


def spectrum(weak: sparse.csr_matrix, mass: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` smallest eigenvalues (K,), at least 0, and eigenvectors (V, K), orthonormal under the mass."""
    if count >= len(mass) - 1:
        raise UserError(f"A mesh of {len(mass)} vertices has fewer than {count} eigenvectors to solve for.")
    matrix = (weak + SHIFT * sparse.eye(len(mass))).tocsc()
    start = np.random.default_rng(0).normal(size=len(mass))
    values, vectors = eigsh(matrix, k=count, M=sparse.diags(mass).tocsc(), sigma=-SHIFT, v0=start)
    order = np.argsort(values)
    return values[order].clip(min=0), vectors[:, order]

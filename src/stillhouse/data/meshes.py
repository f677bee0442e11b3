"""Triangle meshes: reading, their Laplacian and its spectrum, gradients, distances along edges.

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

from stillhouse.data.source import existing
from stillhouse.errors import UserError
from stillhouse.randomness import key

SHIFT = 1e-8
SUFFIXES = (".npz", ".off", ".obj")


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

    def normals(self) -> np.ndarray:
        """(V, 3) unit normals of the vertices, means over their faces by area."""
        a, b, c = (self.vertices[self.faces[:, i]] for i in range(3))
        summed = np.zeros_like(self.vertices)
        for i in range(3):
            np.add.at(summed, self.faces[:, i], np.cross(b - a, c - a))
        return summed / (np.linalg.norm(summed, axis=1, keepdims=True) + 1e-12)

    def _edges(self) -> sparse.csr_matrix:
        """(V, V) how many faces each edge has, in both directions."""
        pairs = np.concatenate([self.faces[:, [0, 1]], self.faces[:, [1, 2]], self.faces[:, [2, 0]]])
        pairs = np.concatenate([pairs, pairs[:, ::-1]])
        count = len(self.vertices)
        return sparse.coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (count, count)).tocsr()

    def distances_from(self, sources: np.ndarray) -> np.ndarray:
        """(S, V) lengths of the shortest paths along edges from these vertices."""
        return dijkstra(self._lengths(), directed=False, indices=sources)

    def distances_between(self, sources: np.ndarray, targets: np.ndarray, at_once: int = 64) -> np.ndarray:
        """(N,) the same from the i-th source to the i-th target, of some sources at a time: (V, V) distances are never
        there."""
        graph, out = self._lengths(), np.zeros(len(sources))
        unique, where = np.unique(sources, return_inverse=True)
        for start in range(0, len(unique), at_once):
            rows = dijkstra(graph, directed=False, indices=unique[start : start + at_once])
            of = np.flatnonzero((where >= start) & (where < start + at_once))
            out[of] = rows[where[of] - start, targets[of]]
        return out

    def _lengths(self) -> sparse.csr_matrix:
        """(V, V) lengths of the edges."""
        graph = self._edges().tocoo()
        lengths = np.linalg.norm(self.vertices[graph.row] - self.vertices[graph.col], axis=1)
        return sparse.csr_matrix((lengths, (graph.row, graph.col)), graph.shape)


def read_mesh(path: Path) -> Mesh:
    """The mesh of an .npz file with `vertices`, `faces` and maybe `correspondence`, or of an .off or .obj file of
    triangles. Raises `UserError` for another."""
    if not path.is_file():
        raise UserError(f"There is no mesh '{path}'.")
    if path.suffix in (".off", ".obj"):
        return _read_text(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"'{path}' is no mesh that is read: give an .npz, .off or .obj file.")
    with np.load(path, allow_pickle=False) as file:
        lacking = [name for name in ("vertices", "faces") if name not in file.files]
        if lacking:
            raise UserError(f"'{path}' holds no mesh: it lacks {', '.join(lacking)}.")
        known = file["correspondence"].astype(np.int64) if "correspondence" in file.files else None
        return Mesh(file["vertices"].astype(np.float64), file["faces"].astype(np.int64), known)


def named_mesh(source: str, name: str, root: Path) -> Mesh:
    """The mesh of a name, of unit area.

    Args:
        source: a folder of meshes, as it is or under the data root; or `ellipsoids`, which are made up: the name is a
            seed.

    Raises:
        UserError: there is none of this name.
    """
    if source == "ellipsoids":
        return deformed_ellipsoid(name).normalised()
    path = Path(source).expanduser()
    folder = path if path.is_dir() else existing(source, root)
    for suffix in SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return read_mesh(folder / f"{name}{suffix}").normalised()
    there = sorted(p.stem for p in folder.iterdir() if p.suffix in SUFFIXES)
    raise UserError(f"The folder '{folder}' holds no mesh '{name}'; it has {', '.join(there[:6]) or 'none'}…")


def deformed_ellipsoid(name: str) -> Mesh:
    """An ellipsoid of 642 vertices, each of which has its place in all of them: axes near 0.6, 1 and 1.5, bumps at
    places that are common to all, whose heights and a bend are the name's."""
    ball, draw, common = sphere(3), np.random.default_rng(key("ellipsoid", name)), np.random.default_rng(5)
    places = common.normal(size=(6, 3))
    places /= np.linalg.norm(places, axis=1, keepdims=True)
    heights = np.linspace(0.15, 0.45, 6) * draw.uniform(0.7, 1.3, 6)
    bumps = np.exp(-((1 - ball.vertices @ places.T) / 0.12)) @ heights
    points = ball.vertices * (1 + bumps)[:, None] * np.array([0.6, 1.0, 1.5]) * draw.uniform(0.9, 1.1, 3)
    points[:, 0] += draw.uniform(-0.25, 0.25) * points[:, 2] ** 2
    points[:, 1] += draw.uniform(-0.25, 0.25) * points[:, 2] ** 2
    return Mesh(points, ball.faces, np.arange(len(points)))


def _read_text(path: Path) -> Mesh:
    """The mesh of an OFF or OBJ file."""
    lines = [
        words for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if (words := line.split())
    ]
    lines = [words for words in lines if not words[0].startswith("#")]
    try:
        if path.suffix == ".obj":
            vertices = [[float(x) for x in w[1:4]] for w in lines if w[0] == "v"]
            faces = [[int(x.partition("/")[0]) - 1 for x in w[1:]] for w in lines if w[0] == "f"]
        else:
            if len(lines[0]) == 1:  # the counts stand on the line after the word OFF
                lines[:2] = [lines[0] + lines[1]]
            count, total = int(lines[0][1]), int(lines[0][2])
            vertices = [[float(x) for x in w[:3]] for w in lines[1 : 1 + count]]
            faces = [[int(x) for x in w[1 : 1 + int(w[0])]] for w in lines[1 + count : 1 + count + total]]
    except (ValueError, IndexError):
        raise UserError(f"'{path}' cannot be read as a mesh: a line of it has too few numbers.") from None
    if not vertices or not faces or any(len(f) != 3 for f in faces):
        raise UserError(f"'{path}' is no mesh of triangles.")
    return Mesh(np.array(vertices), np.array(faces, dtype=np.int64))


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


def tangent_gradients(mesh: Mesh, ridge: float = 1e-5) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Two (V, V) matrices that take a function of vertices to its gradient along the two axes of each vertex's tangent
    plane, by least squares over its edges. The first axis is the x axis laid into the plane (the y axis where the
    normal is nearly x)."""
    normals, edges, count = mesh.normals(), mesh._edges().tocoo(), len(mesh.vertices)
    axis = np.where(np.abs(normals[:, :1]) > 0.9, np.array([[0.0, 1, 0]]), np.array([[1.0, 0, 0]]))
    first = axis - normals * (axis * normals).sum(1, keepdims=True)
    first /= np.linalg.norm(first, axis=1, keepdims=True) + 1e-12
    second = np.cross(normals, first)
    along = mesh.vertices[edges.col] - mesh.vertices[edges.row]
    u, v = ((along * frame[edges.row]).sum(1) for frame in (first, second))
    uu, vv = (np.bincount(edges.row, w * w, count) + ridge for w in (u, v))
    uv = np.bincount(edges.row, u * v, count)
    scale = (1 / (uu * vv - uv * uv))[edges.row]
    x = scale * (vv[edges.row] * u - uv[edges.row] * v)
    y = scale * (uu[edges.row] * v - uv[edges.row] * u)
    everyone = np.arange(count)
    place = (np.concatenate([edges.row, everyone]), np.concatenate([edges.col, everyone]))
    made = (np.concatenate([w, -np.bincount(edges.row, w, count)]) for w in (x, y))
    one, two = (sparse.coo_matrix((w, place), (count, count)).tocsr() for w in made)
    return one, two


def spread_vertices(mesh: Mesh, count: int) -> np.ndarray:
    """At most `count` vertices far from each other: each next one is the farthest from those before it."""
    count = min(count, len(mesh.vertices))
    chosen = np.zeros(count, dtype=np.int64)
    nearest = np.full(len(mesh.vertices), np.inf)
    for i in range(1, count):
        nearest = np.minimum(nearest, ((mesh.vertices - mesh.vertices[chosen[i - 1]]) ** 2).sum(1))
        chosen[i] = nearest.argmax()
    return chosen


def sphere(subdivisions: int = 3) -> Mesh:
    """The unit sphere, an icosahedron whose triangles are split in four so many times."""
    g = (1 + 5**0.5) / 2
    corners = [(-1.0, g, 0.0), (1.0, g, 0.0), (-1.0, -g, 0.0), (1.0, -g, 0.0), (0.0, -1.0, g), (0.0, 1.0, g)]
    corners += [(0.0, -1.0, -g), (0.0, 1.0, -g), (g, 0.0, -1.0), (g, 0.0, 1.0), (-g, 0.0, -1.0), (-g, 0.0, 1.0)]
    digits = "0b5 051 017 07a 0ab 159 5b4 ba2 a76 718 394 342 326 368 389 495 24b 62a 867 981"
    points = np.array(corners)
    faces = np.array([[int(c, 16) for c in t] for t in digits.split()])
    for _ in range(subdivisions):
        pairs = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
        edges, which = np.unique(np.sort(pairs, axis=1), axis=0, return_inverse=True)
        ab, bc, ca = len(points) + which.reshape(3, -1)
        a, b, c = faces.T
        points = np.concatenate([points, points[edges].mean(1)])
        faces = np.concatenate([np.stack(t, 1) for t in ((a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca))])
    return Mesh(points / np.linalg.norm(points, axis=1, keepdims=True), faces)


def spectrum(weak: sparse.csr_matrix, mass: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` smallest eigenvalues (K,), at least 0, and eigenvectors (V, K), orthonormal under the mass."""
    if count >= len(mass) - 1:
        raise UserError(f"A mesh of {len(mass)} vertices has fewer than {count} eigenvectors to solve for.")
    matrix = (weak + SHIFT * sparse.eye(len(mass))).tocsc()
    start = np.random.default_rng(0).normal(size=len(mass))
    values, vectors = eigsh(matrix, k=count, M=sparse.diags(mass).tocsc(), sigma=-SHIFT, v0=start)
    order = np.argsort(values)
    return values[order].clip(min=0), vectors[:, order]

"""Shapes as the method reads them: a mesh of unit area, its spectrum and gradients; and the maps that are known between
shapes with a common template."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sparse
import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.data.meshes import Mesh, laplacian, spectrum, spread_vertices, tangent_gradients
from stillhouse.errors import UserError
from stillhouse.functional.functional_maps import wave_kernel_signature

Tensors = dict[str, Tensor]
WAVES = 100  # descriptors of the wave kernel


@dataclass
class Shape:
    """A shape on a device.

    Attributes:
        mesh: centred, of unit area.
        points: (V, 3) its vertices, float32.
        evals: (K,), basis: (V, K), orthonormal under mass: (V,); float32.
        neighbours: (V, n) each vertex and those next to it; across, along: (V, n) their weights in the gradients along
            the two axes of its tangent plane.
        few: (P,) some vertices, far from each other.
    """

    name: str
    mesh: Mesh
    points: Tensor
    evals: Tensor
    basis: Tensor
    mass: Tensor
    neighbours: Tensor
    across: Tensor
    along: Tensor
    few: Tensor

    def coefficients(self, features: Tensor, size: int) -> Tensor:
        """(size, d) of features (V, d) in the eigenbasis: Phi^T M F."""
        return self.basis[:, :size].T @ (self.mass[:, None] * features)

    def gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(V, C) each, of functions (V, C), along the two axes of each vertex's tangent plane."""
        across, along = (
            F.embedding_bag(self.neighbours, x, mode="sum", per_sample_weights=w) for w in (self.across, self.along)
        )
        return across, along

    def waves(self, places: bool) -> Tensor:
        """(V, 100) or, with the places of vertices, (V, 103): descriptors that are not learned, each of norm 1."""
        found = wave_kernel_signature(self.evals, self.basis, WAVES, self.mass)
        if not places:
            return found
        own = self.points / (self.mass[:, None] * self.points.square()).sum(0).sqrt()
        return torch.cat([found, own], 1)


def computed(mesh: Mesh, eigenpairs: int, few: int) -> Tensors:
    """The arrays of a shape, from a mesh of unit area, in float64 where they are solved."""
    mesh.check()
    weak, mass = laplacian(mesh)
    evals, basis = spectrum(weak, mass, eigenpairs)
    evals[0] = 0.0  # of a connected mesh; the solver's shift shows in it
    across, along = tangent_gradients(mesh)
    out = {
        "evals": torch.from_numpy(evals).float(),
        "basis": torch.from_numpy(np.ascontiguousarray(basis)).float(),
        "mass": torch.from_numpy(mass).float(),
        "few": torch.from_numpy(spread_vertices(mesh, few)),
    }
    places, weights = padded_rows(across, along)
    return out | {"neighbours": places, "across": weights[0], "along": weights[1]}


def padded_rows(*matrices: sparse.csr_matrix) -> tuple[Tensor, list[Tensor]]:
    """The columns (V, n) of the entries of each row, n the most that a row has, and the entries (V, n) of each matrix,
    float32, 0 where a row has fewer; the matrices have entries in the same places."""
    first = matrices[0]
    counts = np.diff(first.indptr)
    row = np.repeat(np.arange(len(counts)), counts)
    slot = np.arange(len(first.indices)) - first.indptr[row]
    places = np.zeros((len(counts), counts.max()), dtype=np.int64)
    places[row, slot] = first.indices
    made = []
    for matrix in matrices:
        values = np.zeros(places.shape, dtype=np.float32)
        values[row, slot] = matrix.data
        made.append(torch.from_numpy(values))
    return torch.from_numpy(places), made


def assembled(name: str, mesh: Mesh, arrays: Tensors, device: torch.device) -> Shape:
    """The shape of these arrays, on a device."""
    names = ("evals", "basis", "mass", "neighbours", "across", "along", "few")
    points = torch.from_numpy(mesh.vertices).float().to(device)
    return Shape(name, mesh, points, **{k: arrays[k].to(device) for k in names})


def true_map(one: Shape, two: Shape, size: int) -> Tensor:
    """The functional map (size, size) of the known correspondence, by least squares over the template's vertices:
    Phi2[c2] C = Phi1[c1]."""
    first, second = (shape.basis[_known(shape)][:, :size].double() for shape in (one, two))
    return torch.linalg.solve(second.T @ second, second.T @ first).float()


def _known(shape: Shape) -> Tensor:
    if shape.mesh.correspondence is None:
        raise UserError(
            f"The mesh '{shape.name}' has no array `correspondence` (for each vertex of a template its vertex here), "
            "so its map to others is not known."
        )
    return torch.from_numpy(shape.mesh.correspondence).to(shape.basis.device)


def errors(points: Tensor, one: Mesh, two: Mesh, count: int | None = 1000) -> np.ndarray:
    """Geodesic distances on the first mesh, of unit area, from where a point map (V2,) takes known vertices of the
    second to where they are; of at most so many vertices of the template."""
    assert one.correspondence is not None and two.correspondence is not None
    total = len(one.correspondence)
    some = np.arange(total) if count is None or count >= total else np.linspace(0, total - 1, count).astype(np.int64)
    found = points.cpu().numpy()[two.correspondence[some]]
    return one.distances_between(one.correspondence[some], found)

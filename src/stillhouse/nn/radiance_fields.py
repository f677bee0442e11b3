"""Radiance fields of four forms, cut alike: a first part maps points to log density and colour features, a second maps
these and the view direction to colour.

The forms are those of NeRF (an MLP), Instant-NGP (a hash grid), TensoRF (planes and lines, VM) and Plenoxels (a dense
volume of spherical harmonics), as PVD (arXiv 2211.15977) writes them. Points are (M, 3) in [-bound, bound], directions
(M, 3) of length 1. The logarithm of density is clamped to [-2, 7] before it is used; outside it has no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError

LOWEST, HIGHEST = -2.0, 7.0
FEATURES = 16  # of a point: log density, then 15 of colour
PRIMES = (1, 2654435761, 805459861)


@dataclass(slots=True)
class FieldPoints:
    """What a field says of M points."""

    log_density: Tensor  # (M,), clamped
    color: Tensor  # (M, 3) in [0, 1]
    features: Tensor | None = None  # (M, 16), the first is log_density; None for a form without


class _TruncatedExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * x.clamp(-12, 12).exp()


def truncated_exp(x: Tensor) -> Tensor:
    """exp(x) in float32, whose gradient is that of x clamped to [-12, 12]."""
    out: Tensor = _TruncatedExp.apply(x.float())
    return out


def spherical_harmonics(directions: Tensor, degree: int = 4) -> Tensor:
    """Real spherical harmonics of unit vectors: (M, 3) -> (M, degree ** 2), degree 1 to 5, in Instant-NGP's signs."""
    if not 1 <= degree <= 5:
        raise UserError(f"Spherical harmonics are there up to degree 5; given: {degree}.")
    x, y, z = directions.unbind(-1)
    x2, y2, z2 = x * x, y * y, z * z
    terms = [
        torch.full_like(x, 0.28209479177387814),
        -0.48860251190291987 * y,
        0.48860251190291987 * z,
        -0.48860251190291987 * x,
        1.0925484305920792 * x * y,
        -1.0925484305920792 * y * z,
        0.94617469575755997 * z2 - 0.31539156525251999,
        -1.0925484305920792 * x * z,
        0.54627421529603959 * (x2 - y2),
        0.59004358992664352 * y * (y2 - 3 * x2),
        2.8906114426405538 * x * y * z,
        0.45704579946446572 * y * (1 - 5 * z2),
        0.3731763325901154 * z * (5 * z2 - 3),
        0.45704579946446572 * x * (1 - 5 * z2),
        1.4453057213202769 * z * (x2 - y2),
        0.59004358992664352 * x * (3 * y2 - x2),
    ]
    if degree == 5:
        terms += [
            2.5033429417967046 * x * y * (x2 - y2),
            -1.7701307697799304 * y * z * (3 * x2 - y2),
            0.9461746957575601 * x * y * (7 * z2 - 1),
            -0.6690465435572892 * y * z * (7 * z2 - 3),
            0.10578554691520431 * (z2 * (35 * z2 - 30) + 3),
            -0.6690465435572892 * x * z * (7 * z2 - 3),
            0.47308734787878004 * (x2 - y2) * (7 * z2 - 1),
            -1.7701307697799304 * x * z * (x2 - 3 * y2),
            0.6258357354491761 * (x2 * (x2 - 3 * y2) - y2 * (3 * x2 - y2)),
        ]
    return torch.stack(terms[: degree**2], -1)


def positional_encoding(x: Tensor, frequencies: int = 10) -> Tensor:
    """x, then sine and cosine of 2^k x for each k: (M, 3) -> (M, 3 + 6 frequencies)."""
    parts = [x]
    for k in range(frequencies):
        parts += [torch.sin(x * 2.0**k), torch.cos(x * 2.0**k)]
    return torch.cat(parts, -1)


def hash_offsets(levels: int, base: int, growth: float, log2_size: int) -> list[int]:
    """Where each level's rows begin in the table, and its length at the end; a level has a row for each corner, rounded
    up to a multiple of 8, but at most 2^log2_size."""
    offsets = [0]
    for level in range(levels):
        corners = (math.ceil(base * growth**level - 1 - 1e-9) + 2) ** 3
        offsets.append(offsets[-1] + min(2**log2_size, -(-corners // 8) * 8))
    return offsets


def hash_encoding(
    x: Tensor, table: Tensor, offsets: Tensor | list[int], base: int, growth: float, bound: float = 1.0
) -> Tensor:
    """Trilinear features of a hash grid: points (M, 3), table (rows, D) -> (M, levels * D); 0 outside the box.

    Level l has the scale s = base * growth^l - 1; a point u in [0, 1] lies at u s + 0.5 among its corners. Corners have
    rows of their own while these suffice, else the row that a hash of their coordinates names.
    """
    u = (x + bound) / (2 * bound)
    inside = ((u >= 0) & (u <= 1)).all(-1, keepdim=True)
    starts = [int(o) for o in offsets]
    corners = torch.tensor([[(c >> axis) & 1 for axis in range(3)] for c in range(8)], device=x.device)
    out = []
    for level, (start, end) in enumerate(pairwise(starts)):
        scale = base * growth**level - 1
        side = math.ceil(scale - 1e-9) + 2
        place = u * scale + 0.5
        low = place.floor()
        share = place - low
        at = low.long()[:, None] + corners  # (M, 8, 3)
        weights = torch.where(corners.bool(), share[:, None], 1 - share[:, None]).prod(-1)
        size, stride, row = end - start, 1, torch.zeros_like(at[..., 0])
        for axis in range(3):
            if stride > size:
                break
            row = row + at[..., axis] * stride
            stride *= side
        if stride > size:
            row = torch.zeros_like(row)
            for axis, prime in enumerate(PRIMES):
                row = row ^ ((at[..., axis] * prime) & 0xFFFFFFFF)
        rows = table[start + row % size]
        out.append((weights[..., None] * rows).sum(1))
    return torch.cat(out, -1) * inside


class RadianceField(nn.Module):
    """A field in the box [-bound, bound]^3, with a grid of the cells that are occupied.

    Attributes:
        has_features: whether points have 16 features between the two parts.
        occupied: (G, G, G) bool by x, y, z; all True until `occupy`.
    """

    has_features: ClassVar[bool] = True
    occupied: Tensor

    def __init__(self, bound: float = 1.0, cells: int = 32) -> None:
        super().__init__()
        self.bound = bound
        self.register_buffer("occupied", torch.ones(cells, cells, cells, dtype=torch.bool))

    def point_features(self, x: Tensor) -> Tensor:
        """(M, 3) -> (M, 16), the log density clamped."""
        raise NotImplementedError

    def forward(self, x: Tensor, directions: Tensor) -> FieldPoints:
        """What the field says of points seen along directions."""
        features = self.point_features(x)
        return FieldPoints(features[:, 0], self.color(features, directions), features)

    def color(self, features: Tensor, directions: Tensor) -> Tensor:
        """The shared second part: (M, 16) features and (M, 3) directions -> (M, 3) colours."""
        h = torch.cat([spherical_harmonics(directions), features[:, 1:]], -1)
        for i, layer in enumerate(self.color_net):
            h = layer(h) if i == 0 else layer(h.relu())
        return h.sigmoid()

    def _make_color_net(self, width: int = 64) -> None:
        widths = [16 + FEATURES - 1, width, width, 3]
        self.color_net = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))

    @torch.no_grad()
    def occupy(self, threshold: float = 0.5, samples: int = 2) -> None:
        """Mark the cells in which the density above its floor exceeds a threshold at any of `samples`^3 points, and
        their neighbours."""
        cells = self.occupied.shape[0]
        ticks = (torch.arange(cells * samples, device=self.occupied.device) + 0.5) / (cells * samples)
        axis = (2 * ticks - 1) * self.bound
        found = []
        for x in axis.split(samples):
            points = torch.stack(torch.meshgrid(x, axis, axis, indexing="ij"), -1).reshape(-1, 3)
            found.append(density(self.log_density(points)).view(len(x), len(axis), len(axis)))
        highest = F.max_pool3d(torch.cat(found)[None, None], samples)
        self.occupied = F.max_pool3d((highest > threshold).float(), 3, 1, 1)[0, 0].bool()

    def log_density(self, x: Tensor) -> Tensor:
        """(M, 3) -> (M,), clamped."""
        return self.point_features(x)[:, 0]

    def is_occupied(self, x: Tensor) -> Tensor:
        """(..., 3) -> (...) whether points lie in occupied cells of the box."""
        cells = self.occupied.shape[0]
        at = ((x / self.bound + 1) / 2 * cells).floor().long()
        inside = ((at >= 0) & (at < cells)).all(-1)
        i, j, k = at.clamp(0, cells - 1).unbind(-1)
        return self.occupied[i, j, k] & inside


def density(log_density: Tensor) -> Tensor:
    """Density above the floor that the clamp leaves: exp(l) - exp(-2)."""
    return truncated_exp(log_density) - math.exp(LOWEST)


class _Tailed(RadianceField):
    """A form whose features come from 28 (or so) numbers through two linear layers."""

    def _make_sigma_net(self, inputs: int, width: int = 64) -> None:
        self.sigma_net = nn.ModuleList([nn.Linear(inputs, width, bias=False), nn.Linear(width, FEATURES, bias=False)])

    def encoded(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def point_features(self, x: Tensor) -> Tensor:
        h = self.sigma_net[1](self.sigma_net[0](self.encoded(x)).relu())
        return torch.cat([h[:, :1].clamp(LOWEST, HIGHEST), h[:, 1:]], -1)


class MLPField(_Tailed):
    """NeRF's form: an MLP on positional encodings, whose input comes in again after the layer `skip`."""

    def __init__(
        self,
        width: int = 256,
        layers: int = 8,
        skip: int = 3,
        frequencies: int = 10,
        encoded: int = 28,
        bound: float = 1.0,
        cells: int = 32,
    ) -> None:
        super().__init__(bound, cells)
        if layers < 2:
            raise UserError(f"An MLP field has two layers at least; given: {layers}.")
        self.skip, self.frequencies = skip, frequencies
        inputs = 3 + 6 * frequencies
        widths = [inputs, *(width + (inputs if i == skip else 0) for i in range(layers - 1))]
        outputs = [width] * (layers - 1) + [encoded]
        self.nerf_mlp = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, outputs))
        self._make_sigma_net(encoded)
        self._make_color_net()

    def encoded(self, x: Tensor) -> Tensor:
        given = h = positional_encoding(x, self.frequencies)
        last = len(self.nerf_mlp) - 1
        for i, layer in enumerate(self.nerf_mlp):
            h = layer(h) if i == last else layer(h).relu()
            if i == self.skip and i != last:
                h = torch.cat([given, h], -1)
        return h


class HashField(_Tailed):
    """Instant-NGP's form: a hash grid of several resolutions."""

    offsets: Tensor

    def __init__(
        self,
        levels: int = 14,
        per_level: int = 2,
        base: int = 16,
        finest: float = 2048,
        log2_size: int = 19,
        bound: float = 1.0,
        cells: int = 32,
    ) -> None:
        super().__init__(bound, cells)
        self.base = base
        self.growth = (finest * bound / base) ** (1 / max(levels - 1, 1))
        self.offsets_list = hash_offsets(levels, base, self.growth, log2_size)
        self.table = nn.Parameter(1e-4 * (2 * torch.rand(self.offsets_list[-1], per_level) - 1))
        self._make_sigma_net(levels * per_level)
        self._make_color_net()

    def encoded(self, x: Tensor) -> Tensor:
        return hash_encoding(x, self.table, self.offsets_list, self.base, self.growth, self.bound)


class VMField(RadianceField):
    """TensoRF's form: sums of products of planes and lines."""

    planes: ClassVar[tuple[tuple[int, int], ...]] = ((0, 1), (0, 2), (1, 2))
    lines: ClassVar[tuple[int, ...]] = (2, 1, 0)

    def __init__(
        self,
        resolution: int = 300,
        density_rank: int = 16,
        color_rank: int = 48,
        bound: float = 1.0,
        cells: int = 32,
    ) -> None:
        super().__init__(bound, cells)

        def parameters(rank: int, last: int) -> nn.ParameterList:
            return nn.ParameterList(0.1 * torch.randn(1, rank, resolution, last) for _ in range(3))

        self.sigma_mat, self.sigma_vec = parameters(density_rank, resolution), parameters(density_rank, 1)
        self.color_mat, self.color_vec = parameters(color_rank, resolution), parameters(color_rank, 1)
        self.basis_mat = nn.Linear(3 * color_rank, FEATURES - 1, bias=False)
        self._make_color_net()

    def _products(self, mats: nn.ParameterList, vecs: nn.ParameterList, x: Tensor) -> Tensor:
        """(3 R, M) plane times line."""
        out = []
        for (a, b), line, mat, vec in zip(self.planes, self.lines, mats, vecs):
            flat = F.grid_sample(mat, x[:, [a, b]].view(1, -1, 1, 2), align_corners=True)
            along = torch.stack([torch.zeros_like(x[:, line]), x[:, line]], -1).view(1, -1, 1, 2)
            out.append((flat * F.grid_sample(vec, along, align_corners=True))[0, :, :, 0])
        return torch.cat(out)

    def point_features(self, x: Tensor) -> Tensor:
        u = x / self.bound
        sigma = self._products(self.sigma_mat, self.sigma_vec, u).sum(0)
        color = self.basis_mat(self._products(self.color_mat, self.color_vec, u).T)
        return torch.cat([sigma[:, None], color], -1).clamp(LOWEST, HIGHEST)

    def sparsity(self) -> Tensor:
        """Sum over the density's planes and lines of their mean absolute values."""
        return torch.stack([p.abs().mean() for p in (*self.sigma_mat, *self.sigma_vec)]).sum()


class PlenoxelField(RadianceField):
    """Plenoxels' form: a dense volume of log density and spherical harmonics of colour, without features."""

    has_features: ClassVar[bool] = False

    def __init__(self, resolution: int = 128, degree: int = 3, bound: float = 1.0, cells: int = 32) -> None:
        super().__init__(bound, cells)
        self.degree = degree
        volume = 0.02 * torch.randn(1, 1 + 3 * degree**2, resolution, resolution, resolution)
        self.tensor_volume = nn.ParameterList([volume])

    def _sampled(self, x: Tensor) -> Tensor:
        grid = (x / self.bound).view(1, 1, -1, 1, 3)
        return F.grid_sample(self.tensor_volume[0], grid, align_corners=True).view(-1, len(x)).T

    def log_density(self, x: Tensor) -> Tensor:
        return self._sampled(x)[:, 0].clamp(LOWEST, HIGHEST)

    def forward(self, x: Tensor, directions: Tensor) -> FieldPoints:
        h = self._sampled(x)
        harmonics = spherical_harmonics(directions, self.degree)
        color = (h[:, 1:].view(len(x), 3, -1) * harmonics[:, None]).sum(-1).sigmoid()
        return FieldPoints(h[:, 0].clamp(LOWEST, HIGHEST), color)


FORMS: dict[str, type[RadianceField]] = {
    "mlp": MLPField,
    "hash": HashField,
    "vm": VMField,
    "plenoxel": PlenoxelField,
}


def inherit(student: RadianceField, teacher: RadianceField) -> list[str]:
    """Give a field whatever of another has the same name and shape: tails, occupied cells; their names."""
    ours, theirs = student.state_dict(), teacher.state_dict()
    same = {name: value for name, value in theirs.items() if name in ours and ours[name].shape == value.shape}
    student.load_state_dict(same, strict=False)
    return list(same)

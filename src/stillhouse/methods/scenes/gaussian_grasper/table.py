"""A table with things on it that is known at every point: views of colour, depth, normals and ids, and distances.

Lengths are metres; the table's top is at z = 0 and its middle at the origin. Every thing has a name, as a person who
labels it would write it, and a query, as one who asks for it would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.nn.splatting import Camera
from stillhouse.randomness import generator

NOTHING, TABLE = -1, 0
HALF_TABLE = 0.22
SPREAD, GAP = 0.14, 0.02  # of the things' middles, and between their hulls
LIGHT = (0.35, -0.25, 0.9)
FAR = 1e9


@dataclass(frozen=True)
class Thing:
    """A ball, box or cylinder that stands on the table.

    Attributes:
        name, query: what it is called, and what is asked for.
        shape: ball, box or cylinder.
        size: half lengths of a box; radius and half height of the others (a ball has both equal).
        color: RGB in [0, 1].
    """

    name: str
    query: str
    shape: str
    size: tuple[float, float, float]
    color: tuple[float, float, float]


TABLE_NAME = "a wooden table top"
THINGS = (
    Thing("a ripe red apple", "apple fruit", "ball", (0.036, 0.036, 0.036), (0.85, 0.12, 0.12)),
    Thing("a box of breakfast cereal", "cereal package", "box", (0.045, 0.022, 0.055), (0.15, 0.35, 0.85)),
    Thing("a yellow tennis ball", "ball for tennis", "ball", (0.032, 0.032, 0.032), (0.85, 0.9, 0.2)),
    Thing("a bar of white soap", "hand soap", "box", (0.045, 0.03, 0.02), (0.95, 0.93, 0.9)),
    Thing("a blue candle", "wax candle", "cylinder", (0.028, 0.028, 0.05), (0.25, 0.75, 0.8)),
    Thing("a wooden brick", "building brick", "box", (0.05, 0.025, 0.025), (0.75, 0.4, 0.2)),
)


@dataclass(frozen=True)
class Placed:
    """A thing with its place: `centre` (3,) and its turn about the vertical, in radians."""

    thing: Thing
    centre: Tensor
    turn: float

    def moved(self, shift: Tensor, turn: float) -> Placed:
        """The same thing elsewhere on the table."""
        return Placed(self.thing, self.centre + shift, self.turn + turn)

    def local(self, x: Tensor) -> Tensor:
        """Points (..., 3) of the world in the thing's own frame."""
        return (x - self.centre.to(x)) @ _about_z(self.turn).to(x)

    def direction(self, d: Tensor) -> Tensor:
        """Directions (..., 3) of the world in the thing's own frame."""
        return d @ _about_z(self.turn).to(d)

    def distance(self, x: Tensor) -> Tensor:
        """(...) signed distance of points (..., 3) from its surface, in metres; below 0 inside."""
        p, size = self.local(x), torch.tensor(self.thing.size).to(x)
        if self.thing.shape == "ball":
            return p.norm(dim=-1) - size[0]
        if self.thing.shape == "box":
            off = p.abs() - size
        else:
            off = torch.stack([p[..., :2].norm(dim=-1) - size[0], p[..., 2].abs() - size[2]], -1)
        return off.clamp_min(0).norm(dim=-1) + off.amax(-1).clamp_max(0)

    def hit(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Where rays (R, 3) first meet it: lengths (R,), very far where they do not, and outward normals (R, 3)."""
        o, d, size = self.local(origins), self.direction(directions), torch.tensor(self.thing.size).to(origins)
        d = torch.where(d.abs() < 1e-9, torch.full_like(d, 1e-9), d)
        if self.thing.shape == "ball":
            near, far, normal = _round(o, d, size[0], 3)
        elif self.thing.shape == "box":
            near, far, normal = _slabs(o, d, size)
        else:
            near, far, normal = _round(o, d, size[0], 2)
            low, high, cap = _slabs(o[:, 2:], d[:, 2:], size[2:])
            from_cap = low > near
            cap = torch.cat([torch.zeros_like(o[:, :2]), cap], -1)
            near, far = torch.maximum(near, low), torch.minimum(far, high)
            normal = torch.where(from_cap[:, None], cap, normal)
        met = (near < far) & (near > 0)
        return torch.where(met, near, torch.full_like(near, FAR)), normal @ _about_z(self.turn).to(normal).T


def _about_z(turn: float) -> Tensor:
    c, s = math.cos(turn), math.sin(turn)
    return torch.tensor([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _round(o: Tensor, d: Tensor, radius: Tensor, axes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where rays enter and leave a ball (3 axes) or an endless cylinder (2), and the normal where they enter."""
    p, q = o[:, :axes], d[:, :axes]
    a, b, c = (q * q).sum(-1), (p * q).sum(-1), (p * p).sum(-1) - radius**2
    root = b * b - a * c
    half = root.clamp_min(0).sqrt()
    near, far = (-b - half) / a, (-b + half) / a
    near = torch.where(root < 0, FAR, near)
    normal = F.pad(F.normalize(p + near[:, None] * q, dim=-1), (0, 3 - axes))
    return near, torch.where(root < 0, -FAR, far), normal


def _slabs(o: Tensor, d: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where rays enter and leave a box, and the normal where they enter."""
    ends = torch.stack([(-size - o) / d, (size - o) / d])
    near, axis = ends.amin(0).max(-1)
    normal = -d.sign() * F.one_hot(axis, d.shape[-1]).to(d)
    return near, ends.amax(0).amin(-1), normal


@dataclass(frozen=True)
class Scene:
    """Things on a table; ids are positions in the list plus 1, 0 is the table, -1 nothing."""

    placed: tuple[Placed, ...]

    @property
    def names(self) -> list[str]:
        """What is seen, by id."""
        return [TABLE_NAME, *(p.thing.name for p in self.placed)]

    def distance(self, x: Tensor) -> Tensor:
        """(...) signed distance of points (..., 3) from the nearest surface, the table's included."""
        return torch.stack([p.distance(x) for p in self.placed] + [x[..., 2]]).amin(0)

    def with_moved(self, which: int, shift: Tensor, turn: float) -> Scene:
        """The scene after one thing was moved."""
        return Scene(tuple(p.moved(shift, turn) if i == which else p for i, p in enumerate(self.placed)))

    def seen(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What rays (R, 3) meet: lengths (R,), normals (R, 3), ids (R,) and colours (R, 3)."""
        down = torch.where(directions[:, 2].abs() < 1e-9, -1e-9, directions[:, 2])
        table = -origins[:, 2] / down
        ground = origins + table[:, None] * directions
        on = (table > 0) & (ground[:, :2].abs() <= HALF_TABLE).all(-1)
        hits = [(torch.where(on, table, FAR), torch.tensor([0.0, 0.0, 1.0]).expand_as(origins))]
        hits += [p.hit(origins, directions) for p in self.placed]
        length, which = torch.stack([h[0] for h in hits]).min(0)
        rows = torch.arange(len(origins))
        normal = torch.stack([h[1] for h in hits])[which, rows]
        ids = torch.where(length < FAR / 2, which, NOTHING)
        where = origins + length[:, None].clamp_max(10) * directions
        color = self._colors(where, which)
        light = F.normalize(torch.tensor(LIGHT), dim=0)
        shade = 0.45 + 0.55 * (normal @ light).clamp_min(0)
        return length, normal, ids, torch.where((ids == NOTHING)[:, None], 0, color * shade[:, None]).clamp(0, 1)

    def _colors(self, where: Tensor, which: Tensor) -> Tensor:
        grain = 0.5 + 0.5 * torch.sin(60 * where[:, 0] + 3 * torch.sin(20 * where[:, 1]))
        colors = [torch.stack([0.55 + 0.1 * grain, 0.42 + 0.08 * grain, 0.3 + 0.06 * grain], -1)]
        for p in self.placed:
            local = p.local(where)
            stripe = 0.8 + 0.2 * torch.sign(torch.sin(120 * local[:, 2]) * torch.sin(90 * local[:, 0] + 1))
            colors.append(torch.tensor(p.thing.color) * stripe[:, None])
        return torch.stack(colors)[which, torch.arange(len(where))]


def table(count: int, seed: int) -> Scene:
    """A scene of so many things, whose places, which do not touch, are functions of the seed."""
    draw = generator(seed, "things")
    while True:
        placed: list[Placed] = []
        for thing in THINGS[:count]:
            found = _free_place(thing, placed, draw)
            if found is None:
                break  # the others stand in the way: begin again
            placed.append(found)
        if len(placed) == count:
            return Scene(tuple(placed))


def _free_place(thing: Thing, others: list[Placed], draw: torch.Generator) -> Placed | None:
    for _ in range(100):
        x, y = (torch.rand(2, generator=draw) * 2 * SPREAD - SPREAD).tolist()
        turn = float(torch.rand(1, generator=draw)) * math.pi
        reach = math.hypot(*thing.size[:2])
        gaps = [
            math.hypot(x - float(p.centre[0]), y - float(p.centre[1])) - reach - math.hypot(*p.thing.size[:2])
            for p in others
        ]
        if min(gaps, default=1.0) > GAP:
            return Placed(thing, torch.tensor([x, y, thing.size[2]]), turn)
    return None


def pixel_rays(camera: Camera) -> tuple[Tensor, Tensor]:
    """Rays through all pixels' centres, row by row: origins and directions (H W, 3), whose length along the camera's
    axis is 1."""
    v, u = torch.meshgrid(torch.arange(camera.height), torch.arange(camera.width), indexing="ij")
    local = torch.stack([(u + 0.5 - camera.cx) / camera.fx, (v + 0.5 - camera.cy) / camera.fy, torch.ones_like(u)], -1)
    turn = camera.view[:3, :3].T.cpu()
    directions = local.reshape(-1, 3).float() @ turn.T
    return camera.centre.cpu().expand_as(directions), directions

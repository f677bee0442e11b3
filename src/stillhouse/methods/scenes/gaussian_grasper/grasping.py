"""Grasps of a parallel gripper: candidates with scores, the filter by surface normals (force closure), and the test on
a scene that is known.

A gripper closes along `axis`, comes along `approach`, and its fingers' tips are at the centre of the grasp.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError
from stillhouse.methods.scenes.gaussian_grasper.table import FAR, Placed, Scene

OUTERMOST = 3


class GraspSpec(Spec):
    """The gripper, its candidates, and how one is chosen."""

    filter: bool = Field(True, description="Choose among grasps that hold by the normals; false: by the score alone.")
    candidates: int = Field(100, ge=1, description="Grasps that are proposed at a time.")
    rounds: int = Field(12, ge=1, description="Proposals for each thing, of each of which one grasp is chosen.")
    friction: float = Field(0.5, gt=0, description="mu: normals lie within arctan(mu) of the closing axis.")
    tilt: float = Field(35.0, ge=0, lt=90, description="Of the approach against the vertical, in degrees at most.")
    spread: float = Field(0.012, ge=0, description="Standard deviation of centres around the thing's, in metres.")
    widest: float = Field(0.11, gt=0, description="The gripper's opening, in metres.")
    finger: tuple[float, float, float] = Field((0.008, 0.014, 0.07), description="Thickness, breadth, length.")
    palm: tuple[float, float] = Field((0.03, 0.03), description="Breadth and height of the palm, in metres.")
    contact: float = Field(0.005, gt=0, description="Radius of a contact in which normals are averaged, in metres.")
    allowed: int = Field(3, ge=0, description="Points of the scene that a finger's or the palm's box may hold.")
    relax: bool = Field(False, description="Where no grasp holds, take that of the smallest sum of angles.")

    @property
    def cone(self) -> float:
        """Half the angle of the friction cone, in radians."""
        return math.atan(self.friction)


@dataclass(frozen=True)
class Grasps:
    """G grasps: `centre` (G, 3), `approach` (G, 3) and `axis` (G, 3) of length 1 and at right angles, `width` (G,) of
    the opening in metres, `score` (G,) of the proposer."""

    centre: Tensor
    approach: Tensor
    axis: Tensor
    width: Tensor
    score: Tensor

    def __len__(self) -> int:
        return len(self.centre)

    def local(self, x: Tensor) -> Tensor:
        """(G, P, 3) points (P, 3) along the closing axis, across it, and along the approach, from the centre."""
        across = torch.linalg.cross(self.approach, self.axis)
        frame = torch.stack([self.axis, across, self.approach], -1)
        return (x - self.centre[:, None]) @ frame


def propose(points: Tensor, spec: GraspSpec, draw: torch.Generator) -> Grasps:
    """Grasps around the points (P, 3) of a thing, with scores that like the middle and a steep approach, as those of a
    grasp network do, and that know nothing of surfaces.

    Stands in for a network that proposes grasps, which the released code does not have.
    """
    count = spec.candidates
    low, high = points.amin(0), points.amax(0)
    middle = (low + high) / 2
    offset = spec.spread * torch.randn(count, 3, generator=draw)
    tilt = math.radians(spec.tilt) * torch.rand(count, generator=draw).sqrt()
    turn = 2 * math.pi * torch.rand(count, generator=draw)
    approach = torch.stack([tilt.sin() * turn.cos(), tilt.sin() * turn.sin(), -tilt.cos()], -1)
    side = F.normalize(torch.linalg.cross(approach, torch.randn(count, 3, generator=draw)), dim=-1)
    centre = middle + offset
    proposal = Grasps(centre, approach, side, torch.zeros(count), torch.zeros(count))
    along = proposal.local(points)[..., 0].abs().amax(1)
    width = (2 * along + 0.01).clamp_max(spec.widest)
    noise = 0.1 * torch.randn(count, generator=draw)
    score = (-offset.square().sum(-1) / (2 * 0.015**2)).exp() + 0.5 * tilt.cos() + noise
    return Grasps(centre, approach, side, width, score)


def contact_angles(grasps: Grasps, points: Tensor, normals: Tensor, spec: GraspSpec) -> Tensor:
    """(G, 2) angles in radians between the outward normals at both contacts and the closing axis, away from the middle;
    pi where a side touches nothing. A contact is the third of the outermost points, as rendered surfaces have a few
    that lie off them.

    Args:
        points, normals: (P, 3) of the thing's surface, normals outward.
    """
    local = grasps.local(points)  # (G, P, 3)
    broad = spec.finger[1]
    inside = (local[..., 1].abs() <= broad / 2) & (local[..., 2].abs() <= broad / 2)
    inside &= local[..., 0].abs() <= grasps.width[:, None] / 2
    out = []
    for sign in (1.0, -1.0):
        along = torch.where(inside, sign * local[..., 0], -FAR)
        outer = along.topk(min(OUTERMOST, along.shape[1]), dim=1)
        rank = ((outer.values > -FAR / 2).sum(1) - 1).clamp_min(0)[:, None]  # of few points, the innermost of these
        reached, at = (x.gather(1, rank)[:, 0] for x in (outer.values, outer.indices))
        near = (points - points[at][:, None]).norm(dim=-1) <= spec.contact  # (G, P)
        normal = F.normalize(near.to(normals) @ normals, dim=-1, eps=1e-9)
        cosine = sign * (normal * grasps.axis).sum(-1)
        out.append(torch.where(reached > -FAR / 2, cosine.clamp(-1, 1).acos(), math.pi))
    return torch.stack(out, -1)


def boxes(grasps: Grasps, spec: GraspSpec) -> tuple[Tensor, Tensor]:
    """Boxes of both fingers and the palm in the grasps' frames: middles (G, 3, 3) and half lengths (3, 3)."""
    thick, broad, long = spec.finger
    beside = grasps.width / 2 + thick / 2
    zero = torch.zeros_like(beside)
    fingers = [torch.stack([s * beside, zero, zero - long / 2 + broad / 2], -1) for s in (1, -1)]
    palm = torch.stack([zero, zero, zero - long + broad / 2 - spec.palm[1] / 2], -1)
    half = torch.tensor(
        [[thick / 2, broad / 2, long / 2]] * 2 + [[spec.widest / 2, spec.palm[0] / 2, spec.palm[1] / 2]]
    )
    return torch.stack([*fingers, palm], 1), half.to(palm)


def collides(grasps: Grasps, points: Tensor, spec: GraspSpec) -> Tensor:
    """(G,) whether more than `allowed` points (P, 3) of the scene lie in a box of the gripper."""
    local = grasps.local(points)
    middles, half = boxes(grasps, spec)
    inside = ((local[:, None] - middles[:, :, None]).abs() <= half[:, None]).all(-1)  # (G, 3, P)
    return (inside.sum(-1) > spec.allowed).any(-1)


@dataclass(frozen=True)
class Choice:
    """The grasp that was chosen, by its place, and how many fell for each reason."""

    index: int
    reasons: dict[str, int]


def choose(grasps: Grasps, points: Tensor, normals: Tensor, scene: Tensor, spec: GraspSpec) -> Choice:
    """The best grasp: of those whose normals lie in the friction cone and whose gripper is free, the highest score.

    Args:
        points, normals: (P, 3) of the thing's surface.
        scene: (S, 3) points of everything.

    Raises:
        UserError: none holds, with how many fell for which reason; not with `relax`.
    """
    if not spec.filter:
        return Choice(int(grasps.score.argmax()), {})
    angles = contact_angles(grasps, points, normals, spec)
    touches = (angles < math.pi - 1e-4).all(-1)
    holds = (angles <= spec.cone).all(-1)
    free = ~collides(grasps, scene, spec)
    reasons = Counter({"no contact": int((~touches).sum()), "normals": int((touches & ~holds).sum())})
    reasons["collision"] = int((holds & ~free).sum())
    good = holds & free
    if bool(good.any()):
        return Choice(int(torch.where(good, grasps.score, -FAR).argmax()), dict(reasons))
    if not spec.relax:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise UserError(f"No feasible grasp among {len(grasps)} ({counts}); set grasp.relax, or propose more.")
    return Choice(int((angles.sum(-1) + FAR * (~free & free.any())).argmin()), dict(reasons))


def holds_truly(grasps: Grasps, thing: Placed, scene: Scene, spec: GraspSpec) -> tuple[Tensor, Tensor]:
    """By the known surfaces: (G,) whether both contacts of the closing fingers lie in the friction cone, and (G,)
    whether the gripper is free of everything."""
    good = torch.ones(len(grasps), dtype=torch.bool)
    for sign in (1.0, -1.0):
        axis = sign * grasps.axis
        length, normal = thing.hit(grasps.centre + axis * (grasps.width[:, None] / 2 + 1e-6), -axis)
        angle = (normal * axis).sum(-1).clamp(-1, 1).acos()
        good &= (length <= grasps.width) & (angle <= spec.cone)
    middles, half = boxes(grasps, spec)
    ticks = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 5)] * 3, indexing="ij"), -1).reshape(-1, 3)
    local = middles[:, :, None] + ticks * half[:, None]  # (G, 3, T, 3)
    frame = torch.stack([grasps.axis, torch.linalg.cross(grasps.approach, grasps.axis), grasps.approach], -2)
    world = grasps.centre[:, None] + local.flatten(1, 2) @ frame
    return good, (scene.distance(world) > -1e-3).all(-1)

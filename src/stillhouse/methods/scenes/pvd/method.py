"""PVD: one radiance field becomes another of any form, by points first and pixels last, without photographs.

paper: One is All: Bridging the Gap Between Neural Radiance Fields Architectures with Progressive Volume Distillation
venue: AAAI 2023
arxiv: 2211.15977
task: radiance fields
family: progressive distillation
use when: a scene exists as one kind of field (fast to train, say) and another is wanted (small, editable, easy to ship)
needs: a trained field; here it is trained first, on views of a scene that is known at every point

Fields are cut alike: a first part gives 16 numbers a point (log density and colour features), a second, shared one the
colour in a direction. The student inherits what has the same name and shape (the second part, the occupied cells).
Rays of random cameras are marched through the student's occupied cells, and both fields are asked about the same
points. Phase 1 compares features; phase 2 colours and log densities too; phase 3 also the pixels of the rays. The
weight of features is multiplied by 0.995 every step. A plenoxel field has no features: phase 1 is left out.

Departures. The released distances are norms that are neither squared nor averaged (`normL2`, weights 0.002), so that
their balance depends on the number of points; for few rays the defaults here are mean squares (`L2`) with weights of 1,
and 0.1 for log density, of which phase 3 keeps 0.02; the variant `paper` has the released ones. The renderer subtracts
the density exp(-2) that the clamp leaves in empty space, which the released code leaves to the occupied cells alone.
Steps along a ray are even, and none is cut short when little light is left. Scenes are analytic, or bodies of FAUST as
thin shells; NeRF-Synthetic, LLFF and Tanks and Temples are not read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import MethodConfig, Spec
from stillhouse.data.source import find_root
from stillhouse.errors import UserError
from stillhouse.functional.images import PEAK, psnr
from stillhouse.methods.scenes.pvd.losses import Distance, Rates, phase_loss
from stillhouse.methods.scenes.pvd.product import FieldSpec, SceneField, marched, render, rendered_points
from stillhouse.methods.scenes.pvd.scenes import SceneSpec, Views, banded_centre, rendered, scene
from stillhouse.nn.radiance_fields import RadianceField, VMField, inherit
from stillhouse.nn.rays import Rays, camera_rays
from stillhouse.randomness import keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.gallery import FOLDER, write_pictures
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import state_on_cpu
from stillhouse.runs.run import Run

SHOWN_VIEWS = 4
CLOSE = 1.0  # dB below the teacher


class FitSpec(Spec):
    """How a field is fitted."""

    steps: int = Field(700, ge=1, description="Optimiser steps.")
    rays: int = Field(256, ge=1, description="Rays of a step.")
    samples: int = Field(40, ge=2, description="Steps along a ray.")
    lr: float = Field(5e-3, gt=0, description="Of AdamW; a cosine takes it to `min_lr`.")
    min_lr: float = Field(7e-5, ge=0)
    occupancy_every: int = Field(100, ge=1, description="From images: steps between looks at which cells are occupied.")
    check_every: int = Field(50, ge=1, description="Steps between measurements of the student on two unseen views.")


class PhaseSpec(Spec):
    """The three phases."""

    feature: float = Field(0.15, ge=0, le=1, description="Share of the steps at which phase 1 ends; 0: no phase 1.")
    point: float = Field(0.4, ge=0, le=1, description="Share at which phase 2 ends; as feature: no phase 2.")
    distance: Distance = Field("L2", description="L2: mean square; normL2: the released norm; normL1, smoothL1.")
    feature_weight: float = Field(1.0, ge=0)
    color_weight: float = Field(1.0, ge=0)
    density_weight: float = Field(0.1, ge=0, description="Of log density.")
    pixel_weight: float = Field(1.0, ge=0)
    late: float = Field(0.02, ge=0, description="What phase 3 keeps of the weights of points.")
    decay: float = Field(0.995, gt=0, le=1, description="Of the features' weight, every step.")
    sparsity: float = Field(1e-4, ge=0, description="Of a VM student's planes and lines, in phase 3.")


class Config(MethodConfig):
    scene: SceneSpec = Field(default_factory=SceneSpec, description="What is seen.")
    teacher: FieldSpec = Field(description="The field that is there.")
    student: FieldSpec = Field(description="The field that is wanted.")
    teach: FitSpec = Field(default_factory=FitSpec, description="How the teacher is trained, from images.")
    distil: FitSpec = Field(default_factory=FitSpec, description="How the student is.")
    phases: PhaseSpec = Field(default_factory=PhaseSpec)
    source: Literal["teacher", "images"] = Field(
        "teacher", description="images: train the student on the scene's views instead, as the baseline."
    )
    inherit: bool = Field(True, description="Begin with what of the teacher has the same name and shape.")
    freeze_tails: bool = Field(False, description="Leave the inherited second part as it is.")


TEACHER = Stage("teacher", "train the teacher on views of the scene (shared)")
STUDENT = Stage("student", "distil it in three phases")


class Curve:
    """PSNR of the student on two unseen views, by the steps done."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"points": [list(p) for p in self.points]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.points = [(int(a), float(b)) for a, b in state["points"]]


class PVD(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        _check(config)
        teacher = TEACHER.filled(steps=config.teach.steps, models={"teacher": config.teacher.form})
        student = STUDENT.filled(steps=config.distil.steps, models={"student": config.student.form})
        return [teacher, student]

    def run(self, config: Config, run: Run) -> SceneField:
        spec = config.scene
        volume = scene(spec, _root(config, run))
        train = rendered(volume, spec, spec.views, "train").to(run.device)
        test = rendered(volume, spec, spec.test_views, "test").to(run.device)

        def teach() -> dict[str, Tensor]:
            with run.seeded(0):
                field = _new(config.teacher, "teacher", 0).to(run.device)
                _fit_on_images(run, TEACHER, field, train, config.teach)
            return state_on_cpu(field)

        uses = {"field": config.teacher, "fit": config.teach, "images": train.pixels, "places": train.centres}
        teacher = config.teacher.build()
        teacher.load_state_dict(run.stage(TEACHER, teach, uses))
        teacher.to(run.device).eval().requires_grad_(False)
        student, curve = _new(config.student, "student", run.seed).to(run.device), Curve()
        if config.source == "images":
            seconds = _fit_on_images(run, STUDENT, student, train, config.distil, curve, test)
        else:
            inherited = inherit(student, teacher) if config.inherit else []
            student.occupied.copy_(teacher.occupied)
            frozen = [n for n in inherited if config.freeze_tails and n.startswith(("color_net", "sigma_net"))]
            for name in frozen:
                student.get_parameter(name).requires_grad_(False)
            seconds = _distil(run, config, student, teacher, curve, test)
        student.requires_grad_(True)
        return _product(config, run, student, teacher, test, curve, seconds)


def _check(config: Config) -> None:
    if config.phases.point < config.phases.feature:
        raise UserError("phases.point is where phase 2 ends, so it cannot lie before phases.feature.")
    config.teacher.build()
    config.student.build()


def _root(config: Config, run: Run) -> Path:
    return Path(config.scene.root).expanduser() if config.scene.root else find_root(None, run.data_root)


def _new(spec: FieldSpec, role: str, seed: int) -> RadianceField:
    with keyed("field", role, seed):
        return spec.build()


def _optimizer(field: RadianceField, spec: FitSpec) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [p for p in field.parameters() if p.requires_grad], lr=spec.lr, betas=(0.9, 0.99), eps=1e-15, weight_decay=0.0
    )


def _rate(spec: FitSpec, step: int) -> float:
    """The cosine from `lr` to `min_lr`."""
    return spec.min_lr + 0.5 * (spec.lr - spec.min_lr) * (1 + math.cos(math.pi * step / spec.steps))


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def view_psnr(field: RadianceField, views: Views, truth: Tensor, samples: int, count: int | None = None) -> float:
    """Mean PSNR in dB over views (RGB, over white, peak 255), against `truth` (V, side * side, 3)."""
    chosen = range(len(views.centres) if count is None else min(count, len(views.centres)))
    images = torch.stack([render(field, views.rays(i), samples) for i in chosen]).clamp(0, 1)
    return float(psnr(images * PEAK, truth[: len(images)] * PEAK).mean())


def _measure(curve: Curve | None, test: Views | None, field: RadianceField, spec: FitSpec, step: int) -> None:
    if curve is not None and test is not None and (step + 1) % spec.check_every == 0:
        curve.points.append((step + 1, view_psnr(field, test, test.on(1.0), spec.samples, 2)))


def _fit_on_images(
    run: Run,
    stage: Stage,
    field: RadianceField,
    views: Views,
    spec: FitSpec,
    curve: Curve | None = None,
    test: Views | None = None,
) -> float:
    """Train a field on views: pixels of all of them, over random backgrounds. Seconds."""
    optimizer = _optimizer(field, spec)
    pixels = views.pixels.flatten(0, 1)
    every = [views.rays(i) for i in range(len(views.centres))]
    origins, directions = (torch.cat([getattr(r, k) for r in every]) for k in ("origins", "directions"))

    def step(i: int) -> dict[str, Tensor]:
        if i and i % spec.occupancy_every == 0:
            field.occupy()
        chosen = torch.randint(len(pixels), (spec.rays,), device=pixels.device)
        rays = Rays(origins[chosen], directions[chosen])
        background = torch.rand(spec.rays, 3, device=pixels.device)
        offsets = torch.rand(spec.rays, spec.samples, device=pixels.device)
        where = marched(field, rays, spec.samples, offsets)
        image = rendered_points(field(where.points, where.directions), where, background).image
        wanted = pixels[chosen]
        loss = (image - wanted[:, :3] - (1 - wanted[:, 3:]) * background).square().mean()
        if isinstance(field, VMField):
            loss = loss + 1e-4 * field.sparsity()
        _update(optimizer, loss, _rate(spec, i))
        _measure(curve, test, field, spec, i)
        return {"loss": loss.detach()}

    state: dict[str, Any] = {"field": field, "optimizer": optimizer}
    seconds = run.loop(stage, state | ({} if curve is None else {"curve": curve}), step, spec.steps)
    field.occupy()
    return seconds


def phase_at(phases: PhaseSpec, share: float, features: bool) -> int:
    """The phase, 1 to 3, after a share of the steps; without features there is no first."""
    if features and share < phases.feature:
        return 1
    return 2 if share < phases.point else 3


def rates_at(phases: PhaseSpec, step: int, phase: int) -> Rates:
    """The weights of the terms at a step."""
    kept = phases.late if phase == 3 else 1.0
    return Rates(
        pixel=phases.pixel_weight,
        feature=kept * phases.feature_weight * phases.decay ** (step + 1),
        color=kept * phases.color_weight,
        density=kept * phases.density_weight,
        sparsity=phases.sparsity,
    )


def _distil(
    run: Run, config: Config, student: RadianceField, teacher: RadianceField, curve: Curve, test: Views
) -> float:
    spec, phases = config.distil, config.phases
    optimizer = _optimizer(student, spec)
    both = student.has_features and teacher.has_features
    side, device = config.scene.side, student.occupied.device

    def step(i: int) -> dict[str, Tensor]:
        centre = banded_centre(config.scene.radius).to(device)
        pixels_seen = torch.randint(side * side, (spec.rays,), device=device)
        rays = camera_rays(centre, side, config.scene.angle, pixels_seen)
        where = marched(student, rays, spec.samples, torch.rand(spec.rays, spec.samples, device=device))
        _measure(curve, test, student, spec, i - 1)
        if not len(where.points):  # no occupied cell was hit
            return {}
        phase = phase_at(phases, i / spec.steps, both)
        with torch.no_grad():
            theirs = teacher(where.points, where.directions)
        ours, pixels = student(where.points, where.directions), None
        if phase == 3:
            background = torch.rand(spec.rays, 3, device=device)
            pixels = (
                rendered_points(ours, where, background).image,
                rendered_points(theirs, where, background).image,
            )
        sparsity = student.sparsity() if isinstance(student, VMField) and phases.sparsity else None
        terms = phase_loss(phase, ours, theirs, pixels, rates_at(phases, i, phase), phases.distance, sparsity)
        loss = torch.stack(list(terms.values())).sum()
        _update(optimizer, loss, _rate(spec, i))
        return {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}

    return run.loop(STUDENT, {"field": student, "optimizer": optimizer, "curve": curve}, step, spec.steps)


def _product(
    config: Config,
    run: Run,
    student: RadianceField,
    teacher: RadianceField,
    test: Views,
    curve: Curve,
    seconds: float,
) -> SceneField:
    """The student with what must be measured while the teacher is there."""
    samples, truth = config.distil.samples, test.on(1.0)
    theirs = torch.stack([render(teacher, test.rays(i), samples) for i in range(len(test.centres))]).clamp(0, 1)
    goal = view_psnr(teacher, test, truth, samples, 2) - CLOSE
    reached = next((step for step, value in curve.points if value >= goal), config.distil.steps)
    figures = {
        "psnr_teacher": view_psnr(teacher, test, truth, samples),
        "psnr_to_teacher": view_psnr(student, test, theirs, samples),
        "share_to_teacher": reached / config.distil.steps,
        "train_seconds": seconds,
    }
    shown = range(min(SHOWN_VIEWS, len(test.centres)))
    columns = {
        "truth": [truth[i] for i in shown],
        "student": [render(student, test.rays(i), samples) for i in shown],
        "teacher": [theirs[i] for i in shown],
    }
    pictures = {
        name: ([_picture(image, test.side) for image in images], _captions(images, truth) if name != "truth" else [])
        for name, images in columns.items()
    }
    write_pictures(run.folder / FOLDER, pictures, shown, compared=False)
    view = {"side": float(config.scene.side), "angle": config.scene.angle, "radius": config.scene.radius}
    return SceneField(copy.deepcopy(student).cpu().eval(), config.student, samples, view, figures)


def _picture(image: Tensor, side: int) -> Tensor:
    return (image.clamp(0, 1) * PEAK).round().to(torch.uint8).view(side, side, 3).permute(2, 0, 1).cpu()


def _captions(images: list[Tensor], truth: Tensor) -> list[str]:
    values = psnr(torch.stack(images).clamp(0, 1) * PEAK, truth[: len(images)] * PEAK)
    return [f"{value:.2f} dB" for value in values.tolist()]


@evaluates(SceneField.kind)
def evaluate(product: SceneField, run: Run) -> dict[str, float]:
    """`psnr_views`: of a run's field on the unseen views of its scene; and what it costs to keep."""
    config = run.config
    assert isinstance(config, Config)
    test = rendered(scene(config.scene, _root(config, run)), config.scene, config.scene.test_views, "test")
    parameters = sum(p.numel() for p in product.module.parameters())
    value = view_psnr(product.module, test, test.on(1.0), product.steps)
    return {"psnr_views": value, "parameters": float(parameters)}

"""PVD: fields and their parts, marching and compositing, the phases, inheritance, a run that resumes, a product."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.methods.scenes.pvd import SceneField, method
from stillhouse.methods.scenes.pvd.losses import Rates, distance, phase_loss
from stillhouse.methods.scenes.pvd.method import Config, PhaseSpec, phase_at, rates_at
from stillhouse.methods.scenes.pvd.product import FieldSpec, marched, render, rendered_points
from stillhouse.methods.scenes.pvd.scenes import SceneSpec, banded_centre, body, rendered, scene, shapes
from stillhouse.nn.radiance_fields import (
    HIGHEST,
    LOWEST,
    FieldPoints,
    density,
    hash_encoding,
    hash_offsets,
    inherit,
    spherical_harmonics,
    truncated_exp,
)
from stillhouse.nn.rays import Rays, camera_rays, composite, looking_at_origin, sampled
from stillhouse.runs import recipe, staging
from stillhouse.runs.execution import execute
from stillhouse.runs.export import export
from stillhouse.runs.products import load_product
from stillhouse.training import loop

SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"width": 8, "layers": 3, "skip": 1, "frequencies": 2},
    "hash": {"levels": 3, "base": 4, "finest": 16, "log2_size": 6},
    "vm": {"resolution": 6, "density_rank": 2, "color_rank": 2},
    "plenoxel": {"resolution": 6, "degree": 2},
}


def field(form: str, seed: int = 0, **options: Any):
    torch.manual_seed(seed)
    return FieldSpec(form=form, options={**SMALL[form], "cells": 8, **options}).build()


def points(count: int = 50, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(count, 3, generator=draw)
    return 2 * torch.rand(count, 3, generator=draw) - 1, directions / directions.norm(dim=-1, keepdim=True)


# ---- fields --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SMALL)
def test_every_form_gives_density_colour_and_the_same_features(form: str):
    found = field(form)(*points())
    assert found.log_density.shape == (50,) and found.color.shape == (50, 3)
    assert bool(((found.color >= 0) & (found.color <= 1)).all())
    assert bool(((found.log_density >= LOWEST) & (found.log_density <= HIGHEST)).all())
    if form == "plenoxel":
        assert found.features is None
    else:
        assert found.features is not None and found.features.shape == (50, 16)
        assert torch.equal(found.features[:, 0], found.log_density)


@pytest.mark.parametrize("form", SMALL)
def test_a_field_inherits_everything_from_its_own_form(form: str):
    teacher, student = field(form, 0), field(form, 1)
    assert len(inherit(student, teacher)) == len(teacher.state_dict())
    mine, theirs = student(*points()), teacher(*points())
    terms = phase_loss(2, mine, theirs, None, Rates())
    assert all(float(t.detach()) == 0 for t in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_forms_share_the_second_part_and_the_occupied_cells():
    teacher = field("hash", 0)
    teacher.occupied[0] = False
    for form in ("mlp", "vm", "plenoxel"):
        student = field(form, 1)
        names = set(inherit(student, teacher))
        assert "occupied" in names and not student.occupied[0].any()
        assert ("color_net.0.weight" in names) == (form != "plenoxel"), form


def test_the_clamp_leaves_no_gradient_outside_and_the_exponential_is_bounded_backwards():
    x = torch.tensor([-50.0, 0.0, 50.0], requires_grad=True)
    truncated_exp(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([-12.0, 0.0, 12.0]).exp())
    plenoxel = field("plenoxel")
    with torch.no_grad():
        plenoxel.tensor_volume[0][:, 0] = -5.0
    found = plenoxel(*points())
    assert torch.allclose(density(found.log_density), torch.zeros(50), atol=1e-6), "the floor is no density"
    found.log_density.sum().backward()
    assert plenoxel.tensor_volume[0].grad.abs().sum() == 0


def test_spherical_harmonics_are_orthonormal():
    draw = torch.Generator().manual_seed(0)
    d = torch.randn(200_000, 3, generator=draw)
    y = spherical_harmonics(d / d.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(4 * math.pi * (y.T @ y) / len(y), torch.eye(16), atol=0.05, rtol=0)


def test_a_hash_grid_is_continuous_linear_between_corners_and_zero_outside():
    offsets = hash_offsets(2, 4, 2.0, 10)
    assert offsets == [0, 128, 128 + 736], "a row a corner, rounded up to a multiple of 8"
    table = torch.randn(offsets[-1], 2, generator=torch.Generator().manual_seed(0))
    # level 0 has scale 3: its corners lie at u = (n - 0.5) / 3
    ends = [torch.tensor([[2 * (n - 0.5) / 3 - 1 + 1e-4, 0.1, 0.2]]) for n in (1, 2)]
    ends[1] -= 2e-4
    a, b = (hash_encoding(e, table, offsets[:2], 4, 2.0) for e in ends)
    middle = hash_encoding((ends[0] + ends[1]) / 2, table, offsets[:2], 4, 2.0)
    torch.testing.assert_close(middle, (a + b) / 2, atol=1e-3, rtol=0)
    assert hash_encoding(torch.tensor([[1.5, 0, 0]]), table, offsets, 4, 2.0).abs().sum() == 0


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"form": "nerf"}, "form of radiance field"),
        ({"form": "vm", "options": {"widht": 3}}, "does not take these options"),
        ({"form": "mlp", "options": {"layers": 1}}, "two layers"),
    ],
)
def test_mistakes_get_a_sentence(spec: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        FieldSpec.model_validate(spec).build()


# ---- rays ----------------------------------------------------------------------------------------------------------


def test_cameras_look_at_the_middle_with_the_sky_up():
    centres = torch.tensor([[3.0, 0, 1], [0, -2, 2], [0, 0, 3]])
    turned = looking_at_origin(centres)
    torch.testing.assert_close(turned.transpose(1, 2) @ turned, torch.eye(3).expand(3, 3, 3))
    torch.testing.assert_close(torch.linalg.det(turned), torch.ones(3))
    rays = camera_rays(centres[0], 9, 40.0)
    middle = rays.directions[40]  # of the middle pixel
    torch.testing.assert_close(middle, -centres[0] / centres[0].norm())
    assert rays.directions[4, 2] > middle[2], "the first row is the upper one"


def test_samples_lie_in_the_box_and_a_ray_that_misses_it_sees_the_background():
    hit = Rays(torch.tensor([[3.0, 0, 0]]), torch.tensor([[-1.0, 0, 0]]))
    where, depths, delta = sampled(hit, 1.0, 8)
    assert bool((where.abs() <= 1).all()) and float(delta.sum()) == pytest.approx(2)
    assert depths[0, 0] == pytest.approx(2 + 0.125)
    miss = Rays(torch.tensor([[3.0, 0, 0]]), torch.tensor([[1.0, 0, 0]]))
    assert torch.equal(render(field("vm"), miss, 8, 0.25), torch.full((1, 3), 0.25))


def test_compositing_is_the_recurrence():
    draw = torch.Generator().manual_seed(0)
    sigma, delta = 3 * torch.rand(4, 9, generator=draw), torch.rand(4, 9, generator=draw)
    color, background = torch.rand(4, 9, 3, generator=draw), torch.rand(4, 3, generator=draw)
    left, image = torch.ones(4), torch.zeros(4, 3)
    for i in range(9):
        alpha = 1 - torch.exp(-sigma[:, i] * delta[:, i])
        image += (left * alpha)[:, None] * color[:, i]
        left = left * (1 - alpha)
    seen = composite(sigma, color, delta, background)
    torch.testing.assert_close(seen.image, image + left[:, None] * background)
    torch.testing.assert_close(seen.weights_sum, 1 - left)


def test_only_occupied_cells_are_asked_and_leaving_out_empty_ones_changes_nothing():
    teacher = field("plenoxel")
    with torch.no_grad():
        teacher.tensor_volume[0][:, 0] = -10
        teacher.tensor_volume[0][:, 0, 2:4, 2:4, 2:4] = 5
    rays = camera_rays(torch.tensor([3.0, 0.5, 0.5]), 12, 40.0)
    before = render(teacher, rays, 32)
    teacher.occupy()
    where = marched(teacher, rays, 32)
    assert 0 < where.occupied.float().mean() < 0.7 and len(where.points) == int(where.occupied.sum())
    torch.testing.assert_close(render(teacher, rays, 32), before, atol=1e-5, rtol=0)


def test_no_occupied_cell_gives_the_background():
    empty = field("vm")
    empty.occupied.zero_()
    where = marched(empty, camera_rays(torch.tensor([3.0, 0, 0]), 4, 40.0), 8)
    found = empty(where.points, where.directions)
    assert torch.equal(rendered_points(found, where, torch.ones(3)).image, torch.ones(16, 3))


# ---- phases --------------------------------------------------------------------------------------------------------


def test_phases_end_at_their_shares_and_a_plenoxel_has_no_first():
    phases = PhaseSpec(feature=0.1, point=0.4)
    assert [phase_at(phases, s, True) for s in (0, 0.09, 0.1, 0.39, 0.4, 1)] == [1, 1, 2, 2, 3, 3]
    assert [phase_at(phases, s, False) for s in (0, 0.39, 0.4)] == [2, 2, 3]
    assert phase_at(PhaseSpec(feature=0, point=0), 0, True) == 3


def test_the_weight_of_features_decays_before_it_is_used():
    phases = PhaseSpec(feature_weight=0.002, decay=0.995, late=1)
    assert rates_at(phases, 0, 1).feature == pytest.approx(0.00199)
    assert rates_at(phases, 1499, 3).feature == pytest.approx(0.002 * 0.995**1500)
    assert rates_at(PhaseSpec(), 0, 3).color == pytest.approx(0.02) and rates_at(PhaseSpec(), 0, 2).color == 1


def test_the_teacher_is_a_constant_and_terms_are_those_of_the_phase():
    mine, theirs = (FieldPoints(*(torch.rand(*s, requires_grad=True) for s in ((5,), (5, 3), (5, 16)))) for _ in "ab")
    pixels = (torch.rand(4, 3, requires_grad=True), torch.rand(4, 3, requires_grad=True))
    terms = {p: phase_loss(p, mine, theirs, pixels, Rates(), sparsity=torch.ones(())) for p in (1, 2, 3)}
    assert [set(terms[p]) for p in (1, 2, 3)] == [
        {"feature"},
        {"feature", "color", "density"},
        {"feature", "color", "density", "pixel", "sparsity"},
    ]
    torch.stack(list(terms[3].values())).sum().backward()
    assert theirs.color.grad is None and pixels[1].grad is None and mine.color.grad is not None
    assert float(distance(torch.full((4,), 2.0), torch.zeros(4))) == pytest.approx(4)  # the norm of the whole


def test_forms_that_do_not_meet_are_refused(tmp_path: Path):
    a = FieldPoints(torch.zeros(3), torch.zeros(3, 3), torch.zeros(3, 16))
    b = FieldPoints(torch.zeros(3), torch.zeros(3, 3), torch.zeros(3, 8))
    with pytest.raises(UserError, match="same width"):
        phase_loss(1, a, b, None, Rates())
    with pytest.raises(UserError, match="begin with phase 2"):
        phase_loss(1, a, FieldPoints(b.log_density, b.color), None, Rates())
    with pytest.raises(UserError, match="cannot lie before"):
        execute(settings(phases={"feature": 0.5, "point": 0.2}), tmp_path, cpu=True)


def test_cameras_are_more_often_low():
    torch.manual_seed(0)
    centres = torch.stack([banded_centre(2.0) for _ in range(400)])
    torch.testing.assert_close(centres.norm(dim=-1), torch.full((400,), 2.0))
    elevation = torch.rad2deg(torch.asin(centres[:, 2] / 2))
    assert elevation.min() >= 0 and elevation.max() < 79 and (elevation < 40).float().mean() > 0.6


# ---- scenes and runs -----------------------------------------------------------------------------------------------


def test_a_body_of_a_mesh_is_dense_where_its_vertices_are(tmp_path: Path):
    draw = np.random.default_rng(0)
    ball = draw.normal(size=(12000, 3))
    ball = 2 * ball / np.linalg.norm(ball, axis=1, keepdims=True) + 5
    np.savez(tmp_path / "ball.npz", vertices=ball)
    read = body(tmp_path / "ball.npz")
    place = torch.tensor([[0.9, 0, 0], [0, 0, -0.9], [0.0, 0, 0], [0.99, 0.99, 0.99]])
    found, color = read(place, place)
    assert bool((found[:2] > 20).all()) and bool((found[2:] < 1).all()) and color.shape == (4, 3)
    with pytest.raises(UserError, match="shapes, faust"):
        scene(SceneSpec(name="lego"), tmp_path)


def test_views_are_the_same_for_every_seed_of_a_run_and_unseen_ones_differ():
    spec = SceneSpec(side=8)
    a, b = rendered(shapes, spec, 2, "train"), rendered(shapes, spec, 2, "train")
    assert torch.equal(a.pixels, b.pixels) and not torch.equal(a.centres, rendered(shapes, spec, 2, "test").centres)
    assert 0 < a.pixels[..., 3].mean() < 0.9 and torch.allclose(
        a.on(1.0)[..., 0][a.pixels[..., 3] < 1e-6], torch.ones(1)
    )


def settings(student: str = "mlp", **keys: Any) -> Config:
    config = recipe.validate(
        {
            "method": "pvd",
            "scene": {"views": 3, "test_views": 2, "side": 12},
            "teacher": {"form": "vm", "options": {**SMALL["vm"], "cells": 8}},
            "student": {"form": student, "options": {**SMALL[student], "cells": 8}},
            "teach": {"steps": 30, "rays": 32, "samples": 8, "lr": 2e-2},
            "distil": {"steps": 20, "rays": 32, "samples": 8, "lr": 1e-2, "check_every": 5},
            **keys,
        }
    )
    assert isinstance(config, Config)
    return config


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.getbasetemp() / "pvd_cache"))


@pytest.mark.parametrize("student", SMALL)
def test_any_form_is_distilled_from_another(student: str, tmp_path: Path):
    figures = execute(settings(student), tmp_path / "run", cpu=True)
    assert all(not math.isnan(v) for v in figures.values()) and figures["psnr_views"] > 5
    product = load_product(tmp_path / "run")
    assert isinstance(product, SceneField) and product.spec.form == student
    assert product.look(torch.tensor([3.0, 0, 1]), side=6).shape == (3, 6, 6)
    rows = (tmp_path / "run" / "metrics.csv").read_text()
    assert ("feature" in rows) == (student != "plenoxel") and "pixel" in rows
    shown = json.loads((tmp_path / "run" / "pictures" / "pictures.json").read_text())
    assert list(shown["samples"][0]["shown"]) == ["truth", "student", "teacher"]


def test_a_loaded_field_renders_the_same_and_exports_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures = execute(settings(), tmp_path / "run", cpu=True)
    again = execute(settings(), tmp_path / "again", cpu=True)
    assert again["psnr_views"] == figures["psnr_views"], "a run is a function of its seed"
    a, b = (load_product(tmp_path / name) for name in ("run", "again"))
    assert torch.equal(a.look(torch.tensor([0.0, 3, 1])), b.look(torch.tensor([0.0, 3, 1])))
    monkeypatch.setattr("stillhouse.methods.scenes.pvd.product.ORBIT", 2)
    assert len(list(export(tmp_path / "run", "views", tmp_path / "views").glob("*.png"))) == 2


def test_an_interrupted_distillation_resumes_to_the_same_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights, optimiser, occupied cells and the curve are in the checkpoint."""
    plain = loop.loop
    monkeypatch.setattr(staging, "loop", lambda *a, **k: plain(*a, **{**k, "log_every": 1, "checkpoint_seconds": 0.0}))
    for source in ("teacher", "images"):
        config = settings("vm", source=source, teach={"steps": 30, "rays": 32, "samples": 8, "lr": 2e-2})
        config.distil.occupancy_every = 6
        whole = execute(config, tmp_path / f"whole_{source}", cpu=True)
        true, done = method._update, []

        def failing(*given: Any, true: Any = true, done: list = done) -> None:
            done.append(1)
            if len(done) == 13:
                raise RuntimeError("power")
            true(*given)

        monkeypatch.setattr(method, "_update", failing)
        with pytest.raises(RuntimeError, match="power"):
            execute(config, tmp_path / source, cpu=True)
        monkeypatch.setattr(method, "_update", true)
        again = execute(config, tmp_path / source, cpu=True)
        assert len(done) == 13 and again["psnr_views"] == whole["psnr_views"]
        assert again["share_to_teacher"] == whole["share_to_teacher"]
        fields = [load_product(tmp_path / name).module.state_dict() for name in (source, f"whole_{source}")]
        assert all(torch.equal(fields[0][k], fields[1][k]) for k in fields[0])


def test_a_student_that_begins_as_its_teacher_stays_there_and_images_are_a_baseline(tmp_path: Path):
    same = execute(settings("vm", phases={"sparsity": 0}), tmp_path / "same", cpu=True)
    assert same["psnr_to_teacher"] > 60 and same["share_to_teacher"] == 0, "a difference of 0 has a gradient of 0"
    images = execute(settings(source="images"), tmp_path / "images", cpu=True)
    assert images["psnr_teacher"] == pytest.approx(same["psnr_teacher"])
    frozen = execute(settings(freeze_tails=True), tmp_path / "frozen", cpu=True)
    assert frozen["psnr_views"] > 5

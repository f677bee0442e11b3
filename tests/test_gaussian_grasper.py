"""GaussianGrasper: splatting against the recurrence, density control, both feature terms, queries, grasps, views from
files, a run that resumes, and its product."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.methods.scenes.gaussian_grasper import GaussianScene, method
from stillhouse.methods.scenes.gaussian_grasper.density import Control, DensitySpec
from stillhouse.methods.scenes.gaussian_grasper.gaussians import NAMES, Gaussians, lifting
from stillhouse.methods.scenes.gaussian_grasper.grasping import (
    Grasps,
    GraspSpec,
    choose,
    collides,
    contact_angles,
    holds_truly,
    propose,
)
from stillhouse.methods.scenes.gaussian_grasper.losses import (
    color_loss,
    contrastive_loss,
    depth_loss,
    draw_pixels,
    every_pixel,
    lifted_loss,
    normal_loss,
    visible_ids,
)
from stillhouse.methods.scenes.gaussian_grasper.method import Config
from stillhouse.methods.scenes.gaussian_grasper.query import largest_part, relevancy, text_vectors
from stillhouse.methods.scenes.gaussian_grasper.table import THINGS, Placed, Scene, table
from stillhouse.methods.scenes.gaussian_grasper.views import (
    SceneSpec,
    as_segmented,
    back_projected,
    depth_normals,
    looked_at,
    places,
    read_folder,
    split,
)
from stillhouse.nn.rays import on_sphere
from stillhouse.nn.splatting import Camera, multiplied, project, quaternion, rotations, splat
from stillhouse.runs import recipe, staging
from stillhouse.runs.execution import execute
from stillhouse.runs.export import export
from stillhouse.runs.products import load_product
from stillhouse.training import loop

CAMERA = Camera.at(torch.tensor([0.4, -0.3, 0.35]), 20, 14, 48.0)


def cloud(count: int = 40, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Means, log scales, quaternions, opacities and channels."""
    draw = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(*s, generator=draw, dtype=dtype)  # noqa: E731
    means = (rand(count, 3) - 0.5) * torch.tensor([0.4, 0.4, 0.2], dtype=dtype)
    return [means, -4 + rand(count, 3), rand(count, 4) - 0.5, 0.02 + 0.97 * rand(count), rand(count, 5)]


# ---- splatting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [4, 8])
def test_splatting_in_tiles_is_the_loop_over_sorted_gaussians(tile: int) -> None:
    """Including what is skipped, where a pixel stops, and a camera that stands among the Gaussians."""
    near = Camera.at(torch.tensor([0.1, 0.05, 0.06]), 20, 14, 70.0)
    for camera in (CAMERA, near):
        means, scales, quats, opacity, channels = cloud(120)
        opacity[:30] = 0.999
        found = project(means, scales, quats, camera)
        seen = splat(found, opacity, channels, camera.width, camera.height, tile)
        image = torch.zeros(camera.height, camera.width, 5, dtype=torch.float64)
        left = torch.ones(camera.height, camera.width, dtype=torch.float64)
        done = torch.zeros(camera.height, camera.width, dtype=torch.bool)
        v, u = torch.meshgrid(torch.arange(camera.height) + 0.5, torch.arange(camera.width) + 0.5, indexing="ij")
        for i in found.depth.argsort().tolist():
            if found.depth[i] <= 0.01:
                continue
            d = torch.stack([u, v], -1) - found.uv[i]
            power = -0.5 * (d * (d @ torch.linalg.inv(found.cov[i]))).sum(-1)
            alpha = opacity[i] * power.exp()
            alpha = torch.where(alpha < 1 / 255, 0, alpha).clamp_max(0.999)
            done |= (left * (1 - alpha) <= 1e-4) & (alpha > 0)
            alpha = torch.where(done, 0, alpha)
            image += (left * alpha)[..., None] * channels[i]
            left = left * (1 - alpha)
        torch.testing.assert_close(seen.image, image, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.transmittance, left, rtol=1e-4, atol=1e-5)
        assert done.any() and not done.all()


def test_gradients_of_splatting_are_those_of_finite_differences() -> None:
    leaves = [x.requires_grad_() for x in cloud(6)]
    weights = torch.rand(14, 20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def value(means: torch.Tensor, scales: torch.Tensor, quats: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return (splat(project(means, scales, quats, CAMERA), *rest, CAMERA.width, CAMERA.height).image * weights).sum()

    value(*leaves).backward()
    for leaf in leaves:
        for place in (0, leaf.numel() // 2):
            step = torch.zeros_like(leaf).flatten()
            step[place] = 1e-6
            step = step.view_as(leaf)
            with torch.no_grad():
                ends = [value(*(x + s * step if x is leaf else x for x in leaves)) for s in (1, -1)]
            assert float(leaf.grad.flatten()[place]) == pytest.approx(
                float(ends[0] - ends[1]) / 2e-6, rel=1e-3, abs=1e-5
            )


def test_what_lies_behind_the_camera_or_is_transparent_is_not_seen_and_an_empty_view_is_empty() -> None:
    means, scales, quats, opacity, channels = cloud(5)
    behind = CAMERA.centre.double() * 2 + 0 * means
    for places_, opaque in ((behind, opacity), (means, opacity * 0)):
        seen = splat(project(places_, scales, quats, CAMERA), opaque, channels.requires_grad_(), 20, 14)
        assert seen.image.abs().sum() == 0 and bool((seen.transmittance == 1).all())
        seen.image.sum().backward()
        assert bool((channels.grad == 0).all())


def test_rotations_and_quaternions_agree() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = F.normalize(torch.randn(2, 4, generator=draw), dim=-1)
    torch.testing.assert_close(rotations(multiplied(a, b)[None])[0], (rotations(a[None]) @ rotations(b[None]))[0])
    torch.testing.assert_close(rotations(quaternion(rotations(a[None])[0])[None]), rotations(a[None]))


# ---- the table -------------------------------------------------------------------------------------------------------


def test_rays_meet_things_where_their_distance_is_zero_and_normals_are_its_gradient() -> None:
    scene = table(6, 3)
    centres = on_sphere(4, 0.5, torch.Generator().manual_seed(0), 25, 75)
    for centre in centres:
        views = looked_at(scene, [Camera.at(centre, 30, 24, 45.0)])
        camera = views.cameras[0]
        intrinsics = (camera.fx, camera.fy, camera.cx, camera.cy)
        points, kept = back_projected(views.depth[0], intrinsics, camera.to_world, None, (0, 9), (-9, 9))
        assert bool((kept == views.valid[0]).all())
        assert float(scene.distance(points).abs().max()) < 1e-4
        normal, step = views.normal[0][kept], 1e-4
        torch.testing.assert_close(normal.norm(dim=-1), torch.ones(len(normal)))
        rise = (scene.distance(points + step * normal) - scene.distance(points - step * normal)) / (2 * step)
        assert float((rise > 0.9).float().mean()) > 0.97, "but at edges"
        direction = F.normalize(camera.centre - points, dim=-1)
        assert bool(((normal * direction).sum(-1) > -1e-4).all())


def test_things_do_not_touch_and_a_moved_one_is_elsewhere() -> None:
    scene = table(6, 0)
    assert len({p.thing.name for p in scene.placed}) == 6
    for a in scene.placed:
        assert min(float(b.distance(a.centre)) for b in scene.placed if b is not a) > 0.03
    after = scene.with_moved(1, torch.tensor([0.05, 0, 0]), 0.3)
    torch.testing.assert_close(after.placed[1].centre - scene.placed[1].centre, torch.tensor([0.05, 0, 0]))
    assert after.placed[0] is scene.placed[0]


def test_masks_err_at_borders_alone_and_features_differ_from_view_to_view() -> None:
    spec = SceneSpec(views=2, size=(32, 32))
    plain = looked_at(table(3, 0), places(spec, "train"))
    vectors = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    views = as_segmented(plain, vectors, spec, "train")
    wrong = (views.masks != views.truth) & views.valid
    assert 0 < wrong.float().mean() < 0.1
    spread = torch.nn.functional.max_pool2d(views.truth[:, None].float(), 3, 1, 1) != views.truth[:, None]
    shrunk = -torch.nn.functional.max_pool2d(-views.truth[:, None].float(), 3, 1, 1) != views.truth[:, None]
    assert bool((spread | shrunk)[:, 0][wrong].all())
    assert not torch.equal(views.features[0], views.features[1])
    assert bool((F.normalize(views.features, dim=-1) * vectors).sum(-1).min() > 0.5)
    exact = as_segmented(plain, vectors, spec.model_copy(update={"border_noise": 0, "feature_noise": 0}), "train")
    assert torch.equal(exact.masks, exact.truth)
    assert bool((exact.targets(0)[exact.masks[0] < 0] == 0).all())


def test_normals_of_a_tilted_plane_are_its_own_and_depth_of_zero_is_no_division() -> None:
    u = torch.arange(20.0).expand(20, 20)
    depth = 1 / (1 - 0.5 * (u - 10) / 100)  # z = 1 + 0.5 x
    normal = depth_normals(depth, torch.eye(4), 100.0, 100.0)
    wanted = torch.tensor([-0.5, 0.0, 1.0]) / math.sqrt(1.25)
    torch.testing.assert_close(normal[1:-1, 1:-1], wanted.expand(18, 18, 3), atol=0.02, rtol=0)
    depth[0, 0] = 0
    assert depth_normals(depth, torch.eye(4), 100.0, 100.0).isfinite().all()


# ---- terms -----------------------------------------------------------------------------------------------------------


def test_pixels_are_drawn_within_masks_without_replacement_and_equally_often_of_each() -> None:
    ids = torch.full((12, 10), -1)
    ids[:6] = 0
    ids[6:8, :5] = 2
    torch.manual_seed(0)
    drawn = draw_pixels(ids, 4, 30, 20)
    flat = ids.flatten()
    for k in range(4):
        for side in (drawn.first, drawn.second):
            chosen = side[k][drawn.paired[k]]
            assert bool((flat[chosen] == k).all()) and len(chosen.unique()) == len(chosen)
    assert drawn.paired.sum(1).tolist() == [30, 0, 10, 0]
    lifted = drawn.lifted[drawn.counted]
    assert [int((flat[lifted] == k).sum()) for k in range(4)] == [10, 0, 10, 0], "20 over 3 ids less 1"
    assert every_pixel(ids, drawn).counted.sum() == 70
    alone = draw_pixels(torch.zeros(4, 4, dtype=torch.int64), 1, 800, 1000)
    assert int(alone.counted.sum()) == 16, "one id, and no pixel without: no division by zero"


def test_a_view_without_masks_has_feature_terms_of_zero_with_gradients() -> None:
    torch.manual_seed(0)
    features, lift = torch.randn(6, 5, 4, requires_grad=True), lifting(4, [8], 7)
    drawn = draw_pixels(torch.full((6, 5), -1), 3, 10, 10)
    loss = contrastive_loss(features, drawn) + lifted_loss(features, torch.zeros(len(drawn.lifted), 7), drawn, lift)
    loss.backward()
    assert float(loss.detach()) == 0 and features.grad.isfinite().all()


def test_pairs_pull_features_of_one_mask_together_and_say_nothing_of_others() -> None:
    ids = torch.zeros(6, 6, dtype=torch.int64)
    ids[3:] = 1
    torch.manual_seed(0)
    drawn = draw_pixels(ids, 2, 40, 40)
    alike = torch.where(ids[..., None] == 0, torch.tensor([1.0, 0]), torch.tensor([0.0, 3]))
    assert float(contrastive_loss(alike, drawn)) == pytest.approx(0, abs=1e-6)
    opposite = alike.clone()
    opposite[:3, ::2] *= -1
    assert 0.3 < float(contrastive_loss(opposite, drawn)) < 0.8


def test_invalid_pixels_count_for_nothing() -> None:
    torch.manual_seed(0)
    valid = torch.rand(14, 16) > 0.3
    image, depth = torch.rand(14, 16, 3), 0.5 + torch.rand(14, 16)
    normal = F.normalize(torch.randn(14, 16, 3), dim=-1)
    spoiled = torch.where(valid[..., None], image, 9.0), torch.where(valid, depth, 99.0)
    assert float(color_loss(spoiled[0], image, valid)) == pytest.approx(0, abs=1e-6)
    assert float(depth_loss(spoiled[1], depth, valid)) == 0
    turned = torch.where(valid[..., None], normal, -normal)
    assert float(normal_loss(turned, normal, depth, valid)) == pytest.approx(0, abs=1e-6)
    none = torch.zeros(14, 16, dtype=torch.bool)
    assert float(color_loss(spoiled[0], image, none)) == pytest.approx(0) == float(depth_loss(depth, depth + 1, none))
    assert bool((visible_ids(torch.ones(14, 16, dtype=torch.int64), valid)[~valid] == -1).all())


# ---- Gaussians and their number --------------------------------------------------------------------------------------


def gaussians(count: int = 30) -> Gaussians:
    torch.manual_seed(0)
    out = Gaussians(count, 1, 4)
    out.begin(0.1 * torch.randn(count, 3), torch.rand(count, 3), 0.5)
    return out


def test_gaussians_begin_at_points_with_their_colours() -> None:
    torch.manual_seed(0)
    where, paint = 0.1 * torch.randn(20, 3), torch.rand(20, 3)
    field = Gaussians(20, 3, 8)
    field.begin(where, paint, 0.1)
    torch.testing.assert_close(field.colors(CAMERA, 3), paint, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(field.opacity.sigmoid(), torch.full((20,), 0.1))
    assert bool((field.features.abs() <= 1).all()) and field.log_scales.std(dim=1).max() < 1e-6


def test_normals_are_the_shortest_axis_turned_to_the_camera() -> None:
    field = gaussians(3)
    with torch.no_grad():
        field.log_scales[:] = torch.tensor([[-3.0, -5, -4]])
        field.quats[:] = torch.tensor([1.0, 0, 0, 0])
    torch.testing.assert_close(field.normals(), torch.tensor([[0.0, 1, 0]]).expand(3, 3))
    towards = field.normals(torch.tensor([0.0, -5, 0]))
    torch.testing.assert_close(towards, torch.tensor([[0.0, -1, 0]]).expand(3, 3))


def control(field: Gaussians, **options: Any) -> tuple[Control, torch.optim.Adam]:
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-2)
    torch.stack([p.square().sum() for p in field.parameters()]).sum().backward()
    optimizer.step()
    return Control(field, (optimizer,), DensitySpec(start=1, end=100, every=1, **options)), optimizer


def test_pulled_gaussians_are_split_or_doubled_and_faint_ones_removed() -> None:
    field = gaussians()
    with torch.no_grad():
        field.log_scales[:10] = math.log(0.005)  # small: doubled
        field.log_scales[10:20] = math.log(0.02)  # large: split
        field.log_scales[20:] = math.log(0.005)
        field.opacity[25:] = -4.0  # faint
    kept = field.means[20:25].detach().clone()
    watch, optimizer = control(field, gradient=1.0)
    watch.pull[:20], watch.times[:] = 5.0, 1.0
    before = optimizer.state[field.means]["exp_avg"].clone()
    with torch.no_grad():
        field.means[20:25] = kept
        field.log_scales[10:20] = math.log(0.02)
    watch.refine(50)
    assert len(field) == 10 + 5 + 10 + 20 and len(watch.pull) == 45
    torch.testing.assert_close(field.means[10:15], kept)
    torch.testing.assert_close(field.log_scales[-20:].exp(), torch.full((20, 3), 0.02 / 1.6))
    state = optimizer.state[field.means]["exp_avg"]
    assert torch.equal(state[:10], before[:10]) and bool((state[15:] == 0).all())
    field.means.sum().backward()
    optimizer.step()


def test_a_reset_lowers_opacities_and_their_state_and_too_many_are_not_made() -> None:
    field = gaussians()
    watch, optimizer = control(field, gradient=1.0, most=30)
    watch.reset()
    assert float(field.opacity.detach().sigmoid().max()) <= 0.08 + 1e-6
    assert bool((optimizer.state[field.opacity]["exp_avg"] == 0).all())
    with torch.no_grad():
        field.opacity.fill_(1.0)
    watch.pull[:], watch.times[:] = 5.0, 1.0
    watch.refine(3)
    assert len(field) == 30
    assert not watch.due(0) and watch.due(7) and not watch.due(100)


def test_a_field_of_another_number_takes_a_state() -> None:
    small, large = gaussians(5), gaussians(9)
    small.load_state_dict(large.state_dict())
    assert len(small) == 9 and all(torch.equal(getattr(small, n), getattr(large, n)) for n in NAMES)


def test_a_moved_field_is_seen_as_from_a_camera_that_moved_the_other_way() -> None:
    field = gaussians(20)
    with torch.no_grad():
        field.harmonics[:, 1:] = 0
    turn, shift, about = (
        rotations(torch.tensor([[0.9, 0.1, -0.2, 0.3]]))[0],
        torch.tensor([0.1, 0, 0.05]),
        torch.ones(3),
    )
    moving = torch.eye(4)
    moving[:3, :3], moving[:3, 3] = turn, about + shift - turn @ about
    other = Camera(CAMERA.view @ moving, CAMERA.fx, CAMERA.fy, CAMERA.cx, CAMERA.cy, CAMERA.width, CAMERA.height)
    before = field.seen(other)
    field.move(torch.ones(20, dtype=torch.bool), turn, shift, about)
    after = field.seen(CAMERA)
    torch.testing.assert_close(after.color, before.color, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after.depth, before.depth, atol=1e-5, rtol=1e-4)


# ---- queries and grasps ----------------------------------------------------------------------------------------------


def test_relevancy_is_the_least_over_phrases_and_half_where_both_are_as_near() -> None:
    vectors = torch.eye(4)
    values = relevancy(torch.stack([3 * vectors[0], vectors[1], vectors[0] + vectors[1]]), vectors[0], vectors[1:3])
    torch.testing.assert_close(values, torch.sigmoid(10 * torch.tensor([1.0, -1.0, 0.0])))


def test_the_largest_part_is_found() -> None:
    points = torch.cat([0.01 * torch.arange(6.0)[:, None] * torch.ones(1, 3), torch.full((3, 3), 1.0)])
    assert largest_part(points, 0.02).tolist() == [True] * 6 + [False] * 3
    assert largest_part(torch.zeros(0, 3)).shape == (0,)


def ball_and_box() -> Scene:
    ball, _, _, soap, _, _ = THINGS
    return Scene((Placed(ball, torch.tensor([0.0, 0, 0.036]), 0.0), Placed(soap, torch.tensor([0.2, 0, 0.02]), 0.0)))


def across(degrees: float, place: tuple[float, float, float], width: float = 0.09) -> Grasps:
    """A grasp from above that closes along a direction in the plane."""
    turn = math.radians(degrees)
    return Grasps(
        torch.tensor([place]),
        torch.tensor([[0.0, 0, -1]]),
        torch.tensor([[math.cos(turn), math.sin(turn), 0.0]]),
        torch.tensor([width]),
        torch.ones(1),
    )


def surface(thing: Placed, count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of a thing seen from many sides, and their normals."""
    views = looked_at(
        Scene((thing,)), [Camera.at(c, 64, 64, 40.0) for c in on_sphere(12, 0.6, torch.Generator(), 5, 60)]
    )
    points, normals = [], []
    for i, camera in enumerate(views.cameras):
        where = views.truth[i] == 1
        found, kept = back_projected(
            views.depth[i], (camera.fx, camera.fy, camera.cx, camera.cy), camera.to_world, where, (0, 9), (-9, 9)
        )
        points.append(found)
        normals.append(views.normal[i][kept])
    return torch.cat(points), torch.cat(normals)


@pytest.mark.parametrize(
    ("degrees", "place", "holds"),
    [
        (0.0, (0.0, 0.0, 0.036), True),  # through the ball's middle
        (0.0, (0.0, 0.025, 0.036), False),  # off the middle: normals turn away
        (90.0, (0.2, 0.0, 0.022), True),  # across the soap's sides
        (45.0, (0.2, 0.0, 0.022), False),  # on its corner
    ],
)
def test_grasps_are_judged_by_normals_as_by_the_known_surfaces(
    degrees: float, place: tuple[float, float, float], holds: bool
) -> None:
    scene, spec = ball_and_box(), GraspSpec()
    thing = scene.placed[int(place[0] > 0.1)]
    grasp = across(degrees, place)
    true, _ = holds_truly(grasp, thing, scene, spec)
    assert bool(true) == holds
    points, normals = surface(thing)
    angles = contact_angles(grasp, points, normals, spec)
    assert bool((angles <= spec.cone).all()) == holds


def test_a_grasp_of_nothing_has_no_contact_and_a_gripper_in_the_table_collides() -> None:
    scene, spec = ball_and_box(), GraspSpec()
    points, normals = surface(scene.placed[0])
    assert bool((contact_angles(across(0, (0.5, 0, 0.1)), points, normals, spec) > 3).all())
    ground = torch.cartesian_prod(*[torch.linspace(-0.1, 0.1, 81)] * 2)
    ground = torch.cat([ground, torch.zeros(len(ground), 1)], 1)
    low, high = across(0, (0.0, 0.0, 0.0)), across(0, (0.0, 0.0, 0.04))
    assert bool(collides(low, ground, spec)) and not bool(collides(high, ground, spec))
    assert not bool(holds_truly(low, scene.placed[0], scene, spec)[1])
    assert bool(holds_truly(high, scene.placed[0], scene, spec)[1])


def test_the_filter_chooses_what_holds_and_tells_why_none_does() -> None:
    scene = ball_and_box()
    points, normals = surface(scene.placed[1])
    both = [across(45.0, (0.2, 0, 0.022)), across(90.0, (0.2, 0, 0.022))]
    pair = Grasps(*(torch.cat([getattr(g, n) for g in both]) for n in Grasps.__dataclass_fields__))
    pair.score[0] = 9.0
    assert choose(pair, points, normals, points[:0], GraspSpec(filter=False)).index == 0
    choice = choose(pair, points, normals, points[:0], GraspSpec())
    assert choice.index == 1 and choice.reasons["normals"] == 1
    bad = both[0]
    with pytest.raises(UserError, match=r"No feasible grasp among 1 \(0 no contact, 1 normals"):
        choose(bad, points, normals, points[:0], GraspSpec())
    assert choose(bad, points, normals, points[:0], GraspSpec(relax=True)).index == 0


def test_proposals_are_frames_within_the_tilt_and_a_function_of_their_key() -> None:
    points, _ = surface(ball_and_box().placed[0])
    spec = GraspSpec(tilt=30)
    a, b = (propose(points, spec, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a.score, b.score) and len(a) == spec.candidates
    assert float((a.approach * a.axis).sum(-1).abs().max()) < 1e-5
    assert bool((-a.approach[:, 2] >= math.cos(math.radians(30)) - 1e-5).all())


# ---- views from files ------------------------------------------------------------------------------------------------


def write_views(folder: Path, count: int = 4, **change: Any) -> None:
    spec = SceneSpec(things=2, views=count, size=(24, 24))
    views = as_segmented(
        looked_at(table(2, 0), places(spec, "train")), text_vectors(["a", "b", "c"], None, folder, 16), spec, "x"
    )
    folder.mkdir(exist_ok=True)
    for i, camera in enumerate(views.cameras):
        arrays = {
            "color": (255 * views.color[i]).byte().numpy(),
            "depth": views.depth[i].numpy(),
            "masks": views.masks[i].numpy(),
            "features": views.features[i].numpy(),
            "camera_to_base": camera.to_world.numpy(),
            "intrinsics": np.array([camera.fx, camera.fy, camera.cx, camera.cy]),
            **change,
        }
        np.savez(folder / f"{i:03d}.npz", **{k: v for k, v in arrays.items() if v is not None})


def test_views_of_a_folder_are_read_and_normals_face_the_camera(tmp_path: Path) -> None:
    write_views(tmp_path / "views")
    views = read_folder(tmp_path / "views")
    truth = looked_at(table(2, 0), views.cameras)
    assert views.color.shape == (4, 24, 24, 3) and torch.equal(views.valid, truth.valid)
    inner = torch.zeros_like(views.valid)
    inner[:, 1:-1, 1:-1] = True
    cosine = (views.normal * truth.normal).sum(-1)[inner & views.valid]
    assert float(cosine.median()) > 0.95
    train, test = split(views, 1)
    assert len(train) == 3 and len(test) == 1
    with pytest.raises(UserError, match="none for the fit"):
        split(views, 4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"masks": None}, "lacks the array 'masks'"),
        ({"depth": np.full((24, 24), 900.0)}, "in metres"),
        ({"masks": np.full((24, 24), 9)}, "has the id 9"),
    ],
)
def test_damaged_views_get_a_sentence(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    write_views(tmp_path / "views", 2, **change)
    with pytest.raises(UserError, match=sentence):
        read_folder(tmp_path / "views")


# ---- runs ------------------------------------------------------------------------------------------------------------


def settings(**keys: Any) -> Config:
    config = recipe.validate(
        {
            "method": "gaussian_grasper",
            "scene": {"things": 2, "views": 3, "test_views": 1, "size": [24, 24]},
            "gaussians": {"points": 80, "degree": 1, "hidden": [16]},
            "fit": {
                "steps": 14,
                "halved_until": 2,
                "degree_every": 4,
                "accumulate": 3,
                "density": {"start": 2, "end": 13, "every": 4, "gradient": 1e-3, "reset": 8},
            },
            "grasp": {"candidates": 8, "rounds": 1},
            "move": {"steps": 3},
            **keys,
        }
    )
    assert isinstance(config, Config)
    return config


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.getbasetemp() / "grasper_cache"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("grasper") / "run"
    return folder, execute(settings(), folder, cpu=True)


def test_a_run_leaves_a_product_that_renders_finds_and_exports(
    finished: tuple[Path, dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, figures = finished
    assert all(math.isfinite(v) for v in figures.values()) and figures["psnr_views"] > 5
    product = load_product(folder)
    assert isinstance(product, GaussianScene)
    assert len(product.gaussians) == figures["gaussians"] != 80, "their number changed"
    assert product.look(CAMERA).shape == (3, 14, 20)
    text = next(iter(product.known))
    assert product.relevant(product.gaussians.features, text).shape == (len(product.gaussians),)
    assert product.vector("something else").shape == product.vector(text).shape
    shown = json.loads((folder / "pictures" / "pictures.json").read_text())
    assert (
        {"truth", "rendered", "normals", "asked", "found"} >= set(shown["samples"][0]["shown"]) >= {"truth", "rendered"}
    )
    monkeypatch.setattr("stillhouse.methods.scenes.gaussian_grasper.product.ORBIT", 1)
    assert len(list(export(folder, "views", tmp_path / "views").glob("*.png"))) == 1
    ply = export(folder, "ply", tmp_path / "field.ply").read_bytes()
    head, _, body = ply.partition(b"end_header\n")
    assert head.count(b"property float") * 4 * len(product.gaussians) == len(body)


def test_an_interrupted_fit_resumes_to_the_same_gaussians(
    finished: tuple[Path, dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across density control and gradients that are added up, and with another number of Gaussians than at the
    start."""
    folder, figures = finished
    plain = loop.loop
    monkeypatch.setattr(staging, "loop", lambda *a, **k: plain(*a, **{**k, "log_every": 1, "checkpoint_seconds": 0.0}))
    true, done = method.Fitting.step, []

    def failing(self: Any, i: int) -> Any:
        done.append(i)
        if len(done) in (8, 18):
            raise RuntimeError("power")
        return true(self, i)

    monkeypatch.setattr(method.Fitting, "step", failing)
    for _ in range(2):  # in the fit, and in the update
        with pytest.raises(RuntimeError, match="power"):
            execute(settings(), tmp_path / "run", cpu=True)
    again = execute(settings(), tmp_path / "run", cpu=True)
    assert done == [*range(8), *range(7, 14), 0, 1, 2, 2]
    a, b = (load_product(f).tensors() for f in (folder, tmp_path / "run"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    same = set(figures) - {"train_seconds", "step_ms", "run_seconds"}
    assert all(again[k] == figures[k] for k in same)


def test_views_of_a_folder_are_fitted_without_a_known_scene(tmp_path: Path) -> None:
    write_views(tmp_path / "views")
    config = settings(
        scene={"name": f"folder:{tmp_path / 'views'}", "test_views": 1, "size": [24, 24], "queries": {"b": 1}},
        move=None,
    )
    figures = execute(config, tmp_path / "run", cpu=True)
    assert "miou_queries" in figures and "antipodal" not in figures


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"scene": {"name": "kitchen"}}, "scene"),
        ({"scene": {"size": [20, 20]}}, "windows of 11"),
        ({"move": {"thing": 7}}, "there is no thing 7"),
        ({"gaussians": {"heights": [5.0, 6.0]}}, "fewer than four points"),
        ({"language": {"model": "timm:resnet18"}}, "no text encoder"),
    ],
)
def test_mistakes_get_a_sentence(keys: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        execute(settings(**keys), tmp_path / "run", cpu=True)

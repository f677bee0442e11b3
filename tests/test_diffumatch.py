"""DiffuMatch: meshes and their views, the network of features, denoisers, masks that hold maps, a run that resumes, a
product that matches two files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.data.mesh_views import camera_around, drawn, place_colours, seen
from stillhouse.data.meshes import (
    Mesh,
    deformed_ellipsoid,
    laplacian,
    named_mesh,
    read_mesh,
    sphere,
    spread_vertices,
    tangent_gradients,
)
from stillhouse.errors import UserError
from stillhouse.functional.functional_maps import map_of_points, solved_map
from stillhouse.methods.correspondence.diffumatch import Config, ShapeMatcher
from stillhouse.methods.correspondence.diffumatch.denoising import DenoiserSpec, average_decay
from stillhouse.methods.correspondence.diffumatch.matching import MatchSpec, PairFit, direct, mask_contrast, solved
from stillhouse.methods.correspondence.diffumatch.network import DiffusionNet
from stillhouse.methods.correspondence.diffumatch.shapes import (
    Shape,
    assembled,
    computed,
    errors,
    true_map,
)
from stillhouse.runs import recipe, staging
from stillhouse.runs.execution import execute
from stillhouse.runs.export import export
from stillhouse.runs.prediction import predict
from stillhouse.runs.products import load_product
from stillhouse.training import loop

K = 10


def shape(name: str) -> Shape:
    mesh = deformed_ellipsoid(name).normalised()
    return assembled(name, mesh, computed(mesh, 30, 100), torch.device("cpu"))


@pytest.fixture(scope="module")
def pair() -> tuple[Shape, Shape]:
    return shape("a"), shape("b")


def band(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The denoiser of a prior whose entries are Gaussian, narrow away from the diagonal."""
    places = torch.arange(x.shape[-1])
    spread = 0.6 * torch.exp(-(((places[:, None] - places) / 2.0) ** 2)) + 0.02
    s = sigma.square()[:, None, None, None]
    return x * spread**2 / (spread**2 + s)


# ---- meshes --------------------------------------------------------------------------------------------------------


def test_gradients_on_a_sphere_are_those_of_the_function():
    ball = sphere(3)
    across, along = tangent_gradients(ball)
    for axis in range(3):
        f = ball.vertices[:, axis]
        slope = np.sqrt((across @ f) ** 2 + (along @ f) ** 2)
        assert np.abs(slope - np.sqrt(1 - f**2)).max() < 0.03
    assert np.abs(across @ np.ones(len(f))).max() < 1e-9


def test_a_shape_has_the_gradients_of_its_mesh(pair: tuple[Shape, Shape]):
    one, x = pair[0], torch.randn(642, 3, generator=torch.Generator().manual_seed(0))
    for found, matrix in zip(one.gradients(x), tangent_gradients(one.mesh)):
        np.testing.assert_allclose(found.numpy(), matrix @ x.numpy(), rtol=1e-4, atol=1e-3)


def test_distances_between_points_are_those_of_whole_rows():
    mesh, draw = deformed_ellipsoid("a").normalised(), np.random.default_rng(0)
    sources, targets = draw.integers(0, len(mesh.vertices), (2, 50))
    rows = mesh.distances_from(np.arange(len(mesh.vertices)))
    np.testing.assert_allclose(mesh.distances_between(sources, targets, at_once=7), rows[sources, targets])


def test_spread_vertices_are_farther_apart_than_drawn_ones():
    mesh = sphere(3)
    chosen = mesh.vertices[spread_vertices(mesh, 40)]
    apart = np.linalg.norm(chosen[:, None] - chosen, axis=-1) + 9 * np.eye(40)
    assert apart.min() > 0.3 and len(spread_vertices(mesh, 10**6)) == len(mesh.vertices)


@pytest.mark.parametrize("form", ["off", "obj"])
def test_text_files_of_meshes_are_read(form: str, tmp_path: Path):
    ball = sphere(1)
    points = [" ".join(f"{x:.9f}" for x in v) for v in ball.vertices]
    if form == "off":
        lines = ["# a ball", "OFF", f"{len(points)} {len(ball.faces)} 0", *points]
        lines += ["3 " + " ".join(map(str, f)) for f in ball.faces]
    else:
        lines = [
            "o ball",
            *(f"v {p}" for p in points),
            *("f " + " ".join(f"{i + 1}//{i + 1}" for i in f) for f in ball.faces),
        ]
    (tmp_path / f"ball.{form}").write_text("\n".join(lines))
    found = read_mesh(tmp_path / f"ball.{form}")
    np.testing.assert_allclose(found.vertices, ball.vertices, atol=1e-8)
    assert np.array_equal(found.faces, ball.faces)
    (tmp_path / f"bad.{form}").write_text("OFF\n3 1" if form == "off" else "v 1 2 3\nf 1 2 3 4")
    with pytest.raises(UserError, match="mesh"):
        read_mesh(tmp_path / f"bad.{form}")


def test_meshes_whose_spectrum_means_nothing_are_refused():
    ball = sphere(1)
    twice = Mesh(
        np.concatenate([ball.vertices, ball.vertices + 5]),
        np.concatenate([ball.faces, ball.faces + len(ball.vertices)]),
    )
    with pytest.raises(UserError, match="2 components"):
        computed(twice.normalised(), 10, 10)
    with pytest.raises(UserError, match="belong to no face"):
        computed(Mesh(np.concatenate([ball.vertices, [[9, 9, 9]]]), ball.faces), 10, 10)


def test_a_view_shows_the_nearest_surface_and_a_camera_takes_points_back():
    ball = sphere(3)
    camera = camera_around(np.zeros(3), 4.0, 30.0, 20.0, 40.0, 65)
    view = seen(ball, camera)
    assert view.depth[32, 32] == pytest.approx(3, abs=0.02), "its near side"
    assert view.covered.mean() == pytest.approx(
        math.pi * (4 / 15**0.5 / 4 / math.tan(math.radians(20))) ** 2 / 4, abs=0.02
    )
    rows, columns = np.nonzero(view.covered)
    points = camera.unprojected(np.stack([rows, columns], 1) + 0.5, view.depth[rows, columns])
    assert np.abs(np.linalg.norm(points, axis=1) - 1).max() < 0.02
    again = camera.projected(points)
    np.testing.assert_allclose(again[:, :2], np.stack([rows, columns], 1) + 0.5, atol=1e-6)
    up = camera.projected(np.array([[0, 0.5, 0], [0, -0.5, 0]]))
    assert up[0, 0] < up[1, 0], "the first row is the upper one"
    assert drawn(ball, place_colours(ball.vertices), 32).shape == (3, 32, 32)


# ---- maps ----------------------------------------------------------------------------------------------------------


def test_a_zero_eigenvalue_is_zero_and_true_maps_match(pair: tuple[Shape, Shape]):
    one, two = pair
    assert one.evals[0] == 0 and one.evals[1] > 1
    found = errors(direct(true_map(one, two, 20), one, two), one.mesh, two.mesh)
    assert found.mean() < 0.06 and errors(torch.arange(642), one.mesh, two.mesh).max() == 0


def test_a_map_of_all_points_by_least_squares_is_that_by_mass(pair: tuple[Shape, Shape]):
    one, two = pair
    points = torch.arange(642)
    by_mass = map_of_points(points, one.basis, two.basis, two.mass, K)
    some = spread_vertices(two.mesh, 300)
    few = map_of_points(points[: len(some)], one.basis[some], two.basis[some], None, K)
    assert (by_mass - few).abs().max() < 0.25
    itself = map_of_points(points, one.basis, one.basis, None, K)
    torch.testing.assert_close(itself, torch.eye(K), atol=1e-4, rtol=0)


def test_a_mask_of_the_prior_is_large_where_true_maps_are_not(pair: tuple[Shape, Shape]):
    one, two = pair
    spec = MatchSpec(features="waves_places", draws=400, weight=0.1)
    torch.manual_seed(0)
    found = PairFit(one, two, spec, K, band).result()
    assert found.mask is not None and mask_contrast(found.mask) > 1.1 and float(found.mask.max()) == 1
    error = {
        name: errors(direct(c, one, two), one.mesh, two.mesh).mean()
        for name, c in (("raw", found.raw), ("masked", found.masked))
    }
    assert error["masked"] < error["raw"]


@pytest.mark.parametrize("mask", ["laplacian", "resolvent", "none"])
def test_axiomatic_masks_are_those_of_eigenvalues(mask: str, pair: tuple[Shape, Shape]):
    spec = MatchSpec(features="waves_places", mask=mask)
    found = PairFit(*pair, spec, K, band).result()
    if mask == "none":
        assert found.mask is None and torch.equal(found.raw, found.masked)
    else:
        assert found.mask is not None and found.mask.shape == (K, K)
        assert not torch.equal(found.raw, found.masked)


def test_relative_weights_do_not_depend_on_the_scale_of_features(pair: tuple[Shape, Shape]):
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(K, 30, generator=draw), torch.randn(K, 30, generator=draw)
    for relative in (True, False):
        spec = MatchSpec(mask="resolvent", relative=relative)
        one, ten = (solved(spec, s * a, s * b, *pair, band).masked for s in (1.0, 10.0))
        assert torch.allclose(one, ten, atol=1e-5) == relative
    raw = solved_map(a.double(), b.double(), ridge=1e-6).float()
    torch.testing.assert_close(solved(MatchSpec(mask="none"), a, b, *pair, band).raw, raw)


def test_features_do_not_depend_on_the_signs_of_eigenvectors(pair: tuple[Shape, Shape]):
    one = pair[0]
    torch.manual_seed(0)
    net = DiffusionNet(8, 12, 2, 30, 0.5).eval()
    with torch.no_grad():
        for block in net.blocks:
            block.times.fill_(0.05)
        signs = torch.where(torch.arange(30) % 2 == 0, 1.0, -1.0)
        turned = Shape(**{**vars(one), "basis": one.basis * signs})
        torch.testing.assert_close(net(turned), net(one), atol=1e-4, rtol=0)


def test_a_step_moves_the_network_and_every_term_counts(pair: tuple[Shape, Shape]):
    spec = MatchSpec(draws=8, few=80, network={"width": 8, "depth": 1, "outputs": 12})
    torch.manual_seed(0)
    for weights in ({}, {"proper": 0.0}, {"score": 0.0}, {"orthogonal": 1.0, "bijective": 1.0, "commuting": 1.0}):
        fit = PairFit(*pair, spec.model_copy(update=weights), K, band)
        before = [p.clone() for p in fit.network.parameters()]
        terms = fit.step(0)
        assert {k for k, v in weights.items() if v} <= set(terms) and not {
            k for k, v in weights.items() if not v
        } & set(terms)
        assert any(not torch.equal(a, b) for a, b in zip(before, fit.network.parameters()))
    assert not PairFit(*pair, spec.model_copy(update={"proper": 0.0, "score": 0.0}), K, band).learns


# ---- denoisers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mlp", "dit"])
@pytest.mark.parametrize("noise", ["edm", "released"])
def test_a_denoiser_learns_and_begins_as_the_identity_of_its_noise(form: str, noise: str):
    spec = DenoiserSpec(form=form, noise=noise, width=24, depth=1, heads=2)
    torch.manual_seed(0)
    model = spec.build(K)
    x, sigma = torch.randn(3, 1, K, K), torch.tensor([0.1, 1.0, 5.0])
    kept = 0.25**2 / (sigma**2 + 0.25**2) if noise == "edm" else torch.ones(3)
    torch.testing.assert_close(model(x, sigma), kept.view(3, 1, 1, 1) * x)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    target, losses = torch.eye(K).expand(16, 1, K, K), []
    for _ in range(60):
        loss = model.loss(target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert np.mean(losses[-15:]) < 0.92 * np.mean(losses[:15])


def test_the_average_of_weights_begins_fast():
    spec = DenoiserSpec(batch_size=10, half_life=1000, ramp=0.05)
    assert average_decay(spec, 0) < 1e-3 and average_decay(spec, 10**6) == pytest.approx(0.5**0.01)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"denoiser": {"form": "dit", "patch": 3}}, "does not divide"),
        ({"size": 40}, "must be below shapes.eigenpairs"),
        ({"shapes.pairs": [["a", "a"]]}, "with itself"),
        ({"match.network": {"outputs": 4}}, "must be at least size"),
    ],
)
def test_mistakes_get_a_sentence(keys: dict[str, Any], sentence: str, tmp_path: Path):
    with pytest.raises(UserError, match=sentence):
        execute(settings(**keys), tmp_path / "run", cpu=True)


def test_a_mesh_that_is_not_there_is_named(tmp_path: Path):
    np.savez(tmp_path / "ball.npz", vertices=sphere(1).vertices, faces=sphere(1).faces)
    with pytest.raises(UserError, match="it has ball"):
        named_mesh(str(tmp_path), "bal", tmp_path)


# ---- runs ----------------------------------------------------------------------------------------------------------


def settings(**keys: Any) -> Config:
    config = recipe.validate(
        {
            "method": "diffumatch",
            "shapes": {
                "source": "ellipsoids",
                "train": ["1", "2", "3"],
                "pairs": keys.pop("shapes.pairs", [["4", "5"]]),
                "eigenpairs": 24,
            },
            "size": K,
            "denoiser": {"width": 24, "depth": 1, "steps": 12},
            "match": {
                "steps": 4,
                "draws": 8,
                "few": 80,
                "refined": 15,
                "network": {"width": 8, "depth": 1, "outputs": 12, **keys.pop("match.network", {})},
            },
            "masks": None,
            **keys,
        }
    )
    assert isinstance(config, Config)
    return config


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.getbasetemp() / "diffumatch_cache"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("diffumatch") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.getbasetemp() / "diffumatch_cache"))
        masks = {"weights": [0.1], "refined": 15, "ellipsoids": 1}
        return folder, execute(settings(masks=masks), folder, cpu=True)


def test_a_run_matches_its_pairs_and_shows_them(finished: tuple[Path, dict[str, float]]):
    folder, figures = finished
    assert all(math.isfinite(v) for v in figures.values()) and figures["geodesic_error"] < 0.4
    assert figures["none_over_diffusion"] > 0 and figures["transfer_gain"] > 0
    shown = json.loads((folder / "pictures" / "pictures.json").read_text())["samples"]
    assert set(shown[0]["shown"]) == {"truth", "student", "before the fit", "mask"}
    assert "proper" in (folder / "metrics.csv").read_text()


def test_a_product_matches_two_files(finished: tuple[Path, dict[str, float]], tmp_path: Path):
    folder, _ = finished
    product = load_product(folder)
    assert isinstance(product, ShapeMatcher) and product.matches["4", "5"].shape == (642,)
    for name in ("6", "7"):
        mesh = deformed_ellipsoid(name)
        np.savez(tmp_path / f"{name}.npz", vertices=mesh.vertices, faces=mesh.faces)
    files = [str(tmp_path / f"{name}.npz") for name in ("6", "7")]
    lines = list(predict(folder, files, tmp_path / "found"))
    again = json.loads((tmp_path / "found" / "predictions.jsonl").read_text())
    assert lines[0].startswith("7-6: 642 vertices") and len(again["points"]) == 642
    assert (tmp_path / "found" / "7-6.png").is_file() and len(again["map"]) == K
    shapes = [product.shape(deformed_ellipsoid(name), name) for name in ("6", "7")]
    assert product.matched(*shapes)[1].tolist() == again["points"], "a match is a function of the pair"
    with pytest.raises(UserError, match="matches two meshes"):
        list(predict(folder, files[:1]))
    assert np.load(export(folder, "matches", tmp_path / "matches") / "5-4.npy").shape == (642,)


def test_an_interrupted_fit_resumes_to_the_same_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = loop.loop
    monkeypatch.setattr(staging, "loop", lambda *a, **k: plain(*a, **{**k, "log_every": 1, "checkpoint_seconds": 0.0}))
    config = settings(**{"shapes.pairs": [["4", "5"], ["6", "7"]]})
    execute(config, tmp_path / "whole", cpu=True)
    true, done = PairFit.step, []

    def failing(self: PairFit, i: int) -> dict[str, torch.Tensor]:
        done.append(i)
        if len(done) == 7:
            raise RuntimeError("power")
        return true(self, i)

    monkeypatch.setattr(PairFit, "step", failing)
    with pytest.raises(RuntimeError, match="power"):
        execute(config, tmp_path / "run", cpu=True)
    monkeypatch.setattr(PairFit, "step", true)
    execute(config, tmp_path / "run", cpu=True)
    whole, again = (load_product(tmp_path / name) for name in ("whole", "run"))
    assert done == [0, 1, 2, 3, 0, 1, 2]
    assert all(torch.equal(whole.matches[k], again.matches[k]) for k in whole.matches)
    weights = (whole.module.state_dict(), again.module.state_dict())
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_a_laplacian_has_rows_that_sum_to_nothing():
    weak, mass = laplacian(deformed_ellipsoid("a").normalised())
    assert abs(weak.sum(1)).max() < 1e-9 and mass.sum() == pytest.approx(1, rel=1e-6)

"""DistillDIFT: losses of similarity maps, adapters, points by depth, a run that resumes, a product that matches two
images."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.methods.correspondence.distilldift import Config, ImageMatcher, method
from stillhouse.methods.correspondence.distilldift.adapters import QueryValueAdapter, adapted, merge
from stillhouse.methods.correspondence.distilldift.losses import (
    blur_loss,
    blurred,
    cells,
    concatenated,
    correspondences,
    distillation_loss,
    nearest_cells,
    neighbours,
    row_cross_entropy,
    rows,
    soft_argmax_loss,
    within,
)
from stillhouse.methods.correspondence.distilldift.networks import (
    DenoisingUNet,
    PatchNetwork,
    StemSpec,
    view_invariance,
)
from stillhouse.methods.correspondence.distilldift.views import (
    Pictures,
    ViewsSpec,
    bodies,
    matched_pixels,
    reach_of,
    rendered,
    test_pairs,
)
from stillhouse.runs import recipe, staging
from stillhouse.runs.execution import execute
from stillhouse.runs.prediction import predict
from stillhouse.runs.products import load_product
from stillhouse.training import loop

chosen_pairs = test_pairs
del test_pairs  # whose name is that of a test


def maps(seed: int, channels: int = 6, side: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    one, two = torch.randn(2, 2, channels, side, side, generator=draw)
    return one, two


# ---- losses --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_divergence_of_rows_up_to_the_teachers_entropy():
    student, teacher, tau = maps(0), maps(1, 9), 0.2
    s = [F.normalize(f.flatten(2).transpose(1, 2), dim=-1) for f in student]
    t = [F.normalize(f.flatten(2).transpose(1, 2), dim=-1) for f in teacher]
    p, q = (t[0] @ t[1].mT / tau).softmax(-1), (s[0] @ s[1].mT / tau).softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean()
    entropy = -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, tau), divergence + entropy)


def test_rows_in_parts_give_the_same_loss_and_gradient():
    student, teacher = [f.requires_grad_() for f in maps(0)], maps(1)
    found = []
    for at_once in (16, 5):
        loss = row_cross_entropy(tuple(map(rows, student)), tuple(map(rows, teacher)), 0.1, at_once)
        found.append((loss, *torch.autograd.grad(loss, student)))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", ["paper", "official", "sce"])
def test_every_form_is_least_for_the_teachers_own_similarities_and_teaches(form: str):
    teacher = maps(1)
    own = distillation_loss(teacher, teacher, 0.1, form)
    rotated = [torch.einsum("bchw,dc->bdhw", f, torch.linalg.qr(torch.randn(6, 6))[0]) for f in teacher]
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(6, 6))[0]
    rotated = tuple(torch.einsum("bchw,dc->bdhw", 3 * f, turn) for f in teacher)
    torch.testing.assert_close(distillation_loss(rotated, teacher, 0.1, form), own, msg="features may turn and scale")
    student = nn.Parameter(torch.stack(maps(0)))
    optimizer, losses = torch.optim.Adam([student], lr=0.05), []
    for _ in range(40):
        loss = distillation_loss((student[0], student[1]), teacher, 0.1, form)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert float(own) < losses[-1] < losses[0]


def test_zero_features_and_a_cold_temperature_are_finite():
    student = tuple(f.requires_grad_() for f in (torch.zeros(1, 3, 2, 2), torch.randn(1, 3, 2, 2)))
    loss = distillation_loss(student, maps(0, 3, 2), 0.001)
    loss.backward()
    assert loss.isfinite() and all(f.grad.isfinite().all() for f in student)
    with pytest.raises(UserError, match="above 0"):
        distillation_loss(student, maps(0, 3, 2), 0.0)


def test_teachers_weigh_alike_whatever_their_scale_and_size():
    one, two = maps(0)[0], maps(1, 5, 8)[0]
    a = concatenated([one, two], (4, 4), "channels")
    torch.testing.assert_close(concatenated([100 * one, two], (4, 4), "channels"), a)
    assert a.shape == (2, 11, 4, 4)
    torch.testing.assert_close(a[:, :6].norm(dim=1), torch.ones(2, 4, 4))
    assert not torch.allclose(concatenated([one, two], (4, 4), "width"), a)


def test_points_far_off_are_in_the_nearest_cell():
    places = cells(torch.tensor([[[0.0, 0.0], [99.0, 49.0], [50.0, 25.0]]]), (100, 50), (10, 5))
    assert nearest_cells(places, (10, 5)).tolist() == [[0, 49, 27]]  # 2.5 rounds to even


def test_losses_of_points_are_0_where_features_tell_them_apart_and_count_only_visible_points():
    cell = torch.eye(16).view(1, 16, 4, 4)
    index = torch.tensor([[5, 10]])
    places = torch.tensor([[[1.0, 1.0], [2.0, 2.0]]])
    assert soft_argmax_loss(cell, cell, index, places, 1000.0) < 1e-6
    wrong = places.clone()
    wrong[0, 1] = 0
    assert soft_argmax_loss(cell, cell, index, wrong, 1000.0) == pytest.approx(2)
    counted = torch.tensor([[True, False]])
    assert soft_argmax_loss(cell, cell, index, wrong, 1000.0, counted) < 1e-6
    assert soft_argmax_loss(cell, cell, index, wrong, 1000.0, ~counted & counted) == 0
    assert blur_loss(cell, cell, index, index, 0.01, 1) < 1e-6
    torch.testing.assert_close(blurred(torch.tensor([[14, 21]]), (6, 6), 3).sum((2, 3)), torch.ones(1, 2))
    with pytest.raises(UserError, match="needs a grid"):
        blurred(index, (4, 4), 9)


def test_points_are_found_again_where_an_image_was_moved():
    draw = torch.Generator().manual_seed(0)
    source = torch.randn(1, 8, 12, 12, generator=draw)
    target = source.roll((2, -3), (2, 3))
    points = torch.tensor([[[20.0, 40.0], [31.0, 22.0]]])
    wanted = points + torch.tensor([8.0, -12.0])
    for window, reach in ((0, 2.0), (5, 2.0)):
        found = correspondences(source, target, points, ((48, 48), (48, 48)), window)
        assert within(found, wanted, reach).all()


def test_neighbours_leave_the_image_itself_out():
    embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    assert neighbours(embeddings, 1).flatten().tolist() == [1, 0, 3, 2]
    with pytest.raises(UserError, match=r"Lower distil\.neighbours"):
        neighbours(embeddings, 4)


# ---- networks ------------------------------------------------------------------------------------------------------


def vit() -> PatchNetwork:
    torch.manual_seed(0)
    return PatchNetwork(ModelSpec(model="stillhouse:vit", options={"patch": 8, "dim": 16, "depth": 2, "heads": 2}), 32)


def test_adapters_begin_at_nothing_train_alone_and_merge():
    student, images = vit().eval(), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    before = student(images)
    assert before.shape == (2, 16, 4, 4)
    assert adapted(student, 4, 0.5) == 2
    student.eval()
    torch.testing.assert_close(student(images), before)
    trained = [n for n, p in student.named_parameters() if p.requires_grad]
    assert len(trained) == 8 and all("linear_" in n for n in trained)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "linear_b" in name:
                p.normal_(std=0.3)
    changed = student(images)
    assert not torch.allclose(changed, before)
    merge(student)
    assert not any(isinstance(m, QueryValueAdapter) for m in student.modules())
    torch.testing.assert_close(student(images), changed, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="`qkv` layers"):
        adapted(nn.Linear(2, 2), 4, 0.0)


def test_a_stem_gives_the_patches_and_is_saved_with_the_network(tmp_path: Path):
    stem = StemSpec(network=ModelSpec(model="timm:tf_efficientnet_lite0"), blocks=3)
    model = ModelSpec(model="stillhouse:vit", options={"patch": 8, "dim": 16, "depth": 1, "heads": 2})
    torch.manual_seed(0)
    student = PatchNetwork(model, 32, stem=stem)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    before = [b.clone() for b in student.buffers()]
    assert student.train()(images).shape == (2, 16, 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(before, student.buffers())), "statistics of norms stay"
    ImageMatcher(student.eval(), model, 0, stem).save(tmp_path)
    again = ImageMatcher.load(tmp_path)
    torch.testing.assert_close(again.module(images), student(images))
    with pytest.raises(UserError, match="gives 1 patches, where the network has 16"):
        PatchNetwork(model, 32, stem=stem.model_copy(update={"blocks": 6}))
    with pytest.raises(UserError, match="no conv_stem"):
        PatchNetwork(model, 32, stem=StemSpec(network=ModelSpec(model="stillhouse:resnet20")))


def test_patches_learn_to_find_their_moved_copies():
    student, head = vit(), nn.Linear(16, 16)
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    optimizer, losses = torch.optim.AdamW([*student.parameters(), *head.parameters()], lr=3e-3), []
    for _ in range(50):
        loss = view_invariance(student, head, images, 8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_a_denoiser_has_features_of_a_quarter_of_the_size():
    net = DenoisingUNet(8)
    raw, features = net.both(torch.randn(2, 3, 16, 16), torch.zeros(2))
    assert raw.shape == (2, 3, 16, 16) and features.shape == (2, 16, 4, 4)
    assert net.loss(torch.randn(2, 3, 16, 16)).isfinite()


# ---- views ---------------------------------------------------------------------------------------------------------


def spec() -> ViewsSpec:
    return ViewsSpec(
        source="ellipsoids", train=["a", "b"], test=["c", "d"], side=48, train_views=3, test_views=6, pairs=6, points=40
    )


def views(train: bool) -> Pictures:
    return rendered(spec(), bodies(spec(), Path(), train), train)


def test_points_that_depth_gives_are_the_same_places_of_a_body():
    pictures = views(True)
    assert len(pictures) == 6 and pictures.images.shape == (6, 3, 48, 48)
    torch.manual_seed(0)
    one, two = torch.tensor([0, 3, 1]), torch.tensor([0, 4, 2])
    here, there, counted = matched_pixels(pictures, one, two, 50, 0.03)
    torch.testing.assert_close(there[0], here[0], atol=1e-3, rtol=0)
    assert counted[0].all(), "an image with itself"
    for i in range(3):
        known = pictures.visible[one[i]] & pictures.visible[two[i]]
        a, b = pictures.points[one[i]][known], pictures.points[two[i]][known]
        near = torch.cdist(here[i][counted[i]], a)
        if near.numel():
            close = near.min(1)
            some = close.values < 1.0
            assert (there[i][counted[i]][some] - b[close.indices[some]]).norm(dim=-1).lt(3.5).all()


def test_pairs_are_of_two_bodies_that_show_common_points():
    pictures = views(False)
    pairs = chosen_pairs(pictures, spec())
    one, two = pairs.T
    assert (pictures.body[one] != pictures.body[two]).all()
    assert ((pictures.visible[one] & pictures.visible[two]).sum(1) >= 6).all()
    assert torch.equal(pairs, chosen_pairs(pictures, spec()))
    depth = torch.zeros(1, 9, 9)
    depth[0, 2:5, 1:8] = 1
    assert reach_of(depth).tolist() == [7]


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.getbasetemp() / "distilldift_cache"))


def settings(**keys: Any) -> Config:
    config = recipe.validate(
        {
            "method": "distilldift",
            "views": spec().model_dump(),
            "geometry": {"side": 16, "width": 8, "steps": 4, "batch_size": 4},
            "student": {
                "network": {"model": "stillhouse:vit", "options": {"patch": 8, "dim": 16, "depth": 1, "heads": 2}},
                "start": {"steps": 4, "batch_size": 4},
                **keys.pop("student", {}),
            },
            "distil": {"steps": 4, "batch_size": 2, **keys.pop("distil", {})},
            "refine": {"steps": 3, "batch_size": 2, "points": 8},
            **keys,
        }
    )
    assert isinstance(config, Config)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("distilldift") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.getbasetemp() / "distilldift_cache"))
        return folder, execute(settings(), folder, cpu=True)


def test_a_run_judges_student_and_teachers_and_shows_points(finished: tuple[Path, dict[str, float]]):
    folder, figures = finished
    assert all(math.isfinite(v) for v in figures.values())
    assert {"pck", "pck_start", "pck_distilled", "pck_geometry", "pck_semantics", "pck_teachers"} <= set(figures)
    shown = json.loads((folder / "pictures" / "pictures.json").read_text())["samples"]
    assert set(shown[0]["shown"]) == {"truth", "student", "teachers", "before"}


def test_a_product_matches_two_images(finished: tuple[Path, dict[str, float]], tmp_path: Path):
    product = load_product(finished[0])
    assert isinstance(product, ImageMatcher)
    draw = np.random.default_rng(0)
    for name, size in (("one", (40, 60)), ("two", (64, 48))):
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in ("one", "two")]
    assert next(iter(predict(finished[0], files, tmp_path / "found"))).startswith("one-two: 100 points")
    found = json.loads((tmp_path / "found" / "predictions.jsonl").read_text())
    places = np.array(found["places"])
    assert places.shape == (100, 2) and (places >= -0.5).all() and (places <= [64, 48]).all()
    with pytest.raises(UserError, match="matches two images"):
        list(predict(finished[0], files[:1]))


@pytest.mark.parametrize(
    "keys",
    [
        {"distil": {"loss": "features", "cached": False}, "refine": None},
        {"distil": {"pairs": "retrieved", "neighbours": 2, "form": "sce"}, "student": {"trains": "all", "start": None}},
        {"teachers": ["geometry"], "refine": {"steps": 2, "batch_size": 2, "points": 8, "loss": "blur", "kernel": 3}},
    ],
)
def test_its_other_ways_run(keys: dict[str, Any], tmp_path: Path):
    figures = execute(settings(**keys), tmp_path / "run", cpu=True)
    assert math.isfinite(figures["pck"]) and ("pck_semantics" in figures) == (keys.get("teachers") is None)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"distil": {"tau": 0.0}}, r"distil\.tau must be above 0"),
        ({"teachers": ["geometry", "geometry"]}, "one teacher twice"),
        ({"distil": {"pairs": "retrieved", "neighbours": 6}}, r"Lower distil\.neighbours"),
    ],
)
def test_mistakes_get_a_sentence(keys: dict[str, Any], sentence: str, tmp_path: Path):
    with pytest.raises(UserError, match=sentence):
        execute(settings(**keys), tmp_path / "run", cpu=True)


def test_an_interrupted_run_resumes_to_the_same_network(
    finished: tuple[Path, dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = loop.loop
    monkeypatch.setattr(staging, "loop", lambda *a, **k: plain(*a, **{**k, "log_every": 1, "checkpoint_seconds": 0.0}))
    true, done = method._update, []
    for power in (3, 6):  # in the distillation, in the refinement

        def failing(*given: Any, power: int = power) -> None:
            done.append(1)
            if len(done) == power:
                raise RuntimeError("power")
            true(*given)

        monkeypatch.setattr(method, "_update", failing)
        with pytest.raises(RuntimeError, match="power"):
            execute(settings(), tmp_path / "run", cpu=True)
    monkeypatch.setattr(method, "_update", true)
    execute(settings(), tmp_path / "run", cpu=True)
    whole, again = (load_product(path).module.state_dict() for path in (finished[0], tmp_path / "run"))
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_pictures_move_as_one():
    pictures = views(True)
    assert isinstance(pictures.to(torch.device("cpu")), Pictures)
    assert set(pictures.arrays()) == {*pictures.__dataclass_fields__}

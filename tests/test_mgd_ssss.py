"""MGD: masks of CutMix, the terms of image, region and pixels, hard pixels, what teachers are read for, a run with two
unlabelled streams that resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec
from stillhouse.data import Streams
from stillhouse.errors import UserError
from stillhouse.methods.dense.mgd_ssss import (
    SECOND,
    Config,
    CrossPseudo,
    Mixing,
    MultiGranularity,
    Outputs,
    Rules,
    affinity,
    at_labels,
    box_masks,
    hard_pixel_loss,
    image_loss,
    mixed,
    pixel_loss,
    region_loss,
    terms_of,
)
from stillhouse.models import build
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.run import Run
from stillhouse.tasks.segmentation import Segmentation
from stillhouse.training.context import Progress

SPAN = Progress(epoch=0, epochs=1, steps_per_epoch=1)
TASK = Segmentation(("a", "b", "c"), (32, 32), (0.0,) * 3, (1.0,) * 3)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---- mixing ----------------------------------------------------------------------------------------------------------


def test_boxes_cover_their_area_and_flip_where_they_overlap() -> None:
    one = box_masks(rand(50, 1), rand(50, 1, seed=1), rand(50, 1, 2, seed=2), (64, 48))
    assert one.shape == (50, 1, 64, 48) and bool(((one == 0) | (one == 1)).all())
    share = one.mean((1, 2, 3))
    assert bool((share > 0.23).all()) and bool((share < 0.52).all())
    twice = box_masks(torch.full((1, 2), 0.5), torch.full((1, 2), 0.5), torch.full((1, 2, 2), 0.3), (64, 48))
    assert float(twice.sum()) == 0, "two boxes at one place flip it back"


def test_a_mask_takes_each_pixel_from_one_image() -> None:
    a, b = rand(2, 3, 8, 8), rand(2, 3, 8, 8, seed=1)
    mask = (rand(2, 1, 8, 8, seed=2) > 0.5).float()
    both = mixed(a, b, mask)
    assert torch.equal(both, a * (1 - mask) + b * mask)
    assert torch.equal(mixed(a, b, torch.zeros_like(mask)), a)


@pytest.mark.parametrize(
    ("second", "mask", "sentence"),
    [
        (rand(2, 3, 8, 6), torch.zeros(2, 1, 8, 8), "cannot be mixed"),
        (rand(2, 3, 8, 8), torch.zeros(2, 8, 8), "cannot be mixed"),
        (rand(2, 3, 8, 8), torch.full((2, 1, 8, 8), 0.5), "holds 0 and 1 alone"),
    ],
)
def test_what_cannot_be_mixed_gets_a_sentence(second: torch.Tensor, mask: torch.Tensor, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        mixed(rand(2, 3, 8, 8), second, mask)


# ---- terms -----------------------------------------------------------------------------------------------------------


def test_the_image_term_is_a_sum_over_images_and_classes() -> None:
    teacher = rand(3, 5, 6, 6)
    assert float(image_loss(teacher + 0.5, teacher)) == pytest.approx(3 * 5 * 0.5, rel=1e-5)
    assert float(image_loss(teacher + 0.5, teacher, "mean")) == pytest.approx(0.5, rel=1e-5)
    with pytest.raises(UserError, match="must be alike"):
        image_loss(rand(3, 4, 6, 6), teacher)


def test_affinities_are_cosines_whatever_the_channels_and_dead_features_are_no_nan() -> None:
    maps = rand(2, 8, 14, 14).requires_grad_()
    found = affinity(maps)
    assert found.shape == (2, 49, 49)
    torch.testing.assert_close(found.diagonal(dim1=1, dim2=2), torch.ones(2, 49))
    assert float(region_loss(maps, 3 * torch.cat([maps, maps], 1)).detach()) == pytest.approx(0, abs=1e-9)
    dead = torch.zeros(1, 4, 14, 14, requires_grad=True)
    region_loss(dead, rand(1, 8, 14, 14)).backward()
    assert dead.grad.isfinite().all()
    with pytest.raises(UserError, match=r"must be maps"):
        affinity(rand(2, 49, 8))


def test_ignored_pixels_count_for_nothing_and_all_ignored_is_zero() -> None:
    logits, labels = rand(2, 3, 4, 4).requires_grad_(), torch.full((2, 4, 4), -100)
    for loss in (pixel_loss(logits, labels), hard_pixel_loss(logits, labels)):
        loss.backward()
        assert float(loss.detach()) == 0 and bool((logits.grad == 0).all())


def test_hard_pixels_are_the_improbable_ones_and_the_fewest_at_least() -> None:
    logits = torch.zeros(1, 2, 2, 4)
    logits[:, 0] = torch.tensor([[0.0, 1, 2, 3], [4, 5, 6, 7]])
    labels = torch.zeros(1, 2, 4, dtype=torch.int64)
    each = F.cross_entropy(logits, labels, reduction="none").flatten()
    hard = each[(-each).exp() <= 0.7]
    assert 0 < len(hard) < 8
    assert float(hard_pixel_loss(logits, labels, fewest=1)) == pytest.approx(float(hard.mean()))
    assert float(hard_pixel_loss(logits, labels, fewest=5)) == pytest.approx(float(each[:5].mean()))
    assert float(hard_pixel_loss(logits, labels, fewest=100)) == pytest.approx(float(each.mean()))


def outputs(seed: int, channels: int = 4) -> Outputs:
    maps = [3 * rand(2, 3, 8, 8, seed=10 * seed + i) for i in range(4)]
    return Outputs(maps[0], maps[1], rand(2, channels, 7, 7, seed=seed), maps[2], maps[3])


def test_every_weight_reads_its_own_teacher_and_none_gets_a_gradient() -> None:
    mask, labels = (rand(2, 1, 8, 8) > 0.5).float(), torch.zeros(2, 8, 8, dtype=torch.int64)
    student, teachers = outputs(1), {"wide": outputs(2, 6), "deep": outputs(3, 5)}
    leaves = [t.requires_grad_() for o in teachers.values() for t in (o.labelled, o.mixed, o.features, o.first)]
    student.mixed.requires_grad_()
    terms = terms_of(student, teachers, labels, mask, Rules())
    assert list(terms) == ["supervised", "pixel_mixed", "pixel_labelled", "image", "region"]
    torch.stack(list(terms.values())).sum().backward()
    assert all(leaf.grad is None for leaf in leaves) and student.mixed.grad is not None
    pseudo = teachers["deep"].pseudo(mask)
    one = terms_of(student, {"deep": teachers["deep"]}, labels, mask, Rules(0, 0, teachers=("deep",)))
    torch.testing.assert_close(one["pixel_mixed"], F.cross_entropy(student.mixed, pseudo))
    assert list(terms_of(student, {}, labels, mask, Rules(0, 0, 0))) == ["supervised"]
    constants = terms_of(student, teachers, labels, mask, Rules(symmetric=True))
    assert float((constants["pixel_mixed"] - terms["pixel_mixed"]).detach()) > 0
    student.mixed.grad = None
    torch.stack(list(constants.values())).sum().backward()
    again = student.mixed.grad.clone()
    student.mixed.grad = None
    torch.stack(list(terms_of(student, teachers, labels, mask, Rules()).values())).sum().backward()
    torch.testing.assert_close(again, student.mixed.grad)


def test_maps_are_read_at_the_pixels_of_thinned_labels() -> None:
    maps = torch.arange(36.0).view(1, 1, 6, 6)
    assert torch.equal(at_labels(maps, torch.zeros(1, 6, 6)), maps)
    assert at_labels(maps, torch.zeros(1, 2, 2))[0, 0].tolist() == [[0, 3], [18, 21]]


# ---- modules ---------------------------------------------------------------------------------------------------------


def config(**keys: Any) -> Config:
    net = {"model": "stillhouse:pyramid_segmenter", "options": {"backbone": "lcnet_050", "strides": [4, 8], "width": 8}}
    train = {"epochs": 1, "batch_size": 2, "optimizer": {"name": "adamw", "lr": 1e-3}}
    found = recipe.validate(
        {
            "method": "mgd_ssss",
            "data": {"name": "masks:little", "size": 4, "unlabelled": {}, "options": {"classes": ["a", "b", "c"]}},
            "student": net,
            "deep": {**net, "options": {**net["options"], "strides": [4, 8, 16]}, "train": train},
            "wide": {**net, "options": {**net["options"], "width": 16}, "train": train},
            "train": {**train, "epochs": 2},
            "evaluate": ["segmentation"],
            **keys,
        }
    )
    assert isinstance(found, Config)
    return found


def network(spec: ModelSpec, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build(ModelSpec(model=spec.model, options=spec.options), 3, (3, 32, 32))


def batch() -> dict[str, Any]:
    images = [rand(2, 3, 32, 32, seed=s) for s in range(3)]
    label = (3 * rand(2, 32, 32, seed=9)).long()
    return {"input": images[0], "label": label, "unlabelled": {"input": images[1]}, SECOND: {"input": images[2]}}


@pytest.mark.parametrize("moving", [False, True])
def test_teachers_are_frozen_and_their_statistics_move_only_where_asked(moving: bool) -> None:
    settings = config(teacher_train_bn=moving)
    teachers = {n: network(getattr(settings, n), i) for i, n in enumerate(("wide", "deep"))}
    module = MultiGranularity(network(settings.student, 5), teachers, TASK, settings)
    module.build(batch())
    before = {n: {k: v.clone() for k, v in t.state_dict().items()} for n, t in teachers.items()}
    module.train()
    terms = module(batch(), SPAN)
    assert set(terms) == {"loss", "supervised", "pixel_mixed", "pixel_labelled", "image", "region"}
    terms["loss"].backward()
    for name, teacher in teachers.items():
        assert all(p.grad is None for p in teacher.parameters())
        weights = {k: v for k, v in teacher.state_dict().items() if "running" not in k and "num_batches" not in k}
        assert all(torch.equal(v, before[name][k]) for k, v in weights.items())
        same = all(torch.equal(v, before[name][k]) for k, v in teacher.state_dict().items() if "running" in k)
        assert same != moving
    assert len(module.state_dict()) == len(module.student.state_dict()), "teachers are in no checkpoint"
    module.close()


def test_a_student_that_is_its_teacher_is_refused() -> None:
    settings = config()
    one = network(settings.student, 0)
    with pytest.raises(UserError, match="a teacher itself"):
        MultiGranularity(one, {"deep": one}, TASK, settings)


def test_copies_learn_from_each_other_and_one_alone_from_masks() -> None:
    settings = config()
    copies = [network(settings.deep, s) for s in (0, 1)]
    both = CrossPseudo(copies[0], copies[1], TASK, settings, 1.0)
    terms = both(batch(), SPAN)
    assert float(terms["cross"].detach()) > 0
    terms["loss"].backward()
    assert all(any(p.grad is not None for p in c.parameters()) for c in copies)
    assert list(CrossPseudo(copies[0], None, TASK, settings, 0.0)(batch(), SPAN)) == ["loss", "supervised"]


def test_mixing_draws_by_torchs_generator() -> None:
    mix = Mixing(3, (0.25, 0.5))
    found = []
    for _ in range(2):
        torch.manual_seed(4)
        found.append(mix(batch()))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    _, second, mask, both = found[0]
    assert torch.equal(both[mask.expand_as(both) > 0], second[mask.expand_as(both) > 0])


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"data": {"name": "masks:little"}}, "set data.unlabelled"),
        ({"area": [0.5, 0.2]}, "the smaller first"),
    ],
)
def test_mistakes_in_a_recipe_get_a_sentence(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        config(**keys)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three colours, whose masks are the colours."""
    root, draw = tmp_path_factory.mktemp("mgd"), np.random.default_rng(0)
    colors = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
    for split, count in (("train", 14), ("test", 4)):
        for kind in ("images", "labels"):
            (root / "little" / split / kind).mkdir(parents=True)
        for i in range(count):
            mask = np.kron(draw.integers(0, 3, (2, 2)), np.ones((16, 16), int)).astype(np.uint8)
            image = np.clip(colors[mask] + draw.normal(0, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / "little" / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(root / "little" / split / "labels" / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.getbasetemp() / "mgd_cache"))


def test_both_unlabelled_batches_come_in_orders_of_their_own_and_from_any_start(data: Path) -> None:
    settings = config()
    run = Run(None, settings, data_root=str(data), cpu=True)
    both = run.streams(settings.data, 2, second=SECOND)
    assert isinstance(both, Streams) and len(both) == 5
    whole = list(both.batches(epochs=2))
    first, second = (torch.cat([b[n]["index"] for b in whole]) for n in ("unlabelled", SECOND))
    assert not torch.equal(first, second) and sorted(first[:10].tolist()) == sorted(second[:10].tolist())
    assert "label" not in whole[0][SECOND] and "label" in whole[0]
    later = list(run.streams(settings.data, 2, second=SECOND).batches(*divmod(7, 5), epochs=2))
    assert torch.equal(later[0][SECOND]["input"], whole[7][SECOND]["input"]) and len(later) == 3


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.getbasetemp() / "mgd_cache"))
        folder = tmp_path_factory.mktemp("run") / "run"
        return folder, execute(config(), folder, data_root=str(data), cpu=True)


def test_a_run_trains_both_teachers_and_leaves_the_student_alone(finished: tuple[Path, dict[str, float]]) -> None:
    folder, figures = finished
    assert {"miou", "miou_deep", "miou_wide", "affinity_error", "evidence_error", "teachers_differ"} <= set(figures)
    product = load_product(folder)
    assert len(product.module.lateral) == 2
    assert product.predict([torch.zeros(3, 32, 32, dtype=torch.uint8)])[0]["classes"].shape == (32, 32)
    meta = json.loads((folder / "product" / "product.json").read_text())
    assert "layer" not in meta["model"]


def test_a_killed_run_resumes_to_the_same_student(
    finished: tuple[Path, dict[str, float]], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, figures = finished
    true, done = MultiGranularity.forward, []

    def failing(self: Any, *given: Any) -> Any:
        done.append(1)
        if len(done) == 8:
            raise RuntimeError("power")
        return true(self, *given)

    monkeypatch.setattr(MultiGranularity, "forward", failing)
    keys = {"train": {**config().train.model_dump(), "checkpoint_seconds": 0.0, "log_every": 1}}
    with pytest.raises(RuntimeError, match="power"):
        execute(config(**keys), tmp_path / "run", data_root=str(data), cpu=True)
    again = execute(config(**keys), tmp_path / "run", data_root=str(data), cpu=True)
    assert len(done) == 8 + 10 - 7 and again["miou"] == figures["miou"]
    a, b = (load_product(f).module.state_dict() for f in (folder, tmp_path / "run"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_masks_alone_train_no_teacher_and_one_teacher_trains_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    for name, keys, stages in (("alone", {"pixel": 0}, []), ("one", {"hard_labels": ["deep"]}, ["teacher.deep"])):
        settings = config(image=0, region=0, **keys)
        settings.train.epochs = 1
        figures = execute(settings, tmp_path / name, data_root=str(data), cpu=True)
        assert ("miou_deep" in figures) == bool(stages) and "miou_wide" not in figures
        cache = tmp_path / "cache" / "stages"
        assert sorted(p.name.rpartition("-")[0] for p in cache.glob("*") if p.is_dir()) == stages


def test_a_pyramid_has_maps_at_its_finest_stride_and_names_strides_that_are_not_there() -> None:
    net = build(
        ModelSpec(model="stillhouse:pyramid_segmenter", options={"backbone": "lcnet_050", "width": 8}), 5, (3, 64, 96)
    )
    assert net(torch.zeros(2, 3, 64, 96)).shape == (2, 5, 16, 24)
    with pytest.raises(UserError, match=r"not at \[3\]"):
        build(
            ModelSpec(model="stillhouse:pyramid_segmenter", options={"backbone": "lcnet_050", "strides": [3]}),
            5,
            (3, 64, 96),
        )

"""PCA: easy images by brute force, tiles that come back as they went in, crops that never see two images, and a random
subset beside every set."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.methods.datasets.pca import PackedSet
from stillhouse.methods.datasets.pca.packing import combine, covering, crop_boxes, cut, resized, select, views
from stillhouse.methods.datasets.pca.protocol import cutmix, label_loss, mixed, top_k_labels
from stillhouse.methods.datasets.pca.scores import aum, el2n, forgetting, margins
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate

SCORER = {"train": {"epochs": 1, "batch_size": 50}}


def tree(**given) -> dict:
    return {
        "method": "pca",
        "data": {"name": "digits", "size": 200, "test_size": 100},
        "network": {"model": "stillhouse:convnet2", "options": {"width": 4, "norm": "batch"}},
        "ipc": 2,
        "scorer": SCORER,
        "evaluate": {"networks": 1, "epochs": 2, "batch_size": 10, "flip": 0},
        **given,
    }


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_el2n_is_zero_where_right_root_two_where_wrong_and_between_at_chance():
    sure = torch.tensor([[50.0, 0, 0, 0], [0, 50.0, 0, 0], [0, 0, 0, 0]])
    assert torch.allclose(
        el2n(sure, torch.zeros(3).long()), torch.tensor([0, math.sqrt(2), math.sqrt(1 - 1 / 4)]), atol=1e-6
    )
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    labels = torch.arange(5) % 4
    assert torch.allclose(el2n(torch.stack([a, b]), labels), (el2n(a, labels) + el2n(b, labels)) / 2)
    with pytest.raises(UserError, match="el2n"):
        el2n(a, labels[:3])


def test_margins_are_against_the_best_other_class_and_aum_is_easiest_where_they_are_largest():
    z = torch.tensor([[3.0, 1, 0], [3.0, 1, 0], [2.0, 2, -9]])
    assert margins(z, torch.tensor([0, 1, 0])).tolist() == [2, -2, 0]
    history = torch.stack([margins(z, torch.tensor([0, 1, 0])), margins(2 * z, torch.tensor([0, 1, 0]))])
    assert aum(history).tolist() == [-3, 3, 0]


def test_forgetting_counts_falls_from_right_to_wrong_and_never_right_is_hardest():
    right = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]])  # samples by epochs
    history = torch.where(right.bool(), 1.0, -1.0).T
    assert forgetting(history).tolist() == [0, 2, 0, 0, 4]


def test_coverage_leaves_the_hardest_out_and_spreads_over_the_range_of_scores():
    ranked = torch.cat([torch.linspace(0, 1, 80), torch.linspace(1.01, 9, 15), torch.linspace(50, 60, 5)])
    at = covering(ranked, 20, 0.05, 10, seeded())
    got = ranked[at]
    assert len(at.unique()) == 20 and got.max() <= 9 and (at.diff() > 0).all()
    assert (got > 1).sum() >= 8, "of 20 at random from these scores, about 3 would lie above 1"
    assert len(covering(ranked, 98, 0.5, 10, seeded()).unique()) == 98, (
        "the budget is met even where the cutoff leaves less"
    )
    assert len(covering(torch.zeros(9), 4, 0.0, 5, seeded()).unique()) == 4


@pytest.mark.parametrize(("hardness", "sign"), [("easy", 1), ("hard", -1)])
def test_selection_is_the_smallest_or_largest_of_each_class(hardness: str, sign: int):
    scores, labels = torch.rand(60, generator=seeded()), torch.arange(60) % 3
    rows = [(labels == c).nonzero().flatten() for c in range(3)]
    got = select(scores, rows, 2, hardness).view(3, 2).tolist()
    for c in range(3):
        brute = sorted((i for i in range(60) if labels[i] == c), key=lambda i: sign * float(scores[i]))
        assert got[c] == brute[:2]


def test_the_order_of_the_data_does_not_change_what_is_selected():
    scores, labels, order = (
        torch.rand(40, generator=seeded()),
        torch.arange(40) % 2,
        torch.randperm(40, generator=seeded(1)),
    )
    first = select(scores, [(labels == c).nonzero().flatten() for c in range(2)], 3)
    moved = select(scores[order], [(labels[order] == c).nonzero().flatten() for c in range(2)], 3)
    assert torch.equal(first, order[moved])


def test_equal_scores_go_by_row_and_balanced_takes_all_ranks():
    rows = [torch.arange(20), torch.arange(20, 40)]
    assert select(torch.zeros(40), rows, 3).tolist() == [0, 1, 2, 20, 21, 22]
    assert select(torch.arange(40.0), rows, 4, "balanced").tolist() == [2, 7, 12, 17, 22, 27, 32, 37]


def test_a_class_with_too_few_images_repeats_them_and_counts_stay_equal():
    with pytest.warns(UserWarning, match="repeated"):
        got = select(torch.arange(13.0), [torch.arange(3), torch.arange(3, 13)], 5)
    assert got.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7]
    with pytest.warns(UserWarning, match="easy images alone"):
        select(torch.arange(10.0), [torch.arange(10)], 5)
    with pytest.raises(UserError, match="not finite"):
        select(torch.full((4,), torch.nan), [torch.arange(4)], 1)


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_cutting_what_was_combined_gives_the_small_images_back(size: tuple[int, int]):
    images = torch.rand(2 * 4 * 3, 3, *size, generator=seeded())  # 2 classes, 12 ranks, 3 stored images each
    tiles = cut(combine(images, 3, 2), 2)
    expected = resized(images, 2).view(
        2, 4, 3, 3, -(-size[0] // 2), -(-size[1] // 2)
    )  # class, tile, image: rank = tile * 3 + image
    assert torch.equal(tiles.view(2, 3, 4, *tiles.shape[2:]), expected.transpose(1, 2))
    with pytest.raises(UserError, match="cannot be stored"):
        combine(images[:-1], 3, 2)


def test_a_grid_of_one_stores_the_images_as_they_are():
    images = torch.rand(6, 1, 5, 5)
    assert torch.equal(combine(images, 3, 1), images)


def test_a_thousand_confined_crops_see_one_tile_each_and_unconfined_ones_do_not():
    stored = combine(torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 16, 16).contiguous(), 1, 2).expand(1000, 1, 16, 16)
    seen = views(stored, 2, (16, 16), seeded())
    assert seen.shape == (1000, 1, 16, 16)
    assert torch.allclose(seen, seen.mean((1, 2, 3), keepdim=True).round().expand_as(seen), atol=1e-5)
    assert seen.mean((1, 2, 3)).round().unique().tolist() == [0, 1, 2, 3]
    anywhere = views(stored, 2, (16, 16), seeded(), confined=False)
    assert (anywhere.flatten(1).std(1) > 0.1).float().mean() > 0.3


def test_crop_boxes_lie_inside_with_the_areas_and_ratios_that_were_asked_for():
    top, left, h, w = crop_boxes(1000, (20, 24), seeded(), 0.25)
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 20).all() and (left + w <= 24).all()
    area, ratio = h * w / 480, w / h
    assert area.min() > 0.2 and area.max() <= 1 and ratio.min() > 0.65 and ratio.max() < 1.5 and top.float().std() > 1
    assert crop_boxes(3, (1, 1), seeded())[2].tolist() == [1, 1, 1]


def test_a_crop_of_everything_is_the_image_and_mirroring_mirrors():
    x = torch.rand(1, 2, 6, 6).repeat(8, 1, 1, 1)
    whole = views(
        x, 1, (6, 6), seeded(), area=1.0, flip=0.0
    )  # an area of all of it fits only where the ratio is near 1; else the whole is taken
    assert any(torch.allclose(v, x[0], atol=1e-4) for v in whole)
    plain, mirrored = (views(x, 1, (6, 6), seeded(), flip=f) for f in (0.0, 1.0))
    assert torch.allclose(plain.flip(-1), mirrored, atol=1e-5)


def test_mixing_leaves_the_clean_batch_alone_and_top_k_labels_are_probabilities():
    x = torch.rand(4, 3, 8, 8)
    kept = x.clone()
    out = cutmix(x, torch.tensor([1, 2, 3, 0]), (2, 3, 5, 8))
    assert (
        torch.equal(x, kept)
        and torch.equal(out[0, :, 2:5, 3:8], x[1, :, 2:5, 3:8])
        and torch.equal(out[0, :, :2], x[0, :, :2])
    )
    assert torch.equal(mixed(x, "cutmix", None, "k", 1), mixed(x, "cutmix", None, "k", 1)) and torch.equal(
        mixed(x, "none", None, "k"), x
    )
    z = 100 * torch.randn(5, 6)
    assert torch.allclose(top_k_labels(z, 2).sum(-1), torch.ones(5)) and torch.equal(top_k_labels(z, 6), z.softmax(-1))
    logits = torch.randn(5, 6, requires_grad=True)
    label_loss(logits, torch.arange(5), z, 1.0, top_k=2).backward()
    assert logits.grad.isfinite().all()
    with pytest.raises(UserError, match="top_k"):
        top_k_labels(z, 7)


@pytest.mark.filterwarnings("ignore:pca")
def test_a_run_stores_equal_classes_and_reports_the_random_subset(tmp_path: Path):
    net = {"model": "stillhouse:convnet2", "options": {"width": 4}, "train": SCORER["train"]}
    figures = execute(validate(tree(check=net)), tmp_path / "run", cpu=True)
    made = load_product(tmp_path / "run")
    assert isinstance(made, PackedSet) and made.grid == 2 and made.size == (8, 8) and made.images.shape == (20, 1, 8, 8)
    assert torch.bincount(made.labels).tolist() == [2] * 10 and made.bounded
    images, labels = made.training_images()
    assert images.shape == (80, 1, 8, 8) and torch.equal(labels[:4], made.labels[:1].expand(4))
    assert {"accuracy_random", "improvement_over_random", "class_count_spread"} <= set(figures) and figures[
        "class_count_spread"
    ] == 0
    assert made.made_by["hardness"] == "easy"


@pytest.mark.filterwarnings("ignore:pca")
@pytest.mark.parametrize("score", ["aum", "forgetting"])
def test_scores_over_epochs_choose_easier_images_than_average(score: str, tmp_path: Path):
    scorer = {"score": score, "train": {"epochs": 4, "batch_size": 50}}
    figures = execute(validate(tree(scorer=scorer, grid=1, hardness="easy")), tmp_path / "easy", cpu=True)
    assert figures["score_chosen"] < figures["score_all"]
    spread = execute(validate(tree(scorer=scorer, grid=1, hardness="coverage")), tmp_path / "coverage", cpu=True)
    assert spread["score_chosen"] > figures["score_chosen"] and spread["class_count_spread"] == 0


@pytest.mark.filterwarnings("ignore:pca")
def test_a_scoring_that_was_cut_off_ends_with_the_same_margins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from stillhouse.methods.datasets.pca import scores

    config = validate(
        tree(scorer={"score": "aum", "train": {"epochs": 4, "batch_size": 50, "checkpoint_seconds": 0, "log_every": 1}})
    )
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "one"))
    execute(config, tmp_path / "whole", cpu=True)

    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "other"))
    plain = scores.MarginRecorder.begin_epoch

    def failing(self, ctx):
        plain(self, ctx)
        if ctx.progress.epoch == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(scores.MarginRecorder, "begin_epoch", failing)
    with pytest.raises(KeyboardInterrupt):
        execute(config, tmp_path / "cut", cpu=True)
    monkeypatch.setattr(scores.MarginRecorder, "begin_epoch", plain)
    execute(config, tmp_path / "cut", cpu=True)
    assert torch.equal(load_product(tmp_path / "whole").images, load_product(tmp_path / "cut").images)


@pytest.mark.filterwarnings("ignore:pca")
def test_random_and_ungridded_is_the_baseline_itself(tmp_path: Path):
    figures = execute(
        validate(tree(hardness="random", grid=1, evaluate={"networks": 1, "epochs": 2, "batch_size": 10})),
        tmp_path / "run",
        cpu=True,
    )
    assert figures["stored_images"] == 20 and 0 <= figures["accuracy"] <= 1


def test_soft_labels_without_a_teacher_are_refused_before_training(tmp_path: Path):
    with pytest.raises(UserError, match="names no teacher"):
        execute(validate(tree(evaluate={"labels": "soft"})), tmp_path / "run", cpu=True)


@pytest.mark.filterwarnings("ignore:pca")
def test_soft_labels_train_on_a_teachers_view_of_mixed_batches(tmp_path: Path):
    net = {"model": "stillhouse:convnet2", "options": {"width": 4}, "train": SCORER["train"]}
    spec = {"labels": "soft", "networks": 1, "epochs": 2, "optimiser": "sgd", "random": False, "top_k": 3}
    figures = execute(validate(tree(teacher=net, evaluate=spec)), tmp_path / "run", cpu=True)
    assert "accuracy_random" not in figures and 0 <= figures["accuracy"] <= 1

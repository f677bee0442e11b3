"""The parts of data-set distillation: augmentation, whitening, matching, recovery, scores, real images, and runs that
go on after an interruption."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.functional.augmentation import GROUPS, Strength, all_of, apply, groups_of, one_of
from stillhouse.functional.matching import (
    Flat,
    feature_mean_distance,
    gradient_distance,
    gradients,
    trajectory_distance,
    trajectory_distance_by_steps,
    unroll,
)
from stillhouse.functional.recovery import BatchNormStatistics, clamp_to_pixels, statistics_loss, total_variation
from stillhouse.functional.whitening import fit_whitening
from stillhouse.methods.datasets.selection import herding, k_center
from stillhouse.models.convnet import ConvNet
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate
from stillhouse.synthetic import scores
from stillhouse.synthetic.initial import decode, initial, mixed
from stillhouse.synthetic.real import RealImages

EVERY = ("color", "crop", "cutout", "flip", "scale", "rotate", "resized_crop")


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 6, side: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=drawn(seed))


# ---- augmentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", EVERY)
def test_a_siamese_draw_is_the_same_for_both_batches(group: str):
    a, b = images(3), images(5, seed=1)
    draw = all_of([group], 1, (8, 8), drawn())
    together = apply(torch.cat([a, b]), draw)
    assert torch.allclose(together, torch.cat([apply(a, draw), apply(b, draw)]), atol=1e-6)


@pytest.mark.parametrize("group", EVERY)
def test_each_image_has_its_own_draw_where_asked_for(group: str):
    x = images(1).expand(8, -1, -1, -1)
    out = apply(x, all_of([group], 8, (8, 8), drawn()))
    assert not torch.allclose(out, out[:1].expand_as(out))
    one = apply(x[:1], tuple((op, tuple(v[3:4] for v in values)) for op, values in all_of([group], 8, (8, 8), drawn())))
    assert torch.allclose(out[3:4], one, atol=1e-6)


def test_neutral_draws_change_nothing():
    x = images()
    zero, one, not_mirrored = torch.zeros(1), torch.ones(1), torch.zeros(1, dtype=torch.bool)
    neutral = (
        ("brightness", (zero,)),
        ("saturation", (one,)),
        ("contrast", (one,)),
        ("crop", (zero.long(), zero.long())),
        ("flip", (not_mirrored,)),
        ("scale", (one, one)),
        ("rotate", (zero,)),
        ("resized_crop", (zero, zero, one, one)),
    )
    assert torch.allclose(apply(x, neutral), x, atol=1e-5)


@pytest.mark.parametrize("group", EVERY)
def test_the_gradient_reaches_the_pixels(group: str):
    x = images().double().requires_grad_()
    draws = all_of([group], len(x), (8, 8), drawn())
    apply(x, draws).square().sum().backward()
    step = 1e-6 * x.grad
    with torch.no_grad():
        change = apply(x + step, draws).square().sum() - apply(x - step, draws).square().sum()
    assert float(change) == pytest.approx(2 * float((x.grad * step).sum()), rel=1e-4)


def test_one_group_is_drawn_of_many_and_all_of_them_in_time():
    seen = {one_of(tuple(GROUPS), 1, (8, 8), drawn(s))[0][0] for s in range(60)}
    assert seen == {ops[0] for ops in GROUPS.values()}
    assert one_of((), 1, (8, 8), drawn()) == ()


def test_drawing_does_not_disturb_other_randomness():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    all_of(EVERY, 4, (8, 8), drawn())
    assert torch.equal(torch.rand(3), expected)


def test_strength_bounds_what_is_drawn():
    (_, (angle,)) = all_of(["rotate"], 500, (8, 8), drawn(), Strength(rotate=30))[0]
    assert math.radians(15) < float(angle.abs().max()) <= math.radians(30)


def test_a_strategy_is_read_and_a_wrong_one_refused():
    assert groups_of("color_resized_crop_flip") == ("color", "resized_crop", "flip")
    with pytest.raises(UserError, match="did you mean 'color'"):
        groups_of("colour_crop")
    with pytest.raises(UserError, match="floating-point"):
        apply(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ())
    with pytest.raises(UserError, match="sampled for 4 images, but the batch holds 6"):
        apply(images(), all_of(["flip"], 4, (8, 8), drawn()))


# ---- whitening -------------------------------------------------------------------------------------------------------


def test_whitening_gives_the_shrunk_spectrum_and_inverts():
    x = images(200, 3).cumsum(-1)
    whiten = fit_whitening(x, 0.1)
    spectrum = torch.linalg.eigvalsh(torch.cov(x.flatten(1).T))
    assert torch.allclose(
        torch.linalg.eigvalsh(torch.cov(whiten(x).flatten(1).T)), (spectrum / (spectrum + 0.1)).sort()[0], atol=1e-4
    )
    assert torch.allclose(whiten.invert(whiten(x)), x, atol=1e-4)


# ---- matching --------------------------------------------------------------------------------------------------------


def test_features_of_equal_batches_are_at_distance_zero_whatever_the_order():
    real = torch.randn(12, 5)
    shuffled = real.view(3, 4, 5)[:, torch.randperm(4)].reshape(12, 5)
    assert float(feature_mean_distance(real, shuffled, 3)) == pytest.approx(0, abs=1e-10)
    with pytest.raises(UserError, match="each of 5 classes"):
        feature_mean_distance(real, shuffled, 5)


def test_classes_in_one_forward_match_as_one_by_one():
    network, real, syn = ConvNet(4, 2, input_shape=(3, 8, 8)), images(12), images(6, seed=1)
    together = feature_mean_distance(network.embed(real), network.embed(syn), 3)
    alone = sum(
        feature_mean_distance(network.embed(r), network.embed(s), 1) for r, s in zip(real.chunk(3), syn.chunk(3))
    )
    assert torch.allclose(together, alone, rtol=1e-4)


@pytest.mark.parametrize("metric", ["units", "mse", "cos"])
def test_equal_gradients_are_at_distance_zero_and_empty_rows_give_no_nan(metric: str):
    network, x, y = ConvNet(4, 2, input_shape=(3, 8, 8)), images(), torch.arange(6)
    g = gradients(network, x, y)
    assert float(gradient_distance(g, g, metric)) == pytest.approx(0, abs=1e-3)
    none = [torch.zeros_like(t, requires_grad=True) for t in g]
    gradient_distance(g, none, metric).backward()
    assert all(t.grad is None or t.grad.isfinite().all() for t in none)


def test_an_unrolled_training_is_plain_sgd():
    network, x, y = ConvNet(4, 2, input_shape=(3, 8, 8)), images(), torch.arange(6)
    flat = Flat(network)
    start = flat.vector()
    end = unroll(flat.gradient, start, [(x, y), (x[:3], y[:3])], torch.tensor(0.1))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for a, b in ((x, y), (x[:3], y[:3])):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(a), b).backward()
        optimizer.step()
    assert torch.allclose(end, flat.vector(), atol=1e-6)


def test_one_step_has_the_same_gradient_with_and_without_the_graph():
    flat, y = Flat(ConvNet(4, 2, input_shape=(3, 8, 8))), torch.arange(6)
    start = flat.vector()
    target = start + 0.1 * torch.randn(len(start), generator=drawn())
    found = []
    for whole in (True, False):
        x, lr = images().requires_grad_(), torch.tensor(0.1, requires_grad=True)
        if whole:
            value = trajectory_distance(unroll(flat.gradient, start, [(x, y)], lr), start, target)
            value.backward()
        else:
            value = trajectory_distance_by_steps(flat.gradient, start, target, [(x, y)], lr)
        found.append((value.detach(), x.grad, lr.grad))
    for a, b in zip(*found):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_trajectories_refuse_networks_with_buffers_and_vectors_of_others():
    with pytest.raises(UserError, match="batch norm"):
        Flat(ConvNet(4, 2, norm="batch", input_shape=(3, 8, 8)))
    with pytest.raises(UserError, match="another network's"):
        Flat(ConvNet(4, 2, input_shape=(3, 8, 8)))(torch.zeros(5), images())


# ---- recovery --------------------------------------------------------------------------------------------------------


def test_a_batch_that_the_network_remembers_exactly_is_at_distance_zero_with_a_finite_gradient():
    network = nn.Sequential(nn.BatchNorm2d(3)).eval()
    x = images().requires_grad_()
    statistics = BatchNormStatistics(network)
    network[0].running_mean.copy_(x.detach().mean((0, 2, 3)))
    network[0].running_var.copy_(x.detach().var((0, 2, 3), unbiased=False))
    network(x)
    loss = statistics_loss(statistics.distances())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5) and x.grad.isfinite().all()
    assert float(total_variation(torch.ones(2, 3, 4, 4))) == 0


def test_recovery_says_what_it_needs():
    with pytest.raises(UserError, match="none; take one with batch norm"):
        BatchNormStatistics(ConvNet(4, 2, input_shape=(3, 8, 8)))
    network = nn.Sequential(nn.BatchNorm2d(3))
    statistics = BatchNormStatistics(network)
    network(images())
    with pytest.raises(UserError, match="evaluation mode"):
        statistics.distances()


def test_clamped_pixels_are_pixels():
    x = 10 * images()
    clamp_to_pixels(x, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    assert x.amin((0, 2, 3)).tolist() == pytest.approx([-2.5, -2.0, -1.5]) and x.amax(
        (0, 2, 3)
    ).tolist() == pytest.approx([2.5, 3.0, 3.5])


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_label_robust_score_is_one_and_zero_at_its_ends_and_refuses_percents():
    assert scores.label_robust_score(-1.0, 1.0) == pytest.approx(1)
    assert scores.label_robust_score(1.0, -1.0) == pytest.approx(0)
    assert scores.label_robust_score(0.2, 0.1) < scores.label_robust_score(0.1, 0.2)
    with pytest.raises(UserError, match="fractions"):
        scores.label_robust_score(20.0, 5.0)


# ---- real images, and how synthetic ones begin -----------------------------------------------------------------------


def real_images(per_class: int = 12) -> RealImages:
    labels = torch.arange(3).repeat(per_class)
    return RealImages(images(3 * per_class), labels, ["a", "b", "c"], (0.0,) * 3, (1.0,) * 3)


def test_real_batches_are_class_major_without_repetition_and_replayed_by_their_key():
    real = real_images()
    rows = real.take(5, drawn(1))
    assert real.labels[rows].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert len(set(rows.tolist())) == 15
    assert torch.equal(rows, real.take(5, drawn(1))) and not torch.equal(rows, real.take(5, drawn(2)))


def test_a_class_that_is_too_small_or_absent_is_named():
    with pytest.raises(UserError, match="13 images of each class are wanted, but 'a' has 12"):
        real_images().draw(13, drawn(), "images")
    with pytest.raises(UserError, match="no image of the class 'c'"):
        RealImages(images(4), torch.tensor([0, 0, 1, 1]), ["a", "b", "c"], (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize("how", ["noise", "real", "representative", "mix"])
def test_every_beginning_has_ipc_images_of_each_class(how: str):
    real = real_images()
    start = initial(how, real, 2, drawn(), factor=2)
    assert start.shape == (6, 3, 8, 8)
    if how in ("real", "representative"):
        where = (real.images[:, None] == start[None]).flatten(2).all(2).float().argmax(0)
        assert real.labels[where].tolist() == [0, 0, 1, 1, 2, 2] and len(set(where.tolist())) == 6


def test_mixed_images_decode_to_the_small_real_images_they_were_made_of():
    real = real_images()
    start = mixed(real, 2, 2, drawn(4))
    small = nn.functional.interpolate(real.draw(8, drawn(4)), size=(4, 4), mode="nearest").view(3, 4, 2, 3, 4, 4)
    again = decode(start, 2).view(4, 3, 2, 3, 8, 8).transpose(0, 1)
    enlarged = nn.functional.interpolate(small.flatten(0, 2), size=(8, 8), mode="bilinear").view(3, 4, 2, 3, 8, 8)
    assert torch.allclose(again, enlarged, atol=1e-6)


# ---- selection -------------------------------------------------------------------------------------------------------


def test_herding_follows_the_mean_better_than_chance_and_never_repeats():
    x = torch.randn(40, 6, generator=drawn())
    chosen = herding(x, 8)
    chance = torch.stack(
        [x[torch.randperm(40, generator=drawn(s))[:8]].mean(0).sub(x.mean(0)).norm() for s in range(20)]
    )
    assert len(set(chosen.tolist())) == 8
    assert x[chosen].mean(0).sub(x.mean(0)).norm() < chance.min()


def test_k_center_covers_better_than_chance_and_takes_duplicates_last():
    x = torch.randn(40, 2, generator=drawn())

    def radius(rows: torch.Tensor) -> float:
        return float(torch.cdist(x, x[rows]).amin(1).max())

    assert radius(k_center(x, 8)) < min(radius(torch.randperm(40, generator=drawn(s))[:8]) for s in range(20))
    assert sorted(k_center(torch.zeros(4, 2), 4).tolist()) == [0, 1, 2, 3]


# ---- whole runs ------------------------------------------------------------------------------------------------------


def tree(method: str, **given: Any) -> dict[str, Any]:
    plain = {
        "data": {"name": "digits", "augment": "plain", "size": 200, "test_size": 100},
        "network": {"model": "stillhouse:convnet2", "options": {"width": 4}},
        "augment": {"groups": "crop_scale"},
        "evaluate": {"networks": 1, "epochs": 2},
    }
    return {"method": method, **plain, **given}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dm", {}),
        ("dsa", {"outer": 2, "iterations": 3}),
        ("mtt", {"inner_steps": 2, "experts": {"count": 1, "epochs": 2}, "max_start": 0}),
    ],
)
def test_an_interrupted_distillation_goes_on_to_the_same_images(
    method: str, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from stillhouse.synthetic.synthesis import Synthesis

    config = validate(tree(method, **{"iterations": 6, "batch_real": 5, **options}))
    execute(config, tmp_path / "whole", cpu=True)
    plain = Synthesis.generator

    def interrupted(self: Synthesis, *keys: int | str) -> torch.Generator:
        if keys == ("augment", 2):  # in the third step
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *keys)

    monkeypatch.setattr(Synthesis, "generator", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(config, tmp_path / "cut", cpu=True)
    monkeypatch.setattr(Synthesis, "generator", plain)
    execute(config, tmp_path / "cut", cpu=True)
    whole, cut = (load_product(tmp_path / name) for name in ("whole", "cut"))
    assert torch.equal(whole.images, cut.images) and whole.lr == cut.lr


def test_soft_and_hard_labels_are_protocols_of_their_own(tmp_path: Path):
    with pytest.raises(UserError, match="dm gives its images hard labels"):
        validate(tree("dm", evaluate={"protocol": "soft"}))
    with pytest.raises(UserError, match="holds no soft labels"):
        execute(
            validate(tree("selection", evaluate={"protocol": "soft", "networks": 1, "epochs": 1})),
            tmp_path / "soft",
            cpu=True,
        )


def test_scores_come_with_the_accuracies_they_are_made_of(tmp_path: Path):
    evaluate = {
        "networks": 1,
        "epochs": 2,
        "scores": True,
        "full_epochs": 1,
        "cross": [{"model": "stillhouse:mlp", "options": {"widths": [8]}}],
    }
    found = execute(validate(tree("selection", evaluate=evaluate)), tmp_path / "run", cpu=True)
    assert found["hlr"] == pytest.approx(found["accuracy_full"] - found["accuracy"])
    assert found["ior"] == pytest.approx(found["accuracy"] - found["accuracy_random"])
    assert found["lrs"] == pytest.approx(scores.label_robust_score(found["hlr"], found["ior"]))
    assert 0 <= found["ars"] <= 1 and "accuracy_mlp" in found
    assert found["stored_images"] == 10 and found["stored_mb"] == pytest.approx((10 * 64 * 4 + 80) / 1e6)


def test_what_learning_costs_is_told(tmp_path: Path):
    found = execute(
        validate(tree("mtt", iterations=2, inner_steps=2, experts={"count": 1, "epochs": 2}, max_start=0)),
        tmp_path / "run",
        cpu=True,
    )
    assert found["distil_seconds_per_iteration"] > 0 and found["distil_peak_mb"] > 0
    assert load_product(tmp_path / "run").lr == pytest.approx(found["inner_lr"])


def test_whitened_images_are_judged_on_whitened_images_and_shown_as_pictures(tmp_path: Path):
    found = execute(validate(tree("dm", iterations=0, zca=True)), tmp_path / "run", cpu=True)
    made = load_product(tmp_path / "run")
    assert made.whitening is not None and found["out_of_range_pixels"] < 0.01
    assert float(made.pixels().min()) > -1e-3 and float(made.pixels().max()) < 1 + 1e-3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ipc": 50}, "'.' has 20"),
        ({"batch_real": 21}, "21 real images"),
        ({"clamp": True, "zca": True}, "cannot go with zca"),
        ({"augment": {"groups": "crop_spin"}}, "spin"),
        ({"network": {"model": "stillhouse:mlp"}}, "has none; take stillhouse:convnet"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(given: dict[str, Any], words: str, tmp_path: Path):
    with pytest.raises(UserError, match=words):
        execute(validate(tree("dm", **{"iterations": 1, "batch_real": 5, **given})), tmp_path / "run", cpu=True)


SRE2L = {
    "network": {"model": "stillhouse:convnet2", "options": {"width": 4, "norm": "batch"}},
    "teacher": {
        "model": "stillhouse:convnet2",
        "options": {"width": 4, "norm": "batch"},
        "train": {"epochs": 1, "batch_size": 50},
    },
    "ipc": 2,
    "recover": {"iterations": 4, "jitter": 1},
    "relabel": {"epochs": 2, "batch_size": 8, "augment": "resized_crop"},
}


def test_recovered_images_are_pictures_with_labels_of_their_views_and_random_ones_get_the_same(tmp_path: Path):
    evaluate = {"protocol": "soft", "networks": 1, "epochs": 2, "scores": True, "full_epochs": 1}
    found = execute(validate(tree("sre2l", **SRE2L, evaluate=evaluate)), tmp_path / "run", cpu=True)
    made = load_product(tmp_path / "run")
    assert made.labels.tolist() == [c for c in range(10) for _ in range(2)] and made.views.logits.shape == (2, 20, 10)
    assert found["out_of_range_pixels"] == 0 and 0 <= found["lrs"] <= 1
    assert "ars" not in found and "accuracy_unaugmented" not in found, "views are augmented once and for all"
    execute(validate(tree("sre2l", **{**SRE2L, "recover": None, "relabel": None})), tmp_path / "random", cpu=True)
    real = load_product(tmp_path / "random")
    assert real.soft.shape == (20, 10) and not torch.equal(real.images, made.images)


def test_recovery_from_a_network_without_batch_norm_is_refused(tmp_path: Path):
    plain = {"model": "stillhouse:convnet2", "options": {"width": 4}, "train": {"epochs": 1, "batch_size": 50}}
    with pytest.raises(UserError, match="take one with batch norm"):
        execute(validate(tree("sre2l", **{**SRE2L, "teacher": plain})), tmp_path / "run", cpu=True)


def test_a_judge_that_was_cut_off_keeps_the_networks_it_has_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from stillhouse.synthetic import training

    trained: list[str] = []
    plain = training.train

    def counted(run: Any, name: str, *rest: Any) -> float:
        if len(trained) == 2:
            trained.append("cut")
            raise KeyboardInterrupt
        trained.append(name)
        return plain(run, name, *rest)

    monkeypatch.setattr(training, "train", counted)
    config = validate(tree("selection", seed=7, evaluate={"networks": 3, "epochs": 2}))
    with pytest.raises(KeyboardInterrupt):
        execute(config, tmp_path / "run", cpu=True)
    execute(config, tmp_path / "run", cpu=True)
    assert len(trained) == 4  # two, the one that was cut off, and that one again


def test_a_target_beyond_the_experts_is_refused():
    with pytest.raises(UserError, match="beyond the experts' 3 epochs"):
        validate(tree("mtt", experts={"epochs": 3}, max_start=2))

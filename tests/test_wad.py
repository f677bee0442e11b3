"""WAD: weights and their limits, samples by their ids, moved images, a run that was stopped between two rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.pseudo_labels import confident_pseudo_loss
from stillhouse.methods.classification.wad import (
    SECOND,
    WAD,
    Contrastive,
    alpha_at,
    features_of,
    nt_xent,
    pseudo_labels,
    reliable,
    similarities,
    weight_figures,
    with_projector,
)
from stillhouse.models.resnet import ResNet
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.training.context import Progress

RECIPE = Path(__file__).parents[1] / "recipes" / "classification" / "wad.yaml"
TINY = ["data.test_size=40", "data.unlabelled={size: 60, foreign: 0.5}", "steps=4", "split=2", "teacher.train.epochs=1"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))


def test_the_weight_is_the_gap_between_the_two_best_classes() -> None:
    axes = torch.eye(3)
    images = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [-1.0, -1.0, -1.0]])
    label, weight = pseudo_labels(similarities(images, [5 * axes[:1], torch.stack([axes[1], -axes[0]]), axes[2:]]))
    assert label[0] == 0 and weight[0].item() == pytest.approx(1, abs=1e-6)
    assert weight[1].item() == pytest.approx(0, abs=1e-6), "as near to one class as to another"
    assert label[2] == 1 and weight[2] > 1, "also where the second score is negative"
    zero = pseudo_labels(torch.zeros(1, 3))[1]
    assert zero.isfinite().all() and zero == 0


def test_similarities_need_two_classes_with_images() -> None:
    with pytest.raises(UserError, match="at least two classes"):
        similarities(torch.randn(2, 3), [torch.randn(2, 3)])
    with pytest.raises(UserError, match="class 1 has no labelled image"):
        similarities(torch.randn(2, 3), [torch.randn(2, 3), torch.zeros(0, 3)])


def test_views_of_one_image_attract_and_others_repel() -> None:
    views = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    aligned, crossed = torch.cat([views, views]), torch.cat([views, views.roll(1, 0)])
    assert nt_xent(aligned) < nt_xent(crossed)
    torch.testing.assert_close(nt_xent(aligned), nt_xent(3 * aligned))
    assert nt_xent(100 * torch.randn(6, 4), 0.01).isfinite()


def test_a_projector_takes_the_classifiers_place() -> None:
    net = with_projector(ResNet(4, (4, 6), (1, 1), input_shape=(1, 8, 8)), torch.zeros(1, 1, 8, 8), 5)
    x = torch.randn(3, 1, 8, 8)
    assert net(x).shape == (3, 5)
    terms = Contrastive(net)({"input": x, "views": {SECOND: x + 0.1}}, Progress())
    terms["loss"].backward()
    assert all(p.grad is not None for p in net.parameters())


def test_shares_fall_to_zero_and_never_reach_alpha() -> None:
    shares = [alpha_at(i) for i in range(1, 7)]
    assert shares == pytest.approx([0.064, 0.036, 0.016, 0.004, 0, 0])


def test_samples_are_matched_by_their_ids() -> None:
    draw = torch.Generator().manual_seed(0)
    ids, scores, logits = torch.arange(100, 120), torch.rand(20, 3, generator=draw), torch.randn(20, 3, generator=draw)
    expected = reliable(scores, ids, logits, ids, 0.3)
    assert len(expected[0]) == 6
    losses = F.cross_entropy(logits, scores.argmax(1), reduction="none")
    assert expected[0].tolist() == ids[losses.argsort()[:6]].tolist()
    for side in (0, 1):
        order = torch.randperm(20, generator=draw)
        mine, theirs = (order, torch.arange(20)) if side else (torch.arange(20), order)
        again = reliable(scores[mine], ids[mine], logits[theirs], ids[theirs], 0.3)
        assert all(map(torch.equal, expected, again))
    assert len(reliable(scores, ids, logits, ids, 0.04)[0]) == 0, "less than one sample is none"
    with pytest.raises(UserError, match="of the same images"):
        reliable(scores, ids, logits, ids + 1, 0.3)


def batch(view: bool = True) -> dict:
    draw = torch.Generator().manual_seed(3)
    pool = {"input": torch.randn(3, 4, generator=draw), "index": torch.tensor([4, 0, 2])}
    pool |= {"views": {"strong": torch.randn(3, 4, generator=draw)}} if view else {}
    return {"input": torch.randn(2, 4, generator=draw), "label": torch.tensor([1, 0]), "unlabelled": pool}


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def test_weights_and_pseudo_labels_are_those_of_the_images() -> None:
    labels, weights = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0.5, 9.0, 0.0, 9.0, 1.0])
    module, given = WAD(linear(), labels, weights), batch()
    rows = F.cross_entropy(module.student(given["unlabelled"]["input"]), torch.tensor([1, 0, 0]), reduction="none")
    terms = module(given, Progress())
    torch.testing.assert_close(terms["unlabelled"], (rows[0] + 0.5 * rows[1]) / 3)
    torch.testing.assert_close(terms["loss"], terms["labelled"] + terms["unlabelled"])
    torch.testing.assert_close(WAD(linear(), labels, weights, "one")(given, Progress())["unlabelled"], rows.mean())
    alone = WAD(linear(), labels, weights, "none")(given, Progress())
    nothing = WAD(linear(), labels, torch.zeros(5))(given, Progress())
    assert alone["loss"] == nothing["loss"] == terms["labelled"]


def test_fixmatch_trusts_confident_weak_views_alone() -> None:
    weak = torch.tensor([[4.0, 0.0], [0.1, 0.0]], requires_grad=True)
    strong = torch.zeros(2, 2, requires_grad=True)
    confident_pseudo_loss(weak, strong, 0.9).backward()
    assert weak.grad is None and torch.equal(strong.grad.abs().sum(1) > 0, torch.tensor([True, False]))
    module = WAD(linear(), torch.zeros(5, dtype=torch.int64), torch.ones(5), "fixmatch", threshold=0.0)
    assert module(batch(), Progress())["unlabelled"] > 0


def test_figures_tell_known_from_unknown() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.45]])
    figures = weight_figures(scores, torch.tensor([0, 0, -1]))
    assert figures["weight_auroc"] == 1 and figures["pseudo_accuracy"] == 0.5
    assert "weight_auroc" not in weight_figures(scores, torch.tensor([0, 1, 1]))


def test_features_may_be_the_mean_over_views() -> None:
    config = recipe.load(RECIPE, sets=TINY)
    from stillhouse.data import load

    data = load(config.data).dataset("train", train=True)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    one, two = (features_of(net, data, n, 0, torch.device("cpu")) for n in (1, 2))
    assert one.shape == (20, 3) and not torch.equal(one, two)


class Killed(Exception):
    """What a signal would do."""


def test_a_run_that_was_stopped_in_a_later_round_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe.load(RECIPE, sets=[*TINY, "alpha=0.9"])
    whole = execute(config, tmp_path / "whole", cpu=True)
    assert whole["moved"] == int(60 * 0.9 / 4) and 0 <= whole["moved_precision"] <= 1
    assert {"weight_auroc", "weight_known", "weight_foreign", "pseudo_accuracy"} <= set(whole)
    plain, steps = WAD.forward, 0

    def counting(self: WAD, given: dict, progress: Progress) -> dict[str, Tensor]:
        nonlocal steps
        steps += 1
        if steps == 6:  # in the second of three rounds, with four steps each
            raise Killed
        return plain(self, given, progress)

    monkeypatch.setattr(WAD, "forward", counting)
    with pytest.raises(Killed):
        execute(config, tmp_path / "cut", cpu=True)
    monkeypatch.setattr(WAD, "forward", plain)
    again = execute(config, tmp_path / "cut", cpu=True)
    first, second = (load_product(tmp_path / name).module.state_dict() for name in ("whole", "cut"))
    assert again["moved_precision"] == whole["moved_precision"]
    assert all(map(torch.equal, first.values(), second.values()))


def test_another_data_set_may_be_the_pool(tmp_path: Path) -> None:
    sets = [*TINY, "data.unlabelled={data: {name: digits, classes: [5, 6], size: 30}}", "split=1"]
    figures = execute(recipe.load(RECIPE, sets=sets), tmp_path / "run", cpu=True)
    assert figures["moved"] == 0 and "weight_foreign" in figures and "weight_known" not in figures


@pytest.mark.parametrize(
    ("sets", "match"),
    [
        (["data.unlabelled=null"], r"set data\.unlabelled, such as"),
        (["pool_loss=fixmatch", "view=hard"], r"add 'hard' to data\.views"),
        (["train.epochs=3"], "a round is as long as `steps`"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(sets: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        recipe.load(RECIPE, sets=sets)

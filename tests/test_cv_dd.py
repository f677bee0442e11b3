"""CV-DD: votes are softmax of percents, one voter is SRe2L, labels see the batch and leave the networks alone, and a
run measures its priors once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.functional.recovery import BatchNormStatistics
from stillhouse.methods.datasets.cv_dd.committee import (
    batch_labels,
    chosen,
    committee_loss,
    compared,
    medium_first,
    statistics_distance,
    vote_weights,
)
from stillhouse.methods.datasets.cv_dd.method import RecoverSpec, begin
from stillhouse.methods.datasets.cv_dd.training import StretchedTraining, StudentSpec
from stillhouse.methods.datasets.sre2l import RecoverSpec as Single
from stillhouse.methods.datasets.sre2l import recover_loss
from stillhouse.models.convnet import ConvNet
from stillhouse.randomness import generator
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate
from stillhouse.synthetic.config import AugmentSpec, EvaluateSpec
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.real import RealImages
from stillhouse.synthetic.relabel import ViewLabels, Views, running_logits
from stillhouse.synthetic.training import SoftTraining


def small(width: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = ConvNet(width, 2, "batch", num_classes=3, input_shape=(1, 8, 8))
    network(torch.randn(32, 1, 8, 8))  # statistics that are not the default
    return network.eval().requires_grad_(False)


def tree(**given) -> dict:
    def net(width: int) -> dict:
        return {
            "model": "stillhouse:convnet2",
            "options": {"width": width, "norm": "batch"},
            "train": {"epochs": 1, "batch_size": 50},
        }

    return {
        "method": "cv_dd",
        "data": {"name": "digits", "augment": "plain", "size": 200, "test_size": 100},
        "network": {"model": "stillhouse:convnet2", "options": {"width": 4}},
        "committee": [net(4), net(6), net(8)],
        "measure": {"epochs": 1},
        "ipc": 2,
        "recover": {"iterations": 3, "jitter": 1, "augment": "resized_crop", "area": 0.5, "crops": 2},
        "relabel": {"epochs": 2, "batch_size": 8, "augment": "resized_crop", "area": 0.5},
        "evaluate": {"protocol": "soft", "networks": 1, "epochs": 2},
        **given,
    }


def test_votes_are_a_softmax_of_percents_and_do_not_care_for_a_constant():
    assert vote_weights([63, 65.3]).tolist() == pytest.approx([0.387, 0.613], abs=1e-3)
    assert vote_weights([56.4, 42.3]).tolist() == pytest.approx([0.944, 0.056], abs=1e-3)
    assert torch.allclose(vote_weights([10, 20, 30]), vote_weights([50, 60, 70]))
    for wrong in ([0.63, 0.65], [-1, 50], [50, 101]):
        with pytest.raises(UserError, match="in percent"):
            vote_weights(wrong)


def test_each_image_has_its_pair():
    turns = [chosen(s, 5, 2, "in_turn", [1.0] * 5, 0) for s in range(11)]
    assert (
        turns[:5] == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2)] and len(set(turns[:10])) == 10 and turns[10] == turns[0]
    )
    assert chosen(7, 3, 2, "best", [40, 70, 60], 0) == (1, 2) and chosen(3, 3, 1, "in_turn", [1, 2, 3], 0) == (0,)
    assert {chosen(s, 3, 2, "random", [1, 1, 1], 0) for s in range(30)} == {(0, 1), (0, 2), (1, 2)}


def test_medium_difficulty_goes_from_the_middle_outwards():
    assert medium_first(10) == [5, 6, 4, 7, 3, 8, 2, 9, 1, 0]
    assert medium_first(5) == [3, 4, 2, 1, 0] and medium_first(1) == [0]


def test_one_voter_is_sre2l_and_twice_the_same_network_too():
    network, x, y = small(), torch.randn(3, 1, 8, 8, requires_grad=True), torch.arange(3)
    statistics = BatchNormStatistics(network)
    alone = recover_loss(network, statistics, x, y, Single(r_bn=0.1))["loss"]
    assert torch.allclose(committee_loss([network], [statistics], [1.0], x, y, 0.1)["loss"], alone)
    other = small()
    pair = committee_loss([network, other], [statistics, BatchNormStatistics(other)], [0.3, 0.7], x, y, 0.1)
    assert torch.allclose(pair["loss"], alone, rtol=1e-5)


def test_labels_see_the_statistics_of_their_half_and_leave_the_network_as_it_was():
    network, x = small(), torch.randn(6, 1, 8, 8) * 3 + 1
    before = {k: v.clone() for k, v in network.state_dict().items()}
    said = batch_labels([network], [1.0], torch.cat([x, x]))
    assert torch.allclose(said[:6], said[6:], atol=1e-6) and not torch.allclose(
        said[:6], running_logits(network, x), atol=1e-2
    )
    after = network.state_dict()
    assert (
        not network.training and list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    )
    reference = small().train()
    assert torch.allclose(said[:6], reference(x), atol=1e-5)
    assert batch_labels([network], [1.0], x[:1]).shape == (1, 3)


def test_dropout_stays_off_while_batch_norms_see_the_batch():
    network = nn.Sequential(small(), nn.Dropout(0.9))
    x = torch.randn(8, 1, 8, 8)
    assert torch.equal(batch_labels([network], [1.0], x), batch_labels([network], [1.0], x))


def test_a_half_batch_without_statistics_is_refused():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1), nn.Flatten())
    with pytest.raises(UserError, match="take a larger relabel"):
        batch_labels([network], [1.0], torch.randn(3, 1, 8, 8))


class Brightness(nn.Module):
    """Surer of class 0 the brighter an image is, and of class 1 the darker."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean((1, 2, 3))
        return torch.stack([bright, -bright], 1)


@pytest.mark.parametrize(("how", "first"), [("easy", 0.9), ("hard", 0.0), ("medium", 0.5)])
def test_images_begin_as_real_crops_of_the_wanted_difficulty(how: str, first: float):
    grey = (torch.arange(10) / 10).view(10, 1, 1, 1).expand(10, 1, 4, 4)
    real = RealImages(torch.cat([grey, -grey]), torch.arange(2).repeat_interleave(10), ["a", "b"], (0.5,), (0.5,))
    spec = RecoverSpec(init=how, crops=2, factor=1)
    x = begin(real, Brightness(), spec, 3, generator("test"))
    assert (
        x.shape == (3, 2, 1, 4, 4)
        and torch.allclose(x[0, 0], torch.full((1, 4, 4), first))
        and torch.allclose(x[0, 1], -x[0, 0])
    )
    mosaic = begin(real, Brightness(), RecoverSpec(init="easy", crops=1, factor=2), 2, generator("test"))
    assert mosaic[0, 0, 0, ::2, ::2].flatten().tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6])
    with pytest.raises(UserError, match="40 real images of each class are needed"):
        begin(real, Brightness(), RecoverSpec(factor=2), 10, generator("test"))
    with pytest.raises(UserError, match="does not divide"):
        begin(real, Brightness(), RecoverSpec(factor=3), 1, generator("test"))


def test_the_student_accumulates_and_its_rate_ends_where_the_cosine_is_stretched_to():
    images = torch.randn(12, 1, 8, 8).clamp(-1, 1)
    views = ViewLabels(Views(epochs=1, batch_size=4, augment="", mix="none"), torch.randn(1, 12, 3))
    made = SyntheticSet(images, torch.arange(3).repeat_interleave(4), ["a", "b", "c"], (0.5,), (0.5,), views=views)
    plain = SoftTraining.of(made, EvaluateSpec(epochs=10, lr=0.1), AugmentSpec(groups=""), torch.device("cpu"), ("t",))
    training = StretchedTraining.like(plain, StudentSpec(stretch=2.0, accumulate=2))
    network = small().train().requires_grad_(True)
    optimizer = training.new_optimizer(network)
    assert training.steps_per_epoch == 2 and [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]
    assert all(p.ndim == 1 for p in optimizer.param_groups[1]["params"])
    assert training.step(network, optimizer, 20).isfinite()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_a_step_has_the_mean_gradient_of_its_batches():
    images = torch.randn(12, 1, 8, 8).clamp(-1, 1)
    views = ViewLabels(Views(epochs=1, batch_size=5, augment="", mix="none"), torch.randn(1, 12, 3))
    made = SyntheticSet(images, torch.arange(3).repeat_interleave(4), ["a", "b", "c"], (0.5,), (0.5,), views=views)
    plain = SoftTraining.of(made, EvaluateSpec(epochs=10, lr=0.1), AugmentSpec(groups=""), torch.device("cpu"), ("t",))
    for accumulate, batches in ((3, 3), (4, 3), (1, 1)):
        network = small().requires_grad_(True)
        training = StretchedTraining.like(plain, StudentSpec(accumulate=accumulate))
        wanted = torch.stack([plain.loss(network, i) for i in range(batches)]).mean()
        gradients = torch.autograd.grad(wanted, list(network.parameters()))
        loss = training.step(network, training.new_optimizer(network), 0)
        assert torch.allclose(loss, wanted) and not loss.requires_grad
        assert all(torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(network.parameters(), gradients))


def test_labels_by_the_batch_and_by_the_running_statistics_are_compared_over_views():
    network, images = small(), torch.randn(40, 1, 8, 8)
    told = compared([network], [1.0], images, Views(epochs=1, batch_size=40, augment="", mix="none"))
    halves = images[torch.cat(ViewLabels(Views(epochs=1, batch_size=40), torch.zeros(0)).order(40, 0))].split(20)
    batch = torch.cat([small().train()(half) for half in halves])
    running = torch.cat([running_logits(network, half) for half in halves])
    assert (
        told["views_agreement"] == pytest.approx(float((batch.argmax(1) == running.argmax(1)).double().mean()))
        and told["views_agreement"] > 0.3
    )
    assert told["confidence_batch"] == pytest.approx(float(batch.softmax(1).amax(1).mean()), abs=1e-5)


def test_distances_to_a_network_fall_for_images_like_those_that_it_knows():
    network = small().train()
    known, other = torch.randn(200, 1, 8, 8), torch.randn(200, 1, 8, 8) * 2 + 1
    for _ in range(50):
        network(known)
    network.eval()
    assert statistics_distance(network, known) < statistics_distance(network, other) / 2


def test_a_run_measures_priors_and_keeps_images_with_labels_of_their_views(tmp_path: Path):
    found = execute(validate(tree()), tmp_path / "run", cpu=True)
    made = load_product(tmp_path / "run")
    assert made.views.logits.shape == (2, 20, 10) and made.labels.tolist() == [c for c in range(10) for _ in range(2)]
    assert all(0 <= found[f"prior_{m}"] <= 100 for m in range(3)) and found["out_of_range_pixels"] == 0
    assert found["distil_iterations"] == 6 and found["distil_peak_mb"] > 0 and found["distil_seconds_per_iteration"] > 0
    assert (
        0 <= found["views_agreement"] <= 1 and found["bn_outside_1"] > 0 and "bn_outside_0" not in found
    )  # pairs (0, 1) and (0, 2)
    execute(
        validate(tree(priors=[60, 62, 64], recover={"iterations": 0, "init": "noise"}, statistics="running")),
        tmp_path / "given",
        cpu=True,
    )
    other = load_product(tmp_path / "given")
    assert not torch.equal(other.images, made.images) and not torch.equal(other.views.logits, made.views.logits)


def test_priors_are_measured_anew_where_their_training_changes(tmp_path: Path):
    small_tree = tree(recover={"iterations": 0, "area": 0.5, "crops": 1}, measure={"epochs": 8, "ipc": 2})
    evaluate = small_tree["evaluate"]
    found = [
        execute(validate({**small_tree, "evaluate": {**evaluate, "lr": 0.05, **change}}), tmp_path / str(i), cpu=True)
        for i, change in enumerate(({}, {"optimizer": "sgd"}, {"schedule": {"name": "constant"}}))
    ]
    assert len({tuple(f[f"prior_{m}"] for m in range(3)) for f in found}) == 3


def test_wrong_committees_are_refused_with_a_sentence():
    with pytest.raises(UserError, match="voters is 4, but the committee has 3"):
        validate(tree(voters=4))
    with pytest.raises(UserError, match="priors has 2 numbers, but the committee has 3"):
        validate(tree(priors=[60, 61]))
    with pytest.raises(UserError, match="zca whitens"):
        validate(tree(zca=True))

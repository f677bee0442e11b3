"""INFER: the budget holds, one tensor serves every class, labels mix as images do, and the set is kept in the space
that it claims."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.functional.recovery import BatchNormStatistics
from stillhouse.methods.datasets.infer import CompensatedSet, StaticLabels, budget, compensated, compensation_loss
from stillhouse.models.convnet import ConvNet
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate
from stillhouse.synthetic.relabel import Views

MEAN, STD = (0.5,), (0.25,)


def small() -> nn.Module:
    torch.manual_seed(0)
    return ConvNet(4, 2, "batch", num_classes=5, input_shape=(1, 8, 8)).eval().requires_grad_(False)


def tree(**given) -> dict:
    net = {
        "model": "stillhouse:convnet2",
        "options": {"width": 4, "norm": "batch"},
        "train": {"epochs": 1, "batch_size": 50},
    }
    other = {**net, "options": {"width": 6, "norm": "batch"}}
    return {
        "method": "infer",
        "data": {"name": "digits", "augment": "plain", "size": 200, "test_size": 100},
        "network": {"model": "stillhouse:convnet2", "options": {"width": 4}},
        "teachers": [net, other],
        "ipc": 3,
        "compensate": {"iterations": 4, "lr": 0.1, "jitter": 1},
        "views": {"augment": "crop", "mix": "mixup", "epochs": 2},
        "evaluate": {"protocol": "soft", "networks": 1, "epochs": 2},
        **given,
    }


@pytest.mark.parametrize(
    ("ipc", "networks", "classes", "natural"),
    [(10, 4, 100, 9), (10, 4, 10, 7), (50, 4, 100, 48), (1, 4, 1000, 0), (1, 0, 3, 1)],
)
def test_the_budget_counts_images_and_compensators(ipc: int, networks: int, classes: int, natural: int):
    if not natural:
        with pytest.raises(UserError, match="leaves no natural image"):
            budget(ipc, networks, classes)
        return
    assert budget(ipc, networks, classes) == natural
    assert natural * (classes + networks) <= ipc * classes < (natural + 1) * (classes + networks)


def test_the_gradient_of_a_compensator_is_that_of_its_images_rolled_back_and_summed():
    network, x, u = small(), torch.randn(5, 1, 8, 8, requires_grad=True), torch.randn(1, 1, 8, 8, requires_grad=True)
    statistics = BatchNormStatistics(network)
    compensation_loss(network, statistics, x, u, torch.arange(5), (2, 3), 1.0)["loss"].backward()
    assert torch.allclose(u.grad[0], x.grad.sum(0), atol=1e-5)
    shifted = torch.roll(x.detach(), (2, 3), (2, 3)), torch.roll(u.detach(), (2, 3), (2, 3)).requires_grad_()
    compensation_loss(network, statistics, *shifted, torch.arange(5), (0, 0), 1.0)["loss"].backward()
    assert torch.allclose(torch.roll(u.grad, (2, 3), (2, 3)), shifted[1].grad, atol=1e-5)


def test_a_network_that_says_nothing_teaches_a_compensator_nothing():
    network, u = small(), torch.randn(1, 1, 8, 8, requires_grad=True)
    nn.init.zeros_(network.fc.weight)
    compensation_loss(network, BatchNormStatistics(network), torch.randn(5, 1, 8, 8), u, torch.arange(5), (1, 0), 0.0)[
        "loss"
    ].backward()
    assert not u.grad.any()


def test_one_tensor_is_added_to_an_image_of_every_class_and_only_the_sum_is_clipped():
    natural, u = torch.rand(2, 3, 1, 4, 4), torch.randn(2, 2, 1, 4, 4)
    out = compensated(natural, u, MEAN, STD).view(3, 6, 1, 4, 4)  # class, version
    assert torch.equal(out[:, :2], natural.transpose(0, 1).clamp(-2, 2))
    for network in range(2):
        for j in range(2):
            assert torch.allclose(out[:, 2 + 2 * network + j], (natural[j] + u[network, j]).clamp(-2, 2))


def test_static_labels_mix_as_the_images_do():
    images, logits = torch.randn(12, 1, 4, 4), torch.randn(1, 12, 3)
    images[:, 0, 0, :3] = logits[0]  # the label can be read from the picture
    labels = StaticLabels(Views(augment="", mix="mixup", batch_size=6), logits)
    seen = [labels.batch(images, rows, e, n) for e in range(2) for n, rows in enumerate(labels.order(12, e))]
    for x, said in seen:
        assert torch.allclose(x[:, 0, 0, :3], said, atol=1e-6)
    assert not torch.equal(seen[0][1], logits[0][labels.order(12, 0)[0]]) and not torch.equal(seen[0][0], seen[2][0])


def test_a_run_keeps_natural_images_compensators_and_one_vector_an_image(tmp_path: Path):
    found = execute(validate(tree()), tmp_path / "run", cpu=True)
    made = load_product(tmp_path / "run")
    assert isinstance(made, CompensatedSet) and isinstance(made.views, StaticLabels)
    assert (
        made.natural.shape == (2, 10, 1, 8, 8)
        and made.compensators.shape == (2, 2, 1, 8, 8)
        and made.images.shape == (60, 1, 8, 8)
    )
    assert made.views.logits.shape == (1, 60, 10) and found["stored_images"] == len(made) == 24 <= 30
    assert made.bytes == 2 * 10 * 64 * 4 + 4 * 64 * 2 + 600 * 2 and found["label_mb"] == pytest.approx(600 * 2 / 1e6)
    assert made.labels.tolist() == [c for c in range(10) for _ in range(6)] and found["out_of_range_pixels"] == 0
    assert found["bn_compensated"] < found["bn_natural"] and torch.equal(
        made.compensators != 0, torch.ones_like(made.compensators).bool()
    )


def test_dynamic_labels_are_of_views_and_no_iterations_repeat_the_natural_images(tmp_path: Path):
    execute(validate(tree(labels="dynamic", compensate={"iterations": 0})), tmp_path / "run", cpu=True)
    made = load_product(tmp_path / "run")
    assert made.views.logits.shape == (2, 60, 10) and not isinstance(made.views, StaticLabels)
    versions = made.images.view(10, 3, 2, 1, 8, 8)
    assert torch.equal(versions[:, 1], versions[:, 0]) and torch.equal(versions[:, 2], versions[:, 0])


def test_the_baseline_spends_the_whole_budget_on_natural_images(tmp_path: Path):
    found = execute(validate(tree(compensate=None)), tmp_path / "run", cpu=True)
    made = load_product(tmp_path / "run")
    assert made.images.shape == (30, 1, 8, 8) and found["stored_images"] == 30


def test_wrong_recipes_are_refused_with_a_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="static labels mix as mixup does"):
        validate(tree(views={"mix": "cutmix"}))
    with pytest.raises(UserError, match="zca whitens"):
        validate(tree(zca=True))
    plain = {"model": "stillhouse:convnet2", "options": {"width": 4}, "train": {"epochs": 1, "batch_size": 50}}
    with pytest.raises(UserError, match="take one with batch norm"):
        execute(validate(tree(teachers=[plain])), tmp_path / "run", cpu=True)

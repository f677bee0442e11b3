"""AST: smooth experts, a loss that is MTT's when all is switched off, representative images, and faults in a
sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from stillhouse.errors import UserError
from stillhouse.functional.matching import Flat, trajectory_distance, unroll
from stillhouse.methods.datasets.ast import (
    balance_factor,
    expert_loss,
    gradient_penalty,
    loss_factor,
    mean_step,
    momentum_path,
    path_distances,
    path_weights,
    perturbed,
)
from stillhouse.models.convnet import ConvNet
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate
from stillhouse.synthetic.initial import nearest_in_turn
from stillhouse.training.loop import Loop

DIGITS = {
    "method": "ast",
    "data": {"name": "digits", "augment": "plain", "size": 200, "test_size": 100},
    "network": {"model": "stillhouse:convnet2", "options": {"width": 4}},
    "augment": {"groups": "crop_scale"},
    "experts": {"count": 2, "epochs": 3, "batch_size": 100, "lr": 0.003, "momentum": 0.9},
    "expert_epochs": 2,
    "max_start": 1,
    "inner_steps": 4,
    "iterations": 2,
    "lr": 10,
    "evaluate": {"networks": 1, "epochs": 2},
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(4, 2, num_classes=3, input_shape=(3, 8, 8))


def batches(x: torch.Tensor, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x, torch.tensor([0, 1, 2]))] * steps


def test_without_momentum_factor_and_middle_terms_it_is_mtt():
    flat, x, lr = Flat(network()), normal(3, 3, 8, 8), torch.tensor(0.1)
    start = flat.vector()
    targets = torch.stack([start + 0.1 * normal(flat.size, seed=s) for s in (1, 2)])
    path = momentum_path(flat.gradient, start, batches(x, 4), lr, momentum=0)
    end = unroll(flat.gradient, start, batches(x, 4), lr)
    weights = torch.tensor(path_weights(2, "none"))
    assert torch.allclose(
        (weights * path_distances(path, targets)).sum(), trajectory_distance(end, start, targets[-1]), rtol=1e-5
    )


@pytest.mark.parametrize(("middle", "total"), [("none", 1.0), ("agg", 3.0), ("adaptive", 2.0)])
def test_a_student_that_stands_still_loses_one_for_every_target(middle: str, total: float):
    flat = Flat(network())
    start = flat.vector()
    targets = start + normal(3, flat.size, seed=1)
    path = momentum_path(flat.gradient, start, batches(normal(3, 3, 8, 8), 6), torch.tensor(0.0))
    assert (torch.tensor(path_weights(3, middle)) * path_distances(path, targets)).sum().item() == pytest.approx(
        total, rel=1e-5
    )


def test_momentum_is_that_of_sgd():
    net, x = network(), normal(3, 3, 8, 8)
    flat, labels = Flat(net), torch.tensor([0, 1, 2])
    end = momentum_path(flat.gradient, flat.vector(), batches(x, 3), torch.tensor(0.1), momentum=0.9)[-1]
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    assert torch.allclose(end, flat.vector(), atol=1e-5)


def test_the_graph_of_the_last_steps_ends_at_the_same_place_with_less_to_go_through():
    flat = Flat(network())
    inputs = [normal(3, 3, 8, 8, seed=s).requires_grad_() for s in range(4)]
    given = [(x, torch.tensor([0, 1, 2])) for x in inputs]
    whole = momentum_path(flat.gradient, flat.vector(), given, torch.tensor(0.1))[-1]
    part = momentum_path(flat.gradient, flat.vector(), given, torch.tensor(0.1), last=2)[-1]
    assert torch.allclose(whole, part, atol=1e-6)
    part.square().sum().backward()
    assert [x.grad is not None for x in inputs] == [False, False, True, True]
    assert all(x.grad.abs().sum() > 0 for x in inputs[2:])


def test_early_starts_are_damped_and_late_ones_amplified():
    factors = [balance_factor(e, 20) for e in range(20)]
    assert factors == sorted(factors) and factors[9] < 1 < factors[10]


def test_the_loss_factor_rises_to_one_and_stays():
    assert [round(loss_factor(e), 2) for e in (0, 1, 9, 10, 30)] == [0.5, 0.55, 0.95, 1.0, 1.0]


def test_only_convolutions_are_perturbed_and_by_a_share_that_their_size_sets():
    conv, bias = torch.ones(4, 3, 3, 3), torch.ones(4)
    noisy, same = perturbed([conv, bias], [normal(4, 3, 3, 3)], 1.0)
    assert same is bias
    assert (noisy - conv).norm().item() == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(perturbed([conv], [normal(4, 3, 3, 3)], 0.0)[0], conv)


def test_the_penalty_is_nothing_for_unit_gradients_and_finite_for_none():
    mean = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
    nn.init.ones_(mean[1].weight)
    assert gradient_penalty(mean, normal(2, 1, 2, 2)).item() == pytest.approx(0, abs=1e-6)
    nn.init.constant_(mean[1].weight, 0.5)
    assert gradient_penalty(mean, normal(2, 1, 2, 2), "image").item() == pytest.approx(0, abs=1e-6)
    nn.init.zeros_(mean[1].weight)
    value = gradient_penalty(mean, normal(2, 1, 2, 2))
    value.backward()
    assert value.item() == pytest.approx(1, abs=1e-3) and mean[1].weight.grad.isfinite().all()


def test_the_penalty_trains_the_network_and_weight_zero_leaves_the_damped_cross_entropy():
    net, x, y = network(), normal(3, 3, 8, 8), torch.tensor([0, 1, 2])
    gradient_penalty(net, x).backward()
    assert net.layer1.conv.weight.grad.abs().sum() > 0
    expected = 0.5 * nn.functional.cross_entropy(net(x), y)
    assert torch.equal(expert_loss(net, x, x, y, 0.5, 0.0), expected)


def test_centres_give_their_nearest_rows_in_turn_and_a_row_once():
    features = torch.tensor([[0.0], [0.1], [5.0], [5.2], [2.0]])
    assert nearest_in_turn(features, torch.tensor([[0.0], [5.0]]), 4).tolist() == [0, 2, 1, 3]
    assert nearest_in_turn(features, torch.tensor([[0.0], [0.04]]), 3).tolist() == [0, 1, 4]
    with pytest.raises(UserError, match="has 5"):
        nearest_in_turn(features, torch.zeros(1, 1), 6)


@pytest.mark.parametrize(
    "options", [{"middle": "adaptive", "unroll": "last", "inner_steps": 10}, {"ipc": 2, "batch_syn": 7}]
)
def test_options_run_and_the_set_brings_a_rate_to_train_with(options: dict, tmp_path: Path):
    execute(validate({**DIGITS, **options}), tmp_path / "run", cpu=True)
    made = load_product(tmp_path / "run")
    assert made.lr > 0 and made.images.isfinite().all() and len(made) == 10 * options.get("ipc", 1)


def test_representative_images_are_real_ones_of_their_class(tmp_path: Path):
    execute(validate({**DIGITS, "iterations": 0, "ipc": 3}), tmp_path / "run", cpu=True)
    pixels = load_product(tmp_path / "run").pixels()
    assert torch.allclose(pixels * 255, (pixels * 255).round(), atol=1e-2)  # 8-bit grey levels
    assert len(pixels.flatten(1).unique(dim=0)) == 30


def test_a_run_that_was_cut_off_goes_on_to_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    execute(validate(DIGITS), tmp_path / "whole", cpu=True)
    collect = Loop._collect

    def cut(self: Loop, i: int, terms: dict) -> None:
        collect(self, i, terms)
        if self.stage == "ast" and i == 0:
            self._interrupted = True

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_collect", cut)
        with pytest.raises(KeyboardInterrupt):
            execute(validate(DIGITS), tmp_path / "cut", cpu=True)
    execute(validate(DIGITS), tmp_path / "cut", cpu=True)
    whole, again = load_product(tmp_path / "whole"), load_product(tmp_path / "cut")
    assert torch.equal(whole.images, again.images) and whole.lr == again.lr


def test_a_straight_short_way_is_smoother():
    slow, fast = torch.arange(4.0)[:, None].expand(4, 9), 2 * torch.arange(4.0)[:, None].expand(4, 9)
    assert mean_step([slow]) == pytest.approx(3.0) and mean_step([fast]) == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_start": 2}, "beyond the experts"),
        ({"inner_steps": 1}, "less than expert_epochs"),
        ({"network": {"model": "stillhouse:convnet2", "options": {"width": 4, "norm": "batch"}}}, "buffers"),
        ({"ipc": 500}, "500 images"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(options: dict, words: str, tmp_path: Path):
    with pytest.raises((UserError, ValidationError), match=words):
        execute(validate({**DIGITS, **options}), tmp_path / "run", cpu=True)

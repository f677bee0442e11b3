"""DataDAM: attention maps are bounded, invariant where they should be, blind to order, and without them the method is
DM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.functional import matching
from stillhouse.functional.matching import feature_mean_distance, gradients
from stillhouse.methods.datasets.datadam import attention_map, attention_terms, losses
from stillhouse.methods.datasets.dm import embedding
from stillhouse.models.convnet import ConvNet
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate

DIGITS = {
    "data": {"name": "digits", "augment": "plain", "size": 200, "test_size": 100},
    "network": {"model": "stillhouse:convnet2", "options": {"width": 4}},
    "augment": {"groups": "crop_scale"},
    "evaluate": {"networks": 1, "epochs": 2},
    "batch_real": 5,
}


def network() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(8, 3, input_shape=(3, 16, 16)).requires_grad_(False)


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_nothing_is_lost_where_synthetic_images_are_the_real_ones():
    found = losses(network(), images(6), images(6), 3, 1, 0.01)
    assert torch.allclose(found["attention"], torch.zeros(2), atol=1e-8) and found["features"].item() == pytest.approx(
        0, abs=1e-6
    )


def test_the_order_of_images_within_a_class_does_not_matter():
    x = images(6, 1)
    swapped = x.view(3, 2, 3, 16, 16).flip(1).flatten(0, 1)
    a, b = (losses(network(), images(12), s, 3, 4, 0.01) for s in (x, swapped))
    assert torch.allclose(a["attention"], b["attention"], rtol=1e-4) and torch.allclose(
        a["features"], b["features"], rtol=1e-4
    )


@pytest.mark.parametrize("power", [1, 4])
def test_attention_does_not_see_the_scale_of_a_layer(power: float):
    real, syn = [images(6).abs()], [images(3, 1).abs()]
    scaled = attention_terms([7 * real[0]], [7 * syn[0]], 3, power)
    assert torch.allclose(attention_terms(real, syn, 3, power), scaled, rtol=1e-4)


def test_attention_is_bounded_by_four_hundred_a_class_and_layer():
    left, right = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    left[..., 0, 0], right[..., 3, 3] = 1, 1
    assert attention_terms([left], [right], 2).item() == pytest.approx(400)  # two unit maps apart: 100 * 2 * 2
    assert attention_terms([images(20).abs()], [images(20, 1).abs()], 10).item() <= 400 * 10


def test_a_dead_layer_gives_an_empty_map_and_no_nan():
    features = torch.zeros(2, 5, 4, 4, requires_grad=True)
    maps = attention_map(features, 4)
    maps.sum().backward()
    assert maps.abs().max() == 0 and features.grad.isfinite().all()


def test_the_feature_term_is_dm_and_without_attention_the_images_are_dms(tmp_path: Path):
    net, real, syn = network(), images(12), images(6, 1)
    expected = feature_mean_distance(net.embed(real), net.embed(syn), 3)
    assert torch.allclose(losses(net, real, syn, 3, 1, 0.01)["features"], expected, rtol=1e-5)
    made = []
    for name, recipe in (("dm", {"method": "dm"}), ("datadam", {"method": "datadam", "attention": 0})):
        execute(validate({**DIGITS, **recipe, "iterations": 3}), tmp_path / name, cpu=True)
        made.append(load_product(tmp_path / name).images)
    assert torch.allclose(*made, atol=1e-5)


def test_how_many_images_go_through_a_network_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    net, real, labels = network(), images(6), torch.arange(6) % 3

    def found() -> list[torch.Tensor]:
        x = images(3, 1).requires_grad_()
        terms = losses(net, real, x, 3, 1, 0.01)
        slopes = torch.autograd.grad(terms["attention"].sum() + terms["features"], x)
        net.requires_grad_(True)
        of_weights = gradients(net, real, labels)
        net.requires_grad_(False)
        return [terms["attention"], terms["features"], embedding(net, real), *slopes, *of_weights]

    together = found()
    monkeypatch.setattr(matching, "AT_ONCE", {"cpu": 4 * 16 * 16})  # four images, and a remainder
    for a, b in zip(together, found(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_hooks_do_not_pile_up():
    net = network()
    for _ in range(3):
        losses(net, images(3), images(3, 1), 3, 1, 0.01)
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("model", [{"model": "stillhouse:convnet1"}, {"model": "stillhouse:mlp"}])
def test_networks_without_two_activations_are_refused(model: dict, tmp_path: Path):
    with pytest.raises(UserError, match="datadam"):
        execute(validate({**DIGITS, "method": "datadam", "network": model}), tmp_path / "run", cpu=True)

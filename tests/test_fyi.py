"""FYI: mirror images join before augmentation, are not stored, leave symmetric sets as they were, and go with every
host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.functional.matching import feature_mean_distance
from stillhouse.methods.datasets.fyi import asymmetry, flip_first
from stillhouse.models.convnet import ConvNet
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate
from stillhouse.synthetic.config import AugmentSpec
from stillhouse.synthetic.synthesis import with_mirrors


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def network() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(8, 2, input_shape=(3, 8, 8))


def loss(syn: torch.Tensor, mirror: bool) -> torch.Tensor:
    net = network()
    return feature_mean_distance(net.embed(images(9)), net.embed(with_mirrors(syn, 3) if mirror else syn), 3)


def test_mirrors_follow_the_images_of_their_class():
    x = images(4)
    both = with_mirrors(x, 2)
    assert torch.equal(both, torch.cat([x[:2], x[:2].flip(-1), x[2:], x[2:].flip(-1)]))


def test_a_symmetric_set_is_the_hosts():
    x = images(3)
    x = x + x.flip(-1)
    assert torch.allclose(loss(x, True), loss(x, False), rtol=1e-4)


def test_an_image_may_be_replaced_by_its_mirror_and_the_gradient_mirrors_with_it():
    x = images(6, 1)
    turned = x.clone()
    turned[2] = turned[2].flip(-1)
    a, b = x.requires_grad_(), turned.detach().requires_grad_()
    for leaf in (a, b):
        loss(leaf, True).backward()
    assert torch.allclose(loss(a, True), loss(b, True), rtol=1e-4)
    assert torch.allclose(a.grad[2], b.grad[2].flip(-1), atol=1e-5) and torch.allclose(a.grad[0], b.grad[0], atol=1e-5)


def test_the_flip_leaves_the_groups_and_comes_first():
    assert flip_first(AugmentSpec(groups="color_flip_crop")) == AugmentSpec(groups="color_crop", always="flip")
    assert flip_first(AugmentSpec(groups="", always="color")) == AugmentSpec(groups="", always="flip_color")


def test_asymmetry_is_zero_for_symmetric_images():
    x = images(2)
    assert asymmetry(x + x.flip(-1)) == 0 < asymmetry(x)


def recipe(host: str, **given: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dsa": {"outer": 2},
        "mtt": {"experts": {"count": 1, "epochs": 2}, "max_start": 0, "inner_steps": 2, "unroll": "steps"},
        "ast": {
            "experts": {"count": 1, "epochs": 2, "batch_size": 100},
            "expert_epochs": 2,
            "max_start": 0,
            "inner_steps": 2,
        },
        "ncfm": {"pool": {"count": 1, "epochs": 1, "batch_size": 100}, "frequencies": 8},
    }.get(host, {})
    shape = {
        "network": {"model": "stillhouse:convnet2", "options": {"width": 4}},
        "evaluate": {"networks": 1, "epochs": 2},
    }
    sizes = {"batch_real": 5, "iterations": 2}
    data = {"name": "digits", "augment": "plain", "size": 200, "test_size": 100}
    return {
        "method": "fyi",
        "data": data,
        "handed": True,
        "host": {"method": host, **shape, **sizes, **options},
        **given,
    }


@pytest.mark.parametrize("host", ["dm", "datadam", "mtt", "dsa", "ast", "ncfm"])
def test_every_host_learns_from_mirrors_and_stores_none(host: str, tmp_path: Path):
    made = []
    for mirror in (True, False):
        figures = execute(validate(recipe(host, mirror=mirror)), tmp_path / f"{mirror}", cpu=True)
        made.append(load_product(tmp_path / f"{mirror}"))
        assert figures["stored_images"] == 10 and figures["asymmetry"] > 0
    assert made[0].made_by["mirror"] and not torch.equal(made[0].images, made[1].images)


def test_both_are_judged_with_a_flip_first():
    for mirror in (True, False):
        config = validate(recipe("dm", mirror=mirror))
        assert config.evaluate.augment.always == "flip" and "flip" not in config.evaluate.augment.groups
        assert config.augment.always == ("flip" if mirror else "")


def test_mirrored_digits_need_a_word_and_hosts_must_learn_pixels(tmp_path: Path):
    with pytest.raises(UserError, match="handed=true"):
        execute(validate(recipe("dm", handed=False)), tmp_path / "run", cpu=True)
    with pytest.raises(UserError, match="does not learn pixels"):
        validate({"method": "fyi", "data": "digits", "host": {"method": "selection", "network": "stillhouse:convnet2"}})
    with pytest.raises(UserError, match="batch_reel"):
        validate(
            {
                "method": "fyi",
                "data": "digits",
                "host": {"method": "dm", "network": "stillhouse:convnet2", "batch_reel": 3},
            }
        )

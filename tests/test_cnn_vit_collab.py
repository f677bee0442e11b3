"""CNN-ViT collaboration: who teaches whom, what each term reaches, its symmetries, and a recipe of two products."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from stillhouse.config.specs import ModelSpec
from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.functional.counting import IGNORED
from stillhouse.methods.dense.cnn_vit_collab import (
    Collaboration,
    Config,
    Students,
    descriptors,
    feature_loss,
    pixel_losses,
    pixel_transfer,
    region_losses,
    region_transfer,
    taught,
)
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.signals import Batch
from stillhouse.tasks.segmentation import Segmentation

TASK = Segmentation(("ground", "thing", "sky"), (32, 32), (0.5,) * 3, (0.5,) * 3)
LATE = Progress(epoch=1, epochs=2)
CNN = {"model": "hf:config:mobilenet_v2", "options": {"depth_multiplier": 0.35, "output_stride": 16}}
VIT = {
    "model": "hf:config:segformer",
    "options": {
        "hidden_sizes": [4, 8, 8, 8],
        "depths": [1] * 4,
        "num_attention_heads": [1] * 4,
        "decoder_hidden_size": 8,
        "sr_ratios": [1] * 4,
    },
}
NETWORKS = {"cnn": CNN, "vit": VIT, "cnn_layers": {"high": "segmentation_head.conv_projection"}}


class Net(nn.Module):
    """A low map, a high map, and logits at half the size."""

    stage_names = ("low", "high")

    def __init__(self, width: int) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.classify = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classify(torch.relu(self.high(torch.relu(self.low(x)))))
        return out


def config(**keys: object) -> Config:
    return Config.model_validate({"method": "cnn_vit_collab", "data": "camvid", **NETWORKS, "cnn_layers": {}, **keys})


def batch() -> Batch:
    draw = torch.Generator().manual_seed(1)
    label = torch.randint(0, 3, (2, 16, 16), generator=draw)
    label[:, :3] = IGNORED
    return {"input": torch.randn(2, 3, 32, 32, generator=draw), "label": label}


def collaboration(cnn: nn.Module, vit: nn.Module, **keys: object) -> Collaboration:
    made = Collaboration(cnn, vit, TASK, config(grid=4, width=8, **keys))
    made.build(batch())
    return made.train()


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return Net(4), Net(6)


# ---- who teaches ---------------------------------------------------------------------------------------------------


def test_the_better_network_teaches_one_pixel():
    """K = 2 and y = 0: logits (0, 0) cost ln 2, logits (ln 3, 0) cost ln 4/3."""
    cnn = torch.zeros(1, 1, 1, 2, requires_grad=True)
    vit = torch.tensor([[[[math.log(3), 0.0]]]], requires_grad=True)
    label = torch.zeros(1, 1, 1, dtype=torch.int64)
    losses = [pixel_losses(z, label) for z in (cnn, vit)]
    assert [x.item() for x in losses] == pytest.approx([0.693147, 0.287682], abs=1e-6)
    to_cnn = pixel_transfer(cnn, vit, taught(losses[0], losses[1]))
    loss = to_cnn + pixel_transfer(vit, cnn, taught(losses[1], losses[0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.130812, abs=1e-6)
    assert cnn.grad.flatten().tolist() == pytest.approx([-0.25, 0.25]) and not vit.grad.any()


def test_directions_exclude_each_other_and_ties_teach_nobody():
    mine, other = torch.rand(100), torch.rand(100)
    other[:10] = mine[:10]
    there, back = taught(mine, other), taught(other, mine)
    assert not (there & back).any() and not there[:10].any() and (there | back)[10:].all()
    assert taught(mine, other, margin=0.5).sum() < there.sum()


def test_a_region_is_judged_by_its_valid_pixels():
    losses, valid = torch.ones(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    losses[0, 0, 0] = 9
    valid[0, 0, 0] = False
    valid[0, 2:, 2:] = False
    found = region_losses(losses, valid, 2)
    assert found.flatten().tolist() == [1, 1, 1, math.inf]
    assert not taught(found, found / 2)[0, 1, 1], "a region without labels transfers nothing"


# ---- identities ----------------------------------------------------------------------------------------------------


def test_equal_networks_transfer_nothing_and_equal_maps_agree():
    net = Net(4)
    other = Net(4)
    other.load_state_dict(net.state_dict())
    terms = collaboration(net, other)(batch(), LATE)
    assert all(terms[f"{n}_{part}"] == 0 for n in ("cnn", "vit") for part in ("regions", "pixels", "pixels_taught"))
    x = torch.randn(2, 4, 5, 5)
    assert feature_loss(x, x).item() == pytest.approx(0, abs=1e-6)


def test_exchanging_the_students_exchanges_all_terms():
    first, second = nets()
    made, swapped = collaboration(first, second), collaboration(second, first)
    for part in ("adaptors", "projectors"):
        for name, other in (("cnn", "vit"), ("vit", "cnn")):
            getattr(swapped, part)[other].load_state_dict(getattr(made, part)[name].state_dict())
    one, two = made(batch(), LATE), swapped(batch(), LATE)
    torch.testing.assert_close(one.pop("loss"), two.pop("loss"))
    for key, value in one.items():
        name, _, rest = key.partition("_")
        torch.testing.assert_close(value, two[f"{'vit' if name == 'cnn' else 'cnn'}_{rest}"])


def test_the_order_of_classes_and_the_scale_of_features_do_not_matter():
    mine, other, label = torch.randn(2, 4, 4, 3), torch.randn(2, 4, 4, 3), torch.randint(0, 3, (2, 4, 4))
    order = torch.tensor([2, 0, 1])
    where = taught(pixel_losses(mine, label), pixel_losses(other, label))
    renamed = order.argsort()[label]
    there = taught(pixel_losses(mine[..., order], renamed), pixel_losses(other[..., order], renamed))
    assert torch.equal(where, there)
    permuted = pixel_transfer(mine[..., order], other[..., order], there)
    torch.testing.assert_close(permuted, pixel_transfer(mine, other, where))
    maps = torch.randn(2, 5, 6, 6), torch.randn(2, 5, 6, 6)
    everywhere = torch.ones(2, 3, 3, dtype=torch.bool)
    losses = [region_transfer(descriptors(k * maps[0], 3), descriptors(maps[1], 3), everywhere) for k in (1, 7)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(feature_loss(3 * maps[0], maps[1]), feature_loss(maps[0], maps[1]))


def test_at_a_high_temperature_pixels_compare_centred_logits():
    mine, other, where = torch.randn(2, 3, 3, 4), torch.randn(2, 3, 3, 4), torch.ones(2, 3, 3, dtype=torch.bool)
    centred = (mine - mine.mean(-1, keepdim=True)) - (other - other.mean(-1, keepdim=True))
    expected = centred.square().sum(-1).mean() / (2 * 4)
    found = pixel_transfer(mine.double(), other.double(), where, 1e3)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-3)


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["features", "regions", "pixels"])
@pytest.mark.parametrize(("mine", "other"), [("cnn", "vit"), ("vit", "cnn")])
def test_a_term_reaches_its_own_network_and_never_the_one_that_teaches(term: str, mine: str, other: str):
    made = collaboration(*nets())
    made(batch(), LATE)[f"{mine}_{term}"].backward()
    grads = {n: [p.grad for p in made.student[n].parameters()] for n in ("cnn", "vit")}
    reached = {n: any(g is not None and g.any() for g in found) for n, found in grads.items()}
    assert reached[mine] and not reached[other]


def test_images_without_labels_give_zeros_and_finite_gradients():
    given = batch()
    given["label"].fill_(IGNORED)
    made = collaboration(*nets(), features=0)
    terms = made(given, LATE)
    terms["loss"].backward()
    assert all(v == 0 for v in terms.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())


def test_selective_transfer_begins_after_a_share_of_the_training():
    made = collaboration(*nets())
    early = made(batch(), Progress(epoch=0, batch=0, steps_per_epoch=10, epochs=2))
    assert "cnn_pixels" not in early and "cnn_features" in early and "cnn_pixels" in made(batch(), LATE)


def test_mutual_learning_teaches_every_pixel_both_ways():
    terms = collaboration(*nets(), select="all")(batch(), LATE)
    assert terms["cnn_pixels_taught"] == terms["vit_pixels_taught"] == 1


def test_the_convolutional_network_has_a_rate_of_its_own():
    made = collaboration(*nets(), cnn_lr=0.3, regions=0)
    groups = made.param_groups()
    assert [g.get("lr") for g in groups] == [None, 0.3]
    grouped = {id(p) for g in groups for p in g["params"]}
    assert grouped == {id(p) for p in made.parameters()} and not made.projectors


def test_one_network_twice_is_refused():
    net = Net(4)
    with pytest.raises(UserError, match="give two"):
        Collaboration(net, net, TASK, config())


def test_a_recipe_leaves_two_products(tmp_path: Path):
    draw = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for side in ("images", "labels"):
            (tmp_path / "scenes" / split / side).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((32, 32), np.uint8)
            mask[: draw.integers(8, 20)] = 2
            image = np.array([[60, 120, 60], [200, 40, 40], [80, 120, 220]], np.uint8)[mask]
            Image.fromarray(image).save(tmp_path / "scenes" / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(tmp_path / "scenes" / split / "labels" / f"{i}.png")
    train = {"epochs": 2, "batch_size": 4, "optimizer": {"name": "adamw", "lr": 1e-3}}
    data = {"name": f"masks:{tmp_path / 'scenes'}", "options": {"classes": ["ground", "thing", "sky"], "ignore": 255}}
    figures = execute(
        recipe.validate({"method": "cnn_vit_collab", "data": data, **NETWORKS, "train": train}),
        tmp_path / "run",
        cpu=True,
    )
    assert {"miou_cnn", "miou_vit", "parameters_cnn", "parameters_vit"} <= set(figures)
    both = load_product(tmp_path / "run")
    assert isinstance(both, Students)
    alone = load_product(tmp_path / "run" / "product" / "vit")
    image = torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8)
    assert torch.equal(alone.predict([image])[0]["classes"], both.vit.predict([image])[0]["classes"])
    plain = TASK.build(ModelSpec.model_validate(CNN)).state_dict()
    assert set(both.cnn.module.state_dict()) == set(plain)

"""NRR-DD: critical pixels never move, maps are class activation maps, patches are hard but right, and two numbers a
view teach."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.recovery import BatchNormStatistics
from stillhouse.methods.datasets.nrr_dd import (
    DistanceLabels,
    DistanceSet,
    RefineSpec,
    activation_map,
    critical,
    discover,
    distance_loss,
    distances,
    mask,
    masked_step,
    mosaic,
    refine_loss,
    share_inside,
)
from stillhouse.methods.datasets.sre2l import RecoverSpec, recover_loss
from stillhouse.models.convnet import ConvNet
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate
from stillhouse.signals import Taps
from stillhouse.synthetic.relabel import Views


def tree(**given) -> dict:
    return {
        "method": "nrr_dd",
        "data": {"name": "digits", "augment": "plain", "size": 200, "test_size": 100},
        "network": {"model": "stillhouse:convnet2", "options": {"width": 4}},
        "teacher": {
            "model": "stillhouse:convnet2",
            "options": {"width": 8, "norm": "batch"},
            "train": {"epochs": 3, "batch_size": 25},
        },
        "ipc": 2,
        "discover": {"crops": 2, "keep": 0.8, "area": 0.6},
        "refine": {"iterations": 8, "lr": 0.2, "jitter": 1},
        "relabel": {"epochs": 2, "batch_size": 8, "augment": "resized_crop", "area": 0.5},
        "evaluate": {"protocol": "soft", "networks": 1, "epochs": 2},
        **given,
    }


@pytest.mark.parametrize("pooled", [True, False])
def test_the_mean_of_a_map_and_the_bias_are_the_logit(pooled: bool):
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.ReLU())
    head = (
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)]
        if pooled
        else [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(5 * 16, 3)]
    )
    network = nn.Sequential(features, *head).eval().requires_grad_(False)
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 2, 1, 1])
    found = activation_map(network, Taps(network, ["0"]), x, y)
    logits = network(x).gather(1, y[:, None])[:, 0]
    assert torch.allclose(found.mean((1, 2)) + head[-1].bias[y], logits, atol=1e-5)
    if pooled:
        assert torch.allclose(found, (head[-1].weight[y][:, :, None, None] * features(x)).sum(1), atol=1e-5)


def test_a_map_runs_from_0_to_1_and_a_flat_one_is_nowhere_critical():
    c = critical(
        torch.stack([torch.arange(16.0).view(4, 4) - 3, torch.full((4, 4), 2.0), torch.full((4, 4), -1.0)]), (8, 8)
    )
    assert c.shape == (3, 1, 8, 8) and float(c[0].min()) == 0 and float(c[0].max()) == 1 and not c[1:].any()


def test_each_patch_may_have_critical_pixels_of_its_own():
    activation = torch.arange(16.0).view(1, 4, 4)
    whole, tiles = critical(activation, (8, 8)), critical(activation, (8, 8), tiles=2)
    assert not (whole[..., :4, :4] >= 0.5).any()
    for quarter in (tiles[..., :4, :4], tiles[..., :4, 4:], tiles[..., 4:, :4], tiles[..., 4:, 4:]):
        assert float(quarter.min()) == 0 and float(quarter.max()) == 1


def test_the_mask_is_eps_where_nothing_is_active_and_0_in_critical_regions():
    c = torch.linspace(0, 1, 11)
    m = mask(c, 0.5)
    assert m[0] == 0.5 and not m[5:].any() and (m[:6].diff() < 0).all()


def test_a_masked_gradient_step_is_the_papers_and_leaves_critical_pixels_bit_for_bit():
    x, m = torch.randn(2, 3, 4, 4).requires_grad_(), mask(torch.rand(2, 1, 4, 4), 0.5)
    before, optimizer = x.detach().clone(), torch.optim.SGD([x], 0.3)
    x.grad = torch.randn(2, 3, 4, 4)
    optimizer.step()
    masked_step(x, before, m)
    assert torch.allclose(x, before - m * 0.3 * x.grad, atol=1e-7)
    still = (m == 0).expand_as(x)
    assert still.any() and torch.equal(x[still], before[still])


def test_with_a_mask_of_ones_it_is_sre2l_from_real_images():
    torch.manual_seed(0)
    network = ConvNet(4, 2, "batch", num_classes=3, input_shape=(1, 8, 8)).eval().requires_grad_(False)
    statistics, x, y = BatchNormStatistics(network), torch.randn(3, 1, 8, 8), torch.arange(3)
    ours = refine_loss(network, statistics, x, y, RefineSpec(alpha_bn=0.3))
    theirs = recover_loss(network, statistics, x, y, RecoverSpec(r_bn=0.3))
    assert torch.equal(ours["loss"], theirs["loss"])
    stepped = x + 0.1
    masked_step(stepped, x, torch.ones(3, 1, 8, 8))
    assert torch.allclose(stepped, x + 0.1, atol=1e-6)


def test_the_share_of_a_map_inside_a_box():
    c = torch.zeros(3, 1, 4, 4)
    c[0, 0, 0, 0], c[1, 0, 3, 3] = 1, 1
    box = torch.tensor([[0.0, 0.0, 0.5]]).expand(3, 3)
    assert share_inside(c, box).tolist() == [1, 0, 0.25]


class Bright(nn.Module):
    """Surer of class 0 the brighter an image is; its features are the image."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        bright = self.features(x * 1.0).mean((1, 2, 3))
        return torch.stack([bright, -bright], 1)


def patches_of(values: list[float], wanted: int, **given) -> list[float]:
    network = Bright()
    images = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    how = {
        "factor": 1,
        "crops": 1,
        "keep": 1.0,
        "area": 1.0,
        "choose": "low",
        "drawn": torch.Generator().manual_seed(0),
        **given,
    }
    return discover(network, Taps(network, ["features"]), images, 0, wanted, **how).mean((1, 2, 3)).tolist()


def test_patches_are_the_least_sure_of_those_that_are_right():
    assert patches_of([0.9, -0.5, 0.1, 0.5], 2) == pytest.approx([0.1, 0.5])
    assert patches_of([0.9, -0.5, 0.1, 0.5], 2, choose="high") == pytest.approx([0.9, 0.5])


def test_too_few_right_patches_are_said_and_made_up_for():
    with pytest.warns(UserWarning, match="1 patches that the network gets right, of 4 wanted"):
        assert patches_of([-0.8, 0.3, -0.2], 4) == pytest.approx([0.3, -0.2, -0.8, 0.3])


def test_a_mosaic_is_read_row_by_row():
    tiles = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 2, 2)
    assert mosaic(tiles, 2)[:, 0, ::2, ::2].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_distances_ignore_a_constant_are_log_c_where_nothing_is_known_and_never_overflow():
    z, own, partner = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 1, 0, 2, 3])
    d = distances(z, own, partner)
    assert d.shape == (5, 2) and torch.allclose(distances(z + 7, own, partner), d, atol=1e-5) and d[1, 0] == d[1, 1]
    assert torch.allclose(distances(torch.zeros(5, 4), own, partner), torch.full((5, 2), math.log(4)))
    assert distances(torch.tensor([[1e4, 0.0]]), torch.tensor([1]), torch.tensor([0])).tolist() == [[50, 0]]


def test_the_loss_is_0_only_where_both_probabilities_are_the_teachers_and_its_gradient_is_the_papers():
    z, own, partner = (
        torch.randn(6, 4, requires_grad=True),
        torch.tensor([0, 1, 2, 3, 0, 1]),
        torch.tensor([1, 2, 3, 0, 2, 0]),
    )
    mixed = torch.ones(6, dtype=torch.bool)
    mine = distances(z, own, partner)
    assert float(distance_loss(mine, mine.detach(), mixed).detach()) == 0
    for column in (0, 1):
        other = mine.detach().clone()
        other[0, column] += 0.5
        assert float(distance_loss(mine, other, mixed).detach()) == pytest.approx(0.5 / 6)
    teacher = torch.stack([mine[:, 0].detach() + torch.tensor([1.0, -1, 1, -1, 1, -1]), mine[:, 1].detach()], 1)
    distance_loss(mine, teacher, ~mixed).backward()  # the first distance alone
    sign = torch.tensor([-1.0, 1, -1, 1, -1, 1])[:, None]
    assert torch.allclose(z.grad, sign * (z.detach().softmax(1) - F.one_hot(own, 4)) / 6, atol=1e-6)


def test_a_view_that_is_not_mixed_counts_once():
    teacher, student = torch.zeros(2, 2), torch.ones(2, 2)
    assert float(distance_loss(student, teacher, torch.tensor([True, False]))) == 1.5
    assert float(distance_loss(2 * student, teacher, torch.tensor([False, False]), "squared")) == 4


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
def test_the_share_of_own_pixels_is_what_is_in_the_picture(mix: str):
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 8, 8)
    rows = torch.tensor([4, 1, 0, 3])
    for number in range(8):
        x, partners, share = Views(augment="", mix=mix).mixed(images, rows, 0, number)
        assert sorted(partners.tolist()) == sorted(rows.tolist())
        assert torch.allclose(x.mean((1, 2, 3)), share * rows + (1 - share) * partners, atol=1e-5)
    assert mix != "none" or (share == 1 and torch.equal(partners, rows))


def test_a_run_keeps_two_numbers_a_view_and_refines_toward_the_network(tmp_path: Path):
    found = execute(validate(tree()), tmp_path / "run", cpu=True)
    made = load_product(tmp_path / "run")
    assert (
        isinstance(made, DistanceSet)
        and isinstance(made.views, DistanceLabels)
        and made.views.logits.shape == (2, 20, 2)
    )
    assert (
        found["label_mb"] == 2 * 20 * 2 * 2 / 1e6
        and found["out_of_range_pixels"] == 0
        and 0 < found["critical_pixels"] < 1
    )
    assert found["ce_refined"] + 0.1 * found["bn_refined"] < found["ce_initial"] + 0.1 * found["bn_initial"]
    execute(validate(tree(refine=None, labels="soft")), tmp_path / "initial", cpu=True)
    initial = load_product(tmp_path / "initial")
    still = (initial.images == made.images).double().mean()
    assert (
        initial.views.logits.shape == (2, 20, 10)
        and float(still) >= found["critical_pixels"] - 1e-9
        and float(still) < 1
    )


def test_wrong_recipes_are_refused_with_a_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="zca whitens"):
        validate(tree(zca=True))
    with pytest.raises(UserError, match="does not divide images of 8 x 8"):
        execute(validate(tree(discover={"factor": 3})), tmp_path / "run", cpu=True)
    with pytest.raises(UserError, match="gives"):
        execute(validate(tree(cam="fc")), tmp_path / "other", cpu=True)

"""Group pruning: the pull, thresholds by group, shared masks; the compact network is the masked one; attention does not
see channels; a run leaves a smaller detector that loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_detection import folder as folder  # a fixture
from torch import Tensor, nn

import stillhouse
from stillhouse.config.specs import ModelSpec, TrainSpec
from stillhouse.errors import UserError
from stillhouse.methods.dense.group_prune_sad.distilling import attention, attention_loss, class_loss
from stillhouse.methods.dense.group_prune_sad.method import Recovery, SparseTraining, Sparsity, attended
from stillhouse.methods.dense.group_prune_sad.pruning import (
    chains,
    channel_masks,
    copy_kept,
    kept_channels,
    largest,
    mask_network,
    masks_of,
    norm,
    prunable,
    pulled,
    threshold,
    widths_of,
)
from stillhouse.models import build
from stillhouse.models.one_stage import GROUPS, OneStage
from stillhouse.models.yolov4 import GROUPS as YOLO
from stillhouse.tasks.detection import Detection
from stillhouse.training.context import Progress, TrainingContext
from stillhouse.training.optimizers import make_optimizer

RATIOS = {"backbone_high": 0.3, "backbone_low": 0.5, "neck": 0.4, "head": 0.6}
TASK = Detection(("a", "b"), (64, 96), (0.5,) * 3, (0.5,) * 3)


def trained(activation: str = "leaky") -> OneStage:
    """A network whose norms are those of a trained one: any scales, shifts and statistics."""
    torch.manual_seed(0)
    net = OneStage(2, (3, 64, 96), width=8, depth=2, activation=activation).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(-1, 1)
            m.bias.data.normal_()
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return net


def masked(net: OneStage) -> tuple[OneStage, dict[int, Tensor]]:
    masks = masks_of(net.graph, RATIOS, fewest=2)
    import copy

    other = copy.deepcopy(net)
    mask_network(other.graph, masks)
    return other, masks


# ---- surgery ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["leaky", "mish", "silu", "relu"])
@torch.no_grad()
def test_the_compact_network_is_the_masked_one(activation: str):
    net = trained(activation)
    other, masks = masked(net)
    compact = OneStage(2, (3, 64, 96), 8, 2, widths_of(net.graph, masks), activation).eval()
    copy_kept(other.graph, masks, compact.graph)
    x = torch.randn(2, 3, 64, 96)
    for a, b in zip(other.grids(x), compact.grids(x)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in compact.parameters()) < 0.7 * sum(p.numel() for p in net.parameters())


@torch.no_grad()
def test_constants_of_removed_channels_move_through_shortcuts_and_routes():
    """With the scales of what goes at 0, the network and the masked one agree inside: the padded border apart."""
    net = trained()
    masks = masks_of(net.graph, RATIOS, fewest=2)
    for i, mask in masks.items():
        norm(net.graph, i).weight[~mask] = 0.0
    x = torch.randn(1, 3, 384, 384)
    before = net.grids(x)
    mask_network(net.graph, masks)
    for a, b in zip(before, net.grids(x)):
        middle = a.shape[2] // 2
        inside = (slice(None), slice(None), slice(middle - 2, middle + 2), slice(middle - 2, middle + 2))
        torch.testing.assert_close(a[inside], b[inside], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(a, b), "a test that could fail: the shifts were not 0"


def test_layers_that_are_added_share_one_mask():
    net = trained()
    masks = masks_of(net.graph, RATIOS, fewest=2)
    found = chains(net.graph.plan)
    assert len(found) == 3 and all(len(chain) == 3 for chain in found), "two blocks and their source, three times"
    for chain in found:
        assert all(torch.equal(masks[i], masks[chain[0]]) for i in chain)
    for layer, mask in zip(net.graph.plan, channel_masks(net.graph, masks)):
        assert len(mask) == layer.channels


def test_what_upsampling_and_pooling_read_is_left_whole():
    plan = trained().graph.plan
    fixed = {s for layer in plan if layer.kind in ("upsample", "pool") for s in layer.sources}
    assert fixed and not fixed & set(prunable(plan))
    assert {plan[i].group for i in prunable(plan)} == set(GROUPS)


def test_yolov4_has_the_published_layers_and_can_be_pruned():
    with torch.device("meta"):
        net = build(ModelSpec(model="stillhouse:yolov4"), 80, (3, 416, 416))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(64.4, abs=0.1)
    plan = net.graph.plan
    assert [plan[i].kind for i in (7, 9, 108, 118, 138)] == ["add", "concat", "pool", "upsample", "out"]
    assert len(plan) == 159 and plan[113].channels == 2048 and {plan[i].group for i in prunable(plan)} == set(YOLO)
    assert sum(len(chain) for chain in chains(plan)) == 23 + 5, "23 shortcuts, and the source of each chain"
    attended(net.graph, Recovery(layers={7: 1e6, 58: 1e6, 106: 1e3}))


# ---- masks and the pull ----------------------------------------------------------------------------------------------


def test_a_group_keeps_its_own_share():
    """A group of small scales would be emptied by one threshold; by its own it loses its ratio."""
    net = trained()
    for i in prunable(net.graph.plan):
        if net.graph.plan[i].group == "neck":
            norm(net.graph, i).weight.data.mul_(0.01)
    own = masks_of(net.graph, dict.fromkeys(GROUPS, 0.5), fewest=1)
    one = masks_of(net.graph, {"all": 0.5}, by_group=False, fewest=1)
    neck = [i for i in prunable(net.graph.plan) if net.graph.plan[i].group == "neck"]
    assert sum(int(one[i].sum()) for i in neck) == len(neck), "the fewest that stay"
    left, whole = sum(int(own[i].sum()) for i in neck), sum(len(own[i]) for i in neck)
    assert abs(left - whole / 2) <= 1


def test_too_few_channels_are_filled_up_with_the_largest():
    gamma = torch.tensor([0.1, -0.5, 0.3, 0.2])
    assert kept_channels(gamma, torch.tensor(0.4), 0.5).tolist() == [False, True, True, False]
    assert kept_channels(gamma, torch.tensor(9.0), 0.0).all(), "16 of four are all"
    assert kept_channels(gamma, torch.tensor(0.3), 0.25).tolist() == [False, True, False, False], "strictly above"


@pytest.mark.parametrize("ratio", [1.0, -0.1])
def test_a_ratio_that_leaves_nothing_is_refused(ratio: float):
    with pytest.raises(UserError, match=r"ratio in \[0, 1\)"):
        threshold([torch.ones(4)], ratio)
    with pytest.raises(UserError, match="none for the group"):
        masks_of(trained().graph, {"neck": 0.5})


def test_the_protected_scales_feel_a_hundredth_of_the_pull():
    gammas = [torch.tensor([-0.9, 0.1, 0.0]), torch.tensor([0.8, 0.2])]
    kept = largest(gammas, 0.6)
    assert [k.tolist() for k in kept] == [[True, False, False], [True, False]]
    pull = pulled(torch.zeros(3), gammas[0], 1e-2, kept[0])
    torch.testing.assert_close(pull, torch.tensor([-1e-4, 1e-2, 0.0]))


def test_the_pull_is_added_once_a_step_and_scales_do_not_decay():
    net = trained().train()
    module = SparseTraining(net, TASK, Sparsity(strength=0.5, switch=1.0))
    ctx = TrainingContext(module, Progress(epochs=4), {}, 0, torch.device("cpu"), Path(), None)
    target = {"boxes": torch.tensor([[8.0, 8.0, 24.0, 24.0]]), "labels": torch.tensor([1])}
    batch = {"input": torch.randn(2, 3, 64, 96), "target": [target, target]}
    module(batch, ctx.progress)["loss"].backward()
    i = prunable(net.graph.plan)[0]
    gamma = norm(net.graph, i).weight
    before = gamma.grad.clone()
    module.before_update(ctx)
    torch.testing.assert_close(gamma.grad, before + 0.5 * gamma.detach().sign())
    spec = TrainSpec.model_validate({"optimizer": {"name": "sgd", "weight_decay": 0.1}})
    groups = make_optimizer(module.param_groups(), spec, net).param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert decay[id(gamma)] == 0.0 and decay[id(net.graph.layers[0].conv.weight)] == 0.1
    assert set(decay) == {id(p) for p in net.parameters()}


# ---- distilling ------------------------------------------------------------------------------------------------------


def test_attention_sees_neither_channels_nor_scale():
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(attention(x), attention(3 * x[:, torch.randperm(6)]))
    assert attention_loss([x], [2 * x], [1e6]).item() == pytest.approx(0, abs=1e-3)
    zero = torch.zeros(2, 3, 5, 4, requires_grad=True)
    attention_loss([zero], [x], [1e6]).backward()
    assert zero.grad is not None and (zero.grad == 0).all()
    with pytest.raises(UserError, match="same images and strides"):
        attention_loss([x], [x[..., :2]], [1.0])


def test_half_precision_does_not_overflow():
    x, y = torch.randn(2, 6, 5, 4), torch.randn(2, 3, 5, 4)
    half = attention_loss([x.half()], [y.half()], [1e6])
    assert half.isfinite() and half.item() == pytest.approx(attention_loss([x], [y], [1e6]).item(), rel=0.01)
    grid = torch.randn(2, 3, 4, 4, 7)
    assert class_loss([grid], [grid]).item() == pytest.approx(0, abs=1e-4)


def test_layers_are_chosen_by_group_and_size():
    graph = trained().graph
    found = attended(graph, Recovery())
    assert {graph.plan[i].group for i, _ in found} == set(GROUPS) and len(found) == 8
    assert attended(graph, Recovery(betas=dict.fromkeys(GROUPS, 0.0))) == []
    with pytest.raises(UserError, match=r"recover\.layers: 99 is no layer"):
        attended(graph, Recovery(layers={99: 1.0}))
    with pytest.raises(UserError, match=r"recover\.betas has no weight for the group 'head'"):
        attended(graph, Recovery(betas=dict.fromkeys(GROUPS[:3], 1.0)))


# ---- a whole run -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_smaller_detector_of_the_wanted_size(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    train = {"epochs": 1, "batch_size": 4, "optimizer": {"name": "adamw", "lr": 1e-3}}
    tree = {
        "method": "group_prune_sad",
        "data": {"name": f"voc:{folder}"},
        "student": {"model": "stillhouse:one_stage", "options": {"width": 8}},
        "train": train,
        "sparse": {"train": train},
        "prune": {"keep_parameters": 0.5, "fewest": 2},
        "recover": {"train": train},
    }
    figures = stillhouse.run_recipe(tree, tmp_path / "run", progress=False, cpu=True)
    assert figures["parameters_kept"] == pytest.approx(0.5, abs=0.06) and figures["compact_error"] < 1e-4
    assert {"ap_dense", "ap_sparse", "ap_pruned", "ap", "multiply_adds_kept"} <= set(figures)
    meta = json.loads((tmp_path / "run" / "product" / "product.json").read_text())
    widths = meta["model"]["options"]["widths"]
    loaded = stillhouse.load(tmp_path / "run")
    assert widths == [m.num_features for m in loaded.modules() if isinstance(m, nn.BatchNorm2d)]
    stages = sorted(p.name.partition("-")[0] for p in (tmp_path / "cache" / "stages").iterdir() if p.is_dir())
    assert stages == ["prune", "sparse", "teacher"]


def test_another_network_is_refused(folder: Path, tmp_path: Path):
    tree = {
        "method": "group_prune_sad",
        "data": {"name": f"voc:{folder}"},
        "student": ModelSpec(model="stillhouse:pyramid_detector").model_dump(),
    }
    with pytest.raises(UserError, match="stillhouse:yolov4, not 'stillhouse:pyramid_detector'"):
        stillhouse.run_recipe(tree, tmp_path / "run", progress=False, cpu=True)

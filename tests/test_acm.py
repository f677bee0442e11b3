"""Adaptive computation modules: learners add up, work that is not chosen is not done, labels and losses behave at their
edges, and products load."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.methods.compression.acm.early_exit import EarlyExit
from stillhouse.methods.compression.acm.method import AdaptiveStudent, Config, LearnerTraining
from stillhouse.methods.compression.acm.modules import (
    AdaptiveModule,
    Gate,
    Learners,
    budget_fraction,
    cumulative_outputs,
    diversity_loss,
    entropy_loss,
    gate_labels,
    gate_loss,
    learner_loss,
    separated,
    shape_of,
)
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.tasks.classification import Classification
from stillhouse.training.context import Progress

TASK = Classification(tuple("0123456789"), (1, 8, 8))
MLPS, PROJECTIONS = ["mlp", "feed_forward"], ["qkv", "q", "k", "v", "proj", "out"]


def vit(**options: int) -> nn.Module:
    torch.manual_seed(0)
    return TASK.build(
        ModelSpec(model="stillhouse:vit", options={"patch": 2, "dim": 24, "depth": 2, "heads": 2, **options})
    )


def one_hot(counts: torch.Tensor, choices: int) -> torch.Tensor:
    return nn.functional.one_hot(counts, choices).float()


def test_the_first_k_are_the_sum_of_single_learners():
    torch.manual_seed(0)
    learners, x = Learners(8, 5, 4), torch.randn(2, 3, 8)
    every = learners.all(x)
    assert every.shape == (2, 3, 5, 8) and every[..., 0, :].abs().max() == 0
    for k in range(5):
        torch.testing.assert_close(every[..., k, :], learners.first(x, k))
    torch.testing.assert_close(every[..., 3, :] - every[..., 1, :], learners.between(x, 1, 3))


def test_a_detached_learner_gets_the_gradient_of_its_own_k_alone():
    outputs = torch.randn(2, 3, 4, requires_grad=True)
    target = torch.randn(2, 4)
    own = cumulative_outputs(outputs, detached=True)
    torch.testing.assert_close(own, cumulative_outputs(outputs))
    learner_loss(own, target).backward()
    for n in range(3):
        rest = outputs.detach().clone()
        alone = rest[:, n].clone().requires_grad_()
        h = rest[:, :n].sum(1) + alone
        ((h - target).square().sum() / (2 * 4 * 4)).backward()
        assert outputs.grad is not None
        torch.testing.assert_close(outputs.grad[:, n], alone.grad)


@pytest.mark.parametrize("counts", [[0, 0, 0], [4, 4, 4], [0, 4, 2], [1, 2, 3], [3, 0, 3]])
def test_what_runs_for_some_tokens_is_what_all_would_give(counts: list[int]):
    torch.manual_seed(0)
    module, x = AdaptiveModule(8, 5, 4, "gelu", 0).eval(), torch.randn(2, 3, 8)
    k = torch.tensor(counts).repeat(2)
    expected = module.learners.all(x).flatten(0, 1)[torch.arange(6), k]
    with torch.no_grad():
        torch.testing.assert_close(module._executed(x.flatten(0, 1), k), expected)


def test_skipped_learners_cost_nothing():
    module, x = AdaptiveModule(8, 5, 4, "gelu", 0).eval(), torch.randn(10, 8)
    done = []
    for k in range(5):
        counter = FlopCounterMode(display=False)
        with counter:
            module._executed(x, torch.full((10,), k))
        done.append(counter.get_total_flops() / 2)
    assert done == [10 * k * module.learners.cost for k in range(5)]


def test_training_and_inference_agree_on_a_sure_gate():
    torch.manual_seed(0)
    module, x = AdaptiveModule(8, 5, 4, "gelu", 1), torch.randn(2, 3, 8)
    with torch.no_grad():
        module.gate.net[-1].weight.zero_()
        module.gate.net[-1].bias.copy_(torch.tensor([0.0, 0.0, 100.0, 0.0]))
    trained = module(x)
    torch.testing.assert_close(trained, module.eval()(x))
    torch.testing.assert_close(trained, module.learners.first(x, 3))


def test_the_output_depends_on_the_gate_and_its_choice_is_hard():
    torch.manual_seed(0)
    module, x = AdaptiveModule(8, 5, 4, "gelu", 0), torch.randn(2, 50, 8)
    module(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.gate.parameters())
    assert set(module.gate(x).detach().round(decimals=5).unique().tolist()) == {0.0, 1.0}
    with torch.autocast("cpu", torch.bfloat16):
        assert module.gate(x).dtype == torch.float32


def test_labels_stop_where_little_is_gained():
    """Errors 8, 4, 3.9, 1, 1 of k = 0 … 4: the second learner gains little, so 2; then cases at the edges."""
    target = torch.zeros(1)
    label = lambda errors, **rule: int(gate_labels(torch.tensor(errors)[:, None], target, 1.2, **rule))  # noqa: E731
    assert label([8.0, 4.0, 3.9, 1.0, 1.0]) == 2
    assert label([8.0, 4.0, 2.0, 1.0, 0.5]) == 4, "every learner helps"
    assert label([8.0, 7.9, 2.0, 1.9, 1.0]) == 3, "the first is never the last"
    assert label([8.0, 7.9, 2.0, 1.9, 1.0], rule="released") == 4, "there the first counts as none"
    assert label([8.0, 4.0, 0.0, 0.0, 0.0]) == 3, "perfect already: nothing is gained"
    assert label([0.0, 0.0, 0.0, 0.0, 0.0]) == 2


def test_labels_below_the_least_choice_count_as_it():
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    assert gate_loss(logits, torch.tensor([0, 2]), least=1) == gate_loss(logits, torch.tensor([1, 2]), least=1)
    gate = Gate(4, 3, least=1).eval()
    assert gate(torch.randn(5, 7, 4)).shape == (5, 7, 3) and gate(torch.randn(5, 7, 4))[..., 0].sum() == 0


def test_the_losses_at_their_extremes():
    whole, none = one_hot(torch.full((4, 6), 4), 5), one_hot(torch.zeros(4, 6, dtype=torch.long), 5)
    assert budget_fraction([whole, whole], [3.0, 1.0]) == 1 and budget_fraction([none, none], [3.0, 1.0]) == 0
    assert budget_fraction([whole, none], [3.0, 1.0]).item() == pytest.approx(0.75)
    even = one_hot(torch.arange(5).repeat(4, 1), 5)
    assert entropy_loss([even]).item() == pytest.approx(-1) and entropy_loss([whole]).item() == pytest.approx(0)
    assert diversity_loss([whole]) == 0 and diversity_loss([whole[:1]]) == 0
    assert diversity_loss([torch.cat([whole, none])]).item() == pytest.approx(-0.8)


def test_attention_taken_apart_and_mlps_are_found_in_ours_and_timms():
    for network in (vit(), timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)):
        channels = 1 if network.patch_embed.proj.in_channels == 1 else 3
        batch = {"input": torch.randn(2, channels, *((8, 8) if channels == 1 else (32, 32)))}
        before = network.eval()(batch["input"])
        found = shape_of(network, MLPS, PROJECTIONS, 4, 1.0, TASK, batch)
        torch.testing.assert_close(network(batch["input"]), before, rtol=1e-4, atol=1e-5)
        names = list(found.places)
        assert [n for n in names if n.startswith("blocks.0")] == [
            *(f"blocks.0.attn.qkv.parts.{i}" for i in range(3)),
            "blocks.0.attn.proj",
            "blocks.0.mlp",
        ]
        assert not found.places["blocks.0.mlp"].projection and found.places["blocks.0.attn.proj"].projection


def test_all_learners_cost_what_they_replace():
    network = vit()
    batch, dense = {"input": torch.randn(2, 1, 8, 8)}, sum(p.numel() for p in vit().parameters())
    modules = shape_of(network, MLPS, PROJECTIONS, 4, 1.0, TASK, batch).applied(network)
    added = sum(p.numel() for m in modules.values() for p in m.gate.parameters())
    assert sum(p.numel() for p in network.parameters()) - added == pytest.approx(dense, rel=0.05)


@pytest.mark.parametrize(
    ("names", "count", "message"),
    [
        (["nothing"], 4, "no module named"),
        (["patch_embed"], 4, "only tokens of one width"),
        (["mlp"], 400, "hidden unit"),
    ],
)
def test_what_cannot_be_replaced_is_refused(names: list[str], count: int, message: str):
    with pytest.raises(UserError, match=message):
        shape_of(vit(), names, [], count, 1.0, TASK, {"input": torch.randn(2, 1, 8, 8)})
    with pytest.raises(ValueError, match="more than there are"):
        Config.model_validate({"data": "digits", "teacher": "stillhouse:vit", "learners": 2, "fixed": 3})
    with pytest.raises(ValueError, match="less than 1"):
        Config.model_validate({"data": "digits", "teacher": "stillhouse:vit", "budget": 1.0})


def test_phase_one_trains_learners_alone_and_leaves_the_teacher():
    import copy

    network, batch = vit(), {"input": torch.randn(8, 1, 8, 8)}
    teacher = separated(copy.deepcopy(network), PROJECTIONS)
    modules = shape_of(network, MLPS, PROJECTIONS, 4, 1.0, TASK, batch).applied(network)
    assert not {p.data_ptr() for p in network.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    training = LearnerTraining(network, modules, teacher, TASK)
    training.build(batch)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    optimizer = torch.optim.AdamW(training.param_groups(), 1e-2)
    losses = []
    for _ in range(30):
        loss = training(batch, Progress())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert losses[-1] < losses[0] and changed == {k for k in before if ".learners." in k}


def test_samples_that_are_sure_leave_and_the_others_are_not_disturbed():
    network = vit(depth=3).eval()
    x = torch.randn(6, 1, 8, 8)
    module = EarlyExit(network, ["blocks.0", "blocks.1"], [24, 24], 10).eval()
    whole = module(x)
    with torch.no_grad():
        module.heads[1][1].weight.mul_(50)
        first = module.heads[0](network.blocks[0](tokens := _tokens(network, x)).mean(1)).softmax(-1).amax(-1)
        module.threshold.fill_(float(first.sort().values[3]))
        out = module(x)
        second = module.heads[1](network.blocks[1](network.blocks[0](tokens)).mean(1))
    sure, later = first >= module.threshold, second.softmax(-1).amax(-1) >= module.threshold
    torch.testing.assert_close(out[~sure & ~later], whole[~sure & ~later])
    torch.testing.assert_close(out[~sure & later], second[~sure & later])
    assert sure.sum() == 3
    module.threshold.fill_(0.0)
    counter = FlopCounterMode(display=False)
    with counter:
        module(x)
    assert 2 * counter.get_total_flops() < cost_of(network, x)


def _tokens(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    patches = network.patch_embed(x)
    return torch.cat([network.cls_token.expand(len(x), -1, -1), patches], 1) + network.pos_embed


def cost_of(network: nn.Module, x: torch.Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        network(x)
    return counter.get_total_flops()


RECIPE = """
method: acm
data: {name: digits, size: 200, test_size: 100, augment: plain}
teacher:
  model: stillhouse:vit
  options: {patch: 2, dim: 24, depth: 2, heads: 2}
  train: {epochs: 3, batch_size: 50, optimizer: {name: adamw, lr: 0.003}}
learner_train: {epochs: 15, batch_size: 20, optimizer: {name: adamw, lr: 0.01}}
gate_train: {epochs: 1, batch_size: 50, optimizer: {name: adamw, lr: 0.01}}
train: {epochs: 1, batch_size: 50, optimizer: {name: adamw, lr: 0.001}}
variants:
  fixed: {fixed: 2, projections: []}
  early_exit: {early_exit: 0.8}
"""


@pytest.mark.parametrize("variant", [None, "fixed", "early_exit"])
def test_products_load_and_answer_as_they_did(variant: str | None, recipe_file, tmp_path: Path):
    figures = execute(recipe.load(recipe_file(RECIPE), variant), tmp_path / "run", cpu=True)
    product = load_product(tmp_path / "run")
    assert isinstance(product, AdaptiveStudent)
    assert product.module(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    assert sum(p.numel() for p in product.module.parameters()) == figures["parameters"]
    if variant == "early_exit":
        assert product.module.threshold <= 1 and product.shape.exits == {"blocks.0": 24}
        return
    assert 0 <= figures["learners_share"] <= 1
    assert figures["error_first_4"] < figures["error_first_0"]
    if variant == "fixed":
        assert figures["learners_share"] == 0.5
    else:
        exported = torch.export.export(product.module, (torch.randn(2, 1, 8, 8),)).module()
        images = torch.randn(2, 1, 8, 8)
        torch.testing.assert_close(exported(images), product.module(images), rtol=1e-4, atol=1e-5)

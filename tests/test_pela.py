"""PELA: low-rank copies of any network, the losses that repair them, and the product."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.methods.compression.pela import Config, LowRankStudent, feature_loss, largest_entry, perturbation_loss
from stillhouse.nn.attention import SeparateAttention, SeparateProjections, separate_attention
from stillhouse.nn.low_rank import LowRank, decompose, factors, rank_of, repeated_blocks
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product


def test_the_error_is_that_of_the_discarded_singular_values():
    weight = torch.randn(24, 40, dtype=torch.double)
    a, b = factors(weight, 7)
    s = torch.linalg.svdvals(weight)
    torch.testing.assert_close((b @ a - weight).square().sum(), s[7:].square().sum())
    torch.testing.assert_close(a @ a.T, torch.diag(s[:7]), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(b.T @ b, torch.diag(s[:7]), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "dense",
    [
        nn.Linear(20, 30),
        nn.Linear(20, 30, bias=False),
        nn.Conv2d(20, 30, 1, stride=2),
        nn.Conv2d(20, 30, 1, bias=False),
    ],
)
def test_at_full_rank_a_layer_computes_what_it_did_and_its_weight_can_be_read(dense):
    low = LowRank(dense, 20)
    x = torch.randn(2, 20) if isinstance(dense, nn.Linear) else torch.randn(2, 20, 5, 5)
    torch.testing.assert_close(low(x), dense(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(low.weight, dense.weight, rtol=1e-4, atol=1e-5)
    assert (low.bias is None) == (dense.bias is None)


def test_parameters_fall_with_the_ratio_as_predicted():
    counts = []
    for ratio in (1.5, 2, 3, 6):
        net = nn.Sequential(nn.Linear(48, 192), nn.GELU(), nn.Linear(192, 48))
        biases = 240
        decompose(net, ratio)
        wanted = sum(rank_of(i, o, ratio) * (i + o) for i, o in ((48, 192), (192, 48))) + biases
        assert sum(p.numel() for p in net.parameters()) == wanted
        counts.append(wanted)
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "deit3_small_patch16_224", "eva02_tiny_patch14_224"],
)
def test_timm_transformers_work_with_factorised_layers_and_are_close_at_a_mild_ratio(name: str):
    size = 56 if "14" in name else 64
    options = {"img_size": size, "depths": (1, 1, 1, 1)} if "swin" in name else {"img_size": size, "depth": 2}
    net = timm.create_model(name, num_classes=10, **options).eval()
    x = torch.randn(2, 3, size, size)
    before = net(x)
    replaced = decompose(net, 0.4, ["norm", "head", "patch_embed", "downsample"])
    assert not replaced, "a layer that would grow stays"
    replaced = decompose(net, 1.2, ["norm", "head", "patch_embed", "downsample"])
    assert replaced and net(x).shape == before.shape and not torch.equal(net(x), before)
    assert all("blocks." in b for b in repeated_blocks([r.name for r in replaced]))


def test_pointwise_convolutions_of_a_convolutional_network_can_be_factorised():
    net = timm.create_model("tf_efficientnet_lite0", num_classes=10).eval()
    dense = sum(p.numel() for p in net.parameters())
    assert not decompose(copy.deepcopy(net), 2, ["classifier"])
    decompose(net, 2, ["classifier"], pointwise=True)
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 10) and sum(p.numel() for p in net.parameters()) < 0.7 * dense


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_taken_apart_computes_the_same(batch_first: bool):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first).eval()
    apart = SeparateAttention(attention)
    q, kv = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    causal = torch.triu(torch.full((5, 7), -torch.inf), 3)
    if not batch_first:
        q, kv = q.transpose(0, 1), kv.transpose(0, 1)
    for need in (True, False):
        for options in (
            {},
            {"key_padding_mask": padding},
            {"attn_mask": causal},
            {"attn_mask": causal.isinf(), "key_padding_mask": padding},
        ):
            wanted, given = (
                attention(q, kv, kv, need_weights=need, **options),
                apart(q, kv, kv, need_weights=need, **options),
            )
            torch.testing.assert_close(given[0], wanted[0], rtol=1e-4, atol=1e-5)
            if need:
                torch.testing.assert_close(given[1], wanted[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(apart(q[0], kv[0], kv[0])[0], attention(q[0], kv[0], kv[0])[0], rtol=1e-4, atol=1e-5)


def test_torchs_encoder_layers_take_no_fused_path_around_it():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0), 2).eval()
    x, padding = torch.randn(2, 6, 16), torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    wanted = encoder(x, src_key_padding_mask=padding)
    separate_attention(encoder)
    with torch.no_grad():
        given = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(given[~padding], wanted[~padding], rtol=1e-4, atol=1e-5)
    assert len(decompose(encoder, 2)) == 2 * 6


def test_fused_projections_taken_apart_compute_the_same():
    fused, x = nn.Linear(8, 24), torch.randn(2, 5, 8)
    torch.testing.assert_close(SeparateProjections(fused)(x), fused(x))
    with pytest.raises(UserError, match="3 even parts"):
        SeparateProjections(nn.Linear(8, 25))


class Tied(nn.Module):
    """An embedding tied to the output layer, two layers with one weight, and one layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(50, 24), nn.Linear(24, 50, bias=False)
        self.out.weight = self.embed.weight
        self.one, self.two = nn.Linear(24, 24), nn.Linear(24, 24)
        self.two.weight = self.one.weight
        self.again = self.one

    def forward(self, x):
        return self.out(self.again(self.two(self.one(self.embed(x)))))


def test_tied_weights_stay_tied():
    net = Tied()
    replaced = decompose(net, 2)
    assert [r.name for r in replaced] == ["one"] and net.again is net.one and net.two[0].weight is net.one[0].weight
    assert net.out.weight is net.embed.weight and net(torch.arange(5)).shape == (5, 50)
    twin = Tied()
    decompose(twin, 2, approximate=False)
    twin.load_state_dict(net.state_dict())
    torch.testing.assert_close(twin(torch.arange(5)), net(torch.arange(5)))


def test_the_perturbation_loss_is_the_maximum_and_its_gradient_that_of_the_whole_product():
    a, b, w = (torch.randn(s, dtype=torch.double) for s in ((3, 8), (6, 3), (6, 8)))
    a.requires_grad_(), b.requires_grad_()
    d = largest_entry(a, b, w)
    wanted = (b @ a - w).abs().amax()
    torch.testing.assert_close(d, wanted)
    mine, theirs = torch.autograd.grad((d - 0.1) ** 2, (a, b)), torch.autograd.grad((wanted - 0.1) ** 2, (a, b))
    for m, t in zip(mine, theirs):
        torch.testing.assert_close(m, t)
    exact = (b @ a).detach()
    assert perturbation_loss([(a, b, exact)], 0.5).item() == pytest.approx(0.25)
    assert perturbation_loss([(a, b, exact)], 0.5, hinge=True) == 0


def test_features_of_different_number_or_no_weight_at_all_are_refused():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError):
        feature_loss([x], [x, x])
    with pytest.raises(ValueError, match="all weights are 0"):
        Config.model_validate(
            {
                "data": "digits",
                "teacher": "stillhouse:vit",
                "label_weight": 0,
                "feature_weight": 0,
                "perturbation_weight": 0,
            },
        )


RECIPE = """
method: pela
data: {name: digits, size: 200, test_size: 200}
teacher:
  model: stillhouse:vit
  options: {patch: 2, dim: 24, depth: 2, heads: 2}
  train: {epochs: 3, batch_size: 50, optimizer: {name: adamw, lr: 0.003}}
ratio: 2
train: {epochs: 1, batch_size: 50, optimizer: {name: adamw, lr: 0.001}}
variants:
  tuned:
    original: {name: digits, size: 200, test_size: 200}
    data: {name: digits, classes: [1, 3, 5], size: 60}
    finetune: {epochs: 1, batch_size: 20}
  dense: {ratio: null, train: null}
"""


@pytest.mark.parametrize("variant", [None, "tuned", "dense"])
def test_the_product_is_small_and_loads(variant: str | None, recipe_file, tmp_path: Path):
    figures = execute(recipe.load(recipe_file(RECIPE), variant), tmp_path / "run", cpu=True)
    product = load_product(tmp_path / "run")
    assert isinstance(product, LowRankStudent)
    assert sum(p.numel() for p in product.module.parameters()) == figures["parameters"]
    classes = 3 if variant == "tuned" else 10
    assert product.module(torch.randn(2, 1, 8, 8)).shape == (2, classes)
    assert (figures["parameters_share"] == 1) == (variant == "dense")

"""Weights on a grid: the identities of the quantiser, networks that compute with it, what is stored, and quantized
distillation as a whole."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import stillhouse
from stillhouse.errors import UserError
from stillhouse.methods.compression.quantized_distillation import (
    LearnedLevels,
    QuantizedStudent,
    allocate_levels,
    compression,
    huffman_bits,
    quantile_points,
)
from stillhouse.nn import quantise
from stillhouse.nn.quantise import UniformLevels, quantise_uniform, scale
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.training.loop import Loop

SHAPES = [((7, 9), 16), ((5,), 64), ((3, 4, 3, 3), None), ((64,), 64), ((1,), 8), ((129,), 64)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def levels_of(net: nn.Module, levels: int = 4, bucket: int | None = 16) -> dict[str, UniformLevels]:
    return {name: UniformLevels(levels, bucket) for name in quantise.quantisable(net)}


@pytest.mark.parametrize("shape, bucket", SHAPES)
@pytest.mark.parametrize("levels", [2, 3, 4, 16, 256])
def test_quantised_values_are_near_reach_the_extremes_and_stay_when_quantised_again(shape, bucket, levels):
    x = torch.randn(shape)
    q = quantise_uniform(x, levels, bucket)
    _, alpha, _ = scale(x, bucket)
    step = quantise.buckets(x, bucket).sub(quantise.buckets(q, bucket)).abs() / (alpha / (levels - 1))
    assert q.shape == x.shape and step.max() <= 0.5 + 1e-4
    rows, quantised = quantise.buckets(x, bucket), quantise.buckets(q, bucket)
    torch.testing.assert_close(quantised.amax(1), rows.amax(1))
    torch.testing.assert_close(quantised.amin(1), rows.amin(1))
    torch.testing.assert_close(quantise_uniform(q, levels, bucket), q)


def test_a_constant_bucket_is_reproduced_exactly():
    x = torch.full((40,), 0.3)
    assert torch.equal(quantise_uniform(x, 4, 16), x)


def test_stochastic_rounding_is_unbiased():
    torch.manual_seed(1)
    x = torch.rand(64)
    mean = torch.stack([quantise_uniform(x, 4, None, stochastic=True) for _ in range(4000)]).mean(0)
    assert (mean - x).abs().max() < 0.03


def test_half_precision_weights_are_scaled_in_full_precision():
    x = torch.randn(4096).bfloat16()
    level = UniformLevels(256, None)
    assert level(x).dtype == torch.bfloat16
    torch.testing.assert_close(level.pack(x).unpack(), quantise_uniform(x.float(), 256, None))


@pytest.mark.parametrize("shape, bucket", SHAPES)
@pytest.mark.parametrize("levels", [2, 3, 5, 16, 300])
def test_packed_tensors_unpack_to_the_quantised_weights(shape, bucket, levels):
    x = torch.randn(shape)
    code = UniformLevels(levels, bucket).pack(x)
    torch.testing.assert_close(code.unpack(), quantise_uniform(x, levels, bucket), rtol=0, atol=1e-6)
    assert len(code.codes) == -(-x.numel() * quantise.bits_of(levels) // 8)


def test_codes_of_several_tensors_survive_a_file(tmp_path: Path):
    codes = {f"w{i}": UniformLevels(3 + i, bucket).pack(torch.randn(shape)) for i, (shape, bucket) in enumerate(SHAPES)}
    x = torch.randn(50)
    codes["learned"] = LearnedLevels(x, 5, 16).pack(x)
    quantise.save(codes, {"running_mean": torch.randn(3)}, tmp_path / "w.safetensors")
    found, others = quantise.load(tmp_path / "w.safetensors")
    assert list(others) == ["running_mean"]
    for name, code in codes.items():
        assert torch.equal(found[name].unpack(), code.unpack())


def test_gradients_are_those_at_quantised_weights_and_steps_move_the_full_ones():
    net, x = network(), torch.randn(10, 6)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for p in twin.parameters():
            p.copy_(quantise_uniform(p, 4, 16))
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    quantise.attach(net, levels_of(net))
    torch.testing.assert_close(net(x), twin(x))
    torch.testing.assert_close(net[1].running_var, twin[1].running_var)
    net(x).square().sum().backward()
    twin(x).square().sum().backward()
    for (name, (_, weight)), wanted in zip(quantise.attached(net).items(), twin.parameters()):
        torch.testing.assert_close(weight.grad, wanted.grad)
        assert torch.equal(weight, before[name])


def test_full_weights_are_there_when_a_forward_pass_fails_and_come_back_when_levels_go():
    net = network()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    quantise.attach(net, levels_of(net))
    with pytest.raises(RuntimeError):
        net(torch.randn(10, 5))
    quantise.detach(net, quantised=False)
    assert {n: p for n, p in net.named_parameters()}.keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert type(net[0]) is nn.Linear


def test_detached_networks_compute_as_they_did():
    net, x = network().eval(), torch.randn(10, 6)
    quantise.attach(net, levels_of(net))
    said = net(x)
    codes = quantise.detach(net)
    torch.testing.assert_close(net(x), said, rtol=1e-5, atol=1e-6)
    assert set(codes) == {n for n, _ in net.named_parameters()}


def test_a_tied_weight_is_quantised_wherever_it_is_used_and_stored_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.embed(x))

    net, x = Tied(), torch.arange(11)
    wanted = quantise_uniform(net.embed.weight, 4, None)
    quantise.attach(net, levels_of(net, bucket=None))
    torch.testing.assert_close(net(x), wanted @ wanted.T)
    codes = quantise.detach(net)
    assert len(codes) == 1 and net.out.weight is net.embed.weight


def test_the_first_and_the_last_tensor_and_vectors_can_be_left_out():
    net = network()
    assert quantise.quantisable(net, first_and_last=False) == [n for n, _ in net.named_parameters()][1:-1]
    assert quantise.quantisable(net, lambda p: p.ndim >= 2) == ["0.weight", "3.weight"]


def test_weights_outside_the_limit_are_clamped_and_get_no_gradient():
    x = torch.tensor([-2.0, -0.5, 0.5, 3.0], requires_grad=True)
    y = UniformLevels(16, None, limit=1.0)(x)
    y.sum().backward()
    assert y.abs().max() <= 1 and x.grad.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("levels, bucket, message", [(1, 8, "levels"), (4, 0, "bucket")])
def test_levels_and_buckets_that_cannot_be_are_refused(levels, bucket, message):
    with pytest.raises(UserError, match=message):
        UniformLevels(levels, bucket)


def test_weights_that_cannot_be_quantised_are_refused():
    net = network()
    net[0].weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        quantise.attach(net, levels_of(net))
    lstm = nn.Sequential(nn.LSTM(3, 4))
    with pytest.raises(UserError, match="LSTM"):
        quantise.attach(lstm, levels_of(lstm))


def test_even_points_are_the_uniform_quantiser_and_gradients_of_points_add_up():
    x = torch.randn(12, 11)
    learned = LearnedLevels(x, 8, 32, "uniform")
    torch.testing.assert_close(learned(x), quantise_uniform(x, 8, 32), rtol=1e-5, atol=1e-6)
    gradient = torch.randn_like(x)
    learned(x).backward(gradient)
    _, alpha, _ = scale(x, 32)
    total = (alpha * quantise.buckets(torch.ones_like(x), 32))[:, :].reshape(-1)[: x.numel()] * gradient.reshape(-1)
    torch.testing.assert_close(learned.points.grad.sum(), total.sum(), rtol=1e-4, atol=1e-4)


def test_coincident_points_and_points_outside_are_no_error():
    x = torch.cat([torch.zeros(50), torch.rand(10)])
    learned = LearnedLevels(x, 8, None)
    assert (quantile_points(x, 8).diff() >= 0).all() and torch.isfinite(learned(x)).all()
    with torch.no_grad():
        learned.points[0] = 2.0
    learned.sort()
    assert (learned.points.diff() >= 0).all()


def test_levels_are_dealt_by_gradients_and_their_sum_stays():
    assert allocate_levels([1.0, 1.0, 2.0], 8) == [7, 7, 10]
    for bits in (False, True):
        norms = torch.rand(17).tolist()
        dealt = allocate_levels(norms, 4, bits=bits)
        assert sum(dealt) == 4 * 17
    assert allocate_levels([1.0, 0.0], [4, 4], bits=True) == [5, 3]


def test_huffman_codes_are_between_the_entropy_and_one_bit_more():
    counts = torch.randint(1, 200, (16,))
    p = counts / counts.sum()
    entropy = -(p * p.log2()).sum().item()
    assert entropy <= huffman_bits(counts.tolist()) < entropy + 1
    assert huffman_bits([7, 0, 0]) == 0 and compression(4, None) == 8


RECIPE = """
method: quantized_distillation
data: {name: digits, size: 200, test_size: 200}
teacher: {model: "stillhouse:mlp", options: {widths: [32]}, train: {epochs: 2, batch_size: 50}}
student: {model: "stillhouse:resnet8"}
bits: 2
bucket: 64
train: {epochs: 1, batch_size: 50}
levels: {train: {epochs: 1, batch_size: 50, optimizer: {lr: 0.001, weight_decay: 0}}}
"""


@pytest.mark.parametrize("mode", ["qd", "dq", "post_training"])
def test_the_product_is_small_loads_and_predicts_as_it_was_judged(mode: str, recipe_file, tmp_path: Path):
    path = recipe_file(RECIPE + f"mode: {mode}\n")
    figures = execute(recipe.load(path), tmp_path / "run", cpu=True)
    product = load_product(tmp_path / "run")
    assert isinstance(product, QuantizedStudent) and figures["bits_per_weight"] == 2
    assert figures["file_bytes"] < 4 * figures["parameters"] / 6
    for name, code in product.codes.items():
        weight = dict(product.module.named_parameters())[name]
        assert all(len(row.unique()) <= 4 for row in quantise.buckets(weight, 64)) and torch.equal(
            weight,
            code.unpack(),
        )
    assert torch.isfinite(stillhouse.load(tmp_path / "run")(torch.randn(3, 1, 8, 8))).all()


class Killed(Exception):
    """Stands for a kill: nothing but the last checkpoint is left."""


@pytest.mark.parametrize("mode", ["qd", "dq"])
def test_a_run_that_was_killed_resumes_to_the_same_codes(mode: str, recipe_file, tmp_path: Path, monkeypatch):
    text = RECIPE.replace("epochs: 1, batch_size: 50", "epochs: 2, batch_size: 50, log_every: 1, checkpoint_seconds: 0")
    config = recipe.load(recipe_file(text + f"mode: {mode}\n"))
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "whole_cache"))
    execute(config, tmp_path / "whole", cpu=True)
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "killed_cache"))
    collect = Loop._collect

    def die(self, i, terms):
        if self.stage == ("student" if mode == "qd" else "levels") and i == 5:
            raise Killed
        collect(self, i, terms)

    monkeypatch.setattr(Loop, "_collect", die)
    with pytest.raises(Killed):
        execute(config, tmp_path / "killed", cpu=True)
    monkeypatch.setattr(Loop, "_collect", collect)
    execute(config, tmp_path / "killed", cpu=True)
    product = "product/model.safetensors"
    assert (tmp_path / "killed" / product).read_bytes() == (tmp_path / "whole" / product).read_bytes()


def test_a_tied_language_model_is_stored_once_and_speaks_as_before(recipe_file, tmp_path: Path, data_root):
    path = Path(__file__).parents[1] / "recipes/compression/quantized_distillation_text.yaml"
    figures = execute(recipe.load(path, "smoke"), tmp_path / "run", cpu=True)
    product = load_product(tmp_path / "run")
    assert product.module.lm_head.weight is product.module.transformer.wte.weight
    assert figures["file_bytes"] < figures["parameters"]


def test_options_that_would_do_nothing_are_refused(recipe_file):
    for line, message in (
        ("mode: qd\nallocate: {}", "allocate"),
        ("mode: dq\nrounding: stochastic", "rounding"),
        ("bits: 0", "bits"),
    ):
        with pytest.raises(UserError, match=message):
            recipe.load(recipe_file(RECIPE.replace("bits: 2\n", "") + line + "\n"))

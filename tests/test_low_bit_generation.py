"""Generators of few bits: number formats and their grids, tokens and how they are drawn, runs that resume, products."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.methods.generation.low_bit_generation import LowBitGenerator, method
from stillhouse.methods.generation.low_bit_generation.grids import (
    GroupLevels,
    add_input_grids,
    chosen_layers,
    gptq,
    inputs_of,
    number_format,
    on_grid,
    scales,
    smooth,
    token_quantise,
    total_bits,
)
from stillhouse.methods.generation.low_bit_generation.method import fitted_line
from stillhouse.methods.generation.low_bit_generation.network import GeneratorSpec, SamplerSpec, drawn, sample
from stillhouse.methods.generation.low_bit_generation.tokenizer import ImageTokenizer, TokenizerSpec
from stillhouse.nn import quantise
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.prediction import predict
from stillhouse.runs.products import load_product

FORMATS = ["int2", "int3", "int8", "uint3", "e2m1", "e3m0", "e4m3", "e5m2"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- grids -----------------------------------------------------------------------------------------------------------


def test_the_grid_of_e2m1_is_the_cards() -> None:
    points = number_format("e2m1").points()
    assert points.tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    x = torch.linspace(-7, 7, 1001)
    nearest = number_format("e2m1").nearest(x)
    assert torch.equal((x[:, None] - points).abs().amin(1), (x - nearest).abs())


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bit_floats_are_torchs(name: str, dtype: torch.dtype) -> None:
    kind = number_format(name)
    x = torch.cat([normal(2000) * s for s in (1e-4, 1e-2, 1.0, 30.0)]).clamp(-kind.largest, kind.largest)
    torch.testing.assert_close(kind.nearest(x), x.to(dtype).float(), atol=0, rtol=0)
    assert kind.largest == torch.finfo(dtype).max


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_on_the_grid_stays_and_errors_are_small(name: str) -> None:
    kind, weight = number_format(name), normal(6, 32)
    levels = GroupLevels(kind, 16)
    quantised = levels(weight)
    torch.testing.assert_close(levels(quantised), quantised, atol=1e-6, rtol=1e-6)
    rows = weight.reshape(-1, 16)
    scale, offset = scales(rows, kind)
    assert all(len(row.unique()) <= 2**kind.bits for row in quantised.reshape(-1, 16))
    if not kind.is_float:
        assert bool(((quantised.reshape(-1, 16) - rows).abs() <= scale * (0.5 + 1e-5)).all())
    if kind.symmetric:
        assert torch.equal(on_grid(-rows, kind, scale, offset), -on_grid(rows, kind, scale, offset))
    assert torch.equal(levels.pack(weight).unpack(), quantised), "what is stored is what was computed with"
    assert torch.equal(GroupLevels(kind, 16)(torch.zeros(2, 16)), torch.zeros(2, 16))


def test_the_gradient_passes_straight_through() -> None:
    layer, x = nn.Linear(8, 4), normal(5, 8)
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        plain.weight.copy_(GroupLevels(number_format("int3"), 8)(layer.weight))
    quantise.attach(layer, {"weight": GroupLevels(number_format("int3"), 8)})
    for network in (layer, plain):
        network(x).square().sum().backward()
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, plain.weight.grad)
    assert torch.equal(layer(x), plain(x))


def test_each_token_has_a_scale_of_its_own() -> None:
    x = torch.cat([normal(1, 16), 100 * normal(1, 16, seed=1)]).requires_grad_()
    quantised = token_quantise(x, 8)
    assert torch.equal(quantised[:1], token_quantise(x[:1], 8))
    assert bool(((quantised - x).abs().amax(1) <= x.abs().amax(1) / 127 / 2 + 1e-5).all())
    quantised.sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 16))


def test_smoothing_moves_the_range_and_changes_nothing() -> None:
    network, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)), normal(20, 8)
    x[:, 2] *= 50
    expected = network(x)
    add_input_grids(network, ["0", "2"], None)
    with inputs_of(network, ["0", "2"]) as seen:
        network(x)
    smooth(network, ["0", "2"], {n: torch.cat(v).abs().amax(0) for n, v in seen.items()}, 0.5)
    torch.testing.assert_close(network(x), expected)
    given = x / network[0].input_grid.smooth
    assert float(given.abs().amax(0).max() / given.abs().amax(0).min()) < 10


@pytest.mark.parametrize("name", ["int3", "uint3", "e2m1"])
def test_gptq_changes_outputs_less_than_rounding(name: str) -> None:
    kind, weight = number_format(name), normal(12, 16)
    x = normal(200, 4) @ normal(4, 16, seed=1) + 0.3 * normal(200, 16, seed=2)
    rounded, scale, offset = gptq(weight, x, kind, 8)
    plain = GroupLevels(kind, 8)(weight)
    error, before = ((x @ (w - weight).t()).square().mean() for w in (rounded, plain))
    assert error < 0.8 * before
    kept = GroupLevels(kind, 8, (scale, offset))
    torch.testing.assert_close(kept(rounded), rounded)
    torch.testing.assert_close(kept.pack(rounded).unpack(), rounded)


@pytest.mark.parametrize("name", ["int1", "int9", "e4m4", "fp4"])
def test_other_formats_get_a_sentence(name: str) -> None:
    with pytest.raises(UserError, match="number format"):
        number_format(name)


def test_bits_are_counted_by_hand() -> None:
    layer = nn.Linear(8, 4)
    assert total_bits(dict(layer.named_parameters()), {"weight": (3, 4)}) == 32 * 3 + 4 * 16 + 4 * 16
    line = fitted_line([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)])
    assert line(3.0) == pytest.approx(7.0) and fitted_line([(1.0, 2.0), (1.0, 4.0)])(5.0) == 3.0


# ---- tokens ----------------------------------------------------------------------------------------------------------


def made(scales_: list[int] | None = None, **options: Any) -> tuple[ImageTokenizer, nn.Module]:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(TokenizerSpec(codes=12, scales=scales_, **options), (1, 8, 8)).requires_grad_(False)
    return tokenizer, GeneratorSpec(width=16, depth=2, heads=2).build(tokenizer, 3).eval()


@pytest.mark.parametrize("scales_", [None, [1, 2, 4]])
def test_a_token_sees_what_comes_before_it_alone(scales_: list[int] | None) -> None:
    tokenizer, network = made(scales_)
    codes = torch.randint(12, (2, tokenizer.length), generator=torch.Generator().manual_seed(1))
    label = torch.tensor([0, 2])
    logits = network(codes, label)
    assert logits.shape == (2, tokenizer.length, 12)
    starts = [0, 1, 5] if scales_ else list(range(16))
    for start in starts:
        changed = codes.clone()
        changed[:, start:] = (changed[:, start:] + 5) % 12
        end = start + (1 if scales_ is None else tokenizer.lengths[starts.index(start)])
        torch.testing.assert_close(network(changed, label)[:, :end], logits[:, :end])
        if end < tokenizer.length:
            assert not torch.allclose(network(changed, label)[:, end:], logits[:, end:], atol=1e-5)
    assert not torch.allclose(network(codes, torch.tensor([1, 1])), logits, atol=1e-4)


@pytest.mark.parametrize("scales_", [None, [1, 2, 4]])
def test_drawing_from_the_most_probable_is_argmax(scales_: list[int] | None) -> None:
    tokenizer, network = made(scales_)
    label = torch.tensor([0, 1, 2])
    codes = sample(network, label, SamplerSpec(top_k=1), torch.Generator().manual_seed(0), tokenizer.lengths, 3)
    assert torch.equal(network(codes, label).argmax(-1), codes)
    assert tokenizer.decode(codes).shape == (3, 1, 8, 8)


def test_tokens_are_drawn_by_their_probabilities_among_the_top() -> None:
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log().expand(20_000, 4)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    found = drawn(logits, SamplerSpec(top_k=2), uniform).bincount(minlength=4) / 20_000
    torch.testing.assert_close(found, torch.tensor([0, 0.625, 0.375, 0]), atol=0.02, rtol=0)
    assert set(drawn(logits, SamplerSpec(top_share=1.0, top_p=0.5), uniform).tolist()) == {1}
    assert set(drawn(logits, SamplerSpec(top_share=1.0), torch.tensor([0.0] * 19_999 + [1.0])).tolist()) <= {0, 1, 2, 3}
    assert SamplerSpec().k(4096) == 901


@pytest.mark.parametrize(
    "options", [{}, {"scales_": [1, 2, 4]}, {"patch": 1, "widths": [8, 8], "channels": 4, "scales_": [1, 2]}]
)
def test_a_tokenizer_learns_codes_that_stand_for_their_images(options: dict[str, Any]) -> None:
    tokenizer, _ = made(**options)
    tokenizer.requires_grad_(True)
    x = normal(64, 1, 8, 8).cumsum(-1).cumsum(-2) / 5
    learned = [p for p in tokenizer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, 3e-3) if learned else None
    errors = []
    for _ in range(40):
        terms, codes, rows = tokenizer.loss(x, 0.25)
        if optimizer is not None:
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
        tokenizer.follow(codes, rows, 0.8)
        errors.append(float(terms["image"].detach()))
    assert errors[-1] < 0.7 * errors[0]
    codes = tokenizer.encode(x)
    assert codes.shape == (64, tokenizer.length) and len(codes.unique()) > 6
    terms, _, _ = tokenizer.loss(x, 0.25)
    torch.testing.assert_close((tokenizer.decode(codes) - x).square().mean(), terms["image"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"patch": 3}, "divides"),
        ({"scales": [1, 2]}, "end at the side of the grid, 4"),
    ],
)
def test_a_tokenizer_that_does_not_fit_gets_a_sentence(keys: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ImageTokenizer(TokenizerSpec(**keys), (1, 8, 8))


# ---- runs ------------------------------------------------------------------------------------------------------------


def settings(**keys: Any) -> Any:
    training = {"epochs": 2, "batch_size": 50, "eval_every": 0, "optimizer": {"name": "adamw", "lr": 1e-3}}
    return recipe.validate(
        {
            "method": "low_bit_generation",
            "data": {"name": "digits", "size": 100, "test_size": 40},
            "tokenizer": {"codes": 8, "steps": 6, "batch_size": 50},
            "generator": {"width": 16, "depth": 1, "heads": 2},
            "teach": training,
            "train": {**training, "log_every": 1, "checkpoint_seconds": 0},
            "probe": {"options": {"widths": [8]}, "train": {**training, "epochs": 1}},
            "judge": {"samples": 4},
            **keys,
        }
    )


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.getbasetemp() / "low_bit_cache"))


@pytest.mark.parametrize(
    "keys",
    [
        {"quantise": {"weights": "e2m1", "group": 8, "activations": 8, "smooth": 0.5}},
        {"objectives": None, "quantise": {"weights": "uint4", "rounding": "gptq"}},
        {"diffusion": {"patch": 4, "steps": 2}},
    ],
)
def test_a_loaded_generator_is_the_one_that_was_trained(keys: dict, tmp_path: Path, monkeypatch: Any) -> None:
    kept: list[Any] = []
    made_product = method.World.product

    def product(self: Any, student: Any, teacher: Any, *rest: Any) -> Any:
        kept.extend([student, teacher, copy.deepcopy(teacher.state_dict())])
        return made_product(self, student, teacher, *rest)

    monkeypatch.setattr(method.World, "product", product)
    figures = execute(settings(**keys), tmp_path / "run", cpu=True)
    assert figures["total_bits"] > 0 and figures["frechet"] >= 0
    student, teacher, before = kept
    found = load_product(tmp_path / "run")
    assert isinstance(found, LowBitGenerator)
    for name, value in student.state_dict().items():
        assert torch.equal(found.module.state_dict()[name], value), name
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not quantise.attached(teacher)
    lines = list(predict(tmp_path / "run", ["3"], tmp_path / "shown"))
    assert len(lines) == 1 and (tmp_path / "shown" / "3.png").is_file()
    assert torch.equal(found.samples("3", 2), found.samples("3", 2))
    with pytest.raises(UserError, match="prompt"):
        found.samples("three")


def test_an_interrupted_training_resumes_to_the_same_generator(tmp_path: Path, monkeypatch: Any) -> None:
    whole = execute(settings(), tmp_path / "whole", cpu=True)
    forward, done = method.QuantisedDistillation.forward, []

    def failing(self: Any, *given: Any) -> Any:
        done.append(1)
        if len(done) == 3:
            raise RuntimeError("power")
        return forward(self, *given)

    monkeypatch.setattr(method.QuantisedDistillation, "forward", failing)
    with pytest.raises(RuntimeError, match="power"):
        execute(settings(), tmp_path / "run", cpu=True)
    again = execute(settings(), tmp_path / "run", cpu=True)
    assert again["nll"] == whole["nll"] and len(done) == 5
    states = [load_product(tmp_path / n).module.state_dict() for n in ("run", "whole")]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_a_family_of_widths_gives_two_lines(tmp_path: Path) -> None:
    config = settings(scaling={"widths": [8, 16], "weights": "int2", "above": "int3"})
    config.quantise.weights = "int2"
    figures = execute(config, tmp_path / "run", cpu=True)
    assert {"lift_same", "lift_level"} <= set(figures)


def test_layers_are_chosen_by_name_and_mistakes_get_a_sentence(tmp_path: Path) -> None:
    _, network = made()
    assert len(chosen_layers(network, [r"^blocks\."], [r"\.ada$"])) == 8
    with pytest.raises(UserError, match="leave no linear layer"):
        chosen_layers(network, ["nothing"], [])
    with pytest.raises(UserError, match="do not divide the 16 inputs"):
        execute(settings(quantise={"group": 5}), tmp_path / "run", cpu=True)
    with pytest.raises(UserError, match="number format"):
        settings(quantise={"weights": "int33"})

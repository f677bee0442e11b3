"""Entropic Student: the coder is exact, the prior's tables are of one kind everywhere, networks are cut where they can
be, and what is deployed gives what was trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from stillhouse.config.specs import ModelSpec
from stillhouse.data.source import IMAGENET_MEAN, IMAGENET_STD
from stillhouse.errors import UserError
from stillhouse.functional.pictures import normalise
from stillhouse.methods.compression.entropic_student.__main__ import main
from stillhouse.methods.compression.entropic_student.coding import FixedCoder, RangeCoder, scan_bytes
from stillhouse.methods.compression.entropic_student.deployment import Device, RoundTrip, Server
from stillhouse.methods.compression.entropic_student.layers import GDN, gdn1, lower_bound
from stillhouse.methods.compression.entropic_student.network import Bottleneck, FixedCode, JpegInput, LearnedCode, cut
from stillhouse.methods.compression.entropic_student.prior import FactorisedPrior, Tables, integer_frequencies
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.export import export
from stillhouse.runs.products import load_product
from stillhouse.tasks.classification import Classification
from stillhouse.tasks.detection import Detection
from stillhouse.tasks.segmentation import Segmentation

constriction = pytest.importorskip("constriction")
TASK = Classification(tuple("0123456789"), (3, 16, 16), (0.5,) * 3, (0.25,) * 3)


def random_prior(channels: int = 3, seed: int = 0) -> FactorisedPrior:
    torch.manual_seed(seed)
    prior = FactorisedPrior(channels)
    with torch.no_grad():
        prior.quantiles[:, 0] += torch.randn(channels, 3)
        for factor in prior.factors:
            factor.normal_()
    return prior


def test_frequencies_are_whole_positive_and_add_up():
    draw = np.random.default_rng(0)
    for size in (1, 2, 50, 3000):
        mass = draw.dirichlet(np.full(size, 0.01)).astype(np.float32)
        counts = integer_frequencies(mass)
        assert counts.sum() == 1 << 16 and counts.min() >= 1


@pytest.mark.parametrize("spread", [0.2, 4.0, 1e4, 1e8])
def test_strings_decode_to_the_symbols_inside_the_table_and_far_outside(spread: float):
    coder = RangeCoder(random_prior().tables())
    symbols = np.rint(np.random.default_rng(0).normal(size=(3, 9, 7)) * spread).astype(np.int64)
    assert (coder.decode(coder.encode(symbols), symbols.shape) == symbols).all()


def test_extreme_integers_and_a_single_symbol_survive_too():
    coder = RangeCoder(random_prior(1).tables())
    for value in (np.iinfo(np.int32).min, np.iinfo(np.int32).max, 0):
        assert coder.decode(coder.encode(np.full((1, 1, 1), value)), (1, 1, 1)).item() == value


def test_strings_are_as_long_as_the_prior_says():
    """Latents drawn from the prior itself: the coder comes within a few percent of -log2 P."""
    prior = random_prior(2)
    code = LearnedCode(2)
    code.prior = prior
    code.settle(torch.zeros(1, 2, 1, 1))
    assert code.tables is not None
    draw = np.random.default_rng(0)
    symbols = np.stack(
        [
            draw.choice(len(f) - 1, 4000, p=f[:-1] / f[:-1].sum()) + code.tables.offsets[i]
            for i, f in enumerate(map(code.tables.frequencies, range(2)))
        ]
    )[..., None]
    ideal = code.bits(code.values(torch.from_numpy(symbols[None]).float())).item() / 8
    assert ideal * 0.99 < len(code.coder().encode(symbols)) < ideal * 1.03 + 8


def test_what_no_encoder_wrote_and_what_does_not_fit_is_refused():
    coder = RangeCoder(random_prior().tables())
    for string in (b"", b"abc"):
        with pytest.raises(UserError, match="no encoder"):
            coder.decode(string, (3, 2, 2))
    with pytest.raises(UserError, match="3 channels"):
        coder.encode(np.zeros((2, 1, 1), np.int64))
    with pytest.raises(UserError, match="no tables yet"):
        LearnedCode(2).coder()
    with pytest.raises(UserError, match="3 bits"):
        FixedCoder(3).decode(b"abc", (4, 4, 4))


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_codes_of_fixed_length_are_as_long_as_they_say(bits: int):
    symbols = np.random.default_rng(0).integers(0, 2**bits, (2, 5, 3))
    string = FixedCoder(bits).encode(symbols)
    assert len(string) == -(-symbols.size * bits // 8)
    assert (FixedCoder(bits).decode(string, symbols.shape) == symbols).all()


def test_quantised_latents_are_within_half_a_step():
    code, latents = FixedCode(4), torch.randn(8, 3, 4, 4)
    code.settle(latents)
    symbols = code.symbols(latents)
    assert symbols.min() == 0 and symbols.max() == 15
    assert (code.values(symbols) - latents).abs().max() <= code.step / 2 + 1e-6


def test_the_auxiliary_loss_moves_quantiles_alone_and_bits_do_not():
    prior = random_prior()
    prior.auxiliary_loss().backward()
    assert [n for n, p in prior.named_parameters() if p.grad is not None] == ["quantiles"]
    prior.zero_grad()
    prior(torch.randn(2, 3, 4, 4)).sum().backward()
    assert prior.quantiles.grad is None


def test_likelihoods_are_a_distribution_and_precise_far_out():
    prior = random_prior()
    line = torch.arange(-300.0, 301.0, dtype=torch.float64)[None, None, :, None].expand(1, 3, -1, 1)
    mass = prior.double().likelihood(line).sum(2)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-4, atol=1e-4)
    assert prior.likelihood(torch.full((1, 3, 1, 1), 1e4, dtype=torch.float64)).min() >= 1e-9


def test_the_bits_are_in_full_precision_under_autocast():
    prior, latent = random_prior(), torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(prior(latent.bfloat16().float()), prior(latent.bfloat16()))
        assert prior(latent).dtype == torch.float32


def test_a_bound_passes_gradients_that_lead_back():
    x = torch.tensor([0.0, 0.0, 2.0], requires_grad=True)
    (lower_bound(x, 1.0) * torch.tensor([1.0, -1.0, 1.0])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, -1.0, 1.0]


def test_divisive_normalisation_is_undone_where_channels_do_not_mix():
    x, forward, back = torch.randn(2, 4, 3, 3), GDN(4), GDN(4, inverse=True)
    norm = 1 + 0.1 * x.abs()
    torch.testing.assert_close(forward(x), x / norm, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gdn1(x / norm, back.beta, torch.zeros(4, 4), inverse=True), x / norm, rtol=1e-4, atol=1e-5
    )


# ---- the cut ---------------------------------------------------------------------------------------------------------


def small(name: str = "resnet8") -> nn.Module:
    return TASK.build(ModelSpec(model=f"stillhouse:{name}"))


@pytest.mark.parametrize("at", ["layer1", "layer2"])
def test_a_network_is_cut_where_a_chain_ends(at: str):
    network, batch = small().eval(), {"input": torch.randn(2, 3, 16, 16)}
    split = cut(network, at, TASK, batch, 4, "learned")
    wanted = network.layer2(network.layer1(network.relu(network.bn1(network.conv1(batch["input"])))))
    bottleneck = split.applied(network)
    assert network.get_submodule(at) is bottleneck
    assert bottleneck(batch["input"]).shape[1:] == ((16, 16, 16) if at == "layer1" else wanted.shape[1:])
    assert network(batch["input"]).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "at", "before"),
    [
        ("torchvision:resnet50", "layer1", ["conv1", "bn1", "relu", "maxpool"]),
        ("timm:resnet18", "layer1", ["conv1", "bn1", "act1", "maxpool"]),
        ("timm:tf_efficientnet_lite0", "blocks.1", ["conv_stem", "bn1", "blocks.0"]),
    ],
)
def test_networks_of_other_libraries_are_cut_too(name: str, at: str, before: list[str]):
    task = Classification(tuple("0123456789"), (3, 64, 64), (0.5,) * 3, (0.25,) * 3)
    network, batch = task.build(ModelSpec(model=name)).eval(), {"input": torch.randn(2, 3, 64, 64)}
    split = cut(network, at, task, batch, 2, "learned")
    assert split.before == before and split.stride == 4
    split.applied(network)
    assert network(batch["input"]).shape == (2, 10)


def test_torchvisions_segmentation_networks_are_cut_inside_their_backbone():
    task = Segmentation(("a", "b"), (33, 48), (0.5,) * 3, (0.25,) * 3)
    network = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        num_classes=2, weights=None, weights_backbone=None
    )
    batch = {"input": torch.randn(2, 3, 33, 48)}
    split = cut(network, "backbone.3", task, batch, 4, "learned")
    split.applied(network)
    assert split.before == ["backbone.0", "backbone.1", "backbone.2"]
    assert task.read(task.call(network, batch), batch).logits.shape == (2, 33, 48, 2)


@pytest.mark.parametrize(
    ("name", "options", "at", "before"),
    [
        ("stillhouse:one_stage", {"width": 8}, "graph.layers.1", ["graph.layers.0"]),
        (
            "torchvision:retinanet_resnet50_fpn",
            {"weights_backbone": None},
            "backbone.body.layer1",
            [f"backbone.body.{name}" for name in ("conv1", "bn1", "relu", "maxpool")],
        ),
    ],
)
def test_detectors_are_cut_and_what_prepares_their_images_stays(name: str, options: dict, at: str, before: list[str]):
    task = Detection(("a", "b"), (64, 96), IMAGENET_MEAN, IMAGENET_STD)
    images = normalise(torch.rand(2, 3, 64, 96), *task.normalisation)
    network, batch = task.build(ModelSpec(model=name, options=options)).eval(), {"input": images}
    split = cut(network, at, task, batch, 2, "learned")
    assert split.before == before
    split.applied(network)
    assert task.read(task.call(network, batch), batch).parts["boxes"].shape[::2] == (2, 4)


@pytest.mark.parametrize(
    ("model", "options", "at", "message"),
    [
        ("resnet8", {}, "layer9", "nearest: layer"),
        ("vit", {"dim": 24, "depth": 2, "heads": 2}, "blocks.0", "not a map"),
        ("resnet8", {}, "fc", "not a map"),
        ("resnet8", {}, "layer1.0.conv2", "no chain"),
        ("resnet_stages", {"stem": 4, "widths": [4] * 4, "depths": [1] * 4}, "layer4", "over 1, 2, 4"),
    ],
)
def test_a_cut_that_cannot_be_is_refused(model: str, options: dict, at: str, message: str):
    network = TASK.build(ModelSpec(model=f"stillhouse:{model}", options=options))
    with pytest.raises(UserError, match=message):
        cut(network, at, TASK, {"input": torch.randn(2, 3, 16, 16)}, 4, "learned")


def test_no_gradient_reaches_encoder_or_prior_once_they_are_fixed():
    network = small()
    split = cut(network, "layer1", TASK, {"input": torch.randn(2, 3, 16, 16)}, 4, "learned")
    bottleneck = split.applied(network)
    bottleneck.code.settle(torch.zeros(1, 4, 1, 1))
    bottleneck.freeze()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1)
    network.train()(torch.randn(4, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert not [k for k in changed if k.startswith(("layer1.encoder", "layer1.code"))]
    assert any(k.startswith("layer1.decoder") for k in changed) and "fc.weight" in changed


def test_training_and_strings_see_the_same_latents_once_they_are_fixed():
    torch.manual_seed(0)
    network = small()
    bottleneck = cut(network, "layer2", TASK, {"input": torch.randn(2, 3, 16, 16)}, 4, "learned").applied(network)
    with torch.no_grad():
        bottleneck.code.prior.quantiles[:, :, 1] = 0.3
        bottleneck.encoder[4].weight.mul_(100)
    bottleneck.code.settle(torch.zeros(1))
    bottleneck.freeze()
    images = torch.randn(3, 3, 16, 16)
    latents = bottleneck.decode(bottleneck.encode(images), (4, 7, 7))
    assert latents.abs().max() > 1
    for training in (True, False):
        torch.testing.assert_close(bottleneck.train(training)(images), bottleneck.decoder(latents))
    with pytest.raises(UserError, match="not finite"):
        bottleneck.encode(torch.full((1, 3, 16, 16), torch.nan))


def test_jpeg_is_what_its_file_decodes_to():
    images = torch.rand(2, 3, 16, 16) * 4 - 2
    coded = JpegInput(nn.Identity(), TASK, 95)
    assert coded(images).shape == images.shape
    smooth = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    assert (coded(smooth) - smooth).abs().mean() < 0.1
    files = coded.encode(images)
    assert all(0 < scan_bytes(f) < len(f) - 300 for f in files)


# ---- the recipe ------------------------------------------------------------------------------------------------------

RECIPE = """
method: entropic_student
data: {name: digits, size: 200, test_size: 100, image_size: 16, augment: plain}
teacher:
  model: stillhouse:resnet_stages
  options: {stem: 8, widths: [8, 12], depths: [1, 1], stem_stride: 2}
  train: {epochs: 2, batch_size: 50, optimizer: {name: adam, lr: 0.003}}
channels: 2
train: {epochs: 2, batch_size: 50, optimizer: {name: adam, lr: 0.01}}
finetune: {epochs: 1, batch_size: 50, optimizer: {lr: 0.001}}
variants:
  quantised: {codec: quantised, rate: {bits: 3}}
  jpeg: {codec: jpeg}
  labels: {learn: labels, finetune: null}
"""


@pytest.mark.parametrize("variant", [None, "quantised", "jpeg", "labels"])
def test_products_load_and_code_as_they_did(variant: str | None, recipe_file, tmp_path: Path):
    figures = execute(recipe.load(recipe_file(RECIPE), variant), tmp_path / "run", cpu=True)
    product = load_product(tmp_path / "run")
    images = torch.randn(5, 1, 16, 16)
    assert product.module(images).shape == (5, 10)
    if variant == "jpeg":
        assert figures["bytes_per_image"] < 300 and "ideal_bytes" not in figures
        return
    strings, again = product.bottleneck.encode(images), load_product(tmp_path / "run").bottleneck.encode(images)
    assert strings == again
    if variant == "quantised":
        assert figures["bytes_per_image"] == 37  # 2 x 7 x 7 numbers of 3 bits
    else:
        assert isinstance(product.bottleneck, Bottleneck) and isinstance(product.bottleneck.code.tables, Tables)
        assert figures["ideal_bytes"] <= figures["bytes_per_image"] <= 1.1 * figures["ideal_bytes"] + 8


def test_one_encoder_serves_two_networks(recipe_file, tmp_path: Path):
    path = recipe_file(RECIPE)
    execute(recipe.load(path), tmp_path / "first", cpu=True)
    start = [f"start={tmp_path / 'first'}", "data.classes=[0,1,2]"]
    execute(recipe.load(path, None, [*start, "data.size=60", "data.test_size=30"]), tmp_path / "second", cpu=True)
    images = torch.randn(4, 1, 16, 16)
    first, second = load_product(tmp_path / "first"), load_product(tmp_path / "second")
    assert first.bottleneck.encode(images) == second.bottleneck.encode(images)
    assert second.module(images).shape == (4, 3)
    with pytest.raises(UserError, match="has channels 2, but here it must be 3"):
        execute(recipe.load(path, None, [*start, "channels=3"]), tmp_path / "third", cpu=True)


def test_both_halves_give_what_the_network_gives(recipe_file, tmp_path: Path, capsys):
    execute(recipe.load(recipe_file(RECIPE)), tmp_path / "run", cpu=True)
    folder = export(tmp_path / "run", out=tmp_path / "split")
    images, module = torch.randn(3, 1, 16, 16), load_product(tmp_path / "run").module
    strings = Device(folder).encode(images)
    torch.testing.assert_close(Server(folder).decode(strings), module(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Server(folder).decode(strings[:1]), module(images[:1]), rtol=1e-4, atol=1e-5)
    assert (folder / "device.pt2").stat().st_size < (folder / "server.pt2").stat().st_size
    trip = RoundTrip(folder)
    assert trip.task.class_names == tuple("0123456789")
    torchvision.io.write_png(torch.randint(0, 256, (1, 16, 16), dtype=torch.uint8), str(tmp_path / "a.png"))
    assert main([str(folder), str(tmp_path / "a.png")]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[-1].startswith("a.png: ") and "bytes)" in told
    assert main([str(folder)]) == 2 and main([str(tmp_path), "a.png"]) == 2
    whole = torch.export.load(export(tmp_path / "run", "torch", tmp_path / "whole.pt2")).module()
    torch.testing.assert_close(whole(images), module(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="there already"):
        export(tmp_path / "run", out=folder)
    with pytest.raises(UserError, match="no halves"):
        Device(tmp_path)

"""IMDN: published weights and figures, channels set aside, attention, ablations, images of any size, the method."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stillhouse.config.specs import DataSpec, ModelSpec
from stillhouse.data import BatchKey, load
from stillhouse.errors import UserError
from stillhouse.functional.images import PEAK
from stillhouse.functional.tiling import croppable, four_crops
from stillhouse.models import build, load_weights
from stillhouse.models.imdn import ContrastAttention
from stillhouse.models.weights import load_fitting
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product

ROOT = Path(__file__).parents[1]
DATA = os.environ.get("STILLHOUSE_DATA")
PUBLISHED = pytest.mark.skipif(not DATA, reason="STILLHOUSE_DATA is not set: no published weights here")
IMAGES = ["baby", "bird", "butterfly", "head", "woman"]
# Luma not rounded: dB of each image of Set5; then the means of SSIM, of rounded luma (dB, SSIM), and of RGB (dB).
FIGURES = {
    2: ([38.9089, 43.2927, 35.3586, 36.0205, 36.3992], 0.9605, 37.9105, 0.9594, 35.8081),
    3: ([35.6534, 38.1753, 30.8876, 34.1197, 32.9625], 0.9270, 34.3233, 0.9259, 32.3587),
    4: ([33.7743, 35.0441, 28.5594, 32.9193, 30.7507], 0.8948, 32.1867, 0.8936, 30.3005),
}


def net(name: str = "imdn", **options: object) -> nn.Module:
    torch.manual_seed(0)
    return build(ModelSpec(model=f"stillhouse:{name}", options=options)).eval()


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@PUBLISHED
@pytest.mark.parametrize("scale", FIGURES)
def test_the_published_weights_give_the_reference_figures(scale: int):
    options = {"scale": scale, "patch": 12, "test": "set5/HR", "test_low": "set5/LR/x{scale}"}
    bundle = load(DataSpec(name="restore:set5/HR", options=options), DATA)
    model = bundle.task.build(ModelSpec(model="stillhouse:imdn", checkpoint=f"{DATA}/imdn_weights/IMDN_x{scale}.pth"))
    model.eval()
    data, figures = bundle.dataset("test", train=False), []
    images = range(len(IMAGES)) if scale > 2 else range(1, len(IMAGES))  # the first is as large as the others together
    with torch.no_grad():
        for i in images:
            batch = data.batch(BatchKey(0, np.array([i]), 0, 1), 0)
            meter = bundle.task.meter(["restoration", "protocols"])
            meter.add(batch, bundle.task.read(bundle.task.call(model, batch), batch))
            figures.append(meter.figures())
    each, *means = FIGURES[scale]
    assert [f["psnr"] for f in figures] == pytest.approx([each[i] for i in images], abs=2e-3)
    if scale == 2:
        return
    for name, mean in zip(("ssim", "psnr_uint8", "ssim_uint8", "psnr_rgb"), means):
        found = np.mean([f[name] for f in figures])
        assert found == pytest.approx(mean, abs=2e-3 if name.startswith("psnr") else 2e-4), name


@PUBLISHED
def test_crops_through_the_published_network_differ_little_from_the_whole():
    """Attention sees each crop for itself, so the crops are near the whole, not equal to it."""
    model = net("imdn_as")
    load_weights(model, f"{DATA}/imdn_weights/IMDN_AS.pth")
    image = torch.from_numpy(np.array(Image.open(f"{DATA}/set5/HR/bird.bmp"))).permute(2, 0, 1)[None].float() / PEAK
    image = image[..., :148, :156]  # where the lower crops begin on the network's grid of four pixels
    with torch.no_grad():
        error = (model(image) - four_crops(model, image)).square()
    quarters = [error[..., r, c] for r in (slice(0, 70), slice(78, None)) for c in (slice(0, 74), slice(82, None))]
    assert all(10 * torch.log10(1 / quarter.mean()) > 40 for quarter in quarters)
    assert 0 < error.sqrt().max() < 0.1, "seams are bounded"


def test_parameters_are_those_of_the_published_networks():
    counts = {s: count(net(scale=s)) for s in (2, 3, 4)}
    assert counts == {2: 694404, 3: 703059, 4: 715176} and count(net("imdn_as")) == 752104
    assert count(net("imdn_rtc")) == 20190 and count(net("imdn_rte")) == 89748


def test_attention_weighs_by_mean_plus_population_deviation_and_is_finite_on_constant_channels():
    torch.manual_seed(0)
    layer, x = ContrastAttention(16), torch.randn(2, 16, 5, 7)
    statistics = x.mean((2, 3), keepdim=True) + x.var((2, 3), correction=0, keepdim=True).sqrt()
    expected = x * torch.sigmoid(layer.excite(torch.relu(layer.squeeze(statistics))))
    torch.testing.assert_close(layer(x), expected)
    flat = torch.ones(1, 16, 4, 4, requires_grad=True)
    layer(flat).sum().backward()
    assert flat.grad is not None and flat.grad.isfinite().all()


def test_the_first_channels_are_set_aside():
    """A block whose fusion passes on the first quarter alone gives the first channels of its first convolution."""
    block = net(width=16, blocks=1, attention=False).blocks[0]
    with torch.no_grad():
        block.fuse.weight.zero_()
        block.fuse.bias.zero_()
        block.fuse.weight[:4, :4, 0, 0] = torch.eye(4)
        x = torch.randn(1, 16, 6, 6)
        first = nn.functional.leaky_relu(block.steps[0](x), 0.05)
    torch.testing.assert_close((block(x) - x)[:, :4], first[:, :4])


@pytest.mark.parametrize("width", [16, 32, 64])
def test_the_ablations_cost_as_much(width: int):
    whole, plain = count(net(width=width)), count(net(width=width, splitting=False))
    assert abs(plain - whole) < 0.02 * whole
    without = net(width=width, attention=False)
    assert not any("attention" in name for name, _ in without.named_parameters())
    assert 0 < whole - count(without) < 0.02 * whole


@pytest.mark.parametrize(("name", "scale"), [("imdn", 3), ("imdn_as", 1), ("imdn_rtc", 2), ("imdn_rte", 2)])
@pytest.mark.parametrize("size", [(33, 47), (1, 2), (80, 71), (32, 48)])
def test_images_of_any_size_come_out_exactly_larger(name: str, scale: int, size: tuple[int, int]):
    options = {"scale": scale} if name == "imdn" else {}
    model = net(name, **options, **({"width": 8, "blocks": 1} if name in ("imdn", "imdn_as") else {}))
    with torch.no_grad():
        assert model(torch.rand(2, 3, *size)).shape == (2, 3, size[0] * scale, size[1] * scale)


def test_crops_go_through_as_one_batch():
    model, seen = net("imdn_as", width=8, blocks=1), []
    model.entry[0].register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    assert croppable(75, 90)
    model(torch.rand(2, 3, 75, 90))
    assert seen == [(8, 3, 68, 76)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"width": 4, "rate": 0.2}, "leaves 0 set aside"),
        ({"blocks": 0}, "at least 1"),
        ({"widht": 8}, "did you mean 'options.width'"),
    ],
)
def test_mistakes_get_a_sentence(options: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        net(**options)
    with pytest.raises(UserError, match="in colour"):
        net(width=8)(torch.zeros(1, 1, 8, 8))


def test_another_scale_starts_from_the_layers_that_fit(tmp_path: Path):
    start = net(width=8, blocks=2, scale=2)
    torch.save(start.state_dict(), tmp_path / "x2.pth")
    model = net(width=8, blocks=2, scale=4)
    before = model.expand.weight.clone()
    assert load_fitting(model, tmp_path / "x2.pth") == ["expand.weight", "expand.bias"]
    assert torch.equal(model.smooth.weight, start.smooth.weight) and torch.equal(model.expand.weight, before)
    with pytest.raises(UserError, match="does not fit"):
        load_fitting(net(width=16, blocks=2), tmp_path / "x2.pth")


# ---- the method ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i in range(6):
        small = Image.fromarray(draw.integers(0, 256, (10, 12, 3), dtype=np.uint8))
        small.resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def settings(folder: Path, **keys: object) -> dict[str, object]:
    return {
        "method": "imdn",
        "data": {"name": f"restore:{folder}", "options": {"patch": 24, "repeat": 4}},
        "student": {"model": "stillhouse:imdn", "options": {"width": 8, "blocks": 1}},
        "train": {"epochs": 12, "batch_size": 5, "optimizer": {"name": "adam", "lr": 1e-2, "weight_decay": 0}},
        "evaluate": ["restoration", "baseline"],
        **keys,
    }


def test_it_learns_and_its_weights_are_judged_as_they_are(photographs: Path, tmp_path: Path):
    figures = execute(recipe.validate(settings(photographs)), tmp_path / "run", cpu=True)
    assert figures["psnr"] > 18
    weights = tmp_path / "run" / "product" / "model.safetensors"
    student = {"model": "stillhouse:imdn", "options": {"width": 8, "blocks": 1}, "checkpoint": str(weights)}
    judged = execute(recipe.validate(settings(photographs, student=student, train=None)), tmp_path / "as_is", cpu=True)
    assert judged["psnr"] == pytest.approx(figures["psnr"]) and "train_seconds" not in judged
    assert json.loads((tmp_path / "as_is" / "product" / "product.json").read_text())["task"]["scale"] == 2
    started = settings(photographs, start=str(weights))
    begun = execute(
        recipe.validate({**started, "train": {**started["train"], "epochs": 1}}), tmp_path / "more", cpu=True
    )
    assert begun["psnr"] > 15, "one epoch from there"
    assert load_product(tmp_path / "more").module(torch.rand(1, 3, 9, 7)).shape == (1, 3, 18, 14)


def test_judging_as_it_is_takes_weights(photographs: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"student\.checkpoint"):
        execute(recipe.validate(settings(photographs, train=None)), tmp_path / "run", cpu=True)


def test_variants_of_the_paper_build_its_networks():
    for name, scale, parameters in (("paper_x2", 2, 694404), ("paper_x3", 3, 703059), ("paper_x4", 4, 715176)):
        config = recipe.load(ROOT / "recipes" / "restoration" / "imdn.yaml", name)
        assert config.data.options["scale"] == scale and config.train.batch_size == 16
        model = build(config.student.model_copy(update={"options": {"scale": scale}}))
        assert count(model) == parameters
        rates = [2e-4 * 0.5 ** (epoch // 200) for epoch in range(1, 1001)]
        steps = [2e-4 * 0.5 ** sum(epoch >= m for m in config.train.schedule.milestones) for epoch in range(1000)]
        assert rates == steps

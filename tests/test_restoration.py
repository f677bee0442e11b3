"""Restoration: pairs of images, figures by the published protocol, what is shown, networks of other libraries."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
from PIL import Image
from torch import nn

from stillhouse.config.specs import DataSpec, ModelSpec
from stillhouse.data import BatchKey, Loader, load
from stillhouse.errors import UserError
from stillhouse.evaluation.judge import judge
from stillhouse.functional.images import enlarged, luma, psnr, ssim
from stillhouse.functional.tiling import any_size, four_crops
from stillhouse.objectives.l1 import L1
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.prediction import predict
from stillhouse.runs.products import load_product
from stillhouse.signals import Signals
from stillhouse.tasks.restoration import GROUPS, Restoration

SIZES = [(40, 52), (51, 47), (44, 44), (60, 41)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of several sizes, and halves of the test images that other software made, under other names."""
    base, draw = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split in ("train", "test", "test_low"):
        (base / split).mkdir()
    for i, (height, width) in enumerate(SIZES):
        waves = np.add.outer(np.sin(np.arange(height) / (2 + i)), np.cos(np.arange(width) / 3))[..., None]
        pixels = np.clip(128 + 50 * waves + draw.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(base / "train" / f"{i}.png")
        Image.fromarray(pixels).save(base / "test" / f"t{i}.png")
        half = Image.fromarray(pixels[: height // 2 * 2, : width // 2 * 2]).resize((width // 2, height // 2), 3)
        half.save(base / "test_low" / f"t{i}x2.png")
    return base


def spec(folder: Path, **options: object) -> DataSpec:
    given = {"patch": 24, "test": str(folder / "test"), **options}
    augment = given.pop("augment", "standard")
    return DataSpec.model_validate({"name": f"restore:{folder}/train", "options": given, "augment": augment})


def batch(bundle, split: str, train: bool, rows: list[int], epoch: int = 0):
    return bundle.dataset(split, train=train).batch(BatchKey(epoch, np.array(rows), 0, len(rows)), 0)


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_crop_is_the_shrunk_photographs_wherever_it_lies(folder: Path, scale: int):
    """The pair of a crop is cut from the pair of the whole, mirrored and turned together."""
    bundle = load(spec(folder, scale=scale))
    whole = {}
    for i in range(len(SIZES)):
        true = Image.open(folder / "train" / f"{i}.png")
        true = true.crop((0, 0, true.width // scale * scale, true.height // scale * scale))
        low = np.array(true.resize((true.width // scale, true.height // scale), Image.Resampling.BICUBIC))
        whole[i] = torch.from_numpy(low).permute(2, 0, 1).float() / 255
    seen = set()
    for epoch in range(6):
        found = batch(bundle, "train", True, [0, 1, 2, 3], epoch)
        assert found["input"].shape == (4, 3, 24 // scale, 24 // scale) and found["label"].shape == (4, 3, 24, 24)
        for i, (low, true) in enumerate(zip(found["input"], found["label"])):
            turned = [x.transpose(1, 2) if t else x for x in (whole[i],) for t in (False, True)]
            turned = [x.flip(axes) for x in turned for axes in ([], [1], [2], [1, 2])]
            windows = [x.unfold(1, low.shape[1], 1).unfold(2, low.shape[2], 1) for x in turned]
            hits = [bool((w == low[:, None, None]).all(-1).all(-1).all(0).any()) for w in windows]
            assert any(hits), "the input is no piece of the shrunk photograph"
            seen.add(hits.index(True))
            assert psnr(enlarged(low[None], (24, 24)) * 255, true[None] * 255) > 15, (
                "input and label do not belong together"
            )
    assert len(seen) >= 6, "of eight orientations"


def test_true_images_lose_what_the_scale_does_not_divide(folder: Path, tmp_path: Path):
    Image.new("RGB", (134, 134), "red").save(tmp_path / "a.png")
    data = load(DataSpec(name=f"restore:{tmp_path}", options={"scale": 4, "patch": 16, "test": str(tmp_path)}))
    found = batch(data, "test", False, [0])
    assert found["input"].shape[-2:] == (33, 33) and found["label"].shape[-2:] == (132, 132)


def test_damaged_images_are_read_where_there_are_files(folder: Path):
    given = load(spec(folder, test_low=f"{folder}/test_low"))
    made = load(spec(folder))
    for row in range(len(SIZES)):
        assert torch.equal(batch(given, "test", False, [row])["input"], batch(made, "test", False, [row])["input"])


def test_a_network_that_sees_enlarged_images_takes_any_scale(folder: Path):
    found = batch(load(spec(folder, scale=2.5, enlarged=True)), "test", False, [1])
    assert found["input"].shape == found["label"].shape == (1, 3, *SIZES[1])
    assert 10 < float(psnr(found["input"] * 255, found["label"] * 255)) < 60


def test_grey_images_become_three_channels(tmp_path: Path):
    Image.new("L", (32, 32), 90).save(tmp_path / "grey.png")
    data = load(DataSpec(name=f"restore:{tmp_path}", options={"patch": 16, "test": str(tmp_path)}))
    assert batch(data, "test", False, [0])["label"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scale": 2.5}, "set data.options.enlarged"),
        ({"scale": 1}, "name the folder of damaged images"),
        ({"scale": 3, "patch": 25}, "no multiple of the scale 3"),
        ({"patch": 48}, "'0.png' has 52 x 40 pixels, less than data.options.patch"),
        ({"test_low": "train"}, "holds no image for 't0.png'"),
        ({"scale": 4, "test_low": "test_low"}, "holds no image for 't0.png'; nearest"),
        ({"augment": ["RandomHorizontalFlip"]}, "standard or plain"),
        ({"skale": 2}, "did you mean 'scale'"),
    ],
)
def test_mistakes_get_a_sentence(folder: Path, options: dict, sentence: str):
    options = {k: f"{folder}/{v}" if k == "test_low" else v for k, v in options.items()}
    with pytest.raises(UserError, match=sentence):
        data = load(spec(folder, **options))
        batch(data, "train", True, [0, 1, 2, 3])
        batch(data, "test", False, [0])


def test_an_alpha_channel_and_a_wrong_size_are_refused(folder: Path, tmp_path: Path):
    Image.new("RGBA", (32, 32)).save(tmp_path / "t0.png")
    with pytest.raises(UserError, match="alpha channel"):
        batch(
            load(DataSpec(name=f"restore:{tmp_path}", options={"patch": 16, "test": str(tmp_path)})), "test", False, [0]
        )
    Image.new("RGB", (9, 9)).save(tmp_path / "t0x2.png")
    (tmp_path / "t0.png").unlink()
    for i in (1, 2, 3):
        Image.new("RGB", (9, 9)).save(tmp_path / f"t{i}.png")
    with pytest.raises(UserError, match=r"has 9 x 9 pixels, but 't0\.png' at scale 2 asks for 26 x 20"):
        batch(load(spec(folder, test_low=str(tmp_path))), "test", False, [0])


# ---- figures -------------------------------------------------------------------------------------------------------


def test_luma_is_studio_range():
    """Of a grey pair the levels of luma are 219 / 255 as far apart: 1.32 dB more."""
    grey = torch.tensor([[100.0, 140.0], [60.0, 30.0]]).expand(1, 3, 2, 2)
    other = grey + torch.tensor([3.0, -5.0])
    gain = psnr(luma(grey), luma(other)) - psnr(grey, other)
    assert float(gain) == pytest.approx(20 * math.log10(255 / 219), abs=1e-6)
    assert luma(torch.tensor([255.0, 0, 0]).view(3, 1, 1)).item() == pytest.approx(81.481)


def test_figures_are_those_of_another_library():
    draw = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (2, 1, 40, 37), generator=draw).double()
    b = (a + 20 * torch.randn(a.shape, generator=draw)).clamp(0, 255).round()
    theirs = torchmetrics.functional.image.structural_similarity_index_measure(
        torch.nn.functional.pad(a, [0] * 4),
        b,
        data_range=255.0,
        gaussian_kernel=True,
        sigma=1.5,
        return_full_image=True,
    )[1]
    inner = theirs[..., 5:-5, 5:-5] if theirs.shape[-1] == a.shape[-1] else theirs
    torch.testing.assert_close(ssim(a, b), inner.flatten(1).mean(1), rtol=0, atol=1e-6)
    mse = ((a - b) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(psnr(a, b), 10 * torch.log10(255.0**2 / mse))


def test_the_meter_shaves_clamps_rounds_and_takes_the_mean_over_images():
    draw = np.random.default_rng(0)
    task, expected = Restoration(3.0), []
    meter = task.meter(["restoration", "protocols"])
    for size in ((30, 36), (45, 33)):
        true = draw.integers(0, 256, (*size, 3))
        output = true / 255 + draw.normal(0, 0.1, true.shape)
        label, image = (torch.from_numpy(x).permute(2, 0, 1)[None] for x in (true / 255, output))
        meter.add({"input": label[..., ::3, ::3], "label": label.float()}, Signals(parts={"image": image.float()}))
        levels = np.round(np.clip(output, 0, 1) * 255)[3:-3, 3:-3]
        y, t = (16 + x @ np.array([65.481, 128.553, 24.966]) / 255 for x in (levels, true[3:-3, 3:-3]))
        expected.append(10 * np.log10(255**2 / ((y - t) ** 2).mean()))
    figures = meter.figures()
    assert figures["psnr"] == pytest.approx(np.mean(expected), abs=2e-3)
    assert 0 < figures["ssim"] < 1 and figures["psnr_rgb"] < figures["psnr"] and "psnr_gain" not in figures


def test_nan_and_an_empty_split_are_errors():
    meter = Restoration(2.0).meter(GROUPS)
    with pytest.raises(UserError, match="no image"):
        meter.figures()
    image = torch.full((1, 3, 32, 32), torch.nan)
    meter.add({"input": torch.zeros(1, 3, 16, 16), "label": torch.zeros(1, 3, 32, 32)}, Signals(parts={"image": image}))
    with pytest.raises(UserError, match="NaN"):
        meter.figures()


# ---- images of any size --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2])
def test_four_crops_of_a_local_network_are_the_whole_away_from_the_seams(scale: int):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))
    x = torch.rand(2, 3, 51, 70)
    with torch.no_grad():
        whole, crops = net(x), four_crops(net, x, shave=8, multiple=4, scale=scale)
        one_by_one = four_crops(net, x, shave=8, multiple=4, scale=scale, chunk=2)
    torch.testing.assert_close(crops, whole)  # its field of view lies within the overlap
    torch.testing.assert_close(crops, one_by_one)


def test_crops_that_do_not_cover_are_refused_and_small_images_are_mirrored():
    with pytest.raises(UserError, match="do not fit an image of 21 x 30"):
        four_crops(nn.Identity(), torch.rand(1, 3, 21, 30), shave=32)
    with pytest.raises(UserError, match="shave of 0"):
        four_crops(nn.Identity(), torch.rand(1, 3, 21, 30), shave=0)
    for size in ((21, 30), (1, 3), (3, 50), (8, 8)):
        x, seen = torch.rand(1, 3, *size), []

        def network(images: torch.Tensor, seen: list = seen) -> torch.Tensor:
            seen.append(images.shape[-2:])
            return images

        assert torch.equal(any_size(network, x), x)
        assert all(side % 4 == 0 for shape in seen for side in shape)


# ---- networks, objectives, a run -----------------------------------------------------------------------------------


def test_a_window_transformer_of_another_library_is_read_whole():
    options = {"embed_dim": 12, "depths": [1], "num_heads": [2], "window_size": 4, "image_size": 16}
    task = Restoration(2.0)
    model = task.build(ModelSpec(model="hf:config:swin2sr", options=options)).eval()
    given = {"input": torch.rand(1, 3, 33, 47)}
    with torch.no_grad():
        assert task.read(task.call(model, given), given).parts["image"].shape == (1, 3, 66, 94)


@pytest.mark.parametrize("output", [torch.zeros(2, 10), torch.zeros(2, 3, 16, 16), {"boxes": torch.zeros(2, 4)}])
def test_a_network_of_another_task_or_scale_is_refused(output):
    with pytest.raises(UserError, match="needs a network that gives images"):
        Restoration(2.0).read(output, {"input": torch.zeros(2, 3, 16, 16)})


def test_l1_learns_from_the_truth_or_from_a_teacher_within_range():
    image, true = torch.rand(2, 3, 4, 4, requires_grad=True), torch.rand(2, 3, 4, 4)
    student, teacher = Signals(parts={"image": image}), Signals(parts={"image": 2 * true})
    loss = L1()(student, Signals(), {"label": true}, None)["loss"]
    torch.testing.assert_close(loss, (image - true).abs().mean())
    loss = L1(of="teacher")(student, teacher, {}, None)["loss"]
    torch.testing.assert_close(loss, (image - (2 * true).clamp(0, 1)).abs().mean())
    with pytest.raises(UserError, match="no `part:image`"):
        L1(of="teacher")(student, Signals(logits=true), {}, None)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train = {"epochs": 1, "batch_size": 4, "optimizer": {"name": "adam", "lr": 1e-3, "weight_decay": 0}}
    small = {"model": "stillhouse:imdn", "options": {"width": 8, "blocks": 2}}
    config = recipe.validate(
        {
            "data": spec(folder).model_dump(mode="json"),
            "teacher": {**small, "train": train},
            "student": {"model": "stillhouse:imdn", "options": {"width": 4, "blocks": 2}},
            "objectives": [
                "l1",
                {"name": "l1", "of": "teacher", "label": "l1_teacher"},
                {"name": "fitnet", "weight": 1},
            ],
            "train": train,
        }
    )
    execute(config, out, cpu=True)
    return out


def test_a_recipe_distils_a_network_and_shows_it_beside_bicubic(run: Path):
    figures = json.loads((run / "evaluation.json").read_text())
    assert {"psnr", "ssim", "psnr_uint8", "psnr_gain", "multiply_adds", "file_bytes"} <= set(figures)
    shown = json.loads((run / "pictures" / "pictures.json").read_text())
    assert len(shown["samples"]) == len(SIZES), "of images of several sizes"
    first = shown["samples"][0]["shown"]
    assert list(first) == ["truth", "bicubic", "student", "teacher"] and first["student"]["caption"].endswith("dB")
    assert first["bicubic"]["file"], "the baseline has a picture of its own"


def test_the_product_loads_is_judged_alike_and_upscales(run: Path, folder: Path, tmp_path: Path):
    product = load_product(run)
    loader = Loader(load(spec(folder)).dataset("test", train=False), 1)
    again = judge(product.task, product.module, loader, "cpu", ["restoration"])
    assert again["psnr"] == pytest.approx(json.loads((run / "evaluation.json").read_text())["psnr"])
    lines = list(predict(run, [str(folder / "test")], tmp_path))
    assert lines[0].startswith("t0.png: 104 x 80") and np.array(Image.open(tmp_path / "t1.png")).shape == (102, 94, 3)


def test_large_images_are_restored_in_parts(run: Path, monkeypatch: pytest.MonkeyPatch):
    product = load_product(run)
    image = torch.randint(0, 256, (3, 150, 170), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = product.predict([image])[0]["picture"].double()
    monkeypatch.setattr("stillhouse.tasks.restoration.AT_ONCE", 120 * 120)
    parts = product.predict([image])[0]["picture"].double()
    assert parts.shape == (3, 300, 340) and psnr(parts[None], whole[None]) > 40


def test_another_scale_is_another_task_of_the_same_network():
    task = Restoration(2.0, enlarged=True)
    torch.manual_seed(0)
    model = task.build(ModelSpec(model="stillhouse:imdn_as", options={"width": 8, "blocks": 1})).eval()
    image = torch.zeros(1, 15, 22, dtype=torch.uint8)
    assert dataclasses.replace(task, scale=3.5).predict(model, [image])[0]["picture"].shape == (3, 52, 77)

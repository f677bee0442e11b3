"""Segmentation: images with masks as data, networks of two libraries read on the label's grid, judged by counts, shown,
exported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
from PIL import Image
from torch import nn

from stillhouse import catalog
from stillhouse.config.specs import DataSpec, ModelSpec
from stillhouse.data import BatchKey, load
from stillhouse.errors import UserError
from stillhouse.evaluation.judge import judge
from stillhouse.functional.counting import IGNORED
from stillhouse.functional.pictures import normalise, unnormalise
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.prediction import predict
from stillhouse.runs.products import Student, load_product
from stillhouse.signals import Signals
from stillhouse.tasks.segmentation import GROUPS, Segmentation, SegmentationMeter

CLASSES = ["ground", "thing", "sky"]
TASK = Segmentation(tuple(CLASSES), (24, 32), (0.5,) * 3, (0.5,) * 3)
SEGFORMER = {
    "hidden_sizes": [4, 8, 8, 8],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 1, 1],
    "decoder_hidden_size": 8,
    "sr_ratios": [1, 1, 1, 1],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes of three classes and an ignored border, in colours that give the class away."""
    base, draw = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for side in ("images", "labels"):
            (base / split / side).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((24, 32), np.uint8)
            mask[: draw.integers(4, 12)] = 2
            top, left = draw.integers(8, 16), draw.integers(2, 20)
            mask[top : top + 6, left : left + 8] = 1
            image = np.array([[60, 120, 60], [200, 40, 40], [80, 120, 220]], np.uint8)[mask]
            mask[:, :2] = 255
            Image.fromarray(image).save(base / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(base / split / "labels" / f"{i}.png")
    return base


def scenes(folder: Path, **keys: object) -> DataSpec:
    options = {"classes": CLASSES, "ignore": 255, **keys.pop("options", {})}  # type: ignore[dict-item]
    return DataSpec.model_validate({"name": f"masks:{folder}", "options": options, **keys})


def first(bundle, split: str, train: bool, count: int = 4):
    return bundle.dataset(split, train=train).batch(BatchKey(0, np.arange(count), 0, count), 0)


def test_image_and_mask_move_together(folder: Path):
    bundle = load(
        scenes(folder, augment=[{"RandomCrop": {"size": [12, 16]}}, "RandomHorizontalFlip"], image_size=[12, 16])
    )
    batch = first(bundle, "train", True)
    assert batch["input"].shape == (4, 3, 12, 16) and batch["label"].shape == (4, 12, 16)
    # a pixel's colour says its class: thing is the reddest, sky the bluest
    red, _, blue = unnormalise(batch["input"], bundle.task.mean, bundle.task.std).long().unbind(1)
    seen = torch.where(red > 150, 1, torch.where(blue > 150, 2, 0))
    counted = batch["label"] != IGNORED
    assert (seen == batch["label"])[counted].all()


def test_a_batch_is_a_function_of_its_key(folder: Path):
    data = load(scenes(folder)).dataset("train", train=True)
    key = BatchKey(3, np.array([5, 1, 6, 2]), 1, 3)
    alone = [data.batch(BatchKey(3, np.array([i]), 0, 1), 7) for i in (1, 6)]
    together = data.batch(key, 7)
    assert torch.equal(together["input"], torch.cat([b["input"] for b in alone])) and together["index"].tolist() == [
        1,
        6,
    ]
    assert not torch.equal(together["input"], data.batch(BatchKey(4, key.indices, 1, 3), 7)["input"])


def test_classes_never_appear_by_resizing(folder: Path):
    bundle = load(scenes(folder, image_size=[17, 23], options={"label_stride": 2}))
    batch = first(bundle, "train", True)
    assert batch["label"].shape == (4, 9, 12) and set(batch["label"].unique().tolist()) <= {IGNORED, 0, 1, 2}
    assert first(bundle, "test", False)["label"].shape == (4, 24, 32), "judged on whole masks"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"options": {"classes": CLASSES}}, "data.options.ignore: 255"),
        ({"options": {"classes": ["a"], "ignore": 255}}, "name the classes"),
        ({"mixup": 0.2}, "data.mixup does nothing for 'masks:"),
        ({"options": {"clases": CLASSES}}, "did you mean 'classes'"),
    ],
)
def test_mistakes_get_a_sentence(folder: Path, change: dict, sentence: str):
    spec = DataSpec.model_validate(
        {"name": f"masks:{folder}", "options": {"classes": CLASSES, "ignore": 255}, **change}
    )
    with pytest.raises(UserError, match=sentence):
        first(load(spec), "train", False)


def test_an_image_without_a_mask_is_named(folder: Path, tmp_path: Path):
    for split in ("train", "test"):
        for side in ("images", "labels"):
            (tmp_path / split / side).mkdir(parents=True)
    (tmp_path / "train" / "images" / "lost.png").write_bytes((folder / "train" / "images" / "0.png").read_bytes())
    with pytest.raises(UserError, match="'lost'"):
        load(scenes(tmp_path))


@pytest.mark.parametrize("name", ["hf:config:segformer", "torchvision:lraspp_mobilenet_v3_large"])
def test_networks_are_read_on_the_labels_grid(name: str):
    options = SEGFORMER if name.startswith("hf") else {}
    model = TASK.build(ModelSpec(model=name, options=options)).eval()
    batch = {"input": torch.randn(2, 3, 24, 32), "label": torch.zeros(2, 12, 16, dtype=torch.int64)}
    with torch.no_grad():
        logits = TASK.read(TASK.call(model, batch), batch).logits
        whole = TASK.read(TASK.call(model, batch), {"input": batch["input"]}).logits
    assert logits is not None and logits.shape == (2, 12, 16, 3) and whole is not None and whole.shape == (2, 24, 32, 3)


def test_a_classifier_is_refused():
    with pytest.raises(UserError, match="maps"):
        TASK.read(torch.zeros(2, 3), {"input": torch.zeros(2, 3, 24, 32)})


def test_the_meter_counts_as_torchmetrics_does():
    draw = torch.Generator().manual_seed(0)
    theirs = torchmetrics.JaccardIndex("multiclass", num_classes=3, ignore_index=IGNORED, average="none")
    meter, right, total = SegmentationMeter(CLASSES, GROUPS), 0, 0
    for _ in range(3):
        logits = torch.randn(2, 6, 7, 3, generator=draw)
        label = torch.randint(0, 3, (2, 6, 7), generator=draw).masked_fill(
            torch.rand(2, 6, 7, generator=draw) < 0.3, IGNORED
        )
        meter.add({"label": label}, Signals(logits=logits))
        theirs.update(logits.argmax(-1), label)
        right, total = right + int((logits.argmax(-1) == label).sum()), total + int((label != IGNORED).sum())
    figures = meter.figures()
    per_class = [figures[f"iou_{c}"] for c in CLASSES]
    assert per_class == pytest.approx(theirs.compute().tolist(), abs=1e-6)
    assert figures["miou"] == pytest.approx(sum(per_class) / 3) and figures["pixel_accuracy"] == pytest.approx(
        right / total
    )


def test_a_class_that_never_occurs_does_not_count():
    meter = SegmentationMeter(CLASSES, ["segmentation"])
    meter.add({"label": torch.tensor([[[0, 1]]])}, Signals(logits=torch.eye(3)[torch.tensor([[[0, 1]]])]))
    assert meter.figures() == {"miou": 1.0, "pixel_accuracy": 1.0}
    with pytest.raises(UserError, match="no pixel"):
        ignored = SegmentationMeter(CLASSES, ["segmentation"])
        ignored.add({"label": torch.full((1, 1, 2), IGNORED)}, Signals(logits=torch.zeros(1, 1, 2, 3)))
        ignored.figures()


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    config = recipe.validate(
        {
            "data": scenes(folder).model_dump(mode="json"),
            "teacher": {
                "model": "hf:config:segformer",
                "options": SEGFORMER,
                "train": {"epochs": 1, "batch_size": 4, "optimizer": {"name": "adamw", "lr": 1e-3}},
            },
            "student": {"model": "hf:config:segformer", "options": SEGFORMER},
            "objectives": [
                "ce",
                "kd",
                {"name": "fitnet", "student_layer": "stage:2", "teacher_layer": "stage:2", "weight": 1},
            ],
            "train": {"epochs": 2, "batch_size": 4, "optimizer": {"name": "adamw", "lr": 1e-3}},
        }
    )
    execute(config, out, cpu=True)
    return out


def test_a_recipe_distils_a_segmenter_and_shows_it(run: Path):
    figures = json.loads((run / "evaluation.json").read_text())
    assert {"miou", "pixel_accuracy", "iou_sky", "multiply_adds", "file_bytes"} <= set(figures)
    shown = json.loads((run / "pictures" / "pictures.json").read_text())
    assert shown["compared"] and set(shown["samples"][0]["shown"]) == {"truth", "student", "teacher"}
    assert "Pictures" in (run / "report.html").read_text()


def test_the_product_loads_predicts_and_is_judged_alike(run: Path, folder: Path, tmp_path: Path):
    product = load_product(run)
    assert isinstance(product, Student) and product.classes == CLASSES
    spec = scenes(folder)
    loaded = judge(product.task, product.module, [first(load(spec), "test", False)], "cpu", ["segmentation"])
    assert loaded["miou"] == pytest.approx(json.loads((run / "evaluation.json").read_text())["miou"])
    lines = list(predict(run, [str(folder / "test" / "images")], tmp_path))
    assert len(lines) == 4 and (tmp_path / "0.png").exists()
    first_line = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    assert sum(first_line["shares"].values()) == pytest.approx(1, abs=1e-3)


def test_prediction_is_the_networks_arg_max(run: Path, folder: Path):
    product = load_product(run)
    image = torch.from_numpy(np.array(Image.open(folder / "test" / "images" / "0.png"))).permute(2, 0, 1)
    x = normalise(image[None], product.task.mean, product.task.std)
    with torch.no_grad():
        expected = product.task.read(product.module(pixel_values=x), {"input": x}).logits.argmax(-1)[0]
    assert torch.equal(product.predict([image])[0]["classes"], expected)


def test_a_task_of_another_package_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A product of a task that another package brings saves, and loads again by the name of its entry point."""
    package = tmp_path / "brewery-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: brewery\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[stillhouse.tasks]\nstrength = brewery:Strength\n")
    (tmp_path / "brewery.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from stillhouse.models import build\n"
        "from stillhouse.tasks.base import Task\n\n\n"
        "@dataclass(frozen=True)\n"
        "class Strength(Task):\n"
        "    name: ClassVar[str] = 'strength'\n"
        "    width: int\n\n"
        "    def build(self, spec):\n"
        "        return build(spec, 2, (self.width,))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert catalog.task("strength").__name__ == "Strength"
    import brewery  # type: ignore[import-not-found]

    task, spec = brewery.Strength(3), ModelSpec(model="stillhouse:mlp", options={"widths": [4]})
    Student(task.build(spec), spec, task).save(tmp_path / "product")
    loaded = load_product(tmp_path / "product")
    assert loaded.task == task and isinstance(loaded.module, nn.Module)
    with pytest.raises(UserError, match="did you mean 'segmentation'"):
        catalog.task("segmentatoin")
    sys.modules.pop("brewery")

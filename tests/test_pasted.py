"""Scenes with pasted objects: boxes lie on what was pasted, new classes have none in training, and one object alone is
a labelled image; further boxes move with an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.config.specs import DataSpec
from stillhouse.data import BatchKey, load
from stillhouse.data.boxes import with_regions
from stillhouse.errors import UserError
from stillhouse.evaluation.detection import DetectionMeter, region_shares
from stillhouse.signals import Signals

DRAWN = {
    "on": {"name": "pasted_ground"},
    "images": [8, 6],
    "canvas": [48, 64],
    "sides": [12, 24],
    "count": [1, 3],
}


@pytest.fixture(scope="module", autouse=True)
def photographs(tmp_path_factory: pytest.TempPathFactory):
    """Four grey photographs as a folder of classes, under the data root."""
    from PIL import Image

    root = tmp_path_factory.mktemp("root")
    for split in ("train", "test"):
        for i in range(2):
            place = root / "ground" / split / str(i)
            place.mkdir(parents=True)
            for n in range(2):
                Image.fromarray(np.full((60, 80, 3), 90 + 10 * n, np.uint8)).save(place / f"{n}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLHOUSE_DATA", str(root))
        yield root


def spec(augment: object = "plain", name: str = "pasted:digits", **options: object) -> DataSpec:
    drawn = {**DRAWN, "on": {"name": "imagefolder:ground"}, **options}
    return DataSpec.model_validate({"name": name, "augment": augment, "options": drawn})


def first(bundle, split: str, train: bool, count: int = 6, epoch: int = 0):
    return bundle.dataset(split, train=train).batch(BatchKey(epoch, np.arange(count), 0, count), 0)


def test_boxes_lie_on_what_was_pasted():
    """The ground is of one grey, a digit is not: outside of all boxes every pixel is alike."""
    batch = first(load(spec()), "test", False)
    for image, target in zip(batch["input"], batch["target"]):
        assert len(target["boxes"])
        outside = torch.ones(image.shape[-2:], dtype=torch.bool)
        for x1, y1, x2, y2 in target["boxes"].int().tolist():
            assert image[0, y1:y2, x1:x2].std() > 0.1, "a digit has contrast"
            outside[y1:y2, x1:x2] = False
        assert image[0][outside].std() < 0.2


def test_scenes_are_a_function_of_the_seed():
    one, same = first(load(spec()), "train", True), first(load(spec()), "train", True)
    other = first(load(spec().model_copy(update={"seed": 1})), "train", True)
    assert torch.equal(one["input"], same["input"])
    assert not torch.equal(one["input"], other["input"])


def test_new_classes_have_boxes_only_in_the_test_images():
    plain, open_ = load(spec()), load(spec(new=["3", "5"]))
    assert open_.task.new == (3, 5) and plain.task.new == () and open_.fingerprint != plain.fingerprint

    def labels(bundle, split: str) -> set[int]:
        return {int(y) for t in first(bundle, split, False)["target"] for y in t["labels"]}

    assert not {3, 5} & labels(open_, "train")
    assert labels(open_, "test") == labels(plain, "test")
    assert torch.equal(first(open_, "train", False)["input"], first(plain, "train", False)["input"])


def test_one_object_alone_is_a_labelled_image():
    bundle = load(spec(single=True, canvas=[32, 32]))
    batch = first(bundle, "train", False)
    assert batch["input"].shape == (6, 3, 32, 32) and batch["label"].shape == (6,)
    assert len(bundle.classes) == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"new": ["11"]}, "no class for data.options.new|unknown|11"),
        ({"new": list("0123456789")}, "every class new"),
        ({"sides": [30, 80]}, "does not fit the canvas"),
        ({"count": [3, 1]}, "smaller first"),
        ({"single": True, "new": ["1"]}, "no boxes to leave out"),
        ({"style": [{"Resize": {"size": 10}}]}, "size of scenes"),
    ],
)
def test_what_does_not_fit_is_a_sentence(options: dict, words: str):
    with pytest.raises(UserError, match=words):
        load(spec(**options))


@pytest.mark.parametrize("augment", ["plain", [{"RandomHorizontalFlip": {"p": 1.0}}]])
def test_further_boxes_move_with_their_image(augment: object):
    """Stored regions that are the true boxes themselves are the true boxes after every transform too."""
    bundle = load(spec(augment))
    dataset = bundle.dataset("train", train=True)
    plain = bundle.dataset("train", train=False)

    def rows(index: int) -> dict[str, Tensor]:
        boxes = plain.raw(index)["boxes"].as_subclass(Tensor)
        return {"boxes": boxes, "vectors": torch.arange(len(boxes))[:, None].float()}

    batch = with_regions(dataset, rows).batch(BatchKey(0, np.array([3, 0, 5]), 0, 3), 0)
    assert batch["index"].tolist() == [3, 0, 5]
    for regions, target in zip(batch["regions"], batch["target"]):
        torch.testing.assert_close(regions["boxes"], target["boxes"])
        assert regions["vectors"].flatten().tolist() == list(range(len(target["boxes"])))


def test_new_classes_are_judged_by_themselves():
    meter = DetectionMeter(("a", "b"), ["detection"], (32, 32), new=(1,))
    boxes = torch.tensor([[[0.0, 0.0, 8.0, 8.0], [16.0, 16.0, 30.0, 30.0]]])
    target = [{"boxes": boxes[0], "labels": torch.tensor([0, 1])}]
    found = {"boxes": boxes, "scores": torch.tensor([[0.9, 0.8]]), "labels": torch.tensor([[0, 0]])}
    meter.add({"target": target}, Signals(parts=found))
    figures = meter.figures()
    assert figures["ap50_base"] == pytest.approx(1.0) and figures["ap50_new"] == pytest.approx(0.0)
    assert figures["ap50"] == pytest.approx(0.5)


def test_shares_of_regions():
    yes, no = True, False
    shares = region_shares(torch.tensor([no, no, yes]), torch.tensor([yes, no, yes]), torch.tensor([no, no, yes]))
    assert shares == {"recall_base": 0.5, "accuracy_regions_base": 0.0, "recall_new": 1.0, "accuracy_regions_new": 1.0}

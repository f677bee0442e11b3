"""Dynamic Y-KD: the old head on the new features, heads that grow and are averaged, and one head on the features of
several extractors."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stillhouse.config.specs import DataSpec, ModelSpec
from stillhouse.data import BatchKey, load
from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.evaluation.detection import DetectionMeter
from stillhouse.methods.dense.dynamic_ykd.heads import (
    averaged_heads,
    background_rows,
    branched,
    carry_over,
    is_head,
    with_classes,
)
from stillhouse.methods.dense.dynamic_ykd.losses import box_loss, mask_loss, region_loss, score_loss
from stillhouse.methods.dense.dynamic_ykd.method import Keeping, StepTraining, drawn
from stillhouse.models.region_detector import RegionDetector
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.signals import Batch, Signals
from stillhouse.tasks.detection import Detection

CLASSES = ("bar", "square", "disc")
TASK = Detection(CLASSES, (64, 96), (0.5,) * 3, (0.5,) * 3, masks=True)
SMALL = {"width": 4, "pyramid": 8, "hidden": 16, "sampled": 8, "proposals": (20, 20)}
SPAN = Progress()


def network(classes: int, seed: int = 0) -> RegionDetector:
    torch.manual_seed(seed)
    return with_classes(RegionDetector(3, (3, 64, 96), masks=True, **SMALL), classes)


def batch(*counts: int) -> Batch:
    draw = torch.Generator().manual_seed(1)
    targets = []
    for count in counts:
        masks = torch.zeros(count, 64, 96, dtype=torch.bool)
        masks[:, 8:24, 8:40] = True
        boxes = torch.tensor([[8.0, 8.0, 40.0, 24.0]]).expand(count, 4).clone()
        targets.append({"boxes": boxes, "labels": torch.full((count,), 1), "masks": masks})
    return {"input": torch.randn(len(counts), 3, 64, 96, generator=draw), "target": targets}


# ---- what is kept ----------------------------------------------------------------------------------------------------


def kept(path: str, moved: bool, **options: object) -> dict[str, Tensor]:
    """The terms of a student whose head is the old one, its extractor another where `moved`."""
    old, student = network(2), network(2)
    if moved:
        student.backbone.load_state_dict(network(2, 1).backbone.state_dict())
    module = StepTraining(student, old, TASK, Keeping.model_validate({"path": path, **options})).train()
    module.build(batch(1))
    return module(batch(1, 0), SPAN)


@pytest.mark.parametrize("moved", [False, True])
def test_a_head_agrees_with_itself_whatever_the_extractor(moved: bool):
    terms = kept("shared", moved)
    zero = {k: terms[k].item() for k in ("kept_scores", "kept_boxes", "kept_regions")}
    assert zero == pytest.approx(dict.fromkeys(zero, 0), abs=1e-10)


def test_separate_extractors_disagree():
    terms = kept("separate", True)
    assert terms["kept_scores"] > 1e-6 and terms["kept_boxes"] > 1e-6


def test_the_student_alone_learns_and_its_extractor_feels_what_is_kept():
    old, student = network(1), network(2, 1)
    carry_over(student, network(1, 1).state_dict())
    module = StepTraining(student, old, TASK, Keeping(unbiased=True, feature_weight=0.5)).train()
    given = batch(2, 0)
    module.build(given)
    terms = module(given, SPAN)
    assert terms["loss"].isfinite() and not old.training
    (terms["kept_scores"] + terms["kept_masks"]).backward()
    for part in (student.backbone, student.roi_heads.box_head, student.roi_heads.mask_predictor):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert all(p.grad is None for p in old.parameters())
    assert not any(name.startswith("_old") for name in module.state_dict())


@pytest.mark.parametrize("counts", [(0, 0), (0, 2)])
def test_images_without_a_new_object_are_background(counts: tuple[int, ...]):
    module = StepTraining(network(3), network(2, 1), TASK, Keeping()).train()
    module.build(batch(1))
    module(batch(*counts), SPAN)["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.student.parameters())


def test_without_regions_nothing_is_kept():
    scores, boxes, masks = torch.randn(0, 4, requires_grad=True), torch.randn(0, 4, 4), torch.randn(0, 4, 2, 2)
    for form in ("l2", "uce", "ce", "ce_ada"):
        loss = score_loss(scores, torch.randn(0, 3), form)  # type: ignore[arg-type]
        assert loss == 0 and loss.requires_grad
    assert box_loss(boxes, boxes[:, :3]) == 0 and mask_loss(masks, masks[:, :3]) == 0


def test_new_classes_shift_no_score_of_the_old_ones():
    """What a row has in common does not count, and with unbiased scores new classes are a part of the background."""
    old = torch.randn(6, 3)
    assert score_loss(old + 5, old) == pytest.approx(0, abs=1e-10)
    split = torch.cat([old[:, :1], old[:, 1:], old[:, :1]], 1)
    split[:, [0, 3]] -= np.log(2)
    entropy = -(old.softmax(1) * old.log_softmax(1)).sum(1).mean() / 3
    torch.testing.assert_close(score_loss(split, old, "uce"), entropy)


def test_the_first_stage_keeps_what_the_old_one_finds_more_surely():
    mine, boxes = torch.zeros(1, 2, 2, 2), torch.zeros(1, 8, 2, 2)
    theirs, wanted = torch.full_like(mine, -1.0), torch.ones_like(boxes)
    assert region_loss([mine], [boxes], [theirs], [wanted]) == 0
    theirs[0, 1, 0, 0] = 2.0
    assert region_loss([mine], [boxes], [theirs], [wanted]) == pytest.approx((4 + 4) / 8)


def test_regions_are_drawn_from_the_best_and_all_where_they_are_few():
    regions = [torch.arange(40.0).view(10, 4), torch.zeros(0, 4), torch.ones(2, 4)]
    torch.manual_seed(0)
    some = drawn(regions, 6, 4)
    assert [len(r) for r in some] == [4, 0, 2] and some[0].max() < 24
    assert not torch.equal(drawn(regions, 6, 4)[0], drawn(regions, 6, 4)[0])


# ---- heads -----------------------------------------------------------------------------------------------------------


def test_old_classes_keep_their_rows():
    before, after = network(1), network(3, 1)
    new_rows = after.roi_heads.box_predictor.bbox_pred.weight[8:].clone()
    carry_over(after, before.state_dict())
    heads, old = after.roi_heads, before.roi_heads
    torch.testing.assert_close(heads.box_predictor.cls_score.weight[:2], old.box_predictor.cls_score.weight)
    torch.testing.assert_close(heads.mask_predictor.mask_fcn_logits.bias[:2], old.mask_predictor.mask_fcn_logits.bias)
    torch.testing.assert_close(heads.box_predictor.bbox_pred.weight[8:], new_rows)
    background_rows(after, 1)
    torch.testing.assert_close(heads.box_predictor.cls_score.weight[2], heads.box_predictor.cls_score.weight[0])


def test_averages_lie_between_both_heads_and_leave_the_extractor():
    old, new = network(1).state_dict(), network(2, 1).state_dict()
    whole, none, half = (averaged_heads([new, old], [w, 1 - w]) for w in (1.0, 0.0, 0.5))
    for name, tensor in new.items():
        torch.testing.assert_close(whole[name], tensor)
        if not is_head(name):
            assert torch.equal(none[name], tensor)
            continue
        rows = old[name].shape[0]
        torch.testing.assert_close(none[name][:rows], old[name])
        torch.testing.assert_close(none[name][rows:], tensor[rows:])
        torch.testing.assert_close(half[name][:rows], (old[name] + tensor[:rows]) / 2)
    three = averaged_heads([new, old, old], [0.5, 0.25, 0.25])
    torch.testing.assert_close(three["rpn.head.cls_logits.weight"], half["rpn.head.cls_logits.weight"])


def test_mistakes_get_a_sentence():
    old, new = network(1).state_dict(), network(2, 1).state_dict()
    with pytest.raises(UserError, match="which sum to 1"):
        averaged_heads([new, old], [0.5, 0.6])
    with pytest.raises(UserError, match=r"no 'rpn\.head\.cls_logits\.bias'"):
        averaged_heads([new, {k: v for k, v in old.items() if k != "rpn.head.cls_logits.bias"}], [0.5, 0.5])
    with pytest.raises(UserError, match="classes are only added"):
        carry_over(network(1), new)
    with pytest.raises(UserError, match="did you mean 'stem'"):
        StepTraining(network(2), network(1), TASK, Keeping(), ["stam"])
    with pytest.raises(UserError, match="form of the scores"):
        score_loss(torch.zeros(1, 3), torch.zeros(1, 2), "l1")  # type: ignore[arg-type]


def test_a_resnet_cut_before_its_last_stage_learns_too():
    """C4: boxes and masks share the last stage, statistics of batch norm stay, and what is frozen gets no gradient."""
    torch.manual_seed(0)
    options = {"backbone": "resnet18", "sampled": 4, "proposals": (8, 8), "anchors": [[16.0, 32.0]]}
    student, old = (with_classes(RegionDetector(3, (3, 64, 96), masks=True, **options), k) for k in (2, 1))
    assert student.roi_heads.mask_head is student.roi_heads.box_head[0]
    module = StepTraining(student, old, TASK, Keeping(), ["stem", "stages.0"]).train()
    module.build(batch(1))
    module(batch(1), SPAN)["loss"].backward()
    assert student.backbone.stages[0][0].conv1.weight.grad is None
    assert student.backbone.stages[1][0].conv1.weight.grad.abs().sum() > 0
    with pytest.raises(UserError, match="a ResNet of torchvision"):
        RegionDetector(3, (3, 64, 96), backbone="vgg16")


# ---- branches --------------------------------------------------------------------------------------------------------


def test_a_branch_finds_its_own_classes_in_the_order_of_the_data():
    head = network(3)
    head.roi_heads.score_thresh = 0.0
    module = branched(copy.deepcopy(head), [{}, {}], [[1], [2, 3]], [2, 0, 1]).eval()
    images = [torch.rand(3, 64, 96), torch.rand(3, 64, 96)]
    with torch.no_grad():
        whole, parts = head.eval()(images), module(images)
    places = torch.tensor([0, 3, 1, 2])
    for one, both in zip(whole, parts):
        assert len(both["boxes"]) == len(one["boxes"])
        torch.testing.assert_close(both["scores"], one["scores"])
        assert torch.equal(both["labels"].bincount(minlength=4), places[one["labels"]].bincount(minlength=4))


def test_what_was_frozen_is_held_once():
    states = [network(3, seed).backbone.state_dict() for seed in (0, 1)]
    module = branched(network(3), states, [[1], [2, 3]], [0, 1, 2], ["stem"])
    first, second = module.extractors
    assert first.stem is second.stem and first.neck is not second.neck
    assert torch.equal(second.stages[0].shortcut.weight, states[1]["stages.0.shortcut.weight"])


# ---- masks as data, and a recipe -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark images with a red bar and two green squares that are no neighbours; ids 1 and 2, ground 0."""
    base, random = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for side in ("images", "labels"):
            (base / split / side).mkdir(parents=True)
        for i in range(count):
            image, mask = np.full((64, 96, 3), 20, np.uint8), np.zeros((64, 96), np.uint8)
            for kind, (top, left, h, w), colour in (
                (1, (int(random.integers(0, 20)), 4, 8, 32), (230, 60, 60)),
                (2, (40, int(random.integers(0, 20)), 16, 16), (60, 230, 60)),
                (2, (40, int(random.integers(50, 70)), 16, 16), (60, 230, 60)),
            ):
                image[top : top + h, left : left + w], mask[top : top + h, left : left + w] = colour, kind
            mask[0, 90] = 2
            Image.fromarray(image).save(base / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(base / split / "labels" / f"{i}.png")
    return base


OPTIONS = {"classes": ["ground", "bar", "square"], "things": ["bar", "square"], "smallest": 4}


def spec(scenes: Path, **keys: object) -> DataSpec:
    return DataSpec.model_validate({"name": f"instances:{scenes}", "options": OPTIONS, **keys})


def test_connected_parts_are_objects_and_small_ones_neither_learned_nor_judged(scenes: Path):
    bundle = load(spec(scenes))
    assert bundle.task.classes == ("bar", "square") and bundle.task.masks
    plain = bundle.dataset("test", train=False)[0]["target"]
    assert sorted(plain["labels"].tolist()) == [0, 1, 1, 1] and plain["crowd"].sum() == 1
    assert sorted(plain["masks"].flatten(1).sum(1).tolist()) == [1, 256, 256, 256]
    assert len(bundle.dataset("train", train=True)[0]["target"]["labels"]) <= 3


@pytest.mark.parametrize("augment", ["standard", [{"RandomIoUCrop": {}}, "RandomHorizontalFlip"]])
def test_image_boxes_and_masks_move_together(scenes: Path, augment: object):
    data = load(spec(scenes, augment=augment, image_size=[48, 64])).dataset("train", train=True)
    seen = 0
    for epoch in range(3):
        made = data.batch(BatchKey(epoch, np.arange(6), 0, 6), 0)
        for image, target in zip(made["input"], made["target"]):
            for box, label, mask in zip(target["boxes"], target["labels"], target["masks"]):
                rows, columns = mask.nonzero(as_tuple=True)
                edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                assert (edges - box).abs().max() < 2, "the box is around its mask"
                assert (image[label, mask] > image[2, mask]).float().mean() > 0.8, "the mask is on its object"
                seen += 1
    assert seen > 20


def test_numbers_of_objects_part_what_touches(scenes: Path, tmp_path: Path):
    for side in ("images", "labels", "objects"):
        (tmp_path / "train" / side).mkdir(parents=True)
    classes, numbers = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    classes[2:6, 1:7], numbers[2:6, 1:4], numbers[2:6, 4:7] = 1, 7, 9
    for i in range(2):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "train" / "images" / f"{i}.png")
        Image.fromarray(classes).save(tmp_path / "train" / "labels" / f"{i}.png")
        Image.fromarray(numbers).save(tmp_path / "train" / "objects" / f"{i}.png")
    options = {"classes": ["ground", "thing"], "things": ["thing"]}
    counts = [
        len(load(DataSpec(name=f"instances:{tmp_path}", options=o)).dataset("test", train=False)[0]["target"]["boxes"])
        for o in (options, {**options, "objects": "objects"})
    ]
    assert counts == [1, 2]


def test_true_masks_are_judged_right_and_wrong_ones_wrong(scenes: Path):
    bundle = load(spec(scenes))
    made = bundle.dataset("test", train=False).batch(BatchKey(0, np.arange(3), 0, 3), 0)
    own = [{k: v[~t["crowd"]] for k, v in t.items() if k != "size"} for t in made["target"]]
    boxes, labels, masks = (torch.stack([t[k] for t in own]) for k in ("boxes", "labels", "masks"))
    for shift, expected in ((0, 1.0), (12, 0.0)):
        meter = DetectionMeter(bundle.task.classes, bundle.task.groups, bundle.task.size)
        parts = {"boxes": boxes, "labels": labels, "scores": torch.ones(3, 3), "masks": masks.roll(shift, 2)}
        meter.add(made, Signals(parts=parts))
        figures = meter.figures()
        assert figures["ap"] == pytest.approx(1.0) and figures["mask_ap50"] == pytest.approx(expected)


def test_networks_and_data_of_other_kinds_are_refused(scenes: Path):
    with pytest.raises(UserError, match="gives none"):
        model = TASK.build(ModelSpec(model="stillhouse:faster_rcnn", options=SMALL)).eval()
        TASK.read(TASK.call(model, batch(1)), batch(1))
    with pytest.raises(UserError, match="learns masks"):
        model = TASK.build(ModelSpec(model="stillhouse:mask_rcnn", options=SMALL))
        boxes = {"boxes": torch.tensor([[1.0, 1.0, 9.0, 9.0]]), "labels": torch.tensor([0])}
        TASK.call(model, {**batch(1), "target": [boxes]}, losses=True)
    with pytest.raises(UserError, match="did you mean 'bar'"):
        load(DataSpec(name=f"instances:{scenes}", options={**OPTIONS, "things": ["bat"]}))


def tree(scenes: Path, **keys: object) -> dict[str, object]:
    train = {"epochs": 1, "batch_size": 2, "eval_every": 0, "optimizer": {"name": "adamw", "lr": 1e-3}}
    return {
        "method": "dynamic_ykd",
        "data": {"name": f"instances:{scenes}", "options": OPTIONS},
        "student": {"model": "stillhouse:mask_rcnn", "options": SMALL},
        "tasks": [["square"], ["bar"]],
        "train": train,
        "step": train,
        **keys,
    }


def test_a_recipe_leaves_a_product_of_two_branches(scenes: Path, tmp_path: Path):
    given = recipe.validate(tree(scenes, freeze=["stem"], curve=[0.0, 1.0], averaging=[0.5, 0.5]))
    figures = execute(given, tmp_path / "run", cpu=True)
    assert {"mask_ap50_old", "ap50_new", "mask_ap50_old_before", "feature_drift", "mask_ap50_new_at_1"} <= set(figures)
    product = load_product(tmp_path / "run")
    assert len(product.module.extractors) == 2 and product.classes == ["bar", "square"]
    assert product.module.extractors[0].stem is product.module.extractors[1].stem
    image = torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)
    assert product.predict([image])[0]["picture"].shape == (3, 64, 96)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"tasks": [["square"], ["bat"]]}, "did you mean 'bar'"),
        ({"tasks": [["square"]]}, "must come in one task"),
        ({"averaging": 1.5}, "w must be from 0 to 1"),
        ({"averaging": [0.5, 0.2]}, "which sum to 1"),
        ({"student": {"model": "stillhouse:one_stage"}}, "a detector with regions"),
    ],
)
def test_mistakes_in_a_recipe_get_a_sentence(scenes: Path, tmp_path: Path, keys: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        execute(recipe.validate(tree(scenes, **keys)), tmp_path / "run", cpu=True)

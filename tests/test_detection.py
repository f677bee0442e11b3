"""Detection: boxes of four kinds of files as data, odd boxes included; networks of three libraries read alike; judged
as COCO judges; shown; distilled and saved."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import batched_nms

from stillhouse.config.specs import DataSpec, ModelSpec
from stillhouse.data import BatchKey, load
from stillhouse.distillation.distillation import Distillation
from stillhouse.errors import UserError
from stillhouse.evaluation.detection import GROUPS, DetectionMeter
from stillhouse.functional.boxes import best_detections, unsuppressed
from stillhouse.functional.grids import Level, grid_losses
from stillhouse.models.layer_graph import Layer, LayerGraph
from stillhouse.objectives.fitnet import FitNet
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.prediction import predict
from stillhouse.runs.products import load_product
from stillhouse.signals import Signals
from stillhouse.tasks.detection import Detection
from stillhouse.training.context import Progress

CLASSES = ("bar", "square")
TASK = Detection(CLASSES, (64, 96), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RT_DETR = {
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "encoder_in_channels": [8, 16, 16],
    "decoder_in_channels": [16, 16, 16],
    "encoder_hidden_dim": 16,
    "d_model": 16,
    "num_queries": 20,
    "decoder_layers": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}


def scene(draw: np.random.Generator) -> tuple[np.ndarray, list[tuple[str, list[int]]]]:
    """A dark image (64, 96) with a bright square and a wide grey bar."""
    image, found = np.full((64, 96, 3), 20, np.uint8), []
    for name, (h, w), colour in (("square", (16, 16), (230, 60, 60)), ("bar", (8, 32), (60, 230, 60))):
        top, left = int(draw.integers(0, 64 - h)), int(draw.integers(0, 96 - w))
        image[top : top + h, left : left + w] = colour
        found.append((name, [left, top, left + w, top + h]))
    return image, found


def write_voc(base: Path, splits: dict[str, list[tuple[np.ndarray, list[tuple[str, list[int]]]]]]) -> Path:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    for split, scenes in splits.items():
        names = []
        for i, (image, objects) in enumerate(scenes):
            names.append(f"{split}{i}")
            Image.fromarray(image).save(base / "JPEGImages" / f"{names[-1]}.png")
            text = "".join(
                f"<object><name>{n}</name><bndbox><xmin>{b[0] + 1}</xmin><ymin>{b[1] + 1}</ymin><xmax>{b[2]}</xmax>"
                f"<ymax>{b[3]}</ymax></bndbox></object>"
                for n, b in objects
            )
            h, w = image.shape[:2]
            (base / "Annotations" / f"{names[-1]}.xml").write_text(
                f"<annotation><size><width>{w}</width><height>{h}</height></size>{text}</annotation>"
            )
        (base / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = np.random.default_rng(0)
    made = {split: [scene(draw) for _ in range(n)] for split, n in (("train", 8), ("test", 4))}
    return write_voc(tmp_path_factory.mktemp("scenes") / "voc", made)


def write_coco(base: Path, ids: tuple[int, int] = (1, 2), annotations: list[dict] | None = None, **facts) -> Path:
    """Four scenes with the category ids given."""
    draw, boxes, images = np.random.default_rng(1), [], []
    (base / "train").mkdir(parents=True)
    for i in range(4):
        image, objects = scene(draw)
        Image.fromarray(image).save(base / "train" / f"{i}.png")
        images.append({"id": 10 + i, "file_name": f"{i}.png", "height": 64, "width": 96})
        for name, (x1, y1, x2, y2) in objects:
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": ids[CLASSES.index(name)], "image_id": 10 + i}
            boxes.append({**box, "id": len(boxes)})
    categories = [{"id": i, "name": n} for i, n in zip(ids, CLASSES)]
    content = {"images": images, "annotations": boxes + (annotations or []), "categories": categories, **facts}
    (base / "train" / "_annotations.coco.json").write_text(json.dumps(content))
    return base


def spec(name: str, **keys: object) -> DataSpec:
    return DataSpec.model_validate({"name": name, **keys})


def first(bundle, split: str, train: bool, count: int = 4, epoch: int = 0):
    return bundle.dataset(split, train=train).batch(BatchKey(epoch, np.arange(count), 0, count), 0)


def coloured(image: Tensor, box: Tensor) -> float:
    """The share of a box's pixels that are not background."""
    x1, y1, x2, y2 = box.round().int().tolist()
    pixels = image[:, y1:y2, x1:x2]
    return float((pixels.max(0).values > 1.0).float().mean())


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["standard", [{"RandomIoUCrop": {}}, "RandomHorizontalFlip"]])
def test_image_and_boxes_move_together(folder: Path, augment: object):
    bundle = load(spec(f"voc:{folder}", augment=augment))
    assert bundle.task.classes == CLASSES
    seen = 0
    for epoch in range(3):
        batch = first(bundle, "train", True, 8, epoch)
        for image, target in zip(batch["input"], batch["target"]):
            for box in target["boxes"]:
                assert coloured(image, box) > 0.7
                seen += 1
    assert seen > 12


def test_a_batch_is_a_function_of_its_key(folder: Path):
    data = load(spec(f"voc:{folder}")).dataset("train", train=True)
    key = BatchKey(3, np.array([5, 1, 6, 2]), 1, 3)
    together = data.batch(key, 7)
    for n, i in enumerate((1, 6)):
        alone = data.batch(BatchKey(3, np.array([i]), 0, 1), 7)
        assert torch.equal(alone["input"][0], together["input"][n])
        assert torch.equal(alone["target"][0]["boxes"], together["target"][n]["boxes"])


def test_boxes_of_voc_count_pixels_from_one(folder: Path):
    batch = first(load(spec(f"voc:{folder}")), "test", False)
    for target in batch["target"]:
        sides = (target["boxes"][:, 2:] - target["boxes"][:, :2]).tolist()
        assert sorted(sides) == [[16.0, 16.0], [32.0, 8.0]]


@pytest.mark.parametrize("ids", [(0, 1), (1, 2), (5, 90)])
def test_category_ids_may_begin_anywhere_and_have_gaps(tmp_path: Path, ids: tuple[int, int]):
    bundle = load(spec(f"coco:{write_coco(tmp_path / 'coco', ids)}", augment="plain"))
    assert bundle.task.classes == CLASSES
    for target in first(bundle, "train", True, 2)["target"]:
        sides = (target["boxes"][:, 2:] - target["boxes"][:, :2]).tolist()
        assert [sides[i] for i in target["labels"].argsort().tolist()] == [[32.0, 8.0], [16.0, 16.0]]


def test_odd_boxes_are_left_out_counted_or_cut(tmp_path: Path):
    odd = [
        {"id": 100, "image_id": 10, "category_id": 1, "bbox": [5, 5, 0, 9]},
        {"id": 101, "image_id": 10, "category_id": 1, "bbox": [200, 5, 9, 9]},
        {"id": 102, "image_id": 11, "category_id": 1, "bbox": [80, 50, 40, 40]},
        {"id": 103, "image_id": 12, "category_id": 2, "bbox": [0, 0, 96, 64], "iscrowd": 1},
    ]
    base = write_coco(tmp_path / "coco", annotations=odd)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bundle = load(spec(f"coco:{base}", augment="plain"))
    words = [str(w.message) for w in caught]
    assert any("1 boxes without area" in w for w in words) and any("1 boxes outside" in w for w in words)
    boxes = {}
    for split in ("train", "test"):
        for train in (True, False):
            rows = bundle.dataset(split, train=train)
            for i in range(len(rows)):
                target = rows[i]["target"]
                boxes[int(bundle.splits[split][i]), train] = target
    assert [80.0, 50.0, 96.0, 64.0] in boxes[1, True]["boxes"].tolist(), "cut at the image's edge"
    assert len(boxes[2, True]["boxes"]) == 2 and boxes[2, False]["crowd"].tolist().count(True) == 1
    assert len(boxes[0, True]["boxes"]) == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"annotations": [{"id": 1, "image_id": 99, "category_id": 1, "bbox": [0, 0, 2, 2]}]}, "image 99"),
        ({"annotations": [{"id": 1, "image_id": 10, "category_id": 7, "bbox": [0, 0, 2, 2]}]}, "category 7"),
        ({"annotations": [{"id": 1, "image_id": 10, "category_id": 1}]}, "no `bbox`"),
        (
            {"annotations": [{"id": 1, "image_id": 10, "category_id": 1, "bbox": [0, 0, float("nan"), 2]}]},
            "not finite",
        ),
        ({"images": [{"id": 1, "file_name": "lost.png", "height": 64, "width": 96}], "annotations": []}, "lost.png"),
    ],
)
def test_annotations_that_cannot_be_get_a_sentence(tmp_path: Path, change: dict, sentence: str):
    base = write_coco(tmp_path / "coco")
    file = base / "train" / "_annotations.coco.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **change}))
    with pytest.raises(UserError, match=sentence):
        load(spec(f"coco:{base}"))


def test_an_image_of_another_size_than_its_annotation_is_refused(tmp_path: Path):
    image, objects = scene(np.random.default_rng(0))
    base = write_voc(tmp_path / "voc", {"train": [(image, objects)] * 2})
    Image.fromarray(image[:32]).save(base / "JPEGImages" / "train1.png")
    with pytest.raises(UserError, match="96 x 32 pixels, but its annotation is for 96 x 64"):
        bundle = load(spec(f"voc:{base}"))
        for split in ("train", "test"):
            bundle.dataset(split, train=False)[0]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"mixup": 0.2}, "data.mixup does nothing"),
        ({"options": {"clases": ["bar"]}}, "did you mean 'classes'"),
        ({"options": {"classes": ["bat"]}}, "did you mean 'bar'"),
        ({"options": {"train": "trian"}}, "did you mean 'train'"),
    ],
)
def test_mistakes_in_a_recipe_get_a_sentence(folder: Path, keys: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        load(spec(f"voc:{folder}", **keys))


def test_tables_of_objects_are_read(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    draw, rows = np.random.default_rng(0), []
    for _ in range(6):
        image, objects = scene(draw)
        boxes = [[b[0], b[1], b[2] - b[0], b[3] - b[1]] for _, b in objects]
        rows.append({"image": Image.fromarray(image), "objects": {"bbox": boxes, "category": [n for n, _ in objects]}})
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "scenes" / "train.parquet"))
    bundle = load(spec(f"hf:{tmp_path / 'scenes'}", image_size=[64, 96], augment="plain"))
    assert bundle.task.classes == CLASSES
    target = first(bundle, "train", True, 1)["target"][0]
    assert sorted((target["boxes"][:, 2:] - target["boxes"][:, :2]).tolist()) == [[16.0, 16.0], [32.0, 8.0]]


# ---- boxes and losses ------------------------------------------------------------------------------------------------


def test_suppression_is_the_greedy_one():
    draw = torch.Generator().manual_seed(0)
    corner, sides = 40 * torch.rand(3, 80, 2, generator=draw), 5 + 15 * torch.rand(3, 80, 2, generator=draw)
    boxes, labels = torch.cat([corner, corner + sides], -1), torch.randint(0, 2, (3, 80), generator=draw)
    scores = torch.linspace(1, 0.1, 80)
    left = unsuppressed(boxes, labels, 0.4)
    for i in range(3):
        assert sorted(batched_nms(boxes[i], scores, labels[i], 0.4).tolist()) == left[i].nonzero().flatten().tolist()


def test_detections_are_padded_with_score_zero():
    boxes, scores, labels = best_detections(torch.rand(2, 3, 4), torch.rand(2, 3, 2), None, number=9)
    assert boxes.shape == (2, 9, 4) and (scores[:, 6:] == 0).all() and (scores[:, :6] > 0).all() and labels.max() <= 1


def targets_of(*boxes: list[list[float]]) -> list[dict[str, Tensor]]:
    made = [torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in boxes]
    return [{"boxes": b, "labels": torch.zeros(len(b), dtype=torch.long)} for b in made]


def test_images_without_boxes_teach_the_background_alone():
    """The losses of boxes and classes are 0 but have a gradient; with another image, they are that image's."""
    levels = [Level(torch.tensor([[8.0, 8.0], [16.0, 16.0]]), 8)]
    grid = torch.randn(2, 2, 4, 4, 7, requires_grad=True)
    empty = grid_losses([grid], targets_of([], []), levels)
    assert empty["box"].item() == empty["class"].item() == 0.0 and empty["objectness"].item() > 0
    sum(empty.values()).backward()
    assert grid.grad is not None and grid.grad.isfinite().all() and grid.grad[..., 4].abs().min() > 0
    full = [[4.0, 4.0, 14.0, 14.0]]
    both = grid_losses([grid], targets_of([], full), levels)
    alone = grid_losses([grid[1:]], targets_of(full), levels)
    assert both["box"].item() == pytest.approx(alone["box"].item()) and both["class"].item() > 0


def test_a_box_is_answered_by_its_own_cell():
    levels = [Level(torch.tensor([[16.0, 16.0]]), 8)]
    grid = torch.zeros(1, 1, 4, 6, 6, requires_grad=True)
    grid_losses([grid], targets_of([[17.0, 9.0, 33.0, 25.0]]), levels, (1.0, 0.0, 0.0))["box"].backward()
    assert grid.grad is not None
    assert grid.grad[0, 0].abs().sum(-1).nonzero().tolist() == [[2, 3]], "its centre (25, 17) is there"


def test_a_layer_graph_refuses_a_shortcut_between_unequal_channels():
    with pytest.raises(UserError, match="adds maps of 4 and 6 channels"):
        LayerGraph([Layer("conv", (-1,), 4), Layer("conv", (0,), 6), Layer("add", (0, 1))])


# ---- networks --------------------------------------------------------------------------------------------------------

NETWORKS = [
    ("stillhouse:one_stage", {"width": 4}),
    ("stillhouse:pyramid_detector", {"width": 8}),
    ("hf:config:rt_detr", RT_DETR),
    ("torchvision:ssdlite320_mobilenet_v3_large", {}),
]


@pytest.mark.parametrize(("name", "options"), NETWORKS, ids=[n for n, _ in NETWORKS])
def test_networks_give_losses_in_training_and_boxes_in_evaluation(name: str, options: dict):
    torch.manual_seed(0)
    model = TASK.build(ModelSpec(model=name, options=options))
    target = {"boxes": torch.tensor([[10.0, 10.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    batch = {"input": torch.randn(2, 3, 64, 96), "target": [target, nothing]}
    module = Distillation(model, None, ["own"], task=TASK).build(batch).train()
    for targets in ([target, nothing], [nothing, nothing]):
        terms = module({**batch, "target": targets}, Progress())
        terms["loss"].backward()
        assert terms["loss"].isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        signals = TASK.read(TASK.call(model, batch), batch)
    number = signals.parts["scores"].shape[1]
    assert signals.parts["boxes"].shape == (2, number, 4) and signals.parts["labels"].shape == (2, number)
    assert not signals.losses and (signals.parts["labels"] < 2).all()
    low, high = signals.parts["boxes"][..., :2], signals.parts["boxes"][..., 2:]
    assert (low >= 0).all() and (high <= torch.tensor([96.0, 64.0])).all()


def test_a_classifier_is_refused():
    student = TASK.build(ModelSpec(model="timm:test_resnet"))
    batch = {"input": torch.randn(2, 3, 64, 96), "target": targets_of([], [])}
    with pytest.raises(UserError, match="is no detector"):
        Distillation(student, None, ["own"], task=TASK).build(batch).train()(batch, Progress())


def test_more_queries_than_places_are_refused():
    with pytest.raises(UserError, match=r"options\.num_queries to at most 126"):
        TASK.build(ModelSpec(model="hf:config:rt_detr", options={**RT_DETR, "num_queries": 300}))


def test_an_objective_of_logits_is_refused_in_a_sentence():
    student, teacher = (TASK.build(ModelSpec(model="stillhouse:one_stage", options={"width": 4})) for _ in range(2))
    batch = {"input": torch.randn(2, 3, 64, 96), "target": targets_of([], [])}
    with pytest.raises(UserError, match="reads logits, but the student gives none, only boxes, scores, labels"):
        Distillation(student, teacher, ["own", "kd"], task=TASK).build(batch)


class Fixed(nn.Module):
    """A detector of a user's own, as a list of mappings: one box for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor, targets: object = None) -> object:
        if targets is not None:
            return {"loss": self.weight.sum() ** 2}
        one = {"boxes": torch.tensor([[0.0, 0.0, 9.0, 9.0]]), "scores": torch.ones(1), "labels": torch.ones(1).long()}
        return [one if i % 2 else {k: v[:0] for k, v in one.items()} for i in range(len(images))]


def test_a_detector_of_ones_own_is_called_as_ours_are():
    found = TASK.read(TASK.call(Fixed().eval(), {"input": torch.zeros(2, 3, 64, 96)}), {})
    assert found.parts["boxes"].shape == (2, 1, 4) and found.parts["scores"].tolist() == [[0.0], [1.0]]
    with pytest.raises(UserError, match="returns a mapping with boxes"):
        TASK.call(nn.Conv2d(3, 1, 1), {"input": torch.zeros(1, 3, 8, 8)}).parts()


# ---- figures ---------------------------------------------------------------------------------------------------------


def judged(found: list[list[float]], true: list[list[float]], crowd: list[bool] | None = None) -> dict[str, float]:
    """One image: found rows are (score, label, box), true ones (label, box)."""
    meter = DetectionMeter(CLASSES, GROUPS, (64, 96))
    rows, truth = torch.tensor(found).reshape(1, -1, 6), torch.tensor(true).reshape(-1, 5)
    target = {"boxes": truth[:, 1:], "labels": truth[:, 0].long(), "size": torch.tensor([64, 96])}
    target["crowd"] = torch.tensor(crowd or [False] * len(truth))
    parts = {"scores": rows[..., 0], "labels": rows[..., 1].long(), "boxes": rows[..., 2:]}
    meter.add({"target": [target]}, Signals(parts=parts))
    return meter.figures()


def test_average_precision_is_cocos():
    box, other = [10.0, 10.0, 30.0, 30.0], [50.0, 30.0, 70.0, 50.0]
    exact = judged([[0.9, 0, *box]], [[0, *box]])
    assert [exact[k] for k in ("ap", "ap50", "ap_small", "ap_class_bar")] == pytest.approx([1.0] * 4)
    assert "ap_class_square" not in exact and "ap_large" not in exact
    half = judged([[0.9, 0, *other], [0.8, 0, *box]], [[0, *box]])
    assert half["ap"] == pytest.approx(0.5, abs=1e-6), "a false box before the right one"
    shifted = judged([[0.9, 0, 10.0, 10.0, 30.0, 25.0]], [[0, *box]])  # IoU 0.75: right at 6 of 10 thresholds
    assert [shifted[k] for k in ("ap50", "ap75", "ap")] == pytest.approx([1.0, 1.0, 0.6])
    wrong = judged([[0.9, 1, *box]], [[0, *box], [1, *other]])
    assert wrong["ap"] == 0.0


def test_a_crowd_is_neither_right_nor_wrong():
    box, crowd = [10.0, 10.0, 30.0, 30.0], [40.0, 0.0, 96.0, 64.0]
    inside = [0.95, 0, 50.0, 10.0, 60.0, 20.0]
    assert judged([inside, [0.9, 0, *box]], [[0, *box], [0, *crowd]], [False, True])["ap"] == pytest.approx(1.0)
    with pytest.raises(UserError, match="no box to judge by"):
        judged([[0.9, 0, *box]], [[0, *crowd]], [True])


def test_sizes_are_those_of_the_image_as_it_was():
    meter = DetectionMeter(CLASSES, ["sizes"], (64, 96))
    box = torch.tensor([[10.0, 10.0, 30.0, 30.0]])
    target = {"boxes": box, "labels": torch.tensor([0]), "size": torch.tensor([640, 960])}
    parts = {"scores": torch.ones(1, 1), "labels": torch.zeros(1, 1).long(), "boxes": box[None]}
    meter.add({"target": [target]}, Signals(parts=parts))
    assert meter.figures() == pytest.approx({"ap_large": 1.0}), "200 x 200 pixels of the image"


# ---- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train = {"batch_size": 4, "optimizer": {"name": "adamw", "lr": 3e-3}}
    config = recipe.validate(
        {
            "data": {"name": f"voc:{folder}"},
            "teacher": {
                "model": "stillhouse:one_stage",
                "options": {"width": 8},
                "train": {**train, "epochs": 2},
            },
            "student": {"model": "stillhouse:one_stage", "options": {"width": 8}},
            "objectives": [
                "own",
                {"name": "fitnet", "student_layer": "stage:2", "teacher_layer": "stage:2", "weight": 1},
            ],
            "train": {**train, "epochs": 20},
        }
    )
    execute(config, out, cpu=True)
    return out


def test_a_recipe_distils_a_detector_and_shows_it(run: Path):
    figures = json.loads((run / "evaluation.json").read_text())
    assert {"ap", "ap50", "ap_class_bar", "multiply_adds", "file_bytes"} <= set(figures)
    assert figures["ap50"] > 0.2, "two shapes of two colours are learned in forty steps"
    shown = json.loads((run / "pictures" / "pictures.json").read_text())
    assert shown["compared"] and "truth" in shown["samples"][0]["shown"]


def test_the_product_loads_and_predicts(run: Path, folder: Path, tmp_path: Path):
    product = load_product(run)
    assert product.classes == list(CLASSES)
    (line,) = predict(run, [str(folder / "JPEGImages" / "test0.png")], tmp_path)
    assert line.startswith("test0.png: ") and "[" not in line
    found = json.loads((tmp_path / "predictions.jsonl").read_text())
    assert set(found["counts"]) <= {*CLASSES, "nothing"} and (tmp_path / "test0.png").exists()
    for thing in found["objects"]:
        x1, y1, x2, y2 = thing["box"]
        assert 0 <= x1 <= x2 <= 96 and 0 <= y1 <= y2 <= 64 and thing["score"] >= 0.3


@pytest.mark.parametrize("name", ["stillhouse:one_stage", "stillhouse:pyramid_detector"])
def test_a_teacher_that_is_read_inside_alone_looks_for_no_boxes(name: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    student, teacher = (TASK.build(ModelSpec(model=name, options={"width": 8})) for _ in range(2))
    target = {"boxes": torch.tensor([[10.0, 10.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
    batch = {"input": torch.randn(2, 3, 64, 96), "target": [target, target]}
    hint = FitNet("stage:-1", "stage:-1")
    module = Distillation(student, teacher.eval(), ["own", hint], task=TASK).build(batch).train()
    taken: list[int] = []
    monkeypatch.setattr(teacher, "detections", lambda *a: taken.append(1))
    module(batch, Progress())["loss"].backward()
    assert not taken and hint.regressor.weight.grad.abs().sum() > 0
    module.close()
    monkeypatch.undo()
    assert "boxes" in TASK.read(TASK.call(teacher, batch), batch).parts

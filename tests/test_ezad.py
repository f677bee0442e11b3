"""EZAD: only layer norms learn, of known names; what the CLIP calls a known class or lies on a known box is no region;
rows weigh as much in every image; five stages are stored; a run leaves a detector that loads."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import DataSpec
from stillhouse.errors import UserError
from stillhouse.methods.dense.ezad.method import AdaptTraining, Config, FeatureTraining, Finder, Search, tune_norms
from stillhouse.methods.dense.ezad.regions import certainty, feature_loss, grid, row_weights, square_crop
from stillhouse.models.clip import Clip
from stillhouse.models.text_rcnn import TextRCNN
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.training.context import Progress

ROOT = Path(__file__).parents[1]
SHAPE = {"width": 8, "layers": 1, "heads": 2}


def clip() -> Clip:
    torch.manual_seed(0)
    return Clip({**SHAPE, "patch": 8}, SHAPE, dim=8, vocabulary=20, context=6, input_shape=(3, 16, 16))


# ---- crops and certainty ---------------------------------------------------------------------------------------------


def test_a_crop_is_square_and_padded_with_zeros():
    image = torch.full((3, 40, 50), 9, dtype=torch.uint8)
    patch = square_crop(image, torch.tensor([10.0, 10.0, 34.0, 20.0]), 1.2)
    assert patch.shape[1] == patch.shape[2] >= 29
    assert patch.any(0).any(1).float().mean() < 0.6, "above and below is nothing"
    edge = square_crop(image, torch.tensor([48.0, 38.0, 50.0, 40.0]), 1.2)
    assert edge.shape[1] == edge.shape[2] and edge.any()


def test_certainty_is_nothing_where_all_are_equal_and_finite_where_one_is_sure():
    found = certainty(torch.tensor([[1.0, 1.0, 1.0], [500.0, 0.0, 0.0]]))
    assert float(found[0]) == pytest.approx(0, abs=1e-6)
    assert float(found[1]) == pytest.approx(math.log(3), abs=1e-3)


def test_anchors_lie_inside():
    boxes = grid(50, 40, 16, [16.0, 32.0], [0.5, 1.0])
    assert len(boxes) and bool((boxes >= 0).all())
    assert float(boxes[:, 2].max()) <= 50 and float(boxes[:, 3].max()) <= 40


# ---- the loss of features --------------------------------------------------------------------------------------------


def test_rows_of_an_image_weigh_one_on_average():
    weights, there = (
        torch.tensor([[1.0, 0.2, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0]]),
        torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]]),
    )
    found = row_weights(weights, there)
    assert float(found[0].sum()) == pytest.approx(3)
    assert not found[1].any(), "weights of nothing give nothing, and no NaN"


def test_rows_of_zeros_and_padding_count_for_nothing():
    torch.manual_seed(0)
    raw, features = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    features[1] = 0
    there = torch.tensor([1.0, 1.0, 0.0, 1.0])
    loss = feature_loss(raw, features, None, there)
    torch.testing.assert_close(loss, feature_loss(raw[[0, 3]], features[[0, 3]], None, torch.ones(2)))
    loss.backward()
    assert raw.grad is not None and bool(raw.grad.isfinite().all()) and not raw.grad[1:3].any()
    assert float(feature_loss(raw, features, None, 0 * there).detach()) == 0


def test_a_batch_without_rows_trains_the_detector_alone():
    small = {"backbone": "test_resnet", "strides": [8, 16], "width": 16, "units": 16, "usual": 32, "pool": 3}
    net = TextRCNN(3, (3, 48, 48), dim=8, known=[0, 1], conditioned=True, **small)  # type: ignore[arg-type]
    module = FeatureTraining(net, 1.0)
    target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]), "labels": torch.tensor([1])}

    def rows(n: int) -> dict[str, Tensor]:
        boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0]]).repeat(n, 1)
        return {"boxes": boxes, "vectors": F.normalize(torch.ones(n, 8), dim=-1).half(), "weights": torch.ones(n)}

    images = torch.randn(2, 3, 48, 48)
    for first, second in ((0, 0), (0, 2)):
        terms = module({"input": images, "target": [target] * 2, "regions": [rows(first), rows(second)]}, Progress())
        terms["loss"].backward()
        assert bool(terms["loss"].isfinite()) and (float(terms["features"].detach()) > 0) == bool(second)


# ---- adapting --------------------------------------------------------------------------------------------------------


def test_only_layer_norms_learn():
    net = clip()
    tokens = {"input_ids": torch.tensor([[1, 5, 2], [1, 6, 2]]), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    before = copy.deepcopy(net.state_dict())
    module = AdaptTraining(net, tokens, torch.tensor([0, 0, 1]), "sigmoid").train()
    assert not net.training, "as in evaluation"
    optimizer = torch.optim.SGD(module.param_groups(), 1.0)
    batch = {"input": torch.randn(4, 3, 16, 16), "label": torch.tensor([0, 2, 2, 0])}
    module(batch, Progress())["loss"].backward()
    optimizer.step()
    norms = {n for n, m in net.named_modules() if isinstance(m, nn.LayerNorm)}
    changed = {k.rpartition(".")[0] for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and changed <= norms
    assert {n.partition(".")[0] for n in changed} == {"image", "text"}, "both halves"
    with pytest.raises(UserError, match="no layer norm"):
        tune_norms(nn.Linear(2, 2))


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_images_without_boxes_adapt_nothing(loss: str):
    tokens = {"input_ids": torch.tensor([[1, 5, 2]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    module = AdaptTraining(clip(), tokens, torch.tensor([0]), loss)
    value = module({"input": torch.zeros(1, 3, 16, 16), "label": torch.tensor([-100])}, Progress())["loss"]
    value.backward()
    assert float(value.detach()) == 0


# ---- finding ---------------------------------------------------------------------------------------------------------


class Named(Finder):
    """A finder that calls a crop by its left edge: class 1, which is new, on the right half, else class 0."""

    def __init__(self, **options: object) -> None:
        self.config = Config.model_construct(search=Search(), **options)
        self.known, self.enlarge, self.scale = [0], 1.2, 1.0

    def look(self, image: Tensor, boxes: Tensor, enlarge: float) -> tuple[Tensor, Tensor]:
        right = (boxes[:, 0] >= 50).float()
        return torch.stack([1 - right, right], 1), 5 * torch.stack([1 - right, right], 1)


def test_regions_on_known_boxes_or_called_known_are_left_out():
    from stillhouse.methods.dense.ezad.method import Features

    finder = Named(features=Features(most=2))
    base = torch.tensor([[60.0, 60.0, 80.0, 80.0]])
    boxes = torch.tensor(
        [
            [61.0, 61.0, 80.0, 80.0],
            [10.0, 10.0, 20.0, 20.0],
            [50.0, 0.0, 60.0, 9.0],
            [70.0, 0.0, 80.0, 9.0],
            [90.0, 0.0, 99.0, 9],
        ]
    )
    found = finder.features(torch.zeros(3, 100, 100), base, boxes)
    torch.testing.assert_close(found["boxes"], torch.cat([base, boxes[2:4]]))
    assert float(found["weights"][0]) == 1 and bool((found["weights"][1:] < 1).all())
    nothing = finder.features(torch.zeros(3, 100, 100), torch.zeros(0, 4), torch.zeros(0, 4))
    assert nothing["vectors"].shape == (0, 2) and nothing["boxes"].shape == (0, 4)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_stores_five_stages_and_leaves_a_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from stillhouse.data.source import find_root

    if not (find_root(DataSpec(name="camvid")) / "camvid").is_dir():
        pytest.skip("CamVid is not there")
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    config = recipe.load(ROOT / "recipes/dense/ezad.yaml", "smoke", {})
    figures = execute(config, tmp_path / "run", cpu=True)
    assert "ap50_new" in figures and 0 <= figures["recall_new"] <= 1
    stages = {p.name.partition("-")[0] for p in (tmp_path / "cache/stages").iterdir() if p.is_dir()}
    assert stages == {"teacher", "adapt", "search", "features"}, "the fifth is the run itself"
    product = load_product(tmp_path / "run")
    assert product.module.first.conditioned
    assert set(product.predict([torch.zeros(3, 64, 64, dtype=torch.uint8)])[0]) >= {"counts", "objects"}

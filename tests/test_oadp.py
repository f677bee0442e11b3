"""OADP: an object token sees its object alone and nothing sees it; crops stay inside where they can; levels are weighed
and warmed up; classes that are not known are in no target; a run leaves a detector that loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.methods.dense.oadp.losses import asymmetric_loss, embedding_loss, present, relation_loss
from stillhouse.methods.dense.oadp.method import Gains, PyramidTraining
from stillhouse.methods.dense.oadp.oake import ObjectReader, block_boxes, dense_patches, object_token, outside, windows
from stillhouse.models.clip import Clip
from stillhouse.models.text_rcnn import TextRCNN
from stillhouse.runs.products import load_product
from stillhouse.training.context import Progress

ROOT = Path(__file__).parents[1]
SHAPE = {"width": 16, "layers": 2, "heads": 2}


@pytest.fixture(scope="module")
def clip() -> Clip:
    torch.manual_seed(0)
    net = Clip({**SHAPE, "patch": 8}, SHAPE, dim=8, vocabulary=20, context=8, input_shape=(3, 32, 32)).eval()
    return net


# ---- reading ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_object_token_sees_its_object_alone(clip: Clip):
    layers = list(clip.image.encoder.layers)
    tokens, mask = torch.randn(1, 17, 16), torch.ones(1, 16)
    mask[0, 5] = 0
    own, others = object_token(layers[:1], tokens, mask)
    for place, changes in ((6, True), (3, False)):  # token 6 is patch 5
        other = tokens.clone()
        other[0, place] = torch.randn(16)
        assert bool((object_token(layers[:1], other, mask)[0] - own).abs().max() > 1e-4) == changes
    torch.testing.assert_close(others, layers[0](tokens), msg="the others do not see it")


@torch.no_grad()
def test_an_object_token_that_sees_everything_is_close_to_the_class_token(clip: Clip):
    """Without a mask and with the patches that it has, it differs from the class token only in what that attends to
    besides: itself, which both have. So of one layer both are the same."""
    tokens = torch.randn(2, 17, 16)
    own, others = object_token(list(clip.image.encoder.layers)[:1], tokens, torch.zeros(2, 16))
    torch.testing.assert_close(own, others[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("dense", [False, True])
def test_a_reader_gives_unit_vectors_of_objects(clip: Clip, dense: bool):
    reader = ObjectReader(clip, dense)
    assert reader.grid == (8 if dense else 4)
    images = torch.randn(3, 3, 32, 32)
    mask = torch.ones(3, 1, reader.grid, reader.grid)
    mask[..., 1:3, 1:3] = 0
    found = reader(images, mask)
    assert found.shape == (3, 8)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
    assert reader.positions().shape == (1 + reader.grid**2, 16)


@pytest.mark.parametrize(("side", "grid"), [(8, 4), (4, 8), (32, 1)])
def test_denser_patches_are_twice_as_many(side: int, grid: int):
    layer = torch.nn.Conv2d(3, 4, side, side)
    found = dense_patches(layer, torch.randn(1, 3, 32, 32))
    assert min(found.shape[-2:]) >= 2 * grid


def test_windows_lie_inside_where_they_can():
    boxes = torch.tensor([[0.0, 0.0, 8.0, 4.0], [90.0, 40.0, 100.0, 50.0], [10.0, 0.0, 90.0, 50.0]])
    found = windows(boxes, (100, 50))
    sides = found[:, 2:] - found[:, :2]
    torch.testing.assert_close(sides.prod(1), 8 * (boxes[:, 2:] - boxes[:, :2]).prod(1))
    assert bool((found[:2] >= -1e-4).all()) and bool((found[:2, 2:] <= torch.tensor([100.0, 50.0]) + 1e-4).all())
    middle = (found[2, :2] + found[2, 2:]) / 2
    torch.testing.assert_close(middle, torch.tensor([50.0, 25.0]), msg="larger than the image: it stays centred")


def test_a_tiny_object_has_a_patch():
    boxes = torch.tensor([[10.2, 10.2, 10.4, 10.4], [20.0, 20.0, 40.0, 40.0]])
    mask = outside(boxes, torch.tensor([[0.0, 0.0, 64.0, 64.0]] * 2), 4)
    assert mask.shape == (2, 1, 4, 4)
    assert mask[0].sum() == 15 and mask[0, 0, 0, 0] == 0
    assert 0 < mask[1].sum() < 16


def test_blocks_of_a_small_image_are_none():
    assert len(block_boxes(200, 300)) == 0
    boxes = block_boxes(500, 300)
    assert bool((boxes >= 0).all()) and float(boxes[:, 2].max()) <= 500 and float(boxes[:, 3].max()) <= 300


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_what_does_not_count_is_nothing():
    torch.manual_seed(0)
    e, c = (F.normalize(torch.randn(5, 4), dim=-1) for _ in range(2))
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
    kept = weights > 0
    torch.testing.assert_close(embedding_loss(e, c, weights), embedding_loss(e[kept], c[kept]))
    torch.testing.assert_close(relation_loss(e, c, weights), relation_loss(e[kept], c[kept]))
    y = torch.rand(5, 3) > 0.5
    z = torch.randn(5, 3)
    torch.testing.assert_close(asymmetric_loss(z, y, weights=weights), asymmetric_loss(z[kept], y[kept]))
    nothing = torch.zeros(0, 4, requires_grad=True)
    for loss in (embedding_loss(nothing, nothing), relation_loss(nothing, nothing), embedding_loss(e, c, 0 * weights)):
        assert float(loss.detach()) == 0


def test_a_class_that_is_not_known_has_no_gradient_and_no_nan():
    scores = torch.randn(4, 3, requires_grad=True)
    masked = scores.masked_fill(torch.tensor([False, False, True]), -torch.inf)
    loss = asymmetric_loss(masked, torch.tensor([[True, False, False]] * 4))
    loss.backward()
    assert bool(loss.isfinite()) and bool(scores.grad.isfinite().all()) and not scores.grad[:, 2].any()
    alone = asymmetric_loss(scores[:, :2], torch.tensor([[True, False]] * 4))
    torch.testing.assert_close(loss * 3, alone * 2, msg="it counts in the mean")


def test_a_class_is_present_where_its_box_meets():
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [10.0, 0.0, 20.0, 10.0]]])
    truth = torch.tensor([[[5.0, 5.0, 9.0, 9.0], [8.0, 0.0, 12.0, 4.0], [0.0, 0.0, 1.0, 1.0]]])
    real = torch.tensor([[True, True, False]])
    found = present(boxes, truth, torch.tensor([[0, 1, 2]]), real, 3)
    assert found[0].tolist() == [[True, True, False], [False, True, False]]


def test_weights_grow_to_their_gain():
    gains = Gains(warmup=4, block_labels_warmup=10)
    assert [gains.at("object", s) for s in (0, 1, 3, 9)] == [64, 128, 256, 256]
    assert gains.at("block_labels", 0) == pytest.approx(1.6) and gains.at("block_labels", 99) == 16
    frozen = Gains(frozen_label_warmup=True)
    assert frozen.at("block_labels", 500) == pytest.approx(0.016) and frozen.at("whole_labels", 9) == 0.002
    assert Gains(warmup=0).at("object", 0) == 256


# ---- training --------------------------------------------------------------------------------------------------------


def batch(dim: int = 8) -> dict[str, object]:
    torch.manual_seed(0)
    target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}

    def regions(blocks: int) -> dict[str, Tensor]:
        count = 1 + 2 + blocks
        boxes = torch.tensor([[0.0, 0.0, 40.0, 40.0]]).repeat(count, 1)
        return {
            "boxes": boxes,
            "vectors": F.normalize(torch.randn(count, dim), dim=-1).half(),
            "counts": torch.tensor([1, 1, 0, *[1] * blocks], dtype=torch.uint8),
        }

    images = torch.randn(2, 3, 48, 48)
    return {"input": images, "target": [target, empty], "regions": [regions(1), regions(3)]}


def detector() -> TextRCNN:
    torch.manual_seed(0)
    small = {"backbone": "test_resnet", "strides": [8, 16], "width": 16, "units": 16, "usual": 32, "pool": 3}
    net = TextRCNN(3, (3, 48, 48), dim=8, known=[0, 1], second=True, head_norm=False, **small)  # type: ignore[arg-type]
    net.set_text(F.normalize(torch.randn(3, 8), dim=-1))
    return net


def test_every_level_teaches_and_padding_does_not():
    module = PyramidTraining(detector(), Gains(warmup=0), 2)
    given = batch()
    torch.manual_seed(1)
    terms = module(given, Progress())
    assert {"object", "block", "relation", "whole", "block_labels", "whole_labels"} <= set(terms)
    terms["loss"].backward()
    learned = {n.partition(".")[0] for n, p in module.named_parameters() if p.grad is not None}
    assert learned == {"student", "block", "whole"}
    assert all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)
    given["regions"][0]["vectors"][2] = 7.0  # an object that is none
    torch.manual_seed(1)
    again = module(given, Progress())
    torch.testing.assert_close(again["object"], terms["object"])


def test_a_level_without_weight_has_no_head():
    module = PyramidTraining(detector(), Gains(block=0, relation=0, block_labels=0, whole=0, whole_labels=0), 2)
    assert module.block is None and module.whole is None
    assert "block" not in module(batch(), Progress())


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def smoke(tmp_path: Path, **changes: object) -> tuple[dict[str, float], Path]:
    pytest.importorskip("sklearn")
    if not (data_folder() / "camvid").is_dir():
        pytest.skip("CamVid is not there")
    from stillhouse.runs import recipe
    from stillhouse.runs.execution import execute

    config = recipe.load(ROOT / "recipes/dense/oadp.yaml", "smoke", dict(changes))
    return execute(config, tmp_path / "run", cpu=True), tmp_path / "run"


def data_folder() -> Path:
    from stillhouse.data.source import find_root

    return find_root(None)


def test_a_run_leaves_a_detector_without_the_dropped_heads(tmp_path: Path, cache: None):
    figures, folder = smoke(tmp_path)
    assert 0 <= figures["accuracy_regions_new"] <= 1 and "ap50_new" in figures
    product = load_product(folder)
    names = {n.partition(".")[0] for n, _ in product.module.named_parameters()}
    assert "second" in names and not {"block", "whole"} & names
    torch.testing.assert_close(product.module.text.norm(dim=-1), torch.ones(10))
    found = product.predict([torch.zeros(3, 64, 64, dtype=torch.uint8)])
    assert set(found[0]) >= {"counts", "objects", "picture"}


def test_images_that_are_cropped_are_refused(tmp_path: Path, cache: None):
    with pytest.raises(UserError, match="whole images"):
        smoke(tmp_path, **{"data.augment": "standard"})

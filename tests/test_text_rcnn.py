"""The two-stage detector of class vectors: its parts, batches without boxes, choices of fixed shape, classes that are
replaced, saving and loading; the CLIP with a stem; regions on disk."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.functional.crops import cut
from stillhouse.functional.regions import anchors, blended, chosen, decoded, encoded, matched, padded_truth
from stillhouse.models.hybrid_clip import HybridClip, StemPatches
from stillhouse.models.text_rcnn import TextRCNN, best_proposals
from stillhouse.runs.products import Student, load_product
from stillhouse.store.regions import RegionStore, write_regions
from stillhouse.tasks.detection import Detection

SMALL = {"backbone": "test_resnet", "strides": [8, 16], "width": 16, "units": 16, "dim": 8, "usual": 32, "pool": 3}
TASK = Detection(("a", "b", "c"), (64, 64), (0.5,) * 3, (0.5,) * 3, new=(2,))


def detector(**options: object) -> TextRCNN:
    torch.manual_seed(0)
    net = TextRCNN(3, (3, 64, 64), known=[0, 1], **{**SMALL, **options})  # type: ignore[arg-type]
    net.set_text(F.normalize(torch.randn(3, 8), dim=-1))
    return net


def target(*boxes: list[float], labels: list[int] | None = None) -> dict[str, Tensor]:
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": corners, "labels": torch.tensor(labels if labels is not None else [0] * len(boxes)).long()}


FULL = target([4, 4, 40, 40], [20, 30, 60, 62], labels=[0, 1])


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


# ---- the detector ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"conditioned": True}, {"second": True}, {"quality": True, "scale": 20.0}])
def test_every_part_learns(options: dict, images: Tensor):
    net = detector(**options)
    losses = net(images, [FULL, FULL])
    assert set(losses) == {"rpn_score", "rpn_box", "class", "box"}
    extra = net.embed(net.pyramid(images), torch.stack([FULL["boxes"]] * 2), second=True).sum() if net.second else 0
    (sum(losses.values()) + extra).backward()
    without = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert all(n.startswith("backbone") for n in without), without
    with torch.no_grad():
        found = net.eval()(images)
    assert found["boxes"].shape == (2, 100, 4) and bool(((found["scores"] >= 0) & (found["scores"] <= 1)).all())


def test_images_without_boxes_teach_background_alone(images: Tensor):
    net = detector()
    losses = net(images, [target(), target()])
    terms = {k: float(v.detach()) for k, v in losses.items()}
    assert terms["box"] == 0 and terms["rpn_box"] == 0 and terms["class"] > 0
    sum(losses.values()).backward()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


def test_an_image_without_boxes_leaves_the_losses_of_boxes_as_they_are(images: Tensor):
    net = detector(head_norm=False, positive_share=0.5, sampled=(400, 200), proposals=[[40, 20], [40, 20]])
    mixed, alone = net(images, [target(), FULL]), net(images[1:], [FULL])
    for name in ("rpn_box", "box"):
        torch.testing.assert_close(mixed[name], alone[name])


def test_an_unknown_class_is_in_no_target(images: Tensor):
    """What the class term says does not depend on the vector of a class that training does not know."""
    net = detector(head_norm=False)
    torch.manual_seed(3)
    before = net(images, [FULL, FULL])["class"]
    vectors = net.text.clone()
    vectors[2] = -vectors[2]
    net.set_text(vectors)
    torch.manual_seed(3)
    torch.testing.assert_close(net(images, [FULL, FULL])["class"], before)


def test_regions_come_from_the_level_of_their_size(images: Tensor):
    net = detector().eval()
    maps = net.pyramid(images[:1])
    boxes = torch.tensor([[[0.0, 0.0, 12.0, 12.0], [0.0, 0.0, 60.0, 60.0]]])
    pooled = net.pooled(maps, boxes)
    for i, (level, stride) in enumerate(((0, 8), (1, 16))):
        rows = torch.cat([torch.zeros(1, 1), boxes[0, i : i + 1]], 1)
        torch.testing.assert_close(pooled[i : i + 1], roi_align(maps[level], rows, 3, 1 / stride, 2, aligned=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"known": [0, 3]}, "options.known"),
        ({"strides": [8, 12]}, "options.strides"),
        ({"frozen": ["nothing"]}, "options.frozen"),
        ({"fcs": 0}, "options.fcs"),
    ],
)
def test_wrong_options_are_sentences(options: dict, words: str):
    with pytest.raises(UserError, match=words):
        TextRCNN(3, (3, 64, 64), **{**SMALL, **options})  # type: ignore[arg-type]


def test_class_vectors_must_fit():
    net = detector()
    with pytest.raises(UserError, match=r"options\.dim"):
        net.set_text(torch.zeros(3, 4))
    with pytest.raises(UserError, match="unit length"):
        net.set_text(torch.full((3, 8), 2.0))


def test_frozen_norms_stay_as_they_are(images: Tensor):
    net = detector()
    before = copy.deepcopy(net.backbone.state_dict())
    net.train()(images, [FULL, FULL])
    assert all(torch.equal(v, before[k]) for k, v in net.backbone.state_dict().items())


def test_a_saved_detector_finds_the_same(tmp_path: Path, images: Tensor):
    net = detector(second=True, conditioned=True).eval()
    spec = ModelSpec(
        model="stillhouse:text_rcnn", options={**SMALL, "known": [0, 1], "second": True, "conditioned": True}
    )
    Student(net, spec, TASK).save(tmp_path)
    loaded = load_product(tmp_path)
    assert loaded.task.new == (2,)
    with torch.no_grad():
        for name, value in net(images).items():
            assert torch.equal(loaded.module(images)[name], value)


def test_best_proposals_are_in_pixels_of_the_image(images: Tensor):
    net = detector().eval()
    small = best_proposals(net, images, [(64, 64)] * 2, 5, 0.5)
    large = best_proposals(net, images, [(128, 64)] * 2, 5, 0.5)
    assert len(small[0]) == 5
    torch.testing.assert_close(small[0] * torch.tensor([1.0, 2.0, 1.0, 2.0]), large[0])


# ---- choices ---------------------------------------------------------------------------------------------------------


def test_boxes_are_decoded_as_they_were_encoded():
    boxes = torch.tensor([[1.0, 2.0, 9.0, 5.0], [0.0, 0.0, 30.0, 40.0]])
    given = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 20.0, 30.0]])
    for scale in ((1.0,) * 4, (10.0, 10.0, 5.0, 5.0)):
        torch.testing.assert_close(decoded(encoded(boxes, given, scale), given, scale), boxes)


def test_anchors_have_their_area_and_ratio():
    found = anchors((2, 3), 8, [16.0], [0.5, 2.0])
    sides = found[:, 2:] - found[:, :2]
    assert len(found) == 12
    torch.testing.assert_close(sides.prod(1), torch.full((12,), 256.0))
    torch.testing.assert_close((sides[:, 1] / sides[:, 0])[:2], torch.tensor([0.5, 2.0]))
    torch.testing.assert_close((found[2, :2] + found[2, 2:]) / 2, torch.tensor([12.0, 4.0]), msg="columns go first")


def test_a_choice_has_as_many_places_whatever_there_is():
    torch.manual_seed(0)
    truth = padded_truth([target([0, 0, 10, 10]), target()], torch.device("cpu"))
    boxes = torch.tensor(
        [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 9.0, 10.0], [30.0, 30.0, 40.0, 40.0], [50.0, 0.0, 60.0, 9.0]]
    )
    match = matched(boxes, truth, 0.3, 0.7)
    assert match.positive.tolist() == [[True, True, False, False], [False] * 4]
    choice = chosen(match, 3, 0.34)
    assert choice.places.shape == (2, 3)
    assert choice.positive.sum(1).tolist() == [1, 0] and choice.counted.all()
    assert not (choice.positive & ~match.positive.gather(1, choice.places)).any()


def test_blended_scores_are_the_geometric_mean_that_suits_the_class():
    box, other = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 3.0]])
    p, q = box.softmax(-1), other.softmax(-1)
    scores = blended(box, other, torch.tensor([True, False]))
    torch.testing.assert_close(scores[0, 0], p[0, 0] ** (2 / 3) * q[0, 0] ** (1 / 3))
    torch.testing.assert_close(scores[0, 1], p[0, 1] ** (1 / 3) * q[0, 1] ** (2 / 3))
    torch.testing.assert_close(scores.sum(), torch.tensor(1.0))


def test_a_window_beyond_the_image_is_black_there():
    image = torch.ones(3, 4, 4, dtype=torch.uint8)
    part = cut(image, (-1, 2, 3, 6))
    assert part.shape == (3, 4, 4)
    assert part[0, :2, 1:].all() and not part[0, 2:].any() and not part[0, :, 0].any()
    assert not cut(image, (10, 10, 12, 12)).any()


# ---- the CLIP with a stem --------------------------------------------------------------------------------------------


def stem(frozen: bool = True) -> StemPatches:
    torch.manual_seed(0)
    usual = ((0.5,) * 3, (0.5,) * 3)
    return StemPatches("test_resnet", None, 8, 12, usual, usual, 3, frozen)


def test_dense_patches_are_those_of_moved_images():
    patches = stem().eval()
    x = torch.randn(1, 3, 32, 32)
    dense = patches.dense(x)
    assert dense.shape == (1, 12, 8, 8)
    moved = F.pad(x, (2, 4, 2, 4), mode="replicate")
    torch.testing.assert_close(dense[..., ::2, ::2], patches(moved[..., :32, :32]))
    torch.testing.assert_close(dense[..., 1::2, ::2], patches(moved[..., 4:36, :32]))
    torch.testing.assert_close(dense[..., ::2, 1::2], patches(moved[..., :32, 4:36]))


def test_a_frozen_stem_stays_as_it_is():
    for frozen in (True, False):
        patches = stem(frozen).train()
        before = {k: v.clone() for k, v in patches.network.state_dict().items()}
        patches(torch.randn(2, 3, 32, 32)).sum().backward()
        same = all(torch.equal(v, before[k]) for k, v in patches.network.state_dict().items())
        learns = any(p.grad is not None for p in patches.network.parameters())
        assert (same, learns) == (frozen, not frozen)


def test_a_clip_with_a_stem_needs_one_that_fits():
    shape = {"width": 8, "layers": 1, "heads": 2}
    with pytest.raises(UserError, match="stem needs model"):
        HybridClip(shape, shape)
    with pytest.raises(UserError, match="at strides"):
        HybridClip({**shape, "stem": {"model": "timm:test_resnet", "stride": 12}}, shape)


# ---- regions on disk -------------------------------------------------------------------------------------------------


def test_regions_are_read_as_they_were_written_and_resume(tmp_path: Path):
    wanted = [{"boxes": torch.rand(n, 4), "vectors": torch.rand(n, 2).half()} for n in (3, 0, 1, 5, 2)]
    calls: list[range] = []

    def make(images: range) -> list[dict[str, Tensor]]:
        calls.append(images)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [wanted[i] for i in images]

    with pytest.raises(KeyboardInterrupt):
        write_regions(tmp_path, 5, make, images=2)
    with pytest.raises(UserError, match="interrupted"):
        RegionStore(tmp_path)
    write_regions(tmp_path, 5, make, images=2)
    assert [c.start for c in calls] == [0, 2, 2, 4], "what was written is not made again"
    store = RegionStore(tmp_path)
    assert len(store) == 5
    for i, rows in enumerate(wanted):
        assert all(torch.equal(store.rows(i)[name], value) for name, value in rows.items())
    with pytest.raises(IndexError):
        store.rows(5)


def test_a_proposer_of_quality_learns_from_things_alone(images: Tensor):
    """What is not labelled is not background: without boxes there is nothing to learn, and with a box the scores of
    anchors far from it have no gradient."""
    net = detector(quality=True, sampled=(64, 16), sides=[2.0], ratios=[1.0])
    empty = net(images, [target(), target()])
    assert float(empty["rpn_score"].detach()) == 0
    _, _, made = net.propose(net.pyramid(images[:1]), (64, 64))
    made["scores"].retain_grad()
    corner = target([0, 0, 18, 18])
    net.proposer_losses(made, [corner])["rpn_score"].backward()
    touched = made["scores"].grad[0] != 0
    assert 0 < int(touched.sum()) < len(touched)
    assert bool((made["anchors"][touched][:, :2] < 18).all())

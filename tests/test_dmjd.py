"""DMJD: complementary views, targets of the same patch, and the encoders that it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.methods.pretraining.dmjd import (
    DMJD,
    MaskSpec,
    VisibleHead,
    block_masks,
    disjoint_masks,
    hidden_loss,
    visible_loss,
)
from stillhouse.models.conv_vit import ConvViT
from stillhouse.nn.masked_vit import MaskedDecoder
from stillhouse.training.context import Progress


def drawn(length: int, ratio: float, predict: float, images: int = 5):
    keep = int(length * (1 - ratio))
    perms = torch.randperm(keep), torch.randperm(length - keep)
    return disjoint_masks(torch.rand(images, length), ratio, predict, *perms)


@pytest.mark.parametrize("length", [16, 36, 49, 196])
@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75, 0.9])
def test_hidden_patches_of_both_views_cover_the_image_exactly(length: int, ratio: float) -> None:
    made = drawn(length, ratio, 1.0)
    first, second = made.mask.chunk(2)
    assert (first.sum(1) == second.sum(1)).all() and ((first + second) >= 1).all()
    assert ((1 - first) * (1 - second)).sum() == 0, "what one view shows the other hides"


@pytest.mark.parametrize(("ratio", "predict", "covered"), [(0.6, 0.8, 0.8), (0.75, 0.75, 0.75), (0.3, 1.0, 0.6)])
def test_a_smaller_prediction_covers_about_its_share(ratio: float, predict: float, covered: float) -> None:
    first, second = drawn(100, ratio, predict).mask.chunk(2)
    share = (first + second).clamp_max(1).mean().item()
    assert share == pytest.approx(covered, abs=0.021)


def test_blocks_hide_two_by_two_patches() -> None:
    made = block_masks(drawn(16, 0.6, 1.0), 8)
    blocks = made.mask.view(-1, 4, 2, 4, 2)
    assert (blocks.amax((2, 4)) == blocks.amin((2, 4))).all()
    for keep, mask in zip(made.ids_keep, made.mask):
        assert set(keep.tolist()) == set((mask == 0).nonzero().flatten().tolist())


def test_views_of_different_images_differ() -> None:
    first, second = drawn(64, 0.6, 1.0).mask.chunk(2)
    assert len(first.unique(dim=0)) == len(second.unique(dim=0)) == 5


@pytest.mark.parametrize(("ratio", "predict"), [(0.6, 0.5), (0.6, 1.1)])
def test_a_share_that_cannot_be_is_refused(ratio: float, predict: float) -> None:
    with pytest.raises(UserError, match=r"masks\.predict"):
        drawn(16, ratio, predict)


def test_each_visible_patch_learns_its_own_target() -> None:
    made, target = drawn(16, 0.5, 1.0, images=2), torch.randn(2, 16, 3)
    own = target.repeat(2, 1, 1).gather(1, made.ids_keep.unsqueeze(-1).expand(-1, -1, 3))
    assert visible_loss(own, target, made.ids_keep) == 0
    assert visible_loss(own + 1, target, made.ids_keep).item() == pytest.approx(0.25)
    assert visible_loss(own + 4, target, made.ids_keep).item() == pytest.approx(3.0)
    wrong = own.clone()
    assert visible_loss(wrong, target, made.ids_keep.sort(1).values) > 0, "raster order pairs other patches"
    assert hidden_loss(target.repeat(2, 1, 1), target, made.mask) == 0


def conv(**options: object) -> ConvViT:
    torch.manual_seed(0)
    sizes = {"widths": [8, 12, 16], "depths": [1, 1, 2], "heads": 2, "strides": [2, 2, 1], "input_shape": (3, 16, 16)}
    return ConvViT(**{**sizes, **options})


def module(views: int = 2, theta: float = 1.0, kind: str = "random") -> DMJD:
    student = conv()
    decoder = MaskedDecoder(16, 12, 1, 2, (4, 4), 108, prefix=0)
    head = VisibleHead(16, 12, 108) if theta else None
    return DMJD(student, decoder, head, MaskSpec(kind=kind, views=views), 2, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), theta)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("kind", ["random", "block"])
def test_a_step_of_every_arm(views: int, kind: str) -> None:
    for theta in (0.0, 1.0):
        made = module(views, theta, kind)
        terms = made({"input": torch.randn(3, 3, 16, 16)}, Progress())
        terms["loss"].backward()
        assert ("visible" in terms) == bool(theta) and torch.isfinite(terms["loss"])
        assert made.student.down1[0].weight.grad.abs().sum() > 0


def test_targets_are_of_the_images_own_pixels() -> None:
    made, pixels = module(), torch.randint(0, 256, (2, 3, 16, 16)).float()
    images = (pixels / 255 - made.mean) / made.std
    from stillhouse.functional.hog import hog_targets

    assert torch.equal(made.targets(images), hog_targets(pixels, 4, 2))


def test_no_hidden_pixel_reaches_the_encoder_through_the_depthwise_convolutions() -> None:
    student = conv(strides=[4, 1, 1]).eval()  # patches do not overlap before the masked convolutions
    masking = module().draw(torch.zeros(2, 3, 16, 16))
    masking = type(masking)(*(part[:2] for part in masking))
    x, other = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    shown = (1 - masking.mask).view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    changed: Tensor = x * shown + other * (1 - shown)
    torch.testing.assert_close(student.encode(x, masking), student.encode(changed, masking))
    assert not torch.allclose(student(x), student(changed))


def test_a_conv_vit_needs_three_stages_and_patches_that_divide() -> None:
    with pytest.raises(UserError, match=r"options\.widths"):
        conv(widths=[8, 16])
    with pytest.raises(UserError, match="do not divide"):
        conv(strides=[4, 4, 2])
    assert conv(num_classes=7)(torch.zeros(2, 3, 16, 16)).shape == (2, 7)

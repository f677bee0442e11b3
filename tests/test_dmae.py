"""DMAE: one mask for both networks, a teacher that is left alone, and what its options refuse."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.methods.pretraining.dmae import DMAE, align_loss, projection_head, step_times
from stillhouse.nn.masked_vit import MaskedDecoder, embed_patches, fix_positions
from stillhouse.training.context import Progress


def vit(width: int = 16, depth: int = 3, patch: int = 4) -> VisionTransformer:
    made = VisionTransformer(img_size=16, patch_size=patch, embed_dim=width, depth=depth, num_heads=2, num_classes=0)
    fix_positions(made)
    return made


def module(**options: object) -> DMAE:
    torch.manual_seed(0)
    student, teacher = vit(), vit(24, 4).eval().requires_grad_(False)
    decoder = MaskedDecoder(16, 12, 1, 2, (4, 4), 48)
    return DMAE(student, decoder, teacher, **{"student_blocks": [1], "teacher_blocks": [2], **options})


def batch() -> dict[str, Tensor]:
    return {"input": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def test_both_networks_see_the_same_patches_in_the_same_order() -> None:
    made, x = module(), batch()["input"]
    seen: dict[str, Tensor] = {}
    for name, net in (("student", made.student), ("teacher", made._teacher[0])):
        net.blocks[0].register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    made({"input": x}, Progress())
    places = []
    for name, net in (("student", made.student), ("teacher", made._teacher[0])):
        every = embed_patches(net, x)[:, 1:]
        places.append(torch.cdist(seen[name][:, 1:], every).argmin(-1))
    assert seen["student"].shape[1] == 5 and torch.equal(*places)


def test_only_the_student_learns() -> None:
    made = module()
    terms = made(batch(), Progress())
    terms["loss"].backward()
    assert terms["loss"].item() == pytest.approx((terms["pixel"] + terms["align"]).item())
    silent = {n for n, p in made.named_parameters() if p.requires_grad and p.grad is None}
    assert not silent - {"student.norm.weight"} and made.projections[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in made._teacher[0].parameters())
    assert not any("teacher" in name for name in made.state_dict())


def test_equal_tokens_align_without_a_projection() -> None:
    tokens = torch.randn(2, 5, 8)
    assert align_loss(tokens, tokens, None) == 0
    wide = projection_head(8, 12, "linear")
    loss = align_loss(tokens, torch.randn(2, 5, 12), wide)
    assert 0 < loss < 2 and align_loss(tokens, 7 * torch.randn(2, 5, 12), wide, "l2") < 4 / 12
    with pytest.raises(UserError, match="without a projection"):
        align_loss(tokens, torch.randn(2, 5, 12), None)


def test_an_alignment_weighs_what_is_said() -> None:
    made = module(weight=0.0)
    torch.manual_seed(3)
    terms = made(batch(), Progress())
    assert terms["loss"] == terms["pixel"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"student_blocks": [3]}, "align.student_blocks: there is no block 3"),
        ({"teacher_blocks": [4]}, "align.teacher_blocks: there is no block 4"),
        ({"teacher_blocks": [1, 2]}, "as many blocks"),
        ({"mask_ratio": 0.98}, "leaves none of 16 patches"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(UserError, match=match):
        module(**options)


def test_other_patches_are_refused() -> None:
    with pytest.raises(UserError, match="same patch size"):
        DMAE(vit(), MaskedDecoder(16, 12, 1, 2, (4, 4), 48), vit(24, 4, patch=8), [1], [2])


def test_a_teacher_that_runs_on_costs_more() -> None:
    found = step_times(module(teacher_blocks=[0]), torch.randn(64, 3, 16, 16))
    assert found["step_ms"] > 0 and found["step_unmasked_teacher"] > 1

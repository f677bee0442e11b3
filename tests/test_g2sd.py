"""G2SD: what the generic stage supervises, the distillation token, and the specific losses."""

from __future__ import annotations

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.functional.channelwise import channelwise_cross_entropy
from stillhouse.methods.pretraining.g2sd import (
    GenericTraining,
    SpecificTraining,
    add_token,
    generic_loss,
    imitation_losses,
    specific_loss,
)
from stillhouse.nn.masked_vit import MaskedDecoder, fix_positions
from stillhouse.training.context import Progress

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


def vit(**options: object) -> VisionTransformer:
    made = VisionTransformer(**{**SIZES, **options})
    fix_positions(made)
    return made


def generic(**options: object) -> GenericTraining:
    torch.manual_seed(0)
    teacher, teacher_decoder = vit(embed_dim=24), MaskedDecoder(24, 20, 3, 2, (4, 4), 48)
    for network in (teacher, teacher_decoder):
        network.eval().requires_grad_(False)
    return GenericTraining(
        vit(),
        MaskedDecoder(16, 12, 1, 2, (4, 4), None),
        teacher,
        teacher_decoder,
        **{"block": 2, **options},
    )


def batch() -> dict[str, Tensor]:
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"input": x, "label": torch.arange(6) % 5, "index": torch.arange(6)}


@pytest.mark.parametrize("supervise", ["all", "masked"])
def test_the_generic_stage_teaches_the_student_alone(supervise: str) -> None:
    made = generic(supervise=supervise)
    made(batch(), Progress())["loss"].backward()
    assert made.student.patch_embed.proj.weight.grad.abs().sum() > 0 and made.decoder.mask_token.grad.abs().sum() > 0
    assert all(p.grad is None for network in made._teacher for p in network.parameters())
    assert not any("teacher" in name for name in made.state_dict())


def test_masked_supervision_leaves_out_visible_patches_and_the_class_token() -> None:
    predicted, target = torch.zeros(2, 5, 3), torch.zeros(2, 5, 3)
    target[:, 0], target[:, 2] = 1.0, 1.0
    mask = torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 1]])
    assert generic_loss(predicted, target, mask) == 0
    assert generic_loss(predicted, target).item() == pytest.approx(0.25 * 2 / 5)
    with pytest.raises(UserError, match="predictions have shape"):
        generic_loss(predicted[:, 1:], target)


def test_the_teachers_decoder_stops_at_its_block() -> None:
    made, ran = generic(block=1), []
    for block in made._teacher[1].blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    made(batch(), Progress())
    assert len(ran) == 1
    with pytest.raises(UserError, match="blocks 1 to 3"):
        generic(block=4)


def test_an_encoder_with_a_token_starts_as_the_encoder_it_came_from() -> None:
    plain, token = vit(), VisionTransformerDistilled(**SIZES)
    kept = token.dist_token.detach().clone()
    add_token(plain.state_dict(), token)
    assert torch.equal(token.dist_token, kept) and (token.pos_embed[:, 1] == 0).all()
    assert torch.equal(token.pos_embed[:, 2:], plain.pos_embed[:, 1:])
    assert all(torch.equal(v, token.state_dict()[k]) for k, v in plain.state_dict().items() if "blocks" in k)
    assert token.head.weight.abs().max() < 1e-3 and token.head_dist.weight.abs().max() < 1e-3


def test_each_token_learns_from_its_own_teacher_and_their_mean_predicts() -> None:
    student = VisionTransformerDistilled(**SIZES)
    made = SpecificTraining(student, FrozenTeacher(vit()), smoothing=0.1).train()
    terms = made(batch(), Progress())
    assert terms["loss"].item() == pytest.approx((terms["labels"] + terms["teacher"]).item() / 2)
    terms["labels"].backward(retain_graph=True)
    assert student.head.weight.grad is not None and student.head_dist.weight.grad is None
    own, token = student(batch()["input"])
    torch.testing.assert_close(student.eval()(batch()["input"]), (own + token) / 2)


def test_labels_may_be_mixed_and_smoothing_is_of_the_labels_alone() -> None:
    logits, ids = torch.randn(4, 5), torch.tensor([0, 1, 2, 4])
    soft = torch.nn.functional.one_hot(ids, 5).float()
    by_id, by_row = (specific_loss(logits, logits, logits, labels, 0.1) for labels in (ids, soft))
    torch.testing.assert_close(by_id["labels"], by_row["labels"])
    assert by_id["teacher"] == specific_loss(logits, logits, logits, ids)["teacher"]


def test_equal_maps_leave_the_teachers_entropy() -> None:
    same = torch.randn(2, 3, 4, 5, requires_grad=True)
    loss = channelwise_cross_entropy(same, same, 1.0)
    p = same.detach().flatten(2).softmax(-1)
    assert loss.item() == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, same)
    assert gradient.abs().max() < 1e-6


def test_imitation_is_finite_where_the_teacher_sees_nothing() -> None:
    level = torch.randn(1, 4, 3, 3), torch.randn(1, 2, 3, 3)
    blind = torch.randn(1, 4, 3, 3), torch.full((1, 2, 3, 3), -200.0)
    found = imitation_losses([level], [blind], iteration=1000)
    assert all(torch.isfinite(v) for v in found.values())
    assert all(v == 0 for v in imitation_losses([level], [level], iteration=0).values())

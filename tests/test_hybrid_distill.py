"""Hybrid Distill: the card's identities, which tokens a pruned student keeps, and targets at those places."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from stillhouse.distillation.own_input import OwnInput
from stillhouse.errors import UserError
from stillhouse.evaluation.attention import attention_distance, attention_figures, attention_nmi
from stillhouse.methods.pretraining.hybrid_distill.losses import feature_loss, relations_loss
from stillhouse.methods.pretraining.hybrid_distill.pruning import (
    encode_pruned,
    least_redundant,
    planned_counts,
    redundancy,
)
from stillhouse.methods.pretraining.hybrid_distill.training import HybridTraining, Source, step_times
from stillhouse.nn.masked_vit import embed_patches, encode, fix_positions
from stillhouse.training.context import Progress


def vit(width: int = 16, depth: int = 3, heads: int = 2) -> VisionTransformer:
    made = VisionTransformer(img_size=16, patch_size=4, embed_dim=width, depth=depth, num_heads=heads, num_classes=0)
    fix_positions(made)
    return made


def source(width: int = 24, depth: int = 4, blocks: tuple[int, ...] = ()) -> Source:
    return Source(vit(width, depth).eval().requires_grad_(False), OwnInput(), blocks)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_redundancy_of_the_card() -> None:
    tokens = torch.tensor([[[1.0, 0, 0], [1, 0, 0], [0, 1, 0]]])
    torch.testing.assert_close(redundancy(tokens), torch.tensor([[0.5, 0.5, 0]]), atol=1e-5, rtol=0)
    assert least_redundant(tokens, 2).tolist() == [[0, 2]], "among equal ones the first stays"
    scale = torch.tensor([[[3.0], [0.1], [7.0]]])
    torch.testing.assert_close(redundancy(tokens * scale), redundancy(tokens), atol=1e-4, rtol=0)
    torch.testing.assert_close(redundancy(torch.ones(1, 5, 4)), torch.ones(1, 5), atol=1e-4, rtol=0)
    assert redundancy(torch.ones(2, 1, 4)).tolist() == [[0], [0]]


def test_patches_fall_by_equal_ratios_to_the_share() -> None:
    assert planned_counts(64, 0.5, 3) == [51, 40, 32] and planned_counts(16, 1.0, 2) == [16, 16]
    assert planned_counts(4, 0.01, 3)[-1] == 1


def test_a_student_that_drops_nothing_is_the_network_itself() -> None:
    net, x = vit().eval(), images()
    found = encode_pruned(net, x, {})
    torch.testing.assert_close(found.tokens, encode(net, x).tokens)
    assert all(torch.equal(kept, torch.arange(16).expand(3, -1)) for kept in found.kept)


def test_kept_places_are_those_of_the_tokens_over_all_points() -> None:
    net, x = vit().eval(), images()
    seen: list[Tensor] = []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = encode_pruned(net, x, {0: 12, 2: 7})
    assert [k.shape[1] for k in found.kept] == [12, 12, 7] and found.tokens.shape[1] == 8
    every = embed_patches(net, x)[:, 1:]
    assert torch.equal(torch.cdist(seen[0][:, 1:], every).argmin(-1), found.kept[0])
    for earlier, later in zip(found.kept[1], found.kept[2]):
        assert set(later.tolist()) <= set(earlier.tolist()) and later.tolist() == sorted(later.tolist())


def test_features_of_the_card() -> None:
    features = torch.randn(2, 5, 8)
    target = torch.nn.functional.layer_norm(features, (8,), eps=1e-6)
    assert feature_loss(target, features) == 0
    assert feature_loss(target + 1, features).item() == pytest.approx(0.25, abs=1e-6)
    assert feature_loss(target + 4, features).item() == pytest.approx(3.0, abs=1e-5)
    torch.testing.assert_close(feature_loss(target + 1, 3 * features + 2), torch.tensor(0.25), atol=1e-4, rtol=0)
    assert feature_loss(target, features, "cosine").abs() < 1e-6


def test_a_student_equal_to_its_teacher_has_no_relation_loss_on_any_patches() -> None:
    net, x = vit().eval(), images()
    from stillhouse.signals import Taps

    taps = Taps(net, ["blocks.1.attn.qkv"])
    with taps.capture() as whole:
        encode(net, x)
    kept = torch.tensor([[0, 3, 5, 9], [1, 2, 3, 4], [4, 8, 9, 15]])
    from stillhouse.functional.masking import take_tokens
    from stillhouse.methods.pretraining.hybrid_distill.losses import with_class_token

    qkv = whole["blocks.1.attn.qkv"]
    mine = take_tokens(qkv, with_class_token(kept)).detach().requires_grad_()
    loss = torch.stack(list(relations_loss(mine, qkv, kept, 2).values())).sum()
    (gradient,) = torch.autograd.grad(loss, mine)
    assert abs(loss.item()) < 1e-6 and gradient.abs().max() < 1e-6


def hybrid(**options: object) -> HybridTraining:
    torch.manual_seed(0)
    arguments = {"blocks": [1], "heads": 2, "counts": {0: 12, 2: 7}, **options}
    contrastive = arguments.pop("contrastive", source())
    masked = arguments.pop("masked", source(16, 3, (1,)))
    return HybridTraining(vit(), contrastive, masked, **arguments)


def test_both_teachers_teach_and_neither_learns() -> None:
    made = hybrid()
    terms = made({"input": images()}, Progress())
    terms["loss"].backward()
    assert set(terms) == {"loss", "qk", "vv", "features"}
    assert terms["loss"].item() == pytest.approx(sum(terms[k].item() for k in ("qk", "vv", "features")), rel=1e-5)
    assert made.project.weight.grad.abs().sum() > 0 and made.student.patch_embed.proj.weight.grad.abs().sum() > 0
    assert not any("contrastive" in name or "masked" in name for name in made.state_dict())
    assert set(hybrid(masked=None)({"input": images()}, Progress())) == {"loss", "features"}
    assert set(hybrid(contrastive=None)({"input": images()}, Progress())) == {"loss", "qk", "vv"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"blocks": [3]}, "relations.student_blocks: there is no block 3"),
        ({"blocks": [0, 1]}, "as many"),
        ({"projection": False}, "as wide as"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(UserError, match=match):
        hybrid(**options)


def test_fewer_patches_cost_less() -> None:
    made = hybrid(counts={0: 4, 1: 2, 2: 1})
    found = step_times(made, torch.randn(64, 3, 16, 16))
    assert found["step_unpruned"] > 1 and made.counts == {0: 4, 1: 2, 2: 1}


def test_uniform_attention_has_no_information_and_identity_all() -> None:
    n = 16
    assert attention_nmi(torch.full((1, 1, n, n), 1 / n)).item() == pytest.approx(0, abs=1e-7)
    assert attention_nmi(torch.eye(n)[None, None]).item() == pytest.approx(1)
    collapsed = torch.zeros(1, 1, n, n)
    collapsed[..., 3] = 1
    assert attention_nmi(collapsed).item() == pytest.approx(0, abs=1e-6)
    assert attention_distance(torch.eye(n)[None, None], (4, 4), 4).item() == 0
    neighbour = torch.zeros(1, 1, 2, 2)
    neighbour[0, 0, 0, 1] = neighbour[0, 0, 1, 0] = 1
    assert attention_distance(neighbour, (1, 2), 4).item() == pytest.approx(4)


def test_attention_is_measured_in_every_block() -> None:
    net = vit(depth=2).eval()
    found = attention_figures(net, [{"input": images()}], torch.device("cpu"))
    assert len(found["nmi"]) == len(found["distance"]) == 2 and all(0 <= v < 0.5 for v in found["nmi"])
    assert all(2 < v < 16 for v in found["distance"])

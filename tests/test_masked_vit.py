"""Masks, the masked encoder and its decoder, HOG targets, token relations and probes: what the masked pre-training
papers share."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.evaluation.probes import Features, collect_features, knn_accuracy, linear_probe, probe_accuracy
from stillhouse.functional import masking as m
from stillhouse.functional.hog import hog, hog_targets
from stillhouse.functional.relations import relation_heads, relation_kl
from stillhouse.nn.masked_vit import MaskedDecoder, as_encoder, decay_groups, encode, fix_positions, sincos_positions


def vit(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    made = VisionTransformer(**{**sizes, "global_pool": "avg", "fc_norm": False, **options})
    fix_positions(made)
    return made.eval()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75, 0.93])
def test_visible_and_hidden_patches_are_the_image(ratio: float) -> None:
    made = m.random_masking(torch.rand(4, 16), ratio)
    assert made.ids_keep.shape == (4, int(16 * (1 - ratio)))
    for keep, mask, restore in zip(made.ids_keep, made.mask, made.ids_restore):
        assert sorted(restore.tolist()) == list(range(16))
        assert set(keep.tolist()) == set((mask == 0).nonzero().flatten().tolist())


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 0.99])
def test_a_ratio_that_leaves_no_patch_is_refused(ratio: float) -> None:
    with pytest.raises(UserError, match="mask_ratio"):
        m.random_masking(torch.rand(1, 16), ratio)


def test_tokens_go_back_to_their_places() -> None:
    tokens, made = torch.randn(3, 16, 4), m.random_masking(torch.rand(3, 16), 0.5)
    back = m.restore_tokens(m.take_tokens(tokens, made.ids_keep), torch.full((1, 1, 4), 9.0), made.ids_restore)
    hidden = made.mask.bool()
    assert torch.equal(back[~hidden], tokens[~hidden]) and (back[hidden] == 9).all()


def test_blocks_are_their_four_patches() -> None:
    ids = m.patches_of_blocks(torch.arange(6)[None], columns=6)  # blocks of a 4 x 6 grid
    assert sorted(ids[0].tolist()) == list(range(24))
    assert ids.view(4, 6)[:, 4].tolist() == [14, 15, 20, 21]  # second row of blocks, second column
    with pytest.raises(UserError, match="even grid"):
        m.grid_blocks(3, 4)


def test_nothing_hidden_costs_nothing() -> None:
    predicted = torch.randn(2, 16, 48, requires_grad=True)
    loss = m.masked_pixel_loss(predicted, torch.randn(2, 16, 48), torch.zeros(2, 16))
    loss.backward()
    assert loss == 0 and predicted.grad is not None and predicted.grad.abs().sum() == 0


def test_an_encoder_of_all_patches_is_the_network_itself() -> None:
    net, x = vit(), images()
    torch.testing.assert_close(encode(net, x).latent, net.forward_features(x))
    shuffled = torch.randperm(16).expand(3, -1)
    tokens = encode(net, x, shuffled).tokens
    torch.testing.assert_close(tokens[:, 1:], net.forward_features(x)[:, 1:][:, shuffled[0]], atol=1e-5, rtol=1e-4)


def test_an_encoder_stops_at_its_block_with_the_same_numbers() -> None:
    net, x, ran = vit(), images(), []
    for block in net.blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    keep = m.random_masking(torch.rand(3, 16), 0.75).ids_keep
    whole = encode(net, x, keep, [0, 1])
    count, early = len(ran), encode(net, x, keep, [0, 1], stop=True)
    assert count == 3 and len(ran) == count + 2 and early.latent is None
    assert all(torch.equal(a, b) for a, b in zip(whole.blocks, early.blocks))


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: nn.Linear(2, 2), "plain ViT"),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=16, patch_size=4), "plain ViT"),
        (
            lambda: VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=1, reg_tokens=2),
            "plain ViT",
        ),
        (
            lambda: VisionTransformer(
                img_size=16,
                patch_size=4,
                embed_dim=8,
                depth=1,
                num_heads=1,
                no_embed_class=True,
            ),
            "position",
        ),
        (
            lambda: VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=1, global_pool="avg"),
            "fc_norm",
        ),
    ],
)
def test_other_networks_are_refused(model, match: str) -> None:
    with pytest.raises(UserError, match=match):
        as_encoder(model(), "student")


def test_positions_tell_places_apart() -> None:
    table = sincos_positions(16, (3, 5))[0]
    assert table.shape == (16, 16) and (table[0] == 0).all()
    assert torch.cdist(table[1:], table[1:]).add(torch.eye(15)).min() > 0.1
    assert torch.equal(table[1, 8:], table[2, 8:]) and torch.equal(table[1, :8], table[6, :8])  # the row, the column


def test_a_decoder_stops_and_has_no_prediction_where_none_is_wanted() -> None:
    net, made = vit(), m.random_masking(torch.rand(3, 16), 0.75)
    latent = encode(net, images(), made.ids_keep).tokens
    decoder = MaskedDecoder(16, 12, 3, 2, (4, 4), outputs=48)
    assert decoder(latent, made.ids_restore).shape == (3, 16, 48)
    ran: list[int] = []
    for block in decoder.blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    assert decoder.hidden(latent, made.ids_restore, 2).shape == (3, 17, 12) and len(ran) == 2
    assert MaskedDecoder(16, 12, 1, 2, (4, 4), outputs=None).pred is None


def test_vectors_and_fixed_positions_have_no_decay() -> None:
    net = vit()
    decayed, free = decay_groups(net)
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in free["params"])
    assert free["weight_decay"] == 0 and not any(p is net.pos_embed for g in (decayed, free) for p in g["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(net.parameters())) - 1


def test_hog_sees_edges_by_their_angle() -> None:
    x = torch.zeros(1, 1, 8, 8)
    x[..., 4:] = 255  # a vertical edge: gradients point right, angle 0
    found = hog(x, 8)[0, 0, 0, 0]
    assert found[0] == pytest.approx(2 * 6 * 255 / 64 + 2 * 2 * 255 / 64) and (found[1:] == 0).all()
    assert hog(x.transpose(2, 3), 8)[0, 0, 0, 0].argmax() == 4  # 90 degrees


def test_flat_cells_give_zeros_and_sizes_must_divide() -> None:
    flat = hog_targets(torch.full((2, 3, 8, 8), 7.0), 4, 2)
    assert flat.shape == (2, 4, 108) and (flat == 0).all()
    with pytest.raises(UserError, match="divide"):
        hog_targets(torch.zeros(1, 3, 8, 8), 4, 3)
    with pytest.raises(UserError, match="divide"):
        hog(torch.zeros(1, 3, 8, 9), 4)


def test_relations_of_the_card() -> None:
    one, zero = torch.tensor([[[[1.0], [0.0]]]]), torch.zeros(1, 1, 2, 1)
    assert relation_kl((zero, zero), (one, one)).item() == pytest.approx(0.0554720, abs=1e-6)
    q, k, c = torch.randn(2, 4, 7, 3), torch.randn(2, 4, 7, 3), torch.randn(1, 4, 1, 3)
    assert relation_kl((q, k), (q, k)).abs() < 1e-6
    assert relation_kl((q, k + c), (q, k)).abs() < 1e-5  # a constant in all keys changes no row
    order = torch.randperm(7)
    other = torch.randn(2, 4, 7, 5)
    permuted = relation_kl((q[:, :, order], k[:, :, order]), (other[:, :, order], other[:, :, order]))
    torch.testing.assert_close(permuted, relation_kl((q, k), (other, other)))
    with pytest.raises(UserError, match="same tokens"):
        relation_kl((q, k), (q[:, :, :5], k[:, :, :5]))
    assert relation_heads(torch.randn(2, 7, 12), 3).shape == (2, 3, 7, 4)


def clouds(classes: int, count: int, seed: int) -> Features:
    y = torch.arange(count) % classes
    centres = 3 * torch.eye(classes, 6)
    noise = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return Features(100 + 5 * (centres[y] + 0.3 * noise), y)


@pytest.mark.parametrize("classes", [2, 4])
def test_probes_tell_clouds_apart(classes: int) -> None:
    train, test = clouds(classes, 200, 0), clouds(classes, 100, 1)
    probe = linear_probe(train, classes + 1)
    assert probe_accuracy(probe, test) > 0.95 and knn_accuracy(train, test, 5) > 0.9
    assert probe(test.x).argmax(1).max() < classes, "a class without samples is never predicted"


def test_features_come_in_order_with_their_classes() -> None:
    batches = [
        {"input": torch.ones(2, 3), "label": torch.tensor([0, 1])},
        {"input": torch.zeros(1, 3), "label": torch.tensor([2])},
    ]
    found = collect_features(lambda batch: batch["input"][:, :2], batches, torch.device("cpu"))
    assert found.x.tolist() == [[1, 1], [1, 1], [0, 0]] and found.y.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="soft"):
        collect_features(
            lambda batch: batch["input"],
            [{"input": torch.ones(1, 3), "label": torch.ones(1, 2)}],
            torch.device("cpu"),
        )
    with pytest.raises(UserError, match="holds none"):
        collect_features(lambda batch: batch["input"], [], torch.device("cpu"))

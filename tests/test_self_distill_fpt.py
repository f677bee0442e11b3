"""Self-distilled further pre-training: what is compared, who learns, and that every student begins at the start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.methods.pretraining.self_distill_fpt import (
    SelfDistillation,
    distillation_loss,
    feature_of,
    weight_distance,
)
from stillhouse.nn.masked_vit import MaskedDecoder, encode, fix_positions
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.run import Run
from stillhouse.training.context import Progress

RECIPE = Path(__file__).parents[1] / "recipes" / "pretraining" / "self_distill_fpt.yaml"


def vit(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    made = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    fix_positions(made)
    return made


def module(**options: object) -> SelfDistillation:
    return SelfDistillation(vit(), MaskedDecoder(16, 12, 1, 2, (4, 4), 48), vit(1), **options)


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def test_the_distance_is_summed_over_the_width_and_averaged_over_the_batch() -> None:
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    loss = distillation_loss(student, teacher)
    torch.testing.assert_close(loss, ((student - teacher) ** 2).sum(1).mean())
    loss.backward()
    torch.testing.assert_close(student.grad, 2 * (student - teacher).detach() / 3)
    assert teacher.grad is None


def test_features_are_of_whole_images_in_any_order_of_their_patches() -> None:
    net = vit().eval()
    order = torch.stack([torch.randperm(16) for _ in IMAGES])
    shuffled = encode(net, IMAGES, order).tokens
    torch.testing.assert_close(feature_of(net, IMAGES), shuffled[:, 0])
    torch.testing.assert_close(feature_of(net, IMAGES, "mean"), shuffled.mean(1))


def test_only_the_student_learns_and_its_decoder_from_pixels_alone() -> None:
    made = module(weight=1000.0)
    torch.manual_seed(3)
    terms = made({"input": IMAGES}, Progress())
    terms["loss"].backward()
    torch.testing.assert_close(terms["loss"], terms["pixel"] + 1000 * terms["distil"])
    assert all(p.grad is None and not p.requires_grad for p in made._teacher[0].parameters())
    assert not any("teacher" in name for name in made.state_dict()) and not made._teacher[0].training
    heavy = made.decoder.pred.weight.grad.clone()
    plain = module(weight=0.0)
    plain.decoder.load_state_dict(made.decoder.state_dict())
    torch.manual_seed(3)
    plain({"input": IMAGES}, Progress())["loss"].backward()
    torch.testing.assert_close(plain.decoder.pred.weight.grad, heavy)
    assert not torch.allclose(plain.student.patch_embed.proj.weight.grad, made.student.patch_embed.proj.weight.grad)


def test_a_student_is_not_its_own_teacher() -> None:
    net = vit()
    with pytest.raises(UserError, match="share weights"):
        SelfDistillation(net, MaskedDecoder(16, 12, 1, 2, (4, 4), 48), net)


def test_a_distance_of_weights_leaves_the_classifier_out() -> None:
    start, end = vit().state_dict(), vit().state_dict()
    end = {**end, "norm.weight": end["norm.weight"] + 0.5, "head.weight": end["head.weight"] + 9}
    assert weight_distance(end, start) == pytest.approx(0.5 * 16**0.5)


def test_every_student_begins_at_the_untouched_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    began: dict[str, dict[str, Tensor]] = {}
    taught: dict[str, Tensor] = {}
    plain = Run.fit

    def watched(self: Run, stage: object, made: object, *args: object, **options: object) -> object:
        if str(stage) == "further" or str(stage).startswith("round"):
            began[str(stage)] = {k: v.clone() for k, v in made.state_dict().items()}  # type: ignore[attr-defined]
            if isinstance(made, SelfDistillation):
                taught[str(stage)] = made._teacher[0].blocks[0].mlp.fc1.weight.clone()
        return plain(self, stage, made, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "fit", watched)
    figures = execute(recipe.load(RECIPE, "smoke", ["rounds=2", "fine_tune=null"]), tmp_path / "run", cpu=True)
    assert list(began) == ["further", "round.1", "round.2"]
    first = began["further"]
    assert all(torch.equal(first[k], other[k]) for other in began.values() for k in first)
    start = first["student.blocks.0.mlp.fc1.weight"]
    assert not torch.equal(taught["round.1"], start) and not torch.equal(taught["round.2"], taught["round.1"])
    assert figures["distance"] > 0 and figures["distance_further"] > 0
    again = execute(recipe.load(RECIPE, "smoke", ["rounds=0", "fine_tune=null"]), tmp_path / "further", cpu=True)
    assert len(began) == 3, "further pre-training is shared"
    assert again["distance"] == again["distance_further"] == figures["distance_further"]
    initial = execute(recipe.load(RECIPE, "smoke", ["further=false", "fine_tune=null"]), tmp_path / "initial", cpu=True)
    assert initial["distance"] == 0 and "distance_further" not in initial

"""TransKD: taps before the blocks, fusion from deep to shallow, three variants, and nothing of it in the product."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.models import build
from stillhouse.objectives.transkd import (
    STAGES,
    CrossSelectiveFusion,
    GlobalLocalMixer,
    PatchEmbeddingAlignment,
    TransKD,
    embedding_loss,
)
from stillhouse.signals import Batch
from stillhouse.tasks.segmentation import Segmentation

TASK = Segmentation(("ground", "thing", "sky"), (64, 96), (0.5,) * 3, (0.5,) * 3)
SPAN = Progress(epoch=0, epochs=2)


def segformer(widths: list[int], seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    fixed = {"depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    return TASK.build(ModelSpec(model="hf:config:segformer", options={"hidden_sizes": widths, **fixed, **options}))


def batch(count: int = 2, size: tuple[int, int] = (64, 96)) -> Batch:
    draw = torch.Generator().manual_seed(1)
    label = torch.randint(0, 3, (count, size[0] // 4, size[1] // 4), generator=draw)
    return {"input": torch.randn(count, 3, *size, generator=draw), "label": label}


def module(student: nn.Module, teacher: nn.Module, given: Batch, **options: object) -> Distillation:
    made = Distillation(student, FrozenTeacher(teacher, task=TASK), [TransKD(**options)], task=TASK)
    return made.build(given).train()


@pytest.mark.parametrize("variant", ["base", "gl", "ea"])
def test_the_student_learns_and_its_weights_stay_a_plain_students(variant: str):
    student, given = segformer([8, 8, 16, 16]), batch()
    plain = set(student.state_dict())
    made = module(student, segformer([16, 16, 24, 32], 1), given, variant=variant)
    first = made(given, SPAN)
    assert set(first) == {"transkd.features", "transkd.embeddings", "loss"}
    optimizer = torch.optim.AdamW([p for group in made.param_groups() for p in group["params"]], 1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        loss = made(given, SPAN)["loss"]
        loss.backward()
        optimizer.step()
    assert loss < first["loss"] and set(student.state_dict()) == plain
    names = [n for n, p in student.named_parameters() if "decode_head" not in n and p.grad is None]
    assert not names, "every stage of the encoder is taught"
    own = {id(p) for p in made.objectives.parameters()}
    assert own and not own & {id(p) for p in student.parameters()}


def test_embeddings_are_read_after_their_norm_and_before_the_blocks():
    student, given = segformer([8, 8, 16, 16]).eval(), batch()
    made = module(student, segformer([16, 16, 24, 32], 1), given).eval()
    seen = made._reader(given).require("tap:stage:1.patch_embeddings")
    entrance = student.segformer.stages[0].patch_embeddings
    expected = entrance.layer_norm(entrance.proj(given["input"]).flatten(2).transpose(1, 2))
    torch.testing.assert_close(seen, expected)


def test_a_batch_of_one_has_a_layer_of_its_own():
    student, given = segformer([8, 8, 16, 16]), batch(1)
    made = module(student, segformer([16, 16, 24, 32], 1), given)
    made(given, SPAN)["loss"].backward()
    unit = made.objectives[0].fusion.units[0]
    assert unit.squeeze_one[0].weight.grad.abs().sum() > 0 and not unit.squeeze[0].weight.grad.any()
    made.zero_grad()
    made(batch(2), SPAN)["loss"].backward()
    assert unit.squeeze[0].weight.grad.abs().sum() > 0 and not unit.squeeze_one[0].weight.grad.any()


def test_deeper_stages_teach_through_shallower_ones_and_not_the_other_way():
    torch.manual_seed(0)
    fusion = CrossSelectiveFusion([4, 5, 6], [7, 8, 9], width=8)
    maps = [torch.randn(2, c, s, s, requires_grad=True) for c, s in ((4, 8), (5, 4), (6, 2))]

    def reached(stage: int) -> list[bool]:
        grads = torch.autograd.grad(fusion(maps)[stage].square().sum(), maps, allow_unused=True)
        return [g is not None and bool(g.abs().sum() > 0) for g in grads]

    assert reached(0) == [True, True, True] and reached(1) == [False, True, True] and reached(2) == [False, False, True]
    assert [tuple(x.shape[1:]) for x in fusion(maps)] == [(7, 8, 8), (8, 4, 4), (9, 2, 2)]


def test_channels_are_weighed_between_a_stage_and_the_deeper_ones():
    fusion = CrossSelectiveFusion([4, 4], [4, 4], width=8).eval()
    unit = fusion.units[0]
    for layer in unit.choose:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    x, deeper = torch.randn(2, 4, 6, 6), torch.randn(2, 8, 3, 3)
    _, fused = unit(x, deeper)
    torch.testing.assert_close(fused, (unit.reduce(x) + F.interpolate(deeper, (6, 6))) / 2)
    nn.init.constant_(unit.choose[1].bias, 60.0)
    torch.testing.assert_close(unit(x, deeper)[1], F.interpolate(deeper, (6, 6)))


def test_one_stages_embeddings_are_their_mean_squared_error():
    tokens = [torch.randn(2, n, 4) for n in (6, 4)]
    teacher = [torch.randn(2, n, 4) for n in (6, 4)]
    torch.testing.assert_close(embedding_loss(tokens, teacher, [0, 1]), F.mse_loss(tokens[1], teacher[1]))


def test_variants_start_from_published_weights():
    assistant = PatchEmbeddingAlignment([4] * 4, [6] * 4, "ea")
    weights = [[round(w.item(), 4) for w in side] for side in (assistant.own_weights, assistant.assistant_weights)]
    assert weights == [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]
    mixer = GlobalLocalMixer(8, heads=2)
    assert mixer.attention_weight.item() == mixer.convolution_weight.item() == 0.5


def test_a_mixer_without_weight_is_its_residual():
    mixer, tokens = GlobalLocalMixer(8, heads=2, residual=True), torch.randn(2, 5, 8)
    with torch.no_grad():
        mixer.attention_weight.zero_()
        mixer.convolution_weight.zero_()
    torch.testing.assert_close(mixer(tokens), tokens)


@pytest.mark.parametrize("left_out", ["features", "embeddings"])
def test_a_part_that_is_left_out_has_no_layers_and_taps(left_out: str):
    options = {"feature_weight": 0} if left_out == "features" else {"embedding_weights": [0, 0, 0, 0]}
    given = batch()
    made = module(segformer([8, 8, 16, 16]), segformer([16, 16, 24, 32], 1), given, **options)
    assert f"transkd.{left_out}" not in made(given, SPAN)
    there = {name.partition(".")[0] for name, _ in made.objectives[0].named_parameters()}
    assert there == ({"alignment"} if left_out == "features" else {"fusion"})


def test_pyramids_of_timm_are_taught_with_their_tokenizers_named():
    embeddings = ["patch_embed", *(f"stages.{i}.downsample" for i in (1, 2, 3))]
    names = {"student_embeddings": embeddings, "teacher_embeddings": embeddings}
    options = {"depths": [1] * 4, "num_heads": [1] * 4}

    def pvt(*widths: int) -> nn.Module:
        return build(ModelSpec(model="timm:pvt_v2_b0", options={"embed_dims": widths, **options}), 3, (3, 64, 64))

    given = {"input": batch(2, (64, 64))["input"], "label": torch.tensor([0, 2])}
    made = Distillation(pvt(8, 8, 16, 16), pvt(16, 16, 24, 32), [TransKD(variant="ea", **names)]).build(given).train()
    terms = made(given, SPAN)
    assert terms["loss"].isfinite() and terms["transkd.embeddings"] > 0


def other_strides() -> object:
    return module(segformer([8] * 4), segformer([8] * 4, 1, strides=[2, 2, 2, 2]), batch())


def other_assistant() -> object:
    networks = [segformer([8] * 4, seed, strides=[2, 2, 2, 2]) for seed in (0, 1)]
    return module(*networks, batch(), variant="ea")(batch(), SPAN)


def one_pixel() -> object:
    return module(segformer([8] * 4, sr_ratios=[1] * 4), segformer([8] * 4, 1, sr_ratios=[1] * 4), batch(1, (32, 32)))


def other_tokens() -> object:
    return module(segformer([8] * 4), segformer([8] * 4, 1, strides=[2, 2, 2, 2]), batch(), feature_weight=0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (other_strides, "'stage:1' is a map of .* same strides"),
        (other_tokens, "holds 384 tokens but .* of the teacher 1536"),
        (one_pixel, "single pixel has no batch statistics"),
        (lambda: TransKD(variant="big"), "transkd variant"),
        (lambda: TransKD(embedding_weights=[1.0]), "1 embedding_weights"),
        (lambda: TransKD(student_layers=STAGES[:2]), "as many layers"),
        (lambda: TransKD(feature_weight=0, embedding_weights=[0, 0, 0, 0]), "nothing would be distilled"),
        (lambda: GlobalLocalMixer(12), "heads 8 must divide the width 12"),
        (other_assistant, "assistant of stage 1"),
    ],
)
def test_mistakes_get_a_sentence(make, sentence: str):
    with pytest.raises(UserError, match=sentence):
        make()

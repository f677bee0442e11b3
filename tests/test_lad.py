"""LAD: what the label's channel shows, that it never reaches the student, the dual path, both stages of a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec
from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.functional.channelwise import channelwise_divergence
from stillhouse.functional.counting import IGNORED
from stillhouse.methods.dense.lad import (
    Channel,
    Config,
    Maps,
    StudentTraining,
    TeacherTraining,
    consistency_loss,
    fixed_codes,
    label_channel,
    pixel_loss,
    task_loss,
    with_label_channel,
)
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.signals import Batch
from stillhouse.tasks.segmentation import Segmentation

TASK = Segmentation(("ground", "thing", "sky"), (32, 32), (0.5,) * 3, (0.5,) * 3)
SPAN = Progress(epoch=0, epochs=2)
SEGFORMER = {
    "hidden_sizes": [4, 8, 8, 8],
    "depths": [1] * 4,
    "num_attention_heads": [1] * 4,
    "decoder_hidden_size": 8,
    "sr_ratios": [1] * 4,
}
MODEL = {"model": "hf:config:segformer", "options": SEGFORMER}


def config(**keys: object) -> Config:
    return Config.model_validate({"method": "lad", "data": "camvid", "student": MODEL, **keys})


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return TASK.build(ModelSpec.model_validate(MODEL))


def batch() -> Batch:
    draw = torch.Generator().manual_seed(1)
    label = torch.randint(0, 3, (4, 32, 32), generator=draw)
    label[:, :2] = IGNORED
    return {"input": torch.randn(4, 3, 32, 32, generator=draw), "label": label}


# ---- the channel ---------------------------------------------------------------------------------------------------


def test_a_class_has_one_code_in_an_image_and_ignored_pixels_the_last():
    given, codes = batch(), torch.randn(4, 4)
    channel = label_channel(given["label"], codes, torch.zeros(4, 1, 32, 32), scale=2.0)
    for image in range(4):
        for k, ids in enumerate((0, 1, 2, IGNORED)):
            where = given["label"][image] == ids
            torch.testing.assert_close(channel[image, 0][where].unique(), 2 * codes[image, k : k + 1])


def test_codes_of_the_student_stage_are_evenly_spaced_around_zero():
    codes = fixed_codes(21)
    assert len(codes) == 22 and codes[0] == pytest.approx(-1.1) and codes[11] == 0 and codes[-1] == pytest.approx(1.0)
    torch.testing.assert_close(codes.diff(), torch.full((21,), 0.1))


def test_codes_are_drawn_again_for_each_image_and_each_draw():
    given, channel = batch(), Channel(config(), 3)
    first, second = (channel.random(given["input"], given["label"])[:, 3] for _ in range(2))
    of_ground = [[x[i][given["label"][i] == 0].mean().item() for i in range(4)] for x in (first, second)]
    assert len({round(v, 3) for row in of_ground for v in row}) == 8
    assert torch.equal(channel.random(given["input"], given["label"])[:, :3], given["input"])


def test_a_channel_of_zeros_leaves_the_network_as_it_was():
    plain, wide, images = network().eval(), with_label_channel(network(), 3).eval(), batch()["input"]
    padded = F.pad(images, (0, 0, 0, 0, 0, 1))
    torch.testing.assert_close(wide(padded).logits, plain(images).logits)
    shapes = {k: v.shape for k, v in plain.state_dict().items()}
    changed = {k for k, v in wide.state_dict().items() if v.shape != shapes[k]}
    assert changed == {"segformer.stages.0.patch_embeddings.proj.weight"}


# ---- the losses ----------------------------------------------------------------------------------------------------


def test_what_a_channel_adds_everywhere_does_not_count_and_positions_may_be_exchanged():
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    loss = channelwise_divergence(student, teacher)
    torch.testing.assert_close(channelwise_divergence(student + torch.randn(2, 3, 1, 1), teacher), loss)
    torch.testing.assert_close(channelwise_divergence(student.flip(2), teacher.flip(2)), loss)
    assert channelwise_divergence(1e4 * student, teacher).isfinite()
    with pytest.raises(UserError, match=r"\(2, 3, 4, 5\) but the teacher's \(2, 3, 4, 4\)"):
        channelwise_divergence(student, teacher[..., :4])


def test_both_paths_learn_from_their_disagreement():
    first, second = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    consistency_loss(first, second).backward()
    assert first.grad.abs().sum() > 0 and second.grad.abs().sum() > 0
    assert consistency_loss(first, first.detach()).item() == pytest.approx(0, abs=1e-6)


def test_images_without_a_label_cost_nothing():
    maps = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = pixel_loss(maps, torch.full((2, 8, 8), IGNORED))
    loss.backward()
    assert loss == 0 and maps.grad.isfinite().all()


def test_an_auxiliary_head_counts_by_its_weight():
    main, aux, labels = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 8, 8))
    together = task_loss(Maps(main, aux), labels, 0.4)
    torch.testing.assert_close(together, pixel_loss(main, labels) + 0.4 * pixel_loss(aux, labels))


# ---- the stages ----------------------------------------------------------------------------------------------------


def inputs_of(module: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    return seen


def test_the_label_reaches_the_teacher_and_never_the_student():
    given, options = batch(), config()
    student, teacher = network(), with_label_channel(network(1), 3)
    of_student, of_teacher = inputs_of(student), inputs_of(teacher)
    module = StudentTraining(student, teacher, TASK, Channel(options, 3), options)
    module.build(given)
    module.train()
    terms = module(given, SPAN)
    terms["loss"].backward()
    assert len(of_student) == len(of_teacher) == 1 and torch.equal(of_student[0], given["input"])
    assert of_teacher[0].shape[1] == 4 and of_teacher[0][:, 3].std() > 0
    assert set(terms) == {"loss", "ce", "channelwise"} and not teacher.training
    assert all(p.grad is None for p in teacher.parameters()) and not any("teacher" in k for k in module.state_dict())
    other = {**given, "label": given["label"].roll(1, 0)}
    torch.manual_seed(0)
    module(other, SPAN)
    assert torch.equal(of_student[1], of_student[0]), "other labels, the same input"


def test_a_teacher_of_images_alone_sees_zeros_once():
    given, options = batch(), config(teacher={"labels": False})
    teacher = with_label_channel(network(1), 3)
    seen = inputs_of(teacher)
    terms = TeacherTraining(teacher, TASK, Channel(options, 3), options)(given, SPAN)
    assert set(terms) == {"loss", "ce"} and len(seen) == 1 and not seen[0][:, 3].any()


def test_the_dual_path_shows_one_image_under_two_channels():
    given, options = batch(), config()
    teacher = with_label_channel(network(1), 3)
    seen = inputs_of(teacher)
    terms = TeacherTraining(teacher, TASK, Channel(options, 3), options)(given, SPAN)
    assert torch.equal(seen[0][:, :3], seen[1][:, :3]) and not torch.allclose(seen[0][:, 3], seen[1][:, 3])
    torch.testing.assert_close(terms["loss"], terms["ce"] + 5 * terms["consistency"])


def test_mistakes_get_a_sentence():
    given, options = batch(), config()
    with pytest.raises(UserError, match="label_stride: 1"):
        strided = {**given, "label": given["label"][:, ::4, ::4]}
        StudentTraining(network(), None, TASK, Channel(options, 3), options)(strided, SPAN)
    with pytest.raises(UserError, match="no convolution of Sequential takes 3 channels"):
        with_label_channel(nn.Sequential(nn.Linear(4, 4)), 3)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey noise: the image says nothing, and the label everything."""
    base, draw = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for side in ("images", "labels"):
            (base / split / side).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((32, 32), np.uint8)
            mask[: draw.integers(8, 16)] = 2
            Image.fromarray(draw.integers(0, 255, (32, 32, 3), np.uint8)).save(base / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(base / split / "labels" / f"{i}.png")
    return base


def test_a_recipe_trains_both_and_leaves_a_network_of_three_channels(scenes: Path, tmp_path: Path):
    train = {"epochs": 1, "batch_size": 4, "optimizer": {"name": "adamw", "lr": 1e-3}}
    data = {"name": f"masks:{scenes}", "options": {"classes": ["ground", "thing", "sky"], "ignore": 255}}
    tree = {"method": "lad", "data": data, "student": MODEL, "teacher": {"train": train}, "train": train}
    figures = execute(recipe.validate(tree), tmp_path / "run", cpu=True)
    wanted = {"miou", "miou_teacher", "miou_teacher_fixed", "miou_teacher_permuted"}
    assert wanted <= set(figures) and wanted <= set(json.loads((tmp_path / "run" / "evaluation.json").read_text()))
    product = load_product(tmp_path / "run")
    assert product.module.segformer.stages[0].patch_embeddings.proj.in_channels == 3
    image = torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8)
    assert product.predict([image])[0]["classes"].shape == (32, 32)

"""MaKD: where answers come from, the widened head and its cutting, the terms, and the errors a user meets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stillhouse import catalog
from stillhouse.config.specs import ModelSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.methods.classification.makd.aspects import AspectsSpec, aspect_probs, read_answers
from stillhouse.methods.classification.makd.image_text import ImageText
from stillhouse.methods.classification.makd.method import (
    AspectClassifier,
    Aspects,
    WidenedClassifier,
    aspect_loss,
    strip_aspects,
)
from stillhouse.models import build
from stillhouse.objectives.ce import CrossEntropy, cross_entropy
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.run import Run

ANSWERS = {
    "Does it hold a loop?": [0, 6, 8, 9],
    "Is it open to the left?": [2, 3, 5, 7],
    "Is it a number?": list(range(10)),
}
SHAPE = (1, 8, 8)


def config(**aspects: object) -> dict[str, object]:
    return {
        "method": "makd",
        "data": {"name": "digits", "size": 40, "augment": "plain"},
        "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
        "aspects": aspects or {"annotated": {"answers": ANSWERS}},
        "train": {"epochs": 1, "batch_size": 20},
    }


def table_of(**aspects: object) -> tuple[list[str], Tensor]:
    from stillhouse.methods.classification.makd.aspects import aspect_table

    valid = recipe.validate(config(**aspects))
    return aspect_table(valid.aspects, valid.data, Run(None, valid, cpu=True))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))


def test_yes_probability_is_the_sigmoid_of_the_difference_even_in_half_precision() -> None:
    yes_no = torch.randn(3, 4, 2)
    torch.testing.assert_close(aspect_probs(yes_no), torch.sigmoid(yes_no[..., 0] - yes_no[..., 1]))
    assert aspect_probs(torch.tensor([30.0, 20.0]).bfloat16()) < 1


def test_the_gradient_of_an_aspect_logit_is_its_error_over_all_entries() -> None:
    u, a = torch.randn(4, 6, requires_grad=True), torch.rand(4, 6)
    aspect_loss(u, a).backward()
    torch.testing.assert_close(u.grad, (torch.sigmoid(u.detach()) - a) / 24)


def test_the_least_aspect_loss_is_the_entropy_of_the_answers() -> None:
    a = torch.rand(4, 6).clamp(0.01, 0.99)
    entropy = -(a * a.log() + (1 - a) * (1 - a).log()).mean()
    torch.testing.assert_close(aspect_loss(torch.logit(a), a), entropy)


def test_class_losses_see_the_class_logits_alone() -> None:
    network = build(ModelSpec(model="stillhouse:mlp", options={"widths": [8]}), 5 + 7, SHAPE)
    batch = {"input": torch.randn(4, *SHAPE), "label": torch.tensor([0, 1, 2, 4]), "index": torch.tensor([3, 0, 2, 5])}
    answers = torch.rand(6, 7)
    terms = Distillation(
        WidenedClassifier(network, 5), None, [CrossEntropy(), (Aspects(answers), 20.0)], embedding="network.fc"
    ).build(batch)(batch, Progress())
    out = network(batch["input"])
    torch.testing.assert_close(terms["ce"], cross_entropy(out[:, :5], batch["label"]))
    torch.testing.assert_close(terms["loss"], terms["ce"] + 20 * aspect_loss(out[:, 5:], answers[batch["index"]]))


@pytest.mark.parametrize("name", ["mlp", "resnet8", "mobilenet_v2"])
def test_stripping_leaves_the_class_logits_as_they_were(name: str) -> None:
    network = build(ModelSpec(model=f"stillhouse:{name}"), 5 + 7, (1, 16, 16)).eval()
    x = torch.randn(2, 1, 16, 16)
    before = network(x)[:, :5]
    stripped = strip_aspects(network, 5, {"input": x})
    torch.testing.assert_close(stripped(x), before)
    build(ModelSpec(model=f"stillhouse:{name}"), 5, (1, 16, 16)).load_state_dict(stripped.state_dict())


def test_a_run_leaves_a_plain_student_or_one_that_answers(tmp_path: Path) -> None:
    execute(recipe.validate(config()), tmp_path / "plain", cpu=True)
    plain = load_product(tmp_path / "plain")
    assert plain.module(torch.randn(2, *SHAPE)).shape == (2, 10)
    figures = execute(recipe.validate({**config(), "keep_aspects": True}), tmp_path / "kept", cpu=True)
    kept = load_product(tmp_path / "kept")
    assert isinstance(kept, AspectClassifier) and kept.questions == list(ANSWERS) and 0 <= figures["accuracy"] <= 1
    x = torch.randn(2, *SHAPE)
    assert kept.module(x).shape == (2, 10) and kept.module.aspect_probs(x).shape == (2, 3)
    torch.testing.assert_close(kept.module(x), plain.module(x))


def test_a_small_image_and_text_model_answers_in_place_of_a_large_one(tmp_path: Path) -> None:
    train = {"epochs": 3, "batch_size": 64, "optimizer": {"name": "adamw", "lr": 1e-2}}
    source = {
        "answers": ANSWERS,
        "network": {"model": "stillhouse:mlp", "options": {"widths": [32]}},
        "dim": 16,
        "train": train,
        "data": "digits",
    }
    valid = recipe.validate(config(trained=source))
    execute(valid, tmp_path / "run", cpu=True)
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["annotator"]["answers_right"] > 0.85
    assert record["aspects"]["Is it a number?"]["variance"] < record["aspects"]["Does it hold a loop?"]["variance"]


def test_questions_of_a_file_are_asked_once_a_line(tmp_path: Path) -> None:
    file = tmp_path / "questions.txt"
    file.write_text("  Is it open to the left? \n\nDoes it hold a loop?\n")
    asked, answers = table_of(questions=str(file), annotated={"answers": ANSWERS, "flip": 0.0, "confidence": 1.0})
    assert asked == ["Is it open to the left?", "Does it hold a loop?"]
    assert answers.shape == (40, 2) and set(answers.flatten().tolist()) == {0.0, 1.0}


def test_questions_that_tell_nothing_are_dropped_and_rows_permuted() -> None:
    noiseless = {"answers": ANSWERS, "flip": 0.0}
    asked, answers = table_of(annotated=noiseless, drop_below=0.01)
    assert asked == list(ANSWERS)[:2]
    _, permuted = table_of(annotated=noiseless, drop_below=0.01, permute=True)
    assert not torch.equal(permuted, answers) and torch.equal(permuted.sort(0).values, answers.sort(0).values)


def test_a_model_answers_a_question_the_same_whatever_else_is_asked() -> None:
    model, x = ImageText(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), 8), torch.randn(2, *SHAPE)
    assert model(x, ["Is it red?", "Has it wings?"]).shape == (2, 2, 2)
    torch.testing.assert_close(model(x, ["Is it red?", "Has it wings?"])[:, 1], model(x, ["Has it wings?"])[:, 0])


def test_answers_are_read_from_json_and_safetensors_alike(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    yes_no = torch.randn(3, 2, 2)
    save_file({"yes_no": yes_no}, str(tmp_path / "a.safetensors"))
    (tmp_path / "a.json").write_text(json.dumps({str(i): row for i, row in enumerate(aspect_probs(yes_no).tolist())}))
    torch.testing.assert_close(
        read_answers(str(tmp_path / "a.json"), 3, 2), read_answers(str(tmp_path / "a.safetensors"), 3, 2)
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"0": [0, 1], "2": [0, 1]}, "image '1' has no answers"),
        ({"0": [0, 1], "1": [0], "2": [0, 1]}, "image '1' has 1 answers to 2 questions"),
        ({"0": [0, 1], "1": [0, 1], "2": [0, 1.5]}, "an answer for image '2' is not a number from 0 to 1"),
        ({"0": [0, 1], "1": [0, float("nan")], "2": [0, 1]}, "an answer for image '1' is not a number from 0 to 1"),
        ({"0": [0, 1], "1": [0, 1], "2": [0, 1], "3": [0, 1]}, "it holds 4 images"),
    ],
)
def test_wrong_answers_name_the_image(tmp_path: Path, rows: dict[str, list[float]], said: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=said):
        read_answers(str(tmp_path / "a.json"), 3, 2)


def test_wrong_recipes_are_told_in_a_sentence() -> None:
    with pytest.raises(UserError, match="exactly one of file, vision_language, trained, annotated"):
        recipe.validate(config(questions=["Is it?"]))
    with pytest.raises(UserError, match="cutmix must be 0"):
        recipe.validate({**config(), "data": {"name": "digits", "mixup": 0.2}})
    with pytest.raises(UserError, match=r"no class .*'ten'"):
        table_of(annotated={"answers": {"Is it?": ["ten"]}})
    with pytest.raises(UserError, match="asked twice"):
        AspectsSpec(questions=["Is it?", " Is it? "], file="x").questions_asked()
    assert catalog.card("makd").kind == "method"


def test_a_vision_language_model_on_disk_answers_by_its_first_token(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from stillhouse.methods.classification.makd.vision_language import token_id

    words = ["<unk>", "<pad>", "<image>", "Yes", "No", "Does", "it", "hold", "a", "loop", "?", "Is", "open"]
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "additional_special_tokens": ["<image>"]}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)
    sight = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=1,
    )
    llava = transformers.LlavaConfig(
        vision_config=sight, text_config=text, image_token_index=2, vision_feature_layer=-1
    )
    transformers.LlavaForConditionalGeneration(llava).save_pretrained(tmp_path / "vlm")
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    transformers.LlavaProcessor(images, tokenizer, **options).save_pretrained(tmp_path / "vlm")

    valid = recipe.validate(
        {**config(questions=["Does it hold a loop?", "Is it open?"], vision_language={"path": str(tmp_path / "vlm")})}
    )
    execute(valid, tmp_path / "run", cpu=True)
    record = json.loads((tmp_path / "run" / "environment.json").read_text())["aspects"]
    assert 0 < record["Is it open?"]["mean"] < 1 and record["Is it open?"] != record["Does it hold a loop?"]
    with pytest.raises(UserError, match="one token"):
        token_id(tokenizer, "Perhaps")

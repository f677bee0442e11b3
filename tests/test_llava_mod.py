"""LLaVA-MoD: what is distilled, what is preferred, where tokens go; questions of images; a run of all stages."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import stillhouse
from stillhouse.config.specs import DataSpec, ModelSpec
from stillhouse.data import load
from stillhouse.data.dataset import BatchKey
from stillhouse.errors import UserError
from stillhouse.functional.counting import IGNORED
from stillhouse.methods.image_text.llava_mod import (
    AnswerTraining,
    Preference,
    PreferenceTraining,
    answer_log_probs,
    as_it_is,
    balance_loss,
    distilled_places,
    mimic_loss,
    preference_loss,
    scores,
    train_only,
)
from stillhouse.models.visual_language import VisualLanguage
from stillhouse.nn.experts import MixtureOfExperts, capacity_of, mixed, mixtures, sparse_layers, top2
from stillhouse.runs import recipe
from stillhouse.runs.products import load_product
from stillhouse.signals import Batch
from stillhouse.tasks.visual_text import VisualText
from stillhouse.training.context import Progress

ROOT = Path(__file__).parents[1]
DECODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
OPTIONS = {"decoder": {**DECODER, "num_key_value_heads": 1}, "tower": TOWER}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- what is distilled -----------------------------------------------------------------------------------------------


def test_a_mimic_is_best_where_it_agrees_and_padded_columns_do_not_count() -> None:
    teacher, counts = random(2, 5, 7), torch.tensor([[1, 1, 0, 0, 1]] * 2).bool()
    student = teacher.clone().requires_grad_()
    mimic_loss(student, teacher, counts).backward()
    assert student.grad is not None and student.grad.abs().amax() < 1e-6
    plain = mimic_loss(random(2, 5, 7, seed=1), teacher, counts)
    padded = F.pad(random(2, 5, 7, seed=1), (0, 4), value=9.0)
    torch.testing.assert_close(mimic_loss(padded, teacher, counts), plain)
    masked = random(2, 5, 7, seed=1)
    masked[..., 3] = -torch.inf
    assert torch.isfinite(mimic_loss(masked, teacher.index_fill(-1, torch.tensor([3]), -torch.inf), counts))
    assert mimic_loss(random(2, 5, 7), teacher, counts & False) == 0


def test_the_place_that_is_distilled_predicts_a_token_of_the_answer() -> None:
    """Changed logits of the teacher at place k move the student at k alone, where the label is the answer's."""
    label = torch.tensor([[IGNORED, 4, 5, IGNORED, IGNORED]])
    assert distilled_places(label).tolist() == [[False, True, True, False, False]]
    assert distilled_places(label, shift=False).tolist() == [[False, False, True, True, False]]
    assert distilled_places(label, everything=True).all()
    moved = []
    for place in range(5):
        teacher = random(1, 5, 7)
        grads = []
        for change in (0.0, 3.0):
            teacher[0, place, 2] += change
            student = random(1, 5, 7, seed=1).requires_grad_()
            mimic_loss(student, teacher, distilled_places(label)).backward()
            grads.append(student.grad)
        moved.append((grads[0] != grads[1]).any(-1)[0].nonzero().flatten().tolist())
    assert moved == [[], [1], [2], [], []]


# ---- preference ------------------------------------------------------------------------------------------------------


def test_preferences_of_the_reference_itself_cost_what_the_card_says() -> None:
    right, wrong = random(6), random(6, seed=1)
    assert float(preference_loss(right, wrong, right, wrong, "dpo")) == pytest.approx(math.log(2))
    assert float(preference_loss(right, wrong, right, wrong)) == pytest.approx(0.5)
    for loss in ("dpo", "kto_pair"):
        better = preference_loss(right + 3, wrong - 3, right, wrong, loss)
        assert (
            better
            < preference_loss(right, wrong, right, wrong, loss)
            < preference_loss(right - 3, wrong + 3, right, wrong, loss)
        )


def test_an_answers_log_probability_is_the_sum_over_its_tokens() -> None:
    logits, label = random(2, 4, 5), torch.tensor([[IGNORED, 3, 1, IGNORED], [IGNORED] * 4])
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(
        answer_log_probs(logits, label), torch.stack([log_p[0, 1, 3] + log_p[0, 2, 1], log_p[0, 0, 0] * 0])
    )


# ---- experts ---------------------------------------------------------------------------------------------------------


def swiglu() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 8))


def test_copies_without_drops_are_the_layer_itself() -> None:
    layer, x = swiglu(), random(3, 5, 8)
    mixture = MixtureOfExperts(layer, 8)
    torch.testing.assert_close(mixture.eval()(x), layer(x))
    assert mixture.balance is None, "the balance is of training alone"
    mixture.factor = 100.0
    torch.testing.assert_close(mixture.train()(x), layer(x))
    assert mixture.dropped == 0
    pointers = {p.data_ptr() for e in mixture.experts for p in e.parameters()}
    assert len(pointers) == 4 * 4, "no expert shares its weights"


def test_balance_is_one_for_even_gates_and_their_number_for_one_expert() -> None:
    even = top2(torch.zeros(12, 4), 12)
    assert float(even.balance) == pytest.approx(1)
    one = top2(torch.tensor([[50.0, 0, 0, 0]] * 12), 12)
    assert float(one.balance) == pytest.approx(4)


def test_who_comes_too_late_is_dropped_and_the_other_expert_has_all_the_weight() -> None:
    logits = torch.tensor([[3.0, 2, 0, -1]] * 5)
    routing = top2(logits, 3)
    assert routing.chosen[:, 0].tolist() == [True] * 3 + [False] * 2
    assert routing.counts.tolist() == [5, 5, 0, 0]
    assert routing.weights.sum(1).tolist() == pytest.approx([1, 1, 1, 0, 0])
    out = mixed(random(5, 8), routing, 3, [swiglu() for _ in range(4)])
    assert (out[3:] == 0).all() and (out[:3] != 0).any()
    spread = top2(torch.tensor([[3.0, 2, 0, -1], [3, 0, 2, -1]]), 1)
    assert spread.weights[1].tolist() == pytest.approx([0, 0, 1, 0]), "its first choice was full"


def test_an_output_in_evaluation_depends_on_no_other_token() -> None:
    mixture = MixtureOfExperts(swiglu(), 8, factor=0.3)
    with torch.no_grad():
        for i, expert in enumerate(mixture.experts):
            for p in expert.parameters():
                p.mul_(1 + i)
    x = random(1, 6, 8)
    mixture.eval()
    together, alone = mixture(x), torch.cat([mixture(x[:, i : i + 1]) for i in range(6)], 1)
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together, mixture(x))
    assert capacity_of(1, 4, 1.5) == 1


def test_the_router_learns_by_weights_and_balance() -> None:
    mixture = MixtureOfExperts(swiglu(), 8)
    mixture(random(2, 6, 8)).sum().backward(retain_graph=True)
    assert mixture.router.weight.grad is None or mixture.router.weight.grad.abs().amax() < 1e-5, "equal experts"
    assert mixture.balance is not None
    mixture.balance.backward()
    assert mixture.router.weight.grad is not None and mixture.router.weight.grad.abs().sum() > 0
    with pytest.raises(UserError, match="two experts"):
        MixtureOfExperts(swiglu(), 8, experts=1)
    with pytest.raises(UserError, match="mode"):
        sparse_layers(4, "every")


# ---- data and networks -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, and images with masks of three."""
    place, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, shade in (("cat", 40), ("dog", 200)):
        (place / "labelled" / "train" / name).mkdir(parents=True)
        for i in range(16):
            pixels = draw.integers(0, 40, (16, 16, 3)) + shade
            Image.fromarray(pixels.astype(np.uint8)).save(place / "labelled" / "train" / name / f"{i}.png")
    for part in ("images", "labels"):
        (place / "masks" / "train" / part).mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(place / "masks" / "train" / "images" / f"{i}.png")
        mask = np.zeros((16, 16), np.uint8)
        mask[: 4 + i] = 1 if i % 2 else 2
        Image.fromarray(mask).save(place / "masks" / "train" / "labels" / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def bundle(folder: Path) -> object:
    return load(DataSpec(name=f"questions:imagefolder:{folder / 'labelled'}", image_size=16, augment="plain"))


def batch_of(bundle: object, split: str = "train", train: bool = True, number: int = 6, epoch: int = 0) -> Batch:
    return bundle.dataset(split, train=train).batch(BatchKey(epoch, np.arange(number), 0, number), 0)  # type: ignore[attr-defined]


def network(bundle: object, seed: int = 0, **options: object) -> VisualLanguage:
    torch.manual_seed(seed)
    return bundle.task.build(ModelSpec(model="stillhouse:visual_language", options={**OPTIONS, **options}))  # type: ignore[attr-defined,no-any-return]


def spoken(task: VisualText, batch: Batch, row: int, wrong: bool = False) -> tuple[str, str]:
    """Prompt and answer of a sample, read off ids and labels."""
    ids = (batch["wrong"] if wrong else batch["input"])["input_ids"][row]
    label = batch["wrong_label" if wrong else "label"][row]
    start = int((label != IGNORED).long().argmax()) + 1
    assert torch.equal(label[:-1][label[:-1] != IGNORED], ids[1:][label[:-1] != IGNORED]), "labels are what follows"
    return task.tokenizer.decode(ids[:start]).strip(), task.tokenizer.decode(
        label[label != IGNORED], skip_special_tokens=True
    )


def test_answers_follow_from_labels_and_wrong_ones_differ(bundle: object) -> None:
    dataset, task = bundle.dataset("train", train=True), bundle.task  # type: ignore[attr-defined]
    batch, kinds = batch_of(bundle, number=20), set()
    for row in range(20):
        own = task.classes[next(iter(dataset.contents[row].there))]
        prompt, answer = spoken(task, batch, row)
        _, wrong = spoken(task, batch, row, wrong=True)
        kinds.add(int(batch["kind"][row]))
        assert answer != wrong
        if prompt.startswith("is there"):
            assert (answer == "yes") == (own in prompt) == (not batch["denied"][row])
        else:
            assert own in answer and own not in wrong and not batch["denied"][row]
    assert kinds == {0, 1, 2}
    again, later = batch_of(bundle, number=20), batch_of(bundle, number=20, epoch=1)
    assert torch.equal(batch["label"], again["label"]) and not torch.equal(batch["label"], later["label"])


def test_scenes_have_captions_of_what_covers_most_and_no_names(folder: Path) -> None:
    spec = DataSpec(
        name=f"questions:masks:{folder / 'masks'}",
        image_size=16,
        options={"names": ["sky", "road", "car"], "options": {"classes": ["a", "b", "c"]}},
    )
    found = load(spec)
    assert found.task.kinds == ("caption", "presence")
    dataset = found.dataset("train", train=False)
    assert all(set(c.shown) <= c.there and 0 in c.there for c in dataset.contents)
    batch = dataset.batch(BatchKey(0, np.arange(2), 0, 2), 0)
    prompt, answer = spoken(found.task, batch, 0)
    assert prompt == "describe the image :" and " and " in answer
    assert found.task.named("sky , road .") == [0, 1]
    with pytest.raises(UserError, match="name"):
        load(spec.model_copy(update={"options": {**spec.options, "kinds": ["name"]}}))


def test_padding_and_other_rows_change_no_logits_and_known_patches_are_used(bundle: object) -> None:
    net, batch = network(bundle).eval(), batch_of(bundle)
    with torch.no_grad():
        whole = net(**batch["input"])
        short = {k: v[:2, :12] if k != "pixel_values" else v[:2] for k, v in batch["input"].items()}
        torch.testing.assert_close(net(**short), whole[:2, :12], rtol=1e-4, atol=1e-5)
        patches = net.patches(batch["input"]["pixel_values"])
        assert patches.shape == (6, 4, 16) and net.places == 4
        torch.testing.assert_close(net(**batch["input"], patches=patches), whole)
        other = {**batch["input"], "pixel_values": batch["input"]["pixel_values"].flip(0)}
        assert not torch.allclose(net(**other), whole)


def test_what_is_written_is_judged_as_the_meter_judges(bundle: object) -> None:
    """An answer is exact where every token is the most probable: then the network writes it by itself."""
    net, task, batch = network(bundle).eval(), bundle.task, batch_of(bundle, train=False)  # type: ignore[attr-defined]
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    module = AnswerTraining(net, None, task)
    for _ in range(60):
        optimizer.zero_grad()
        module(batch, Progress())["loss"].backward()
        optimizer.step()
    meter = task.meter(task.groups)
    with torch.no_grad():
        meter.add(batch, task.read(task.call(net, batch), batch))
    figures = meter.figures()
    assert figures["exact"] == 1 and figures["invented"] == 0
    for row in range(6):
        prompt, answer = spoken(task, batch, row)
        assert task.write(net, batch["input"]["pixel_values"][row : row + 1], prompt) == [answer.strip()]


def test_stages_train_what_they_should_and_the_tower_never_moves(bundle: object) -> None:
    task, batch = bundle.task, batch_of(bundle)  # type: ignore[attr-defined]
    teacher, student = network(bundle, 1), network(bundle, 0, experts=4)
    student.tower.load_state_dict(teacher.tower.state_dict())
    before = {k: v.clone() for k, v in student.state_dict().items()}
    theirs = {k: v.clone() for k, v in teacher.state_dict().items()}
    expected = {"projector": ("projector.",), "mlp": (".mlp.",), "mlp_and_projector": ("projector.", ".mlp.")}
    for parts, names in expected.items():
        student.load_state_dict(before)
        train_only(student, parts)
        module = AnswerTraining(student, teacher, task, "kd_lm", 0.01).train()
        module.build(batch)
        optimizer = torch.optim.AdamW(module.param_groups(), lr=0.1)
        terms = module(batch, Progress())
        terms["loss"].backward()
        optimizer.step()
        moved = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
        assert moved and all(any(n in k for n in names) for k in moved), parts
        assert {"mimic", "ce", "balance", "dropped"} <= set(terms)
    assert all(torch.equal(v, theirs[k]) for k, v in teacher.state_dict().items())


def test_preference_distillation_raises_the_margin(bundle: object) -> None:
    task, batch = bundle.task, batch_of(bundle)  # type: ignore[attr-defined]
    teacher = network(bundle)
    student = copy.deepcopy(teacher)
    for loss in ("kto_pair", "dpo"):
        module = PreferenceTraining(student, teacher, task, Preference(loss=loss), 0.01).train()
        module.build(batch)
        optimizer = torch.optim.Adam(module.param_groups(), lr=3e-3)
        first = last = 0.0
        for step in range(6):
            optimizer.zero_grad()
            terms = module(batch, Progress())
            terms["loss"].backward()
            optimizer.step()
            first, last = (
                (float(terms["preference"].detach()) if step == 0 else first),
                float(terms["preference"].detach()),
            )
        assert last < first
    with torch.no_grad():
        patches = student.patches(batch["input"]["pixel_values"])
        margin = [
            scores(n, task, batch, patches, False) - scores(n, task, batch, patches, True) for n in (student, teacher)
        ]
    assert margin[0].mean() > margin[1].mean()
    with pytest.raises(UserError, match="wrong answer"):
        module.build({k: v for k, v in batch.items() if k != "wrong"})


def test_balance_is_that_of_the_last_forward_pass(bundle: object) -> None:
    net, batch = network(bundle, experts=4).train(), batch_of(bundle)
    like = torch.zeros(())
    assert balance_loss(net, like) == 0
    net(**batch["input"])
    assert len(list(mixtures(net))) == 1 and balance_loss(net, like) >= 1 - 1e-5
    net.eval()(**batch["input"])
    assert balance_loss(net, like) == 0


CHATS = [
    {
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is it ?"},
            {"from": "gpt", "value": "a cat"},
            {"from": "human", "value": "is it red ?"},
            {"from": "gpt", "value": "no"},
        ],
    },
    {"image": "a.png", "question": "what is it ?", "chosen": "a cat", "rejected": "a red dog"},
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("chats")
    Image.new("RGB", (20, 12), (90, 0, 0)).save(place / "a.png")
    for name, record in zip(("talk", "pairs"), CHATS):
        (place / f"{name}.json").write_text(json.dumps([record] * 8))
    return place


def test_conversations_learn_answers_alone_and_pairs_have_a_wrong_one(chats: Path) -> None:
    spec = DataSpec(name=f"visual_chat:{chats / 'talk.json'}", image_size=16, options={"tokenizer": "bytes"})
    found = load(spec)
    batch = batch_of(found, number=2)
    task, label = found.task, batch["label"][0]
    assert task.tokenizer.decode(label[label != IGNORED]) == "a cat<eos>no<eos>"
    ids = batch["input"]["input_ids"][0]
    assert torch.equal(ids[1:][label[:-1] != IGNORED], label[label != IGNORED])
    assert task.tokenizer.decode(ids, skip_special_tokens=True).startswith("USER: what is it ? ASSISTANT: a cat")
    assert batch["input"]["pixel_values"].shape == (2, 3, 16, 16) and "wrong" not in batch
    pairs = load(spec.model_copy(update={"name": f"visual_chat:{chats / 'pairs.json'}"}))
    batch = batch_of(pairs, number=2)
    wrong = batch["wrong_label"][0]
    assert pairs.task.tokenizer.decode(wrong[wrong != IGNORED]) == "a red dog<eos>"
    (chats / "broken.json").write_text(json.dumps([{"image": "a.png"}]))
    with pytest.raises(UserError, match="chosen"):
        load(spec.model_copy(update={"name": f"visual_chat:{chats / 'broken.json'}"}))
    with pytest.raises(UserError, match="image_size"):
        load(spec.model_copy(update={"image_size": None}))


def test_a_decoder_from_a_folder_is_in_the_product_by_its_config(bundle: object, tmp_path: Path) -> None:
    import transformers

    config = transformers.Qwen2Config(**OPTIONS["decoder"], vocab_size=bundle.task.vocabulary + 3)  # type: ignore[attr-defined]
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    net = network(bundle, decoder={"model": f"hf:{tmp_path / 'qwen'}"})
    batch = batch_of(bundle)
    task = bundle.task  # type: ignore[attr-defined]
    assert task.read(task.call(net, batch), batch).logits.shape[-1] == task.vocabulary, "padded rows are cut off"
    spec = ModelSpec(
        model="stillhouse:visual_language", options={**OPTIONS, "decoder": {"model": f"hf:{tmp_path / 'qwen'}"}}
    )
    plain = as_it_is(spec, net)
    shutil.rmtree(tmp_path / "qwen")
    task.build(plain).load_state_dict(net.state_dict())
    few = {**OPTIONS["decoder"], "vocab_size": 10}
    with pytest.raises(UserError, match="tokens"):
        network(bundle, decoder=few)


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_mixture_that_writes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    labelled = f"imagefolder:{folder / 'labelled'}"
    questions = {"name": f"questions:{labelled}", "image_size": 16, "augment": "plain", "options": {}}
    changed = {
        "data": {**questions, "label_noise": 0.2},
        "teacher.data": questions,
        "preference.data": questions,
        "captions": {**questions, "options": {"kinds": ["caption"]}},
        "tower.data": {"name": f"captions:{labelled}", "image_size": 16, "augment": "plain"},
    }
    trains = (
        "tower.train",
        "teacher.align",
        "teacher.train",
        "align",
        "dense.train",
        "sparse.train",
        "preference.train",
    )
    changed |= {f"{name}.batch_size": 8 for name in trains}
    path = ROOT / "recipes" / "image_text" / "llava_mod.yaml"
    config = recipe.load(path, "smoke", changed)
    figures = stillhouse.run_recipe(config.model_dump(mode="json"), tmp_path / "run", progress=False, cpu=True)
    assert {"exact", "invented", "margin_over_teacher", "expert_balance", "exact_teacher"} <= set(figures)
    product = load_product(tmp_path / "run")
    assert len(list(mixtures(product.module))) == 1
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    assert isinstance(product.predict([image])[0]["text"], str)
    stages = {p.name.partition("-")[0] for p in (tmp_path / "cache" / "stages").iterdir() if p.is_dir()}
    assert stages == {"teacher", "large", "adaptor", "dense", "sparse"}
    assert product.predict([image]) == load_product(tmp_path / "run").predict([image])

"""Language models as teachers and students: what a recipe trains and leaves, the student's own writing, the teacher's,
and judging by tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stillhouse
from stillhouse import Progress
from stillhouse.config.specs import DataSpec, ModelSpec
from stillhouse.data import BatchKey, load
from stillhouse.data.text import TextBundle
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.teachers import StoredTeacher
from stillhouse.errors import UserError
from stillhouse.evaluation.judge import judge
from stillhouse.functional.counting import IGNORED
from stillhouse.methods.language.on_policy import OnPolicyDistillation
from stillhouse.methods.language.sequence_kd import given, rewritten_rows, written
from stillhouse.models.tokenizer import size
from stillhouse.models.writing import Generation, TextWriter
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.signals import call_model, read_logits

pytest.importorskip("transformers", reason="transformers is not installed")
VERSES = [
    "roses are red",
    "violets are blue",
    "sugar is sweet",
    "and so are you",
    "the rose is red",
    "the violet is blue",
    "honey is sweet",
    "so you are",
]
GPT2 = {"n_layer": 1, "n_head": 2, "n_embd": 16}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
FAST = {"epochs": 1, "batch_size": 4, "optimizer": {"name": "adamw", "lr": 0.01}}


def questions() -> list[dict[str, str]]:
    return [{"prompt": v[: len(v) // 2], "completion": v[len(v) // 2 :]} for v in VERSES] * 2


@pytest.fixture
def file(tmp_path: Path) -> Callable[[list[dict[str, Any]]], str]:
    def write(records: list[dict[str, Any]]) -> str:
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        return f"text:{path}"

    return write


def bundle_of(name: str, **options: Any) -> TextBundle:
    return load(DataSpec(name=name, options={"tokenizer": "bytes", "context": 32, **options}))


def net(bundle: TextBundle, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    kind = "t5" if bundle.task.kind == "seq2seq" else "gpt2"
    return bundle.task.build(
        ModelSpec(model=f"hf:config:{kind}", options={**(T5 if kind == "t5" else GPT2), **options})
    ).eval()


def first_batch(bundle: TextBundle, count: int = 4) -> Any:
    return bundle.dataset("train").batch(BatchKey(0, np.arange(count), 0, count), 0)


def writer(bundle: TextBundle, **how: Any) -> TextWriter:
    return TextWriter(
        bundle.task.tokenizer,
        bundle.task.kind,
        bundle.task.context,
        Generation(**{"max_new_tokens": 6, **how}),
        size(bundle.task.tokenizer),
    )


class Forward(stillhouse.Objective):
    """KL(teacher || student) over counted tokens."""

    name = "forward"
    positions = True
    needs = frozenset({"student.logits", "teacher.logits"})

    def forward(self, student: Any, teacher: Any, batch: Any, progress: Any) -> dict[str, Tensor]:
        rows = F.kl_div(student.logits.log_softmax(-1), teacher.log_probs(), reduction="none", log_target=True).sum(-1)
        return {"loss": rows[batch["label"] != IGNORED].mean()}


# ---- recipes ---------------------------------------------------------------------------------------------------------


def run(tmp_path: Path, data: Any, **keys: Any) -> tuple[dict[str, float], Any]:
    tree = {
        "data": data,
        "teacher": {"model": "hf:config:gpt2", "options": GPT2, "train": FAST},
        "student": {"model": "hf:config:gpt2", "options": GPT2},
        "objectives": [{"name": "ce", "weight": 0.5}, {"name": "kd", "weight": 0.5, "temperature": 1}],
        "train": FAST,
        **keys,
    }
    figures = execute(recipe.validate(tree), tmp_path / "run", cpu=True)
    return figures, stillhouse.load_product(tmp_path / "run")


def text_data(name: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "options": {"tokenizer": "bytes", "context": 32, **options}}


def test_a_recipe_leaves_a_language_model_that_transformers_loads_too(file: Any, tmp_path: Path) -> None:
    import transformers

    figures, product = run(tmp_path, text_data(file(questions())))
    assert figures["perplexity"] == pytest.approx(math.exp(figures["nll"])) and 0 <= figures["accuracy"] <= 1
    place = tmp_path / "run" / "product" / "model"
    assert (place / "model.safetensors").exists() and not list(place.rglob("*.bin"))
    theirs, tokens = (
        transformers.AutoModelForCausalLM.from_pretrained(place),
        transformers.AutoTokenizer.from_pretrained(place),
    )
    ids = torch.tensor([tokens("roses")["input_ids"]])
    assert torch.allclose(theirs(ids).logits, product.module(ids).logits)
    told = product.task.generate(product.module, ["roses are", "", "x" * 100], max_new_tokens=5, do_sample=False)
    assert (
        len(told) == 3
        and told[0] == product.task.generate(product.module, ["roses are"], max_new_tokens=5, do_sample=False)[0]
    )
    assert list(product.predict(["a rose"])[0]) == ["text"]


def test_a_text_classifier_predicts_by_name(file: Any, tmp_path: Path) -> None:
    data = text_data(file([{"text": v, "label": "plant" if "o" in v else "other"} for v in VERSES * 4]))
    encoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = {"model": "hf:config:bert", "options": encoder}
    figures, product = run(tmp_path, data, teacher={**model, "train": FAST}, student=model)
    assert {"accuracy", "nll"} <= figures.keys() and "perplexity" not in figures
    both, one = product.predict(["a rose", "the violet is so very blue"]), product.predict(["a rose"])
    assert both[0]["label"] in ("plant", "other") and sum(both[0]["probs"].values()) == pytest.approx(1, abs=1e-5)
    assert both[0]["probs"]["plant"] == pytest.approx(one[0]["probs"]["plant"], abs=1e-5)
    with pytest.raises(UserError, match="does not write"):
        product.task.generate(product.module, ["a"])
    with pytest.raises(UserError, match="reads 32; shorten it"):
        product.predict(["x" * 40])


@pytest.mark.parametrize(
    "task, kind, options",
    [("masked", "bert", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}), ("seq2seq", "t5", T5)],
)
def test_masked_models_and_encoder_decoders_are_distilled(
    file: Any, tmp_path: Path, task: str, kind: str, options: dict[str, Any]
) -> None:
    model = {"model": f"hf:config:{kind}", "options": options}
    figures, product = run(
        tmp_path, text_data(file(questions()), task=task), teacher={**model, "train": FAST}, student=model
    )
    assert figures["perplexity"] > 1 and product.task.kind == task
    if task == "seq2seq":
        assert isinstance(product.task.generate(product.module, ["roses"], max_new_tokens=4)[0], str)


def test_a_teacher_of_a_folder_teaches(file: Any, tmp_path: Path) -> None:
    data = text_data(file(questions()))
    run(tmp_path / "first", data, teacher=None, objectives=["ce"])
    folder = tmp_path / "first" / "run" / "product" / "model"
    published = {"model": f"hf:{folder}", "pretrained": True}
    run(tmp_path / "as it is", data, teacher=published)
    run(tmp_path / "tuned", data, teacher={**published, "train": FAST})
    facts = {
        name: json.loads((tmp_path / name / "run" / "environment.json").read_text()) for name in ("as it is", "tuned")
    }
    assert facts["as it is"]["weights"] != facts["tuned"]["weights"] and "teachers" in facts["tuned"]


@pytest.mark.parametrize("kept", [{}, {"top": 250}])
def test_a_stored_teacher_teaches_rows_of_unequal_length_as_a_live_one(
    file: Any, tmp_path: Path, kept: dict[str, Any]
) -> None:
    data, objectives = text_data(file(questions())), [{"name": "gkd", "beta": 0.0}]
    teacher = {"model": "hf:config:gpt2", "options": GPT2, "train": FAST}
    live, _ = run(tmp_path / "live", data, teacher=teacher, objectives=objectives)
    stored, _ = run(tmp_path / "stored", data, teacher={**teacher, "store": kept}, objectives=objectives)
    assert stored["nll"] == pytest.approx(live["nll"], abs=0.05 if kept else 1e-5)


# ---- judging ---------------------------------------------------------------------------------------------------------


def test_perplexity_is_over_tokens_whatever_the_batches(file: Any) -> None:
    bundle = bundle_of(file(questions()))
    model, data = net(bundle), bundle.dataset("train")
    losses = []
    for i in range(len(data)):
        batch = data.batch(BatchKey(0, np.array([i]), 0, 1), 0)
        kept = batch["label"] != IGNORED
        losses.append(
            F.cross_entropy(read_logits(call_model(model, batch))[kept], batch["label"][kept], reduction="none")
        )
    expected = torch.cat(losses).mean().item()
    for count in (1, 5):
        batches = [
            data.batch(BatchKey(0, np.arange(i, min(i + count, len(data))), 0, min(count, len(data) - i)), 0)
            for i in range(0, len(data), count)
        ]
        assert judge(bundle.task, model, batches)["nll"] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="no token"):
        judge(bundle.task, model, [{**batch, "label": torch.full_like(batch["label"], IGNORED)}])


# ---- the student's own writing ---------------------------------------------------------------------------------------


def test_the_students_writing_is_what_it_writes_for_each_prompt_alone(file: Any) -> None:
    bundle = bundle_of(file(questions()))
    model, batch, how = net(bundle), first_batch(bundle), writer(bundle, temperature=0.0)
    made = how.rewritten(model, batch)
    for i in range(4):
        label = batch["label"][i]
        given = int((label != IGNORED).int().argmax()) + 1
        prompt = batch["input"]["input_ids"][i, :given]
        alone = model.generate(
            input_ids=prompt[None],
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=bundle.task.tokenizer.eos_token_id,
        )[0]
        counted = made["label"][i] != IGNORED
        assert torch.equal(made["label"][i][counted], alone[given:])
        read = made["input"]["attention_mask"][i].bool()
        assert (
            torch.equal(made["input"]["input_ids"][i][read][: len(alone) - 1], alone[:-1])
            and int(counted.int().argmax()) == given - 1
        )


def test_what_follows_the_end_token_does_not_count(file: Any) -> None:
    bundle = bundle_of(file(questions()))
    model, how = net(bundle), writer(bundle)
    end = bundle.task.tokenizer.eos_token_id

    def write(*args: Any) -> Tensor:
        return torch.tensor([[70, end, 0, 0], [end, 0, 0, 0], [70, 71, 72, 73], [70, 71, end, 0]])

    how.write = write  # type: ignore[method-assign]
    made = how.rewritten(model, first_batch(bundle))
    assert (made["label"] != IGNORED).sum(1).tolist() == [2, 1, 4, 3]
    with torch.no_grad():
        together = read_logits(call_model(model, made))
        for i, read in enumerate(made["input"]["attention_mask"].bool()):
            assert torch.allclose(
                model(made["input"]["input_ids"][i, read][None]).logits[0], together[i, read], atol=1e-5
            )


def test_an_encoder_decoder_reads_back_what_it_wrote(file: Any) -> None:
    bundle = bundle_of(file(questions()), task="seq2seq")
    model, batch = net(bundle), first_batch(bundle)
    made = writer(bundle, temperature=0.0).rewritten(model, batch)
    with torch.no_grad():
        said = read_logits(call_model(model, made)).argmax(-1)
    counted = made["label"] != IGNORED
    assert torch.equal(said[counted], made["label"][counted])


def on_policy(bundle: TextBundle, lmbda: float, objectives: Any = None, **options: Any) -> OnPolicyDistillation:
    module = OnPolicyDistillation(
        net(bundle, 1), net(bundle), objectives or [Forward()], writer=writer(bundle), lmbda=lmbda, **options
    )
    return module.build(first_batch(bundle))  # type: ignore[return-value]


@pytest.mark.parametrize("lmbda, share", [(0.0, 0), (1.0, 20), (0.5, 10)])
def test_lmbda_is_the_share_of_steps_on_the_students_own_writing(file: Any, lmbda: float, share: int) -> None:
    bundle = bundle_of(file(questions()))
    module, rewritten = on_policy(bundle, lmbda, warm_epochs=1), 0
    progress = Progress(epoch=1, epochs=2)
    context = type("Context", (), {"progress": progress})()
    for step in range(20):
        torch.manual_seed(step)
        batch = first_batch(bundle)
        before = batch["label"].clone()
        module.before_step(batch, context)
        rewritten += not (before.shape == batch["label"].shape and torch.equal(before, batch["label"]))
        assert math.isfinite(module(batch, progress)["loss"].item())
    assert abs(rewritten - share) <= (5 if 0 < share < 20 else 0)
    progress.epoch, batch = 0, first_batch(bundle)
    module.before_step(batch, context)
    assert torch.equal(batch["label"], first_batch(bundle)["label"]), "a warm epoch reads the data"


def test_what_the_student_wrote_is_not_weighed_by_how_many_tokens_the_data_had(file: Any) -> None:
    bundle = bundle_of(file(questions()))
    module, progress = on_policy(bundle, 1.0), Progress()
    context = type("Context", (), {"progress": progress})()
    losses = []
    for counts in ({}, {"token_count": torch.tensor(1000.0)}):
        torch.manual_seed(0)
        batch = {**first_batch(bundle), **counts}
        module.before_step(batch, context)
        losses.append(module(batch, progress)["loss"])
    assert torch.equal(*losses)


def test_a_student_is_never_taught_its_own_writing_as_the_truth(file: Any) -> None:
    bundle = bundle_of(file(questions()))
    with pytest.raises(UserError, match="'ce' would teach the student its own writing"):
        on_policy(bundle, 0.5, ["ce", Forward()])
    on_policy(bundle, 0.0, ["ce", Forward()])
    with pytest.raises(UserError, match="is read from a store"):
        OnPolicyDistillation(
            net(bundle),
            StoredTeacher(type("Store", (), {"gives": frozenset({"logits"}), "folder": "f"})()),
            [Forward()],
            writer=writer(bundle),
        )
    with pytest.raises(UserError, match=r"set data.options.pack: false"):
        packed = bundle_of(file(questions()), pack=True)
        writer(packed).rewritten(net(packed), first_batch(packed, 2))
    with pytest.raises(UserError, match="Only causal and seq2seq"):
        TextWriter(bundle.task.tokenizer, "masked", 32, Generation(), 261)


def test_writing_stays_inside_the_context_and_the_vocabulary(file: Any) -> None:
    bundle = bundle_of(file(questions()), context=14, too_long="cut")
    model = net(bundle, vocab_size=400, n_positions=14)
    made = writer(bundle, max_new_tokens=50).rewritten(model, first_batch(bundle))
    assert made["label"].shape[1] <= 14 and int(made["label"].max()) < 261
    full = bundle_of(file([{"prompt": "x" * 14, "completion": "y"}] * 6), context=14, too_long="cut")
    batch = first_batch(full)
    again = writer(full).rewritten(net(full, n_positions=14), batch)
    assert again["label"].shape[1] <= 14 and bool((again["label"] != IGNORED).any(1).all())


# ---- the teacher's writing -------------------------------------------------------------------------------------------


def test_the_teachers_text_becomes_the_students_completions(file: Any) -> None:
    bundle = bundle_of(file(questions()))
    teacher = net(bundle)
    made = written(
        teacher, bundle.task.tokenizer, bundle, Generation(temperature=0.0, max_new_tokens=5), 3, torch.device("cpu")
    )
    prompts = given(bundle, 16)
    assert len(made) == len(prompts) == len(bundle.dataset("train"))
    again = written(
        teacher, bundle.task.tokenizer, bundle, Generation(temperature=1.0, max_new_tokens=5), 3, torch.device("cpu")
    )
    assert again == written(
        teacher, bundle.task.tokenizer, bundle, Generation(temperature=1.0, max_new_tokens=5), 3, torch.device("cpu")
    )
    rows = rewritten_rows(bundle, [("new words", True)] * len(made), 16)
    assert rows.labels is not None
    for i, prompt in enumerate(prompts):
        ids, label = (r.values[r.starts[i] : r.starts[i + 1]] for r in (rows.inputs, rows.labels))
        assert (
            ids[: len(prompt)].tolist() == prompt
            and bundle.task.tokenizer.decode(label[label != IGNORED]) == "new words<eos>"
        )
    both = rewritten_rows(bundle, made, 16, originals=True)
    assert len(both.inputs) == len(prompts) + sum(bool(t) or e for t, e in made)
    with pytest.raises(UserError, match="wrote nothing"):
        rewritten_rows(bundle, [("", False)] * len(made), 16)


def test_a_teacher_with_another_tokenizer_teaches_by_what_it_writes(file: Any, tmp_path: Path) -> None:
    data = text_data(file(questions()))
    teacher = {
        "model": "hf:config:gpt2",
        "options": GPT2,
        "train": FAST,
        "data": text_data(data["name"], tokenizer="bpe:280"),
    }
    with pytest.raises(UserError, match=r"student has 261 tokens and the teacher|tokens do not correspond"):
        run(tmp_path / "kd", {**data, "options": {**data["options"], "tokenizer": "characters"}}, teacher=teacher)
    figures, _ = run(
        tmp_path,
        data,
        method="sequence_kd",
        teacher=teacher,
        objectives=["ce"],
        generation={"max_new_tokens": 8, "temperature": 1.0},
        writing_batch=5,
    )
    facts = json.loads((tmp_path / "run" / "environment.json").read_text())["written"]
    assert math.isfinite(figures["perplexity"]) and facts["samples"] == 15
    own, _ = run(tmp_path / "own", data, method="sequence_kd", teacher=teacher, objectives=["ce"], learn="originals")
    assert (
        own["perplexity"] != figures["perplexity"]
        and "written" not in (tmp_path / "own" / "run" / "environment.json").read_text()
    )


def test_padded_rows_of_the_vocabulary_teach_nothing(file: Any) -> None:
    bundle = bundle_of(file(questions()))
    teacher, student, batch = net(bundle, vocab_size=300), net(bundle, 1, vocab_size=280), first_batch(bundle)
    with torch.no_grad():
        teacher.lm_head.weight[261:] += 10.0
    module = Distillation(student, teacher, [Forward()], task=bundle.task).build(batch)
    loss = module(batch, Progress())["loss"]
    with torch.no_grad():
        p, q = (read_logits(call_model(m, batch))[..., :261].log_softmax(-1) for m in (teacher, student))
    assert torch.allclose(loss, (p.exp() * (p - q)).sum(-1)[batch["label"] != IGNORED].mean(), atol=1e-5)
    with pytest.raises(UserError, match="300 classes and the student 280"):
        Distillation(student, teacher, [Forward()]).build(batch)

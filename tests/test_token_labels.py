"""Token labels stand where their predictions stand, whichever trainer reads the batch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stillhouse
from stillhouse import Distillation, Progress
from stillhouse.data.loader import as_batch
from stillhouse.errors import UserError
from stillhouse.models.token_labels import place, predicts_next

transformers = pytest.importorskip("transformers")
VOCABULARY = 50


def gpt(width: int = 16) -> nn.Module:
    torch.manual_seed(width)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=width, n_layer=1, n_head=2, n_positions=32, **off)
    )


def texts(n: int = 4, length: int = 9) -> dict[str, Tensor]:
    """A batch as transformers' collators make it."""
    ids = torch.randint(3, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(n))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def next_token_loss(student: nn.Module, batch: dict[str, Tensor]) -> float:
    logits = student(input_ids=batch["input_ids"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).item()


def test_a_distillation_shifts_the_labels_of_a_causal_model() -> None:
    student, batch = gpt().eval(), texts()
    module = Distillation(student, gpt(32), ["ce", "kd"]).build(as_batch(batch)).eval()
    assert module(as_batch(batch), Progress())["ce"].item() == pytest.approx(next_token_loss(student, batch), abs=1e-5)
    module.close()


@pytest.mark.parametrize("trainer", ["distill", "lightning", "transformers"])
def test_a_causal_student_learns_the_next_token_under_every_trainer(trainer: str, tmp_path: Path) -> None:
    student, batch, steps = gpt(), texts(), 60
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if trainer == "distill":
            stillhouse.distill(
                None,
                student,
                [batch],
                ["ce"],
                train={"epochs": steps, "optimizer": {"name": "adamw", "lr": 1e-2}},
                progress=False,
            )
        elif trainer == "lightning":
            lightning = pytest.importorskip("lightning.pytorch")
            from stillhouse.integrations.lightning import DistillationModule

            module = DistillationModule(student, None, ["ce"], optimizer={"name": "adamw", "lr": 1e-2})
            quiet = {
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": False,
            }
            loader = torch.utils.data.DataLoader([batch], batch_size=None)
            fitted = lightning.Trainer(accelerator="cpu", max_epochs=steps, default_root_dir=str(tmp_path), **quiet)
            fitted.fit(module, loader, loader)
            assert float(fitted.callback_metrics["val/nll"]) == pytest.approx(
                next_token_loss(student.eval(), batch), abs=1e-4
            )
        else:
            from stillhouse.integrations.transformers import DistillationTrainer

            options = {
                "report_to": [],
                "disable_tqdm": True,
                "use_cpu": True,
                "save_strategy": "no",
                "learning_rate": 1e-2,
                "max_steps": steps,
            }
            arguments = transformers.TrainingArguments(str(tmp_path), per_device_train_batch_size=4, **options)
            rows = [{k: v[i] for k, v in batch.items()} for i in range(4)]
            DistillationTrainer(student, arguments, train_dataset=rows, teachers=None, objectives=["ce"]).train()
    predicted = student.eval()(input_ids=batch["input_ids"]).logits.argmax(-1)
    assert (predicted[:, :-1] == batch["input_ids"][:, 1:]).float().mean() > 0.9
    assert (predicted == batch["input_ids"]).float().mean() < 0.3


@pytest.mark.parametrize("student", ["transformers", "own"])
def test_labels_that_repeat_the_input_are_refused(student: str) -> None:
    """Where nothing says how labels are meant, copies of the input are a mistake."""
    ids = texts()["input_ids"]
    model = gpt() if student == "transformers" else nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY))
    batch = {"input": {"input_ids": ids} if student == "transformers" else ids, "label": ids.clone()}
    with pytest.raises(UserError, match=r"learn to repeat its input.*label\[:, i\] is input_ids\[:, i \+ 1\]"):
        stillhouse.distill(None, model, [batch], ["ce"], train={"epochs": 1}, progress=False)
    same = torch.full((4, 9), 7)
    Distillation(model, None, ["ce"]).build(
        {**batch, "input": {"input_ids": same} if student == "transformers" else same, "label": same}
    ).close()


def test_labels_of_masked_models_and_decoders_stay_where_they_are() -> None:
    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**small))
    labels = texts()["labels"].masked_fill(torch.arange(9) % 3 > 0, -100)
    read = as_batch({"input_ids": texts()["input_ids"], "labels": labels}, bert)
    assert torch.equal(read["label"], labels) and "labels" not in read
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    )
    read = as_batch({"input_ids": texts()["input_ids"], "labels": labels}, t5)
    assert torch.equal(read["label"], labels)
    assert torch.equal(read["input"]["decoder_input_ids"], t5.prepare_decoder_input_ids_from_labels(labels=labels))
    stillhouse.distill(None, t5, [texts()], ["ce"], train={"epochs": 1}, progress=False)


def test_classes_keep_their_key_and_a_batch_is_placed_once() -> None:
    assert "label" in as_batch({"pixel_values": torch.zeros(2, 3), "labels": torch.tensor([0, 1])})
    batch = place(as_batch(texts()), gpt())
    assert torch.equal(place(batch, gpt())["label"][:, :-1], texts()["labels"][:, 1:])


def test_adapters_on_a_causal_model_predict_the_next_token() -> None:
    peft = pytest.importorskip("peft")
    assert predicts_next(peft.get_peft_model(gpt(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)))


@pytest.mark.parametrize("kind", ["list", "datasets", "stream", "tensors"])
def test_the_transformers_trainer_takes_token_labels_of_any_length_and_streams(kind: str, tmp_path: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")
    from stillhouse.integrations.transformers import DistillationTrainer

    rows = [{k: v[0, : 3 + i % 4].tolist() for k, v in texts().items()} for i in range(8)]

    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        padded = {k: [torch.as_tensor(s[k]) for s in samples] for k in fill}
        return {k: nn.utils.rnn.pad_sequence(v, batch_first=True, padding_value=fill[k]) for k, v in padded.items()}

    made = datasets.Dataset.from_list(rows)
    data = {"list": rows, "datasets": made, "stream": made.to_iterable_dataset(), "tensors": made.with_format("torch")}[
        kind
    ]
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=4, **options)
    trainer = DistillationTrainer(
        gpt(), arguments, train_dataset=data, teachers=gpt(32), objectives=["ce", "kd"], data_collator=collate
    )
    assert trainer.train().global_step == 2

"""Language models inside the transformers Trainer: labels shifted once, tokens that weigh the same in accumulated
batches, adapters, vocabularies."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stillhouse.errors import UserError
from stillhouse.models.tokenizer import tokenizer

PAD, IGNORED, WORDS = 0, -100, 40


class Texts(Dataset[dict[str, Any]]):
    """Token ids of lengths 3 to 10; the first two are a prompt."""

    def __init__(self, n: int = 8, words: int = WORDS) -> None:
        made = torch.Generator().manual_seed(0)
        self.rows = [torch.randint(5, words, (3 + (5 * i) % 8,), generator=made) for i in range(n)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.rows[index]
        return {"input_ids": ids, "labels": torch.cat([torch.full((2,), IGNORED), ids[2:]])}


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    def pad(key: str, fill: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([r[key] for r in rows], batch_first=True, padding_value=fill)

    mask = nn.utils.rnn.pad_sequence([torch.ones_like(r["input_ids"]) for r in rows], batch_first=True)
    return {"input_ids": pad("input_ids", PAD), "attention_mask": mask, "labels": pad("labels", IGNORED)}


@pytest.fixture
def transformers() -> Iterator[Any]:
    module = pytest.importorskip("transformers", reason="transformers is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield module


def gpt2(transformers: Any, seed: int, words: int = WORDS) -> Any:
    torch.manual_seed(seed)
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=words, pad_token_id=PAD, **dropout)
    )


def trained(transformers: Any, folder: Path, model: Any, cls: Any = None, data: Any = None, **options: Any) -> Any:
    from stillhouse.integrations.transformers import DistillationTrainer

    arguments = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "save_strategy": "no",
    }
    mine = {k: options.pop(k) for k in list(options) if k in transformers.TrainingArguments.__dataclass_fields__}
    args = transformers.TrainingArguments(
        str(folder),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        remove_unused_columns=False,
        **{**arguments, **mine},
    )
    trainer = (cls or DistillationTrainer)(model, args, train_dataset=data or Texts(), data_collator=padded, **options)
    trainer.train()
    return trainer


def all_close(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.allclose(x, y, atol=2e-6) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("size, accumulate", [(4, 1), (2, 2), (1, 4)])
def test_the_labels_alone_train_as_the_trainer_itself_does(
    transformers: Any, tmp_path: Path, size: int, accumulate: int
) -> None:
    start = gpt2(transformers, 0)
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
    ours = trained(transformers, tmp_path, copy.deepcopy(start), teachers=None, objectives=["ce"], **options)
    theirs = trained(transformers, tmp_path, copy.deepcopy(start), transformers.Trainer, **options)
    assert all_close(ours.model, theirs.model) and not all_close(ours.model, start)
    assert ours.state.log_history[0]["loss"] == pytest.approx(theirs.state.log_history[0]["loss"], abs=1e-4)


def test_accumulated_batches_of_unequal_tokens_train_as_one(transformers: Any, tmp_path: Path) -> None:
    start, teacher = gpt2(transformers, 0), gpt2(transformers, 1)
    objectives = [
        {"name": "ce", "weight": 0.3},
        {"name": "kd", "weight": 0.3, "temperature": 2},
        {"name": "gkd", "beta": 0.5, "weight": 0.4},
    ]
    one, two = (
        trained(
            transformers,
            tmp_path,
            copy.deepcopy(start),
            teachers=teacher,
            objectives=objectives,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
        )
        for size in (4, 1)
    )
    assert all_close(one.model, two.model)
    assert {"ce", "kd", "gkd"} <= one.state.log_history[0].keys()


def test_an_encoder_decoder_learns_without_decoder_inputs(transformers: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=WORDS,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    start = transformers.T5ForConditionalGeneration(config)
    ours = trained(
        transformers,
        tmp_path,
        copy.deepcopy(start),
        teachers=copy.deepcopy(start),
        objectives=["ce", {"name": "gkd", "weight": 0.0}],
    )
    theirs = trained(transformers, tmp_path, copy.deepcopy(start), transformers.Trainer)
    assert all_close(ours.model, theirs.model)


def test_labels_of_a_masked_model_stay_where_they_are(transformers: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=WORDS, **dropout
    )
    start = transformers.BertForMaskedLM(config)
    ours = trained(transformers, tmp_path, copy.deepcopy(start), teachers=None, objectives=["ce"])
    theirs = trained(transformers, tmp_path, copy.deepcopy(start), transformers.Trainer)
    assert all_close(ours.model, theirs.model)


def test_adapters_learn_and_the_student_they_are_on_does_not(transformers: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    start, teacher = gpt2(transformers, 0), gpt2(transformers, 1)
    with torch.no_grad():
        teacher.lm_head.weight *= 20.0
    adapted = peft.get_peft_model(
        copy.deepcopy(start),
        peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True),
    )
    trainer = trained(
        transformers,
        tmp_path,
        adapted,
        teachers=teacher,
        objectives=[{"name": "gkd", "beta": 0.0}],
        max_steps=20,
        save_strategy="steps",
        save_steps=20,
    )
    said = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    assert said[-1] < said[0]
    checkpoint = tmp_path / "checkpoint-20"
    assert (checkpoint / "adapter_model.safetensors").exists() and not (checkpoint / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(start), checkpoint).eval()
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5)
        with trainer.model.disable_adapter():
            assert torch.equal(trainer.model(ids).logits, start.eval()(ids).logits)


def test_padded_vocabularies_need_the_tokenizer(transformers: Any, tmp_path: Path) -> None:
    tokens = tokenizer("bytes")
    student, teacher, data = gpt2(transformers, 0, 264), gpt2(transformers, 1, 272), Texts(words=261)
    with pytest.raises(UserError, match="272 classes and the student 264"):
        trained(transformers, tmp_path, student, data=data, teachers=teacher, objectives=["gkd"])
    trainer = trained(
        transformers, tmp_path, student, data=data, teachers=teacher, objectives=["gkd"], processing_class=tokens
    )
    assert trainer.state.log_history[0]["loss"] > 0


def test_a_model_of_ones_own_is_shifted_where_asked(transformers: Any, tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits

    start = gpt2(transformers, 0)
    own = trained(
        transformers, tmp_path, Own(copy.deepcopy(start)), teachers=None, objectives=["ce"], shift_labels=True
    )
    theirs = trained(transformers, tmp_path, copy.deepcopy(start), teachers=None, objectives=["ce"])
    assert all_close(own.model.inner, theirs.model)

"""Hidden states of language models of other depth and width: padding counts for nothing, and layers are named by
number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.models.text_layers import tap
from stillhouse.objectives.hidden_states import HiddenStates
from stillhouse.training.context import Progress


def gpt(width: int, depth: int) -> Any:
    torch.manual_seed(width)
    return GPT2LMHeadModel(GPT2Config(n_layer=depth, n_head=2, n_embd=width, vocab_size=20, n_positions=8,
                                      resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))  # fmt: skip


def bert(width: int, depth: int, heads: int) -> Any:
    torch.manual_seed(width)
    return BertForMaskedLM(BertConfig(vocab_size=20, hidden_size=width, num_hidden_layers=depth, intermediate_size=16,
                                      num_attention_heads=heads, max_position_embeddings=8, hidden_dropout_prob=0.0,
                                      attention_probs_dropout_prob=0.0))  # fmt: skip


def batch(padded: int = 0) -> dict[str, Any]:
    """Two texts of 5 and 3 tokens, with so many padded columns more."""
    ids = torch.randint(1, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    more = torch.zeros(2, padded, dtype=torch.long)
    label = torch.where(mask == 1, (ids + 1) % 20, -100)
    filled = torch.cat([ids.masked_fill(mask == 0, 0), more + 7], 1)
    return {
        "input": {"input_ids": filled, "attention_mask": torch.cat([mask, more], 1)},
        "label": torch.cat([label, more - 100], 1),
    }


def loss(objective: HiddenStates, student: Any, teacher: Any, given: dict[str, Any]) -> torch.Tensor:
    module = Distillation(student, FrozenTeacher(teacher), [objective], seed=0).build(given)
    module.train()
    value = module(given, Progress())["loss"]
    module.close()
    return value


@pytest.mark.parametrize("kind", ["mse", "cos", "ce", "pkd"])
def test_a_student_of_other_depth_and_width_learns_without_padding(kind: Any) -> None:
    student, teacher = gpt(8, 1), gpt(16, 3)
    made = HiddenStates(layers=[[0, 0], [-1, -1]], loss=kind)
    value = loss(made, student, teacher, batch())
    value.backward()
    assert value.isfinite() and student.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0
    assert len(made.maps) == 2 and all(p.grad is not None for p in made.maps.parameters())
    again = loss(HiddenStates(layers=[[0, 0], [-1, -1]], loss=kind), student, teacher, batch(padded=3))
    torch.testing.assert_close(again, value, rtol=1e-4, atol=1e-6)


def test_a_network_is_at_no_distance_from_itself() -> None:
    made = HiddenStates(layers=[[-1, -1]], attention=[[0, 0]], heads=[2, 2])
    assert loss(made, bert(16, 2, 2), bert(16, 2, 2), batch()) < 1e-10 and not made.maps


def test_attention_of_other_heads_is_compared_by_its_mean() -> None:
    student, teacher = bert(8, 1, 1), bert(16, 3, 4)
    made = HiddenStates(layers=[], attention=[[0, 2]], heads=[1, 4], attention_weight=2.0)
    value = loss(made, student, teacher, batch())
    value.backward()
    assert value > 0 and student.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0
    half = HiddenStates(layers=[], attention=[[0, 2]], heads=[1, 4])
    torch.testing.assert_close(2 * loss(half, student, teacher, batch(padded=2)), value)


def test_layers_are_named_by_number() -> None:
    assert tap(gpt(8, 2), "hidden:0") == "transformer.drop" and tap(gpt(8, 2), "hidden:-1") == "transformer.h.1"
    assert tap(bert(8, 2, 2), "key:1") == "bert.encoder.layer.1.attention.self.key"
    with pytest.raises(UserError, match=r"has hidden:0 to hidden:2 \(hidden:-1 is the last\), not 'hidden:3'"):
        tap(gpt(8, 2), "hidden:3")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers": [[1]]}, "layers must be pairs"),
        ({"layers": []}, "nothing to compare"),
        ({"attention": [[0, 0]]}, "attention needs heads"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        HiddenStates(**options)

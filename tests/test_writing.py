"""Texts that a model writes are compared with the right ones: ROUGE-L, exact matches, and the whole way in a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.errors import UserError
from stillhouse.evaluation.writing import rouge_l, writing_figures
from stillhouse.runs.execution import execute
from stillhouse.runs.recipe import validate


@pytest.mark.parametrize(
    ("written", "right", "expected"),
    [
        ("police killed the gunman", "police kill the gunman", 0.75),  # the example of Lin (2004)
        ("the gunman kill police", "police kill the gunman", 0.5),
        ("", "a word", 0.0),
        ("", "", 1.0),
        ("Über_alles, 3 Äpfel!", "über alles 3 äpfel", 1.0),
        ("a b c d e f", "f e d c b a", 1 / 6),
    ],
)
def test_rouge_l_is_that_of_the_longest_common_subsequence(written: str, right: str, expected: float):
    assert rouge_l(written, right) == pytest.approx(expected)
    assert rouge_l(right, written) == pytest.approx(expected)


def test_figures_are_means_over_texts():
    found = writing_figures(["a b", " c", "x"], ["a b", "c ", "y"])
    assert found == {"rouge_l": pytest.approx(2 / 3), "exact_match": pytest.approx(2 / 3)}
    with pytest.raises(UserError, match="no text to judge by"):
        writing_figures([], [])


@pytest.mark.parametrize("task", ["causal", "seq2seq"])
def test_a_model_that_learned_its_answers_writes_them(task: str, tmp_path: Path):
    pytest.importorskip("transformers")
    words = ["red", "green", "blue", "black"]
    rows = [{"prompt": f"{w} ", "completion": w[::-1]} for w in words] * 8
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    kind, options = {
        "causal": ("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 24}),
        "seq2seq": ("t5", {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16}),
    }[task]
    tree = {
        "data": {
            "name": f"text:{tmp_path / 'train.jsonl'}",
            "options": {"task": task, "tokenizer": "bytes", "context": 24},
        },
        "student": {"model": f"hf:config:{kind}", "options": options},
        "objectives": ["ce"],
        "train": {"epochs": 40, "batch_size": 8, "optimizer": {"name": "adamw", "lr": 1e-2}},
        "evaluate": ["quality", "writing"],
    }
    found = execute(validate(tree), tmp_path / "run", cpu=True)
    assert found["exact_match"] > 0.9 and found["rouge_l"] >= found["exact_match"]
    tree["train"] = {**tree["train"], "epochs": 1, "optimizer": {"name": "adamw", "lr": 1e-9}}
    assert execute(validate(tree), tmp_path / "untrained", cpu=True)["exact_match"] == 0

"""Two vocabularies: padded ones of a family, the same tokens under other ids, and different ones, which are refused."""

from __future__ import annotations

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.functional.vocabularies import mapped, trimmed
from stillhouse.models.tokenizer import tokenizer


def test_padded_columns_are_cut_from_both_sides() -> None:
    """Qwen2.5: 152,064 rows in the teacher, 151,936 in the student, 151,665 tokens."""
    student, teacher = torch.arange(151_936.0)[None], torch.arange(152_064.0)[None]
    ours, theirs = trimmed(student, teacher, 151_665)
    assert ours.shape == theirs.shape == (1, 151_665) and torch.equal(ours, theirs)


def test_widths_that_differ_without_a_tokenizer_are_refused_with_both_sizes() -> None:
    with pytest.raises(UserError, match="scores 151936 tokens and the teacher 152064"):
        trimmed(torch.zeros(1, 151_936), torch.zeros(1, 152_064))
    with pytest.raises(UserError, match="has 12 tokens, but the student scores 10 and the teacher 20"):
        trimmed(torch.zeros(1, 10), torch.zeros(1, 20), 12)
    same = torch.zeros(2, 5)
    assert trimmed(same, same)[0] is same


def test_tokens_are_matched_by_their_strings() -> None:
    ids = mapped({"a": 0, "b": 1, "c": 2}, {"c": 0, "x": 1, "a": 2, "b": 3})
    assert ids.ids.tolist() == [2, 3, 0] and not ids.same
    assert mapped({"a": 0, "b": 1}, {"a": 0, "b": 1, "more": 2}).same


def test_a_token_that_the_teacher_lacks_is_named_with_both_sizes() -> None:
    with pytest.raises(
        UserError,
        match=r"student has 3 tokens and the teacher 2, and 2 of the student's are not the teacher's \('y', "
        r"'z'\).*sequence_kd",
    ):
        mapped({"x": 0, "y": 1, "z": 2}, {"x": 0, "w": 1})


def test_a_vocabulary_with_gaps_is_refused_unless_both_have_it() -> None:
    assert mapped({"a": 0, "b": 5}, {"a": 0, "b": 5}).same
    with pytest.raises(UserError, match="without gaps"):
        mapped({"a": 0, "b": 5}, {"a": 5, "b": 0})


def test_a_teacher_with_other_ids_says_the_same_of_the_same_text() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from stillhouse.models.language import as_teacher

    ours, theirs = tokenizer("characters", ["abcd"]), tokenizer("characters", ["0123abcd"])
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=len(theirs))
    model = transformers.GPT2LMHeadModel(config).eval()
    teacher = as_teacher(model, theirs, ours, "causal")
    text = "abdcab"
    with torch.no_grad():
        said = teacher(input_ids=torch.tensor([ours(text)["input_ids"]]))
        plain = model(input_ids=torch.tensor([theirs(text)["input_ids"]])).logits
    vocabulary = theirs.get_vocab()
    for token, at in ours.get_vocab().items():
        assert torch.equal(said[..., at], plain[..., vocabulary[token]])
    assert as_teacher(model, theirs, theirs, "causal") is model
    with pytest.raises(UserError, match="needs its own tokenizer"):
        as_teacher(model, theirs, ours, "classify")
    with pytest.raises(UserError, match="student has 13 tokens and the teacher 9"):
        as_teacher(model, ours, theirs, "causal")

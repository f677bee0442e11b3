"""Conversations: only answers are learned, what the model is asked is what it was trained on, and no answer is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.config.specs import DataSpec
from stillhouse.data import load
from stillhouse.data.dataset import BatchKey
from stillhouse.errors import UserError


def record(passage: str, *asked: tuple[str, str]) -> dict[str, Any]:
    turns = [(f"Text: {passage}", "Read."), *asked]
    return {
        "conversations": [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn)]
    }


def bundle(tmp_path: Path, records: list[dict[str, Any]], **options: Any) -> Any:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(records))
    given = {"tokenizer": "bytes", "context": 400, "template": {"system": "Sé kind."}, **options}
    return load(DataSpec(name=f"conversations:{path}", options=given))


MANY = [record(f"passage {i} é", ("who?", f'["a{i}"]'), ("what?", "[]"), ("where?", '["b", "c"]')) for i in range(20)]


def batch(data: Any, epoch: int = 0, split: str = "train", count: int = 3) -> Any:
    return data.dataset(split, train=True).batch(BatchKey(epoch, np.arange(count), 0, count), 0)


@pytest.mark.parametrize("tokenizer", ["bytes", "characters", "bpe:300"])
@pytest.mark.parametrize("spaced", [True, False])
def test_what_is_learned_is_the_answers_and_their_ends(tmp_path: Path, tokenizer: str, spaced: bool) -> None:
    data = bundle(tmp_path, MANY, tokenizer=tokenizer, template={"spaced": spaced, "system": "Sé kind."})
    made, tokens = batch(data), data.task.tokenizer
    for row, turns in enumerate(data.splits["train"][:3]):
        learned = made["label"][row][made["label"][row] != -100].tolist()
        answers = tokens.decode(learned).split(data.end)[:-1]
        assert answers[0] == "Read." and sorted(answers) == sorted(a for _, a in turns)


def test_a_label_is_the_next_token(tmp_path: Path) -> None:
    made = batch(bundle(tmp_path, MANY))
    ids, label = made["input"]["input_ids"], made["label"]
    counted = label[:, :-1] != -100
    assert (ids[:, 1:][counted] == label[:, :-1][counted]).all()
    assert (made["input"]["attention_mask"].sum(1) == 400).sum() == 0 and counted.any(1).all()


def test_the_order_of_questions_is_drawn_anew_each_epoch(tmp_path: Path) -> None:
    data = bundle(tmp_path, MANY)
    tokens = data.task.tokenizer

    def texts(epoch: int) -> list[str]:
        return tokens.batch_decode(batch(data, epoch)["input"]["input_ids"], skip_special_tokens=False)

    first, again, second = texts(0), texts(0), texts(1)
    assert first == again and first != second
    for a, b in zip(first, second):
        # the end mark of the whole text is no input, so the last answer lacks it
        assert sorted(a.replace("<pad>", "").split("USER: ")[1:2]) == sorted(
            b.replace("<pad>", "").split("USER: ")[1:2]
        )
        assert sorted(q.partition(" ASS")[0] for q in a.split("USER: ")) == sorted(
            q.partition(" ASS")[0] for q in b.split("USER: ")
        )


def test_a_question_reaches_the_model_as_it_was_learned(tmp_path: Path) -> None:
    data = bundle(tmp_path, [record(f"p {i}", ("who?", '["x"]')) for i in range(20)])
    turns, made = data.splits["train"][0], batch(data, count=1)
    row, label = made["input"]["input_ids"][0].tolist(), made["label"][0].tolist()
    asked = data.asked(turns[:1], "who?")
    assert row[: len(asked)] == asked
    after = [i for i in label[len(asked) - 1 :] if i != -100]
    assert data.task.tokenizer.decode(after) == '["x"]' + data.end


def test_questions_that_do_not_fit_are_left_out_whole(tmp_path: Path) -> None:
    long = record("p", ("who?", '["x"]'), ("what?", json.dumps(["y" * 80])), ("where?", "[]"))
    data = bundle(tmp_path, [long] * 20, context=120)
    rows, lost = data.encoded(data.splits["train"])
    assert lost == len(rows)
    texts = [data.task.tokenizer.decode(batch(data, e, count=1)["input"]["input_ids"][0]) for e in range(4)]
    assert all("yyy" not in t and "who?" in t and "where?" in t for t in texts)
    with pytest.raises(UserError, match="context is 20; raise it"):
        bundle(tmp_path, [long] * 20, context=20).dataset("train")
    assert len(bundle(tmp_path, [long] * 20, context=20, too_long="drop").dataset("train")) == 0


def test_records_of_one_passage_are_joined_and_split_together(tmp_path: Path) -> None:
    records = [record(f"p {i}", (q, "[]")) for q in ("who?", "what?", "who?") for i in range(30)]
    data = bundle(tmp_path, records, merge=True)
    passages = {split: {turns[0][0] for turns in found} for split, found in data.splits.items()}
    assert sum(map(len, passages.values())) == 30 and not passages["train"] & passages["test"]
    assert all([q for q, _ in turns[1:]] == ["who?", "what?"] for turns in data.splits["train"])


def test_chat_messages_are_read_and_a_system_message_is_left_out(tmp_path: Path) -> None:
    chat = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "q"), ("assistant", "a"))]
    data = bundle(tmp_path, [{"messages": chat}] * 20)
    assert data.splits["train"][0] == [("q", "a")]


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([("human", "q")], "ends without an answer"),
        ([("human", "q"), ("human", "q")], "has 'human' as its message 1"),
        ([("human", "q"), ("gpt", "a"), ("gpt", "a"), ("gpt", "a")], "has 'gpt' as its message 2"),
        ([], "is empty"),
        ([("human", "q"), ("gpt", 3)], "has a message that is no text"),
    ],
)
def test_a_broken_conversation_is_refused(tmp_path: Path, messages: list[Any], match: str) -> None:
    with pytest.raises(UserError, match=f"record 0, {match}"):
        bundle(tmp_path, [{"conversations": [{"from": r, "value": v} for r, v in messages]}])


CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + ('.end' if m['role'] == 'assistant' else '') }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_tokenizers_own_chat_template_is_followed_to_the_answer(tmp_path: Path) -> None:
    data = bundle(tmp_path, MANY, template={"chat": True, "system": "s"}, shuffle=False)
    with pytest.raises(UserError, match="has no chat template"):
        data.dataset("train")
    tokens, turns = data.task.tokenizer, data.splits["train"][0]
    tokens.chat_template = CHAT
    made = batch(data, count=1)
    learned = tokens.decode([i for i in made["label"][0].tolist() if i != -100])
    assert learned == "".join(f"{answer}.end" for _, answer in turns)
    row = made["input"]["input_ids"][0].tolist()
    asked = data.asked(turns[:1], turns[1][0])
    assert row[: len(asked)] == asked and tokens.decode(asked).endswith("<assistant>")
    tokens.chat_template = "{{ messages | length }}"
    with pytest.raises(UserError, match="once it is answered"):
        data.dataset("train")

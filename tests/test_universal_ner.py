"""UniversalNER: annotations are read safely, negatives are drawn by frequency, and answers are judged two ways."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.errors import UserError
from stillhouse.methods.language.universal_ner.annotation import (
    annotated,
    conversation,
    frequencies,
    negative_types,
    parsed,
)
from stillhouse.methods.language.universal_ner.annotators import AnnotatorSpec, annotate
from stillhouse.methods.language.universal_ner.method import NegativeSpec, conversations, teacher_answer
from stillhouse.methods.language.universal_ner.scoring import robust, scores, strict
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "[__import__('os').getcwd()]",
        '[("a", "b"), open("x")]',
        "[" * 10_000 + "]" * 10_000,
        '[("a", "b", "c")]',
        '[("a", 3)]',
        '{"a": "b"}',
        "",
        None,
    ],
)
def test_what_is_no_list_of_pairs_is_nothing_and_runs_nothing(text: str | None) -> None:
    assert parsed(text) is None


def test_a_passage_without_an_annotation_is_left_out_not_taken_for_empty() -> None:
    found, lost = annotated(["a b", "c", "d", "e"], ["[]", None, "sorry", '[("e", "x"), ("z", "x"), ("e", "X")]'])
    assert [one.passage for one in found] == ["a b", "e"] and found[0].mentions == {}
    assert found[1].mentions == {"x": ["e"]} and found[1].shown == {"x": "x"}
    assert lost == {"failed": 1, "unreadable": 1, "absent": 1, "wordy": 0}
    _, lost = annotated(["e"], ['[("e", "one two three four five six")]'])
    assert lost["wordy"] == 1


def test_negatives_come_as_often_as_their_type() -> None:
    counts = {"a": 600, "b": 300, "c": 90, "d": 10}
    draws = [negative_types(["a"], counts, "frequency", 1, np.random.default_rng(i))[0] for i in range(1500)]
    assert draws.count("a") == 0
    assert draws.count("b") / 1500 == pytest.approx(0.75, abs=0.05)
    even = [negative_types(["a"], counts, "uniform", 1, np.random.default_rng(i))[0] for i in range(1500)]
    assert even.count("d") / 1500 == pytest.approx(1 / 3, abs=0.05)
    assert set(negative_types(["a"], counts, "frequency", 9, np.random.default_rng(0))) == {"b", "c", "d"}
    assert negative_types(["a"], counts, "none", 2, np.random.default_rng(0)) == []


def test_a_conversation_asks_for_what_is_there_and_for_what_is_not() -> None:
    found, _ = annotated(["Bonn", "Elbe", "oak"], ['[("Bonn", "City")]', '[("Elbe", "river")]', "[]"])
    made = conversations(found, NegativeSpec(), 0)
    assert frequencies(found) == {"city": 1, "river": 1}
    assert made[0][1:] == [
        ("What describes City in the text?", '["Bonn"]'),
        ("What describes river in the text?", "[]"),
    ]
    assert len(made[2]) == 2 and made[2][1][1] == "[]", "a passage without entities is asked for one type"
    assert made == conversations(found, NegativeSpec(), 0)
    alone = conversations(found, NegativeSpec(draw="none"), 0)
    assert [len(turns) for turns in alone] == [2, 2], "without negatives, a passage without entities asks nothing"
    assert teacher_answer(found[0].mentions, "What describes city in the text?") == '["Bonn"]'
    assert teacher_answer(None, "What describes city in the text?") == "[]"
    assert conversation("x", {}, "set")[0][0] == "Dataset: set \n Text: x"


def test_the_strict_reader_is_the_released_one_and_the_robust_one_forgives() -> None:
    text = 'Here you are: ["The Elbe", 1903, ["Po"]'
    assert strict(text) == [] and robust(text) == ["elbe", "po"]
    assert strict('["The Elbe", "elbe"]') == ["elbe"] == robust('["The Elbe", "elbe"]')
    assert strict('["the"]') == [""] and robust('["the"]') == []
    assert scores(["[]"], ["[]"])["f1"] == 0
    assert scores(['["a b"]', '["c"]'], ['["A b."]', "[]"])["precision"] == pytest.approx(0.5)


def test_an_interrupted_pass_asks_nothing_twice(tmp_path: Path) -> None:
    journal, asked = tmp_path / "answers.jsonl", []

    def teacher(passage: str) -> str | None:
        asked.append(passage)
        if passage == "stop" and len(asked) < 4:
            raise UserError("the server is gone")
        if passage == "bad":
            raise ValueError("no answer to this")
        return f"[('{passage}', 'x')]"

    with pytest.raises(UserError, match="gone"):
        annotate(["a", "bad", "stop", "b"], teacher, journal, 1)
    with journal.open("a") as file:
        file.write('[3, "cut o')  # killed while writing
    found = annotate(["a", "bad", "stop", "b"], teacher, journal, 1)
    assert found == ["[('a', 'x')]", None, "[('stop', 'x')]", "[('b', 'x')]"]
    assert asked == ["a", "bad", "stop", "stop", "b"]


class Chat(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions" and sent["temperature"] == 0 and sent["model"] == "big"
        passage = sent["messages"][-1]["content"].rpartition("Passage: ")[2]
        reply = {"choices": [{"message": {"content": f'[("{passage}", "word")]'}}]}
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None: ...


def test_a_served_chat_model_annotates(tmp_path: Path) -> None:
    server = HTTPServer(("127.0.0.1", 0), Chat)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        spec = AnnotatorSpec(server=f"http://127.0.0.1:{server.server_port}/v1", model="big")
        found = annotate(["oak", "ash", "elm"], spec.annotator(), tmp_path / "answers.jsonl", 2)
    finally:
        server.shutdown()
        server.server_close()
    assert [parsed(text) for text in found] == [[("oak", "word")], [("ash", "word")], [("elm", "word")]]


RECIPE = {
    "method": "universal_ner",
    "student": {"model": "hf:config:gpt2", "options": {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 160}},
    "train": {"epochs": 1, "batch_size": 4},
    "ask": {"max_new_tokens": 4, "batch_size": 8},
}
TEACHER = """
def annotate(text):
    return repr([(word, "number") for word in text.split() if word.isdigit()])
"""


def recipe(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    records = []
    for i in range(24):
        turns = [(f"Text: word {i} .", "Read."), ("What describes number in the text?", f'["{i}"]')]
        records.append(
            {"messages": [{"role": r, "content": c} for t in turns for r, c in zip(("user", "assistant"), t)]}
        )
    (tmp_path / "talk.json").write_text(json.dumps(records))
    (tmp_path / "teacher.py").write_text(TEACHER)
    options = {"tokenizer": "bytes", "context": 160, "template": {"system": ""}}
    return {
        **RECIPE,
        "data": {"name": f"conversations:{tmp_path / 'talk.json'}", "options": options},
        "annotator": {"call": f"file:{tmp_path / 'teacher.py'}:annotate"},
        **changes,
    }


def test_a_run_keeps_its_stages_and_leaves_a_model_that_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    figures = execute(validate(recipe(tmp_path)), tmp_path / "run", cpu=True)
    assert figures["teacher_f1"] == pytest.approx(1) and 0 <= figures["f1"] <= 1
    product = load_product(tmp_path / "run")
    assert "text" in product.predict(["USER: Text: word 3 . ASSISTANT: "])[0]
    names = sorted(p.name.partition("-")[0] for p in (tmp_path / "cache" / "stages").iterdir() if p.is_dir())
    assert names == ["annotate", "annotate"], "of the training and of the test passages"
    facts = json.loads((tmp_path / "run" / "environment.json").read_text())["annotations"]
    assert facts["types"] == 1 and facts["failed"] == 0


def test_own_answers_of_several_sets_are_told_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    given = recipe(tmp_path, annotator=None)
    given["also"] = {"numbers": given["data"]}
    figures = execute(validate(given), tmp_path / "run", cpu=True)
    facts = json.loads((tmp_path / "run" / "environment.json").read_text())["conversations"]
    assert "teacher_f1" not in figures and facts["count"] == 2 * 22
    assert facts["example"][0][0].startswith("Text: word")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"annotator": {"call": "file:nowhere.py:f"}}, "no Python file"),
        ({"annotator": {"call": "a", "server": "b"}}, "exactly one of call and server"),
        ({"annotator": {"server": "http://x/v1"}}, "as it calls it"),
        ({"data": "text:shakespeare"}, "must be conversations:PATH"),
    ],
)
def test_wrong_recipes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], match: str
) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=match):
        execute(validate(recipe(tmp_path, **changes)), tmp_path / "run", cpu=True)

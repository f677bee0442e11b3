"""A teacher behind a real HTTP server on loopback, which fails in every way that servers do: the store holds what it
knows, and nothing is asked twice."""

from __future__ import annotations

import json
import math
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.config.specs import StoreSpec
from stillhouse.data import BatchKey
from stillhouse.errors import UserError
from stillhouse.objectives.kd import kd_top_loss
from stillhouse.runs import recipe as recipes
from stillhouse.runs.caching import make_from_server
from stillhouse.runs.execution import execute
from stillhouse.signals import TopK
from stillhouse.store import Store
from stillhouse.store.remote import CompletionDataset, score, write
from stillhouse.store.server import Server, Vocabulary

VOCABULARY, CONTEXT = 30, 12
NAMES = Vocabulary({f"<{i}>": i for i in range(VOCABULARY)})


class Teacher:
    """A bigram model behind HTTP. `faults` are what it does instead of answering, in this order: a status, or a
    function of the handler."""

    def __init__(self, vocabulary: int = VOCABULARY, context: int = CONTEXT) -> None:
        generator = torch.Generator().manual_seed(0)
        self.log_probs = torch.log_softmax(torch.randn(vocabulary, vocabulary, generator=generator) * 2, 1)
        self.context, self.faults, self.times, self.prompts = context, list[Any](), list[float](), list[Any]()
        self.tops: Callable[[int], int] = lambda k: k
        self.length, self.with_log_probs = 3, True

    def top(self, token: int, k: int) -> dict[str, float]:
        values, indices = self.log_probs[token].topk(self.tops(k))
        return {f"token_id:{i}": v for i, v in zip(indices.tolist(), values.tolist())}

    def answer(self, path: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path.endswith("/chat/completions"):
            last, content = int(asked["messages"][-1]["content"]), []
            for _ in range(min(self.length, asked["max_tokens"])):
                values, indices = self.log_probs[last].topk(asked["top_logprobs"])
                tops = [
                    {"token": f"<{i}>", "logprob": v, "bytes": None} for i, v in zip(indices.tolist(), values.tolist())
                ]
                content.append({**tops[0], "top_logprobs": tops})
                last = int(indices[0])
            text = "".join(c["token"] for c in content)
            return 200, {
                "choices": [
                    {"message": {"content": text}, "logprobs": {"content": content} if self.with_log_probs else None}
                ]
            }
        ids = asked["prompt"]
        if len(ids) > self.context:
            return 400, {
                "error": {
                    "message": f"This model's maximum context length is {self.context} tokens, however you requested "
                    f"{len(ids)}."
                }
            }
        tops = [None, *(self.top(i, asked["logprobs"]) for i in ids)]
        names = [f"token_id:{i}" for i in ids] + ["token_id:0"]
        return 200, {
            "choices": [
                {"text": "…", "logprobs": {"tokens": names, "top_logprobs": tops} if self.with_log_probs else None}
            ]
        }


@contextmanager
def serving(teacher: Teacher) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            teacher.times.append(time.monotonic())
            teacher.prompts.append(asked.get("prompt"))
            fault = teacher.faults.pop(0) if teacher.faults else None
            if callable(fault):
                fault(self)
                return
            status, said = (fault, {"error": {"message": "busy"}}) if fault else teacher.answer(self.path, asked)
            self.reply(status, json.dumps(said).encode())

        def reply(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

        def handle(self) -> None:
            with suppress(OSError):  # the client did not wait
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


class Text:
    """Samples of 2 to 6 tokens; the first token is a prompt."""

    def __init__(self, count: int = 12, longest: int = 0) -> None:
        self.rows = [
            torch.randint(0, VOCABULARY, (2 + i % 5,), generator=torch.Generator().manual_seed(i)) for i in range(count)
        ]
        if longest:
            self.rows[3] = torch.arange(longest)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, key: BatchKey, seed: int) -> dict[str, Any]:
        own = key.indices[key.start : key.stop]
        rows = [self.rows[i] for i in own]
        ids, mask, label = (torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64) for _ in range(3))
        label -= 100
        for b, row in enumerate(rows):
            ids[b, : len(row)], mask[b, : len(row)] = row, 1
            label[b, 1 : len(row)] = row[1:]
        return {"input": {"input_ids": ids, "attention_mask": mask}, "label": label, "index": torch.from_numpy(own)}


def asked(
    url: str,
    folder: Path,
    data: Text | None = None,
    *,
    top: int = 4,
    too_long: Any = "refuse",
    workers: int = 2,
    **options: Any,
) -> Store:
    facts = {"fingerprint": "f", "split": "train", "spec": {}, "transform": {}}
    server = Server(url, "teacher", top=top, **{"timeout": 5.0, "retries": 3, "backoff": 0.01, **options})
    keep = StoreSpec(shard_rows=5)
    score(
        server,
        data or Text(),
        folder,
        keep,
        NAMES,
        data_facts=facts,
        classes=VOCABULARY,
        workers=workers,
        too_long=too_long,
    )
    return Store(folder)


def kept(store: Store, data: Text, index: int) -> tuple[dict[str, Tensor], Tensor]:
    """What the store holds of a sample, and its tokens at the kept positions."""
    batch = data.batch(BatchKey(0, np.array([index]), 0, 1), 0)
    mask = batch["label"] != -100
    held = store.read(np.array([index]), 0, mask)
    return {k: v[mask] for k, v in held.items()}, batch["input"]["input_ids"][mask]


def is_right(store: Store, teacher: Teacher, data: Text, index: int) -> bool:
    held, tokens = kept(store, data, index)
    live = teacher.log_probs[tokens]
    values, indices = live.topk(store.manifest["top"])
    torch.testing.assert_close(held["top"], values)
    torch.testing.assert_close(held["top.tail"], 1 - values.exp().sum(1), atol=1e-5, rtol=1e-4)
    return torch.equal(held["top.indices"], indices)


def slow(handler: Any) -> None:
    time.sleep(0.5)


def hang_up(handler: Any) -> None:
    handler.close_connection = True


def cut_short(handler: Any) -> None:
    handler.reply(200, b'{"choices": [{"text"')


def later(handler: Any) -> None:
    handler.reply(429, b'{"error": {"message": "slow down"}}', Retry_After="0.4")


def test_a_store_holds_what_the_server_said(tmp_path: Path):
    teacher, data = Teacher(), Text()
    with serving(teacher) as url:
        store = asked(url, tmp_path / "s")
    assert all(is_right(store, teacher, data, i) for i in range(12))
    assert len(teacher.times) == 12
    assert store.manifest["teacher"]["model"] == "teacher"


def test_errors_that_pass_are_asked_again(tmp_path: Path):
    teacher, data = Teacher(), Text()
    teacher.faults = [500, slow, hang_up, cut_short, 503]
    with serving(teacher) as url:
        store = asked(url, tmp_path / "s", timeout=0.25, retries=6)
    assert all(is_right(store, teacher, data, i) for i in range(12))
    assert len(teacher.times) == 12 + 5


def test_the_server_says_how_long_to_wait(tmp_path: Path):
    teacher = Teacher()
    teacher.faults = [later]
    with serving(teacher) as url:
        asked(url, tmp_path / "s", workers=1)
    assert teacher.times[1] - teacher.times[0] >= 0.4


def test_no_more_requests_a_second_than_allowed(tmp_path: Path):
    teacher = Teacher()
    with serving(teacher) as url:
        asked(url, tmp_path / "s", workers=4, rate=40)
    assert teacher.times[-1] - teacher.times[0] >= 0.9 * 11 / 40


def test_a_server_that_stays_away_is_said_and_nothing_is_asked_twice(tmp_path: Path):
    teacher, data = Teacher(), Text()
    with serving(teacher) as url:
        teacher.faults = [None] * 7 + [500] * 100
        with pytest.raises(
            UserError, match=r"gave no answer in 2 tries \(the last: 500: busy\); its earlier answers are stored"
        ):
            asked(url, tmp_path / "s", workers=1, retries=1)
        before = list(teacher.prompts[:7])
        teacher.faults, teacher.prompts = [], []
        store = asked(url, tmp_path / "s", workers=1)
    assert len(before) == 7 and len(teacher.prompts) == 5
    assert all(is_right(store, teacher, data, i) for i in range(12))
    assert not list((tmp_path / "s/answers").iterdir())


def test_an_answer_whose_line_was_cut_off_is_asked_for_again(tmp_path: Path):
    teacher, data = Teacher(), Text()
    with serving(teacher) as url:
        teacher.faults = [None] * 3 + [500] * 100
        with pytest.raises(UserError):
            asked(url, tmp_path / "s", workers=1, retries=0)
        journal = tmp_path / "s/answers/000000.jsonl"
        journal.write_bytes(journal.read_bytes()[:-20])
        teacher.faults, teacher.prompts = [], []
        store = asked(url, tmp_path / "s", workers=1)
    assert len(teacher.prompts) == 10
    assert all(is_right(store, teacher, data, i) for i in range(12))


def test_a_full_disk_is_said_and_the_answers_are_kept(tmp_path: Path):
    teacher, (soft, hard) = Teacher(), resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(teacher) as url:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
        try:
            with pytest.raises(UserError, match="the disk is full"):
                asked(url, tmp_path / "s", workers=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        before, teacher.prompts = len(teacher.prompts), []
        store = asked(url, tmp_path / "s", workers=1)
    assert before > 1 and len(teacher.prompts) == 12 - (before - 1)  # all but the answer that found no room
    assert is_right(store, teacher, Text(), 0)


@pytest.mark.parametrize("how", ["the server says", "the context is given"])
def test_a_sample_longer_than_the_context_is_refused_or_passed_over(tmp_path: Path, how: str):
    teacher, data = Teacher(), Text(longest=CONTEXT + 1)
    options = {"context": CONTEXT} if how == "the context is given" else {}
    with serving(teacher) as url:
        with pytest.raises(UserError, match=r"Sample 3 is too long for teacher at .*context.*12"):
            asked(url, tmp_path / "s", data, **options)
        store = asked(url, tmp_path / "s", data, too_long="skip", **options)
    held, _ = kept(store, data, 3)
    assert (held["top.tail"] == 1).all() and torch.isinf(held["top"]).all()
    assert is_right(store, teacher, data, 4)


def test_fewer_log_probabilities_than_asked_leave_the_rest_to_the_tail(tmp_path: Path):
    teacher, data = Teacher(), Text()
    teacher.tops = lambda k: k - 2
    with serving(teacher) as url:
        store = asked(url, tmp_path / "s")
    held, tokens = kept(store, data, 4)
    values, indices = teacher.log_probs[tokens].topk(2)
    torch.testing.assert_close(held["top"][:, :2], values)
    assert torch.isinf(held["top"][:, 2:]).all() and torch.equal(
        held["top.indices"][:, 2:], indices[:, :1].expand(-1, 2)
    )
    torch.testing.assert_close(held["top.tail"], 1 - values.exp().sum(1), atol=1e-5, rtol=1e-4)
    logits = torch.randn(len(tokens), VOCABULARY, requires_grad=True)
    kd_top_loss(logits, TopK(held["top"], held["top.indices"], held["top.tail"]), 1.0).backward()
    assert torch.isfinite(logits.grad).all()


def test_errors_that_do_not_pass_are_said_at_once(tmp_path: Path):
    teacher = Teacher()
    with serving(teacher) as url:
        teacher.faults = [401]
        with pytest.raises(UserError, match=r"refused the request \(401\): busy"):
            asked(url, tmp_path / "s", workers=1)
        assert len(teacher.times) == 1
        teacher.with_log_probs = False
        with pytest.raises(UserError, match="gave no log-probabilities for any of 5 samples"):
            asked(url, tmp_path / "t")


def test_completions_are_kept_with_their_log_probabilities_and_empty_ones_are_left_out(tmp_path: Path):
    teacher = Teacher()
    prompts = [[{"role": "user", "content": str(i)}] for i in range(8)]
    empty = json.dumps({"choices": [{"message": {"content": ""}, "logprobs": {"content": []}}]}).encode()
    teacher.faults = [None, lambda handler: handler.reply(200, empty)]
    with serving(teacher) as url:
        write(
            Server(url, "t", top=4, backoff=0.01),
            prompts,
            tmp_path / "s",
            StoreSpec(shard_rows=3),
            NAMES,
            classes=VOCABULARY,
            max_tokens=3,
            workers=1,
        )
    store = Store(tmp_path / "s")
    greedy, last = [], 5
    for _ in range(3):
        last = int(teacher.log_probs[last].argmax())
        greedy.append(last)
    assert store.tokens_of(np.array([5, 1]))[0].tolist() == greedy and not len(store.tokens_of(np.array([1]))[0])
    data = CompletionDataset(store, [[9, i] for i in range(8)])
    assert len(data) == 7 and data.samples.tolist() == [0, 2, 3, 4, 5, 6, 7]
    batch = data.batch(BatchKey(0, np.array([4, 0]), 0, 2), 0)
    assert batch["input"]["input_ids"][0].tolist() == [9, 5, *greedy[:2]]
    assert batch["label"][0].tolist() == [-100, *greedy]
    held = batch["stored"][store.id]
    torch.testing.assert_close(held["top"][0, 1:], teacher.log_probs[[5, *greedy[:2]]].topk(4).values)


def test_tokens_that_the_student_does_not_have_count_to_the_tail_and_are_not_written():
    known = Vocabulary({"<0>": 0})
    assert known.id("token_id:17") == 17 and known.id("<0>") == 0 and known.id("<1>") is None
    teacher = Teacher()
    with serving(teacher) as url, pytest.raises(UserError, match="which the student's tokenizer does not have"):
        Server(url, "t", top=4).write([{"role": "user", "content": "3"}], known, 2)


def test_a_recipe_trains_from_a_server(recipe_file, tmp_path: Path):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": "ab" * (2 + i % 4)}) for i in range(30)))
    path = recipe_file(f"""
data: {{name: "text:{tmp_path / "text.jsonl"}", options: {{tokenizer: bytes, context: 16}}}}
teacher: {{store: {tmp_path / "store"}}}
student: {{model: "hf:config:gpt2", options: {{n_layer: 1, n_head: 2, n_embd: 8}}}}
objectives: [{{name: kd, temperature: 1}}]
train: {{epochs: 1, batch_size: 8}}
evaluate: [accuracy]
""")
    config = recipes.load(path)
    with serving(Teacher(vocabulary=300, context=100)) as url:
        make_from_server(config, Server(url, "t", top=6), StoreSpec(precision="fp16"), tmp_path / "store")
    assert math.isfinite(sum(execute(config, tmp_path / "run", cpu=True).values()))

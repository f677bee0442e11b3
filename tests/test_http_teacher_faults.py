"""A server that is hostile or broken: no key reaches another host, no answer lasts or grows for ever, and what is no
answer is a sentence."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stillhouse.errors import UserError
from stillhouse.store import server as serving_module
from stillhouse.store.remote import Journal
from stillhouse.store.server import Server, Vocabulary

NAMES = Vocabulary({f"<{i}>": i for i in range(9)})
Reply = Callable[[Any], None]


@contextmanager
def serving(reply: Reply) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that answers every request by `reply(handler)`: its address, and the headers that it was sent."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(dict(self.headers))
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with suppress(OSError):
                reply(self)

        do_GET = do_POST

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()


def sends(body: bytes, status: int = 200, **headers: str) -> Reply:
    def reply(handler: Any) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def answers(value: Any) -> Reply:
    return sends(json.dumps(value).encode())


def scored(*positions: Any) -> dict[str, Any]:
    return {"choices": [{"logprobs": {"top_logprobs": list(positions)}}]}


FINE = scored(None, {"<1>": -0.5, "<2>": -1.5}, {"<3>": -0.1}, {"<4>": -2.0})


def asked(url: str, **options: Any) -> Server:
    return Server(url, "m", top=2, **{"timeout": 5.0, "retries": 0, "backoff": 0.01, "key": "secret", **options})


def refusal(reply: Reply, ask: Callable[[Server], Any], **options: Any) -> str:
    with serving(reply) as (url, _), pytest.raises(UserError) as told:
        ask(asked(url, **options))
    text = str(told.value)
    assert "\n" not in text and "secret" not in text and len(text) < 600, text
    return text


def score(server: Server) -> Any:
    return server.score([1, 2, 3], NAMES)


def write(server: Server) -> Any:
    return server.write("a", NAMES)


def chat(server: Server) -> Any:
    return server.write([{"role": "user", "content": "a"}], NAMES)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirection_is_followed_and_the_key_stays_with_its_host(status: int) -> None:
    with serving(answers(FINE)) as (there, seen), serving(sends(b"", status, Location=f"{there}/v2")) as (url, first):
        assert score(asked(url)).ids[0] == [1, 2]
    assert first[0]["Authorization"] == "Bearer secret"
    assert len(seen) == 1 and "Authorization" not in seen[0] and seen[0]["Content-Length"] != "0"


def test_a_redirection_within_a_host_keeps_the_key() -> None:
    def reply(handler: Any) -> None:
        there = answers(FINE) if handler.path.startswith("/v2") else sends(b"", 307, Location="/v2/completions")
        there(handler)

    with serving(reply) as (url, seen):
        assert score(asked(url)).ids[0] == [1, 2]
    assert [s.get("Authorization") for s in seen] == ["Bearer secret"] * 2


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "/", "gopher:x", "data:,{}"])
def test_a_redirection_without_end_or_to_a_file_is_a_sentence(location: str) -> None:
    assert "refused the request (30" in refusal(sends(b"x", 302, Location=location), score)


def drip_body(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def drip_header(handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    for _ in range(100):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.05)


def drip_error(handler: Any) -> None:
    handler.send_response(500)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.mark.parametrize("reply", [drip_body, drip_header, drip_error, lambda handler: time.sleep(5)])
def test_a_whole_answer_has_its_time(reply: Reply) -> None:
    start = time.monotonic()
    assert "no answer in 1 tries" in refusal(reply, score, timeout=0.3)
    assert time.monotonic() - start < 4


def test_an_answer_without_end_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b" " * 65536)

    monkeypatch.setattr(serving_module, "LARGEST", 1 << 22)
    assert "an answer of more than 4 MB" in refusal(endless, score)


BROKEN: list[Any] = [
    {"choices": 3},
    {"choices": "abc"},
    {"choices": {"0": {}}},
    {"choices": [3]},
    {"choices": ["abc"]},
    {"choices": [[]]},
    {"choices": [{"logprobs": 3}]},
    {"choices": [{"logprobs": [1]}]},
    {"choices": [{"logprobs": {"top_logprobs": 3}}]},
    {"choices": [{"logprobs": {"top_logprobs": {"a": 1}}}]},
    scored(None, 3, 3, 3),
    scored(None, [1], [2], [3]),
    scored(None, "abc", "abc", "abc"),
    scored(None, {"<1>": "high"}, {}, {}),
    scored(None, {"<1>": True}, {}, {}),
    scored(None, {"<1>": [0.1]}, {}, {}),
    scored(None, {"<1>": {"x": 1}}, {}, {}),
]


@pytest.mark.parametrize("value", BROKEN)
def test_a_malformed_answer_is_a_sentence(value: Any) -> None:
    assert "gave an answer that cannot be read: " in refusal(answers(value), score)


WRITTEN: list[Any] = [
    {"choices": [{"text": 3}]},
    {"choices": [{"text": "x", "logprobs": {"tokens": 3, "top_logprobs": [{}]}}]},
    {"choices": [{"text": "x", "logprobs": {"tokens": [3], "top_logprobs": [{}]}}]},
    {"choices": [{"text": "x", "logprobs": {"tokens": [["<1>"]], "top_logprobs": [{}]}}]},
    {"choices": [{"text": "x", "logprobs": {"tokens": ["<1>", "<2>"], "top_logprobs": [{}]}}]},
    {"choices": [{"text": "x", "logprobs": {"tokens": ["<1>"], "top_logprobs": [{"<1>": 0.4}]}}]},
]
SAID: list[Any] = [
    {"choices": [{"message": 3}]},
    {"choices": [{"message": {"content": 3}}]},
    {"choices": [{"message": {"content": "x"}, "logprobs": {"content": {"a": 1}}}]},
    {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [3]}}]},
    {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"token": 3}]}}]},
    {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"token": "<1>", "top_logprobs": 3}]}}]},
    {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"token": "<1>", "top_logprobs": [3]}]}}]},
    {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"token": "<1>", "logprob": "a"}]}}]},
    {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"token": "<1>", "logprob": 0.5}]}}]},
]


@pytest.mark.parametrize(("ask", "value"), [*((write, v) for v in WRITTEN), *((chat, v) for v in SAID)])
def test_a_malformed_completion_is_a_sentence(ask: Any, value: Any) -> None:
    assert "gave an answer that cannot be read: " in refusal(answers(value), ask)


@pytest.mark.parametrize(
    ("position", "says"),
    [
        ({"<1>": 0.3}, "choices.0.logprobs.top_logprobs.1.<1> is 0.3, but no log-probability is above 0"),
        ({"<1>": 12}, "is 12, but no log-probability is above 0"),
        ({"<1>": float("nan")}, "is nan, but no log-probability is above 0"),
        ({"<1>": float("inf")}, "is inf, but no log-probability is above 0"),
        ({"<1>": -0.1, "<2>": -0.2}, "probabilities of 1.724 together, which is above 1"),
        ({"<1>": -0.1, "unknown": -0.2}, "probabilities of 1.724 together, which is above 1"),
    ],
)
def test_what_is_no_probability_is_refused(position: Any, says: str) -> None:
    assert says in refusal(answers(scored(None, position, {}, {})), score)


def test_rounding_and_absent_values_are_taken() -> None:
    with serving(answers(scored(None, {"<1>": 1e-5, "<2>": None}, {"<3>": -1e300}, {"<4>": float("-inf")}))) as (
        url,
        _,
    ):
        answer = score(asked(url))
    assert answer.ids == [[1], [], []] and answer.log_probs == [[0.0], [], []]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b"3", b'"x"', b'{"a": ' + b"1" * 6000 + b"}", b"<html>"]
)
def test_what_is_no_json_is_a_sentence(body: bytes) -> None:
    assert "gave no answer in 1 tries (the last: " in refusal(sends(body), score)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b"\xff", b'{"error": 3}', b'{"error": {"message": {}}}', b"a\nb"]
)
def test_an_error_with_any_body_is_a_sentence(body: bytes) -> None:
    assert "refused the request (418)" in refusal(sends(body, 418), score)


@pytest.mark.parametrize("after", ["nan", "-5", "Thu, 99 Foo", "1e400", "", "soon"])
def test_any_retry_after_is_understood(after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(serving_module.time, "sleep", waits.append)
    refusal(sends(b"{}", 429, Retry_After=after), score, retries=1)
    assert 0 <= waits[-1] <= 300


@pytest.mark.parametrize(
    "url", ["localhost:8000", "file:///etc/passwd", "http://", "http://a b/v1", "http://a\n/v1", "x"]
)
def test_an_address_that_is_none_is_told_at_once(url: str) -> None:
    with pytest.raises(UserError, match="begins with http:// or https://"):
        Server(url, "m")


def test_a_password_and_a_broken_key_are_told_at_once() -> None:
    with pytest.raises(UserError, match="may hold no password") as told:
        Server("http://me:hidden@host/v1", "m")
    assert "hidden" not in str(told.value)
    with pytest.raises(UserError, match="characters that no header can hold") as told:
        Server("http://host/v1", "m", key="hid\nden")
    assert "hid" not in str(told.value).replace("which", "")


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "[" * 50_000,
        '{"sample": 0, "ids": 3, "log_probs": [], "tokens": [], "text": ""}',
        '{"sample": 0, "ids": [[1]], "log_probs": [[0.5]], "tokens": [], "text": ""}',
        '{"sample": 0, "ids": [[1]], "log_probs": [[-0.5], [-1]], "tokens": [], "text": ""}',
        '{"sample": 0, "ids": [["x"]], "log_probs": [[-0.5]], "tokens": [], "text": ""}',
        '{"sample": 0, "ids": [[-1]], "log_probs": [[-0.5]], "tokens": [], "text": ""}',
        '{"sample": 0, "ids": [[1]], "log_probs": [[NaN]], "tokens": [], "text": ""}',
        '{"sample": "x", "ids": [[1]], "log_probs": [[-0.5]], "tokens": [], "text": ""}',
        '{"sample": 0, "ids": [[1]], "log_probs": [[-0.5]], "tokens": ["x"], "text": ""}',
        '{"sample": 0, "ids": [[1]], "log_probs": [[-0.5]], "tokens": [], "text": 3}',
    ],
)
def test_a_line_of_the_journal_that_is_no_answer_is_asked_for_again(line: str, tmp_path: Path) -> None:
    good = '{"sample": 1, "ids": [[1]], "log_probs": [[-0.5]], "tokens": [], "text": ""}'
    (tmp_path / "j").write_text(f"{line}\n{good}\n")
    assert set(Journal(tmp_path / "j").answers) == {1}

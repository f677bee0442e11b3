"""A teacher behind an OpenAI-compatible HTTP server, with retries and a rate limit.

`Server.score` asks for the top log-probabilities of every token of a sequence (completions with `echo`), `Server.write`
for a completion and the top log-probabilities of its tokens (completions, or chat). `asking` puts the answers into a
store.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import os
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from stillhouse.config.messages import shown
from stillhouse.errors import UserError

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""Answers that may be others a moment later."""
LARGEST = 1 << 27
"""Bytes of an answer."""
HIGHEST = 1e-3
"""How far a log-probability may lie above 0, by a server's rounding; the sum of probabilities, ten times as far above
1."""


class TooLong(Exception):
    """The server says that a sample is longer than its context."""


@dataclass(frozen=True)
class Answer:
    """A server's answer for one sample: for each of L positions the most probable tokens; `tokens` are those it
    wrote."""

    ids: list[list[int]]
    log_probs: list[list[float]]
    tokens: list[int] = field(default_factory=list)
    text: str = ""

    def check(self) -> None:
        """Raises `TypeError` or `ValueError` for an answer, read from a file, that `Server` did not give."""
        if len(self.ids) != len(self.log_probs) or not isinstance(self.text, str):
            raise ValueError("not as many ids as log-probabilities")
        for names, values in zip(self.ids, self.log_probs):
            if len(names) != len(values) or not all(isinstance(v, float | int) and v <= 0 for v in values):
                raise ValueError("values that are no log-probabilities")
        if any(not isinstance(n, int) or not 0 <= n < 10**9 for row in (*self.ids, self.tokens) for n in row):
            raise ValueError("ids that are no tokens")

    def arrays(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(L, k) log-probabilities, falling; (L, k) ids; (L,) the mass of all others. Where fewer are known, minus
        infinity at an id that is named already."""
        values = np.full((len(self.ids), k), -np.inf, np.float32)
        ids = np.zeros((len(self.ids), k), np.int64)
        for row, (names, found) in enumerate(zip(self.ids, self.log_probs)):
            best = sorted(zip(found, names), reverse=True)[:k]
            if best:
                ids[row] = best[0][1]
                values[row, : len(best)], ids[row, : len(best)] = zip(*best)
        tail = np.clip(1 - np.exp(values.astype(np.float64)).sum(1), 0, 1).astype(np.float32)
        return values, ids, tail


class Vocabulary:
    """Ids of what servers call tokens: `token_id:17`, the tokenizer's own pieces, or their text.

    Args:
        tokenizer: a transformers tokenizer, or a mapping of text to id.
    """

    def __init__(self, tokenizer: Any) -> None:
        if isinstance(tokenizer, Mapping):
            self._ids = {str(k): int(v) for k, v in tokenizer.items()}
        else:
            pieces: dict[str, int] = tokenizer.get_vocab()
            texts = {i: tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in pieces.values()}
            counts: dict[str, int] = {}
            for text in texts.values():
                counts[text] = counts.get(text, 0) + 1
            self._ids = {**pieces, **{text: i for i, text in texts.items() if counts[text] == 1}}

    def id(self, name: str) -> int | None:
        """None for a token that it does not have: its mass counts to the others."""
        head, _, number = name.partition("token_id:")
        if not head and number.isdecimal() and len(number) < 10:
            return int(number)
        return self._ids.get(name)


@dataclass
class Server:
    """An OpenAI-compatible server.

    Args:
        url: up to the version, such as http://localhost:8000/v1.
        model: as the server calls it.
        top: how many log-probabilities to ask for at each position.
        key: an API key; default: the environment's STILLHOUSE_SERVER_KEY, then OPENAI_API_KEY.
        timeout: seconds to wait for a whole answer.
        retries: how often to ask again after an error that may pass (no connection, a slow answer, 429, 5xx), waiting
            longer each time, or as long as the server says (Retry-After).
        rate: requests a second, at most.
        backoff: seconds before the first repetition; doubled for each further one.
        context: tokens that the model can read; None: the server says when a sample is too long.

    A redirection is followed, to another host without the key.

    Raises:
        UserError: a URL that is not one of HTTP, or a key that no header can hold.
    """

    url: str
    model: str
    top: int = 20
    key: str | None = None
    timeout: float = 120.0
    retries: int = 8
    rate: float | None = None
    backoff: float = 0.5
    context: int | None = None
    _next: float = field(default=0.0, repr=False)
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not self.url.isprintable() or " " in self.url:
            raise UserError(f"A server's address begins with http:// or https://; given: {shown(self.url)}.")
        if "@" in parts.netloc:
            raise UserError(
                "A server's address is written into the store, so it may hold no password; give the key by "
                "STILLHOUSE_SERVER_KEY."
            )
        key = self._key
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError("The server's key (STILLHOUSE_SERVER_KEY) holds characters that no header can hold.")

    @property
    def _key(self) -> str | None:
        return self.key or os.environ.get("STILLHOUSE_SERVER_KEY") or os.environ.get("OPENAI_API_KEY") or None

    def score(self, ids: Sequence[int], vocabulary: Vocabulary) -> Answer:
        """The top log-probabilities after each of the L ids: position t is the prediction of token t + 1; the last,
        that of a token beyond.

        Raises:
            UserError: a server that cannot echo, or gives up.
            TooLong: more ids than the server's context holds.
        """
        if self.context is not None and len(ids) > self.context:
            raise TooLong(f"{len(ids)} tokens, but the context holds {self.context}")
        reply = self.ask(
            "completions",
            {"prompt": list(map(int, ids)), "max_tokens": 1, "echo": True, "logprobs": self.top, "temperature": 0},
        )
        logprobs = self._choice(reply).part("logprobs", dict)
        positions = logprobs.part("top_logprobs", list).items()
        if not positions:
            return Answer([], [])
        if len(positions) < len(ids):
            raise UserError(
                f"{self.url} answered with {len(positions)} positions for {len(ids)} tokens: it does not echo the "
                "prompt with its log-probabilities; use a server that does, or let it write completions."
            )
        rows = [_named(position.mapping(), vocabulary) for position in positions[1 : len(ids) + 1]]
        rows += [([], [])] * (len(ids) - len(rows))
        return Answer([r[0] for r in rows], [r[1] for r in rows])

    def write(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        vocabulary: Vocabulary,
        max_tokens: int = 256,
        temperature: float = 0.0,
    ) -> Answer:
        """A completion of a text, or of a chat's messages, and the top log-probabilities of each of its tokens; empty
        where the server wrote nothing.

        Raises:
            UserError: a server that gives no log-probabilities, or writes a token that the vocabulary does not have, or
                gives up.
            TooLong: a prompt longer than the server's context.
        """
        common = {"max_tokens": max_tokens, "temperature": temperature}
        if isinstance(prompt, str):
            reply = self.ask("completions", {"prompt": prompt, "logprobs": self.top, **common})
            choice = self._choice(reply)
            logprobs = choice.part("logprobs", dict)
            names = [token.of(str) for token in logprobs.part("tokens", list).items()]
            rows = [_named(p.mapping(), vocabulary) for p in logprobs.part("top_logprobs", list).items()]
            text = choice.part("text", str).of(str)
        else:
            reply = self.ask(
                "chat/completions", {"messages": list(prompt), "logprobs": True, "top_logprobs": self.top, **common}
            )
            choice = self._choice(reply)
            content = choice.part("logprobs", dict).part("content", list).items()
            names = [c.part("token", str).of(str) for c in content]
            tops = [c.part("top_logprobs", list).items() or [c] for c in content]
            rows = [
                _named({t.part("token", str).of(str): t.part("logprob", object) for t in top}, vocabulary)
                for top in tops
            ]
            text = choice.part("message", dict).part("content", str).of(str)
        if rows and len(names) != len(rows):
            raise UserError(
                f"{self.url} gave an answer that cannot be read: it names {len(names)} tokens, with log-probabilities "
                f"of {len(rows)}."
            )
        if text and not rows:
            raise UserError(
                f"{self.url} wrote a completion without log-probabilities; start it with log-probabilities on, or use "
                "another server."
            )
        tokens = [vocabulary.id(n) for n in names[: len(rows)]]
        lost = next((n for n, t in zip(names, tokens) if t is None), None)
        if lost is not None:
            raise UserError(
                f"{self.url} wrote the token {lost!r}, which the student's tokenizer does not have; they must share "
                "one vocabulary."
            )
        return Answer([r[0] for r in rows], [r[1] for r in rows], [t for t in tokens if t is not None], text)

    def _choice(self, reply: Mapping[str, Any]) -> _Part:
        """The one choice of an answer; an empty one where there is none."""
        choices = _Part(reply, "the answer", self.url).part("choices", list).items()
        return choices[0] if choices else _Part({}, "choices.0", self.url)

    def ask(self, path: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """POST, again and again while the error may pass.

        Raises:
            UserError: an error that will not pass, an answer without end, or the last of `retries`.
            TooLong: a 400 that speaks of the context's length.
        """
        key = self._key
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        body, url = json.dumps({"model": self.model, **payload}).encode(), f"{self.url.rstrip('/')}/{path}"
        last = ""
        for number in range(self.retries + 1):
            self._wait_turn()
            wait = min(self.backoff * 2**number, 60.0)
            try:
                reply = json.loads(_posted(urllib.request.Request(url, body, headers), self.timeout))
                if not isinstance(reply, dict):
                    raise ValueError(f"an answer of type {type(reply).__name__}")
                return reply
            except urllib.error.HTTPError as error:
                text = _message(error)
                if error.code not in PASSING:
                    if error.code in (400, 413, 422) and any(
                        w in text.lower() for w in ("context length", "context window", "too long", "maximum context")
                    ):
                        raise TooLong(text) from None
                    raise UserError(f"{url} refused the request ({error.code}): {text}") from None
                last, wait = f"{error.code}: {text}", _retry_after(error.headers.get("Retry-After"), wait)
            except UserError:
                raise
            except (
                OSError,
                http.client.HTTPException,
                ValueError,
                RecursionError,
            ) as error:  # no connection, a timeout, an answer cut short or no JSON
                last = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if number < self.retries:
                time.sleep(wait)
        raise UserError(
            f"{url} gave no answer in {self.retries + 1} tries (the last: {last}); its earlier answers are stored, "
            "start the same command again to resume."
        )

    def _wait_turn(self) -> None:
        if not self.rate:
            return
        with self._turn:
            now = time.monotonic()
            at = max(self._next, now)
            self._next = at + 1 / self.rate
        time.sleep(at - now)


T = TypeVar("T")
_KINDS: dict[type, str] = {dict: "a mapping", list: "a list", str: "text"}


@dataclass(frozen=True)
class _Part:
    """A part of an answer and its place there, for sentences about what is not as it should be."""

    value: Any
    place: str
    url: str

    def of(self, kind: type[T]) -> T:
        """The value, which is of a kind; an empty one where it is null."""
        if self.value is None:
            return kind()
        if not isinstance(self.value, kind):
            raise self.fault(f"must be {_KINDS[kind]}, but is {shown(self.value)}")
        return self.value

    def part(self, key: str, kind: type) -> _Part:
        inner = _Part(self.of(dict).get(key), f"{self.place}.{key}".removeprefix("the answer."), self.url)
        inner.of(kind)
        return inner

    def items(self) -> list[_Part]:
        return [_Part(value, f"{self.place}.{i}", self.url) for i, value in enumerate(self.of(list))]

    def mapping(self) -> dict[str, _Part]:
        return {key: _Part(value, f"{self.place}.{key}", self.url) for key, value in self.of(dict).items()}

    def log_prob(self) -> float | None:
        """The value as a log-probability; None where it is null or minus infinity."""
        value = self.value
        if value is None or value == -math.inf:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fault(f"must be a log-probability, but is {shown(value)}")
        if not value <= HIGHEST:  # so also for one that is not a number
            raise self.fault(f"is {value:.6g}, but no log-probability is above 0 (are these probabilities or scores?)")
        return min(float(value), 0.0) if value > -1e30 else None

    def fault(self, what: str) -> UserError:
        return UserError(f"{self.url} gave an answer that cannot be read: {self.place} {what}.")


def _named(position: Mapping[str, _Part], vocabulary: Vocabulary) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities of the tokens that the vocabulary has.

    Raises:
        UserError: a value that is no log-probability, or probabilities whose sum is above 1.
    """
    found: dict[int, float] = {}
    total = 0.0
    for name, part in position.items():
        value = part.log_prob()
        if value is None:
            continue
        total += math.exp(value)
        if total > 1 + 10 * HIGHEST:
            raise part.fault(f"and the tokens before it have probabilities of {total:.4g} together, which is above 1")
        token = vocabulary.id(name)
        if token is not None:
            found[token] = max(value, found.get(token, -math.inf))
    return list(found), list(found.values())


# ---- HTTP ------------------------------------------------------------------------------------------------------------


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows with the same request, to another origin without its key."""

    max_redirections = 5

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        there, here = urllib.parse.urlsplit(newurl), urllib.parse.urlsplit(req.full_url)
        if code == 303 or there.scheme not in ("http", "https"):
            return None  # an error of this code
        fp.close()  # its text may be without end
        same = (there.scheme, there.netloc) == (here.scheme, here.netloc)
        kept = {k: v for k, v in req.header_items() if k in ("Content-type", "Authorization")}
        if not same:
            kept.pop("Authorization", None)
        return urllib.request.Request(newurl, req.data, kept)

    def http_error_308(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        return self.http_error_302(req, fp, code, msg, headers)


class _Deadline:
    """Ends a connection that has not given its headers in time, whatever trickles in."""

    def __init__(self, seconds: float) -> None:
        self.end, self.passed = time.monotonic() + seconds, False
        self._connections: list[http.client.HTTPConnection] = []
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True
        self._timer.start()

    def _cut(self) -> None:
        self.passed = True
        for connection in self._connections:
            with suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def plain(self, host: str, **options: Any) -> http.client.HTTPConnection:
        self._connections.append(http.client.HTTPConnection(host, **options))
        return self._connections[-1]

    def secure(self, host: str, **options: Any) -> http.client.HTTPConnection:
        self._connections.append(http.client.HTTPSConnection(host, **options))
        return self._connections[-1]

    def close(self) -> None:
        self._timer.cancel()


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self.deadline = deadline

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self.deadline.plain, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self.deadline = deadline

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self.deadline.secure, req)


def _posted(request: urllib.request.Request, seconds: float) -> bytes:
    """The whole answer, in this time at most. Raises what urllib does, `TimeoutError`, and `UserError` for an answer
    without end."""
    deadline = _Deadline(seconds)
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _Http(deadline),
        _Https(deadline),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    try:
        with opener.open(request, timeout=seconds) as answer:
            return _read(answer, deadline.end, LARGEST, request.full_url)
    except urllib.error.HTTPError as error:
        with suppress(OSError, http.client.HTTPException, UserError):
            error.stillhouse_body = _read(error, deadline.end, 1 << 16, request.full_url)  # type: ignore[attr-defined]
        raise
    except (OSError, http.client.HTTPException):
        if deadline.passed:
            raise TimeoutError(f"no whole answer in {seconds:g} seconds") from None
        raise
    finally:
        deadline.close()


def _read(answer: Any, end: float, largest: int, url: str) -> bytes:
    parts: list[bytes] = []
    size = 0
    while chunk := answer.read1(1 << 20):
        parts.append(chunk)
        size += len(chunk)
        if size > largest:
            raise UserError(
                f"{url} gave an answer of more than {largest >> 20} MB, which no answer needs; it was not read."
            )
        if time.monotonic() > end:
            raise TimeoutError("no whole answer in time")
    if getattr(answer, "length", None):
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(parts)


def _message(error: urllib.error.HTTPError) -> str:
    try:
        text = getattr(error, "stillhouse_body", b"").decode(errors="replace")
        reply = json.loads(text)
        inner = reply.get("error", reply) if isinstance(reply, dict) else reply
        return " ".join(str(inner.get("message", inner) if isinstance(inner, dict) else inner).split())[:300]
    except (ValueError, RecursionError):
        return " ".join(str(error.reason).split())[:300]


def _retry_after(header: str | None, otherwise: float) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date; at most five minutes."""
    if not header:
        return otherwise
    try:
        seconds = float(header)
        if math.isnan(seconds):
            return otherwise
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return otherwise
    return min(max(seconds, 0.0), 300.0)

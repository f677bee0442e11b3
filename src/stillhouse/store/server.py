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
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stillhouse.errors import UserError

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""Answers that may be others a moment later."""


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
        if not head and number.isdigit():
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
        timeout: seconds to wait for an answer.
        retries: how often to ask again after an error that may pass (no connection, a slow answer, 429, 5xx), waiting
            longer each time, or as long as the server says (Retry-After).
        rate: requests a second, at most.
        backoff: seconds before the first repetition; doubled for each further one.
        context: tokens that the model can read; None: the server says when a sample is too long.
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
        positions = ((reply.get("choices") or [{}])[0].get("logprobs") or {}).get("top_logprobs") or []
        if not positions:
            return Answer([], [])
        if len(positions) < len(ids):
            raise UserError(
                f"{self.url} answered with {len(positions)} positions for {len(ids)} tokens: it does not echo the "
                "prompt with its log-probabilities; use a server that does, or let it write completions."
            )
        rows = [_named(position or {}, vocabulary) for position in positions[1 : len(ids) + 1]]
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
            choice = (reply.get("choices") or [{}])[0]
            logprobs = choice.get("logprobs") or {}
            names, tops = logprobs.get("tokens") or [], logprobs.get("top_logprobs") or []
            rows = [_named(position or {}, vocabulary) for position in tops]
            text = choice.get("text") or ""
        else:
            reply = self.ask(
                "chat/completions", {"messages": list(prompt), "logprobs": True, "top_logprobs": self.top, **common}
            )
            choice = (reply.get("choices") or [{}])[0]
            content = (choice.get("logprobs") or {}).get("content") or []
            names = [c["token"] for c in content]
            rows = [
                _named({t["token"]: t["logprob"] for t in c.get("top_logprobs") or [c]}, vocabulary) for c in content
            ]
            text = (choice.get("message") or {}).get("content") or ""
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

    def ask(self, path: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """POST, again and again while the error may pass.

        Raises:
            UserError: an error that will not pass, or the last of `retries`.
            TooLong: a 400 that speaks of the context's length.
        """
        key = self.key or os.environ.get("STILLHOUSE_SERVER_KEY") or os.environ.get("OPENAI_API_KEY")
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        body, url = json.dumps({"model": self.model, **payload}).encode(), f"{self.url.rstrip('/')}/{path}"
        last = ""
        for number in range(self.retries + 1):
            self._wait_turn()
            wait = min(self.backoff * 2**number, 60.0)
            try:
                with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=self.timeout) as answer:
                    reply = json.loads(answer.read())
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
            except (
                OSError,
                http.client.HTTPException,
                ValueError,
            ) as error:  # no connection, a timeout, an answer cut short or no JSON
                last = f"{type(error).__name__}: {error}"
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


def _named(position: Mapping[str, float], vocabulary: Vocabulary) -> tuple[list[int], list[float]]:
    found: dict[int, float] = {}
    for name, value in position.items():
        token = vocabulary.id(name)
        if token is not None and value is not None and math.isfinite(value):
            found[token] = max(float(value), found.get(token, -math.inf))
    return list(found), list(found.values())


def _message(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read().decode(errors="replace")
        reply = json.loads(text)
        inner = reply.get("error", reply) if isinstance(reply, dict) else reply
        return str(inner.get("message", inner) if isinstance(inner, dict) else inner)[:300]
    except (ValueError, OSError, http.client.HTTPException):
        return str(error.reason)


def _retry_after(header: str | None, otherwise: float) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date; at most five minutes."""
    if not header:
        return otherwise
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError):
            return otherwise
    return min(max(seconds, 0.0), 300.0)

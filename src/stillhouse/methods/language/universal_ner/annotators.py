"""Teachers that write down the entities of a passage: a function, or a chat model behind a server. Their answers are
stored as they come, so that an interrupted pass asks nothing twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from stillhouse import catalog
from stillhouse.config.specs import Spec
from stillhouse.errors import UserError
from stillhouse.methods.language.universal_ner.annotation import messages
from stillhouse.store.server import Server, TooLong

Annotator = Callable[[str], str | None]


class AnnotatorSpec(Spec):
    """Who annotates: exactly one of `call` and `server`."""

    call: str | None = Field(
        None, description="file:PATH.py:FUNCTION, called with a passage; gives a text, such as [('Bonn', 'city')]."
    )
    server: str | None = Field(
        None, description="URL of an OpenAI-compatible server, such as http://localhost:8000/v1."
    )
    model: str | None = Field(None, description="Of the server.")
    max_tokens: int = Field(512, ge=1, description="Of an answer.")
    rate: float | None = Field(None, gt=0, description="Requests a second, at most.")
    workers: int = Field(4, ge=1, description="Requests at the same time.")
    version: str = Field("", description="Change it to have everything annotated again.")

    @model_validator(mode="after")
    def _one_kind(self) -> AnnotatorSpec:
        if (self.call is None) == (self.server is None):
            raise ValueError("give exactly one of call and server")
        if self.server is not None and self.model is None:
            raise ValueError("a server needs `model`, as it calls it")
        return self

    def annotator(self) -> Annotator:
        """The teacher as a function of a passage.

        Raises:
            UserError: no such file or function.
        """
        if self.call is not None:
            module, name = catalog.load_file(self.call)
            function = getattr(module, name or "", None)
            if not callable(function):
                raise UserError(f"annotator.call: '{self.call}' names no function; give file:PATH.py:FUNCTION.")
            made: Annotator = function
            return made
        server = Server(self.server or "", self.model or "", rate=self.rate)

        def ask(passage: str) -> str | None:
            payload = {"messages": messages(passage), "max_tokens": self.max_tokens, "temperature": 0}
            try:
                reply = server.ask("chat/completions", payload)
            except TooLong:
                return None
            return ((reply.get("choices") or [{}])[0].get("message") or {}).get("content")

        return ask

    def uses(self) -> dict[str, Any]:
        """What its answers depend on, as far as it is known."""
        code = None
        if self.call is not None:
            path = Path(self.call.removeprefix("file:").partition(".py")[0] + ".py").expanduser()
            code = path if path.is_file() else None
        return {**self.model_dump(mode="json", exclude={"rate", "workers"}), "code": code}


def annotate(passages: Sequence[str], ask: Annotator, journal: Path, workers: int) -> list[str | None]:
    """The annotator's answer for each passage; None where it had none.

    An exception of the annotator is no answer, but a `UserError`, such as of a server that gave up, ends the pass: what
    was answered is in the journal, and the next pass begins there.

    Args:
        passages: texts.
        ask: the annotator; called from several threads where there are several workers.
        journal: a file to which answers are appended, a JSON line each.
        workers: calls at the same time.
    """
    done: dict[int, str | None] = {}
    if journal.is_file():
        lines = journal.read_text(encoding="utf-8").split("\n")
        whole = [json.loads(line) for line in lines[:-1]]  # the last line is empty, or was cut off
        done = {int(number): answer for number, answer in whole}
        journal.write_text("".join(line + "\n" for line in lines[:-1]), encoding="utf-8")
    lock = threading.Lock()

    def one(number: int) -> None:
        try:
            answer = ask(passages[number])
        except UserError:
            raise
        except Exception:
            answer = None
        answer = answer if isinstance(answer, str) else None
        with lock, journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps([number, answer]) + "\n")
            done[number] = answer

    ahead = [i for i in range(len(passages)) if i not in done]
    if workers == 1:
        for number in ahead:
            one(number)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, ahead))
    return [done[i] for i in range(len(passages))]

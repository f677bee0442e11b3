"""Conversations as batches of tokens: only the answers are learned, and turns after the first may come in any order.

A conversation is a list of turns, (what the user says, what is answered). `Template` writes it as one text, in pieces
that are encoded one by one, so that a mask of the answers is exact to the token. As everywhere, a batch's `label`
stands where its prediction stands (see `stillhouse.data.text`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse import catalog
from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.dataset import BatchKey
from stillhouse.data.source import existing, located
from stillhouse.data.split import cut, in_balance
from stillhouse.data.splits import Splits
from stillhouse.data.text_files import read_json, read_json_lines
from stillhouse.errors import UserError
from stillhouse.files import digest
from stillhouse.functional.counting import IGNORED
from stillhouse.functional.ragged import RaggedArray
from stillhouse.models.tokenizer import encode, identity, marks, size, tokenizer
from stillhouse.randomness import permutation
from stillhouse.signals import Batch
from stillhouse.tasks.tokens import Tokens

Turn = tuple[str, str]
Turns = list[Turn]
Part = tuple[list[int], list[int]]
"""Ids of a turn, and their labels: the ids where they are an answer's, else -100."""
Encoder = Callable[[Sequence[str]], list[list[int]]]
ASKING, ANSWERING = ("human", "user"), ("gpt", "assistant", "model")


class Template(Spec):
    """How a conversation is written as one text: system, ` USER: `, what is said, ` ASSISTANT: `, the answer, the end
    mark, `USER: `, …"""

    system: str = Field("A virtual assistant answers questions from a user based on the provided text.")
    user: str = Field("USER: ", description="Before what the user says.")
    assistant: str = Field("ASSISTANT: ", description="Before an answer.")
    separator: str = Field(" ", description="After the system sentence and after what the user says.")
    end: str | None = Field(None, description="After an answer; null: the tokenizer's end token.")
    spaced: bool = Field(
        True,
        description="false: no separator before `assistant` in training, for tokenizers that add a blank by themselves "
        "(sentencepiece).",
    )
    chat: bool = Field(False, description="The tokenizer's own chat template in place of all keys but `system`.")

    def pieces(self, turns: Sequence[Turn], end: str) -> list[list[tuple[str, bool]]]:
        """For each turn the texts to be encoded one by one, and whether each is learned."""
        out = []
        for number, (said, answer) in enumerate(turns):
            before = self.system + self.separator if number == 0 and self.system else ""
            asked = before + self.user + said + (self.separator if self.spaced else "")
            out.append([(asked, False), (self.assistant, False), (answer + end, True)])
        return out

    def prompt(self, turns: Sequence[Turn], end: str) -> str:
        """The text up to the last answer, which is left out, without a blank at its end: what a server is sent."""
        text = "".join(
            piece for turn in self.model_copy(update={"spaced": True}).pieces(turns, end) for piece, _ in turn
        )
        return text[: len(text) - len(turns[-1][1] + end)].rstrip()


def chat_pieces(tokens: Any, turns: Sequence[Turn], system: str = "") -> list[list[tuple[str, bool]]]:
    """As `Template.pieces`, in a tokenizer's own chat template.

    Raises:
        UserError: a tokenizer without one, or one that writes a turn otherwise once it is answered.
    """
    if not getattr(tokens, "chat_template", None):
        raise UserError("data.options.template.chat: the tokenizer has no chat template; leave it out.")
    messages = [{"role": "system", "content": system}] if system else []
    done, out = "", []
    for said, answer in turns:
        messages.append({"role": "user", "content": said})
        asked: str = tokens.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": answer})
        whole: str = tokens.apply_chat_template(messages, tokenize=False)
        if not asked.startswith(done) or not whole.startswith(asked):
            raise UserError(
                "data.options.template.chat: the tokenizer's chat template writes a turn otherwise once it is "
                "answered, so that answers cannot be told from questions; describe the template by its keys."
            )
        out.append([(asked[len(done) :], False), (whole[len(asked) :], True)])
        done = whole
    return out


def turns_of(messages: Iterable[Mapping[str, Any]], where: str = "conversation") -> Turns:
    """The turns of a list of messages: {from: human | gpt, value}, or {role: user | assistant, content}. A first
    message that is not the user's (a system message, a greeting) is left out.

    Raises:
        UserError: messages that do not alternate, or end without an answer.
    """
    found = [(str(m.get("from", m.get("role"))), m.get("value", m.get("content"))) for m in messages]
    if found and found[0][0] not in ASKING:
        found = found[1:]
    wanted = [ASKING, ANSWERING] * ((len(found) + 1) // 2)
    strange = next((i for i, ((role, _), names) in enumerate(zip(found, wanted)) if role not in names), None)
    if strange is not None or len(found) % 2 or not found:
        wrong = "is empty" if not found else "ends without an answer"
        if strange is not None:
            wrong = f"has '{found[strange][0]}' as its message {strange}"
        raise UserError(f"{where} {wrong}; a conversation alternates between user and assistant, the user first.")
    if not all(isinstance(text, str) for _, text in found):
        raise UserError(f"{where} has a message that is no text.")
    texts = [str(text) for _, text in found]
    return list(zip(texts[::2], texts[1::2]))


def encoded(pieces: Sequence[Sequence[tuple[str, bool]]], encoder: Encoder, begin: Sequence[int]) -> list[Part]:
    """Ids and labels of each turn.

    Args:
        pieces: of the turns, as `Template.pieces` gives them.
        encoder: texts to ids, without special tokens.
        begin: ids before the first piece, such as the beginning of a text.
    """
    ids = iter(encoder([text for turn in pieces for text, _ in turn]))
    out: list[Part] = []
    for number, turn in enumerate(pieces):
        every: list[int] = list(begin) if number == 0 else []
        labels = [IGNORED] * len(every)
        for _, learned in turn:
            own = next(ids)
            every += own
            labels += own if learned else [IGNORED] * len(own)
        out.append((every, labels))
    return out


def joined(parts: Sequence[Part], limit: int | None = None) -> Part:
    """One text of turns, the first of which stays first. A later turn that does not fit into `limit` tokens is left
    out whole, so that no answer is cut."""
    ids, labels = list(parts[0][0]), list(parts[0][1])
    for more, learned in parts[1:]:
        if limit is None or len(ids) + len(more) <= limit:
            ids += more
            labels += learned
    return ids, labels


class ConversationDataset:
    """Conversations as padded batches, (B, L).

    Args:
        conversations: turns, encoded.
        tokenizer: whose ids they are.
        context: tokens that a model reads at most.
        shuffle: draw the order of the turns after the first again each epoch.
    """

    def __init__(self, conversations: Sequence[list[Part]], tokenizer: Any, context: int, shuffle: bool) -> None:
        self.conversations, self.tokenizer = list(conversations), tokenizer
        self.context, self.shuffle = context, shuffle

    def __len__(self) -> int:
        return len(self.conversations)

    def labels(self) -> Tensor:
        """Raises `UserError`: a conversation has no class."""
        raise UserError("A conversation has no class; objectives that look at classes need text to be classified.")

    def __getitem__(self, index: int) -> Batch:
        """One sample, as a training step of seed 0 and epoch 0 would see it."""
        made = self.batch(BatchKey(0, np.array([index % len(self)]), 0, 1), 0)
        return {
            "input": {k: v[0] for k, v in made["input"].items()},
            "label": made["label"][0],
            "index": made["index"][0],
        }

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """`input` (`input_ids`, `attention_mask`), `label` (B, L), `index` (B,)."""
        which = key.indices[key.start : key.stop]
        rows = [self._row(int(i), key.epoch, seed) for i in which]
        ids, labels = RaggedArray.of([r[0][:-1] for r in rows]), RaggedArray.of([r[1][1:] for r in rows])
        every = np.arange(len(rows))
        x = ids.padded(every, self.tokenizer.pad_token_id)
        inside = torch.arange(x.shape[1])[None, :] < torch.from_numpy(ids.lengths)[:, None]
        return {
            "input": {"input_ids": x, "attention_mask": inside.long()},
            "label": labels.padded(every, IGNORED),
            "index": torch.from_numpy(which),
        }

    def _row(self, index: int, epoch: int, seed: int) -> Part:
        parts = self.conversations[index]
        if self.shuffle and len(parts) > 2:
            order = permutation(len(parts) - 1, seed, "turns", epoch, index)
            parts = [parts[0], *(parts[1 + i] for i in order)]
        return joined(parts, self.context + 1)


class ConversationOptions(Spec):
    """data.options of `conversations:` data."""

    tokenizer: str = Field("bpe:512", description="bytes | characters | bpe:SIZE | hf:NAME")
    context: int = Field(
        512, ge=8, description="Tokens that a model reads at most; turns that do not fit are left out."
    )
    template: Template = Field(default_factory=Template)
    merge: bool = Field(
        False, description="Join records of the same first turn: files that repeat a passage, one question each."
    )
    shuffle: bool = Field(True, description="The turns after the first stand by themselves, and come in any order.")
    too_long: Literal["refuse", "drop"] = Field(
        "refuse", description="A conversation of which nothing but the first turn fits."
    )
    test: str | None = Field(None, description="A file of test conversations; default: a tenth of them.")
    val: str | None = Field(None, description="A file of validation conversations.")
    arguments: dict[str, Any] = Field(default_factory=dict, description="file: further arguments of the function.")


@dataclass
class ConversationBundle(Splits):
    """Conversations ready for use.

    Attributes:
        name: as in the recipe.
        task: a causal language model's, with the tokenizer.
        options: as in the recipe.
        splits: turns of each conversation.
        fingerprint: a hash of the conversations and how they are written.
    """

    name: str
    task: Tokens
    options: ConversationOptions
    splits: dict[str, list[Turns]] = field(repr=False)

    def __post_init__(self) -> None:
        facts = self.options.model_dump(mode="json", include={"template", "context", "shuffle"})
        self.fingerprint = digest(identity(self.task.tokenizer), facts, sorted(self.splits.items()))

    @property
    def num_classes(self) -> int:
        """Tokens."""
        return self.task.vocabulary

    @property
    def end(self) -> str:
        """What stands after an answer."""
        return self.options.template.end or str(self.task.tokenizer.eos_token)

    @property
    def evaluation_batch(self) -> int:
        """Samples of a batch for judging: about 8,000 tokens."""
        return max(8192 // self.task.context, 1)

    def encoded(self, conversations: Sequence[Turns]) -> tuple[list[list[Part]], int]:
        """Conversations in ids, and how many turns will not fit (in the order given).

        Raises:
            UserError: one of which nothing but the first turn fits, unless they are dropped.
        """
        tokens, options = self.task.tokenizer, self.options
        begin, out, lost = self.begin, [], 0
        for number, turns in enumerate(conversations):
            parts = encoded(self.pieces(turns), lambda texts: encode(tokens, texts), begin)
            room = options.context + 1 - len(parts[0][0])
            fits = [len(ids) <= room for ids, _ in parts[1:]]
            if room < 0 or (fits and not any(fits)):
                if options.too_long == "refuse":
                    need = len(parts[0][0]) + min((len(p[0]) for p in parts[1:]), default=0)
                    raise UserError(
                        f"{self.name}: conversation {number} needs {need} tokens for its first question, but "
                        f"data.options.context is {options.context}; raise it, or set options.too_long: drop."
                    )
                lost += len(parts) - 1
                continue
            kept = len(joined(parts, options.context + 1)[0])
            lost += sum(len(p[0]) for p in parts) > kept
            out.append(parts)
        return out, lost

    def pieces(self, turns: Sequence[Turn]) -> list[list[tuple[str, bool]]]:
        """The texts of each turn, and whether each is learned."""
        template = self.options.template
        if template.chat:
            return chat_pieces(self.task.tokenizer, turns, template.system)
        return template.pieces(turns, self.end)

    @property
    def begin(self) -> list[int]:
        """Ids before a conversation; a chat template writes them itself."""
        return [] if self.options.template.chat else marks(self.task.tokenizer)[0]

    def asked(self, turns: Sequence[Turn], question: str) -> list[int]:
        """Ids of a conversation with a further question, up to where its answer begins."""
        texts = [text for turn in self.pieces([*turns, (question, "")]) for text, _ in turn][:-1]
        return [*self.begin, *(i for ids in encode(self.task.tokenizer, texts) for i in ids)]

    def dataset(self, split: str, *, train: bool = False) -> ConversationDataset:
        """A split; in training the turns are shuffled. Raises `UserError` for one that is not there."""
        self.require(split)
        rows, _ = self.encoded(self.splits[split])
        return ConversationDataset(rows, self.task.tokenizer, self.options.context, train and self.options.shuffle)


def load(rest: str, spec: DataSpec, options: ConversationOptions, root: Path) -> ConversationBundle:
    """`conversations:PATH.json`, `conversations:PATH.jsonl` or `conversations:file:PATH.py:FUNCTION` as a bundle.

    A record holds `conversations` or `messages`, a list that `turns_of` reads. A function is called with a split
    (train, val, test) and gives such records, or None.

    Raises:
        UserError: no such file, a record that is no conversation, or one that is too long.
    """
    found = {name: _merged(turns) if options.merge else turns for name, turns in _read(rest, options, root).items()}
    texts = [text for turns in found["train"] for turn in options.template.pieces(turns, "") for text, _ in turn]
    name: str = located({"model": options.tokenizer}, root)["model"]
    tokens = tokenizer(name, texts)
    strata = {name: np.zeros(len(turns), np.int64) for name, turns in found.items()}
    portions = cut(strata, spec, len(found["train"]) // 10, in_balance)
    splits = {name: [found[p.source][i] for i in p.rows] for name, p in portions.items()}
    task = Tokens("causal", size(tokens), options.context, tokens, (), options.tokenizer)
    return ConversationBundle(spec.name, task, options, splits)


def _read(rest: str, options: ConversationOptions, root: Path) -> dict[str, list[Turns]]:
    if rest.startswith("file:"):
        module, name = catalog.load_file(rest)
        function = getattr(module, name or "", None)
        if not callable(function):
            raise UserError(f"data.name: '{rest}' names no function; give conversations:file:PATH.py:FUNCTION.")
        records = {split: function(split, **options.arguments) for split in ("train", "val", "test")}
        return {s: _turns(r, f"{rest} ({s})") for s, r in records.items() if r is not None}
    files = {"train": rest, "val": options.val, "test": options.test}
    out = {}
    for split, name in files.items():
        if name is not None:
            path = existing(name, root)
            rows = (read_json if path.suffix == ".json" else read_json_lines)(path)
            out[split] = _turns(rows, f"'{path}'")
    return out


def _turns(records: Sequence[Any], where: str) -> list[Turns]:
    out = []
    for number, record in enumerate(records):
        messages = record.get("conversations", record.get("messages")) if isinstance(record, Mapping) else None
        if not isinstance(messages, list):
            raise UserError(f"{where}, record {number}: there is no list `conversations` or `messages` in it.")
        out.append(turns_of(messages, f"{where}, record {number},"))
    return out


def _merged(conversations: Sequence[Turns]) -> list[Turns]:
    """Conversations of the same first turn as one, in the order in which they first come; a question that is repeated
    stays once."""
    out: dict[str, dict[str, Turn]] = {}
    first: dict[str, Turn] = {}
    for turns in conversations:
        at = json.dumps(turns[0])
        first.setdefault(at, turns[0])
        own = out.setdefault(at, {})
        for turn in turns[1:]:
            own.setdefault(turn[0], turn)
    return [[first[at], *turns.values()] for at, turns in out.items()]

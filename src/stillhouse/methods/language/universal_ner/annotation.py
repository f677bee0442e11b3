"""From a passage and what an annotator writes about it to a conversation (UniversalNER, sections 3.1 and 3.2)."""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from stillhouse.data.conversations import Turns

SYSTEM = "You extract information from texts."
REQUEST = (
    "Find every entity in the passage below and name the type of each. Answer with nothing but a list of tuples: "
    '[("entity 1", "type of entity 1"), ("entity 2", "type of entity 2")].'
)
READ = "I've read this text."
LONGEST = 20_000  # characters of an annotation that are parsed
Negatives = Literal["none", "uniform", "frequency"]
Pair = tuple[str, str]


def messages(passage: str) -> list[dict[str, str]]:
    """What a chat model is asked."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"{REQUEST}\n\nPassage: {passage}"},
    ]


def parsed(text: str | None) -> list[Pair] | None:
    """(entity, type) pairs out of a list of JSON pairs or of Python tuples of strings; None where it is none.

    Nothing is evaluated: `ast.literal_eval` reads constants alone.

    >>> parsed('Here: [("Bonn", "city"), ("Bonn", "city")]'), parsed('[["Elbe", "river"]]'), parsed("none")
    ([('Bonn', 'city')], [('Elbe', 'river')], None)
    """
    text = (text or "")[:LONGEST]
    start, stop = text.find("["), text.rfind("]")
    if start < 0 or stop < start:
        return None
    try:
        values = json.loads(text[start : stop + 1])
    except (ValueError, RecursionError):
        try:
            values = ast.literal_eval(text[start : stop + 1])
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
    if not isinstance(values, list):
        return None
    pairs = []
    for value in values:
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(v, str) for v in value):
            return None
        entity, kind = (" ".join(v.split()) for v in value)
        if entity and kind:
            pairs.append((entity, kind))
    return list(dict.fromkeys(pairs))


@dataclass
class Annotated:
    """A passage with its mentions by type, in lower case, in the order of first mention; `shown`: types as they were
    written."""

    passage: str
    mentions: dict[str, list[str]]
    shown: dict[str, str] = field(default_factory=dict)


def annotated(
    passages: Sequence[str], answers: Sequence[str | None], type_words: int = 5, inside: bool = True
) -> tuple[list[Annotated], dict[str, int]]:
    """The passages whose annotation could be read, and what was left out: passages whose annotator `failed` or gave an
    `unreadable` answer, no list of pairs (such a passage is not taken for one without entities); entities `absent` from
    their passage; and `wordy` types.

    Args:
        passages, answers: in the same order; None: the annotator failed.
        type_words: words of a type, at most.
        inside: leave out entities that the passage does not hold.
    """
    lost: Counter[str] = Counter(failed=0, unreadable=0, absent=0, wordy=0)
    out = []
    for passage, answer in zip(passages, answers, strict=True):
        pairs = parsed(answer)
        if pairs is None:
            lost["unreadable" if answer else "failed"] += 1
            continue
        made = Annotated(passage, {})
        plain = " ".join(passage.split())
        for entity, kind in pairs:
            if inside and entity not in plain:
                lost["absent"] += 1
            elif len(kind.split()) > type_words:
                lost["wordy"] += 1
            else:
                name = kind.lower()
                made.shown.setdefault(name, kind)
                found = made.mentions.setdefault(name, [])
                if entity not in found:
                    found.append(entity)
        out.append(made)
    return out, dict(lost)


def frequencies(found: Sequence[Annotated]) -> dict[str, int]:
    """How many mentions each type has in all passages, the most frequent first."""
    counts: Counter[str] = Counter()
    for one in found:
        counts.update({kind: len(mentions) for kind, mentions in one.mentions.items()})
    return dict(counts.most_common())


def negative_types(
    present: Sequence[str], counts: Mapping[str, int], how: Negatives, wanted: int, draw: np.random.Generator
) -> list[str]:
    """Types that a passage lacks, drawn without replacement: in proportion to their frequency, or all alike."""
    absent = [kind for kind in counts if kind not in set(present)]
    wanted = min(wanted, len(absent))
    if how == "none" or wanted == 0:
        return []
    weights = np.array([counts[k] for k in absent], float) if how == "frequency" else np.ones(len(absent))
    return [absent[i] for i in draw.choice(len(absent), wanted, replace=False, p=weights / weights.sum())]


def question(kind: str) -> str:
    return f"What describes {kind} in the text?"


def conversation(passage: str, answers: Mapping[str, Sequence[str]], tag: str | None = None) -> Turns:
    """The passage, which is acknowledged, and a question for each type, answered by a JSON list.

    Args:
        passage: the text.
        answers: type -> mentions; none: the empty list.
        tag: name of the data set, where several with labels of their own are learned together.
    """
    text = f"Text: {passage}" if tag is None else f"Dataset: {tag} \n Text: {passage}"
    asked = [(question(kind), json.dumps(list(found), ensure_ascii=False)) for kind, found in answers.items()]
    return [(text, READ), *asked]

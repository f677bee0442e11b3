"""How lists of mentions are read out of text and counted (UniversalNER's released evaluation), beside a reader that
forgives more."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

Item = str | tuple[str, ...]
Reader = Callable[[str], list[Item]]
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_LIST = re.compile(r"\[(.*?)\]")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


def normalised(text: str) -> str:
    """In lower case, without punctuation and articles, blanks squeezed.

    >>> normalised("The  White-House.")
    'whitehouse'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def strict(text: str) -> list[Item]:
    """The normalised items of a text that begins with a JSON list, as the released scorer reads it: up to the first
    closing bracket, so that a nested list is an error; any error, such as a number among the items, gives [].

    >>> strict('["IBM", "ibm."] and more'), strict('Sure: ["IBM"]'), strict('["IBM", 3]')
    (['ibm'], [], [])
    """
    found = _LIST.match(text)
    try:
        values = json.loads(found.group(0) if found else "[]")
        return list(dict.fromkeys(_strict_item(v) for v in values))
    except (ValueError, AttributeError, TypeError, RecursionError):
        return []


def _strict_item(value: Any) -> Item:
    return tuple(normalised(part) for part in value) if isinstance(value, list) else normalised(value)


def robust(text: str) -> list[Item]:
    """The normalised items of the first list in a text. Nested lists are flattened, numbers are texts, and of a list
    that breaks off the complete strings count; items without a letter or digit do not.

    >>> robust('Sure: ["IBM", 3, ["Bonn"]] '), robust('["IBM", "Bo')
    (['ibm', '3', 'bonn'], ['ibm'])
    """
    start = text.find("[")
    if start < 0:
        return []
    try:
        values, _ = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        values = [_unescaped(part) for part in _QUOTED.findall(text[start:])]
    return list(dict.fromkeys(item for item in map(normalised, _flat(values)) if item))


def _unescaped(text: str) -> str:
    try:
        return str(json.loads(f'"{text}"'))
    except ValueError:
        return text


def _flat(value: Any) -> list[str]:
    if isinstance(value, list):
        return [text for part in value for text in _flat(part)]
    if isinstance(value, dict):
        return [text for part in value.values() for text in _flat(part)]
    return [] if value is None or isinstance(value, bool) else [str(value)]


def counted(predictions: Sequence[list[Item]], golds: Sequence[list[Item]]) -> dict[str, float]:
    """Micro `precision`, `recall` and `f1` over queries: an item is right that is in the gold list of its query. All 0
    where nothing is found and nothing was to be found."""
    right = sum(item in gold for found, gold in zip(predictions, golds, strict=True) for item in found)
    precision = right / (sum(map(len, predictions)) + 1e-10)
    recall = right / (sum(map(len, golds)) + 1e-10)
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall + 1e-10)}


def scores(predictions: Sequence[str], golds: Sequence[str], read: Reader = strict) -> dict[str, float]:
    """`counted` of answers as texts, read by `strict` or `robust`."""
    return counted([read(text) for text in predictions], [read(text) for text in golds])

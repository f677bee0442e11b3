"""Passages from templates, with entities of 16 types whose frequencies fall off, and an annotator that knows most names
but forgets one in ten and mistakes the type of one in twenty.

`corpus` gives conversations with right answers; `annotate` is the teacher. Names of test passages are those of training
passages; their combinations are new.
"""

from __future__ import annotations

import json
import random

NAMES = {
    "person": "Anna Bruno Clara David Emil Frida Georg Helen",
    "city": "Bonn Prague Vienna Lyon Turin Porto Riga Basel",
    "river": "Elbe Rhine Danube Loire Seine Oder",
    "animal": "otter heron badger beaver lynx stork",
    "plant": "oak birch willow fern ivy maple",
    "tool": "hammer saw chisel plane drill",
    "date": "Monday Tuesday Wednesday Thursday Friday",
    "food": "bread cheese honey soup plums",
    "company": "Nordwerk Altamont Helvex Solvara",
    "instrument": "violin cello flute harp",
    "mountain": "Brocken Eiger Triglav",
    "book": "Waverley Emma Candide",
    "vehicle": "tram ferry wagon",
    "metal": "copper zinc silver",
    "disease": "measles cholera gout",
    "language": "Czech Danish Basque",
}
TYPES = {kind: names.split() for kind, names in NAMES.items()}
SENTENCES = (
    "{person} went from {city} to {city} on {date}",
    "{person} saw a {animal} by the {river} near {city}",
    "{person} and {person} eat {food} in {city}",
    "an {animal} sleeps under the {plant} by the {river}",
    "{person} of {company} left {city} on {date}",
    "{person} took a {tool} and cut the {plant}",
    "{person} plays the {instrument} in {city}",
    "{person} climbed the {mountain} with {person}",
    "{person} reads {book} in {language}",
    "the {vehicle} to {city} leaves on {date}",
    "{company} sells {metal} in {city}",
    "{person} had {disease} in {city}",
)
WEIGHTS = (12, 10, 8, 6, 6, 5, 4, 3, 2, 3, 2, 2)


def passage(draw: random.Random) -> tuple[str, dict[str, list[str]]]:
    """A text and its names by type."""
    found: dict[str, list[str]] = {}
    words = []
    for word in draw.choices(SENTENCES, WEIGHTS)[0].split():
        if word.startswith("{"):
            kind = word.strip("{}")
            name = draw.choice([n for n in TYPES[kind] if n not in found.get(kind, [])])
            found.setdefault(kind, []).append(name)
            words.append(name)
        else:
            words.append(word)
    return " ".join(words) + " .", found


def corpus(split: str, passages: int = 2000, tests: int = 150) -> list[dict[str, object]] | None:
    """Conversations with right answers; about as many questions of absent types as of present ones."""
    if split == "val":
        return None
    draw = random.Random(split)
    seen = {passage_text for passage_text, _ in _many("train", passages)} if split == "test" else set()
    out: list[dict[str, object]] = []
    for text, found in _many(split, passages if split == "train" else 4 * tests):
        if text in seen or (split == "test" and len(out) >= tests):
            continue
        absent = draw.sample([t for t in TYPES if t not in found], len(found))
        asked = [*found, *absent]
        turns = [{"from": "human", "value": f"Text: {text}"}, {"from": "gpt", "value": "I've read this text."}]
        for kind in asked:
            turns.append({"from": "human", "value": f"What describes {kind} in the text?"})
            turns.append({"from": "gpt", "value": json.dumps(found.get(kind, []))})
        out.append({"conversations": turns})
    return out


def _many(split: str, count: int) -> list[tuple[str, dict[str, list[str]]]]:
    draw = random.Random(f"passages {split}")
    return [passage(draw) for _ in range(count)]


def annotate(text: str) -> str:
    """The names that a gazetteer finds, as tuples; the errors are a function of the text."""
    kinds = {name: kind for kind, names in TYPES.items() for name in names}
    draw = random.Random(f"teacher {text}")
    out = []
    for word in text.split():
        if word not in kinds or draw.random() < 0.1:
            continue
        wrong = draw.random() < 0.05
        out.append((word, draw.choice([t for t in TYPES if t != kinds[word]]) if wrong else kinds[word]))
    return repr(out)

"""Captions: what a frozen text encoder says of them, which a student sees, and what they say of places."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError
from stillhouse.models.language import quietly
from stillhouse.randomness import generator, permutation

RELATION = re.compile(r"(.+) (left of|right of|above|below) (.+)")


class TextSpec(Spec):
    """The frozen text encoder."""

    model: str = Field(
        "words",
        description="words: a fixed random vector a word and a place; hf:FOLDER: last hidden states of a model.",
    )
    width: int = Field(32, ge=2, description="words: Dt.")
    length: int = Field(6, ge=1, description="M, tokens of a caption; the rest is cut off.")


def embedded(captions: Sequence[str], spec: TextSpec, root: Path) -> Tensor:
    """(P, M, Dt) features of captions; what stands after a caption's end is 0.

    Args:
        root: where the folder of `hf:` may lie.

    Raises:
        UserError: another encoder.
    """
    if spec.model == "words":
        return torch.stack([_words(c, spec) for c in captions])
    if spec.model.startswith("hf:"):
        return _hidden_states(captions, spec, root)
    raise UserError(f"text.model: words, or hf:FOLDER; given: '{spec.model}'.")


def _words(caption: str, spec: TextSpec) -> Tensor:
    out = torch.zeros(spec.length, spec.width)
    for place, word in enumerate(caption.lower().split()[: spec.length]):
        vector, where = (
            torch.randn(spec.width, generator=generator("text", *keys)) for keys in (("word", word), ("place", place))
        )
        out[place] = (vector + where) / math.sqrt(2)
    return out


@torch.no_grad()
def _hidden_states(captions: Sequence[str], spec: TextSpec, root: Path) -> Tensor:
    from transformers import AutoModel, AutoTokenizer

    name = spec.model.removeprefix("hf:")
    place = str(root / name) if (root / name).is_dir() else name
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(place)
            model = AutoModel.from_pretrained(place, dtype=torch.float32).eval()
    except OSError as error:
        raise UserError(
            f"text.model: '{name}' is no folder of a text encoder ({str(error).splitlines()[0]})."
        ) from None
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    parts = []
    for start in range(0, len(captions), 64):
        given = tokenizer(
            list(captions[start : start + 64]),
            padding="max_length",
            truncation=True,
            max_length=spec.length,
            return_tensors="pt",
        )
        states = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
        parts.append(states * given["attention_mask"][..., None])
    return torch.cat(parts)


class CaptionsSpec(Spec):
    """Which captions the student sees; the same for all seeds."""

    unseen: float = Field(0.2, ge=0, lt=1, description="Share that no student sees.")
    seen: int | None = Field(None, ge=1, description="Of the others, only so many; default: all.")

    def split(self, count: int) -> tuple[list[int], list[int]]:
        """Numbers of the captions seen and of those unseen, of `count`."""
        order = permutation(count, "captions")
        unseen = round(count * self.unseen)
        rest = order[unseen:]
        return sorted(rest if self.seen is None else rest[: self.seen]), sorted(order[:unseen])


def places_of(caption: str) -> tuple[str, str, bool] | None:
    """(left or upper, right or lower, side by side?) of a caption about places; None of any other.

    >>> places_of("seven right of three"), places_of("a horse")
    (('three', 'seven', True), None)
    """
    found = RELATION.fullmatch(caption)
    if found is None:
        return None
    first, relation, second = found.groups()
    if relation in ("right of", "below"):
        first, second = second, first
    return first, second, relation in ("left of", "right of")


def place_figures(wanted: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """Of captions about places and what a classifier sees instead: `object_accuracy`, the share of both things that are
    there; `relation_accuracy`, the share of pictures in which both stand as wanted. {} where no caption is about
    places."""
    objects, relations = [], []
    for a, b in zip(wanted, found):
        want, see = places_of(a), places_of(b)
        if want is None or see is None:
            continue
        objects.append(len({*want[:2]} & {*see[:2]}) / len({*want[:2]}))
        relations.append(float(want == see))
    if not objects:
        return {}
    return {
        "object_accuracy": sum(objects) / len(objects),
        "relation_accuracy": sum(relations) / len(relations),
    }


def high_frequency(images: Tensor) -> float:
    """Mean power of images (n, C, H, W) at frequencies above half the highest along either axis, less that of none."""
    spectrum = torch.fft.fft2(images.double(), norm="ortho").abs().square()
    rows, columns = (torch.fft.fftfreq(n).abs() for n in images.shape[-2:])
    high = torch.maximum(rows[:, None], columns[None]) > 0.25
    return float(spectrum[..., high].mean())

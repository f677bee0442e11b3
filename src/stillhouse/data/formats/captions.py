"""`captions:NAME`: any labelled or segmented images, with captions written from their labels by templates.

The caption of a labelled image is its class name in a template; of a segmented one, the classes that cover the most of
it. They are made up from labels: a network that learns from them learns class names, not language.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from stillhouse.config.specs import DataSpec
from stillhouse.data import format as formats
from stillhouse.data.bundle import DataBundle
from stillhouse.data.image_text import (
    ImageTextBundle,
    PairedDataset,
    Part,
    TextOptions,
    filled,
    text_identity,
    text_side,
)
from stillhouse.errors import UserError, unknown
from stillhouse.files import atomic_write, cache_folder, digest
from stillhouse.tasks.classification import Classification
from stillhouse.tasks.image_text import ImageText
from stillhouse.tasks.segmentation import Segmentation

KEYS = frozenset({"classes", "image_size", "augment", "label_noise", "long_tail"})
REST = "NAME"
SEEN = 0.02
"""A class that covers less of an image than this is not named in its caption."""
MOST = 3
"""A caption names this many classes at most."""


class Options(TextOptions):
    """data.options of `captions:`."""

    options: dict[str, Any] = Field(default_factory=dict, description="Of the data set that is captioned.")
    names: list[str] | None = Field(None, description="What classes are called in texts, in label order.")
    new: list[str] = Field(
        default_factory=list, description="Classes, by name, whose images are left out of training: new at test time."
    )
    also: list[DataSpec] = Field(
        default_factory=list, description="Further data sets whose captioned training images are added to training."
    )
    phrases: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of training captions that a phrase of a random English word of the tokenizer replaces: for "
        "objectives that do not pair images with texts, such as embedding.",
    )


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> ImageTextBundle:
    """The captioned images of another data set.

    Raises:
        UserError: what its format raises; data without classes or masks; a new class that is none.
    """
    inner = _inner(spec.model_copy(update={"name": rest, "options": options.options}), root)
    called = _called(options, inner.task.class_names)
    new = tuple(_class(name, called) for name in options.new)
    task = inner.task
    if not isinstance(task, Classification) and new:
        raise UserError("data.options.new names classes of labelled images; these have masks.")
    others = [_inner(o.model_copy(update={"image_size": o.image_size or spec.image_size}), root) for o in options.also]
    source = [_Captioned(inner, called, options, new, 0)]
    for other in others:
        source.append(_Captioned(other, list(other.task.class_names), options, (), source[-1].end))
    texts = [t for s in source for some in s.captions("train") for t in some]
    tokens = text_side(options, texts, root, spec.name)
    mean, std = inner.task.normalisation if isinstance(task, Classification) else (task.mean, task.std)
    size = tuple(inner.task.input_shape[-2:]) if isinstance(task, Classification) else task.size
    classes = tuple(called) if isinstance(task, Classification) else ()
    facts = ImageText(size, mean, std, tokens, options.context, classes, tuple(options.templates), new)
    content = [i.fingerprint for i in (inner, *others)]
    fingerprint = digest(content, called, list(new), options.phrases, *text_identity(options, tokens))
    phrases = _phrases(tokens, options.templates) if options.phrases else []

    def make(split: str, train: bool) -> PairedDataset:
        used = source if split == "train" else source[:1]
        parts = [s.part(split, train) for s in used]
        return PairedDataset(parts, facts, train, phrases, options.phrases if train and split == "train" else 0.0)

    splits = [s for s in ("train", "holdout", "val", "test") if inner.has(s)]
    return ImageTextBundle(spec.name, facts, fingerprint, splits, make, inner.flip)


def _inner(spec: DataSpec, root: Path) -> Any:
    bundle: Any = formats.load(spec, spec.root or root)
    if not isinstance(bundle.task, Classification | Segmentation):
        raise UserError(
            f"captions: writes captions from class labels or masks, but '{spec.name}' is data for {bundle.task.name}."
        )
    return bundle


def _called(options: Options, classes: Sequence[str]) -> list[str]:
    if options.names is None:
        return list(classes)
    if len(options.names) != len(classes):
        raise UserError(
            f"data.options.names has {len(options.names)} names, but the data has {len(classes)} classes: "
            f"{', '.join(classes[:12])}."
        )
    return list(options.names)


def _class(name: str, called: Sequence[str]) -> int:
    if name not in called:
        raise unknown("class in data.options.new,", name, called)
    return called.index(name)


class _Captioned:
    """A data set with its captions; ids of captions begin at `start`."""

    def __init__(self, bundle: Any, names: Sequence[str], options: Options, new: Sequence[int], start: int) -> None:
        self.bundle, self.names, self.new, self.start = bundle, names, new, start
        self._texts = [filled(options.templates, name) for name in names]
        self._templates = options.templates
        self._scenes: dict[str, list[tuple[int, ...]]] = {}

    @property
    def labelled(self) -> bool:
        return isinstance(self.bundle, DataBundle)

    @property
    def end(self) -> int:
        """The first id after those of this data set."""
        return self.start + (len(self.names) if self.labelled else (len(self.names) + 1) ** MOST)

    def rows(self, split: str) -> np.ndarray:
        """Which samples of a split are used: of training, those of no new class."""
        dataset = self.bundle.dataset(split, train=False)
        if not self.labelled or split == "test" or not self.new:
            return np.arange(len(dataset))
        return np.flatnonzero(~np.isin(dataset.labels().numpy(), self.new))

    def ids(self, split: str) -> np.ndarray:
        if self.labelled:
            labels = self.bundle.dataset(split, train=False).labels().numpy()
            return self.start + np.asarray(labels[self.rows(split)])
        base = len(self.names) + 1
        padded = [(*scene, *[len(self.names)] * (MOST - len(scene))) for scene in self._scene(split)]
        return np.array([self.start + sum(c * base**i for i, c in enumerate(scene)) for scene in padded], np.int64)

    def captions(self, split: str) -> list[list[str]]:
        if self.labelled:
            return [self._texts[i - self.start] for i in self.ids(split).tolist()]
        return [filled(self._templates, _listed([self.names[c] for c in s])) for s in self._scene(split)]

    def part(self, split: str, train: bool) -> Part:
        task = self.bundle.task
        given = task.normalisation if isinstance(task, Classification) else (task.mean, task.std)
        images = self.bundle.dataset(split, train=train)
        captions = self.captions(split)
        captions = captions if train else [some[:1] for some in captions]  # they are one caption in several wordings
        return Part(images, self.rows(split), self.ids(split), captions, given)

    def _scene(self, split: str) -> list[tuple[int, ...]]:
        """The classes of each image of a segmented data set, those that cover most first; read once, then from the
        cache."""
        if split not in self._scenes:
            place = cache_folder() / "captions" / f"{digest(self.bundle.fingerprint, split, SEEN, MOST)}.json"
            if not place.is_file():
                dataset = self.bundle.dataset(split, train=False)
                found = [_covering(dataset[i]["label"].numpy(), len(self.names)) for i in range(len(dataset))]
                with atomic_write(place) as temporary:
                    temporary.write_text(json.dumps(found))
            self._scenes[split] = [tuple(scene) for scene in json.loads(place.read_text())]
        return self._scenes[split]


def _covering(mask: np.ndarray, classes: int) -> list[int]:
    counts = np.bincount(mask[mask >= 0].ravel(), minlength=classes)
    order = np.argsort(-counts, kind="stable")[:MOST]
    return [int(c) for c in order if counts[c] > SEEN * mask.size]


def _listed(names: Sequence[str]) -> str:
    """`sky`, `sky and road`, `sky, road and car`."""
    if not names:
        return "scene"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _phrases(tokens: Any, templates: Sequence[str]) -> list[str]:
    """The whole words of a tokenizer's vocabulary, each in a template."""
    words = sorted(w for w in tokens.get_vocab() if w.isalpha() and w.islower() and w.isascii() and len(w) > 2)
    if not words:
        raise UserError("data.options.phrases needs a tokenizer with whole words, such as that of a BERT (hf:NAME).")
    return [templates[i % len(templates)].format(w) for i, w in enumerate(words)]

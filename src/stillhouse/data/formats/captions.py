"""`captions:NAME`: any labelled or segmented images, with captions written from their labels by templates.

The caption of a labelled image is its class name in a template, with `look` also how bright it is and of which colour;
of a segmented one, the classes that cover the most of it. They are made up from labels: a network that learns from them
learns class names, not language. With `noise`, words of training captions are wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from stillhouse.config.specs import DataSpec
from stillhouse.data import format as formats
from stillhouse.data.bundle import DataBundle
from stillhouse.data.dataset import BatchKey
from stillhouse.data.image_text import (
    ImageTextBundle,
    PairedDataset,
    Part,
    TextOptions,
    filled,
    text_identity,
    text_side,
)
from stillhouse.data.samples import SampleBundle
from stillhouse.errors import UserError, unknown
from stillhouse.files import atomic_write, cache_folder, digest
from stillhouse.functional.pictures import unnormalise
from stillhouse.randomness import key as keys
from stillhouse.randomness import uniforms
from stillhouse.tasks.classification import Classification
from stillhouse.tasks.image_text import ImageText
from stillhouse.tasks.segmentation import Segmentation

KEYS = frozenset({"classes", "image_size", "augment", "label_noise", "long_tail"})
REST = "NAME"
SEEN = 0.02
"""A class that covers less of an image than this is not named in its caption."""
MOST = 3
"""A caption names this many classes at most."""
BRIGHTNESS = ("dark", "dim", "bright")
DARK, BRIGHT = 0.4, 0.55
"""Mean brightness below and above which an image is dark and bright."""
COLOURS = ("grey", "reddish", "greenish", "bluish")
GREY = 0.05
"""An image whose mean colour has channels nearer than this is grey."""


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
    look: bool = Field(
        False, description="Also say how bright a labelled image is, and of which colour; captions are no classes then."
    )
    noise: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Chance that a word of a training caption (a class, how bright, which colour) is replaced by "
        "another of its kind, the same in every epoch.",
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
    if not isinstance(task, Classification) and (new or options.look):
        raise UserError("data.options.new and look are for labelled images; these have masks.")
    if options.look and new:
        raise UserError("data.options.look writes captions that are no classes, so none of them is new; leave one out.")
    others = [_inner(o.model_copy(update={"image_size": o.image_size or spec.image_size}), root) for o in options.also]
    source = [_Captioned(inner, called, options, new, 0, spec.seed)]
    for other in others:
        source.append(_Captioned(other, list(other.task.class_names), options, (), source[-1].end, spec.seed))
    texts = [t for s in source for some in s.captions("train") for t in some]
    tokens = text_side(options, texts, root, spec.name)
    mean, std = inner.task.normalisation if isinstance(task, Classification) else (task.mean, task.std)
    size = tuple(inner.task.input_shape[-2:]) if isinstance(task, Classification) else task.size
    classes = tuple(called) if isinstance(task, Classification) and not options.look else ()
    facts = ImageText(size, mean, std, tokens, options.context, classes, tuple(options.templates), new)
    content = [i.fingerprint for i in (inner, *others)]
    further = [options.look, options.noise, spec.seed] if options.look or options.noise else []
    fingerprint = digest(content, called, list(new), options.phrases, *further, *text_identity(options, tokens))
    phrases = _phrases(tokens, options.templates) if options.phrases else []

    def make(split: str, train: bool) -> PairedDataset:
        used = source if split == "train" else source[:1]
        parts = [s.part(split, train) for s in used]
        return PairedDataset(parts, facts, train, phrases, options.phrases if train and split == "train" else 0.0)

    splits = [s for s in ("train", "holdout", "val", "test") if inner.has(s)]
    named = inner.named if isinstance(inner, SampleBundle) and not options.also else lambda split: None
    return ImageTextBundle(spec.name, facts, fingerprint, splits, make, inner.flip, named)


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
    """A data set with its captions; ids of captions begin at `start`.

    What a caption says is a scene, a row of numbers, one a word: (class,), (class, brightness, colour), or the classes
    of a segmented image.
    """

    def __init__(
        self, bundle: Any, names: Sequence[str], options: Options, new: Sequence[int], start: int, seed: int
    ) -> None:
        self.bundle, self.names, self.new, self.start = bundle, names, new, start
        self._templates, self._noise, self._seed = options.templates, options.noise, seed
        self._looks = options.look and self.labelled
        self._scenes: dict[str, list[tuple[int, ...]]] = {}

    @property
    def labelled(self) -> bool:
        return isinstance(self.bundle, DataBundle)

    @property
    def _kinds(self) -> tuple[int, ...]:
        """How many words there are of each kind in a caption of a labelled image."""
        return (len(self.names), len(BRIGHTNESS), len(COLOURS)) if self._looks else (len(self.names),)

    @property
    def end(self) -> int:
        """The first id after those of this data set."""
        return self.start + (int(np.prod(self._kinds)) if self.labelled else (len(self.names) + 1) ** MOST)

    def rows(self, split: str) -> np.ndarray:
        """Which samples of a split are used: of training, those of no new class."""
        dataset = self.bundle.dataset(split, train=False)
        if not self.labelled or split == "test" or not self.new:
            return np.arange(len(dataset))
        return np.flatnonzero(~np.isin(dataset.labels().numpy(), self.new))

    def ids(self, split: str, noisy: bool = False) -> np.ndarray:
        return np.array([self.start + self._number(scene) for scene in self._said(split, noisy)], np.int64)

    def captions(self, split: str, noisy: bool = False) -> list[list[str]]:
        made: dict[tuple[int, ...], list[str]] = {}
        found = []
        for scene in self._said(split, noisy):
            if scene not in made:
                made[scene] = filled(self._templates, self._phrase(scene))
            found.append(made[scene])
        return found

    def part(self, split: str, train: bool) -> Part:
        task = self.bundle.task
        given = task.normalisation if isinstance(task, Classification) else (task.mean, task.std)
        images = self.bundle.dataset(split, train=train)
        noisy = train and split == "train"
        captions = self.captions(split, noisy)
        captions = captions if train else [some[:1] for some in captions]  # they are one caption in several wordings
        return Part(images, self.rows(split), self.ids(split, noisy), captions, given)

    def _phrase(self, scene: tuple[int, ...]) -> str:
        if not self.labelled:
            return _listed([self.names[c] for c in scene])
        look = f", {BRIGHTNESS[scene[1]]} and {COLOURS[scene[2]]}" if self._looks else ""
        return f"{self.names[scene[0]]}{look}"

    def _number(self, scene: tuple[int, ...]) -> int:
        """One number for each scene; of a class alone, its own."""
        if self.labelled:
            return sum(word * int(np.prod(self._kinds[:i])) for i, word in enumerate(scene))
        base = len(self.names) + 1
        padded = (*scene, *[len(self.names)] * (MOST - len(scene)))
        return sum(c * base**i for i, c in enumerate(padded))

    def _said(self, split: str, noisy: bool) -> list[tuple[int, ...]]:
        """What the captions of the rows of a split say; with `noisy`, with wrong words."""
        rows = self.rows(split)
        if self.labelled:
            labels = self.bundle.dataset(split, train=False).labels().numpy()
            looks = self._look(split) if self._looks else np.zeros((len(labels), 0), np.int64)
            scenes = [tuple(map(int, (labels[i], *looks[i]))) for i in rows]
        else:
            scenes = self._scene(split)
        return self._wrong(scenes, rows) if noisy and self._noise else scenes

    def _wrong(self, scenes: list[tuple[int, ...]], rows: np.ndarray) -> list[tuple[int, ...]]:
        most = max(map(len, scenes), default=0)
        draws = uniforms(keys(self._seed, "wrong words"), rows, 2 * most)
        out = []
        for scene, draw in zip(scenes, draws):
            words = list(scene)
            for i, word in enumerate(scene):
                count = self._kinds[i] if self.labelled else len(self.names)
                others = [w for w in range(count) if w != word and (self.labelled or w not in words)]
                if draw[2 * i] < self._noise and others:
                    words[i] = others[int(draw[2 * i + 1] * len(others))]
            out.append(tuple(words))
        return out

    def _look(self, split: str) -> np.ndarray:
        """(n, 2) how bright each image of a labelled data set is, and of which colour; read once, then from the
        cache."""

        def measure() -> list[list[int]]:
            dataset, found = self.bundle.dataset(split, train=False), []
            for at in range(0, len(dataset), 256):
                some = np.arange(at, min(at + 256, len(dataset)))
                images = dataset.batch(BatchKey(0, some, 0, len(some)), 0)["input"]
                found += _looks(unnormalise(images, *self.bundle.task.normalisation).numpy() / 255)
            return found

        return np.array(self._read_once(split, "look", measure), np.int64).reshape(-1, 2)

    def _read_once(self, split: str, what: str, measure: Callable[[], list[list[int]]]) -> list[list[int]]:
        place = cache_folder() / "captions" / f"{digest(self.bundle.fingerprint, split, SEEN, MOST, what)}.json"
        if not place.is_file():
            found = measure()
            with atomic_write(place) as temporary:
                temporary.write_text(json.dumps(found))
        rows: list[list[int]] = json.loads(place.read_text())
        return rows

    def _scene(self, split: str) -> list[tuple[int, ...]]:
        """The classes of each image of a segmented data set, those that cover most first; read once, then from the
        cache."""
        if split not in self._scenes:

            def measure() -> list[list[int]]:
                dataset = self.bundle.dataset(split, train=False)
                return [_covering(dataset[i]["label"].numpy(), len(self.names)) for i in range(len(dataset))]

            self._scenes[split] = [tuple(scene) for scene in self._read_once(split, "scene", measure)]
        return self._scenes[split]


def _looks(images: np.ndarray) -> list[list[int]]:
    """Of images (n, C, H, W) in [0, 1]: how bright each is, and of which colour; a grey image has none."""
    mean = images.mean((2, 3))
    level = mean.mean(1)
    bright = (level >= DARK).astype(int) + (level >= BRIGHT)
    if mean.shape[1] != 3:
        return [[int(b), 0] for b in bright]
    colour = np.where(mean.max(1) - mean.min(1) < GREY, 0, 1 + mean.argmax(1))
    return [[int(b), int(c)] for b, c in zip(bright, colour)]


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

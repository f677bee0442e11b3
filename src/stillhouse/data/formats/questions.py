"""`questions:NAME`: any labelled or segmented images, with questions and answers that follow from their labels.

Three kinds: a caption, the name of what is seen (of labelled images), and whether something is there. They are made up
from labels: a network that learns from them learns class names and a few words, not language. Each sample carries a
wrong answer too, which differs in one name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data import format as formats
from stillhouse.data.dataset import BatchKey, first_seen
from stillhouse.data.source import existing
from stillhouse.data.splits import Splits
from stillhouse.errors import UserError, unknown
from stillhouse.files import atomic_write, cache_folder, digest
from stillhouse.functional.counting import IGNORED
from stillhouse.models.tokenizer import encode, identity, tokenizer
from stillhouse.randomness import key as keys
from stillhouse.randomness import uniforms
from stillhouse.signals import Batch
from stillhouse.tasks.classification import Classification
from stillhouse.tasks.segmentation import Segmentation
from stillhouse.tasks.visual_text import CAPTION, NO, PROMPTS, YES, VisualText

KEYS = frozenset({"classes", "image_size", "augment", "label_noise", "long_tail"})
REST = "NAME"
SHOWN, THERE = 0.02, 0.002
"""Shares of an image from which a class is named in its caption, and counts as there at all."""
MOST = 3
"""A caption names this many classes at most."""


class Options(Spec):
    """data.options of `questions:`."""

    options: dict[str, Any] = Field(default_factory=dict, description="Of the data set that is asked about.")
    names: list[str] | None = Field(None, description="What classes are called, in label order.")
    kinds: list[str] | None = Field(
        None, description="Of questions: caption, name (of labelled images), presence; default: all that can be."
    )
    tokenizer: str = Field("bpe:512", description="bytes | bpe:SIZE (learned from all texts) | hf:NAME-OR-FOLDER.")
    context: int = Field(24, ge=4, description="Tokens of prompt and answer; a longer one is refused.")


@dataclass(frozen=True)
class Content:
    """What an image shows: the classes named in its caption, and all that are there."""

    shown: tuple[int, ...]
    there: frozenset[int]


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> QuestionBundle:
    """The images of another data set with questions.

    Raises:
        UserError: what its format raises; data without classes or masks; an unknown kind; a text beyond the context.
    """
    inner: Any = formats.load(spec.model_copy(update={"name": rest, "options": options.options}), spec.root or root)
    task = inner.task
    if not isinstance(task, Classification | Segmentation):
        raise UserError(f"questions: asks about class labels or masks, but '{spec.name}' is data for {task.name}.")
    labelled = isinstance(task, Classification)
    names = [n.replace("_", " ") for n in (options.names or task.class_names)]
    if len(names) != len(task.class_names) or len(names) < 2:
        raise UserError(f"data.options.names has {len(names)} names, but the data has {len(task.class_names)} classes.")
    able = [k for k in PROMPTS if labelled or k != "name"]
    kinds = options.kinds or able
    for kind in kinds:
        if kind not in able:
            raise unknown("kind of question in data.options.kinds", kind, able)
    kind, _, where = options.tokenizer.partition(":")
    texts = [*(p.format(n) for p in PROMPTS.values() for n in names), *names, f"{YES} {NO} a photo of a , and ."]
    texts += [answer_of(CAPTION, Content((i, j, k), frozenset()), names, labelled) for i, j, k in _triples(len(names))]
    wanted = f"hf:{existing(where, root)}" if kind == "hf" and (root / where).is_dir() else options.tokenizer
    tokens = tokenizer(wanted, texts)
    size = (task.input_shape[-2], task.input_shape[-1]) if isinstance(task, Classification) else task.size
    facts = VisualText(size, task.mean, task.std, tokens, options.context, tuple(names), tuple(kinds))
    fingerprint = digest(inner.fingerprint, names, kinds, options.context, identity(tokens))

    def make(split: str, train: bool) -> QuestionDataset:
        contents = _contents(inner, split, labelled)
        return QuestionDataset(inner.dataset(split, train=train), contents, facts, train, labelled, spec.seed)

    splits = [s for s in ("train", "holdout", "val", "test") if inner.has(s)]
    return QuestionBundle(spec.name, facts, fingerprint, splits, make, inner.flip)


@dataclass
class QuestionBundle(Splits):
    """Images with questions, ready for use.

    Attributes:
        name: as in the recipe.
        task: visual text.
        fingerprint: a hash of images, labels and splits, of the questions and the tokenizer.
        splits: their names.
        make: (split, for training) -> its samples.
        flip: whether a mirrored image keeps its meaning.
    """

    name: str
    task: VisualText
    fingerprint: str
    splits: Sequence[str]
    make: Callable[[str, bool], QuestionDataset] = field(repr=False)
    flip: bool = False
    evaluation_batch: ClassVar[int] = 128

    def dataset(self, split: str, *, train: bool) -> QuestionDataset:
        """A split's samples, with training augmentation and drawn questions (`train=True`) or as they are evaluated."""
        self.require(split)
        return self.make(split, train)


class QuestionDataset:
    """Images of a split, each with a question, its answer and a wrong answer.

    In training the question is drawn under keys of (seed, epoch, index); in evaluation it is a function of the index.

    Args:
        images: the source, as it is trained on or evaluated.
        contents: of each sample.
        task: tokenizer, context and kinds.
        train: whether questions are drawn by epoch.
        labelled: whether an image has one class.
        seed: of the data, for the questions of evaluation.
    """

    def __init__(
        self, images: Any, contents: Sequence[Content], task: VisualText, train: bool, labelled: bool, seed: int
    ) -> None:
        self._images, self.contents, self._task = images, contents, task
        self._train, self._labelled, self._seed = train, labelled, seed

    def __len__(self) -> int:
        return len(self.contents)

    def labels(self) -> Tensor | None:
        """None: a sample has no one class."""
        return None

    def __getitem__(self, index: int) -> Batch:
        """One sample, as a training step of seed 0 and epoch 0 would see it."""
        return first_seen(self, index)

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """A process's share of a batch: `input` (pixel_values, input_ids, attention_mask), `label` (B, L), `kind`,
        `denied` and `index` (B,), and of the wrong answer `wrong` (input_ids, attention_mask) and `wrong_label`."""
        own = key.indices[key.start : key.stop]
        if self._train:
            draws = uniforms(keys(seed, "question", key.epoch), own, 4)
        else:
            draws = uniforms(keys(self._seed, "question"), own, 4)
            draws[:, 0] = (own % len(self._task.kinds) + 0.5) / len(self._task.kinds)
        asked = [self.question(i, u) for i, u in zip(own.tolist(), draws)]
        prompts, right, wrong, kinds, denied = zip(*asked)
        images = self._images.batch(BatchKey(key.epoch, own, 0, len(own)), seed)["input"]
        inputs, label = written(self._task, prompts, right)
        others, wrong_label = written(self._task, prompts, wrong)
        return {
            "input": {"pixel_values": images, **inputs},
            "label": label,
            "kind": torch.tensor(kinds),
            "denied": torch.tensor(denied),
            "index": torch.from_numpy(own),
            "wrong": others,
            "wrong_label": wrong_label,
        }

    def question(self, index: int, draw: np.ndarray) -> tuple[str, str, str, int, bool]:
        """Prompt, answer, wrong answer, kind, and whether the answer is no; of four uniform numbers."""
        names, content = self._task.classes, self.contents[index]
        place = int(draw[0] * len(self._task.kinds))
        kind = self._task.kinds[place]
        absent = [c for c in range(len(names)) if c not in content.there] or [0]
        other = absent[int(draw[1] * len(absent))]
        prompt = PROMPTS[kind]
        if kind == "presence":
            there = draw[2] < 0.5 and bool(content.there)
            inside = sorted(content.there)
            asked = inside[int(draw[3] * len(inside))] if there else other
            answer, wrong = (YES, NO) if there else (NO, YES)
            return prompt.format(names[asked]), answer, wrong, place, not there
        shown = list(content.shown)
        if shown:
            shown[int(draw[3] * len(shown))] = other
        false = Content(tuple(shown), frozenset())
        right = answer_of(kind, content, names, self._labelled)
        return prompt, right, answer_of(kind, false, names, self._labelled), place, False


def answer_of(kind: str, content: Content, names: Sequence[str], labelled: bool) -> str:
    """A caption or a name."""
    shown = [names[c] for c in content.shown]
    if kind == "name":
        return shown[0]
    if labelled:
        return f"a photo of a {shown[0]} ."
    listed = shown[0] if len(shown) == 1 else f"{' , '.join(shown[:-1])} and {shown[-1]}" if shown else "nothing"
    return f"{listed} ."


def written(task: VisualText, prompts: Sequence[str], answers: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """`input_ids` and `attention_mask` (B, L) of prompts with their answers and an end mark, padded at the end; and
    labels (B, L): of each place the token that follows, where it is of the answer.

    Raises:
        UserError: a text longer than the context.
    """
    tokens, length = task.tokenizer, task.context
    ids = torch.full((len(prompts), length), tokens.pad_token_id)
    label, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    asked = task.asked(prompts)
    for i, (prompt, answer) in enumerate(zip(asked, encode(tokens, answers))):
        row = [*prompt, *answer, tokens.eos_token_id]
        if len(row) > length:
            raise UserError(
                f"A question with its answer has {len(row)} tokens; set data.options.context to at least that."
            )
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        label[i, len(prompt) - 1 : len(row) - 1] = ids[i, len(prompt) : len(row)]
    return {"input_ids": ids, "attention_mask": mask}, label


def _triples(number: int) -> list[tuple[int, int, int]]:
    return [(i, (i + 1) % number, (i + 2) % number) for i in range(number)]


def _contents(bundle: Any, split: str, labelled: bool) -> list[Content]:
    """What each image of a split shows; of masks read once, then from the cache."""
    dataset = bundle.dataset(split, train=False)
    if labelled:
        return [Content((c,), frozenset([c])) for c in dataset.labels().tolist()]
    place = cache_folder() / "questions" / f"{digest(bundle.fingerprint, split, SHOWN, THERE, MOST)}.json"
    if not place.is_file():
        number = len(bundle.task.class_names)
        found = [_covered(dataset[i]["label"].numpy(), number) for i in range(len(dataset))]
        with atomic_write(place) as temporary:
            temporary.write_text(json.dumps(found))
    return [Content(tuple(shown), frozenset(there)) for shown, there in json.loads(place.read_text())]


def _covered(mask: np.ndarray, classes: int) -> tuple[list[int], list[int]]:
    counts = np.bincount(mask[mask >= 0].ravel(), minlength=classes)
    order = np.argsort(-counts, kind="stable")
    shown = [int(c) for c in order[:MOST] if counts[c] > SHOWN * mask.size]
    return shown, [int(c) for c in order if counts[c] > THERE * mask.size]

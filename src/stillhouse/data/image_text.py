"""Images with texts: `PairedDataset` adds a caption to each image of another data set, `ImageTextBundle` holds such."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import Spec
from stillhouse.data.dataset import BatchKey, first_seen
from stillhouse.data.splits import Splits
from stillhouse.errors import UserError
from stillhouse.functional.pictures import renormalise
from stillhouse.models.tokenizer import identity, texts_padded, tokenizer, too_long, with_last_end, with_marks
from stillhouse.randomness import key as keys
from stillhouse.randomness import uniforms
from stillhouse.signals import Batch
from stillhouse.tasks.image_text import ImageText


class TextOptions(Spec):
    """data.options of images with texts."""

    tokenizer: str = Field(
        "bpe:512", description="bytes | bpe:SIZE (learned from the training captions) | hf:NAME-OR-FOLDER."
    )
    context: int = Field(77, ge=3, description="Tokens of a text at most; a longer one is cut before its end mark.")
    templates: list[str] = Field(
        ["a photo of a {}."],
        min_length=1,
        description="Texts with {} where a class name stands: of captions, one by chance; of class vectors, the mean.",
    )


class Images(Protocol):
    """A data set of images: `input` (B, C, H, W) by index."""

    def __len__(self) -> int: ...

    def batch(self, key: BatchKey, seed: int) -> Batch: ...


@dataclass
class Part:
    """Images of one source with their captions.

    Attributes:
        images: the source, as it is trained on or evaluated.
        rows: (n,) which of its samples, in order.
        ids: (n,) what tells captions apart; equal for images that the same captions describe.
        captions: of each sample, one or more.
        given: mean and standard deviation per channel that the images are normalised with.
    """

    images: Images
    rows: np.ndarray
    ids: np.ndarray
    captions: Sequence[Sequence[str]]
    given: tuple[tuple[float, ...], tuple[float, ...]]


class PairedDataset:
    """Images of one or more sources, each with a text.

    In training a sample has one of its captions, drawn under keys of (seed, epoch, index); in evaluation it has all,
    and a text that several samples of one id share stands in the batch of the first alone.

    Args:
        parts: the sources, one after the other.
        task: tokenizer, context and normalisation.
        train: whether captions are drawn.
        phrases: texts without an image, one of which stands in the place of a caption with probability `share`, for
            objectives that do not pair images with texts.
        share: see `phrases`.
    """

    def __init__(
        self, parts: Sequence[Part], task: ImageText, train: bool, phrases: Sequence[str] = (), share: float = 0.0
    ) -> None:
        self._parts, self._task, self._train = list(parts), task, train
        self._phrases, self._share = phrases, share if phrases else 0.0
        self._starts = np.cumsum([0, *(len(p.rows) for p in self._parts)])
        self._ids = np.concatenate([p.ids for p in self._parts]).astype(np.int64)
        self._first: dict[tuple[int, str], int] = {}
        if not train:
            for i, number in enumerate(self._ids.tolist()):
                for text in self.captions(i):
                    self._first.setdefault((number, text), i)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def labels(self) -> Tensor:
        """(n,) ids in index order."""
        return torch.from_numpy(self._ids).clone()

    def captions(self, index: int) -> Sequence[str]:
        """All captions of a sample."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part].captions[index - int(self._starts[part])]

    def __getitem__(self, index: int) -> Batch:
        """One sample, as a training step of seed 0 and epoch 0 would see it."""
        return first_seen(self, index)

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """A process's share of a batch: `input` (pixel_values, and where there are texts input_ids, attention_mask),
        `label` (B,), `index` (B,), and in evaluation `text_label` (T,)."""
        own = key.indices[key.start : key.stop]
        texts, ids = self._texts(own, key.epoch, seed)
        label = torch.from_numpy(self._ids[own])
        tokens = texts_padded(self._task.tokenizer, texts, self._task.context) if texts else {}
        images = self._images(own, key.epoch, seed)
        batch: Batch = {"input": {"pixel_values": images, **tokens}, "label": label, "index": torch.from_numpy(own)}
        return batch if self._train else {**batch, "text_label": torch.tensor(ids, dtype=torch.int64)}

    def _texts(self, own: np.ndarray, epoch: int, seed: int) -> tuple[list[str], list[int]]:
        if not self._train:
            ids = self._ids[own].tolist()
            rows = [(n, t) for i, n in zip(own.tolist(), ids) for t in self.captions(i) if self._first[n, t] == i]
            return [text for _, text in rows], [number for number, _ in rows]
        every = [self.captions(i) for i in own.tolist()]
        draws = uniforms(keys(seed, "caption", epoch), own, 3)
        texts = [some[int(u * len(some))] for some, u in zip(every, draws[:, 0])]
        if self._share:
            for i in np.flatnonzero(draws[:, 1] < self._share).tolist():
                texts[i] = self._phrases[int(draws[i, 2] * len(self._phrases))]
        return texts, []

    def _images(self, own: np.ndarray, epoch: int, seed: int) -> Tensor:
        wanted = self._task.normalisation
        found: Tensor | None = None
        place = np.searchsorted(self._starts, own, side="right") - 1
        for number, part in enumerate(self._parts):
            where = np.flatnonzero(place == number)
            if not len(where):
                continue
            rows = part.rows[own[where] - self._starts[number]]
            images = part.images.batch(BatchKey(epoch, rows, 0, len(rows)), seed)["input"]
            images = renormalise(images, part.given, wanted)
            if len(where) == len(own):
                return images
            found = images.new_empty((len(own), *images.shape[1:])) if found is None else found
            found[torch.from_numpy(where)] = images
        assert found is not None
        return found


@dataclass
class ImageTextBundle(Splits):
    """Images with texts, ready for use.

    Attributes:
        name: as in the recipe.
        task: image and text, with the tokenizer and the classes.
        fingerprint: a hash of images, captions and splits, and of the tokenizer.
        splits: their names.
        make: (split, for training) -> its samples.
        flip: whether a mirrored image keeps its caption.
        named: split -> the names of its samples, in order; None where they have none.
    """

    name: str
    task: ImageText
    fingerprint: str
    splits: Sequence[str]
    make: Callable[[str, bool], PairedDataset] = field(repr=False)
    flip: bool = False
    named: Callable[[str], list[str] | None] = field(default=lambda split: None, repr=False)

    evaluation_batch: ClassVar[int] = 128

    @property
    def classes(self) -> list[str]:
        return list(self.task.classes)

    def dataset(self, split: str, *, train: bool) -> PairedDataset:
        """A split's samples, with training augmentation and drawn captions (`train=True`) or as they are evaluated.

        Raises:
            UserError: a split that this data set does not have.
        """
        self.require(split)
        return self.make(split, train)


def text_side(options: TextOptions, texts: Sequence[str], root: Path, name: str) -> Any:
    """The tokenizer of a data set, which puts marks around a text; captions that will be cut are counted in a warning.

    Args:
        options: tokenizer and context.
        texts: all training captions.
        root: the folder of data, in which a tokenizer's folder may lie.
        name: of the data set, for messages.

    Raises:
        UserError: a template without a place for the name, or what `tokenizer` raises.
    """
    for template in options.templates:
        if template.count("{}") != 1:
            raise UserError(f"data.options.templates: '{template}' needs {{}} once, where the class name stands.")
    kind, _, rest = options.tokenizer.partition(":")
    inside = root / rest
    wanted = f"hf:{inside}" if kind == "hf" and not Path(rest).expanduser().is_dir() and inside.is_dir() else None
    tokens = with_marks(with_last_end(tokenizer(wanted or options.tokenizer, texts)))
    distinct = list(dict.fromkeys(texts))
    cut = too_long(tokens, distinct, options.context)
    if cut:
        warnings.warn(
            f"{cut} of {len(distinct)} captions of '{name}' are longer than data.options.context {options.context} "
            "and are cut before their end mark.",
            stacklevel=2,
        )
    return tokens


def text_identity(options: TextOptions, tokens: Any) -> tuple[Any, ...]:
    """What of the texts' treatment trained weights depend on."""
    return options.context, tuple(options.templates), identity(tokens)


def filled(templates: Sequence[str], name: str) -> list[str]:
    """A class name in each template."""
    return [t.format(name.replace("_", " ")) for t in templates]

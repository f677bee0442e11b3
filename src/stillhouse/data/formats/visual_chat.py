"""`visual_chat:PATH`: images with conversations in a JSON file, as LLaVA's sets are; or with a chosen and a rejected
answer, as sets of preferences are.

A record has an `image` and `conversations`, `[{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt",
"value": "A cat."}]`; or an `image`, a `question`, and a `chosen` and a `rejected` answer. Turns are written as
`USER: … ASSISTANT: …`; answers are learned, each up to its end mark.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.dataset import BatchKey, first_seen
from stillhouse.data.images import open_image
from stillhouse.data.source import existing
from stillhouse.data.split import cut, in_proportion
from stillhouse.data.splits import Splits
from stillhouse.errors import UserError
from stillhouse.files import digest
from stillhouse.functional.counting import IGNORED
from stillhouse.functional.pictures import normalise, resized, with_channels
from stillhouse.models.tokenizer import encode, identity, tokenizer
from stillhouse.signals import Batch
from stillhouse.tasks.visual_text import VisualText

KEYS = frozenset({"image_size"})
REST = "PATH"
PLACE = "<image>"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Options(Spec):
    """data.options of conversations about images."""

    images: str | None = Field(None, description="The folder of the images; default: that of the file.")
    tokenizer: str = Field("bpe:512", description="bytes | bpe:SIZE (learned from the texts) | hf:NAME-OR-FOLDER.")
    context: int = Field(2048, ge=4, description="Tokens of a conversation at most; a longer one is cut.")
    mean: tuple[float, float, float] = Field(CLIP_MEAN, description="Normalisation per channel; default: CLIP's.")
    std: tuple[float, float, float] = CLIP_STD


@dataclass(frozen=True)
class Chat:
    """An image's path, the turns (question, answer), and the rejected last answer, where there is one."""

    image: Path
    turns: tuple[tuple[str, str], ...]
    rejected: str | None = None


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> ChatBundle:
    """The conversations of a file.

    Raises:
        UserError: no such file or folder, no JSON list, a record that is neither form, or no data.image_size.
    """
    path = existing(rest, root)
    folder = path.parent if options.images is None else existing(options.images, root)
    if spec.image_size is None:
        raise UserError(f"Set data.image_size for '{spec.name}', such as 336: images have sizes of their own.")
    size = (spec.image_size, spec.image_size) if isinstance(spec.image_size, int) else spec.image_size
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"'{path}' is no readable JSON ({error}).") from None
    if not isinstance(records, list) or not records:
        raise UserError(f"'{path}' holds no list of conversations.")
    chats = [_chat(record, folder, f"record {i} of '{path}'") for i, record in enumerate(records)]
    kind, _, where = options.tokenizer.partition(":")
    texts = [t for chat in chats[:20000] for turn in chat.turns for t in turn] if kind == "bpe" else []
    wanted = f"hf:{existing(where, root)}" if kind == "hf" and (root / where).is_dir() else options.tokenizer
    tokens = tokenizer(wanted, texts)
    portions = cut({"train": np.zeros(len(chats), np.int64)}, spec, max(len(chats) // 50, 1), in_proportion)
    task = VisualText(size, options.mean, options.std, tokens, options.context, (), ("chat",))
    rows = {name: portion.rows for name, portion in portions.items()}
    facts = (path.stat().st_size, len(chats), size, options.context, identity(tokens))
    fingerprint = digest(*facts, *[(n, rows[n]) for n in sorted(rows)], *[rows[n] for n in sorted(rows)])
    return ChatBundle(spec.name, task, fingerprint, rows, chats)


def _chat(record: Any, folder: Path, name: str) -> Chat:
    try:
        image = folder / record["image"]
        if "conversations" in record:
            said = [(t["from"], t["value"].replace(PLACE, "").strip()) for t in record["conversations"]]
            turns = [(a[1], b[1]) for a, b in zip(said[::2], said[1::2]) if (a[0], b[0]) == ("human", "gpt")]
            if not turns or 2 * len(turns) != len(said):
                raise UserError(f"In {name}, turns are not human and gpt by turns.")
            return Chat(image, tuple(turns))
        return Chat(image, ((record["question"], record["chosen"]),), record["rejected"])
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{name[0].upper()}{name[1:]} has neither an image with conversations nor one with question, chosen and "
            "rejected."
        ) from None


@dataclass
class ChatBundle(Splits):
    """Conversations about images, ready for use.

    Attributes:
        name: as in the recipe.
        task: visual text.
        fingerprint: a hash of the file's size, the splits and the tokenizer.
        splits: name -> positions.
        chats: all of them.
    """

    name: str
    task: VisualText
    fingerprint: str
    splits: dict[str, np.ndarray]
    chats: Sequence[Chat]
    evaluation_batch: ClassVar[int] = 16

    def dataset(self, split: str, *, train: bool) -> ChatDataset:
        """The conversations of a split; images are decoded when they are read."""
        self.require(split)
        return ChatDataset([self.chats[i] for i in self.splits[split]], self.task)


class ChatDataset:
    """Conversations by index.

    Args:
        chats: of a split; all with a rejected answer, or none.
        task: tokenizer, context and normalisation.
    """

    def __init__(self, chats: Sequence[Chat], task: VisualText) -> None:
        self._chats, self._task = chats, task

    def __len__(self) -> int:
        return len(self._chats)

    def labels(self) -> Tensor | None:
        """None: a sample has no one class."""
        return None

    def __getitem__(self, index: int) -> Batch:
        return first_seen(self, index)

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """A process's share of a batch, as `VisualText` has it, padded to its longest conversation; with `wrong` and
        `wrong_label` where answers are rejected."""
        own = key.indices[key.start : key.stop]
        chats = [self._chats[i] for i in own.tolist()]
        inputs, label = self._written([chat.turns for chat in chats])
        none = torch.zeros(len(chats), dtype=torch.long)
        images = torch.cat([self._image(chat.image) for chat in chats])
        batch: Batch = {
            "input": {"pixel_values": images, **inputs},
            "label": label,
            "kind": none,
            "denied": none.bool(),
            "index": torch.from_numpy(own),
        }
        if all(chat.rejected is not None for chat in chats):
            false = [(*chat.turns[:-1], (chat.turns[-1][0], str(chat.rejected))) for chat in chats]
            batch["wrong"], batch["wrong_label"] = self._written(false)
        return batch

    def _image(self, path: Path) -> Tensor:
        pixels = torch.from_numpy(np.array(open_image(path).convert("RGB"))).permute(2, 0, 1)
        plain = resized(with_channels(pixels, 3), self._task.size)
        return normalise(plain[None], self._task.mean, self._task.std)

    def _written(self, conversations: Sequence[Sequence[tuple[str, str]]]) -> tuple[dict[str, Tensor], Tensor]:
        tokens, context = self._task.tokenizer, self._task.context
        rows, learned = [], []
        for turns in conversations:
            ids: list[int] = []
            counts: list[bool] = []
            for (_, answer), asked in zip(turns, self._task.asked([f"USER: {q} ASSISTANT:" for q, _ in turns])):
                said = [*encode(tokens, [answer])[0], tokens.eos_token_id]
                ids += asked + said
                counts += [False] * len(asked) + [True] * len(said)
            rows.append(ids[:context])
            learned.append(counts[:context])
        length = max(map(len, rows))
        pad = tokens.eos_token_id if tokens.pad_token_id is None else tokens.pad_token_id
        ids_, mask = torch.full((len(rows), length), pad), torch.zeros(len(rows), length, dtype=torch.long)
        label = torch.full((len(rows), length), IGNORED)
        for i, (row, counts) in enumerate(zip(rows, learned)):
            ids_[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
            follows = torch.tensor(row[1:]).masked_fill(~torch.tensor(counts[1:], dtype=torch.bool), IGNORED)
            label[i, : len(row) - 1] = follows
        return {"input_ids": ids_, "attention_mask": mask}, label

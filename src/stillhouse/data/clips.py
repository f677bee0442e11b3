"""Clips of captioned images: images whose names number them are the frames of videos, or a window moves over each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from stillhouse.config.specs import Spec
from stillhouse.data.dataset import BatchKey
from stillhouse.errors import UserError
from stillhouse.models.tokenizer import texts_padded
from stillhouse.randomness import key as keys
from stillhouse.randomness import uniforms
from stillhouse.signals import Batch


class Clips(Spec):
    """How clips are made of captioned images."""

    frames: int = Field(4, ge=2, description="Frames of a clip.")
    motion: Literal["video", "panned"] = Field(
        "video",
        description="video: images are frames, by the number at the end of their names; panned: a window moves over "
        "each image, and comes nearer.",
    )
    zoom: float = Field(1.4, gt=1, description="panned: the image's side over that of a frame.")
    speed: float = Field(0.04, ge=0, description="panned: what the window moves in a frame, a share of its side.")
    nearer: float = Field(0.02, ge=0, lt=0.5, description="panned: by how much it gets smaller in a frame.")


def videos(names: Sequence[str]) -> list[list[int]]:
    """Positions of images that are frames of one video, in order: their names are alike up to the last number, and no
    step of the number is more than twice the usual one.

    Raises:
        UserError: names without numbers.

    >>> videos(["a_3", "a_1", "a_2", "a_9", "b_1"])
    [[1, 2, 0], [3], [4]]
    """
    found = []
    for i, name in enumerate(names):
        match = re.match(r"^(.*?)(\d+)\D*$", name)
        if match is None:
            raise UserError(f"Frames of a video are named by their numbers, but '{name}' has none at its end.")
        found.append((match[1], int(match[2]), i))
    found.sort()
    steps: dict[str, list[int]] = {}
    for (a, m, _), (b, n, _) in pairwise(found):
        if a == b:
            steps.setdefault(a, []).append(n - m)
    out: list[list[int]] = []
    before: tuple[str, int] | None = None
    for video, number, i in found:
        usual = float(np.median(steps[video])) if video in steps else 0.0
        if before is None or before[0] != video or number - before[1] > 2 * usual:
            out.append([])
        out[-1].append(i)
        before = video, number
    return out


def clips_of(video: Sequence[Sequence[int]], frames: int) -> np.ndarray:
    """(n, frames) every run of so many frames in videos."""
    found = [part[i : i + frames] for part in video for i in range(len(part) - frames + 1)]
    return np.array(found, np.int64).reshape(-1, frames)


HELD = 256 << 20
"""Bytes of frames that are held in memory, where all of them take no more."""


class Frames:
    """The images of a data set, as they are evaluated, and a caption of each; small sets are read once.

    Args:
        images: a `PairedDataset` without augmentation, as frames of one clip are treated alike.
        captions: position -> the captions of an image.
        task: tokenizer and context.
    """

    def __init__(self, images: Any, captions: Callable[[int], Sequence[str]], task: Any) -> None:
        self._images, self._captions, self._task = images, captions, task
        self._held: Tensor | None = None
        self._small: bool | None = None

    def __len__(self) -> int:
        return len(self._images)

    def labels(self) -> Tensor:
        """(n,) ids of the captions."""
        found: Tensor = self._images.labels()
        return found

    def pixels(self, rows: np.ndarray) -> Tensor:
        """(n, C, H, W) of images at positions (n,)."""
        if self._small is None:
            one = self._read(rows[:1])
            self._small = one.numel() * one.element_size() * len(self) <= HELD
        if not self._small:
            return self._read(rows)
        if self._held is None:
            self._held = self._read(np.arange(len(self)))
        return self._held[torch.from_numpy(rows)]

    def _read(self, rows: np.ndarray) -> Tensor:
        found: Tensor = self._images.batch(BatchKey(0, rows, 0, len(rows)), 0)["input"]["pixel_values"]
        return found

    def texts(self, rows: np.ndarray, own: np.ndarray, epoch: int, seed: int) -> dict[str, Tensor]:
        """One caption of each image at positions (n,), drawn under keys of (seed, epoch, `own`)."""
        draws = uniforms(keys(seed, "caption", epoch), own, 1)[:, 0]
        every = [self._captions(i) for i in rows.tolist()]
        texts = [some[int(u * len(some))] for some, u in zip(every, draws)]
        return texts_padded(self._task.tokenizer, texts, self._task.context)


class VideoClips:
    """Clips of images that are frames, one caption each: that of the first frame.

    Args:
        frames: the images.
        rows: (n, F) their positions.
    """

    def __init__(self, frames: Frames, rows: np.ndarray) -> None:
        self._frames, self._rows = frames, rows

    def __len__(self) -> int:
        return len(self._rows)

    def labels(self) -> Tensor:
        return self._frames.labels()[torch.from_numpy(self._rows[:, 0])]

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """`input` with pixel_values (B, F, C, H, W) and the captions' ids, `label` (B,), `index` (B,)."""
        own = key.indices[key.start : key.stop]
        rows = self._rows[own]
        flat = self._frames.pixels(rows.flatten())
        frames = flat.view(*rows.shape, *flat.shape[1:])
        texts = self._frames.texts(rows[:, 0], own, key.epoch, seed)
        label = self._frames.labels()[torch.from_numpy(rows[:, 0])]
        return {"input": {"pixel_values": frames, **texts}, "label": label, "index": torch.from_numpy(own)}


class PannedClips:
    """Clips of a window that moves over each image, and comes nearer; drawn under keys of (seed, epoch, index).

    Args:
        frames: images that are larger than a frame.
        clips: frames, speed and the rest.
        size: (H, W) of a frame.
    """

    def __init__(self, frames: Frames, clips: Clips, size: tuple[int, int]) -> None:
        self._frames, self._clips, self._size = frames, clips, size

    def __len__(self) -> int:
        return len(self._frames)

    def labels(self) -> Tensor:
        return self._frames.labels()

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """As `VideoClips.batch`."""
        own = key.indices[key.start : key.stop]
        draws = torch.from_numpy(uniforms(keys(seed, "pan", key.epoch), own, 3)).float()
        frames = panned(self._frames.pixels(own), draws, self._clips, self._size)
        texts = self._frames.texts(own, own, key.epoch, seed)
        label = self._frames.labels()[torch.from_numpy(own)]
        return {"input": {"pixel_values": frames, **texts}, "label": label, "index": torch.from_numpy(own)}


def panned(images: Tensor, draws: Tensor, clips: Clips, size: tuple[int, int]) -> Tensor:
    """(B, F, C, H, W): windows of images (B, C, H', W'), which move in a direction from a place, both drawn.

    Args:
        draws: (B, 3) uniform: the place, across and down, and the direction.
        size: (H, W) of a frame.
    """
    count, share = clips.frames, 1 / clips.zoom
    sides = share * (1 - clips.nearer) ** torch.arange(count)
    angle = 2 * torch.pi * draws[:, 2]
    way = torch.stack([angle.cos(), angle.sin()], 1) * clips.speed * share
    shifts = way[:, None] * torch.arange(count)[None, :, None]
    room = (1 - share - shifts[:, -1].abs()).clamp_min(0)
    first = draws[:, :2] * room + (-shifts[:, -1]).clamp_min(0)
    centre = 2 * (first[:, None] + shifts + share / 2) - 1
    theta = torch.zeros(len(images), count, 2, 3)
    theta[..., 0, 0] = theta[..., 1, 1] = sides
    theta[..., :, 2] = centre
    shape = [len(images) * count, images.shape[1], *size]
    grid = F.affine_grid(theta.flatten(0, 1), shape, align_corners=False)
    repeated = images.repeat_interleave(count, 0)
    out = F.grid_sample(repeated, grid, padding_mode="border", align_corners=False)
    return out.view(len(images), count, *out.shape[1:])


def captions_of(task: Any, images: Any) -> tuple[dict[str, Tensor], Tensor]:
    """All distinct captions of a data set as token ids, and the id of each."""
    seen: dict[tuple[int, str], None] = {}
    for i, label in enumerate(images.labels().tolist()):
        for text in images.captions(i):
            seen.setdefault((label, text))
    tokens = texts_padded(task.tokenizer, [text for _, text in seen], task.context)
    return tokens, torch.tensor([label for label, _ in seen])

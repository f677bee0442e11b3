"""`IndexedDataset`: one split under one set of transforms, which makes whole batches as a function of (seed, epoch,
indices)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from stillhouse.data.augment import crop_flip, mix, partners, resize
from stillhouse.data.drawn import arrays, crop_and_flip, listening
from stillhouse.data.images import as_channels, from_array
from stillhouse.errors import UserError
from stillhouse.functional.pictures import normalise
from stillhouse.randomness import key as keys
from stillhouse.randomness import keyed, uniforms
from stillhouse.signals import Batch


@dataclass(frozen=True)
class BatchKey:
    """Which batch: the samples of the global batch, in order, of which `start:stop` are this process's share."""

    epoch: int
    indices: np.ndarray  # (G,) int64, positions in the split
    start: int
    stop: int


class Batched(Protocol):
    """Samples that come in batches."""

    def __len__(self) -> int: ...

    def batch(self, key: BatchKey, seed: int) -> Batch: ...


def first_seen(samples: Batched, index: int) -> Batch:
    """One sample, as a training step of seed 0 and epoch 0 would see it. Raises `IndexError` beyond the last."""
    if not -len(samples) <= index < len(samples):
        raise IndexError(index)
    one = np.array([index % len(samples)])
    batch = samples.batch(BatchKey(0, one, 0, 1), 0)
    return {k: {n: v[0] for n, v in x.items()} if isinstance(x, dict) else x[0] for k, x in batch.items()}


Inputs = Callable[[np.ndarray, int, int], Any]
"""(indices (B,), epoch, seed) -> (B, ...) float32, or a mapping of such."""


class IndexedDataset:
    """The samples 0..n-1 of a split.

    Args:
        inputs: makes the inputs of a batch.
        labels: (n,) int64.
        num_classes: classes, for mixed labels.
        mixup, cutmix: alphas; 0 is off.
        views: name -> makes further inputs of a batch; not with mixed samples.
    """

    def __init__(
        self,
        inputs: Inputs,
        labels: np.ndarray,
        num_classes: int,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        views: Mapping[str, Inputs] | None = None,
    ) -> None:
        self._inputs, self._labels, self.num_classes = inputs, torch.from_numpy(labels), num_classes
        self._mixup, self._cutmix, self._views = mixup, cutmix, dict(views or {})

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> Tensor:
        """(n,) int64, in index order; noisy labels where noise was asked for."""
        return self._labels.clone()

    def __getitem__(self, index: int) -> Batch:
        """One sample, as a training step of seed 0 and epoch 0 would see it, without mixing."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        one = np.array([index % len(self)])
        x = self._inputs(one, 0, 0)
        return {
            "input": {k: v[0] for k, v in x.items()} if isinstance(x, dict) else x[0],
            "label": self._labels[index],
            "index": torch.tensor(one[0]),
        }

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """A process's share of a batch: `input` (B, ...), `label` (B,) int64 or (B, C) float32 when mixed, `index` (B,)
        int64; with views, `views` as a mapping of names to further inputs."""
        if not self._mixup and not self._cutmix:
            own = key.indices[key.start : key.stop]
            index = torch.from_numpy(own)
            batch: Batch = {"input": self._inputs(own, key.epoch, seed), "label": self._labels[index], "index": index}
            return batch | self._viewed(own, key.epoch, seed)
        positions = np.arange(key.start, key.stop)
        others = partners(positions, len(key.indices))
        loaded = np.union1d(positions, others)  # a share of odd size reaches into its neighbour's
        inputs = self._inputs(key.indices[loaded], key.epoch, seed)
        labels = F.one_hot(self._labels[torch.from_numpy(key.indices[loaded])], self.num_classes).to(torch.float32)
        mine, theirs = (torch.from_numpy(np.searchsorted(loaded, p)) for p in (positions, others))
        draw = (seed, "mix", key.epoch, int(key.indices[0]))
        x, label = mix(inputs[mine], inputs[theirs], labels[mine], labels[theirs], self._mixup, self._cutmix, draw)
        return {"input": x, "label": label, "index": torch.from_numpy(key.indices[positions])}

    def recorded(self, key: BatchKey, seed: int) -> tuple[Batch, dict[str, np.ndarray]]:
        """A batch, and what was drawn for it: `crop` (B, 4) (top, left, height, width) and `flip` (B,), where images
        are augmented.

        Raises:
            UserError: mixed samples, which are a batch's and not a sample's.
        """
        if self._mixup or self._cutmix:
            raise UserError(
                "Signals are stored sample by sample, but data.mixup and data.cutmix mix a batch; set both to 0."
            )
        own = key.indices[key.start : key.stop]
        if not isinstance(self._inputs, PixelInputs | ItemInputs):
            return self.batch(key, seed), {}
        x, drawn = self._inputs.recorded(own, key.epoch, seed)
        index = torch.from_numpy(own)
        batch: Batch = {"input": x, "label": self._labels[index], "index": index}
        return batch | self._viewed(own, key.epoch, seed), drawn

    def _viewed(self, own: np.ndarray, epoch: int, seed: int) -> Batch:
        return {"views": {n: make(own, epoch, seed) for n, make in self._views.items()}} if self._views else {}


@dataclass
class PixelInputs:
    """Images in memory, a whole batch at once, no loop over samples.

    Args:
        images: (N, C, H, W) uint8, or float pixels.
        rows: (n,) which of them are the split's, in order.
        mean, std: per channel.
        size: (H, W) of the result.
        pad: pixels by which a training crop may shift; 0 for none.
        flip: mirror at random.
    """

    images: Tensor
    rows: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    pad: int = 0
    flip: bool = False

    def __call__(self, indices: np.ndarray, epoch: int, seed: int) -> Tensor:
        rows = self.rows[indices]
        if self.pad or self.flip:
            draws = uniforms(keys(seed, "augment", epoch), indices, 3)
            picked = torch.from_numpy(crop_flip(self.images.numpy(), rows, draws, self.pad, self.flip))
        else:
            picked = self.images[torch.from_numpy(rows)]
        if tuple(picked.shape[-2:]) != self.size:
            picked = resize(picked, self.size)
        return normalise(picked, self.mean, self.std)

    def recorded(self, indices: np.ndarray, epoch: int, seed: int) -> tuple[Tensor, dict[str, np.ndarray]]:
        """The inputs; and where they are augmented, `crop` (B, 4) (top, left, height, width; negative in the padding)
        and `flip` (B,)."""
        x = self(indices, epoch, seed)
        if not (self.pad or self.flip):
            return x, {}
        draws = uniforms(keys(seed, "augment", epoch), indices, 3)
        corner = (draws[:, :2] * (2 * self.pad + 1)).astype(np.int16) - np.int16(self.pad)
        sides = np.broadcast_to(np.array(self.images.shape[-2:], np.int16), corner.shape)
        return x, {"crop": np.concatenate([corner, sides], 1), "flip": (draws[:, 2] < 0.5) & self.flip}


@dataclass
class ItemInputs:
    """Inputs read one by one, each under its own keys, then stacked.

    Args:
        item: input by position in the source.
        positions: (n,) the split's, in order.
        transform: on the image, or None.
        shape: (C, H, W) of the result, for images; anything else is stacked as it is.
        mean, std: per channel; () for inputs that are no images.
        draw: what is drawn, in the keys (seed, *draw, epoch, index).
    """

    item: Callable[[int], Any]
    positions: np.ndarray
    transform: Callable[[Any], Any] | None
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    draw: tuple[str, ...] = ("augment",)

    def __call__(self, indices: np.ndarray, epoch: int, seed: int) -> Any:
        rows = []
        for index in indices.tolist():
            with keyed(seed, *self.draw, epoch, index):
                rows.append(
                    self._image(int(self.positions[index])) if self.mean else self._plain(int(self.positions[index]))
                )
        if not self.mean:
            return _stack(rows)
        return normalise(torch.stack(rows), self.mean, self.std)

    def recorded(self, indices: np.ndarray, epoch: int, seed: int) -> tuple[Any, dict[str, np.ndarray]]:
        """The inputs; and for images under torchvision's transforms, `crop` (B, 4) and `flip` (B,) as they were
        drawn."""
        if not self.mean or self.transform is None:
            return self(indices, epoch, seed), {}
        rows, drawn = [], []
        with listening(self.transform) as heard:
            for index in indices.tolist():
                heard.clear()
                with keyed(seed, *self.draw, epoch, index):
                    rows.append(self._image(int(self.positions[index])))
                drawn.append(crop_and_flip(heard))
        return normalise(torch.stack(rows), self.mean, self.std), arrays(drawn)

    def _plain(self, position: int) -> Any:
        value = self.item(position)
        return self.transform(as_tensor(value)) if self.transform else value

    def _image(self, position: int) -> Tensor:
        """uint8, or float32 in [0, 1], of the shape wanted."""
        from torchvision.transforms.v2 import functional as V

        value = self.item(position)
        if isinstance(value, np.ndarray):
            value = from_array(value, f"Sample {position}")
        if isinstance(value, Image.Image):
            value = as_channels(value, self.shape[0], f"Sample {position}")
        if self.transform is not None:
            try:
                value = self.transform(value)
            except (ValueError, TypeError, RuntimeError) as error:
                raise UserError(
                    f"data.augment cannot be applied to sample {position}: {str(error).rstrip('.')}."
                ) from None
        if isinstance(value, Image.Image):
            value = V.pil_to_tensor(value)
        if tuple(value.shape[-2:]) != self.shape[-2:]:
            value = V.center_crop(V.resize(value, min(self.shape[-2:]), antialias=True), list(self.shape[-2:]))
        if tuple(value.shape) != self.shape:
            raise UserError(
                f"Sample {position} has shape {tuple(value.shape)} after data.augment, but inputs of shape "
                f"{self.shape} are expected."
            )
        image: Tensor = value if value.dtype == torch.uint8 else value.to(torch.float32)
        return image


def as_tensor(value: Any) -> Any:
    """Arrays, numbers and lists as tensors, floats as float32; anything else as it is."""
    value = torch.as_tensor(value) if isinstance(value, np.ndarray | float | int | list) else value
    return value.to(torch.float32) if isinstance(value, Tensor) and value.is_floating_point() else value


def _stack(rows: list[Any]) -> Any:
    """(B, ...) of tensors or arrays; of mappings, a mapping of such. Raises `UserError` for shapes that differ."""
    if isinstance(rows[0], dict):
        return {k: _stack([r[k] for r in rows]) for k in rows[0]}
    tensors = [as_tensor(r) for r in rows]
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) > 1:
        raise UserError(
            f"The inputs of a batch have different shapes: {', '.join(map(str, sorted(shapes)[:3]))}; make them equal."
        )
    return torch.stack(tensors)

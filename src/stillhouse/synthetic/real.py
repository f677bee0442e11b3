"""Real training images by class: read when they are needed (`RealRows`), or all in memory, to compare synthetic images
with (`RealImages`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.functional.whitening import Whitening, fit_whitening
from stillhouse.runs.run import Run


class RealRows:
    """The training split by class; an image is read when it is needed, so that a data set need not fit into memory.

    Args:
        read: rows (n,) of the split -> their images (n, C, H, W) as networks see them.
        labels: (N,) class ids.
        classes: class names.
        mean, std: of the images' normalisation.
        shape: (C, H, W).

    Raises:
        UserError: a class without images.
    """

    def __init__(
        self,
        read: Callable[[Tensor], Tensor],
        labels: Tensor,
        classes: list[str],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        shape: tuple[int, ...],
    ) -> None:
        self.read, self.labels, self.classes, self.mean, self.std, self.shape = read, labels, classes, mean, std, shape
        order = torch.argsort(labels.cpu(), stable=True)
        self.counts = torch.bincount(labels.cpu(), minlength=len(classes))
        self.rows = list(order.split(self.counts.tolist()))
        empty = [classes[c] for c, n in enumerate(self.counts.tolist()) if not n]
        if empty:
            raise UserError(
                f"The training split holds no image of the class '{empty[0]}'; every class needs some to be distilled."
            )

    @classmethod
    def of(cls, run: Run, data: Any, device: torch.device | None = None) -> RealRows:
        """The training split of a recipe's data, without augmentation, read to the device (default: the run's).

        Raises `UserError` for inputs that are no images.
        """
        bundle = run.data(data)
        if len(bundle.input_shape) != 3:
            raise UserError(
                f"Data-set distillation makes images, but the inputs of '{data.name}' have shape {bundle.input_shape}."
            )
        dataset = bundle.dataset("train", train=False)

        def read(rows: Tensor) -> Tensor:
            from stillhouse.data import BatchKey

            parts = [part.numpy() for part in rows.cpu().split(512)]
            return torch.cat([dataset.batch(BatchKey(0, part, 0, len(part)), 0)["input"] for part in parts]).to(
                device or run.device
            )

        return RealRows(
            read,
            dataset.labels(),
            list(bundle.classes),
            tuple(bundle.mean),
            tuple(bundle.std),
            tuple(bundle.input_shape),
        )

    def take(self, count: int, generator: torch.Generator, what: str = "images") -> Tensor:
        """Rows (classes * count,), class-major: a random choice of each class, without replacement.

        Raises:
            UserError: a class with fewer images than `count`.
        """
        least = int(self.counts.min())
        if count > least:
            name = self.classes[int(self.counts.argmin())]
            raise UserError(
                f"{count} {what} of each class are wanted, but '{name}' has {least}; take fewer, or give more "
                "training data."
            )
        return torch.cat([rows[torch.randperm(len(rows), generator=generator)[:count]] for rows in self.rows])

    def draw(self, count: int, generator: torch.Generator, what: str = "real images (batch_real)") -> Tensor:
        """Images (classes * count, C, H, W), class-major (see `take`)."""
        return self.read(self.take(count, generator, what))


class RealImages(RealRows):
    """The training split as networks see it, in memory.

    Args:
        images: (N, C, H, W) float32.
        labels: (N,) class ids.
        classes: class names.
        mean, std: of the normalisation that the images have had (or, with `whitening`, would have had).
        whitening: what the images have had instead.

    Raises:
        UserError: integer images, or a class without images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: list[str],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        whitening: Whitening | None = None,
    ) -> None:
        if images.ndim != 4 or not images.is_floating_point():
            raise UserError(
                f"Data-set distillation needs floating-point images (N, C, H, W); given: {tuple(images.shape)}, "
                f"{images.dtype}."
            )
        self.images, self.whitening = images, whitening
        super().__init__(
            lambda rows: images[rows.to(images.device)], labels, classes, mean, std, tuple(images.shape[1:])
        )

    @classmethod
    def load(cls, run: Run, data: Any, zca: bool = False, device: torch.device | None = None) -> RealImages:
        """All images of the training split of a recipe's data, without augmentation, on the device.

        Raises `UserError` for inputs that are no images.
        """
        split = RealRows.of(run, data, device)
        images = split.read(torch.arange(len(split.labels)))
        whitening = None
        if zca:
            pixels = unnormalised(images, split.mean, split.std)
            whitening = fit_whitening(pixels)
            images = whitening(pixels)
        return cls(images, split.labels.to(images.device), split.classes, split.mean, split.std, whitening)


def unnormalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Pixels in [0, 1] of normalised images (B, C, H, W)."""
    m, s = (torch.tensor(v, dtype=images.dtype, device=images.device).view(1, -1, 1, 1) for v in (mean, std))
    return images * s + m

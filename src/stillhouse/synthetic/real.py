"""Real training images in memory, grouped by class: what synthetic images are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.functional.whitening import Whitening, fit_whitening
from stillhouse.run import Run


class RealImages:
    """The training split as networks see it.

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
        self, images: Tensor, labels: Tensor, classes: list[str], mean: tuple[float, ...], std: tuple[float, ...], whitening: Whitening | None = None
    ) -> None:
        if images.ndim != 4 or not images.is_floating_point():
            raise UserError(f"Data-set distillation needs floating-point images (N, C, H, W); given: {tuple(images.shape)}, {images.dtype}.")
        self.images, self.labels, self.classes = images, labels, classes
        self.mean, self.std, self.whitening = mean, std, whitening
        order = torch.argsort(labels.cpu(), stable=True)
        self.counts = torch.bincount(labels.cpu(), minlength=len(classes))
        self.rows = list(order.split(self.counts.tolist()))
        empty = [classes[c] for c, n in enumerate(self.counts.tolist()) if not n]
        if empty:
            raise UserError(f"The training split holds no image of the class '{empty[0]}'; every class needs some to be distilled.")

    @classmethod
    def load(cls, run: Run, data: Any, zca: bool = False, device: torch.device | None = None) -> RealImages:
        """The training split of a recipe's data, without augmentation, on the device. Raises `UserError` for inputs that are no images."""
        bundle = run.data(data)
        if len(bundle.input_shape) != 3:
            raise UserError(f"Data-set distillation makes images, but the inputs of '{data.name}' have shape {bundle.input_shape}.")
        dataset = bundle.dataset("train", train=False)
        from stillhouse.data import Loader

        images = torch.cat([batch["input"] for batch in Loader(dataset, 512)]).to(device or run.device)
        labels = dataset.labels().to(images.device)
        mean, std = tuple(bundle.mean), tuple(bundle.std)
        whitening = None
        if zca:
            pixels = unnormalised(images, mean, std)
            whitening = fit_whitening(pixels)
            images = whitening(pixels)
        return cls(images, labels, list(bundle.classes), mean, std, whitening)

    def take(self, count: int, generator: torch.Generator, what: str = "images") -> Tensor:
        """Rows (classes * count,), class-major: a random choice of each class, without replacement.

        Raises:
            UserError: a class with fewer images than `count`.
        """
        least = int(self.counts.min())
        if count > least:
            name = self.classes[int(self.counts.argmin())]
            raise UserError(f"{count} {what} of each class are asked for, but '{name}' has {least}; ask for fewer, or give more training data.")
        return torch.cat([rows[torch.randperm(len(rows), generator=generator)[:count]] for rows in self.rows])

    def draw(self, count: int, generator: torch.Generator, what: str = "real images (batch_real)") -> Tensor:
        """Images (classes * count, C, H, W), class-major (see `take`)."""
        return self.images[self.take(count, generator, what).to(self.images.device)]


def unnormalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Pixels in [0, 1] of normalised images (B, C, H, W)."""
    m, s = (torch.tensor(v, dtype=images.dtype, device=images.device).view(1, -1, 1, 1) for v in (mean, std))
    return images * s + m

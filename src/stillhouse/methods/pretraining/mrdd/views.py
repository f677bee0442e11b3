"""Views of a sample: made from one image (itself, its edges), or given by a data set whose inputs are mappings of
images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError, unknown


def edges(images: Tensor) -> Tensor:
    """The edge view of E-MNIST: dilation by 3 x 3 minus the image; (B, C, H, W) in [0, 1] -> the same."""
    return F.max_pool2d(images, 3, stride=1, padding=1) - images


DERIVED = {"image": lambda x: x, "edge": edges}
"""Name -> how a view is made from an image in [0, 1]."""


@dataclass(frozen=True)
class ViewMaker:
    """A loader's input as the named views, in order.

    Args:
        names: of `DERIVED`, or keys of inputs that are mappings (whose images are in [0, 1]).
        mean, std: what the loader subtracted and divided by, per channel, which is undone.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __call__(self, inputs: Any) -> list[Tensor]:
        """V tensors (B, C, H, W).

        Raises `UserError` for a name that is not there, fewer than two views, or shapes that differ.
        """
        if len(self.names) < 2:
            raise UserError(f"mrdd: needs at least two views; given: {', '.join(self.names) or 'none'}.")
        if isinstance(inputs, Mapping):
            for name in self.names:
                if name not in inputs:
                    raise unknown("view", name, list(inputs))
            views = [inputs[name].float() for name in self.names]
        else:
            for name in self.names:
                if name not in DERIVED:
                    raise unknown("view", name, DERIVED)
            image = inputs.float()
            if self.mean:
                shape = (1, -1, 1, 1)
                image = image * torch.tensor(self.std, device=image.device).view(shape) + torch.tensor(
                    self.mean, device=image.device
                ).view(shape)
            views = [DERIVED[name](image.clamp(0, 1)) for name in self.names]
        if any(v.ndim != 4 or v.shape != views[0].shape for v in views):
            shapes = ", ".join(f"{n} {tuple(v.shape)}" for n, v in zip(self.names, views))
            raise UserError(f"mrdd: all views of a sample must be images of one shape (B, C, H, W); given: {shapes}.")
        return views

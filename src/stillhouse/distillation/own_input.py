"""A teacher's own input: the student's images as the teacher was trained to see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError, unknown
from stillhouse.functional.pictures import renormalise
from stillhouse.signals import Batch


@dataclass(frozen=True)
class OwnInput:
    """Turns a batch's images (B, C, H, W), normalised for the student, into the teacher's.

    Attributes:
        given: mean and standard deviation per channel that the images were normalised with; () where they are in [0,
            1].
        own: those of the teacher.
        size: (height, width) to resize to; None: as they are.
        pool: side of the squares that are averaged first; 1: none.
        interpolation: bilinear or bicubic, antialiased.

    >>> grey = {"input": torch.zeros(1, 1, 4, 4)}
    >>> OwnInput(given=((0.5,), (0.5,)), own=((0.5, 0.4, 0.3), (0.1, 0.1, 0.1)), size=(2, 2))(grey)["input"][0, :, 0, 0]
    tensor([0.0000, 1.0000, 2.0000])
    """

    given: tuple[Sequence[float], Sequence[float]] = ((), ())
    own: tuple[Sequence[float], Sequence[float]] = ((), ())
    size: tuple[int, int] | None = None
    pool: int = 1
    interpolation: str = "bilinear"

    def __call__(self, batch: Batch) -> Batch:
        """The batch with the teacher's input; all else as it is. Raises `UserError` for what is no image."""
        given = batch["input"]
        if isinstance(given, Mapping):
            return {**batch, "input": {**given, "pixel_values": self.image(given.get("pixel_values"))}}
        return {**batch, "input": self.image(given)}

    def image(self, x: Any) -> Tensor:
        """(B, C, H, W) of the student -> (B, C', H', W') of the teacher; one channel becomes as many as the teacher
        has."""
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise UserError("A teacher's own `input` is for images (B, C, H, W), which this data does not give.")
        if self.pool > 1:
            x = F.avg_pool2d(x, self.pool)
        if len(self.own[0]) not in (0, 1, x.shape[1]) and x.shape[1] != 1:
            raise UserError(
                f"The teacher's input has mean and std of {len(self.own[0])} channels, but the images have "
                f"{x.shape[1]}."
            )
        return renormalise(x, self.given, self.own, self.size, self.interpolation)


@dataclass(frozen=True)
class ViewInput:
    """Turns a training batch into one whose input is another view of its samples. Batches of evaluation have no views:
    their input stays.

    Attributes:
        view: its name among the batch's `views`.
        then: what is done to the view's images.
    """

    view: str
    then: OwnInput | None = None

    def __call__(self, batch: Batch) -> Batch:
        """The batch with the view as its input. Raises `UserError` for a view that a batch with views does not have."""
        views = batch.get("views")
        if views is not None:
            if self.view not in views:
                raise unknown("view", self.view, views, " in this batch; data.views makes them")
            batch = {**batch, "input": views[self.view]}
        return batch if self.then is None else self.then(batch)

"""Distillation inside another library's loop: the `Context` over a user's loader, and objectives by
name."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from stillhouse.data import AdaptedLoader
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.training.context import TrainingContext


class LoaderContext(TrainingContext):
    """A training's context where the only split is the user's own training loader, swept as it is: in its order, with
    its augmentation, and each process its own share (class means are then summed over processes).
    """

    def __init__(
        self,
        module: Distillation,
        progress: Progress,
        train: AdaptedLoader,
        seed: int,
        device: torch.device,
        folder: Path,
    ) -> None:
        super().__init__(module, progress, {"train": train}, seed, device, folder, train)

    def class_mean(self, what: str, of: str = "teacher") -> tuple[Tensor, Tensor]:
        mean, counts = super().class_mean(what, of)
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return mean, counts
        sums, counts = mean.double() * counts[:, None], counts.clone()
        dist.all_reduce(sums)
        dist.all_reduce(counts)
        return (sums / counts.clamp_min(1)[:, None]).float(), counts

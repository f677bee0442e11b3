"""Early exit, the baseline: a classifier after every block but the last, and samples that are sure of their class go no
further (as in BranchyNet, arXiv 1709.01686)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.distillation.objective import Objective, Progress
from stillhouse.models.anatomy import embedding_from
from stillhouse.objectives.ce import cross_entropy
from stillhouse.signals import Batch, Signals, read_logits


class _AllLeft(Exception):
    """Every sample of a batch has left."""


class EarlyExit(nn.Module):
    """A network whose samples leave at the first classifier whose largest probability reaches the threshold.

    In training, and while the threshold is above 1, all samples go through, and `heads` are there to be tapped. A
    sample that leaves is taken out of the batch, so that the blocks after do no work for it.

    Args:
        network: a chain of blocks, whose outputs (B, L, D) or (B, D) have the samples first.
        blocks: names of those after which samples may leave.
        dims: D of each.
        classes: of the classifiers.
    """

    threshold: Tensor

    def __init__(self, network: nn.Module, blocks: Sequence[str], dims: Sequence[int], classes: int) -> None:
        super().__init__()
        self.network, self.classes = network, classes
        self.heads = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes)) for dim in dims)
        self.register_buffer("threshold", torch.tensor(2.0))
        self._rows = self._out = torch.empty(0)
        self._leaving = False
        for block, head in zip(blocks, self.heads):
            network.get_submodule(block).register_forward_hook(self._hook(head))

    def _hook(self, head: nn.Module) -> Any:
        def leave(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            logits = head(embedding_from(output))
            if not self._leaving:
                return None
            sure = logits.softmax(-1).amax(-1) >= self.threshold
            self._out[self._rows[sure]] = logits[sure]
            self._rows = self._rows[~sure]
            if not len(self._rows):
                raise _AllLeft
            return output[~sure]

        return leave

    def forward(self, x: Tensor) -> Tensor:
        self._leaving = not self.training and bool(self.threshold <= 1)
        if not self._leaving:
            return read_logits(self.network(x))
        self._rows = torch.arange(len(x), device=x.device)
        self._out = torch.zeros(len(x), self.classes, device=x.device)
        try:
            self._out[self._rows] = read_logits(self.network(x))
        except _AllLeft:
            pass
        finally:
            self._leaving = False
        return self._out


class ExitLoss(Objective):
    """The mean cross-entropy of all classifiers but the last, whose loss is the task's.

    Args:
        count: how many there are.
    """

    name = "exits"

    def __init__(self, count: int) -> None:
        super().__init__()
        self.heads = [f"heads.{i}" for i in range(count)]
        self.needs = frozenset({"label", *(f"student.tap:{head}" for head in self.heads)})

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"loss": torch.stack([cross_entropy(student.taps[h], batch["label"]) for h in self.heads]).mean()}


def threshold_for(confidences: Tensor, share: float) -> float:
    """The threshold at which samples go through this share of the blocks on average, or a little less.

    Args:
        confidences: (N, E) largest probability at each of E exits; there are E + 1 blocks.
        share: above 1 / (E + 1), and at most 1.

    >>> threshold_for(torch.tensor([[0.9], [0.8], [0.6], [0.3]]), 0.75)
    0.800000011920929
    """
    low, high = 0, confidences.numel() - 1
    ordered = confidences.flatten().sort(descending=True).values
    while low < high:  # the share falls with the threshold
        middle = (low + high) // 2
        if _passed(confidences, ordered[middle]) <= share:
            high = middle
        else:
            low = middle + 1
    return float(ordered[low])


def _passed(confidences: Tensor, threshold: Tensor) -> float:
    """The share of the blocks that samples go through on average."""
    sure = torch.cat([confidences >= threshold, torch.ones_like(confidences[:, :1], dtype=torch.bool)], 1)
    return (sure.to(torch.int8).argmax(1) + 1).double().mean().item() / sure.shape[1]

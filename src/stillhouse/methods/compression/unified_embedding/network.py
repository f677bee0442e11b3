"""Networks over categorical features: embeddings, then DCN-V2's cross layers and a perceptron, or the perceptron
alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.distillation.objective import Progress
from stillhouse.methods.compression.unified_embedding.table import UnifiedEmbedding
from stillhouse.signals import Batch
from stillhouse.training.module import TrainingModule


class Cross(nn.Module):
    """Full-rank cross layers of DCN-V2 (arXiv 2008.13535): x <- x_0 * (W x + b) + x."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for layer in self.layers:
            x = first * layer(x) + x
        return x


class TableNetwork(nn.Module):
    """Embeddings and dense columns side by side, cross layers, a perceptron, and a linear layer to one logit (two
    classes) or C.

    Args:
        table: of the categorical features.
        dense: further columns, of numbers.
        cross: DCN-V2 layers; 0: none.
        hidden: widths of the perceptron; none: a linear model.
        classes: C.
    """

    def __init__(self, table: UnifiedEmbedding, dense: int, cross: int, hidden: Sequence[int], classes: int) -> None:
        super().__init__()
        self.table = table
        width = table.width + dense
        self.cross = Cross(width, cross)
        widths = [width, *hidden]
        self.hidden = nn.Sequential(*(part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())))
        self.out = nn.Linear(widths[-1], 1 if classes == 2 else classes)

    def forward(self, codes: Tensor, dense: Tensor | None = None) -> Tensor:
        """(B, T) codes and (B, D) numbers -> (B, 1) or (B, C) logits."""
        x = self.table(codes)
        return self.out(self.hidden(self.cross(x if dense is None else torch.cat([x, dense], -1))))

    def angle(self) -> float:
        """Mean angle in degrees between features' weights of the first layer: pairs of features, both `widths` alike,
        taken as one vector of all units."""
        first = next(m for m in (*self.cross.layers, *self.hidden, self.out) if isinstance(m, nn.Linear)).weight
        blocks = first[:, : self.table.width].split(self.table.widths, 1)
        widest = max(self.table.widths)
        rows = torch.stack([b.detach().flatten() for b in blocks if b.shape[1] == widest])
        return mean_angle(rows)


def mean_angle(vectors: Tensor) -> float:
    """Mean pairwise angle in degrees of n >= 2 vectors (n, D); 90 where there are fewer."""
    if len(vectors) < 2:
        return 90.0
    cosine = F.normalize(vectors.double(), dim=1) @ F.normalize(vectors.double(), dim=1).T
    i, j = torch.triu_indices(len(vectors), len(vectors), 1)
    return float(cosine[i, j].clamp(-1, 1).acos().mean().rad2deg())


class Ranking(TrainingModule):
    """A network and its loss in nats: binary cross-entropy with one logit, cross-entropy with more."""

    def __init__(self, network: TableNetwork) -> None:
        super().__init__()
        self.student = network

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        logits = self.student(batch["input"], batch.get("dense")).float()
        label = batch["label"]
        return {
            "loss": F.binary_cross_entropy_with_logits(logits[:, 0], label.float())
            if logits.shape[1] == 1
            else F.cross_entropy(logits, label)
        }


def class_probs(logits: Tensor) -> Tensor:
    """(B, 1) or (B, C) logits -> (B, C) probabilities."""
    if logits.shape[1] > 1:
        return logits.float().softmax(-1)
    one = logits.float().sigmoid()
    return torch.cat([1 - one, one], 1)

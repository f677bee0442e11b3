"""A graph network trained on a set of graphs, distilled or not, and tested on ordinary ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import TrainSpec
from stillhouse.data import BatchKey, Loader
from stillhouse.data.graph_sets import Graphs
from stillhouse.distillation.objective import Progress
from stillhouse.methods.graphs.mirage.networks import GraphNetwork, as_batch
from stillhouse.randomness import key, uniforms
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, evaluating, to_device
from stillhouse.training.module import TrainingModule

Sampling = Literal["uniform", "frequency"]
AT_ONCE = 512  # graphs of one forward pass when a network is tested


class GraphDraws:
    """Draws from a set of graphs, as data for `Loader`: `uniform` takes every graph equally often; `frequency` draws a
    class, then a graph by weight.

    Args:
        graphs: at least one.
        draws: the length of an epoch.
    """

    def __init__(self, graphs: Graphs, draws: int, sampling: Sampling) -> None:
        self.graphs, self.draws, self.sampling = graphs, draws, sampling
        weight = torch.ones(len(graphs)) if graphs.weight is None else graphs.weight
        self._rows = [(graphs.y == c).nonzero().flatten().numpy() for c in torch.unique(graphs.y)]
        self._ends = [np.cumsum(w := weight[torch.from_numpy(r)].double().numpy()) / w.sum() for r in self._rows]

    def __len__(self) -> int:
        return self.draws

    def labels(self) -> Tensor:
        """(draws,) classes; of `frequency`, those of the graphs in turn, as the draws of an epoch are not known before
        it."""
        return self.graphs.y[torch.arange(self.draws) % len(self.graphs)]

    def rows(self, at: BatchKey, seed: int) -> Tensor:
        """The ids of a batch's graphs: a function of (seed, epoch, index)."""
        index = at.indices[at.start : at.stop]
        if self.sampling == "uniform":
            return torch.from_numpy(index % len(self.graphs))
        draw = uniforms(key(seed, "mirage", at.epoch), index, 2)
        cls = (draw[:, 0] * len(self._rows)).astype(np.int64)
        picked = [
            self._rows[c][
                np.searchsorted(self._ends[c], draw[cls == c, 1], side="right").clip(max=len(self._rows[c]) - 1)
            ]
            for c in range(len(self._rows))
        ]
        out = np.empty(len(index), dtype=np.int64)
        for c, ids in enumerate(picked):
            out[cls == c] = ids
        return torch.from_numpy(out)

    def batch(self, at: BatchKey, seed: int) -> Batch:
        return as_batch(self.graphs.select(self.rows(at, seed)))


class ClassificationModule(TrainingModule):
    """A graph network and its loss, cross-entropy in nats."""

    def __init__(self, network: GraphNetwork) -> None:
        super().__init__()
        self.student = network

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.student(batch).float(), batch["label"])}


def trained(
    network: GraphNetwork,
    graphs: Graphs,
    parts: Mapping[str, Graphs],
    spec: TrainSpec,
    run: Run,
    name: str,
    draws: int,
    sampling: Sampling,
) -> dict[str, float]:
    """Train on a set and test on `parts`, `val` and `test`: `auc` and `accuracy` of the test part, `val_auc`, and
    seconds an epoch."""
    loader = Loader(
        GraphDraws(graphs, draws, sampling),
        min(spec.batch_size, draws),
        seed=key(run.seed, name) & 0xFFFFFFFF,
        shuffle=True,
    )
    fitted = run.fit(
        name, ClassificationModule(network), loader, spec, evaluate=lambda m, d: scores(m, parts["val"], d)
    )
    found = scores(network, parts["test"], run.device)
    return {**found, "val_auc": fitted.figures["auc"], "epoch_seconds": fitted.seconds / max(fitted.epochs, 1)}


@torch.no_grad()
def scores(network: nn.Module, graphs: Graphs, device: torch.device) -> dict[str, float]:
    """`auc` (of class 1; with more than two classes, one against the rest, the mean over classes) and `accuracy` on the
    whole of a set."""
    from sklearn.metrics import roc_auc_score

    network.to(device)
    with evaluating(network):
        logits = [
            network(to_device(as_batch(graphs.select(rows)), device)).float()
            for rows in torch.arange(len(graphs)).split(AT_ONCE)
        ]
    probs, y = torch.cat(logits).softmax(-1).cpu(), graphs.y
    auc = roc_auc_score(y, probs[:, 1]) if probs.shape[1] == 2 else roc_auc_score(y, probs, multi_class="ovr")
    return {"auc": float(auc), "accuracy": (probs.argmax(-1) == y).double().mean().item()}

"""The small case that the theory does not cover: a ReLU encoder under Adam, JEPA against MAE on the same pairs, probed
while it learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config.specs import Spec
from stillhouse.methods.pretraining.jepa_bias.linear import orthogonal
from stillhouse.methods.pretraining.jepa_bias.sources import Pairs
from stillhouse.methods.pretraining.jepa_bias.theory import Kind
from stillhouse.randomness import generator, keyed


class NonlinearSpec(Spec):
    """A ReLU network in place of the deep linear one."""

    hidden: int = Field(128, ge=1, description="Units of each hidden layer.")
    layers: int = Field(2, ge=1, description="Hidden layers.")
    dim: int = Field(32, ge=1, description="Of the embedding.")
    steps: int = Field(1500, ge=1, description="Of Adam.")
    batch: int = Field(256, ge=2, description="Pairs a step.")
    lr: float = Field(1e-3, gt=0, description="Learning rate.")
    start: float = Field(0.1, gt=0, description="JEPA: the predictor starts at this multiple of the identity.")
    probes: int = Field(15, ge=2, description="How often the embedding is probed.")


class Learner(nn.Module):
    """Encoder and linear predictor, without biases, which JEPA would use to make every encoding alike; the loss is the
    theory's, over mini-batches.

    Args:
        inputs: d of x and y.
        kind: what is predicted: the encoding of y, detached, or y.
    """

    def __init__(self, inputs: int, spec: NonlinearSpec, kind: Kind) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        at = inputs
        for _ in range(spec.layers):
            layers += [nn.Linear(at, spec.hidden, bias=False), nn.ReLU()]
            at = spec.hidden
        self.encoder = nn.Sequential(*layers, nn.Linear(at, spec.dim, bias=False))
        self.predictor = nn.Linear(spec.dim, spec.dim if kind == "jepa" else inputs, bias=False)
        if (
            kind == "jepa"
            # as in the theory, V starts as a small multiple of the identity; a random one makes the embedding jump at
            # first
        ):
            nn.init.eye_(self.predictor.weight).data.mul_(spec.start)
        self.kind = kind

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, d) twice -> the loss, half the squared error summed over what is predicted, mean over the batch."""
        target = self.encoder(y).detach() if self.kind == "jepa" else y
        return 0.5 * (self.predictor(self.encoder(x)) - target).square().sum(-1).mean()


class Trainer:
    """One learner on keyed batches of mixed pairs, with its probes; made for `run.loop`.

    The coordinates are turned by a random orthogonal matrix, so that no input unit is a feature.
    """

    def __init__(self, pairs: Pairs, spec: NonlinearSpec, kind: Kind, seed: int, neighbours: int) -> None:
        self.pairs, self.spec, self.kind, self.seed, self.neighbours = pairs, spec, kind, seed, neighbours
        d = pairs.clean["train"].shape[1] + pairs.spec.nuisance
        self.turn = orthogonal(d, "nonlinear", seed)
        with keyed("nonlinear", seed):
            self.model = Learner(d, spec, kind)
        self.optimizer = torch.optim.Adam(self.model.parameters(), spec.lr)
        self.curves: dict[str, list[float]] = {}

    def step(self, i: int) -> dict[str, Tensor]:
        rows = torch.randint(
            len(self.pairs.clean["train"]), (self.spec.batch,), generator=generator("rows", self.seed, i)
        )
        x, y, _ = self.pairs.draw("train", rows, "nonlinear", self.seed, i)
        self.optimizer.zero_grad()
        value = self.model((x @ self.turn).float(), (y @ self.turn).float())
        value.backward()
        self.optimizer.step()
        every = max(self.spec.steps // (self.spec.probes - 1), 1)
        if i % every == 0 or i + 1 == self.spec.steps:
            for name, figure in {"step": float(i + 1), **self.probe()}.items():
                self.curves.setdefault(name, []).append(figure)
        return {"loss": value.detach()}

    @torch.no_grad()
    def probe(self) -> dict[str, float]:
        """R^2 of a ridge regression from the embedding to the clean components and to the shared nuisance, kNN
        accuracy, and the embedding's size."""
        from sklearn.linear_model import Ridge
        from sklearn.metrics import r2_score

        found: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for split in ("train", "test"):
            x, _, clean = self.pairs.draw(split, torch.arange(len(self.pairs.clean[split])), "probe", split, self.seed)
            found[split] = (
                self.model.encoder((x @ self.turn).float()).numpy(),
                clean.numpy(),
                self.pairs.labels[split].numpy(),
            )
        (f, z, labels), (f_test, z_test, labels_test) = found["train"], found["test"]
        size = float(f.std(0).mean())
        guess = Ridge(1e-3 * max(size**2, 1e-12) * len(f)).fit(f, z).predict(f_test)
        k = self.pairs.spec.components
        out = {"content": float(r2_score(z_test[:, :k], guess[:, :k], multioutput="variance_weighted")), "size": size}
        if self.pairs.spec.nuisance:
            out["nuisance"] = float(r2_score(z_test[:, k:], guess[:, k:], multioutput="variance_weighted"))
        return {**out, "knn": knn(f, labels, f_test, labels_test, self.neighbours)}

    def state_dict(self) -> dict[str, Any]:
        return {"curves": self.curves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curves = {k: list(v) for k, v in state["curves"].items()}


def knn(train: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, neighbours: int) -> float:
    """Test accuracy of the nearest neighbours' vote."""
    from sklearn.neighbors import KNeighborsClassifier

    return float(KNeighborsClassifier(neighbours).fit(train, labels).score(test, test_labels))

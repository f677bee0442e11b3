"""How networks learn from a committee's set (CV-DD, arXiv 2501.07575): a stretched cosine, accumulated gradients, no decay of one-dimensional parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.evaluation import evaluates
from stillhouse.evaluation.synthetic_set import Judging
from stillhouse.recipe import Spec
from stillhouse.run import Run
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.scores import soft_loss
from stillhouse.synthetic.training import SoftTraining


class StudentSpec(Spec):
    """How networks learn from the set, beside `evaluate`."""

    stretch: float = Field(1.0, ge=1, description="eta: the rate is .5 (1 + cos(pi e / (eta E))); 2 ends at half the rate.")
    accumulate: int = Field(2, ge=1, description="Batches whose gradients make one step.")


@dataclass
class CommitteeSet(SyntheticSet):
    """A synthetic set whose soft-label students are trained as the paper says."""

    kind: ClassVar[str] = "stillhouse.methods.datasets.cv_dd:CommitteeSet"


@dataclass
class StretchedTraining(SoftTraining):
    """Soft training with a stretched cosine, accumulated gradients, and no decay of one-dimensional parameters."""

    stretch: float = 1.0
    accumulate: int = 2

    @classmethod
    def like(cls, given: SoftTraining, spec: StudentSpec) -> StretchedTraining:
        return cls(**vars(given), stretch=spec.stretch, accumulate=spec.accumulate)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._order(0)) // self.accumulate)

    def optimiser(self, network: nn.Module) -> torch.optim.Optimizer:
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for p in network.parameters():
            groups[p.ndim > 1].append(p)
        decayed = [{"params": groups[many], "weight_decay": self.weight_decay * many} for many in (True, False) if groups[many]]
        return torch.optim.AdamW(decayed, self.lr)

    def step(self, network: nn.Module, optimiser: torch.optim.Optimizer, i: int) -> Tensor:
        epoch, at = divmod(i, self.steps_per_epoch)
        for group in optimiser.param_groups:
            group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * epoch / (self.epochs * self.stretch)))
        batches = self._order(epoch)[at * self.accumulate : (at + 1) * self.accumulate]
        losses = [self._loss(network, rows, epoch, at * self.accumulate + n) for n, rows in enumerate(batches)]
        return torch.stack(losses).mean()

    def _loss(self, network: nn.Module, rows: Tensor, epoch: int, number: int) -> Tensor:
        assert self.synthetic.views is not None
        x, logits = self.synthetic.views.batch(self.images, rows, epoch, number)
        return soft_loss(network(x), logits.to(x.device).float(), "kl", self.temperature)


class CommitteeJudging(Judging):
    """Judging whose soft trainings are stretched ones."""

    def _networks(self, name: str, training: Any, *given: Any, **named: Any) -> list[float]:
        def stretched(seed: int) -> Any:
            plain = training(seed)
            return StretchedTraining.like(plain, self.config.student) if isinstance(plain, SoftTraining) else plain

        return super()._networks(name, stretched, *given, **named)


@evaluates(CommitteeSet.kind)
def judge(product: CommitteeSet, run: Run) -> dict[str, float]:
    """As of any synthetic set (`stillhouse.evaluation.synthetic_set`), with the paper's schedule for soft labels."""
    return CommitteeJudging(run, product).figures()

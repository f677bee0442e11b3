"""How networks learn from a committee's set (CV-DD, arXiv 2501.07575): a stretched cosine, accumulated gradients, no
decay of one-dimensional parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config.specs import Spec
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.run import Run
from stillhouse.synthetic.judging.evaluator import judge
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.training import SoftTraining


class StudentSpec(Spec):
    """How networks learn from the set, in addition to `evaluate`."""

    stretch: float = Field(
        1.0, ge=1, description="eta: the rate is .5 (1 + cos(pi e / (eta E))); 2 ends at half the rate."
    )
    accumulate: int = Field(2, ge=1, description="Batches whose gradients make one step.")


@dataclass
class CommitteeSet(SyntheticSet):
    """A synthetic set whose soft-label students are trained as in the paper."""

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
        return -(-len(self.order(0)) // self.accumulate)

    def groups(self, network: nn.Module) -> list[dict[str, Any]]:
        split = {many: [p for p in network.parameters() if (p.ndim > 1) == many] for many in (True, False)}
        return [{"params": found, "weight_decay": self.weight_decay * many} for many, found in split.items() if found]

    def rate(self, epoch: float) -> float:
        return super().rate(epoch / self.stretch)

    def step(self, network: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Tensor:
        """As of any training; the batches of a step go back one after another, so that memory holds one graph at a
        time."""
        epoch, at = divmod(i, self.steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = self.lr * self.rate(epoch)
        batches = self.order(epoch)[at * self.accumulate : (at + 1) * self.accumulate]
        total = torch.zeros((), device=self.images.device)
        optimizer.zero_grad()
        for n, rows in enumerate(batches):
            loss = self._of_batch(network, rows, epoch, at * self.accumulate + n) / len(batches)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        return total

    def _of_batch(self, network: nn.Module, rows: Tensor, epoch: int, number: int) -> Tensor:
        assert self.synthetic.views is not None
        x, logits = self.synthetic.views.batch(self.images, rows, epoch, number)
        return self.soft_loss(network(x), logits)


@evaluates(CommitteeSet.kind)
def judge_committee(product: CommitteeSet, run: Run) -> dict[str, float]:
    """As of any synthetic set (`stillhouse.synthetic.judging.evaluator`), with the paper's schedule for soft labels."""
    config: Any = run.config
    return judge(product, run, lambda plain: StretchedTraining.like(plain, config.student))

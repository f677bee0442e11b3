"""DBR, distance-based representation (NRR-DD, arXiv 2503.18267): two numbers a view in place of a soft label, and the student that learns from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.run import Run
from stillhouse.signals import evaluating
from stillhouse.synthetic.judging.evaluator import judge
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.relabel import ViewLabels, Views
from stillhouse.synthetic.training import SoftTraining

FARTHEST = 50.0  # distances beyond this are all alike


class DistanceSpec(Spec):
    """How a student learns from distances."""

    alpha: float = Field(1.0, ge=0, description="Weight of the distances; 0: hard labels of the mixed views alone.")
    temperature: float = Field(1.0, gt=0, description="Of teacher and student.")
    norm: Literal["l1", "squared"] = Field("l1", description="How distances are compared.")


@full_precision
def distances(logits: Tensor, own: Tensor, partner: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, 2): -log softmax(z / T) at the image's own class and at its partner's, at most 50; logits (B, C), classes (B,)."""
    log_probs = F.log_softmax(logits / temperature, -1)
    return -log_probs.gather(1, torch.stack([own, partner], 1)).clamp_min(-FARTHEST)


@full_precision
def distance_loss(student: Tensor, teacher: Tensor, mixed: Tensor, norm: str = "l1") -> Tensor:
    """mean_b |d_org - d^S_org| + |d_aug - d^S_aug|, or squares; distances (B, 2). A view that is not mixed (`mixed` (B,) False) counts its distance once."""
    gap = (student - teacher).abs() if norm == "l1" else (student - teacher).square()
    return (gap[:, 0] + gap[:, 1] * mixed).mean()


class DistanceLabels(ViewLabels):
    """Two distances (epochs, N, 2) of each view, in half precision, in `logits`."""

    def views(self, images: Tensor, rows: Tensor, epoch: int, number: int) -> tuple[Tensor, Tensor, float, Tensor]:
        """Views, the partners' rows, the share of own pixels, and stored distances (b, 2)."""
        at = epoch % self.made.epochs
        return *self.made.mixed(images, rows, at, number), self.logits[at, rows].float()


@torch.no_grad()
def labelled(teacher: nn.Module, images: Tensor, labels: Tensor, made: Views, temperature: float) -> DistanceLabels:
    """The teacher's distances for all views of images (N, C, H, W) with class ids (N,)."""
    found = DistanceLabels(made, torch.zeros(made.epochs, len(images), 2, dtype=torch.float16))
    with evaluating(teacher):
        for epoch, number, rows in _batches(found, len(images)):
            x, partners, _ = made.mixed(images, rows, epoch, number)
            said = distances(teacher(x), labels[rows].to(x.device), labels[partners].to(x.device), temperature)
            found.logits[epoch, rows] = said.half().cpu()
    return found


def _batches(labels: ViewLabels, count: int) -> Iterator[tuple[int, int, Tensor]]:
    for epoch in range(labels.made.epochs):
        for number, rows in enumerate(labels.order(count, epoch)):
            yield epoch, number, rows


@dataclass
class DistanceSet(SyntheticSet):
    """A synthetic set whose views are labelled by two distances each."""

    kind: ClassVar[str] = "stillhouse.methods.datasets.nrr_dd:DistanceSet"

    def check(self) -> None:
        views, self.views = self.views, None
        super().check()
        if views is not None and views.logits.shape[1:] != (len(self.images), 2):
            raise UserError(f"Distances of views must have the shape (epochs, {len(self.images)}, 2); given: {tuple(views.logits.shape)}.")
        self.views = None if views is None else DistanceLabels(views.made, views.logits)


@dataclass
class DistanceTraining(SoftTraining):
    """L = share CE(y_i) + (1 - share) CE(y_j) + alpha L_dbr, of views that are mixed of images i and j; the rest as soft training."""

    alpha: float = 1.0
    norm: str = "l1"
    at: float = 1.0  # the distances' temperature

    @classmethod
    def like(cls, given: SoftTraining, spec: DistanceSpec) -> DistanceTraining:
        return cls(**vars(given), alpha=spec.alpha, norm=spec.norm, at=spec.temperature)

    def loss(self, network: nn.Module, i: int) -> Tensor:
        epoch, number = divmod(i, self.steps_per_epoch)
        views, rows = self.synthetic.views, self.order(epoch)[number]
        assert isinstance(views, DistanceLabels)
        x, partners, share, stored = views.views(self.images, rows, epoch, number)
        own, partner = (self.synthetic.labels[r].to(x.device) for r in (rows, partners))
        logits = network(x).float()
        hard = share * F.cross_entropy(logits, own) + (1 - share) * F.cross_entropy(logits, partner)
        mixed = (partners != rows).to(x.device) & (share < 1)
        return hard + self.alpha * distance_loss(distances(logits, own, partner, self.at), stored.to(x.device), mixed, self.norm)


@evaluates(DistanceSet.kind)
def judge_distances(product: DistanceSet, run: Run) -> dict[str, float]:
    """As of any synthetic set (`stillhouse.synthetic.judging.evaluator`); with `evaluate.protocol: soft` students learn from the distances."""
    config: Any = run.config
    return judge(product, run, lambda plain: DistanceTraining.like(plain, config.distances))

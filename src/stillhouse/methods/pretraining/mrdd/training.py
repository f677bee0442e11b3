"""The two modules that MRDD trains: masked cross-view prediction for c, and one variational auto-encoder a view for s,
with little information on c."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse.config.specs import Spec, TrainSpec
from stillhouse.distillation.objective import Progress
from stillhouse.methods.pretraining.mrdd.losses import (
    Estimator,
    Reduction,
    check_mask,
    estimator_loss,
    kl_per_dimension,
    mask_image,
    sample_code,
    sampled_bound,
    variational_loss,
)
from stillhouse.methods.pretraining.mrdd.networks import ConsistencyEncoder, NetworkSpec, SpecificEncoder, decoder
from stillhouse.signals import Batch, evaluating
from stillhouse.training.module import TrainingModule

ACTIVE = 0.01
"""A dimension of a code is in use where its KL is above so many nats."""

Views = Callable[[Any], list[Tensor]]
"""A loader's input as V views in [0, 1], each (B, C, H, W)."""


def _train() -> TrainSpec:
    optimizer = {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 1e-4}
    return TrainSpec.model_validate({"epochs": 40, "batch_size": 128, "optimizer": optimizer})


class ConsistencySpec(Spec):
    """Stage 1: c."""

    dim: int = Field(10, ge=1, description="Of c, the code that the views share.")
    mask_ratio: float = Field(
        0.7, ge=0, lt=1, description="Share of each view's patches that the encoder does not see."
    )
    patch: int = Field(2, ge=1, description="Pixels a side of a patch.")
    alpha: float = Field(1.0, gt=0, description="Weight of the reconstruction.")
    kl: float = Field(0.1, ge=0, description="Weight of the KL, against a reconstruction in the scale of `reduction`.")
    train: TrainSpec = Field(default_factory=_train)


class SpecificSpec(Spec):
    """Stage 2: s, of one view."""

    dim: int = Field(10, ge=1, description="Of s, the code of one view.")
    kl: float = Field(0.05, ge=0, description="Weight of the KL.")
    lam: float = Field(
        0.1, ge=0, description="Weight of the upper bound of I(c; s); 0: an auto-encoder that is given c."
    )
    width: int = Field(100, ge=2, description="Of the estimator q(c | s).")
    estimator_steps: int = Field(3, ge=1, description="Steps of the estimator a step of the encoder.")
    estimator_lr: float = Field(1e-3, gt=0, description="Learning rate of the estimator's AdamW.")
    clamp: bool = Field(True, description="Take max(bound, 0).")
    loss: Literal["alternating", "released"] = Field(
        "alternating",
        description="alternating: as in the paper; released: as its code does, the estimator's likelihood alone, into "
        "the encoder too.",
    )
    train: TrainSpec = Field(default_factory=_train)


class ConsistencyTraining(TrainingModule):
    """Stage 1: every view is masked, one encoder reads all of them, and each decoder rebuilds its whole view from c
    alone."""

    student: ConsistencyEncoder

    def __init__(
        self,
        spec: ConsistencySpec,
        network: NetworkSpec,
        views: Views,
        count: int,
        shape: Sequence[int],
        reduction: Reduction,
    ) -> None:
        super().__init__()
        self.patches = check_mask(shape, spec.patch, spec.mask_ratio)
        self.spec, self.views, self.reduction = spec, views, reduction
        self.student = ConsistencyEncoder(network, count, shape, spec.dim)
        self.decoders = nn.ModuleList([decoder(network, spec.dim, shape) for _ in range(count)])

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters())}]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        views = self.views(batch["input"])
        masked = [
            mask_image(x, torch.rand(len(x), self.patches, device=x.device), self.spec.patch, self.spec.mask_ratio)[0]
            for x in views
        ]
        mean, log_variance = self.student(masked)
        z = sample_code(mean, log_variance, torch.randn_like(mean))
        terms = variational_loss(
            views, [d(z) for d in self.decoders], mean, log_variance, self.spec.alpha, self.spec.kl, self.reduction
        )
        return {
            "loss": terms["reconstruction"] + terms["kl"],
            **terms,
            "active": (kl_per_dimension(mean, log_variance) > ACTIVE).sum().float(),
        }

    @torch.no_grad()
    def standardise(self, codes: Tensor) -> None:
        """Make the encoder give codes of mean 0 and deviation 1, as measured on codes (N, dim); a dimension that is
        constant is only centred."""
        spread = codes.std(0, unbiased=False)
        self.student.center.copy_(codes.mean(0))
        self.student.spread.copy_(torch.where(spread > 1e-6, spread, torch.ones_like(spread)))


class SpecificTraining(TrainingModule):
    """Stage 2 for one view: an auto-encoder whose decoder is given [s, c], and an estimator of c from s whose bound it
    lowers.

    The encoder that gives c is frozen, in evaluation mode and outside the module tree. The estimator's steps follow
    each step of the encoder, with s drawn again from the same forward.
    """

    student: SpecificEncoder

    def __init__(
        self,
        spec: SpecificSpec,
        network: NetworkSpec,
        views: Views,
        view: int,
        shape: Sequence[int],
        consistent: ConsistencyEncoder,
        dim: int,
        reduction: Reduction,
    ) -> None:
        super().__init__()
        self.spec, self.views, self.view, self.reduction = spec, views, view, reduction
        self._frozen = (consistent.eval().requires_grad_(False),)
        self.student = SpecificEncoder(network, shape, spec.dim)
        self.decoder = decoder(network, spec.dim + dim, shape)
        self.estimator = Estimator(spec.dim, dim, spec.width)
        self._optimizer = torch.optim.AdamW(
            self.estimator.parameters(), lr=spec.estimator_lr, betas=(0.9, 0.95), weight_decay=1e-4
        )
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def param_groups(self) -> list[dict[str, Any]]:
        trained = [self.student, self.estimator if self.spec.loss == "released" else self.decoder]
        return [{"params": [p for module in trained for p in module.parameters()]}]

    def consistent(self, views: Sequence[Tensor]) -> Tensor:
        """c of unmasked views, without gradient."""
        with torch.no_grad():
            return self._frozen[0].to(views[0].device).code(views)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        views = self.views(batch["input"])
        x, c = views[self.view], self.consistent(views)
        mean, log_variance = self.student(x)
        s = sample_code(mean, log_variance, torch.randn_like(mean))
        if self.spec.loss == "released":
            guess, doubt = self.estimator(s)
            return {"loss": estimator_loss(guess, doubt, c)}
        terms = variational_loss(
            [x],
            [self.decoder(torch.cat([s, c], -1))],
            mean,
            log_variance,
            kl_weight=self.spec.kl,
            reduction=self.reduction,
        )
        guess, doubt = functional_call(
            self.estimator, {k: v.detach() for k, v in self.estimator.named_parameters()}, (s,)
        )
        bound = sampled_bound(guess, doubt, c, torch.randperm(len(c), device=c.device))
        terms["bound"] = self.spec.lam * (bound.clamp_min(0) if self.spec.clamp else bound)
        self._last = (mean.detach().float(), log_variance.detach().float(), c)
        return {
            "loss": torch.stack(list(terms.values())).sum(),
            **terms,
            "active": (kl_per_dimension(mean, log_variance) > ACTIVE).sum().float(),
        }

    def after_step(self, batch: Batch, progress: Progress, stepped: bool) -> None:
        if self._last is None:
            return
        mean, log_variance, c = self._last
        for _ in range(self.spec.estimator_steps):
            guess, doubt = self.estimator(sample_code(mean, log_variance, torch.randn_like(mean)))
            loss = estimator_loss(guess, doubt, c)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
        self._last = None

    def get_extra_state(self) -> dict[str, Any]:
        return {"estimator": self._optimizer.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state["estimator"])

    def error(self, batches: Any, device: torch.device) -> float:
        """The squared error of the rebuilt view, summed over its pixels, mean over the samples, with s and c at their
        means."""
        total, seen = torch.zeros((), dtype=torch.float64, device=device), 0
        with evaluating(self):
            for batch in batches:
                views = [v.to(device) for v in self.views(batch["input"])]
                rebuilt = self.decoder(torch.cat([self.student(views[self.view])[0], self.consistent(views)], -1))
                total += (rebuilt - views[self.view]).double().square().sum()
                seen += len(rebuilt)
        return float(total / seen)

"""Matching one pair: the masked solve, the losses that train a network on the pair, and the point map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config.specs import Spec
from stillhouse.functional.functional_maps import laplacian_mask, point_map, resolvent_mask, solved_map, zoomed_out
from stillhouse.functional.score_masks import Denoise, distilled_mask, guidance, score_distillation_loss
from stillhouse.methods.correspondence.diffumatch.network import DiffusionNet
from stillhouse.methods.correspondence.diffumatch.shapes import Shape

MaskKind = Literal["diffusion", "laplacian", "resolvent", "none"]


class NetworkSpec(Spec):
    """The network of features, a DiffusionNet."""

    width: int = Field(48, ge=1)
    depth: int = Field(2, ge=1, description="Blocks.")
    outputs: int = Field(64, ge=1, description="Features of a vertex; at least `size`.")
    dropout: float = Field(0.5, ge=0, lt=1)


class MatchSpec(Spec):
    """How a pair is matched."""

    features: Literal["network", "waves", "waves_places"] = Field(
        "network", description="Learned on the pair; or not learned: wave kernel descriptors, and places beside them."
    )
    network: NetworkSpec = Field(default_factory=NetworkSpec)
    mask: MaskKind = Field("diffusion", description="What holds entries of the map back.")
    weight: float = Field(0.1, ge=0, description="Of the mask in the solve (lambda).")
    relative: bool = Field(
        True, description="The mask over its largest entry, its weight in shares of the mean diagonal of A A^T."
    )
    sigma: float = Field(1.0, gt=0, description="Noise level of the distilled mask.")
    draws: int = Field(200, ge=1, description="Draws of noise for a mask.")
    normalise: bool = Field(False, description="Limit the distilled mask by its median.")
    ridge: float = Field(1e-6, ge=0, description="Added to the diagonal of A A^T, in shares of its mean.")
    steps: int = Field(100, ge=0, description="Optimiser steps on the pair; 0: a random network and the mask alone.")
    lr: float = Field(1e-3, gt=0, description="Of Adam (betas 0.9 and 0.99).")
    proper: float = Field(
        1.0, ge=0, description="Weight of the distance to the map that ZoomOut makes of the masked one."
    )
    score: float = Field(1.0, ge=0, description="Weight of score distillation.")
    form: Literal["intended", "released"] = Field(
        "intended", description="Of score distillation, as the card has them."
    )
    score_batch: int = Field(32, ge=1, description="Noise levels of a step, between 0.01 and 1.01.")
    orthogonal: float = Field(0.0, ge=0, description="Weight of mean (C C^T - I)^2.")
    bijective: float = Field(0.0, ge=0, description="Weight of mean (C12 C21 - I)^2.")
    commuting: float = Field(
        0.0, ge=0, description="Weight of the mean of |C L1 - L2 C|^2, eigenvalues over the largest."
    )
    zoom: int = Field(10, ge=0, description="By how much ZoomOut lets the map grow in the loss.")
    zoom_step: int = Field(5, ge=1, description="Growth a turn, in the loss and of the result.")
    few: int | None = Field(1000, ge=10, description="Points of a shape that ZoomOut sees in the loss; null: all.")
    refined: int = Field(128, ge=1, description="Size to which ZoomOut takes the result.")


@dataclass
class Solved:
    """Maps of one direction: without a mask, with it, and the mask (None: none)."""

    raw: Tensor
    masked: Tensor
    mask: Tensor | None


def mask_of(spec: MatchSpec, raw: Tensor, one: Shape, two: Shape, denoise: Denoise) -> Tensor | None:
    """(k, k) float64, constant, over its largest entry where `relative`; a distilled one draws from torch's
    generator."""
    k = len(raw)
    evals1, evals2 = one.evals[:k].double(), two.evals[:k].double()
    if spec.mask == "none":
        return None
    if spec.mask == "laplacian":
        mask = laplacian_mask(evals1, evals2)
    elif spec.mask == "resolvent":
        mask = resolvent_mask(evals1, evals2)
    else:
        noise = torch.randn(spec.draws, k, k, device=raw.device)
        mask = distilled_mask(raw.detach().float(), denoise, noise, spec.sigma, spec.normalise).double()
    return mask / mask.max() if spec.relative else mask


def solved(spec: MatchSpec, a: Tensor, b: Tensor, one: Shape, two: Shape, denoise: Denoise) -> Solved:
    """The maps from coefficients a to b, (k, d) each; solved in float64, returned in float32."""
    first, second = a.double(), b.double()
    raw = solved_map(first, second, ridge=spec.ridge)
    mask = mask_of(spec, raw, one, two, denoise)
    if mask is None:
        return Solved(raw.float(), raw.float(), None)
    weight = first.detach().square().sum() / len(a) if spec.relative else torch.ones_like(first[0, 0])
    masked = solved_map(first, second, mask * weight, spec.weight, spec.ridge)
    return Solved(raw.float(), masked.float(), mask)


def proper_map(spec: MatchSpec, functional: Tensor, one: Shape, two: Shape) -> Tensor:
    """The map (k, k), constant, that ZoomOut makes of one: of a point map, so that it is one of shapes."""
    k = len(functional)
    size = min(k + spec.zoom, one.basis.shape[1])
    if spec.few is None:
        found, _ = zoomed_out(functional.detach(), one.basis, two.basis, two.mass, size, spec.zoom_step)
    else:
        found, _ = zoomed_out(functional.detach(), one.basis[one.few], two.basis[two.few], None, size, spec.zoom_step)
    return found[:k, :k]


def mask_contrast(mask: Tensor) -> Tensor:
    """() the mean of a mask far from the diagonal over that near it: |i - j| > 0.4 k, and <= 2."""
    places = torch.arange(len(mask), device=mask.device)
    apart = (places[:, None] - places).abs()
    far, near = apart > 0.4 * len(mask), apart <= 2
    return ((mask * far).sum() / far.sum()) / ((mask * near).sum() / near.sum()).clamp_min(1e-12)


class PairFit:
    """A network of features that learns on one pair.

    Args:
        one, two: the shapes; the point map takes vertices of the second to the first.
        size: k.
        denoise: the prior.
    """

    def __init__(self, one: Shape, two: Shape, spec: MatchSpec, size: int, denoise: Denoise) -> None:
        self.one, self.two, self.spec, self.size, self.denoise = one, two, spec, size, denoise
        self.network: nn.Module = nn.Identity()
        if spec.features == "network":
            n = spec.network
            self.network = DiffusionNet(n.width, n.outputs, n.depth, one.basis.shape[1], n.dropout)
        self.network.to(one.basis.device)
        weights = list(self.network.parameters()) or [nn.Parameter(torch.zeros(1))]  # an optimiser needs one
        self.optimizer = torch.optim.Adam(weights, lr=spec.lr, betas=(0.9, 0.99))

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """(k, d) of the features of both shapes."""
        made = []
        for shape in (self.one, self.two):
            found = (
                self.network(shape)
                if self.spec.features == "network"
                else shape.waves(self.spec.features == "waves_places")
            )
            made.append(shape.coefficients(found, self.size))
        return made[0], made[1]

    def losses(self) -> dict[str, Tensor]:
        """The weighted terms of a step, and what is only logged; draws from torch's generator."""
        spec, (a, b) = self.spec, self.coefficients()
        pairs = ((a, b, self.one, self.two), (b, a, self.two, self.one))
        both = [solved(spec, *pair, self.denoise) for pair in pairs]
        terms: dict[str, Tensor] = {}
        if spec.proper:
            found = [proper_map(spec, s.masked, p[2], p[3]) for s, p in zip(both, pairs)]
            terms["proper"] = spec.proper * sum_of([(s.raw - c).square().mean() for s, c in zip(both, found)])
        if spec.score:
            terms["score"] = spec.score * sum_of([self._score(s.raw) for s in both])
        eye = torch.eye(self.size, device=a.device)
        if spec.orthogonal:
            terms["orthogonal"] = spec.orthogonal * sum_of([(s.raw @ s.raw.T - eye).square().mean() for s in both])
        if spec.bijective:
            turns = (both[0].raw @ both[1].raw, both[1].raw @ both[0].raw)
            terms["bijective"] = spec.bijective * sum_of([(t - eye).square().mean() for t in turns])
        if spec.commuting:
            terms["commuting"] = spec.commuting * sum_of([_commuting(s.raw, p[2], p[3]) for s, p in zip(both, pairs)])
        mask = both[0].mask
        if mask is not None:
            terms["log:mask_contrast"] = mask_contrast(mask).float()
        return terms

    def _score(self, raw: Tensor) -> Tensor:
        uniform = torch.rand(self.spec.score_batch, device=raw.device)
        direction = guidance(raw.detach(), self.denoise, uniform, torch.randn_like(raw))
        return score_distillation_loss(raw, direction, self.spec.form)

    def step(self, i: int) -> dict[str, Tensor]:
        """One optimiser step; its terms."""
        self.network.train()
        terms = self.losses()
        loss = sum_of([v for k, v in terms.items() if not k.startswith("log:")])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach(), **{k.removeprefix("log:"): v.detach() for k, v in terms.items()}}

    @torch.no_grad()
    def result(self) -> Solved:
        """The maps as they are now, without dropout."""
        self.network.eval()
        return solved(self.spec, *self.coefficients(), self.one, self.two, self.denoise)

    @property
    def learns(self) -> bool:
        """Whether there is anything to fit."""
        return self.spec.features == "network" and self.spec.steps > 0 and bool(self.weights)

    @property
    def weights(self) -> float:
        """The sum of the weights of all terms."""
        s = self.spec
        return s.proper + s.score + s.orthogonal + s.bijective + s.commuting


def _commuting(raw: Tensor, one: Shape, two: Shape) -> Tensor:
    k = len(raw)
    largest = torch.maximum(one.evals[k - 1], two.evals[k - 1])
    return (raw * (one.evals[:k] / largest) - (two.evals[:k] / largest)[:, None] * raw).square().mean()


def sum_of(terms: list[Tensor]) -> Tensor:
    """() their sum."""
    return torch.stack(terms).sum()


@torch.no_grad()
def refined(spec: MatchSpec, functional: Tensor, one: Shape, two: Shape) -> tuple[Tensor, Tensor]:
    """A map after ZoomOut to `refined`, and the point map (V2,) of all vertices."""
    size = max(min(spec.refined, one.basis.shape[1], two.basis.shape[1]), len(functional))
    if spec.few is None:
        return zoomed_out(functional, one.basis, two.basis, two.mass, size, spec.zoom_step)
    # on few points for as long as these tell the eigenvectors apart, then on all
    middle = max(min(size, spec.few // 10), len(functional))
    functional, _ = zoomed_out(functional, one.basis[one.few], two.basis[two.few], None, middle, spec.zoom_step)
    return zoomed_out(functional, one.basis, two.basis, two.mass, size, spec.zoom_step)


@torch.no_grad()
def direct(functional: Tensor, one: Shape, two: Shape) -> Tensor:
    """The point map (V2,) of a map as it is."""
    return point_map(functional, one.basis, two.basis)

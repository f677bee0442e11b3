"""Where the features of a study come from: lists of numbers, or the principal components of real images and noisy
nuisance coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.errors import UserError
from stillhouse.methods.pretraining.jepa_bias.linear import static_features, temporal_features
from stillhouse.randomness import generator

if TYPE_CHECKING:
    from stillhouse.runs.run import Run

_NEEDS = {"covariance": ("lam", "rho"), "static": ("variance", "noise"), "temporal": ("variance", "gamma")}


class FeatureSpec(Spec):
    """Features by numbers, one a list entry."""

    model: Literal["covariance", "static", "temporal"] = Field(
        "covariance",
        description="covariance: lam and rho; static: x = z + n, y = z + n'; temporal: x, y neighbours of a "
        "mean-reverting sequence.",
    )
    lam: list[float] | None = Field(None, description="covariance: E[x y] of each feature.")
    rho: list[float] | None = Field(None, description="covariance: regression coefficient of y on x.")
    variance: list[float] | None = Field(None, description="static: of z; temporal: of the sequence.")
    noise: list[float] | None = Field(None, description="static: variance of n and of n'.")
    gamma: list[float] | None = Field(
        None, description="temporal: correlation of neighbours; slow features are near 1."
    )

    @model_validator(mode="after")
    def _fits(self) -> FeatureSpec:
        first, second = _NEEDS[self.model]
        a, b = getattr(self, first), getattr(self, second)
        given = {n for pair in _NEEDS.values() for n in pair if getattr(self, n) is not None}
        if given != {first, second} or len(a) != len(b) or not a:
            raise ValueError(
                f"model: {self.model} takes `{first}` and `{second}` and no other list, of one length above 0"
            )
        return self

    def numbers(self) -> tuple[Tensor, Tensor]:
        """lam and rho, (d,) float64."""
        a, b = (torch.tensor(getattr(self, n), dtype=torch.float64) for n in _NEEDS[self.model])
        return {
            "covariance": lambda: (a, b),
            "static": lambda: static_features(a, b),
            "temporal": lambda: temporal_features(a, b),
        }[self.model]()


class ContentSpec(Spec):
    """Features of the recipe's images under the static model, and nuisance coordinates."""

    components: int = Field(30, ge=1, description="Principal components that are kept.")
    top: float = Field(0.8, gt=0, description="Variance of the first one, after scaling all alike.")
    noise: float = Field(0.05, ge=0, description="Variance of the noise of each component, independent in x and y.")
    nuisance: int = Field(8, ge=0, description="Further coordinates, which are independent of the class.")
    nuisance_lam: float = Field(
        1.0, gt=0, description="Variance of the part of a nuisance coordinate that x and y share."
    )
    nuisance_noise: float = Field(4.0, ge=0, description="Variance of its noise; rho is lam / (lam + noise).")


@dataclass
class Pairs:
    """Images as coordinates, from which pairs are drawn.

    Attributes:
        clean, labels: by split: (n, components) and (n,).
        spec: how noise and nuisance are added.
    """

    clean: dict[str, Tensor]
    labels: dict[str, Tensor]
    spec: ContentSpec

    def numbers(self) -> tuple[Tensor, Tensor]:
        """lam and rho of the components (as measured on training data) and of the nuisance coordinates, (d,)
        float64."""
        content = self.clean["train"].var(0, unbiased=False)
        variance = torch.cat([content, torch.full((self.spec.nuisance,), self.spec.nuisance_lam, dtype=torch.float64)])
        return static_features(variance, self._noise())

    def _noise(self) -> Tensor:
        s = self.spec
        return torch.tensor([s.noise] * s.components + [s.nuisance_noise] * s.nuisance, dtype=torch.float64)

    def draw(self, split: str, rows: Tensor, *keys: int | str) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and the clean part z, (n, d) each, of samples of a split; noise and nuisance are functions of the
        keys."""
        g, n = generator("pairs", *keys), len(rows)
        shared = torch.randn(n, self.spec.nuisance, generator=g, dtype=torch.float64) * self.spec.nuisance_lam**0.5
        z = torch.cat([self.clean[split][rows], shared], -1)
        x, y = (z + torch.randn(z.shape, generator=g, dtype=torch.float64) * self._noise().sqrt() for _ in range(2))
        return x, y, z


def pairs_of(run: Run, data: DataSpec, spec: ContentSpec) -> Pairs:
    """The images of a data set in their principal components, found on training data.

    Raises `UserError` for more components than there are.
    """
    loaded = {s: list(run.loader(data, s)) for s in ("train", "test")}
    flat = {s: torch.cat([b["input"].double().flatten(1) for b in batches]) for s, batches in loaded.items()}
    center = flat["train"].mean(0)
    most = min(flat["train"].shape)
    if spec.components > most:
        raise UserError(
            f"content.components is {spec.components}, but {len(flat['train'])} images of {flat['train'].shape[1]} "
            f"pixels give {most}."
        )
    _, values, axes = torch.linalg.svd(flat["train"] - center, full_matrices=False)
    axes = axes * torch.sign(
        axes.gather(1, axes.abs().argmax(1, keepdim=True))
    )  # a component's sign is arbitrary: fix it
    scale = (spec.top / (values[0].square() / len(flat["train"]))).sqrt()
    if not values[spec.components - 1] > 1e-9 * values[0]:
        raise UserError(f"content.components is {spec.components}, but the images vary in fewer directions; lower it.")
    clean = {s: (v - center) @ axes[: spec.components].T * scale for s, v in flat.items()}
    return Pairs(clean, {s: torch.cat([b["label"] for b in batches]) for s, batches in loaded.items()}, spec)

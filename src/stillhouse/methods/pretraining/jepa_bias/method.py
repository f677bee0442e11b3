"""JEPA bias: which features a deep linear JEPA learns first and how strongly, against a masked auto-encoder, in theory
and in simulation.

paper: How JEPA Avoids Noisy Features: The Implicit Bias of Deep Linear Self Distillation Networks
venue: NeurIPS 2024
arxiv: 2407.03475
task: theory of self-distillation
family: self-distillation
use when: before training anything large, you want to know which directions of the data a latent prediction learns, and
in which order
needs: pairs (x, y) of one dimension, or the features' covariances lam and regression coefficients rho; no labels, no
teacher

JEPA predicts its own encoding of y (detached, without an average) from that of x, MAE predicts y. From a balanced start
aligned with the common eigenbasis all features evolve by themselves: `theory.py` has their curves, ends and critical
times (JEPA in closed form; MAE too but for one smooth quadrature), `linear.py` the networks, whose flow is integrated
with adaptive steps, or by plain gradient descent (`integrator: descent`). Times are of the layer scale w reaching
`share` of its end; the encoder's gain is w^L. With `features` the study is of numbers, with `data` of images in their
principal components with noise added, and noisy nuisance coordinates (the moments are then exact, the noise being
known). `nonlinear` adds a ReLU encoder under Adam, a demonstration outside the theory. The claim is conditional: at
equal lam JEPA of two or more layers learns the larger rho first; at unequal lam the order may not change, and the
relative gap vanishes with the layer scale. Only a start that is aligned is exact, and for JEPA it
is not stable: where a feature was learned before one of larger rho, rounding errors grow until the latter takes over
its place, long before its own critical time, and the former has to be learned again (seen in the recipe's `paper`;
`jepa_time_error` measures it). The ReLU networks have no biases and JEPA's predictor starts at a small multiple of the
identity [choices], without which its encodings run to a constant.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.config.specs import Data, MethodConfig, Spec
from stillhouse.errors import UserError
from stillhouse.methods.pretraining.jepa_bias import theory
from stillhouse.methods.pretraining.jepa_bias.linear import (
    Moments,
    Weights,
    balanced_start,
    descend,
    encoder,
    flow,
    gains,
    gradients,
    leakage,
    orthogonal,
)
from stillhouse.methods.pretraining.jepa_bias.nonlinear import NonlinearSpec, Trainer, knn
from stillhouse.methods.pretraining.jepa_bias.plots import write_dynamics
from stillhouse.methods.pretraining.jepa_bias.sources import ContentSpec, FeatureSpec, Pairs, pairs_of
from stillhouse.methods.pretraining.jepa_bias.study import DynamicsStudy
from stillhouse.methods.pretraining.jepa_bias.theory import (
    KINDS,
    Kind,
    critical_time,
    encoder_gain,
    fixed_point,
    trajectory,
)
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.run import Run

Array = np.ndarray[Any, np.dtype[np.float64]]


class IntegratorSpec(Spec):
    """How the matrices' gradient flow is followed."""

    name: Literal["adaptive", "descent"] = Field(
        "adaptive", description="adaptive: orders 3 and 2 with error control; descent: equal Euler steps."
    )
    tolerance: float = Field(1e-6, gt=0, description="adaptive: relative error of a step.")
    step: float = Field(5e-3, gt=0, description="descent: the step; adaptive: the first one that is tried.")
    budget: int = Field(200_000, ge=1, description="Refuse a simulation that needs more steps than this.")


class Config(MethodConfig):
    features: FeatureSpec | None = Field(None, description="A study of numbers.")
    data: Data | None = Field(None, description="Or of images.")
    content: ContentSpec = Field(default_factory=ContentSpec, description="data: how the images become features.")
    depth: int = Field(2, ge=1, le=12, description="L, layers of the encoder; the predictor is one more.")
    scale: float = Field(0.05, gt=0, description="w(0), of every layer.")
    share: float = Field(
        0.5, gt=0, lt=1, description="p: a feature counts as learned when its layer scale reaches p of its end."
    )
    simulate: Literal["matrices", "modes"] = Field(
        "matrices", description="matrices: train the networks; modes: the closed form alone."
    )
    integrator: IntegratorSpec = Field(default_factory=IntegratorSpec)
    settled: float = Field(
        0.995,
        gt=0,
        lt=1,
        description="The study ends when every feature's layer scale has reached this share of its end.",
    )
    points: int = Field(150, ge=10, description="Times at which gains are recorded, spaced evenly in their logarithm.")
    neighbours: int = Field(5, ge=1, description="data: of the nearest-neighbour classifier on the encodings.")
    nonlinear: NonlinearSpec | None = Field(None, description="data: also train a ReLU network.")

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if (self.features is None) == (self.data is None):
            raise ValueError("give exactly one of features and data")
        if self.nonlinear is not None and self.data is None:
            raise ValueError("nonlinear needs data")
        return self


@evaluates(DynamicsStudy.kind)
def judge(product: DynamicsStudy, run: Run) -> dict[str, float]:
    """By kind: how far simulation and closed form are apart, how near the end the encoder is; with data, the share of
    the encoding's energy that is nuisance, the accuracy of nearest neighbours in it, and the critical time of nuisance
    over that of the first component."""
    config: Config = run.config  # type: ignore[assignment]
    out: dict[str, float] = {}
    ranks = {k: {i: place for place, i in enumerate(product.order(k))} for k in KINDS}
    both = [i for i in ranks["jepa"] if i in ranks["mae"]]
    pairs = [(i, j) for i in both for j in both if i < j]
    swapped = [(ranks["jepa"][i] < ranks["jepa"][j]) != (ranks["mae"][i] < ranks["mae"][j]) for i, j in pairs]
    out["order_swaps"] = float(np.mean(swapped)) if pairs else 0.0
    for k in KINDS:
        grows = product.ends[k] > 0
        if k in product.simulated:
            out[f"{k}_time_error"] = product.time_error(k)
            out[f"{k}_end_error"] = float(np.max(np.abs(product.simulated[k][-1][grows] / product.ends[k][grows] - 1)))
    if config.data is None:
        return out
    samples = pairs_of(run, config.data, config.content)
    (x, _, _), (x_test, _, _) = (
        samples.draw(s, torch.arange(len(samples.clean[s])), "judge", s, config.seed) for s in ("train", "test")
    )
    labels, labels_test = samples.labels["train"].numpy(), samples.labels["test"].numpy()
    nuisance = np.arange(len(product.lam)) >= config.content.components
    energy = product.lam / product.rho
    out["raw_knn"] = knn(x.numpy(), labels, x_test.numpy(), labels_test, config.neighbours)
    for k in KINDS:
        a = product.encoders[k]
        gained = energy * np.linalg.norm(a, axis=0) ** 2
        out[f"{k}_nuisance_share"] = float(gained[nuisance].sum() / gained.sum())
        out[f"{k}_knn"] = knn(x.numpy() @ a.T, labels, x_test.numpy() @ a.T, labels_test, config.neighbours)
        if nuisance.any():
            out[f"{k}_time_ratio"] = float(product.times[k][nuisance][0] / product.times[k][0])
    for probed, curves in product.probes.items():
        out |= {f"{probed}_relu_{name}": values[-1] for name, values in curves.items() if name != "step"}
    return out


class Simulation:
    """The weights of one learner on their way through the recorded times; what `run.loop` keeps."""

    def __init__(self, moments: Moments, basis: Tensor, grid: Array, config: Config, kind: Kind) -> None:
        self.moments, self.basis, self.grid, self.spec, self.kind = moments, basis, grid, config.integrator, kind
        self.weights: Weights = balanced_start(basis, config.depth, config.scale, kind, config.seed)
        self.next_step = config.integrator.step
        self.gains: list[list[float]] = [gains(self.weights, basis).tolist()]

    def step(self, i: int) -> dict[str, Tensor]:
        """From the i-th recorded time to the next."""

        def derivative(weights: Weights) -> Weights:
            return gradients(weights, self.moments, self.kind)

        span, taken = (
            float(self.grid[i + 1] - self.grid[i]),
            float(-(-(self.grid[i + 1] - self.grid[i]) // self.spec.step)),
        )
        if self.spec.name == "descent":
            self.weights = descend(self.weights, derivative, span, self.spec.step)
        else:
            self.weights, self.next_step, taken = flow(
                self.weights, derivative, span, self.spec.tolerance, self.next_step
            )
        found = gains(self.weights, self.basis)
        self.gains.append(found.tolist())
        return {"smallest_gain": found.min(), "largest_gain": found.max(), "steps": torch.tensor(float(taken))}

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "step": self.next_step, "gains": self.gains}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights, self.next_step, self.gains = state["weights"], state["step"], [list(g) for g in state["gains"]]


class LinearDynamics(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        samples = self._pairs(config, run)
        lam, rho = self._features(config, samples)
        stages = []
        for kind in KINDS:
            grid, steps = self._grid(config, lam, rho, kind)
            if config.simulate == "matrices":
                does = (
                    f"follow {kind} with {config.depth} layers on {len(lam)} features to time {grid[-1]:.4g}, about "
                    f"{steps:,.0f} steps"
                )
                stages.append(Stage(kind, does, steps=len(grid) - 1))
            else:
                stages.append(
                    Stage(kind, f"the closed form of {kind} with {config.depth} layers on {len(lam)} features")
                )
        if config.nonlinear is not None:
            does = (
                f"train and probe a ReLU network of {config.nonlinear.layers} x {config.nonlinear.hidden} units both "
                "ways"
            )
            stages.append(Stage("nonlinear", does, steps=2 * config.nonlinear.steps))
        return stages

    def run(self, config: Config, run: Run) -> DynamicsStudy:
        samples = self._pairs(config, run)
        lam, rho = self._features(config, samples)
        names = [f"feature {i}" for i in range(len(lam))]
        if samples is not None:
            c = config.content
            names = [f"component {i}" for i in range(c.components)] + [f"nuisance {i}" for i in range(c.nuisance)]
        study = DynamicsStudy(names, lam, rho, config.depth, config.scale, config.share, {}, {}, {}, {}, {}, {})
        basis = (
            orthogonal(len(lam), "basis", config.seed) if samples is None else torch.eye(len(lam), dtype=torch.float64)
        )
        for kind in KINDS:
            grid, _ = self._grid(config, lam, rho, kind)
            study.times[kind] = critical_time(lam, rho, config.depth, config.scale, kind, config.share)
            study.ends[kind] = np.where(theory.learned(lam, rho), encoder_gain(rho, config.depth, kind), 0.0)
            study.grid[kind] = grid
            study.predicted[kind] = np.nan_to_num(
                trajectory(grid, lam, rho, config.depth, config.scale, kind) ** config.depth
            )
            study.encoders[kind] = study.ends[kind][:, None] * basis.numpy().T
            if config.simulate == "matrices":
                moments = Moments.of_features(torch.from_numpy(lam), torch.from_numpy(rho), basis)
                simulation = Simulation(moments, basis, grid, config, kind)
                seconds = run.loop(kind, {"simulation": simulation}, simulation.step, len(grid) - 1, log_every=10)
                study.simulated[kind] = np.array(simulation.gains)
                study.encoders[kind] = encoder(simulation.weights).numpy()
                study.figures |= {f"{kind}_seconds": seconds, f"{kind}_leakage": leakage(simulation.weights, basis)}
        if config.nonlinear is not None:
            assert samples is not None
            for kind in KINDS:
                trainer = Trainer(samples, config.nonlinear, kind, config.seed, config.neighbours)
                state = {"model": trainer.model, "optimizer": trainer.optimizer, "trainer": trainer}
                run.loop(f"nonlinear.{kind}", state, trainer.step, config.nonlinear.steps)
                study.probes[kind] = trainer.curves
        write_dynamics(run.folder, study, config.name or "jepa_bias")
        return study

    @staticmethod
    def _pairs(config: Config, run: Run) -> Pairs | None:
        return None if config.data is None else pairs_of(run, config.data, config.content)

    @staticmethod
    def _features(config: Config, samples: Pairs | None) -> tuple[Array, Array]:
        """lam and rho, (d,). Raises `UserError` for a feature without variance."""
        source = config.features or samples
        assert source is not None  # as Config's validator has it
        lam, rho = source.numbers()
        Moments.of_features(lam, rho)
        return lam.numpy(), rho.numpy()

    @staticmethod
    def _grid(config: Config, lam: Array, rho: Array, kind: Kind) -> tuple[Array, float]:
        """The recorded times, from 0 until all that is learned has settled, and about how many steps a simulation
        takes.

        Raises:
            UserError: nothing is learned, or a simulation beyond the budget.
        """
        grows = theory.learned(lam, rho)
        if not grows.any():
            raise UserError("jepa_bias: no feature has lam above 0 and rho above 0, so none is ever learned.")
        first = float(critical_time(lam[grows], rho[grows], config.depth, config.scale, kind, config.share).min())
        last = float(critical_time(lam[grows], rho[grows], config.depth, config.scale, kind, config.settled).max())
        end = fixed_point(rho[grows], config.depth, kind)
        layers = 1 if kind == "jepa" else config.depth + 1
        rate = float(
            (lam[grows] / rho[grows] * layers * end ** (2 * config.depth)).max()
        )  # the flow's fastest rate, at its end
        steps = (
            last / config.integrator.step
            if config.integrator.name == "descent"
            else last * rate / 2 + 5 * config.points
        )
        if config.simulate == "matrices" and not steps <= config.integrator.budget:
            raise UserError(
                f"jepa_bias: {kind} with {config.depth} layers from scale {config.scale:g} settles at time "
                f"{last:.4g}, "
                f"which takes about {steps:.3g} "
                f"steps, beyond integrator.budget {config.integrator.budget}; raise scale, lower depth, or take "
                "simulate: modes."
            )
        if (
            config.integrator.name == "descent"
            and config.integrator.step * rate > 0.5
            and config.simulate == "matrices"
        ):
            raise UserError(
                f"jepa_bias: integrator.step {config.integrator.step:g} is too long for a rate of {rate:.3g}; take "
                f"{0.1 / rate:.2g} or less."
            )
        return np.concatenate([[0.0], np.geomspace(first / 20, last, config.points - 1)]), math.ceil(steps)

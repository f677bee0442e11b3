"""Kernel self-distillation: a model is refitted to its own predictions and to the labels, with the best weight between
the two at every step.

paper: Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation
venue: NeurIPS 2021
arxiv: 2102.13088
task: classification
family: self-distillation
use when: labels are noisy or the model fits them too closely, and a second, equally large model of itself is affordable
needs: labels; validation data for alpha: optimal

With `kernel`: ridge regression on one-hot labels minus 1/C [choice for classification], every step, the limit and the
best weights in closed form (`KernelSelfDistillation`, an estimator of its own like those of scikit-learn). The kernel
sees pixels in [0, 1]. The limit of a constant alpha is one ridge fit with lambda / alpha. With `student`: networks
trained with MSE on probabilities; alpha: optimal trains, at each step, one student with alpha 0, estimates the best
weight from the validation outputs of it and of the first model, and trains the step's student once with that: three
trainings in place of a grid. The script adds `reg_coef` times the sum of unsquared norms of all parameters; the default
here is the optimiser's weight decay, and `reg_coef` is there for the script's numbers. The script's epochs keep the
best validation checkpoint: `train.best`. The best weight is clipped to [0, 1]. Leave-one-out predictions in place of
validation data are not offered. With a kernel, which is deterministic, the run's seed is added to data.seed. Class ids
only.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, DataSpec, MethodConfig, Model, Spec, TrainSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Context, Objective, Progress
from stillhouse.errors import UserError, unknown
from stillhouse.evaluation.classification import collect_logits, evaluate_classifier
from stillhouse.functional import checks
from stillhouse.functional.labels import check_label, hard_only
from stillhouse.functional.precision import full_precision
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Product, Student, read_meta
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, Signals

Step = int | Literal["limit"]

KERNELS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "rbf": lambda x, y, gamma: torch.exp(-gamma * torch.cdist(x, y).square()),
    "laplace": lambda x, y, gamma: torch.exp(-gamma * torch.cdist(x, y)),
    "linear": lambda x, y, gamma: gamma * (x @ y.T),
    "cubic": lambda x, y, gamma: (gamma * (x @ y.T) + 1) ** 3,
}
"""Name -> k(X, X') of rows (n, p) and (m, p), (n, m)."""


def optimal_weight(target: Tensor, plain: Tensor, pure: Tensor) -> float:
    """The weight alpha of the labels that is best for these targets: <y - g0, g1 - g0> / |g1 - g0|^2, not clipped (eq.
    of the optimal alpha).

    Args:
        target: validation targets, (n,) or (n, q).
        plain: g1, predictions of the model that was fitted to the labels alone (alpha 1), same shape.
        pure: g0, predictions of the model that was fitted to its predecessor alone (alpha 0), same shape.
    """
    if not target.shape == plain.shape == pure.shape:
        raise UserError(
            f"Targets and both predictions must have one shape; given: {tuple(target.shape)}, {tuple(plain.shape)}, "
            f"{tuple(pure.shape)}."
        )
    y, g1, g0 = target.double(), plain.double(), pure.double()
    apart = g1 - g0
    size = float(apart.square().sum())
    if size <= 1e-24 * max(float(g1.square().sum()), 1e-300):
        warnings.warn(
            "Refitting changes nothing here (the ridge is tiny): every weight is as good, so alpha is 1.", stacklevel=2
        )
        return 1.0
    return float(((y - g0) * apart).sum()) / size


class KernelSelfDistillation:
    """Kernel ridge regression refitted to its own predictions, in closed form; step 1 is the ordinary fit.

    All in float64, from one eigendecomposition K = V D V^T: the predictions of step t on the training points are
    V B_t V^T Y with B_t diagonal.

    Args:
        kernel: a name of `KERNELS`.
        gamma: its scale.
        ridge: lambda > 0, not multiplied by the number of points.
        steps: how many fits.
        alpha: weight of the labels at each refit, in [0, 1]: one number, or one a step (the first is not used: step 1
            has no predecessor).

    Raises:
        UserError: an unknown kernel, or options out of range.

    >>> x = torch.linspace(0, 1, 11)[:, None]
    >>> chain = KernelSelfDistillation(gamma=80, ridge=0.2, steps=3, alpha=0.25).fit(x, torch.sin(6.28 * x[:, 0]))
    >>> chain.predict(x, 3).shape, chain.predict(x, "limit").shape
    (torch.Size([11]), torch.Size([11]))
    """

    def __init__(
        self,
        kernel: str = "rbf",
        gamma: float = 1.0,
        ridge: float = 0.1,
        steps: int = 6,
        alpha: float | Sequence[float] = 0.25,
    ) -> None:
        if kernel not in KERNELS:
            raise unknown("kernel", kernel, KERNELS)
        if not ridge > 0 or not gamma > 0 or steps < 1:
            raise UserError(
                f"ridge and gamma must be above 0 and steps at least 1; given: ridge {ridge}, gamma {gamma}, steps "
                f"{steps}."
            )
        alphas = [float(alpha)] * steps if isinstance(alpha, int | float) else [float(a) for a in alpha]
        if len(alphas) != steps:
            raise UserError(f"alpha must be one number or one for each of {steps} steps; given: {len(alphas)}.")
        if not all(0 <= a <= 1 for a in alphas):
            raise UserError(f"alpha must lie between 0 and 1; given: {alphas}.")
        if steps > 1 and not any(alphas[1:]):
            warnings.warn("With alpha 0 at every step the chain forgets the labels and shrinks to zero.", stacklevel=2)
        self.kernel, self.gamma, self.ridge, self.steps, self.alphas = kernel, float(gamma), float(ridge), steps, alphas

    def fit(self, x: Tensor, y: Tensor) -> KernelSelfDistillation:
        """Decompose the kernel of the points x (n, p) and take the targets y, (n,) or (n, q)."""
        self.x, self._flat = x.double(), y.ndim == 1
        targets = y.double()[:, None] if self._flat else y.double()
        if len(self.x) != len(targets) or not len(self.x):
            raise UserError(f"x and y must hold as many points, at least one; given: {len(x)} and {len(y)}.")
        values, vectors = torch.linalg.eigh(self.gram(self.x))
        self.eigenvalues, self._vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        self._rotated = self._vectors.T @ targets
        return self

    def gram(self, x: Tensor) -> Tensor:
        """k(x, X): (m, n)."""
        return KERNELS[self.kernel](x.double(), self.x, self.gamma)

    def shrinkage(self, step: Step) -> Tensor:
        """The diagonal of B_t, (n,), by falling eigenvalue: how much of each eigen-direction of the labels is left
        after so many steps."""
        plain = self.eigenvalues / (self.eigenvalues + self.ridge)
        if step == "limit":
            alpha = self._constant()
            return alpha * self.eigenvalues / (alpha * self.eigenvalues + self.ridge)
        out = plain
        for alpha in self.alphas[1 : self._checked(step)]:
            out = plain * ((1 - alpha) * out + alpha)
        return out

    def coefficients(self, step: Step) -> Tensor:
        """Weights of the training points, (n, q): f(x) = k(x, X) coefficients; without refitting."""
        if step == "limit":
            alpha = self._constant()
            scale = alpha / (alpha * self.eigenvalues + self.ridge)
        else:
            alpha = 1.0 if self._checked(step) == 1 else self.alphas[step - 1]
            before = torch.zeros_like(self.eigenvalues) if step == 1 else self.shrinkage(step - 1)
            scale = ((1 - alpha) * before + alpha) / (self.eigenvalues + self.ridge)
        return self._vectors @ (scale[:, None] * self._rotated)

    def predict(self, x: Tensor, step: Step | None = None) -> Tensor:
        """Predictions at x (m, p), shaped as the targets were; of the last step by default."""
        return self._shaped(self.gram(x) @ self.coefficients(self.steps if step is None else step))

    def fitted(self, step: Step) -> Tensor:
        """Predictions on the training points: together with the labels the targets of the next step."""
        return self._shaped(self._vectors @ (self.shrinkage(step)[:, None] * self._rotated))

    def optimal_alpha(self, x: Tensor, y: Tensor, step: int) -> float:
        """The best weight at a step (from 2 on), given those before it, for validation points; not clipped.

        Training points would give 1 or more.
        """
        if self._checked(step) < 2:
            raise UserError("Step 1 is the ordinary fit whatever its weight; take the weight of step 2 or later.")
        pure = self._vectors @ ((self.shrinkage(step - 1) / (self.eigenvalues + self.ridge))[:, None] * self._rotated)
        kernel = self.gram(x)
        return optimal_weight(y.double().reshape(len(y), -1), kernel @ self.coefficients(1), kernel @ pure)

    def choose_alphas(self, x: Tensor, y: Tensor) -> list[float]:
        """Set each step's weight to its optimum for validation points x (m, p) and targets y, clipped to [0, 1];
        returns the unclipped ones."""
        found = []
        for step in range(2, self.steps + 1):
            found.append(self.optimal_alpha(x, y, step))
            self.alphas[step - 1] = min(max(found[-1], 0.0), 1.0)
        return found

    def _constant(self) -> float:
        weights = set(self.alphas[1:] or self.alphas)
        if len(weights) > 1:
            raise UserError("The limit is known for a constant alpha; here it differs from step to step.")
        return weights.pop()

    def _checked(self, step: Step) -> int:
        if not isinstance(step, int) or not 1 <= step <= self.steps:
            raise UserError(f"This chain has the steps 1 to {self.steps} and 'limit'; given: {step!r}.")
        return step

    def _shaped(self, predictions: Tensor) -> Tensor:
        return predictions[:, 0] if self._flat else predictions


@full_precision
def weighted_targets_loss(logits: Tensor, labels: Tensor, teacher_probs: Tensor | None, alpha: float) -> Tensor:
    """alpha MSE(softmax z, one-hot y) + (1 - alpha) MSE(softmax z, teacher), means over B * C entries; without a
    teacher, the first term alone.

    Args:
        logits: (B, C).
        labels: class ids (B,).
        teacher_probs: (B, C) of the model before, or None.
        alpha: weight of the labels.

    Raises:
        UserError: soft labels, or shapes that do not fit.
    """
    hard_only("self_distill_kernel", labels)
    check_label("self_distill_kernel", labels, logits)
    probs = F.softmax(logits, dim=-1)
    to_labels = F.mse_loss(probs, F.one_hot(labels, logits.shape[1]).to(probs.dtype))
    if teacher_probs is None:
        return to_labels
    checks.same_classes("self_distill_kernel", logits, teacher_probs)
    return alpha * to_labels + (1 - alpha) * F.mse_loss(probs, teacher_probs.detach())


def sum_of_norms(parameters: list[Tensor]) -> Tensor:
    """The sum of the parameters' L2 norms, not squared: a scalar."""
    return torch.stack([p.float().norm() for p in parameters]).sum()


class WeightedTargets(Objective):
    """The loss of one step of the chain of networks.

    Args:
        alpha: weight of the labels; None for the first model, which has no predecessor.
        reg_coef: weight of the sum of unsquared norms of the network's parameters.
    """

    name = "self_distill"

    def __init__(self, alpha: float | None = None, reg_coef: float = 0.0) -> None:
        super().__init__()
        checks.options("self_distill_kernel", non_negative={"reg_coef": reg_coef})
        self.alpha, self.reg_coef = alpha, reg_coef
        self.needs = frozenset({"student.logits", "label"} | (set() if alpha is None else {"teacher.logits"}))
        self._trained: list[Tensor] = []

    def prepare(self, ctx: Context) -> None:
        self._trained = [p for p in ctx.student.parameters() if p.requires_grad]

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        logits = student.require("logits")
        before = None if self.alpha is None else teacher.log_probs().exp()
        terms = {
            "loss": weighted_targets_loss(logits, batch["label"], before, 1.0 if self.alpha is None else self.alpha)
        }
        return {**terms, "norms": self.reg_coef * sum_of_norms(self._trained)} if self.reg_coef else terms


class KernelSpec(Spec):
    """The kernel and its ridge."""

    name: Literal["rbf", "laplace", "linear", "cubic"] = "rbf"
    gamma: float = Field(0.05, gt=0, description="rbf: exp(-gamma |x - x'|^2) on pixels in [0, 1].")
    ridge: float = Field(0.2, gt=0, description="lambda; not multiplied by the number of samples.")


class Config(MethodConfig):
    data: Data
    kernel: KernelSpec | None = Field(None, description="Kernel ridge regression, in closed form.")
    student: Model | None = Field(None, description="Or a network.")
    train: TrainSpec = Field(
        default_factory=TrainSpec, description="student: how each of the chain's networks is trained."
    )
    reg_coef: float = Field(
        0.0, ge=0, description="student: weight of the sum of unsquared parameter norms; the released script has 1e-4."
    )
    steps: int = Field(5, ge=1, description="Fits; the first has no predecessor.")
    alpha: Literal["optimal"] | float | list[float] = Field(
        "optimal", description="Weight of the labels: the best at each step, one number, or one a step."
    )
    keep: Literal["last", "best", "limit"] = Field(
        "last", description="Which step is the product; best: on validation data; limit: kernel with constant alpha."
    )
    evaluate: list[str] = Field(default_factory=lambda: ["accuracy", "calibration", "cost"])

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if (self.kernel is None) == (self.student is None):
            raise ValueError("give exactly one of kernel and student")
        if isinstance(self.alpha, list) and len(self.alpha) != self.steps:
            raise ValueError(
                f"alpha must be one number or one for each of {self.steps} steps; given: {len(self.alpha)}"
            )
        if self.alpha != "optimal" and not all(
            0 <= a <= 1 for a in (self.alpha if isinstance(self.alpha, list) else [self.alpha])
        ):
            raise ValueError("alpha must lie between 0 and 1")
        if self.keep == "limit" and (self.student is not None or not isinstance(self.alpha, float | int)):
            raise ValueError("keep: limit needs a kernel and one constant alpha")
        return self

    @property
    def sample(self) -> DataSpec:
        """The data.

        A kernel machine has nothing random in it, so with one the run's seed also draws the subset, the noise and the
        split.
        """
        return self.data if self.kernel is None else self.data.model_copy(update={"seed": self.data.seed + self.seed})


@dataclass
class KernelClassifier(Product):
    """A kernel machine of one step (or the limit): the class is the largest of k(x, X) coefficients + 1/C.

    Attributes:
        points: X, (n, p) pixels in [0, 1]; coefficients: (n, C), float64.
        mean, std: of the inputs that it is given, per channel, which it undoes.
    """

    kind: ClassVar[str] = "stillhouse.methods.classification.self_distill_kernel:KernelClassifier"
    kernel: str
    gamma: float
    points: Tensor
    coefficients: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str]
    figures: dict[str, float] = field(default_factory=dict)

    def scores(self, inputs: Tensor) -> Tensor:
        """(B, C), float64, near class probabilities: of normalised inputs (B, channels, height, width)."""
        x = pixels(inputs, self.mean, self.std)
        return KERNELS[self.kernel](x, self.points, self.gamma) @ self.coefficients + 1 / len(self.classes)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {"points": self.points.contiguous(), "coefficients": self.coefficients.contiguous()},
            str(folder / "model.safetensors"),
        )
        meta = {"kernel": self.kernel, "gamma": self.gamma, "mean": self.mean, "std": self.std, "classes": self.classes}
        (folder / "product.json").write_text(json.dumps({"kind": self.kind, "format": 1, **meta}, indent=1))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> KernelClassifier:
        from safetensors.torch import load_file

        meta, tensors = read_meta(folder), load_file(str(Path(folder) / "model.safetensors"))
        return cls(
            meta["kernel"],
            meta["gamma"],
            tensors["points"],
            tensors["coefficients"],
            tuple(meta["mean"]),
            tuple(meta["std"]),
            meta["classes"],
        )


@evaluates(KernelClassifier.kind)
def judge(product: KernelClassifier, run: Run) -> dict[str, float]:
    """Test accuracy, mean squared error to the one-hot labels, and the numbers that the machine holds."""
    x, y = _points(run, run.config.sample, "test")  # type: ignore[attr-defined]
    scores = KERNELS[product.kernel](x, product.points, product.gamma) @ product.coefficients + 1 / len(product.classes)
    return {
        "accuracy": (scores.argmax(-1) == y).double().mean().item(),
        "mse": (scores - F.one_hot(y, len(product.classes))).square().mean().item(),
        "parameters": float(product.coefficients.numel()),
    }


def pixels(inputs: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalised inputs (B, ...) as rows of pixels in [0, 1], (B, p) float64; inputs without normalisation as they
    are."""
    x = inputs.double()
    if mean:
        shape = (1, -1, *[1] * (x.ndim - 2))
        x = x * torch.tensor(std, dtype=x.dtype).view(shape) + torch.tensor(mean, dtype=x.dtype).view(shape)
    return x.flatten(1)


def _points(run: Run, data: DataSpec, split: str) -> tuple[Tensor, Tensor]:
    """A split as rows of pixels (n, p) and class ids (n,)."""
    bundle = run.data(data)
    batches = list(run.loader(data, split))
    return torch.cat([pixels(b["input"], bundle.mean, bundle.std) for b in batches]), torch.cat(
        [b["label"] for b in batches]
    )


class SelfDistillation(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        if run.validation(config.sample) is None and (config.alpha == "optimal" or config.keep == "best"):
            raise UserError(
                "alpha: optimal and keep: best need validation data: set data.val to a share above 0, or alpha to a "
                "number."
            )
        if config.kernel is not None:
            count = len(run.data(config.sample).dataset("train", train=False))
            return [
                Stage(
                    "chain",
                    f"decompose a {config.kernel.name} kernel of {count} samples, and take {config.steps} steps in "
                    "closed form",
                )
            ]
        assert config.student is not None
        fits = config.steps + (config.steps - 1 if config.alpha == "optimal" else 0)
        steps = (
            fits * config.train.epochs * len(run.loader(config.sample, "train", config.train.batch_size, train=True))
        )
        return [
            Stage(
                "step",
                f"train {fits} networks, each on the labels and the one before it",
                {"student": config.student.model},
                steps=steps,
            )
        ]

    def run(self, config: Config, run: Run) -> KernelClassifier | Student:
        return self._kernel(config, run) if config.kernel is not None else self._networks(config, run)

    # ---- kernels, in closed form -------------------------------------------------------------------------------------

    def _kernel(self, config: Config, run: Run) -> KernelClassifier:
        spec, bundle = config.kernel, run.data(config.sample)
        assert spec is not None
        x, labels = _points(run, config.sample, "train")
        targets = F.one_hot(labels, bundle.num_classes).double() - 1 / bundle.num_classes
        alpha = 1.0 if config.alpha == "optimal" else config.alpha
        chain = KernelSelfDistillation(spec.name, spec.gamma, spec.ridge, config.steps, alpha).fit(x, targets)
        checked = next((s for s in ("val", "holdout") if bundle.has(s)), None)
        figures: dict[str, float] = {}
        errors: dict[int, float] = {}
        if checked is not None:
            xv, yv = _points(run, config.sample, checked)
            tv = F.one_hot(yv, bundle.num_classes).double() - 1 / bundle.num_classes
            if config.alpha == "optimal":
                found = chain.choose_alphas(xv, tv)
                figures |= {f"alpha_step{t}": a for t, a in enumerate(found, 2)}
            errors = {t: (chain.predict(xv, t) - tv).square().mean().item() for t in range(1, config.steps + 1)}
            figures |= {f"val_mse_step{t}": e for t, e in errors.items()}
        xt, yt = _points(run, config.sample, "test")
        constant = len(set(chain.alphas[1:] or chain.alphas)) == 1
        for step in [*range(1, config.steps + 1), *(["limit"] if constant else [])]:
            name = step if step == "limit" else f"step{step}"
            figures[f"accuracy_{name}"] = (chain.predict(xt, step).argmax(-1) == yt).double().mean().item()
            b = chain.shrinkage(step)
            figures[f"directions_{name}"] = (
                b.sum() ** 2 / b.square().sum().clamp_min(1e-300)
            ).item()  # how many eigen-directions are in use
        best = min(errors, key=errors.__getitem__) if config.keep == "best" and errors else config.steps
        coefficients = chain.coefficients("limit" if config.keep == "limit" else best)
        return KernelClassifier(
            spec.name,
            spec.gamma,
            chain.x,
            coefficients,
            tuple(bundle.mean),
            tuple(bundle.std),
            list(bundle.classes),
            figures,
        )

    # ---- networks ----------------------------------------------------------------------------------------------------

    def _networks(self, config: Config, run: Run) -> Student:
        assert config.student is not None
        check = run.validation(config.data)
        figures: dict[str, float] = {}
        chain: list[nn.Module] = []
        kept: list[float] = []
        trainings = 0
        for step in range(1, config.steps + 1):
            alpha: float | None = None
            if step > 1:
                if config.alpha == "optimal":
                    pure = self._fit(config, run, f"step.{step}.pure", step, chain[-1], 0.0)
                    trainings += 1
                    found = optimal_weight(*self._outputs(check, chain[0], pure, run.device))
                    figures[f"alpha_step{step}"] = found
                    alpha = min(max(found, 0.0), 1.0)
                else:
                    alpha = config.alpha[step - 1] if isinstance(config.alpha, list) else float(config.alpha)
            chain.append(self._fit(config, run, f"step.{step}", step, chain[-1] if chain else None, alpha))
            trainings += 1
            figures[f"accuracy_step{step}"] = evaluate_classifier(
                chain[-1], run.loader(config.data, "test"), run.device, ["accuracy"]
            )["accuracy"]
            if check is not None:
                figures[f"val_accuracy_step{step}"] = evaluate_classifier(chain[-1], check, run.device, ["accuracy"])[
                    "accuracy"
                ]
                kept.append(figures[f"val_accuracy_step{step}"])
        network = chain[kept.index(max(kept))] if config.keep == "best" else chain[-1]
        return run.student(network, config.student, config.data, {**figures, "trainings": float(trainings)})

    def _fit(
        self, config: Config, run: Run, name: str, step: int, before: nn.Module | None, alpha: float | None
    ) -> nn.Module:
        """One network of the chain, from a fresh initialisation (the same for all that are tried at a step)."""
        assert config.student is not None
        network = run.model(config.student, config.data, role=f"step.{step}")
        module = Distillation(network, before, [WeightedTargets(alpha, config.reg_coef)], seed=run.seed)
        loader = run.loader(config.data, "train", config.train.batch_size, train=True)
        run.fit(name, module, loader, config.train, evaluate=run.validating(config.data))
        module.close()
        return network

    @staticmethod
    def _outputs(check: Any, plain: nn.Module, pure: nn.Module, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Validation targets and class probabilities of the first model and of the one without labels, each (n, C)."""
        g1, labels = collect_logits(plain, check, device)
        g0, _ = collect_logits(pure, check, device)
        return F.one_hot(labels, g1.shape[1]).double(), g1.double().softmax(-1), g0.double().softmax(-1)

"""MCMI: fine-tunes a teacher so that its outputs keep saying how images of one class differ; any objective then distils
it.

paper: Bayes Conditional Distribution Estimation for Knowledge Distillation Based on Conditional Mutual Information
venue: ICLR 2024
arxiv: 2401.08732
task: classification
family: teacher preparation
use when: the student has few samples of some or all classes, so that the teacher's outputs beyond the label matter most
needs: a trained classifier as teacher, its training set with class ids; then whatever the objectives need

The fine-tuning loss is CE - lam * mean KL(P_x || Q_y), with Q_y the mean output of class y; the second term is the
conditional mutual information I(X; Y^ | Y). Paper and code estimate Q once, before fine-tuning (`centroids: once`; used
by `paper`). The default here is `epoch` [choice]: Q again at every epoch, since a stale Q only bounds the information
from above and can run away. `ema` is the per-batch rule that the released loop holds commented out; its samples are
read in evaluation mode [choice]. Q is estimated in evaluation mode without augmentation (the script: training mode,
augmented). No rule for lam is published: choose it by the student's validation accuracy. The script picks the
checkpoint on test data; `fine_tune.train.best` does it on validation data. Few-shot: `data.size` with `teacher.data`.
Omitted classes: `omit`. An MCMI teacher is less calibrated than the one it came from: do not deploy it as a classifier.
Over several processes, Q is measured by each over the whole set.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, MethodConfig, Model, Objectives, Spec, Teacher, TrainSpec
from stillhouse.data import BatchKey, IndexedDataset, Loader
from stillhouse.data.subset import Subset
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Context, Objective, Progress
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.errors import UserError
from stillhouse.evaluation.classification import collect_logits, evaluate_classifier
from stillhouse.functional import checks
from stillhouse.functional.labels import check_label, hard_only
from stillhouse.functional.precision import full_precision
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, Signals, call_model, evaluating, read_logits, to_device

Centroids = Literal["epoch", "once", "ema"]
SMALLEST = 1e-12


@full_precision
def conditional_information(logits: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """The batch's conditional mutual information, mean KL(P_b || Q_{y_b}) in nats, with gradient through P alone.

    Args:
        logits: (B, C).
        labels: class ids (B,).
        centroids: Q, (C, C): row y is the mean output of class y.

    Raises:
        UserError: soft labels, or shapes that do not fit.
    """
    hard_only("mcmi", labels)
    check_label("mcmi", labels, logits)
    if centroids.shape != (logits.shape[1],) * 2:
        raise UserError(
            f"mcmi: centroids must have shape {(logits.shape[1],) * 2} for logits of shape {tuple(logits.shape)}; "
            f"given: {tuple(centroids.shape)}."
        )
    log_p = F.log_softmax(logits, dim=-1)
    log_q = centroids.detach().clamp_min(SMALLEST).log()[labels]
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@full_precision
def mcmi_loss(logits: Tensor, labels: Tensor, centroids: Tensor, lam: float = 0.15) -> Tensor:
    """Cross-entropy minus lam times the conditional mutual information; (B, C), (B,) and (C, C) -> scalar."""
    return F.cross_entropy(logits, labels) - lam * conditional_information(logits, labels, centroids)


@full_precision
def updated_centroids(centroids: Tensor, logits: Tensor, decay: float = 0.9999) -> Tensor:
    """Q after one step of its moving average: Q_y <- decay Q_y + (1 - decay) mean softmax of s samples of class y, rows
    renormalised.

    Args:
        centroids: (C, C).
        logits: (C, s, C), of the samples drawn from each class.
    """
    mixed = decay * centroids + (1 - decay) * F.softmax(logits, dim=-1).mean(1)
    return mixed / mixed.sum(-1, keepdim=True)


class OutputStatistics:
    """Class means, conditional mutual information and accuracy of a classifier over a set, from one pass that keeps (C,
    C) numbers."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=device)  # of P, by class
        self.counts = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self._negative_entropy = torch.zeros((), dtype=torch.float64, device=device)
        self._correct = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor) -> None:
        """A batch of logits (B, C), or of log-probabilities, with class ids (B,)."""
        log_p = F.log_softmax(logits.double(), dim=-1)
        p = log_p.exp()
        self.sums.index_add_(0, labels, p)
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        self._negative_entropy += (p * log_p).sum()
        self._correct += (logits.argmax(-1) == labels).sum()

    def centroids(self) -> Tensor:
        """Q, (C, C) float32, rows sum to 1. Raises `UserError` for a class without samples."""
        absent = (self.counts == 0).nonzero()
        if len(absent):
            raise UserError(
                f"mcmi: class {int(absent[0])} has no training sample, so it has no centroid; leave the class out of "
                "the data."
            )
        return (self.sums / self.sums.sum(-1, keepdim=True)).float()

    def information(self, centroids: Tensor | None = None) -> float:
        """(1/n) sum KL(P_x || Q_{y_x}) in nats; at the class means by default, where it is smallest."""
        q = (self.centroids() if centroids is None else centroids).double().clamp_min(SMALLEST)
        return float((self._negative_entropy - (self.sums * q.log()).sum()) / self.counts.sum())

    def accuracy(self) -> float:
        return float(self._correct / self.counts.sum())


class MCMI(Objective):
    """Cross-entropy minus lam times the conditional mutual information of the network that is trained.

    Args:
        lam: weight of the information.
        centroids: when Q is estimated: `epoch`, `once`, or `once` and then moved at every step, `ema`.
        decay, samples: of `ema`: how much of Q stays, and samples a class and step.
        guard: stop where accuracy on the training set has fallen by more than this share since the start.
        images: of `ema`: the training set as it is evaluated.
    """

    name = "mcmi"
    needs = frozenset({"student.logits", "label"})
    centroids: Tensor
    first_accuracy: Tensor

    def __init__(
        self,
        lam: float = 0.15,
        centroids: Centroids = "epoch",
        decay: float = 0.9999,
        samples: int = 8,
        guard: float = 0.1,
        images: IndexedDataset | None = None,
    ) -> None:
        super().__init__()
        checks.options(
            "mcmi", non_negative={"lam": lam}, share={"decay": decay}, positive={"samples": samples, "guard": guard}
        )
        if centroids == "ema" and images is None:
            raise UserError("mcmi: centroids: ema draws samples of every class, so it needs the training set.")
        self.lam, self.when, self.decay, self.samples, self.guard, self._images = (
            lam,
            centroids,
            decay,
            samples,
            guard,
            images,
        )
        self._rows: list[Tensor] = []

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        logits = student.require("logits")
        classes = logits.shape[-1]
        self.register_buffer("centroids", torch.full((classes, classes), 1.0 / classes))
        self.register_buffer("first_accuracy", torch.tensor(float("nan")))

    def begin_epoch(self, ctx: Context) -> None:
        seen = OutputStatistics(len(self.centroids), self.centroids.device)
        for batch, signals in ctx.sweep("train", of="student"):
            seen.add(signals.require("logits"), batch["label"])
        if ctx.progress.epoch == 0 or self.when == "epoch":
            self.centroids.copy_(seen.centroids())
        now = seen.accuracy()
        if ctx.progress.epoch == 0:
            self.first_accuracy.fill_(now)
        elif now < float(self.first_accuracy) - self.guard:
            raise UserError(
                f"mcmi: fine-tuning ran away: training accuracy fell from {float(self.first_accuracy):.3f} to "
                f"{now:.3f} after epoch {ctx.progress.epoch} "
                f"(lam {self.lam}, centroids: {self.when}); lower lam or the learning rate, or use centroids: epoch."
            )

    def before_step(self, batch: Batch, teacher: Signals, ctx: Context) -> None:
        if self.when != "ema":
            return
        if not self._rows:
            labels = ctx.labels("train")
            self._rows = [(labels == c).nonzero().squeeze(1) for c in range(len(self.centroids))]
        at = ctx.progress
        draw = ctx.generator("mcmi", at.epoch, at.batch)
        rows = torch.cat([r[torch.randint(len(r), (self.samples,), generator=draw)] for r in self._rows]).numpy()
        assert self._images is not None
        images = self._images.batch(BatchKey(0, rows, 0, len(rows)), 0)["input"].to(self.centroids.device)
        with torch.no_grad():
            training, network = ctx.student.training, ctx.student.eval()
            logits = network(images)
            network.train(training)
        self.centroids.copy_(
            updated_centroids(self.centroids, logits.view(len(self._rows), self.samples, -1), self.decay)
        )

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        hard_only("mcmi", batch["label"])
        logits = student.require("logits")
        information = conditional_information(logits, batch["label"], self.centroids)
        likelihood = F.cross_entropy(logits.float(), batch["label"])
        return {"ce": likelihood, "information": -self.lam * information, "log:cmi": information}


class FineTune(Spec):
    """The teacher's second stage."""

    lam: float = Field(
        0.15,
        ge=0,
        description="Weight of the conditional mutual information; 0: the same fine-tuning by likelihood alone.",
    )
    centroids: Centroids = Field(
        "epoch",
        description="epoch: class means at every epoch; once: of the first teacher, as published; ema: per batch.",
    )
    decay: float = Field(0.9999, ge=0, lt=1, description="ema: how much of a centroid stays.")
    samples: int = Field(8, ge=1, description="ema: samples of every class a step.")
    guard: float = Field(
        0.1, gt=0, description="Stop with an error where training accuracy has fallen by more than this."
    )
    train: TrainSpec = Field(default_factory=lambda: TrainSpec(epochs=20, batch_size=64))


class Config(MethodConfig):
    data: Data
    teacher: Teacher
    fine_tune: FineTune | None = Field(default_factory=FineTune, description="null: distil the first teacher as it is.")
    student: Model
    objectives: Objectives
    train: TrainSpec = Field(default_factory=TrainSpec)
    omit: list[int] = Field(
        default_factory=list,
        description="Class ids that the student never sees (zero-shot); it is still judged on them.",
    )
    evaluate: list[str] = Field(default_factory=lambda: ["accuracy", "calibration", "cost"])


TEACHER = Stage("teacher", "train the teacher with cross-entropy (stored, shared)")
TUNED = Stage("mcmi", "fine-tune it")
STUDENT = Stage("student", "train the student")


class MaximisedInformation(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        if config.teacher.model is None:
            raise UserError("mcmi fine-tunes a network: give teacher.model, with a checkpoint or with `train`.")
        source = config.teacher.data or config.data
        stages = []
        if config.teacher.train is not None:
            stages.append(TEACHER.filled(models={"teacher": config.teacher.model}))
        if config.fine_tune is not None:
            steps = config.fine_tune.train.epochs * len(
                run.loader(source, "train", config.fine_tune.train.batch_size, train=True)
            )
            stages.append(
                TUNED.filled(
                    does=f"fine-tune it by likelihood and {config.fine_tune.lam:g} times conditional information "
                    "(stored, shared)",
                    steps=steps,
                )
            )
        losses = " + ".join(o.name for o in config.objectives)
        seen = f" without class {', '.join(map(str, config.omit))}" if config.omit else ""
        steps = config.train.epochs * len(self._student_loader(config, run, train=True))
        stages.append(
            STUDENT.filled(
                does=f"train the student on {run.data(config.data).name}{seen} with {losses}",
                models={"student": config.student.model},
                steps=steps,
            )
        )
        return stages

    def run(self, config: Config, run: Run) -> Student:
        teacher = run.teacher("teacher", config.teacher, config.data)
        facts: dict[str, float] = {}
        if config.fine_tune is not None:
            tuned = self._fine_tune(config, run, teacher)
            teacher.model.load_state_dict(tuned["weights"])
            facts = tuned["figures"]
        student = run.model(config.student, config.data)
        module = Distillation(
            student,
            teacher,
            [objective_from_spec(o) for o in config.objectives],
            seed=run.seed,
            embedding=config.student.embedding,
        )
        loader = self._student_loader(config, run, train=True)
        splits = {**run.splits(config.data), "train": self._student_loader(config, run, train=False)}
        fitted = run.fit(STUDENT, module, loader, config.train, evaluate=run.validating(config.data), splits=splits)
        module.close()
        figures = {"train_seconds": fitted.seconds, **{f"teacher_{k}": v for k, v in facts.items()}}
        if config.omit:
            figures |= self._omitted(config, run, student)
        return run.student(student, config.student, config.data, figures)

    def _fine_tune(self, config: Config, run: Run, first: FrozenTeacher) -> dict[str, Any]:
        """The teacher's weights after fine-tuning, and its figures: test accuracy and nll, and the information on
        training data, before and after."""
        spec, tune = config.teacher, config.fine_tune
        assert tune is not None
        data = spec.data or config.data
        bundle = run.data(data)

        def make() -> dict[str, Any]:
            with run.seeded(spec.seed or 0):
                network = copy.deepcopy(first.model).to(run.device)
                measured = run.loader(data, "train")
                before = information_of(network, measured, run.device)
                objective = MCMI(
                    tune.lam,
                    tune.centroids,
                    tune.decay,
                    tune.samples,
                    tune.guard,
                    images=bundle.dataset("train", train=False),
                )
                module = Distillation(network, None, [objective], seed=run.seed)
                check, figured = run.validation(data), run.validating(data)
                judge = None if figured is None else lambda m, d: {**figured(m, d), "cmi": information_of(m, check, d)}
                loader = run.loader(data, "train", tune.train.batch_size, train=True)
                run.fit(TUNED, module, loader, tune.train, evaluate=judge, splits=run.splits(data))
                module.close()
                figures = evaluate_classifier(
                    network, run.loader(data, "test"), run.device, ["accuracy", "calibration"]
                )
                figures |= {"cmi": information_of(network, measured, run.device), "cmi_before": before}
                return {"weights": state_on_cpu(network), "figures": figures}

        options = {**tune.model_dump(mode="json"), "train": tune.train.identity()}
        return run.stage(
            TUNED,
            make,
            {"tune": options, "from": first.fingerprint(), "data": bundle.fingerprint, "seed": spec.seed or 0},
        )

    def _student_loader(self, config: Config, run: Run, train: bool) -> Loader:
        """The student's training samples: all, or those of classes that are not omitted."""
        loader = run.loader(config.data, "train", config.train.batch_size if train else 256, train=train)
        if config.omit:
            classes = run.data(config.data).num_classes
            wrong = [c for c in config.omit if not 0 <= c < classes]
            if wrong:
                raise UserError(f"omit: there is no class {wrong[0]}; the data set has classes 0 to {classes - 1}.")
            loader.dataset = Subset(loader.dataset, np.flatnonzero(~np.isin(loader.labels().numpy(), config.omit)))
        return loader

    @staticmethod
    def _omitted(config: Config, run: Run, student: nn.Module) -> dict[str, float]:
        """Test accuracy on the classes that the student never saw, and on the others."""
        logits, labels = collect_logits(student, run.loader(config.data, "test"), next(student.parameters()).device)
        correct, hidden = logits.argmax(-1) == labels, torch.isin(labels, torch.tensor(config.omit))
        return {
            "accuracy_omitted": correct[hidden].double().mean().item(),
            "accuracy_seen": correct[~hidden].double().mean().item(),
        }


def information_of(network: nn.Module, loader: Iterable[Batch], device: torch.device) -> float:
    """Conditional mutual information of a classifier over a loader, at the class means of that loader, in nats."""
    seen: OutputStatistics | None = None
    with evaluating(network):
        for batch in loader:
            logits = read_logits(call_model(network, {"input": to_device(batch["input"], device)}))
            seen = seen or OutputStatistics(logits.shape[1], device)
            seen.add(logits, batch["label"].to(device))
    assert seen is not None
    return seen.information()

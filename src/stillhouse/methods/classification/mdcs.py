"""MDCS: experts that favour frequent, all and rare classes; each teaches itself from a weak to a strong view.

paper: MDCS: More Diverse Experts with Consistency Self-distillation for Long-tailed Recognition
venue: ICCV 2023
arxiv: 2308.09922
task: classification
family: self-distillation, long tails, several experts
use when: classes are imbalanced, and one network may hold several heads
needs: labels, and two augmentations of each image; no teacher

A network is divided at one of its modules: what lies before is shared, the rest is built once for each expert, with a
cosine classifier. Expert e is trained with cross-entropy on z_e + lambda_e log n, where n are the training counts of
the classes: a negative lambda makes a head expert, 1 a balanced one, a larger one a tail expert. The prediction on the
weak view, where it is right, is the target of the same expert's prediction on the strong view (`view`, one of
data.views), with a weight that rises over `warmup` epochs. The product predicts with the mean of the experts' raw
logits. Selection and targets use the adjusted logits, as the released code does. Its configurations name a temperature
of 2, which its loss ignores: here it is 1 and can be set. The released logarithm has a guard of 1e-9 that no count of
real data feels; it is left out, and a class without samples is an error. Its Cutout may lie partly outside the image;
the recipes' `RandomErasing` lies inside.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, MethodConfig, Model, ModelSpec, Spec, TrainSpec
from stillhouse.errors import UserError, unknown
from stillhouse.evaluation.classification import accuracy_by_frequency, collect_logits, gains_by_frequency
from stillhouse.functional.divergences import kl_terms
from stillhouse.functional.precision import full_precision
from stillhouse.models import load_weights
from stillhouse.models.anatomy import classifier, embedding_from
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.judging import check_groups, evaluate
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.signals import Batch
from stillhouse.tasks.base import Task
from stillhouse.tasks.classification import Classification
from stillhouse.training.context import Progress
from stillhouse.training.module import TrainingModule

# ---- the losses ------------------------------------------------------------------------------------------------------


def log_priors(counts: Tensor, exponents: Sequence[float]) -> Tensor:
    """lambda_e log n of each expert and class, (E, C), from training counts (C,).

    Raises:
        UserError: a class without training samples.
    """
    if not bool((counts > 0).all()):
        raise UserError(
            f"mdcs: class {int((counts == 0).nonzero()[0])} has no training samples, so its logits cannot be adjusted; "
            "leave it out by data.classes."
        )
    logs = counts.double().log()
    return torch.stack([e * logs for e in exponents]).float()


@full_precision
def diversity_loss(adjusted: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of adjusted logits (E, B, C), mean over the batch, summed over the experts; targets (B,)."""
    every = targets.expand(len(adjusted), -1)
    return len(adjusted) * F.cross_entropy(adjusted.flatten(0, 1), every.flatten())


def confident(weak: Tensor, targets: Tensor) -> Tensor:
    """(E, N) whether each expert's adjusted logits (E, N, C) put the right class first; targets (N,)."""
    return weak.argmax(-1) == targets


@full_precision
def consistency_loss(weak: Tensor, strong: Tensor, selected: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(weak || strong) of each expert, mean over its selected samples (0 where it selects none), summed over the
    experts; weak views are constants.

    Args:
        weak, strong: (E, N, C) adjusted logits of the two views.
        selected: (E, N) bool.
    """
    terms = kl_terms(strong / temperature, F.log_softmax(weak.detach() / temperature, -1)).sum(-1)
    chosen = selected.to(terms.dtype)
    return temperature**2 * ((terms * chosen).sum(1) / chosen.sum(1).clamp_min(1)).sum()


# ---- the network -----------------------------------------------------------------------------------------------------


class CosineHead(nn.Module):
    """scale * cos(embedding, w_c): a linear classifier of unit vectors, without bias; (B, D) -> (B, C)."""

    def __init__(self, width: int, classes: int, scale: float = 30.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(F.normalize(torch.empty(width, classes).uniform_(-1, 1), dim=0))

    def forward(self, embedding: Tensor) -> Tensor:
        return self.scale * (F.normalize(embedding, dim=1) @ F.normalize(self.weight, dim=0))


class Experts(nn.Module):
    """Several copies of the later part of a network on one earlier part.

    Args:
        networks: one of each expert, alike but for their weights; chains of modules with a linear classifier at the
            end, such as ResNets. What lies before `branch` is taken from the first.
        branch: the first module that each expert has for itself, a child of the network.
        example: (1, ...) an input, to find the classifier and to check the chain.
        scale: of the cosine classifiers.

    Raises:
        UserError: a network that is no such chain, or without a module of that name.
    """

    def __init__(self, networks: Sequence[nn.Module], branch: str, example: Tensor, scale: float = 30.0) -> None:
        super().__init__()
        first = networks[0]
        head = classifier(first, {"input": example})
        names = [name for name, _ in first.named_children()]
        if head not in names:
            raise UserError(f"mdcs: the network's classifier '{head}' is not one of its children ({', '.join(names)}).")
        body = names[: names.index(head)]
        if branch not in body[1:]:
            raise unknown("module to branch at", branch, body[1:], " in the network (branch)")
        cut = body.index(branch)
        parts = [dict(network.named_children()) for network in networks]
        self.shared = nn.Sequential(OrderedDict((name, parts[0][name]) for name in body[:cut]))
        self.experts = nn.ModuleList(nn.Sequential(OrderedDict((n, part[n]) for n in body[cut:])) for part in parts)
        linear: Any = first.get_submodule(head)
        width, classes = linear.in_features, linear.out_features
        self._check_chain(first, linear, example)
        self.heads = nn.ModuleList(CosineHead(int(width), int(classes), scale) for _ in networks)

    @torch.no_grad()
    def _check_chain(self, network: nn.Module, linear: Any, example: Tensor) -> None:
        mode = network.training
        network.eval()
        embedding = embedding_from(self.experts[0](self.shared(example)))
        same = embedding.shape[1] == linear.in_features
        same = same and torch.allclose(linear(embedding), network(example), atol=1e-4)
        network.train(mode)
        if not same:
            raise UserError(
                f"mdcs: {type(network).__name__} does more than to run its children one after the other, so it cannot "
                "be divided; take a ResNet of stillhouse:, timm: or torchvision:."
            )

    def embeddings(self, x: Tensor) -> Tensor:
        """(E, B, D) what goes into each expert's classifier."""
        shared = self.shared(x)
        return torch.stack([embedding_from(expert(shared)) for expert in self.experts])

    def by_expert(self, x: Tensor) -> Tensor:
        """(E, B, C) logits of each expert, not adjusted."""
        return torch.stack([head(h) for head, h in zip(self.heads, self.embeddings(x))])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) their mean."""
        return self.by_expert(x).mean(0)


class OneExpert(nn.Module):
    """The logits of one expert alone."""

    def __init__(self, experts: Experts, number: int) -> None:
        super().__init__()
        self.experts, self.number = experts, number

    def forward(self, x: Tensor) -> Tensor:
        return self.experts.by_expert(x)[self.number]


# ---- training --------------------------------------------------------------------------------------------------------


class MDCS(TrainingModule):
    """Training module: both views in one batch, diversity on both, consistency between them.

    Args:
        student: the experts.
        counts: (C,) training samples of each class.
        exponents: lambda of each expert.
        weight: of the consistency.
        warmup: epochs over which that weight rises; the first epoch has 1 / warmup of it.
        temperature: of the consistency.
        select: only samples that the weak view classifies rightly; False: all.
        view: the strong view's name.
        shared_lr: the learning rate of the shared part; None: that of the rest.

    Raises:
        UserError: a class without samples, or another number of exponents than of experts.
    """

    priors: Tensor

    def __init__(
        self,
        student: Experts,
        counts: Tensor,
        exponents: Sequence[float] = (-0.5, 1.0, 2.5),
        weight: float = 0.6,
        warmup: float = 20,
        temperature: float = 1.0,
        select: bool = True,
        view: str = "strong",
        shared_lr: float | None = None,
    ) -> None:
        super().__init__()
        if len(exponents) != len(student.experts):
            raise UserError(f"mdcs: {len(student.experts)} experts need as many exponents; given: {len(exponents)}.")
        self.student, self.weight, self.warmup, self.temperature = student, weight, warmup, temperature
        self.select, self.view, self.shared_lr = select, view, shared_lr
        self.register_buffer("priors", log_priors(counts, exponents), persistent=False)

    def losses(self, logits: Tensor, targets: Tensor, epoch: int) -> dict[str, Tensor]:
        """`loss` and its terms.

        Args:
            logits: (E, 2N, C) of the weak views and then of the strong ones, not adjusted.
            targets: (2N,).
            epoch: from 1; 0 leaves the consistency out.
        """
        adjusted = logits.float() + self.priors[:, None]
        half = len(targets) // 2
        weak, strong, known = adjusted[:, :half], adjusted[:, half:], targets[:half]
        right = confident(weak, known)
        selected = right if self.select else torch.ones_like(right)
        diversity = diversity_loss(adjusted, targets)
        consistency = consistency_loss(weak, strong, selected, self.temperature)
        factor = self.weight * min(epoch / self.warmup, 1.0) if self.warmup else self.weight
        return {
            "loss": diversity + factor * consistency,
            "diversity": diversity,
            "consistency": consistency,
            "confident": right.float().mean(),
        }

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        both = torch.cat([batch["input"], batch["views"][self.view]])
        experts: Any = self.student
        return self.losses(experts.by_expert(both), batch["label"].repeat(2), progress.epoch + 1)

    def param_groups(self) -> list[dict[str, Any]]:
        experts: Any = self.student
        shared = {id(p) for p in experts.shared.parameters()}
        own = [p for p in experts.parameters() if id(p) not in shared]
        rate = {} if self.shared_lr is None else {"lr": self.shared_lr}
        return [{"params": own}, {"params": list(experts.shared.parameters()), **rate}]


# ---- the procedure ---------------------------------------------------------------------------------------------------


class Division(Spec):
    """How a network is divided among experts; a product is built again by it."""

    experts: int = Field(3, ge=1)
    branch: str = "layer2"
    scale: float = Field(30.0, gt=0)


class Config(MethodConfig):
    data: Data
    student: Model = Field(description="The network that is divided: a ResNet of any library.")
    branch: str = Field("layer2", description="Its first module that each expert has for itself.")
    scale: float = Field(30.0, gt=0, description="Of the cosine classifiers.")
    exponents: list[float] = Field(
        [-0.5, 1.0, 2.5], min_length=1, description="One expert each: how much the logarithm of a class's count weighs."
    )
    weight: float = Field(0.6, ge=0, description="Of the consistency; 0: diversity alone.")
    warmup: float = Field(20, ge=0, description="Epochs over which that weight rises from 0.")
    temperature: float = Field(1.0, gt=0, description="Of the consistency.")
    select: bool = Field(True, description="Only samples that the weak view classifies rightly; false: all.")
    view: str = Field("strong", description="Which of data.views is the strong one; data.augment makes the weak one.")
    shared_rate: float = Field(1.0, gt=0, description="Factor of the learning rate on the shared part.")
    train: TrainSpec = Field(default_factory=TrainSpec)
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])

    @model_validator(mode="after")
    def _has_its_view(self) -> Config:
        if self.view not in (self.data.views or {}):
            raise ValueError(
                f"the strong view '{self.view}' is not among data.views; add data.views: {{{self.view}: [...]}}, the "
                "transforms of the strong augmentation"
            )
        return self

    @property
    def division(self) -> Division:
        return Division(experts=len(self.exponents), branch=self.branch, scale=self.scale)


STUDENT = Stage("student", "train the experts on weak and strong views")


class DiverseExperts(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data, Classification)
        check_groups(bundle.task, config.evaluate)
        experts = self.experts(config, run)
        size = f"{config.student.model} as {len(config.exponents)} experts, "
        size += f"{sum(p.numel() for p in experts.parameters()):,} parameters"
        steps = config.train.epochs * len(run.loader(config.data, "train", config.train.batch_size, train=True))
        return [STUDENT.filled(models={"student": size}, steps=steps)]

    def experts(self, config: Config, run: Run) -> Experts:
        """The network, not trained."""
        roles = ["student", *(f"expert.{i}" for i in range(1, len(config.exponents)))]
        networks = [run.model(config.student, config.data, role) for role in roles]
        example = run.data(config.data).task.example()["input"]
        return divided(networks, config.division, example)

    def run(self, config: Config, run: Run) -> ExpertStudent:
        experts = self.experts(config, run)
        train = run.loader(config.data, "train", config.train.batch_size, train=True)
        counts = torch.bincount(train.labels(), minlength=run.data(config.data).num_classes)
        module = MDCS(
            experts,
            counts,
            config.exponents,
            config.weight,
            config.warmup,
            config.temperature,
            config.select,
            config.view,
            config.shared_rate * config.train.optimizer.lr,
        )
        fitted = run.fit(
            STUDENT,
            module,
            train,
            config.train,
            evaluate=run.validating(config.data),
            splits=run.splits(config.data),
        )
        figures = {"train_seconds": fitted.seconds, **self.by_expert(config, run, experts)}
        task = run.data(config.data).task
        return ExpertStudent(experts, config.student, task, figures, division=config.division)

    def by_expert(self, config: Config, run: Run, experts: Experts) -> dict[str, float]:
        """Each expert's accuracy on test data, by class frequency where counts are known; what the expert of the
        largest exponent wins on rare classes and that of the smallest on all others; how often two experts disagree."""
        loader, device = run.loader(*run.judging_data()), next(experts.parameters()).device
        counts = torch.tensor(run.data(config.data).task.train_counts)
        out: dict[str, float] = {}
        predicted: list[Tensor] = []
        for number in range(len(experts.experts)):
            logits, labels = collect_logits(OneExpert(experts, number).eval(), loader, device)
            predicted.append(logits.argmax(-1))
            right = predicted[-1] == labels
            figures = {"accuracy": right.double().mean().item()}
            figures |= accuracy_by_frequency(right, labels, counts) if len(counts) else {}
            out |= {f"{k}_expert_{number + 1}": v for k, v in figures.items()}
        if len(counts):
            order = sorted(range(len(predicted)), key=config.exponents.__getitem__)
            head, tail = (predicted[i] == labels for i in (order[0], order[-1]))
            out |= gains_by_frequency(head, tail, labels, counts)
        pairs = [(a != b).double().mean() for a, b in combinations(predicted, 2)]
        return {**out, "expert_disagreement": float(torch.stack(pairs).mean())} if pairs else out


# ---- the product -----------------------------------------------------------------------------------------------------


def divided(networks: Sequence[nn.Module], division: Division, example: Tensor) -> Experts:
    """Networks as `Experts`."""
    return Experts(networks, division.branch, example, division.scale)


@dataclass
class ExpertStudent(Student):
    """A network divided among experts.

    Attributes:
        division: how; the network is built again by it.
    """

    kind: ClassVar[str] = "stillhouse.methods.classification.mdcs:ExpertStudent"
    division: Division = field(default_factory=Division)

    def extras(self) -> dict[str, Any]:
        return {"division": self.division.model_dump(mode="json")}

    @classmethod
    def rebuilt(cls, meta: Mapping[str, Any], spec: ModelSpec, task: Task, folder: Path) -> ExpertStudent:
        division = Division.model_validate(meta["division"])
        networks = [task.build(spec) for _ in range(division.experts)]
        module = divided(networks, division, task.example()["input"])
        load_weights(module, task.weights_file(folder), owner=f"model {spec.model}")
        return cls(module.eval(), spec, task, division=division)


evaluates(ExpertStudent.kind)(evaluate)

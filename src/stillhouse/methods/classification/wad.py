"""WAD: pseudo-labels of an unlabelled pool that also holds unknown classes, weighted by a contrastive teacher.

paper: Semi-Supervised Learning via Weight-aware Distillation under Class Distribution Mismatch
venue: ICCV 2023
arxiv: 2308.11874
task: classification
family: semi-supervised, self-supervised teacher
use when: few labels, and many unlabelled images of which some belong to no class of the task
needs: labels of at least two classes, `data.unlabelled`; no trained teacher

SimCLR trains the teacher on all images without labels. The score of an unlabelled image for a class is its largest
cosine with a labelled image of that class; the best class is its pseudo-label, and the best score less the second best
its weight, near 0 for images of unknown classes. The student learns labels, and pseudo-labels times weights. After each
round the images on which student and teacher agree best, a share alpha (1 - i/S)^2 of the pool, move to the labelled
ones with their pseudo-labels, which are not revised: rounds 1 to S - 1 move images, S and S + 1 none.
The paper derives the weight from point-wise mutual information; this is the form of the released code, whose quotient
s1 (1 - s2/s1) is written as the difference that it is. The code computes features on one random view even for
judging; here on the whole image, or with `feature_views` on the mean of some views. Its inputs are contrast-normalised
and whitened (ZCA); here they are normalised as everywhere. Its shift transformations are switched off there, and absent
here. `pool_loss` has the baselines: `one` weighs all alike, `fixmatch` trusts the student's own confident predictions,
`none` learns the labels alone. With many unknown classes and a weak teacher the moves can do harm: watch
`moved_precision`, and lower `alpha`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, DataSpec, MethodConfig, Model, ModelSpec, TrainSpec
from stillhouse.data import BatchKey, Loader, Streams
from stillhouse.data.joined import JoinedDataset, Part
from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision
from stillhouse.functional.pseudo_labels import confident_pseudo_loss
from stillhouse.methods.distillation import describe
from stillhouse.models.anatomy import classifier
from stillhouse.processes import share
from stillhouse.randomness import key as keys
from stillhouse.randomness import keyed
from stillhouse.runs.judging import check_groups
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, call_model, evaluating, read_logits, to_device
from stillhouse.tasks.classification import Classification
from stillhouse.training.context import Progress
from stillhouse.training.module import TrainingModule

SECOND = "second view"
JITTER = {"ColorJitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}}
SIMCLR: list[str | dict[str, Any]] = [
    {"RandomResizedCrop": {"size": 32, "scale": [0.08, 1.0], "antialias": True}},
    "RandomHorizontalFlip",
    {"RandomApply": {"transforms": [JITTER], "p": 0.8}},
    {"RandomGrayscale": {"p": 0.2}},
]
"""The published augmentation, of images of 32 pixels."""

# ---- the teacher -----------------------------------------------------------------------------------------------------


@full_precision
def nt_xent(features: Tensor, temperature: float = 0.5) -> Tensor:
    """SimCLR's loss of features (2B, D), of which row i and row i + B are two views of one image.

    Chen et al., ICML 2020 (arXiv 2002.05709), eq. 1.
    """
    z = unit(features)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    count = len(z) // 2
    partner = torch.arange(2 * count, device=z.device).roll(count)
    return F.cross_entropy(similarity, partner)


def unit(features: Tensor) -> Tensor:
    """(N, D) rows over their length plus 1e-8."""
    return features / (features.norm(dim=1, keepdim=True) + 1e-8)


class Contrastive(TrainingModule):
    """Training module of SimCLR: the network on both views of a batch.

    Args:
        student: images -> (B, D) projected features.
        temperature: of the loss.
    """

    def __init__(self, student: nn.Module, temperature: float = 0.5) -> None:
        super().__init__()
        self.student, self.temperature = student, temperature

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        both = torch.cat([batch["input"], batch["views"][SECOND]])
        return {"loss": nt_xent(self.student(both), self.temperature)}


def with_projector(network: nn.Module, example: Tensor, width: int) -> nn.Module:
    """The network with a projector (linear, ReLU, linear to `width`) in place of its classifier.

    Raises:
        UserError: a classifier that is no linear layer.
    """
    name = classifier(network, {"input": example})
    linear = network.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise UserError(f"wad: the teacher's classifier '{name}' must be a linear layer; choose another network.")
    inputs = linear.in_features
    projector = nn.Sequential(nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, width))
    network.set_submodule(name, projector)
    return network


# ---- what the teacher knows ------------------------------------------------------------------------------------------


def similarities(unlabelled: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """(U, K) the largest cosine of each unlabelled image with the labelled images of each class.

    Args:
        unlabelled: (U, D) features.
        groups: of each class, (n_k, D).

    Raises:
        UserError: fewer than two classes, or one without labelled images.
    """
    if len(groups) < 2:
        raise UserError("wad needs at least two classes, as its weight is the gap between the two best.")
    empty = [k for k, group in enumerate(groups) if not len(group)]
    if empty:
        raise UserError(f"wad: class {empty[0]} has no labelled image to compare with; label some of each class.")
    z = unit(unlabelled)
    return torch.stack([(z @ unit(group).T).amax(1) for group in groups], 1)


def pseudo_labels(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """(U,) the best class of each image, and its weight (U,): the best score less the second best."""
    best = similarity.topk(2, dim=1)
    return best.indices[:, 0], best.values[:, 0] - best.values[:, 1]


# ---- the student -----------------------------------------------------------------------------------------------------


@full_precision
def weighted_pseudo_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean over the batch of weight times cross-entropy; not divided by the sum of the weights. (B, C), (B,), (B,)."""
    return (weights * F.cross_entropy(logits, labels, reduction="none")).mean()


def alpha_at(step: int, alpha: float = 0.1, split: int = 5, power: float = 2.0, least: float = 0.0) -> float:
    """Share of the pool that moves after round `step` (from 1)."""
    return least + (alpha - least) * (1 - min(step, split) / split) ** power


def reliable(similarity: Tensor, ids: Tensor, logits: Tensor, logit_ids: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Ids and pseudo-labels of the int(alpha U) images on which the student's cross-entropy with the teacher's
    pseudo-label is smallest, in that order.

    Args:
        similarity: (U, K) of the images `ids` (U,).
        logits: (U, K) of the student, of the images `logit_ids` (U,): the same, in any order.
        alpha: share of the images.

    Raises:
        UserError: other images on one side than on the other.
    """
    order, own = ids.sort(), logit_ids.sort()
    if not torch.equal(order.values, own.values):
        raise UserError("wad: the student's outputs and the teacher's scores must be of the same images.")
    label = similarity[order.indices].argmax(1)
    loss = F.cross_entropy(logits[own.indices], label, reduction="none")
    chosen = loss.argsort(stable=True)[: int(alpha * len(ids))]
    return order.values[chosen], label[chosen]


class WAD(TrainingModule):
    """Training module of the student.

    Args:
        student: the classifier.
        labels, weights: (U,) of the unlabelled images, by their index in the batch.
        pool_loss: weighted, one (all weights 1), fixmatch, or none.
        threshold, view: fixmatch: the confidence, and the name of the strong view.
    """

    labels: Tensor
    weights: Tensor

    def __init__(
        self,
        student: nn.Module,
        labels: Tensor,
        weights: Tensor,
        pool_loss: Literal["weighted", "one", "fixmatch", "none"] = "weighted",
        threshold: float = 0.95,
        view: str = "strong",
    ) -> None:
        super().__init__()
        self.student, self.pool_loss, self.threshold, self.view = student, pool_loss, threshold, view
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("weights", weights if pool_loss == "weighted" else torch.ones_like(weights), False)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        known = F.cross_entropy(self._logits(batch), batch["label"])
        if self.pool_loss == "none":
            return {"loss": known, "labelled": known}
        other = batch["unlabelled"]
        if self.pool_loss == "fixmatch":
            with torch.no_grad():
                weak = self._logits(other)
            strong = self._logits({"input": other["views"][self.view]})
            pool = confident_pseudo_loss(weak, strong, self.threshold)
        else:
            index = other["index"]
            pool = weighted_pseudo_loss(self._logits(other), self.labels[index], self.weights[index])
        return {"loss": known + pool, "labelled": known, "unlabelled": pool}

    def _logits(self, batch: Batch) -> Tensor:
        return read_logits(call_model(self.student, batch)).float()


# ---- the procedure ---------------------------------------------------------------------------------------------------


class ContrastiveTeacher(ModelSpec):
    """A network that SimCLR trains on all images, labelled or not, without labels."""

    width: int = Field(128, ge=1, description="Of the projected features.")
    temperature: float = Field(0.5, gt=0, description="Of the contrastive loss.")
    augment: list[str | dict[str, Any]] = Field(default_factory=lambda: list(SIMCLR), description="Of both views.")
    train: TrainSpec = Field(default_factory=TrainSpec)
    seed: int = Field(0, description="Of its training; one teacher serves all seeds of a comparison.")

    @property
    def network(self) -> ModelSpec:
        """The network alone."""
        return ModelSpec(**self.model_dump(include=set(ModelSpec.model_fields)))


class Config(MethodConfig):
    data: Data = Field(description="With `unlabelled`: the pool.")
    teacher: ContrastiveTeacher
    student: Model
    pool_loss: Literal["weighted", "one", "fixmatch", "none"] = Field(
        "weighted",
        description="On unlabelled images: pseudo-labels by weight, all alike, the student's own confident ones, none.",
    )
    feature_views: int = Field(0, ge=0, description="Random views over which the teacher's features are averaged.")
    threshold: float = Field(0.95, ge=0, le=1, description="fixmatch: the confidence.")
    view: str = Field("strong", description="fixmatch: which of data.views is the strong one.")
    alpha: float = Field(0.1, ge=0, le=1, description="Share of the pool that a round 0 would move; 0: none moves.")
    split: int = Field(5, ge=1, description="S: rounds after which nothing moves; S + 1 rounds are trained.")
    power: float = Field(2.0, gt=0, description="How fast the share falls.")
    steps: int = Field(1500, ge=1, description="Optimiser steps of a round.")
    train: TrainSpec = Field(
        default_factory=lambda: TrainSpec.model_validate(
            {
                "epochs": 1,
                "batch_size": 32,
                "optimizer": {"name": "adam", "lr": 5e-4, "weight_decay": 0.0},
                "schedule": {"name": "constant"},
            }
        ),
        description="Of one round; its length is `steps`.",
    )
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])

    @field_validator("train")
    @classmethod
    def _is_as_long_as_its_steps(cls, train: TrainSpec) -> TrainSpec:
        if "epochs" in train.model_fields_set and train.epochs != 1:
            raise ValueError("a round is as long as `steps`; leave epochs out")
        return train.model_copy(update={"epochs": 1})

    @model_validator(mode="after")
    def _has_its_view(self) -> Config:
        if self.data.unlabelled is None:
            raise ValueError("it learns from unlabelled images too: set data.unlabelled, such as {size: 1000}")
        pool = self.data.unlabelled.data or self.data
        if self.pool_loss == "fixmatch" and self.view not in (pool.views or {}):
            raise ValueError(f"fixmatch needs a strong view: add '{self.view}' to data.views")
        return self


TEACHER = Stage("teacher", "train the contrastive teacher on all images (stored, shared)")
ROUND = Stage("round", "train the student and move reliable images")


class WeightAware(Method[Config]):
    unlabelled = True

    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data, Classification)
        check_groups(bundle.task, config.evaluate)
        if bundle.num_classes < 2:
            raise UserError("wad needs at least two classes, as its weight is the gap between the two best.")
        model, student = (run.model(spec, config.data) for spec in (config.teacher.network, config.student))
        loader = self.images(config, run)
        pool, rounds = len(run.unlabelled(config.data, train=False)), config.split + 1
        return [
            TEACHER.filled(
                models={"teacher": describe(config.teacher.model, model)},
                steps=config.teacher.train.epochs * len(loader),
            ),
            ROUND.filled(
                does=f"{rounds} rounds: train the student with {pool} unlabelled images, and move reliable ones",
                models={"student": describe(config.student.model, student)},
                steps=rounds * config.steps,
            ),
        ]

    # -- data

    def images(self, config: Config, run: Run) -> Loader:
        """Two views of all images, for the teacher."""
        spec, batch = self.viewed(config), config.teacher.train.batch_size
        own = run.data(spec).dataset("train", train=True)
        other = run.unlabelled(spec, train=True)
        joined = JoinedDataset([Part(data, np.arange(len(data))) for data in (own, other)])
        return Loader(joined, batch, seed=run.seed, shuffle=True, drop_last=True, workers=spec.workers, **share())

    def viewed(self, config: Config) -> DataSpec:
        """The recipe's data with two contrastive views."""
        views = {"augment": config.teacher.augment, "views": {SECOND: config.teacher.augment}}
        spec, other = config.data.model_copy(update=views), config.data.unlabelled
        if other is not None and other.data is not None:
            own = other.model_copy(update={"data": other.data.model_copy(update=views)})
            spec = spec.model_copy(update={"unlabelled": own})
        return spec

    # -- the teacher

    def features(self, config: Config, run: Run) -> dict[str, Tensor]:
        """The teacher's features of all images, `labelled` (N, D) and `unlabelled` (U, D)."""
        seed, spec = config.teacher.seed, config.data
        bundle = run.data(spec)
        assert spec.unlabelled is not None
        pool = run.data(spec.unlabelled.data) if spec.unlabelled.data is not None else None

        def make() -> dict[str, Any]:
            with run.seeded(seed):
                network = run.model(config.teacher.network, spec, "teacher", seed)
                with keyed("projector", seed):
                    with_projector(network, bundle.task.example()["input"], config.teacher.width)
                module = Contrastive(network, config.teacher.temperature)
                run.fit(TEACHER, module, self.images(config, run), config.teacher.train)
                data = self.viewed(config) if config.feature_views else spec
                augmented = bool(config.feature_views)
                own = run.data(data).dataset("train", train=augmented)
                other = run.unlabelled(data, train=augmented)
                found = {"labelled": own, "unlabelled": other}
                views = max(config.feature_views, 1)
                return {k: features_of(network, v, views, seed, run.device) for k, v in found.items()}

        uses = {
            "teacher": config.teacher.model_dump(mode="json", exclude={"train"}),
            "train": config.teacher.train,
            "views": config.feature_views,
            "data": bundle,
            "pool": pool,
            "image_size": config.data.image_size,
        }
        return run.stage(TEACHER, make, uses)

    # -- the rounds

    def run(self, config: Config, run: Run) -> Student:
        features, bundle = self.features(config, run), run.data(config.data)
        own, pool = bundle.dataset("train", train=True), run.unlabelled(config.data, train=True)
        truth, seconds = pool.labels(), 0.0
        if config.data.unlabelled is not None and config.data.unlabelled.data is not None:
            truth = torch.full_like(truth, -1)  # of another data set: its classes are others
        rows, labels = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        student = run.model(config.student, config.data)
        figures: dict[str, float] = {}
        for number in range(1, config.split + 2):
            left = torch.ones(len(pool), dtype=torch.bool).index_fill(0, rows, False).nonzero()[:, 0]
            if len(left) < 2 or not len(own):
                break
            known = torch.cat([features["labelled"], features["unlabelled"][rows]])
            classes = torch.cat([own.labels(), labels])
            groups = [known[classes == k] for k in range(bundle.num_classes)]
            similarity = similarities(features["unlabelled"][left], groups)
            if number == 1:
                figures |= weight_figures(similarity, truth[left])
            start = student.state_dict()

            def make(
                number: int = number,
                left: Tensor = left,
                similarity: Tensor = similarity,
                rows: Tensor = rows,
                labels: Tensor = labels,
            ) -> dict[str, Any]:
                fitted = self.fit(config, run, student, number, (rows, labels), left, similarity)
                logits = logits_of(student, run.unlabelled(config.data, train=False), left, run.device)
                alpha = alpha_at(number, config.alpha, config.split, config.power)
                moved, given = reliable(similarity, left, logits, left, alpha)
                return {
                    "student": state_on_cpu(student),
                    "moved": {"rows": moved, "labels": given},
                    "seconds": fitted,
                }

            uses = {
                "config": config.model_dump(mode="json", exclude={"variants", "claims", "groups", "name", "train"}),
                "train": config.train,
                "data": bundle,
                "student": {k: v for k, v in start.items()},
                "features": [features["labelled"], features["unlabelled"]],
                "moved": [rows, labels],
                "seed": run.seed,
            }
            made = run.stage(f"{ROUND}.{number}", make, uses, shared=False)
            student.load_state_dict(made["student"])
            seconds += made["seconds"]
            rows = torch.cat([rows, made["moved"]["rows"]])
            labels = torch.cat([labels, made["moved"]["labels"]])
        figures |= {"moved": float(len(rows)), "train_seconds": seconds}
        if len(rows):
            figures["moved_precision"] = (truth[rows] == labels).double().mean().item()
        return run.student(student, config.student, config.data, figures)

    def fit(
        self,
        config: Config,
        run: Run,
        student: nn.Module,
        number: int,
        moved: tuple[Tensor, Tensor],
        left: Tensor,
        similarity: Tensor,
    ) -> float:
        """One round's training, with a new optimiser; its seconds."""
        spec, other, batch = config.data, config.data.unlabelled, config.train.batch_size
        own, pool = run.data(spec).dataset("train", train=True), run.unlabelled(config.data, train=True)
        known = [Part(own, np.arange(len(own)), labelled=True)]
        if len(moved[0]):
            known.append(Part(pool, moved[0].numpy(), labels=moved[1]))
        rest = JoinedDataset([Part(pool, left.numpy())])
        seed, workers = keys(run.seed, "round", number), spec.workers
        assert other is not None

        def loader(data: JoinedDataset, size: int, seed: int) -> Loader:
            size = max(min(size, len(data)), 1)
            return Loader(data, size, seed=seed, shuffle=True, drop_last=True, workers=workers, **share())

        streams = Streams(
            loader(JoinedDataset(known), batch, seed),
            loader(rest, other.batch_size or batch, keys(seed, "unlabelled")),
            config.steps,
        )
        labels, weights = pseudo_labels(similarity)
        module = WAD(student, labels, weights, config.pool_loss, config.threshold, config.view)
        return run.fit(f"{ROUND}.{number}", module, streams, config.train, evaluate=run.validating(spec)).seconds


@torch.no_grad()
def features_of(network: nn.Module, dataset: Any, views: int, seed: int, device: torch.device) -> Tensor:
    """(N, D) features of a data set, the mean over some epochs' views of each image."""
    network.to(device)
    total: Any = 0
    with evaluating(network):
        for epoch in range(views):
            parts = []
            for rows in np.array_split(np.arange(len(dataset)), max(len(dataset) // 256, 1)):
                batch = to_device(dataset.batch(BatchKey(epoch, rows, 0, len(rows)), seed), device)
                parts.append(read_logits(call_model(network, batch)).float().cpu())
            total = total + torch.cat(parts) / views
    found: Tensor = total
    return found


@torch.no_grad()
def logits_of(student: nn.Module, dataset: Any, rows: Tensor, device: torch.device) -> Tensor:
    """(n, C) logits of some rows of a data set, in evaluation mode."""
    parts = []
    with evaluating(student):
        for part in rows.split(256):
            batch = to_device(dataset.batch(BatchKey(0, part.numpy(), 0, len(part)), 0), device)
            parts.append(read_logits(call_model(student, batch)).float().cpu())
    return torch.cat(parts)


def weight_figures(similarity: Tensor, truth: Tensor) -> dict[str, float]:
    """How weights tell known from unknown classes, and how good pseudo-labels are, against true labels (U,), -1 for
    unknown classes: `weight_auroc`, `weight_known`, `weight_foreign`, `pseudo_accuracy`."""
    from sklearn.metrics import roc_auc_score

    label, weight = pseudo_labels(similarity)
    known = truth >= 0
    out: dict[str, float] = {}
    if known.any():
        out["weight_known"] = weight[known].mean().item()
        out["pseudo_accuracy"] = (label == truth)[known].double().mean().item()
    if (~known).any():
        out["weight_foreign"] = weight[~known].mean().item()
    if len(out) == 3:
        out["weight_auroc"] = float(roc_auc_score(known.numpy(), weight.numpy()))
    return out

"""How networks are trained for the judge of synthetic sets: each from scratch, as a stage of its own, on the set or on
real data, and tested on real data.

An interrupted evaluation resumes, and what is trained on real data is trained once for all methods on the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.config.specs import DataSpec, ModelSpec
from stillhouse.data import Loader
from stillhouse.errors import UserError
from stillhouse.evaluation.classification import evaluate_classifier
from stillhouse.models import build
from stillhouse.randomness import keyed
from stillhouse.runs.run import Run
from stillhouse.signals import Batch
from stillhouse.synthetic import training
from stillhouse.synthetic.config import AugmentSpec, EvaluateSpec
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.training import HardTraining, SoftTraining, Training

Recipe = Callable[[EvaluateSpec, int], Training]
"""(how, seed) -> what a network learns from and how."""

TrainingChange = Callable[[SoftTraining], Training]
"""The plain training with soft labels -> a product's own."""


@dataclass
class NetworkResult:
    """The result of one network: accuracy after the last epoch, the best of its epochs (with `best_every`; else the
    last), and seconds of training."""

    accuracy: float
    best: float
    seconds: float


class Judging:
    """One evaluation: the data, and the one way in which networks are trained and tested.

    Attributes:
        images, labels: what the set trains networks on, on the run's device.
        augment: of training.
        data: (fingerprint) of real data as networks on this set see it.
    """

    def __init__(self, product: SyntheticSet, run: Run, soft: TrainingChange | None = None) -> None:
        self.product, self.run, self.soft = product, run, soft or (lambda plain: plain)
        config: Any = run.config  # a DatasetConfig, or one that has its keys
        self.config = config
        self.spec: EvaluateSpec = config.evaluate
        self.augment: AugmentSpec = self.spec.augment or config.augment
        self.images, self.labels = (t.to(run.device) for t in product.training_images())
        bundle = run.data(config.data)
        self.data = bundle.fingerprint + ("-whitened" if product.whitening is not None else "")
        self.num_classes, self.input_shape = bundle.num_classes, bundle.input_shape
        self.stage = f"evaluate.{self.spec.protocol}"
        self._batches: dict[str, list[Batch]] = {}
        self._real: tuple[Tensor, Tensor] | None = None
        self.test = first_split(run, config.data, "test", "val", "holdout")

    def batches(self, split: str) -> list[Batch]:
        """Real data as networks trained on this set see it."""
        if split not in self._batches:
            loader = self.run.loader(self.config.data, split)
            self._batches[split] = [{**batch, "input": self.product.prepared(batch["input"])} for batch in loader]
        return self._batches[split]

    def real(self) -> tuple[Tensor, Tensor]:
        """All training images, without augmentation, and their labels, on the device."""
        if self._real is None:
            dataset = self.run.data(self.config.data).dataset("train", train=False)
            images = torch.cat([self.product.prepared(b["input"]) for b in Loader(dataset, 512)])
            self._real = images.to(self.run.device), dataset.labels().to(self.run.device)
        return self._real

    # ---- what networks learn from ------------------------------------------------------------------------------------

    def own(self, augment: AugmentSpec) -> Recipe:
        """The set under its protocol."""
        return self.soft_labels(self.product, augment) if self.spec.protocol == "soft" else self.hard_labels(augment)

    def hard_labels(self, augment: AugmentSpec, classes: Sequence[int] | None = None) -> Recipe:
        """The set with class ids, or the images of some classes, numbered in this order."""
        images, labels = self.images, self.labels
        if classes is not None:
            places = renumbered(labels, classes, self.num_classes)
            images, labels = images[places >= 0], places[places >= 0]
        return lambda spec, seed: HardTraining.of(
            images, labels, _with_hard_labels(spec), augment, self.product.lr, ("judge", seed)
        )

    def soft_labels(self, product: SyntheticSet, augment: AugmentSpec) -> Recipe:
        """A set with its soft labels."""
        return lambda spec, seed: self.soft(SoftTraining.of(product, spec, augment, self.run.device, ("judge", seed)))

    def all_real(self) -> Recipe:
        """All training images, over `full_epochs`, at the default rate or one that is tried."""
        images, labels = self.real()

        def made(spec: EvaluateSpec, seed: int) -> Training:
            rate = spec.lr if spec.rates else None
            how = _with_hard_labels(spec).model_copy(update={"epochs": spec.full_epochs, "lr": rate})
            return HardTraining.of(images, labels, how, self.augment, None, ("full", seed))

        return made

    # ---- networks ----------------------------------------------------------------------------------------------------

    def networks(
        self,
        name: str,
        learns: Recipe,
        trained_on: str | None = None,
        *,
        spec: EvaluateSpec | None = None,
        model: ModelSpec | None = None,
        count: int | None = None,
        seeds: Sequence[int] | None = None,
        classes: Sequence[int] | None = None,
        split: str | None = None,
    ) -> list[NetworkResult]:
        """Networks trained and tested, each a stage of its own.

        Args:
            name: of the stages.
            learns: what each learns from.
            trained_on: identity of its images and labels; default: the set's.
            spec: how; default: the recipe's `evaluate`.
            model: default: the judge's.
            count: default: as many as `evaluate.networks`.
            seeds: of the networks, in place of `count`; default: the run's own.
            classes: with outputs for these alone, numbered in this order, and tested on them.
            split: tested on; default: the test split.
        """
        spec, model, split = spec or self.spec, model or self.spec.network or self.config.network, split or self.test
        seeds = seeds or [1000 * self.run.seed + n for n in range(count or spec.networks)]
        return [
            self._network(f"{name}.{n}", learns(spec, s), trained_on, spec, model, s, classes, split)
            for n, s in enumerate(seeds)
        ]

    def _network(
        self,
        name: str,
        how: Training,
        trained_on: str | None,
        spec: EvaluateSpec,
        model: ModelSpec,
        seed: int,
        classes: Sequence[int] | None,
        split: str,
    ) -> NetworkResult:
        def make() -> dict[str, float]:
            test = (
                self.batches(split) if classes is None else _of_classes(self.batches(split), classes, self.num_classes)
            )

            def accuracy(network: nn.Module) -> float:
                return evaluate_classifier(network, test, self.run.device, ["accuracy"])["accuracy"]

            with keyed("model", "judge", seed):
                network = build(model, self.num_classes if classes is None else len(classes), self.input_shape).to(
                    self.run.device
                )
            best = None if spec.best_every is None else training.Best(spec.best_every, accuracy)
            seconds = training.train(self.run, name.rpartition(".")[0], network, how, best)
            last = accuracy(network)
            return {"accuracy": last, "best": last if best is None else best.value, "seconds": seconds}

        uses = {
            "model": model.model_dump(mode="json"),
            "images": trained_on or self.product.fingerprint,
            "test": [self.data, split],
            "training": how.facts(),
            "classes": None if classes is None else list(classes),
            "best_every": spec.best_every,
            "seed": seed,
        }
        return NetworkResult(**self.run.stage(name, make, uses))


def first_split(run: Run, data: DataSpec, *splits: str) -> str:
    """The first of these splits that the data has. Raises `UserError` where there is none."""
    found = next((s for s in splits if run.data(data).has(s)), None)
    if found is None:
        raise UserError(
            "There is no data to judge the synthetic set by: give the data set a test folder, or set data.val to a "
            "share above 0."
        )
    return found


def _with_hard_labels(spec: EvaluateSpec) -> EvaluateSpec:
    """The hard protocol's own defaults, where a recipe's optimiser is meant for soft labels; a rate that is tried
    counts under both."""
    if spec.protocol == "hard":
        return spec
    own = dict.fromkeys(("optimizer", "schedule", "weight_decay", "batch_size"))
    return spec.model_copy(update=own | {"lr": spec.lr if spec.rates else None})


def renumbered(labels: Tensor, classes: Sequence[int], num_classes: int) -> Tensor:
    """Labels (N,) as places in `classes`; -1 where a class is not among them."""
    places = torch.full((num_classes,), -1, device=labels.device)
    places[torch.tensor(classes, device=labels.device)] = torch.arange(len(classes), device=labels.device)
    return places[labels]


def _of_classes(batches: Sequence[Batch], classes: Sequence[int], num_classes: int) -> list[Batch]:
    """The samples of some classes, with their labels renumbered."""
    x, label = (torch.cat([b[key] for b in batches]) for key in ("input", "label"))
    places = renumbered(label, classes, num_classes)
    return [{"input": x[places >= 0], "label": places[places >= 0]}]

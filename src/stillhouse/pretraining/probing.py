"""How a pre-trained encoder is judged: nearest neighbours and a linear probe on its frozen features, and fine-tuning on
few labels.

The linear probe becomes the encoder's classifier, so that the product predicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config.specs import DataSpec, ModelSpec, Objectives, ObjectiveSpec, Spec, TrainSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.teachers import FrozenTeacher, Reader
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.errors import UserError
from stillhouse.evaluation.probes import collect_features, knn_accuracy, linear_probe, probe_accuracy
from stillhouse.models import anatomy
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, evaluating, to_device
from stillhouse.tasks.classification import Classification

Augment = Literal["standard", "plain"] | list[str | dict[str, Any]]


class ProbeSpec(Spec):
    """Probes of frozen features, on the training labels."""

    neighbours: int = Field(20, ge=1, description="Of the nearest-neighbour classifier, by cosine.")
    penalty: float = Field(1.0, gt=0, description="Logistic regression's C: the inverse weight of its L2 penalty.")
    iterations: int = Field(1000, ge=1, description="Of the logistic regression's solver, at most.")


class FineTune(Spec):
    """Fine-tuning of the whole encoder with labels."""

    labels_per_class: int | None = Field(10, ge=1, description="Labels of each class; null: all.")
    augment: Augment | None = Field(None, description="As of the data; null: as in pre-training.")
    mixup: float = Field(0.0, ge=0, description="Mixup's alpha; 0 is off.")
    cutmix: float = Field(0.0, ge=0, description="CutMix's alpha; 0 is off.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Further options of the network, such as drop_path_rate.",
    )
    objectives: Objectives = Field(
        default_factory=lambda: [ObjectiveSpec(name="ce")],
        description="As of a distillation, from the fine-tuned teacher where one is named.",
    )
    train: TrainSpec = Field(
        default_factory=TrainSpec,
        description="How; batches of a few samples where there are few.",
    )

    def data(self, data: DataSpec, classes: int) -> DataSpec:
        """The labelled samples, a balanced subset that all seeds of a run share, under this training's augmentation."""
        changes: dict[str, Any] = {"mixup": self.mixup, "cutmix": self.cutmix}
        if self.augment is not None:
            changes["augment"] = self.augment
        if self.labels_per_class is not None:
            changes["size"] = self.labels_per_class * classes
        return data.model_copy(update=changes)


def classifier_of(model: nn.Module, batch: Batch, name: str | None = None) -> nn.Linear:
    """A network's linear classifier, by its name or found by a forward pass. Raises `UserError` for another layer."""
    device = next(model.parameters()).device
    name = name or anatomy.classifier(model, {"input": to_device(batch["input"], device)})
    head = model.get_submodule(name)
    if not isinstance(head, nn.Linear):
        raise UserError(f"Probes and fine-tuning need a linear classifier, but '{name}' is a {type(head).__name__}.")
    return head


def probed(
    run: Run,
    model: nn.Module,
    data: DataSpec,
    spec: ProbeSpec,
    classifier: str | None = None,
) -> dict[str, float]:
    """Fit the probes on training features, judge them on the judging split, and make the linear probe the classifier.

    Features are what goes into the classifier.

    Returns:
        `accuracy_linear` and `accuracy_knn`.

    Raises:
        UserError: a classifier that is no linear layer.
    """
    device, bundle = next(model.parameters()).device, run.data(data, Classification)
    example = to_device(next(iter(run.loader(data, "train", 2))), device)
    head = classifier_of(model, example, classifier)
    reader = Reader(model, "encoder", classifier, bundle.task)
    reader.attach(["embedding"], example)

    def embed(batch: Batch) -> Tensor:
        with evaluating(model):
            found = reader(batch).embedding
        assert found is not None
        return found

    try:
        train = collect_features(embed, run.loader(data, "train"), device)
        test = collect_features(embed, run.loader(*run.judging_data()), device)
    finally:
        reader.close()
    probe = linear_probe(train, bundle.num_classes, spec.penalty, spec.iterations)
    with torch.no_grad():
        head.weight.copy_(probe.weight)
        head.bias.copy_(probe.bias)
    return {
        "accuracy_linear": probe_accuracy(probe, test),
        "accuracy_knn": knn_accuracy(train, test, spec.neighbours),
    }


def fine_tuned(
    run: Run,
    stage: str,
    network: ModelSpec,
    weights: Mapping[str, Tensor],
    data: DataSpec,
    tune: FineTune,
    teacher: FrozenTeacher | None = None,
) -> tuple[nn.Module, dict[str, float]]:
    """The encoder with a new classifier, trained on the labelled samples: the network and its test figures.

    Args:
        stage: name of the training.
        network: how it is built.
        weights: of the pre-trained encoder; its classifier starts near 0.
        data: of which the labelled samples are a part.
        tune: labels and training.
        teacher: what the objectives read.
    """
    bundle = run.data(data, Classification)
    options = {**network.options, **tune.options}
    plain = network.model_copy(update={"checkpoint": None, "pretrained": False, "options": options})
    model = run.model(plain, data, role=stage)
    model.load_state_dict(dict(weights))
    head = classifier_of(model, next(iter(run.loader(data, "train", 2))), network.embedding)
    nn.init.trunc_normal_(head.weight, std=2e-5)
    nn.init.zeros_(head.bias)
    few = tune.data(data, bundle.num_classes)
    module = Distillation(
        model,
        teacher,
        [objective_from_spec(o) for o in tune.objectives],
        seed=run.seed,
        embedding=network.embedding,
        task=bundle.task,
    )
    fitted = run.fit(stage, module, run.loader(few, "train", tune.train.batch_size, train=True), tune.train)
    module.close()
    figures = run.figures(model, data, run.loader(*run.judging_data()), run.device, ["accuracy"])
    return model, {"accuracy": figures["accuracy"], "train_seconds": fitted.seconds}

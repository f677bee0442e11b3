"""What every method that pre-trains an encoder does around its loss: the stage that trains it, and the judged
product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import Data, DataSpec, MethodConfig, Model, TrainSpec
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.evaluation.cost import times_in_turns
from stillhouse.pretraining.probing import FineTune, ProbeSpec, fine_tuned, probed
from stillhouse.runs.judging import check_groups
from stillhouse.runs.method import Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.tasks.classification import Classification
from stillhouse.training.context import Progress


class PretrainingConfig(MethodConfig):
    data: Data
    student: Model = Field(
        description="A plain ViT with a class token, such as timm:vit_tiny_patch16_224 with options (fc_norm: false).",
    )
    train: TrainSpec = Field(default_factory=TrainSpec, description="Of the student's pre-training.")
    probe: ProbeSpec = Field(default_factory=ProbeSpec)
    fine_tune: FineTune | None = Field(default_factory=FineTune, description="null: probes only.")
    evaluate: list[str] = Field(
        default_factory=lambda: ["quality", "cost"],
        description="Groups of figures: accuracy, calibration, quality for both, cost, and step (times of a step).",
    )


def training_data(run: Run, data: DataSpec) -> dict[str, Any]:
    """What trained weights depend on of the data, as JSON data: samples and augmentation."""
    augment = data.model_dump(mode="json", include={"augment", "mixup", "cutmix", "image_size"})
    return {"data": run.data(data).fingerprint, "augment": augment}


def steps_of(run: Run, data: DataSpec, train: TrainSpec) -> int:
    """Batches of a training."""
    return train.epochs * len(run.loader(data, "train", train.batch_size, train=True))


def pretraining_stage(run: Run, config: PretrainingConfig, what: str) -> Stage:
    """The plan's line of the stage `student`."""
    check_groups(run.data(config.data, Classification).task, config.evaluate)
    does = f"pre-train the student by {what} (stored, shared)"
    return Stage("student", does, {"student": config.student.model}, steps=steps_of(run, config.data, config.train))


def tuning_stages(config: PretrainingConfig) -> list[Stage]:
    """The plan's line of the fine-tuning, where there is one."""
    if config.fine_tune is None:
        return []
    labels = config.fine_tune.labels_per_class
    amount = "all labels" if labels is None else f"{labels} labels a class"
    return [Stage("fine_tune", f"fine-tune a copy of the encoder with {amount}")]


def pretrained(
    run: Run,
    config: PretrainingConfig,
    module: Callable[[], Any],
    uses: Mapping[str, Any],
    measure: Callable[[Any, Tensor], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """The stage `student`: {"weights": of the encoder, "figures": seconds of training, and what `measure` adds}.

    Args:
        run: of the method.
        config: its student, data and training are part of the stage's identity.
        module: makes the training module, whose `student` is the encoder.
        uses: all else that the weights depend on, as JSON data.
        measure: (module, a batch of images) -> figures, where the recipe evaluates `step`.
    """
    measured = measure is not None and "step" in config.evaluate

    def make() -> dict[str, Any]:
        trained = module()
        loader = run.loader(config.data, "train", config.train.batch_size, train=True)
        figures = {"train_seconds": run.fit("student", trained, loader, config.train).seconds}
        if measured and measure is not None:
            figures |= measure(trained, next(iter(loader))["input"].to(run.device))
        return {"weights": state_on_cpu(trained.student), "figures": figures}

    identity = {
        "method": config.method,
        "student": config.student.model_dump(mode="json"),
        "train": config.train.identity(),
        "seed": run.seed,
        "step": measured,
        **training_data(run, config.data),
    }
    return run.stage("student", make, {**identity, **uses})


def judged(
    run: Run,
    config: PretrainingConfig,
    weights: Mapping[str, Tensor],
    figures: Mapping[str, float],
    teacher: FrozenTeacher | None = None,
) -> Student:
    """The encoder with a linear probe as its classifier; a copy of it is fine-tuned where the recipe says so.

    Args:
        run: of the method.
        config: its probes and fine-tuning.
        weights: of the pre-trained encoder.
        figures: of its making.
        teacher: what the objectives of the fine-tuning read.
    """
    found = dict(figures)
    if config.fine_tune is not None:
        _, tuned = fine_tuned(run, "fine_tune", config.student, weights, config.data, config.fine_tune, teacher)
        found |= {"accuracy_fine_tuned": tuned["accuracy"], "fine_tune_seconds": tuned["train_seconds"]}
    student = run.model(config.student.model_copy(update={"checkpoint": None, "pretrained": False}), config.data)
    student.load_state_dict(dict(weights))
    found |= probed(run, student.to(run.device), config.data, config.probe, config.student.embedding)
    return run.student(student, config.student, config.data, found)


def step_time(module: Any, images: Tensor) -> dict[str, float]:
    """`step_ms`: milliseconds of a pre-training step without the optimiser."""

    def step() -> None:
        module({"input": images}, Progress())["loss"].backward()
        module.zero_grad()

    return {"step_ms": 1000 * times_in_turns({"step": step}, images.device)["step"]}

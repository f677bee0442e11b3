"""MaKD: the student's widened head also answers yes-or-no questions about each image, as a multimodal model answered
them beforehand.

paper: Multi-aspect Knowledge Distillation with Large Language Model
venue: CVPR 2025 workshop FGVC12
arxiv: 2501.13341
task: classification
family: auxiliary outputs
use when: classes are fine-grained or images few, and a multimodal model (or a table of attributes) can answer questions
about the images
needs: questions; their answers for every training image (a file, a vision-language model on disk, or a model trained on
class answers); labels

The classifier gets Q outputs more than classes. The first C learn what `objectives` say (by default `ce`; add `kd` and
a teacher for the paper's CIFAR setting), the others the answers, by binary cross-entropy times `alpha`: 4 in the
released settings, to be tuned in 1 to 50 as it is a mean. After training the Q outputs are removed, or stay with
`keep_aspects: true` as scores of attributes; either way only the C classes are judged. Answers are P(yes) of the first
token, softmax over "Yes" and "No". Each image has one answer a question, whatever the augmentation, as published. A
large model stands behind the paper's answers; `aspects.trained` puts a small image-and-text model in its place, trained
on which classes are a yes. `aspects.annotated` takes those class answers with noise. Questions come from a text file or
the recipe; `question_prompt` and `selection_prompt` word the request to a language model (our wording). Mixup and
CutMix are refused: a mixed image has no answer. Detection heads are not built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec, Objectives, ObjectiveSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Objective, Progress
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision
from stillhouse.methods.classification.makd.aspects import AspectsSpec, aspect_table
from stillhouse.methods.distillation import Config as General
from stillhouse.methods.distillation import describe
from stillhouse.models import build
from stillhouse.models.anatomy import classifier, stages
from stillhouse.randomness import keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.judging import evaluate
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, Signals, read_logits, to_device
from stillhouse.tasks.base import Task
from stillhouse.tasks.classification import Classification


@full_precision
def aspect_loss(aspect_logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy with soft targets, mean over all B * Q entries; its minimum is the targets' mean entropy,
    not 0.

    Args:
        aspect_logits: (B, Q).
        targets: P(yes), (B, Q), in [0, 1].
    """
    if aspect_logits.shape != targets.shape:
        raise UserError(
            f"makd: aspect logits of shape {tuple(aspect_logits.shape)} but answers of {tuple(targets.shape)}; both "
            "must be (B, Q)."
        )
    return F.binary_cross_entropy_with_logits(aspect_logits, targets.to(aspect_logits.dtype))


class WidenedClassifier(nn.Module):
    """A classifier of C + Q outputs that gives the C class logits; the Q aspect logits pass through `aspects`, where a
    tap finds them.

    Args:
        network: any classifier with C + Q outputs.
        num_classes: C.
    """

    def __init__(self, network: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.network, self.num_classes, self.aspects = network, num_classes, nn.Identity()

    @property
    def stage_names(self) -> list[str]:
        return [f"network.{name}" for name in stages(self.network)]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(B, C) class logits."""
        out = read_logits(self.network(*args, **kwargs))
        self.aspects(out[:, self.num_classes :])
        return out[:, : self.num_classes]

    def aspect_probs(self, *args: Any, **kwargs: Any) -> Tensor:
        """P(yes) of every question, (B, Q)."""
        return torch.sigmoid(read_logits(self.network(*args, **kwargs))[:, self.num_classes :].float())


@torch.no_grad()
def strip_aspects(network: nn.Module, num_classes: int, batch: Batch) -> nn.Module:
    """The network with its last layer cut to the first `num_classes` outputs, in place; those outputs stay as they
    were.

    Args:
        batch: any samples, to find the last layer by a forward pass.
    """
    name = classifier(network, batch)
    last = network.get_submodule(name)
    assert isinstance(last, nn.Linear | nn.Conv2d)
    last.weight = nn.Parameter(last.weight[:num_classes].clone())
    if last.bias is not None:
        last.bias = nn.Parameter(last.bias[:num_classes].clone())
    if isinstance(last, nn.Linear):
        last.out_features = num_classes
    else:
        last.out_channels = num_classes
    return network


class Aspects(Objective):
    """The student's aspect logits learn the stored answers of each sample.

    Args:
        answers: P(yes), (N, Q), row i for the sample with index i.
    """

    name = "aspects"
    needs = frozenset({"student.tap:aspects", "index"})

    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        self.answers = answers.float()  # not a buffer: neither in checkpoints nor broadcast between processes

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        logits, index = student.taps["aspects"], batch["index"]
        if self.answers.device != index.device:
            self.answers = self.answers.to(index.device)
        targets = self.answers[index]
        agreement = ((logits.detach() > 0) == (targets > 0.5)).float().mean()
        return {"loss": aspect_loss(logits, targets), "log:agreement": agreement}


@dataclass
class AspectClassifier(Student):
    """A student with its aspect outputs: `module` is a `WidenedClassifier`, whose `aspect_probs` scores the
    questions."""

    kind: ClassVar[str] = "stillhouse.methods.classification.makd:AspectClassifier"
    questions: list[str] = field(default_factory=list)

    def extras(self) -> dict[str, Any]:
        return {"questions": self.questions}

    @classmethod
    def rebuilt(cls, meta: Mapping[str, Any], spec: ModelSpec, task: Task, folder: Path) -> AspectClassifier:
        from safetensors.torch import load_model

        assert isinstance(task, Classification)
        classes, questions = len(task.classes), list(meta["questions"])
        module = WidenedClassifier(build(spec, classes + len(questions), task.input_shape), classes)
        load_model(module, str(task.weights_file(folder)))
        return cls(module.eval(), spec, task, questions=questions)


evaluates(AspectClassifier.kind)(evaluate)


class Config(General):
    objectives: Objectives = Field(
        default_factory=lambda: [ObjectiveSpec(name="ce")], description="What the class logits learn."
    )
    aspects: AspectsSpec
    alpha: float = Field(4.0, ge=0, description="Weight of the aspects' binary cross-entropy; 0 is the baseline.")
    keep_aspects: bool = Field(False, description="Keep the aspect outputs in the product, as scores of attributes.")

    @model_validator(mode="after")
    def _no_mixing(self) -> Config:
        if self.data.mixup or self.data.cutmix:
            raise ValueError("data.mixup and data.cutmix must be 0: a mixed image has no stored answer")
        if "num_classes" in self.student.options:
            raise ValueError(
                "student.options.num_classes: the head is widened by the number of questions; leave it out"
            )
        return self


class MaKD(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle, questions = run.data(config.data), config.aspects.questions_asked()
        trained = [name for name, t in config.all_teachers.items() if any(member.train for member in t.ensemble or [t])]
        out = [Stage("teacher", f"train the teacher '{name}' with cross-entropy (stored, shared)") for name in trained]
        if config.aspects.trained is not None:
            out.append(
                Stage(
                    "annotator",
                    f"train {config.aspects.trained.network.model} with a text encoder on {len(questions)} questions "
                    "(stored, shared)",
                )
            )
        if config.aspects.file is None:
            out.append(
                Stage(
                    "aspects",
                    f"answer {len(questions)} questions for each training image of {bundle.name} (stored, shared)",
                )
            )
        steps = config.train.epochs * len(run.loader(config.data, "train", config.train.batch_size, train=True))
        student = describe(config.student.model, run.model(config.student, config.data))
        return [
            *out,
            Stage(
                "student",
                f"train the widened student on {bundle.name}, alpha {config.alpha:g}",
                {"student": student},
                steps=steps,
            ),
        ]

    def run(self, config: Config, run: Run) -> Student:
        teachers = {name: run.teacher(name, spec, config.data) for name, spec in config.all_teachers.items()}
        questions, answers = aspect_table(config.aspects, config.data, run)
        run.record["aspects"] = {
            q: {"mean": m, "variance": v}
            for q, m, v in zip(questions, answers.mean(0).tolist(), answers.var(0, correction=0).tolist())
        }
        bundle, probe = run.data(config.data), next(iter(run.loader(config.data, "train", 2)))
        with keyed("model", "student", run.seed):
            network = build(config.student, bundle.num_classes + len(questions), bundle.input_shape)
        student = WidenedClassifier(network, bundle.num_classes)
        objectives = [*(objective_from_spec(o) for o in config.objectives), (Aspects(answers), config.alpha)]
        head = config.student.embedding or classifier(network, probe)
        module = Distillation(student, teachers, objectives, seed=run.seed, embedding=f"network.{head}")
        loader = run.loader(config.data, "train", config.train.batch_size, train=True)
        fitted = run.fit(
            "student",
            module,
            loader,
            config.train,
            evaluate=run.validating(config.data),
            splits=run.splits(config.data),
        )
        module.close()
        figures = {"train_seconds": fitted.seconds}
        if config.keep_aspects:
            kept = run.student(student, config.student, config.data, figures)
            return AspectClassifier(**vars(kept), questions=questions)
        plain = strip_aspects(network, bundle.num_classes, to_device(probe, next(network.parameters()).device))
        return run.student(plain, config.student, config.data, figures)

"""Distillation: the general method. Train a student on any number of objectives, with any teachers.

paper: none; the general method, for every paper that is a loss
family: general
task: classification
use when: the paper is a loss: list its objectives, alone or together
needs: data, a student, and whatever its objectives need

Teachers without weights are trained first, once, and stored. Each batch goes through the student, and through each
teacher, exactly once.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import Field, model_validator

from stillhouse.config.specs import Data, MethodConfig, Model, Objectives, Teacher, TrainSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.errors import UserError
from stillhouse.evaluation.cost import step_cost
from stillhouse.processes import rank_world
from stillhouse.runs.judging import check_groups
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run


class Config(MethodConfig):
    data: Data = Field(description="What the student is trained and judged on.")
    teacher: Teacher | None = Field(None, description="The one teacher; the same as teachers: {teacher: …}.")
    teachers: dict[str, Teacher] = Field(
        default_factory=dict,
        description="Several teachers by name; an objective reads the one that its `teacher` names.",
    )
    student: Model = Field(description="The network to train.")
    objectives: Objectives = Field(description="The losses, whose weighted sum is minimised.")
    train: TrainSpec = Field(default_factory=TrainSpec, description="How the student is fitted.")
    chunked: bool | None = Field(
        None,
        description="Of language models: losses from hidden states, some tokens at a time, without all logits at once; "
        "null: where the vocabulary is big.",
    )
    evaluate: list[str] = Field(
        default_factory=lambda: ["quality", "cost"],
        description="Groups of figures: those of the task by name (accuracy, calibration), quality for all of them, "
        "cost, and step (what a training step costs).",
    )

    @model_validator(mode="after")
    def _one_spelling(self) -> Config:
        if self.teacher is not None and "teacher" in self.teachers:
            raise ValueError("give `teacher` or `teachers: {teacher: …}`, not both")
        return self

    @property
    def all_teachers(self) -> dict[str, Any]:
        return {**({"teacher": self.teacher} if self.teacher is not None else {}), **self.teachers}


D = TypeVar("D", bound=Config)


class GeneralDistillation(Method[D]):
    def plan(self, config: D, run: Run) -> list[Stage]:
        bundle = run.data(config.data)
        check_groups(bundle.task, config.evaluate)
        stages = []
        for name, spec in config.all_teachers.items():
            for member in spec.ensemble or [spec]:
                if member.model and member.train:
                    steps = member.train.epochs * len(
                        run.loader(member.data or config.data, "train", member.train.batch_size, train=True)
                    )
                    model = run.model(member.network, member.data or config.data, "teacher", member.seed or 0)
                    stages.append(
                        Stage(
                            "teacher",
                            f"train the teacher '{name}' with cross-entropy (stored, shared)",
                            {name: describe(member.model, model)},
                            steps=steps,
                        )
                    )
        student = run.model(config.student, config.data)
        steps = config.train.epochs * len(run.loader(config.data, "train", config.train.batch_size, train=True))
        losses = " + ".join(o.name for o in config.objectives)
        stages.append(
            Stage(
                "student",
                f"train the student on {bundle.name} with {losses}",
                {"student": describe(config.student.model, student)},
                self._taps(config, run, student),
                steps,
            )
        )
        return stages

    def _taps(self, config: D, run: Run, student: Any) -> dict[str, str]:
        """Where the objectives will tap the student and the live teachers. What would be trained is built for it, with
        teachers that were not trained, so that whatever does not fit is found before anything is trained."""
        with run.rehearsal():
            teachers = self.teachers(config, run)
            batch = next(iter(run.loader(config.data, "train", 2 * rank_world()[1], train=True)))
            module = self.module(config, run, student, teachers)
            try:
                module.build(batch)
                return {f"{name} {k}": v for name, found in module.taps().items() for k, v in found.items()}
            finally:
                module.close()

    def teachers(self, config: D, run: Run) -> dict[str, Any]:
        """The teachers by name."""
        return {name: run.teacher(name, spec, config.data) for name, spec in config.all_teachers.items()}

    def loader(self, config: D, run: Run) -> Any:
        """The student's training batches."""
        return run.loader(config.data, "train", config.train.batch_size, train=True)

    def module(self, config: D, run: Run, student: Any, teachers: dict[str, Any]) -> Distillation:
        """What is trained."""
        objectives = [objective_from_spec(o) for o in config.objectives]
        task = run.data(config.data).task
        return Distillation(
            student,
            teachers,
            objectives,
            seed=run.seed,
            embedding=config.student.embedding,
            task=task,
            chunked=config.chunked,
        )

    def run(self, config: D, run: Run) -> Student:
        teachers = self.teachers(config, run)
        student = run.model(config.student, config.data)
        module = self.module(config, run, student, teachers)
        evaluate = run.validating(config.data)
        if config.train.best is not None and evaluate is None:
            raise UserError("train.best needs data to judge by: set data.val or data.holdout to a share above 0.")
        train, splits = self.loader(config, run), run.splits(config.data)
        fitted = run.fit("student", module, train, config.train, evaluate=evaluate, splits=splits)
        figures = {"train_seconds": fitted.seconds, **module.figures()}
        if "step" in config.evaluate:
            figures |= step_cost(module, *run.last_step(module, train, config.train, splits))
        module.close()
        run.record["weights"] = {
            name: hashed for name, t in teachers.items() if (hashed := t.fingerprint()) is not None
        }
        return run.student(student, config.student, config.data, figures)


def describe(name: str, model: Any) -> str:
    """`stillhouse:resnet20, 272,474 parameters`."""
    return f"{name}, {sum(p.numel() for p in model.parameters()):,} parameters"

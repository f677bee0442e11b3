"""Distillation: the general method. Train a student on any number of objectives, with any teachers.

family: general
task: classification
use when: the paper is a loss: list its objectives, alone or together
needs: data, a student, and whatever its objectives need

Teachers without weights are trained first, once, and kept. Each batch goes through the student, and through each teacher, exactly once.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from stillhouse.distillation import Distillation
from stillhouse.errors import UserError
from stillhouse.evaluation.classification import evaluate_classifier
from stillhouse.product import Student
from stillhouse.recipe import Data, MethodConfig, Model, Objectives, Teacher, TrainSpec, objective_from_spec
from stillhouse.run import Method, Run, Stage


class Config(MethodConfig):
    data: Data
    teacher: Teacher | None = Field(None, description="The one teacher; the same as teachers: {teacher: …}.")
    teachers: dict[str, Teacher] = Field(default_factory=dict, description="Several teachers by name; an objective reads the one that its `teacher` names.")
    student: Model
    objectives: Objectives
    train: TrainSpec = Field(default_factory=TrainSpec)
    evaluate: list[str] = Field(default_factory=lambda: ["accuracy", "calibration", "cost"], description="Groups of figures: accuracy, calibration, cost.")

    @model_validator(mode="after")
    def _one_spelling(self) -> Config:
        if self.teacher is not None and "teacher" in self.teachers:
            raise ValueError("give `teacher` or `teachers: {teacher: …}`, not both")
        return self

    @property
    def all_teachers(self) -> dict[str, Any]:
        return {**({"teacher": self.teacher} if self.teacher is not None else {}), **self.teachers}


class GeneralDistillation(Method[Config]):
    Config = Config

    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data)
        stages = []
        for name, spec in config.all_teachers.items():
            for member in spec.ensemble or [spec]:
                if member.model and member.train and not member.checkpoint and not member.pretrained:
                    steps = member.train.epochs * len(run.loader(member.data or config.data, "train", member.train.batch_size, train=True))
                    model = run.model(member.network, config.data, "teacher", member.seed or 0)
                    stages.append(Stage("teacher", f"train the teacher '{name}' with cross-entropy (kept, shared)", {name: describe(member.model, model)}, steps=steps))
        student = run.model(config.student, config.data)
        steps = config.train.epochs * len(run.loader(config.data, "train", config.train.batch_size, train=True))
        losses = " + ".join(o.name for o in config.objectives)
        stages.append(Stage("student", f"train the student on {bundle.name} with {losses}", {"student": describe(config.student.model, student)}, self._taps(config, run, student), steps))
        return stages

    def _taps(self, config: Config, run: Run, student: Any) -> dict[str, str]:
        from stillhouse.teachers import Reader

        probe = next(iter(run.loader(config.data, "train", 2)))
        wanted = [n for o in config.objectives for n in objective_from_spec(o).objective.needs]
        reader = Reader(student, "student", config.student.embedding)
        reader.attach({n.removeprefix("student.") for n in wanted if n.startswith("student.")}, probe)
        paths = reader.paths
        reader.close()
        return {f"student {k}": v for k, v in paths.items()}

    def run(self, config: Config, run: Run) -> Student:
        teachers = {name: run.teacher(name, spec, config.data) for name, spec in config.all_teachers.items()}
        student = run.model(config.student, config.data)
        objectives = [objective_from_spec(o) for o in config.objectives]
        module = Distillation(student, teachers, objectives, seed=run.seed, embedding=config.student.embedding)
        check = run.validation(config.data)
        if config.train.best is not None and check is None:
            raise UserError("train.best needs data to judge by: set data.val or data.holdout to a share above 0.")
        fitted = run.fit(
            "student",
            module,
            run.loader(config.data, "train", config.train.batch_size, train=True),
            config.train,
            evaluate=None if check is None else lambda m, d: evaluate_classifier(m, check, d, ["accuracy", "calibration"]),
            splits=run.splits(config.data),
        )
        module.close()
        run.record["weights"] = {name: t.fingerprint() for name, t in teachers.items() if hasattr(t, "fingerprint")}
        return run.student(student, config.student, config.data, {"train_seconds": fitted.seconds})


def describe(name: str, model: Any) -> str:
    """`stillhouse:resnet20, 272,474 parameters`."""
    return f"{name}, {sum(p.numel() for p in model.parameters()):,} parameters"

"""Stillhouse: knowledge distillation under one roof.

Five lines distil a model: `stillhouse.distill(teacher, student, train_loader, objectives=["ce", "kd"])`. `run_recipe`
runs what a recipe describes. Names are loaded when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_FACE = {
    "distill": "stillhouse.api",
    "run_recipe": "stillhouse.api",
    "load": "stillhouse.runs.products",
    "load_product": "stillhouse.runs.products",
    "Product": "stillhouse.runs.products",
    "Student": "stillhouse.runs.products",
    "list_methods": "stillhouse.catalog",
    "Batch": "stillhouse.signals",
    "Signals": "stillhouse.signals",
    "TopK": "stillhouse.signals",
    "Taps": "stillhouse.signals",
    "Context": "stillhouse.training.context",
    "Progress": "stillhouse.training.context",
    "Objective": "stillhouse.distillation.objective",
    "WeightSchedule": "stillhouse.distillation.objective",
    "Distillation": "stillhouse.distillation.distillation",
    "CoTrainedTeacher": "stillhouse.distillation.teachers",
    "Ensemble": "stillhouse.distillation.teachers",
    "FrozenTeacher": "stillhouse.distillation.teachers",
    "Momentum": "stillhouse.distillation.teachers",
    "PastSelf": "stillhouse.distillation.teachers",
    "StoredTeacher": "stillhouse.distillation.teachers",
    "Teacher": "stillhouse.distillation.teachers",
    "Store": "stillhouse.store",
    "StoredDataset": "stillhouse.store",
    "Loader": "stillhouse.data",
    "Task": "stillhouse.tasks.base",
    "Data": "stillhouse.config.specs",
    "MethodConfig": "stillhouse.config.specs",
    "Model": "stillhouse.config.specs",
    "Objectives": "stillhouse.config.specs",
    "Spec": "stillhouse.config.specs",
    "TeacherSpec": "stillhouse.config.specs",
    "TrainSpec": "stillhouse.config.specs",
    "Method": "stillhouse.runs.method",
    "Stage": "stillhouse.runs.method",
    "Run": "stillhouse.runs.run",
    "UserError": "stillhouse.errors",
}
__all__ = ["__version__", *_FACE]

if TYPE_CHECKING:
    from stillhouse.api import distill as distill
    from stillhouse.api import run_recipe as run_recipe
    from stillhouse.catalog import list_methods as list_methods
    from stillhouse.config.specs import Data as Data
    from stillhouse.config.specs import MethodConfig as MethodConfig
    from stillhouse.config.specs import Model as Model
    from stillhouse.config.specs import Objectives as Objectives
    from stillhouse.config.specs import Spec as Spec
    from stillhouse.config.specs import TeacherSpec as TeacherSpec
    from stillhouse.config.specs import TrainSpec as TrainSpec
    from stillhouse.data import Loader as Loader
    from stillhouse.distillation.distillation import Distillation as Distillation
    from stillhouse.distillation.objective import Objective as Objective
    from stillhouse.distillation.objective import WeightSchedule as WeightSchedule
    from stillhouse.distillation.teachers import CoTrainedTeacher as CoTrainedTeacher
    from stillhouse.distillation.teachers import Ensemble as Ensemble
    from stillhouse.distillation.teachers import FrozenTeacher as FrozenTeacher
    from stillhouse.distillation.teachers import Momentum as Momentum
    from stillhouse.distillation.teachers import PastSelf as PastSelf
    from stillhouse.distillation.teachers import StoredTeacher as StoredTeacher
    from stillhouse.distillation.teachers import Teacher as Teacher
    from stillhouse.errors import UserError as UserError
    from stillhouse.runs.method import Method as Method
    from stillhouse.runs.method import Stage as Stage
    from stillhouse.runs.products import Product as Product
    from stillhouse.runs.products import Student as Student
    from stillhouse.runs.products import load as load
    from stillhouse.runs.products import load_product as load_product
    from stillhouse.runs.run import Run as Run
    from stillhouse.signals import Batch as Batch
    from stillhouse.signals import Signals as Signals
    from stillhouse.signals import Taps as Taps
    from stillhouse.signals import TopK as TopK
    from stillhouse.store import Store as Store
    from stillhouse.store import StoredDataset as StoredDataset
    from stillhouse.tasks.base import Task as Task
    from stillhouse.training.context import Context as Context
    from stillhouse.training.context import Progress as Progress


def __getattr__(name: str) -> Any:
    if name in _FACE:
        return getattr(importlib.import_module(_FACE[name]), name)
    raise AttributeError(f"module 'stillhouse' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)

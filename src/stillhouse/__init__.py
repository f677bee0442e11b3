"""Stillhouse: knowledge distillation under one roof.

Five lines distil a model: `stillhouse.distill(teacher, student, train_loader, objectives=["ce", "kd"])`. Names are loaded when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_FACE = {
    "distill": "stillhouse.api",
    "load": "stillhouse.runs.products",
    "list_methods": "stillhouse.catalog",
    "Signals": "stillhouse.signals",
    "TopK": "stillhouse.signals",
    "Taps": "stillhouse.signals",
    "Objective": "stillhouse.distillation.objective",
    "Progress": "stillhouse.distillation.objective",
    "WeightSchedule": "stillhouse.distillation.objective",
    "Distillation": "stillhouse.distillation.distillation",
    "Frozen": "stillhouse.distillation.teachers",
    "Ensemble": "stillhouse.distillation.teachers",
    "Momentum": "stillhouse.distillation.teachers",
    "PastSelf": "stillhouse.distillation.teachers",
    "CoTrained": "stillhouse.distillation.teachers",
    "Stored": "stillhouse.distillation.teachers",
    "Store": "stillhouse.store",
    "StoredDataset": "stillhouse.store",
    "Loader": "stillhouse.data",
    "UserError": "stillhouse.errors",
}
__all__ = ["__version__", *_FACE]

if TYPE_CHECKING:
    from stillhouse.api import distill as distill
    from stillhouse.catalog import list_methods as list_methods
    from stillhouse.data import Loader as Loader
    from stillhouse.distillation.distillation import Distillation as Distillation
    from stillhouse.distillation.objective import Objective as Objective
    from stillhouse.distillation.objective import Progress as Progress
    from stillhouse.distillation.objective import WeightSchedule as WeightSchedule
    from stillhouse.distillation.teachers import CoTrained as CoTrained
    from stillhouse.distillation.teachers import Ensemble as Ensemble
    from stillhouse.distillation.teachers import Frozen as Frozen
    from stillhouse.distillation.teachers import Momentum as Momentum
    from stillhouse.distillation.teachers import PastSelf as PastSelf
    from stillhouse.distillation.teachers import Stored as Stored
    from stillhouse.errors import UserError as UserError
    from stillhouse.runs.products import load as load
    from stillhouse.signals import Signals as Signals
    from stillhouse.signals import Taps as Taps
    from stillhouse.signals import TopK as TopK
    from stillhouse.store import Store as Store
    from stillhouse.store import StoredDataset as StoredDataset


def __getattr__(name: str) -> Any:
    if name in _FACE:
        return getattr(importlib.import_module(_FACE[name]), name)
    raise AttributeError(f"module 'stillhouse' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)

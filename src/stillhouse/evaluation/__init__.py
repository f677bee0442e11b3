"""Evaluators: how a product is judged, by its kind. An evaluator is a function `(product, run)` that returns figures by name.

A kind has its evaluator in the file of that name here (`student.py`), or any file registers one with `@evaluates("kind")` when it is imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TypeVar

from stillhouse.errors import unknown

Evaluator = Callable[..., dict[str, float]]
_F = TypeVar("_F", bound=Evaluator)
_EVALUATORS: dict[str, Evaluator] = {}


def evaluates(kind: str) -> Callable[[_F], _F]:
    """Register the decorated function as the evaluator of a kind of product."""

    def register(function: _F) -> _F:
        _EVALUATORS[kind] = function
        return function

    return register


def evaluator(kind: str) -> Evaluator:
    """The evaluator of a kind of product, such as `student`.

    Raises:
        UserError: a kind that nothing evaluates, with the nearest that is.
    """
    name = f"{__name__}.{kind}"
    if kind not in _EVALUATORS and kind.isidentifier() and importlib.util.find_spec(name):
        importlib.import_module(name)
    if kind not in _EVALUATORS:
        raise unknown("evaluator for a product of kind", kind, {"student", *_EVALUATORS})
    return _EVALUATORS[kind]

"""Evaluators: how a product is judged, by its kind. An evaluator is a function `(product, run)` that returns figures by
name.

A file registers one with `@evaluates("kind")` when it is imported; `KINDS` names the files of the general kinds, which
are imported when they are used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TypeVar

from stillhouse.errors import unknown

Evaluator = Callable[..., dict[str, float]]
_F = TypeVar("_F", bound=Evaluator)
_EVALUATORS: dict[str, Evaluator] = {}
KINDS = {
    "student": "stillhouse.runs.judging",
    "synthetic_set": "stillhouse.synthetic.judging.evaluator",
    "generator": "stillhouse.generation.judging",
}


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
    if kind not in _EVALUATORS and kind in KINDS:
        importlib.import_module(KINDS[kind])
    if kind not in _EVALUATORS:
        raise unknown("evaluator for a product of kind", kind, {"student", *_EVALUATORS})
    return _EVALUATORS[kind]

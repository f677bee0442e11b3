"""`Run`: data, models, stages, loops and teachers for a method."""

from __future__ import annotations

from typing import Any

from stillhouse.runs.evaluators import evaluator
from stillhouse.runs.teachers import RunTeachers


class Run(RunTeachers):
    """Gives a method data and models (`RunData`), stages and loops (`RunStages`), and teachers (`RunTeachers`).

    Everything is under `folder`; stages that other runs may share are in the cache.
    """

    def evaluated(self, product: Any) -> dict[str, float]:
        """The figures of a product on test data, by the evaluator of its kind: a function (product, run) -> {name:
        number}."""
        return evaluator(product.kind)(product, self)

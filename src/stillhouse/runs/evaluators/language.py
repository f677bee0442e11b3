"""The evaluator of products of kind `language`."""

from __future__ import annotations

from typing import Any

from stillhouse.evaluation import cost
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.run import Run


@evaluates("language")
def judge(product: Any, run: Run) -> dict[str, float]:
    """Figures of a run's language model or text classifier on its test split, and its parameters and file size."""
    data, split = run.judging_data()
    device = next(product.module.parameters()).device
    out = run.data(data).evaluate(product.module, run.loader(data, split), device, ["accuracy", "calibration"])
    out["parameters"] = cost.parameters(product.module)
    out["file_bytes"] = cost.file_size(run.folder / "product" / "model" / "model.safetensors")
    return out

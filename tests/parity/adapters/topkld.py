"""TopKLD against arrays of a reference that shares nothing with it; no code of the authors was found."""

from __future__ import annotations

from parity.case import Case
from stillhouse.functional.counting import counted_mean
from stillhouse.objectives.topkld import topkld_rows


def loss(case: Case) -> None:
    """Logits (..., V); a `mask` (...,) is optional."""
    student = case.leaf("student_logits")
    rows = topkld_rows(student, case["teacher_logits"], **case.params)
    case.close("rows", rows)
    value = counted_mean(rows, case["mask"].bool() if "mask" in case else None)
    value.backward()
    case.close("loss", value)
    case.close_grad("student_logits")


ADAPTERS = {"topkld": loss}

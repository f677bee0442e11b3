"""Export of a student for other programs: ONNX, torch.export, or its weights alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from stillhouse.errors import MissingExtra, UserError, unknown
from stillhouse.files import written_beside
from stillhouse.product import Student, load_product
from stillhouse.signals import read_logits

FORMATS = {"onnx": "student.onnx", "torch": "student.pt2", "safetensors": "student.safetensors"}


def export(folder: str | Path, to: str = "onnx", out: str | Path | None = None, trust_code: bool = False) -> Path:
    """Write the student of a run; the batch dimension stays free.

    Raises:
        UserError: an unknown format, a product that is no student, or a missing extra.
    """
    if to not in FORMATS:
        raise unknown("export format", to, FORMATS)
    folder = Path(folder)
    product = load_product(folder, trust_code)
    if not isinstance(product, Student):
        raise UserError(f"Only students can be exported; {folder} holds a product of kind '{product.kind}'.")
    path = Path(out) if out is not None else folder / FORMATS[to]
    if to == "safetensors":
        from safetensors.torch import save_model

        with written_beside(path) as beside:
            save_model(product.module, str(beside))
        return path
    if not product.input_shape:
        raise UserError(f"The student in {folder} takes several tensors by name, so only its weights can be exported: use the format safetensors.")
    student, example = _Logits(product.module).eval(), (torch.zeros(2, *product.input_shape),)
    batch = {0: torch.export.Dim("batch", min=1)}
    if to == "torch":
        program = torch.export.export(student, example, dynamic_shapes=(batch,))
        with written_beside(path) as beside, open(beside, "wb") as file:
            torch.export.save(program, file)
        return path
    if importlib.util.find_spec("onnxscript") is None:
        raise MissingExtra("Export to ONNX", "onnx")
    exported = torch.onnx.export(
        student, example, input_names=["input"], output_names=["logits"], dynamic_shapes=(batch,), dynamo=True, verbose=False
    )
    assert exported is not None
    with written_beside(path) as beside:
        exported.save(str(beside))
    return path


class _Logits(nn.Module):
    """A student whose output is its logits, whatever its library returns."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = read_logits(self.student(x))
        return logits

"""Export of a product for other programs: a student as ONNX, torch.export or its weights alone; a synthetic set as an ImageFolder or Parquet."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import MissingExtra, UserError, unknown
from stillhouse.files import written_beside
from stillhouse.product import Student, load_product
from stillhouse.signals import read_logits
from stillhouse.synthetic.product import SyntheticSet

FORMATS = {"onnx": "student.onnx", "torch": "student.pt2", "safetensors": "student.safetensors"}
"""Of students, the default first; and the file's name."""
SET_FORMATS = {"folder": "imagefolder", "parquet": "train.parquet"}
"""Of synthetic sets, in the same way."""


def export(folder: str | Path, to: str | None = None, out: str | Path | None = None, trust_code: bool = False) -> Path:
    """Write the product of a run, by default as `onnx` (a student, whose batch dimension stays free) or `folder` (a synthetic set), beside the product.

    Raises:
        UserError: an unknown format, a product that no format holds, files that are there already, or a missing extra.
    """
    check_format(to)
    return write(load_product(folder, trust_code), Path(folder), to, out)


def check_format(to: str | None) -> None:
    """Raises `UserError`, with the nearest, for a format that does not exist."""
    if to is not None and to not in {**FORMATS, **SET_FORMATS}:
        raise unknown("export format", to, {**FORMATS, **SET_FORMATS})


def write(product: Any, folder: Path, to: str | None = None, out: str | Path | None = None) -> Path:
    """As `export`, of a product that is loaded already; `folder` is where it came from."""
    what, formats = ("synthetic set", SET_FORMATS) if isinstance(product, SyntheticSet) else ("student", FORMATS)
    if not isinstance(product, SyntheticSet | Student):
        raise UserError(f"Students and synthetic sets of labelled images can be exported; {folder} holds a product of kind '{product.kind}'.")
    to = to or next(iter(formats))
    if to not in formats:
        raise UserError(f"A {what} cannot be written as {to}; {folder} holds one, so take {', '.join(formats)}.")
    path = Path(out) if out is not None else folder / formats[to]
    if isinstance(product, Student):
        return _student(product, folder, to, path)
    if to == "folder":
        product.export_folder(path)
    else:
        product.export_parquet(path)
    return path


def _student(product: Student, folder: Path, to: str, path: Path) -> Path:
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

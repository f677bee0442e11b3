"""Export of a student for other programs: ONNX, torch.export, or its weights alone."""

from __future__ import annotations

from pathlib import Path

import torch

from stillhouse.errors import MissingExtra, UserError, unknown
from stillhouse.files import written_beside
from stillhouse.product import Student, load_product

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
    example = (torch.zeros(2, *product.input_shape),)
    batch = {0: torch.export.Dim("batch", min=1)}
    with written_beside(path) as beside:
        if to == "safetensors":
            from safetensors.torch import save_model

            save_model(product.module, str(beside))
        elif to == "torch":
            torch.export.save(torch.export.export(product.module, example, dynamic_shapes=(batch,)), str(beside))
        else:
            try:
                import onnxscript  # noqa: F401
            except ImportError:
                raise MissingExtra("Export to ONNX", "onnx") from None
            program = torch.onnx.export(product.module, example, input_names=["input"], output_names=["logits"], dynamic_shapes=(batch,), dynamo=True)
            assert program is not None
            program.save(str(beside))
    return path

"""A network for other programs: ONNX, torch.export, or its weights alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from stillhouse.errors import MissingExtra, UserError
from stillhouse.files import written_beside
from stillhouse.signals import read_logits

FORMATS = {"onnx": "student.onnx", "torch": "student.pt2", "safetensors": "student.safetensors"}
"""The default first; and the file's name."""


def write_network(module: nn.Module, input_shape: tuple[int, ...], to: str, path: Path) -> None:
    """Write a network as `onnx`, `torch` or `safetensors`; the batch dimension stays free.

    Raises:
        UserError: a network of several inputs, of which only the weights can be written, or a missing extra.
    """
    if to == "safetensors":
        from safetensors.torch import save_model

        with written_beside(path) as beside:
            save_model(module, str(beside))
        return
    if not input_shape:
        raise UserError("The network takes several tensors by name, so only its weights can be exported: use the format safetensors.")
    student, example = _Logits(module).eval(), (torch.zeros(2, *input_shape),)
    batch = {0: torch.export.Dim("batch", min=1)}
    if to == "torch":
        program = torch.export.export(student, example, dynamic_shapes=(batch,))
        with written_beside(path) as beside, open(beside, "wb") as file:
            torch.export.save(program, file)
        return
    if importlib.util.find_spec("onnxscript") is None:
        raise MissingExtra("Export to ONNX", "onnx")
    exported = torch.onnx.export(
        student, example, input_names=["input"], output_names=["logits"], dynamic_shapes=(batch,), dynamo=True, verbose=False
    )
    assert exported is not None
    with written_beside(path) as beside:
        exported.save(str(beside))


class _Logits(nn.Module):
    """A student whose output is its logits, whatever its library returns."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = read_logits(self.student(x))
        return logits

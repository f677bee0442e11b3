"""A network for other programs: ONNX, torch.export, or its weights alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from stillhouse.errors import MissingExtra
from stillhouse.files import atomic_write
from stillhouse.signals import Batch

FORMATS = {"onnx": "student.onnx", "torch": "student.pt2", "safetensors": "student.safetensors"}
"""The default first; and the file's name."""


def write_network(
    module: nn.Module, example: Batch | None, to: str, path: Path, outputs: Sequence[str] = ("logits",)
) -> None:
    """Write a network as `onnx`, `torch` or `safetensors`; the batch dimension stays free.

    Args:
        module: gives a tensor, or several (see `Task.for_export`).
        outputs: their names.
        example: a batch of one, by which the network is traced; weights alone need none.

    Raises:
        MissingExtra: what writes ONNX is not installed.
    """
    if to == "safetensors":
        from safetensors.torch import save_model

        with atomic_write(path) as temporary:
            save_model(module, str(temporary))
        return
    assert example is not None
    student, inputs = module.eval(), (example["input"].repeat_interleave(2, 0),)
    batch = {0: torch.export.Dim("batch", min=1)}
    if to == "torch":
        program = torch.export.export(student, inputs, dynamic_shapes=(batch,))
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            torch.export.save(program, file)
        return
    if importlib.util.find_spec("onnxscript") is None:
        raise MissingExtra("Export to ONNX", "onnx")
    exported = torch.onnx.export(
        student,
        inputs,
        input_names=["input"],
        output_names=list(outputs),
        dynamic_shapes=(batch,),
        dynamo=True,
        verbose=False,
    )
    assert exported is not None
    with atomic_write(path) as temporary:
        exported.save(str(temporary))

"""Exported students answer as the student does, for any batch size."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import stillhouse
from stillhouse.errors import MissingExtra, UserError
from stillhouse.export import export
from stillhouse.models import build
from stillhouse.product import Student
from stillhouse.recipe import ModelSpec

NETS = {
    "stillhouse:mlp": ({"widths": [8]}, (1, 8, 8)),
    "timm:test_resnet": ({}, (3, 32, 32)),
    "hf:config:vit": ({"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "patch_size": 8}, (3, 16, 16)),
}
EXTRAS = ("onnx", "onnxscript", "onnxruntime")
HAS_ONNX = all(importlib.util.find_spec(m) for m in EXTRAS)


def product(folder: Path, name: str = "stillhouse:mlp") -> Path:
    options, shape = NETS[name]
    torch.manual_seed(0)
    spec = ModelSpec(model=name, options=options)
    Student(build(spec, 5, shape).eval(), spec, 5, shape, [str(i) for i in range(5)]).save(folder)
    return folder


def answers(folder: Path, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of a batch size, and the student's logits for them."""
    from stillhouse.signals import read_logits

    student = stillhouse.load(folder)
    x = torch.randn(batch, *stillhouse.product.load_product(folder).input_shape)
    with torch.no_grad():
        return x, read_logits(student(x))


@pytest.mark.parametrize("name", ["timm:test_resnet", "hf:config:vit"])
def test_torch_export_gives_the_students_logits_at_any_batch_size(name: str, tmp_path: Path) -> None:
    folder = product(tmp_path / "product", name)
    path = export(folder, "torch")
    assert path == folder / "student.pt2"
    program = torch.export.load(path).module()
    for batch in (1, 3):
        x, expected = answers(folder, batch)
        given = program(x)
        assert isinstance(given, torch.Tensor), "an exported student returns logits, whatever the library"
        assert torch.allclose(given, expected, atol=1e-5)


def test_safetensors_export_holds_the_weights(tmp_path: Path) -> None:
    folder = product(tmp_path / "product")
    path = export(folder, "safetensors", out=tmp_path / "elsewhere" / "weights.safetensors")
    student = stillhouse.load(folder)
    held = load_file(path)
    assert held.keys() == student.state_dict().keys()
    assert all(torch.equal(held[k], v) for k, v in student.state_dict().items())


@pytest.mark.skipif(HAS_ONNX, reason="the extra 'onnx' is installed")
def test_onnx_without_its_extra_is_refused_with_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(MissingExtra, match=r"pip install 'stillhouse\[onnx\]'"):
        export(product(tmp_path / "product"), "onnx")
    assert not list(tmp_path.rglob("*.onnx*"))


@pytest.mark.skipif(not HAS_ONNX, reason="the extra 'onnx' is not installed")
@pytest.mark.parametrize("name", ["stillhouse:mlp", "hf:config:vit"])
def test_onnx_gives_the_students_logits_at_any_batch_size(name: str, tmp_path: Path) -> None:
    import onnxruntime

    folder = product(tmp_path / "product", name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = export(folder, "onnx")
    session = onnxruntime.InferenceSession(str(path))
    for batch in (1, 3):
        x, expected = answers(folder, batch)
        (given,) = session.run(["logits"], {"input": x.numpy()})
        assert torch.allclose(torch.from_numpy(given), expected, atol=1e-4)


def test_an_unknown_format_is_told_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no export format 'onx'; did you mean 'onnx'"):
        export(product(tmp_path / "product"), "onx")


def test_a_folder_without_a_product_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no product\.json"):
        export(tmp_path, "torch")


def test_a_student_of_several_inputs_exports_its_weights_alone(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}
    spec = ModelSpec(model="hf:config:bert", options={"task": "text", **sizes})
    Student(build(spec, 2, ()), spec, 2, ()).save(tmp_path)
    with pytest.raises(UserError, match="use the format safetensors"):
        export(tmp_path, "torch")
    assert len(load_file(export(tmp_path, "safetensors"))) == len(stillhouse.load(tmp_path).state_dict())

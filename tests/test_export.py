"""Exported students answer as the student does, for any batch size; synthetic sets leave as pictures, and train other
recipes."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import stillhouse
from stillhouse.config.specs import DataSpec, ModelSpec
from stillhouse.data import BatchKey, DataBundle, Loader, load
from stillhouse.errors import MissingExtra, UserError
from stillhouse.functional.whitening import fit_whitening
from stillhouse.models import build
from stillhouse.runs.export import export
from stillhouse.runs.products import Student
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.real import unnormalised
from stillhouse.tasks.classification import Classification

NETS = {
    "stillhouse:mlp": ({"widths": [8]}, (1, 8, 8)),
    "timm:test_resnet": ({}, (3, 32, 32)),
    "hf:config:vit": (
        {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "patch_size": 8},
        (3, 16, 16),
    ),
}
EXTRAS = ("onnx", "onnxscript", "onnxruntime")
HAS_ONNX = all(importlib.util.find_spec(m) for m in EXTRAS)


def product(folder: Path, name: str = "stillhouse:mlp") -> Path:
    options, shape = NETS[name]
    torch.manual_seed(0)
    spec = ModelSpec(model=name, options=options)
    Student(build(spec, 5, shape).eval(), spec, Classification(tuple(map(str, range(5))), shape)).save(folder)
    return folder


def answers(folder: Path, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of a batch size, and the student's logits for them."""
    from stillhouse.signals import read_logits

    student = stillhouse.load(folder)
    x = torch.randn(batch, *stillhouse.runs.products.load_product(folder).task.input_shape)
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
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 16,
    }
    spec = ModelSpec(model="hf:config:bert", options={"task": "text", **sizes})
    Student(build(spec, 2, ()), spec, Classification(("0", "1"), ())).save(tmp_path)
    with pytest.raises(UserError, match="use the format safetensors"):
        export(tmp_path, "torch")
    assert len(load_file(export(tmp_path, "safetensors"))) == len(stillhouse.load(tmp_path).state_dict())


# ---- synthetic sets --------------------------------------------------------------------------------------------------


def digits_set(folder: Path, **given: object) -> SyntheticSet:
    """A set of two images of each digit, some pixels out of range, saved as a product."""
    bundle = load(DataSpec(name="digits"))
    batch = bundle.dataset("train", train=False).batch(BatchKey(0, np.arange(600), 0, 600), 0)
    rows = torch.cat([(batch["label"] == c).nonzero()[:2, 0] for c in range(10)])
    made = SyntheticSet(
        batch["input"][rows] * 1.2,
        batch["label"][rows],
        bundle.classes,
        bundle.mean,
        bundle.std,
        made_by={"data": {"name": "digits"}},
        **given,
    )
    made.save(folder)
    return made


def inputs(bundle: DataBundle, split: str, train: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(Loader(bundle.dataset(split, train=train), 512))
    return torch.cat([b["input"] for b in batches]), torch.cat([b["label"] for b in batches])


@pytest.mark.parametrize("to", ["folder", "parquet"])
def test_an_exported_set_trains_a_recipe_and_is_judged_by_the_real_test_split(to: str, tmp_path: Path) -> None:
    made = digits_set(tmp_path / "set")
    path = export(tmp_path / "set", to)
    bundle = load(DataSpec(name=f"synthetic:{path}", options={"real": "digits"}))
    real = load(DataSpec(name="digits"))
    x, y = inputs(bundle, "train")
    assert torch.equal(y, made.labels) and bundle.classes == real.classes
    pixels = made.pixels().clamp(0, 1)
    assert torch.allclose(x, (pixels - real.mean[0]) / real.std[0], atol=0.51 / 255 / real.std[0])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(inputs(bundle, "test"), inputs(real, "test")))


def test_a_saved_set_trains_with_its_own_pixels_and_the_judges_test_images(tmp_path: Path) -> None:
    made = digits_set(tmp_path / "set")
    made.made_by["data"]["test_size"] = 50
    made.save(tmp_path / "set")
    bundle = load(DataSpec(name=f"synthetic:{tmp_path / 'set'}"))
    x, y = inputs(bundle, "train")
    assert torch.allclose(x, made.images, atol=1e-5) and torch.equal(y, made.labels), "pixels out of [0, 1] are kept"
    assert len(inputs(bundle, "test")[1]) == 50 and not bundle.flip
    moved = bundle.dataset("train", train=True).batch(BatchKey(1, np.arange(20), 0, 20), 0)["input"]
    assert moved.shape == x.shape and not torch.allclose(moved, x), "training augmentation moves them"
    assert inputs(load(DataSpec(name=f"synthetic:{tmp_path / 'set'}", image_size=16)), "train")[0].shape == (
        20,
        1,
        16,
        16,
    )


def test_real_images_are_whitened_beside_a_set_that_is(tmp_path: Path) -> None:
    real, _ = inputs(load(DataSpec(name="digits")), "test")
    mean, std = load(DataSpec(name="digits")).mean, load(DataSpec(name="digits")).std
    made = digits_set(tmp_path / "set", whitening=fit_whitening(unnormalised(real, mean, std)))
    bundle = load(DataSpec(name=f"synthetic:{tmp_path / 'set'}"))
    assert torch.equal(inputs(bundle, "train")[0], made.images)
    assert torch.allclose(inputs(bundle, "test")[0], made.prepared(real), atol=1e-5)


def test_tiles_leave_as_whole_images(tmp_path: Path) -> None:
    made = digits_set(tmp_path / "set", factor=2)
    path = export(tmp_path / "set")
    assert len(list(path.rglob("*.png"))) == 80 == len(made.training_images()[1])
    with Image.open(path / "train" / "0-0" / "00000.png") as image:
        assert image.size == (8, 8)


def test_soft_labels_go_into_parquet_and_class_names_stay(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    soft = torch.randn(20, 10)
    made = digits_set(tmp_path / "set", soft=soft)
    path = export(tmp_path / "set", "parquet")
    held = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert held.features["label"].names == made.classes
    assert torch.allclose(torch.tensor(held["logits"][:]), soft) and held[0]["img"].size == (8, 8)


def test_what_files_cannot_hold_is_said(tmp_path: Path) -> None:
    made = digits_set(tmp_path / "set", soft=torch.randn(20, 10), lr=0.02)
    said = " ".join(made.left_out("folder"))
    assert "outside [0, 1]" in said and "soft labels are not written; a Parquet file" in said and "0.02" in said
    assert "soft" not in " ".join(made.left_out("parquet"))


def test_an_export_does_not_mix_with_an_older_one(tmp_path: Path) -> None:
    digits_set(tmp_path / "set")
    export(tmp_path / "set")
    with pytest.raises(UserError, match="old images would be mixed"):
        export(tmp_path / "set")
    with pytest.raises(UserError, match="no export format 'onnx'"):
        export(tmp_path / "set", "onnx")


def test_a_synthetic_set_that_does_not_fit_is_refused_in_a_sentence(tmp_path: Path) -> None:
    digits_set(tmp_path / "set")
    path, set_ = export(tmp_path / "set"), f"synthetic:{tmp_path / 'set'}"
    cases = [
        (f"synthetic:{path}", {}, "give it as: data.options.real"),
        (set_, {"reel": "digits"}, "did you mean 'real'"),
        (set_, {"real": {"name": "digits", "siz": 3}}, "unknown key 'siz'"),
        (set_, {"real": {"name": "digits", "classes": [0, 1]}}, "the set has 10 classes, not 2"),
        (
            set_,
            {"real": {"name": "digits", "image_size": 16}},
            r"shape \(1, 8, 8\), but those of 'digits' \(1, 16, 16\)",
        ),
        (f"synthetic:{tmp_path / 'sett'}", {}, "did you mean"),
        (f"synthetic:{product(tmp_path / 'student')}", {}, "kind 'student', not a synthetic set"),
    ]
    for name, options, words in cases:
        with pytest.raises(UserError, match=words):
            load(DataSpec(name=name, options=options))

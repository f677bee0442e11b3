"""Synthetic sets: they load as they were saved, are ordinary data sets, and refuse what cannot be one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import stillhouse
from stillhouse.config.specs import DataSpec
from stillhouse.data import Loader, load
from stillhouse.errors import UserError
from stillhouse.functional.whitening import fit_whitening
from stillhouse.synthetic.initial import decode
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.relabel import ViewLabels, Views, relabel

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def small(**given: Any) -> SyntheticSet:
    pixels = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    m, s = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    plain = {
        "images": (pixels - m) / s,
        "labels": torch.arange(3).repeat_interleave(2),
        "classes": ["cat", "dog", "a/b"],
        "mean": MEAN,
        "std": STD,
    }
    return SyntheticSet(**{**plain, "bounded": True, **given})


def test_a_saved_set_loads_as_it_was(tmp_path: Path):
    views = Views(epochs=2, batch_size=4)
    whitening = fit_whitening(torch.rand(30, 3, 8, 8))
    made = small(
        whitening=whitening,
        bounded=False,
        soft=torch.randn(6, 3),
        views=ViewLabels(views, torch.randn(2, 6, 3).half()),
        lr=0.02,
        made_by={"method": "dm", "ipc": 2},
    )
    made.save(tmp_path)
    again = stillhouse.load(tmp_path)
    assert again.fingerprint == made.fingerprint
    assert (again.classes, again.lr, again.made_by, again.views.made) == (made.classes, 0.02, made.made_by, views)
    assert torch.equal(again.pixels(), made.pixels())
    assert Image.open(tmp_path / "sheet.png").size[0] > 32


def test_the_size_counts_images_and_every_kind_of_label():
    plain = small()
    assert plain.bytes == 6 * 3 * 64 * 4 + 6 * 8
    assert small(soft=torch.zeros(6, 3)).bytes == plain.bytes + 6 * 3 * 4
    assert small(views=ViewLabels(Views(epochs=5), torch.zeros(5, 6, 3).half())).bytes == plain.bytes + 5 * 6 * 3 * 2


def test_a_set_is_an_ordinary_data_set():
    made = small()
    batch = next(iter(Loader(made.dataset(), 4)))
    assert torch.equal(batch["input"], made.images[:4]) and batch["label"].tolist() == [0, 0, 1, 1]
    assert len(made.dataset()) == 6


def test_stored_tiles_are_whole_training_images():
    made = small(factor=2)
    images, labels = made.training_images()
    assert images.shape == (24, 3, 8, 8) and labels.tolist() == made.labels.tolist() * 4
    top_left = decode(made.images, 2)[:6]
    assert torch.allclose(top_left.mean((2, 3)), made.images[:, :, :4, :4].mean((2, 3)), atol=1e-4)


def test_an_exported_folder_trains_like_any_other(tmp_path: Path):
    made = small()
    assert "Wrote 6 images" in made.export("folder", tmp_path)[0]
    bundle = load(DataSpec(name=f"imagefolder:{tmp_path}", image_size=8, augment="plain"))
    assert bundle.classes == ["0-cat", "1-dog", "2-a_b"]
    shown = torch.from_numpy(np.array(Image.open(tmp_path / "train" / "0-cat" / "00000.png"))).permute(2, 0, 1) / 255
    assert torch.allclose(shown, made.pixels()[0], atol=1 / 255)


def test_exported_parquet_holds_images_and_labels(tmp_path: Path):
    pytest.importorskip("pyarrow")
    made = small()
    path = tmp_path / "train.parquet"
    assert "Wrote 6 images" in made.export("parquet", path)[0]
    bundle = load(DataSpec(name=f"parquet:{path}", augment="plain"))
    assert bundle.input_shape == (3, 8, 8)
    assert bundle.classes == made.classes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.full((6, 3, 8, 8), 30.0)}, r"pixels from 6.5 to 9.3, not in \[0, 1\]"),
        ({"images": torch.full((6, 3, 8, 8), 255.0), "bounded": False}, "0 to 255"),
        ({"images": torch.zeros(6, 3, 8, 8, dtype=torch.uint8)}, "float32 images; given: torch.uint8"),
        ({"images": torch.full((6, 3, 8, 8), torch.nan)}, "6 of 6 synthetic images hold NaN"),
        ({"images": torch.zeros(6, 1, 8, 8)}, "3 means and 3 deviations, but the images have 1 channels"),
        ({"images": torch.zeros(3, 8, 8)}, r"images \(N, C, H, W\)"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels of shape \(6,\)"),
        ({"labels": torch.rand(6)}, "class ids"),
        ({"labels": torch.tensor([0, 0, 1, 1, 2, 3])}, "run from 0 to 3, but there are 3 classes"),
        ({"labels": torch.tensor([0, 0, 0, 0, 2, 2])}, "no image of 1 of its 3 classes: 'dog'"),
        ({"soft": torch.zeros(6, 4)}, r"shape \(6, 3\)"),
        ({"views": ViewLabels(Views(epochs=2), torch.zeros(2, 5, 3))}, r"\(epochs, 6, 3\)"),
    ],
)
def test_what_cannot_be_a_synthetic_set_is_refused_in_a_sentence(change: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        small(**change)


def test_a_torn_file_is_refused_in_a_sentence(tmp_path: Path):
    small().save(tmp_path)
    (tmp_path / "images.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        stillhouse.load(tmp_path)


def test_views_are_the_same_when_they_are_drawn_again():
    images = torch.randn(10, 3, 8, 8)
    views = Views(epochs=2, batch_size=4, mix="cutmix", seed=3)
    first, again = ([x for x, _ in views.batches(images, 1)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], next(views.batches(images, 0))[0])


@pytest.mark.parametrize("mix", ["none", "cutmix", "mixup"])
def test_stored_logits_are_those_of_the_views_that_training_sees(mix: str):
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    images = torch.randn(10, 3, 8, 8)
    labels = relabel([teacher], images, Views(epochs=3, batch_size=4, mix=mix, seed=1))
    for epoch in (0, 2, 4):  # epoch 4 goes round to 1
        for number, rows in enumerate(labels.order(10, epoch)):
            x, logits = labels.batch(images, rows, epoch, number)
            assert torch.allclose(teacher(x), logits.float(), atol=5e-3)


def test_the_fingerprint_changes_with_a_pixel():
    made = small()
    other = replace(made, images=made.images + 1e-3, bounded=False)
    assert other.fingerprint != made.fingerprint

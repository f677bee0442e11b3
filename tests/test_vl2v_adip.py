"""VL2V-ADiP: what its loss depends on, that frozen parts keep their bits, the valley of SWAD, domains and products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from stillhouse.config.specs import DataSpec
from stillhouse.data import Loader, load
from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError
from stillhouse.functional.pictures import unnormalise
from stillhouse.methods.image_text.vl2v_adip import AdipTraining, DomainBatches, EmbeddingClassifier, adip_loss
from stillhouse.runs import recipe
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.training.swad import DenseAverage, valley


def rows(count: int, dim: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def student(norm: bool = True) -> EmbeddingClassifier:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6) if norm else nn.Identity(), nn.ReLU()]
    return EmbeddingClassifier(nn.Sequential(*layers), nn.Linear(6, 5), F.normalize(rows(3), dim=-1))


def batch(count: int = 8) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    label = torch.randint(0, 3, (count,), generator=draw)
    return {"input": torch.randn(count, 3, 2, 2, generator=draw), "label": label}


# ---- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_depends_on_directions_alone(weight: int):
    embedding, image, vectors, labels = rows(4), rows(4, seed=1), rows(3, seed=2), torch.tensor([0, 2, 1, 1])
    plain = adip_loss(embedding, image, vectors, labels, weight)
    torch.testing.assert_close(adip_loss(3 * embedding, 2 * image, 7 * vectors, labels, weight), plain)
    others = adip_loss(embedding, image, vectors, (labels + 1) % 3, weight)
    assert torch.equal(others, plain) == (weight == 1.0)
    elsewhere = adip_loss(embedding, rows(4, seed=9), vectors, labels, weight)
    assert torch.equal(elsewhere, plain) == (weight == 0.0)
    same = adip_loss(vectors[labels], vectors[labels], vectors, labels, weight)
    torch.testing.assert_close(same, torch.tensor(-1.0))
    shares = F.one_hot(labels, 3).float()
    torch.testing.assert_close(adip_loss(embedding, image, vectors, shares, weight), plain)


def test_a_label_that_is_no_class_is_refused_and_a_zero_projection_is_finite():
    with pytest.raises(UserError, match="vl2v_adip"):
        adip_loss(rows(2), rows(2), rows(3), torch.tensor([0, 3]))
    net = student()
    with torch.no_grad():
        net.projection.weight.zero_()
        net.projection.bias.zero_()
    assert net.eval()(batch()["input"]).isfinite().all()


@pytest.mark.parametrize(("trained", "still"), [(("projection",), "features"), (("features",), "projection")])
def test_what_is_frozen_keeps_its_bits_and_statistics(trained: tuple[str, ...], still: str):
    net, teacher = student(), rows(8, seed=4)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    module = AdipTraining(net, trained, lambda images: teacher).train()
    optimizer = torch.optim.Adam(module.param_groups(), lr=0.01)
    first = module(batch(), Progress())["loss"].item()
    for _ in range(20):
        loss = module(batch(), Progress())["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < first
    after = net.state_dict()
    changed = {k.partition(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed == set(trained)
    assert torch.equal(before["features.2.running_mean"], after["features.2.running_mean"])


# ---- weights of a valley -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([5, 4, 3, 2, 1], None),
        ([5, 4, 3, 1, 2, 2, 1, 9, 9, 9, 9, 9, 9], (3, 6)),
        ([1, 9, 9], (0, 0)),
        ([2, 1, 1, 1, 3, 1, 3, 1], (1, 7)),
    ],
)
def test_the_valley_begins_where_the_loss_stops_falling_and_ends_where_it_stays_high(
    losses: list[float], expected: Any
):
    assert valley(losses) == expected


def test_the_average_is_that_of_all_weights_in_the_valley_and_survives_a_checkpoint():
    net, average, seen = nn.Linear(1, 1), DenseAverage(), []
    for segment, loss in enumerate([9.0, 1.0, 1.0, 1.0]):
        for step in range(3):
            with torch.no_grad():
                net.weight.fill_(10.0 * segment + step)
            average.add(net)
            seen.append(net.weight.item())
        average.evaluated(loss)
    resumed = DenseAverage()
    resumed.load_state_dict(average.state_dict())
    found = resumed.result()
    assert found is not None and found["weight"].item() == pytest.approx(sum(seen[3:]) / 9)
    assert DenseAverage().result() is None


# ---- a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares and bars, bright on dark."""
    base, draw = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 6)):
        for name in ("bar", "square"):
            (base / split / name).mkdir(parents=True)
            for i in range(count):
                image = draw.integers(0, 60, (16, 16, 3)).astype(np.uint8)
                top, left = draw.integers(1, 7, 2)
                height, width = (3, 8) if name == "bar" else (8, 8)
                image[top : top + height, left : left + width] = draw.integers(180, 255, 3)
                Image.fromarray(image).save(base / split / name / f"{i}.png")
    return base


def domain(folder: Path, style: str, **options: Any) -> dict[str, Any]:
    data = {"name": f"styled:imagefolder:{folder}", "image_size": 16, "augment": "plain", "val": 0.25}
    return {**data, "options": {"style": [{style: options}]}}


def test_a_style_is_on_every_image_in_training_and_in_evaluation(folder: Path):
    inverted = load(DataSpec.model_validate(domain(folder, "RandomInvert", p=1.0)))
    plain = load(DataSpec(name=f"imagefolder:{folder}", image_size=16, augment="plain", val=0.25))
    for split, train in (("train", True), ("test", False)):
        pixels = [
            unnormalise(b.dataset(split, train=train)[1]["input"][None], b.mean, b.std).int() for b in (inverted, plain)
        ]
        assert (pixels[0] + pixels[1] - 255).abs().max() <= 1
    assert inverted.fingerprint != plain.fingerprint


def test_batches_hold_as_many_images_of_each_domain_and_begin_anywhere(folder: Path):
    sets = [load(DataSpec.model_validate(domain(folder, "RandomInvert", p=p))) for p in (0.0, 1.0)]
    parts = [Loader(s.dataset("train", train=True), n, shuffle=True, drop_last=True) for s, n in zip(sets, (4, 8))]
    both = DomainBatches(parts)
    assert len(both) == 6 and both.batch_size == 12
    every = list(both.batches(0, 0, 2))
    assert len(every) == 12 and all(len(b["input"]) == 12 for b in every)
    late = list(both.batches(1, 2, 2))
    assert all(torch.equal(a["input"], b["input"]) for a, b in zip(late, every[8:]))


def test_a_run_aligns_distils_and_leaves_a_student_with_its_class_vectors(folder: Path, tmp_path: Path):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = {"projection_dim": 8, "vision_config": {**small, "patch_size": 4}, "text_config": small}
    adam = {"epochs": 5, "batch_size": 8, "eval_every": 1, "optimizer": {"name": "adam", "lr": 1e-2, "weight_decay": 0}}
    texts = {"tokenizer": "bytes", "templates": ["{}"], "context": 12}
    captions = {"name": f"captions:imagefolder:{folder}", "image_size": 16, "augment": "plain", "options": texts}
    raw = {
        "method": "vl2v_adip",
        "domains": {
            "plain": domain(folder, "RandomInvert", p=0.0),
            "grey": domain(folder, "Grayscale", num_output_channels=3),
            "inverted": domain(folder, "RandomInvert", p=1.0),
        },
        "target": "inverted",
        "teacher": {"model": "hf:config:clip", "options": clip, "data": captions, "train": adam},
        "student": {
            "model": "stillhouse:mlp",
            "options": {"widths": [16]},
            "data": {"name": f"imagefolder:{folder}", "image_size": 16, "augment": "plain"},
            "train": adam,
        },
        "align": {**adam, "epochs": 2},
        "distil": {**adam, "epochs": 4},
        "evaluate": ["accuracy"],
    }
    figures = execute(recipe.validate(raw), tmp_path / "run", cpu=True)
    assert 0 <= figures["accuracy"] <= 1 and {"accuracy_teacher", "accuracy_source"} <= figures.keys()
    product = load_product(tmp_path / "run")
    assert product.module.vectors.shape == (2, 8)
    torch.testing.assert_close(product.module.vectors.norm(dim=1), torch.ones(2))
    kd = execute(recipe.validate({**raw, "mode": "kd", "align": None}), tmp_path / "kd", cpu=True)
    assert 0 <= kd["accuracy"] <= 1
    white = {**raw, "student": None, "align": None, "swad": None}
    execute(recipe.validate(white), tmp_path / "white", cpu=True)
    assert load_product(tmp_path / "white").module(torch.zeros(1, 3, 16, 16)).shape == (1, 2)
    with pytest.raises(UserError, match="none of the domains"):
        recipe.validate({**raw, "target": "sketch"})

"""Samples with any number of labels: cross-entropy and KD are those of each label, unknown ones count for nothing, and
a recipe runs from a table of images to a product."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.io import read_image

from stillhouse import Progress, Signals, UserError
from stillhouse.config.specs import DataSpec
from stillhouse.data import load
from stillhouse.evaluation.multi_label import MultiLabelMeter
from stillhouse.objectives.ce import CrossEntropy
from stillhouse.objectives.kd import KD
from stillhouse.runs.execution import execute
from stillhouse.runs.products import load_product
from stillhouse.runs.recipe import validate
from stillhouse.tasks.multi_label import MultiLabel

COLOURS = ("red", "green", "blue")
TASK = MultiLabel(COLOURS, (4,))


def scores(seed: int) -> torch.Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))


def test_objectives_are_those_of_each_label():
    label = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [-100, 1, -100]])
    known = label != -100
    student, teacher = (TASK.read(scores(seed), {}) for seed in (0, 1))
    ce = CrossEntropy()(student, Signals(), {"label": label}, Progress())["loss"]
    expected = F.binary_cross_entropy_with_logits(scores(0)[known], label[known].float())
    torch.testing.assert_close(ce, expected)
    p, q = (scores(1)[known] / 2).sigmoid(), (scores(0)[known] / 2).sigmoid()
    kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    kd = KD(temperature=2)(student, teacher, {"label": label}, Progress())["loss"]
    torch.testing.assert_close(kd, 4 * kl)


def test_figures_count_what_is_known():
    meter = MultiLabelMeter(COLOURS, ("labels", "classes"))
    given = torch.tensor([[2.0, -1.0, 3.0], [-2.0, 1.0, 3.0], [1.0, -1.0, 3.0]])
    label = torch.tensor([[1, 0, 1], [0, 0, 1], [0, -100, 1]])
    meter.add({"label": label}, TASK.read(given, {}))
    found = meter.figures()
    assert found["ap_class_red"] == 1 and "ap_class_green" not in found, "a label that no sample has cannot be ranked"
    assert found["map"] == 1 and found["exact_match"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx(2 * 4 / (6 + 4))  # right: 1 red, 3 blue; found: 2 + 1 + 3; there are 4


def painted(folder: Path, count: int, rows: list[dict[str, str]] | None = None) -> None:
    """Images of three bars, each of which is bright if the image has its label."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        has = [bool(i >> n & 1) for n in range(3)]
        image = Image.new("RGB", (24, 24))
        for n, bright in enumerate(has):
            bar = [40 + 3 * (i % 7)] * 3
            bar[n] = 230 if bright else 40
            image.paste(tuple(bar), (8 * n, 0, 8 * n + 8, 24))
        image.save(folder / f"{i}.png")
        names = ";".join(c for c, b in zip(COLOURS, has) if b)
        by_column = {c: str(int(b)) if i % 5 else "" for c, b in zip(COLOURS, has)}
        lines.append({"file_name": f"{i}.png", "labels": names, **by_column})
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(rows or lines)


@pytest.mark.parametrize("columns", [[], list(COLOURS)])
def test_a_recipe_runs_from_a_table_to_a_product(tmp_path: Path, columns: list[str]):
    painted(tmp_path / "set" / "train", 48)
    painted(tmp_path / "set" / "test", 16)
    network = {"model": "stillhouse:convnet2", "options": {"width": 8}}
    train = {"epochs": 6, "batch_size": 8, "optimizer": {"name": "adamw", "lr": 1e-2}}
    tree = {
        "data": {"name": f"multilabel:{tmp_path / 'set'}", "image_size": 24, "augment": "plain",
                 "options": {"columns": columns}},
        "teacher": {**network, "train": train},
        "student": network,
        "objectives": ["ce", "kd"],
        "train": train,
    }  # fmt: skip
    found = execute(validate(tree), tmp_path / "run", cpu=True)
    assert found["map"] > 0.9 and found["f1"] > 0.8
    product = load_product(tmp_path / "run")
    assert product.task.classes == (tuple(columns) or ("blue", "green", "red"))
    image = read_image(str(tmp_path / "set" / "test" / "5.png"))
    assert set(product.task.predict(product.module, [image])[0]["labels"]) == {"red", "blue"}
    assert (tmp_path / "run" / "report.html").is_file()


def test_mistakes_of_a_table_are_told(tmp_path: Path):
    painted(tmp_path / "a" / "train", 8)
    painted(tmp_path / "a" / "test", 8, [{"file_name": "1.png", "labels": "violet"}])
    with pytest.raises(UserError, match="'violet' is of no training image"):
        load(DataSpec(name=f"multilabel:{tmp_path / 'a'}"))
    painted(tmp_path / "b", 8, [{"file_name": "1.png", "red": "maybe"}])
    with pytest.raises(UserError, match="'maybe' in the column 'red'"):
        load(DataSpec(name=f"multilabel:{tmp_path / 'b'}", options={"columns": ["red"]}))
    with pytest.raises(UserError, match=r"no training image of .* has a label"):
        load(DataSpec(name=f"multilabel:{tmp_path / 'b'}"))
    with pytest.raises(UserError, match="need the same labels"):
        TASK.read(torch.zeros(2, 4), {})

"""Labelled and unlabelled batches side by side: the shorter is cycled by key, and a start anywhere gives the same."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from stillhouse.config.specs import DataSpec, MethodConfig, TrainSpec, UnlabelledSpec
from stillhouse.data import BatchKey, BatchLoader, Loader, Streams, adapt, load
from stillhouse.errors import UserError
from stillhouse.runs.recipe import validate
from stillhouse.runs.run import Run
from stillhouse.training.engine import fit
from stillhouse.training.module import TrainingModule


def loader(size: int, batch: int, seed: int, workers: int = 0, **share: int) -> Loader:
    data = load(DataSpec(name="digits", size=size)).dataset("train", train=True)
    return Loader(data, batch, seed=seed, shuffle=True, drop_last=True, workers=workers, **share)


def streams(labelled: int = 40, unlabelled: int = 130, workers: int = 0) -> Streams:
    return Streams(loader(labelled, 8, 0, workers), unlabelled=loader(unlabelled, 16, 1, workers))


def same(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)


@pytest.mark.parametrize(("labelled", "unlabelled"), [(40, 130), (130, 40), (40, 80)])
def test_batches_are_the_same_from_any_start(labelled: int, unlabelled: int):
    both = streams(labelled, unlabelled)
    length = len(both)
    assert length == max(labelled // 8, unlabelled // 16)
    whole = list(both.batches(epochs=3))
    assert len(whole) == 3 * length
    for start in range(0, 3 * length, 3):
        rest = list(streams(labelled, unlabelled).batches(*divmod(start, length), epochs=3))
        assert len(rest) == 3 * length - start and all(map(same, rest, whole[start:]))


def test_each_stream_is_its_own_loaders_without_end():
    both, length = streams(), 3 * len(streams())
    for batch, one, other in zip(both.batches(epochs=3), both.labelled.batches(), both.unlabelled.batches()):
        length -= 1
        extra = batch.pop("unlabelled")
        assert same(batch, one) and "label" not in extra
        assert same(extra, {k: v for k, v in other.items() if k != "label"})
    assert not length
    passes = [b["index"] for b in islice(both.batches(), 10)]
    assert not torch.equal(torch.cat(passes[:5]), torch.cat(passes[5:]))  # a pass has an order of its own


def test_workers_make_the_same_batches():
    assert all(map(same, streams(workers=1).batches(0, 2, epochs=1), streams().batches(0, 2, epochs=1)))


def test_it_is_a_loader_of_its_labelled_data():
    both = streams()
    assert isinstance(both, BatchLoader) and adapt(both) is both
    assert both.count == 40 and torch.equal(both.labels(), both.labelled.labels()) and both.usual_size == 8
    with pytest.raises(UserError, match="Cannot start at batch 9 of an epoch of 8"):
        both.batches(0, 9)
    with pytest.raises(UserError, match="unlabelled data holds no samples"):
        Streams(both.labelled, unlabelled=Loader(_Nothing(), 8))


class _Nothing:
    def __len__(self) -> int:
        return 0


class Consistency(TrainingModule):
    """Learns from both streams; stops where it is told to, as a killed process does."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student, self.stop = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), stop

    def param_groups(self) -> list[dict]:
        return [{"params": list(self.parameters())}]

    def forward(self, batch: dict, progress) -> dict[str, Tensor]:
        if progress.epoch * progress.steps_per_epoch + progress.batch == self.stop:
            raise KeyboardInterrupt
        known = nn.functional.cross_entropy(self.student(batch["input"]), batch["label"])
        certain = self.student(batch["unlabelled"]["input"]).softmax(-1).amax(-1).mean()
        return {"loss": known - 0.1 * certain, "certain": certain}


def test_a_training_that_was_stopped_in_mid_epoch_ends_in_the_same_weights(tmp_path: Path):
    spec = TrainSpec(epochs=2, log_every=1, checkpoint_seconds=0)
    whole, stopped, resumed = Consistency(), Consistency(stop=11), Consistency()
    fit(whole, streams(), spec, folder=tmp_path / "whole", cpu=True)
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, streams(), spec, folder=tmp_path / "cut", cpu=True)
    steps: list[int] = []
    resumed.register_forward_pre_hook(lambda m, args: steps.append(args[1].epoch * 8 + args[1].batch))
    fit(resumed, streams(), spec, folder=tmp_path / "cut", cpu=True)
    assert steps[0] == 11
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))


POOL = {"name": "digits", "classes": [0, 1, 2], "size": 30}


def test_a_recipe_leaves_unlabelled_samples_over():
    spec = DataSpec(**POOL, holdout=0.2, unlabelled=UnlabelledSpec(size=100, foreign=0.6))
    bundle = load(spec)
    known, pool = (bundle.dataset(s, train=False) for s in ("train", "unlabelled"))
    assert known.labels().tolist().count(0) == 8  # of 10, a fifth held out
    assert torch.bincount(pool.labels() + 1, minlength=4)[0] == 60 and len(pool) == 100
    everything = torch.cat([s.batch(BatchKey(0, np.arange(len(s)), 0, len(s)), 0)["input"] for s in (known, pool)])
    assert len(everything.flatten(1).unique(dim=0)) == len(everything)
    rest = load(DataSpec(**POOL, unlabelled=UnlabelledSpec()))
    assert (
        len(rest.dataset("unlabelled", train=False))
        == len(load(DataSpec(**{**POOL, "size": None})).dataset("train", train=True)) - 30
    )
    assert "unlabelled" not in spec.model_copy(update={"unlabelled": None}).model_dump()


def test_a_run_makes_both_streams(tmp_path: Path):
    run = Run(tmp_path, MethodConfig())
    both = run.streams(DataSpec(**POOL, unlabelled=UnlabelledSpec(batch_size=16)), 10)
    batch = next(iter(both))
    assert batch["input"].shape == (10, 1, 8, 8) and batch["unlabelled"]["input"].shape == (16, 1, 8, 8)
    assert both.batch_size == 10 and len(both) == both.unlabelled.count // 16 and both.unlabelled.seed != run.seed
    other = DataSpec(name="digits", image_size=32)
    images = DataSpec(name="digits", size=40, image_size=16, unlabelled=UnlabelledSpec(data=other))
    with pytest.raises(UserError, match=r"have shape \(1, 32, 32\), those of 'digits' \(1, 16, 16\)"):
        run.streams(images, 10)
    with pytest.raises(UserError, match=r"set data\.unlabelled, such as"):
        run.streams(DataSpec(**POOL), 10)


def test_another_data_set_is_normalised_as_the_labelled_one(tmp_path: Path):
    for name, level in (("bright", 200), ("dark", 20)):
        for label in ("a", "b"):
            for i in range(4):
                path = tmp_path / name / "train" / label / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (level + i, level - i, level)).save(path)
    bright, dark = (
        DataSpec(name=f"imagefolder:{tmp_path / n}", augment="plain", image_size=8) for n in ("bright", "dark")
    )
    run = Run(tmp_path, MethodConfig())
    spec = bright.model_copy(update={"unlabelled": UnlabelledSpec(data=dark)})
    task, pool = run.data(spec).task, run.streams(spec, 2).unlabelled.dataset
    pixels = pool[0]["input"] * torch.tensor(task.std)[:, None, None] + torch.tensor(task.mean)[:, None, None]
    assert ((255 * pixels).round() - 20).abs().max() <= 4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size": None}, "set size, or unlabelled.data"),
        ({"classes": None, "unlabelled": {"foreign": 0.5}}, "needs `classes`"),
        ({"unlabelled": {"data": {"name": "digits"}, "size": 3}}, "set data.size there"),
        ({"unlabelled": {"size": 100000}}, "100000 samples of the data set's classes were asked for"),
        ({"unlabelled": {"foreign": 0.99}}, "set data.unlabelled.size lower"),
    ],
)
def test_unlabelled_samples_that_are_not_there_are_refused(keys: dict, message: str):
    with pytest.raises((UserError, ValueError), match=message):
        load(DataSpec(**{**POOL, "unlabelled": {}, **keys}))


def test_a_method_that_reads_no_unlabelled_samples_refuses_them():
    recipe = {"data": {**POOL, "unlabelled": {}}, "student": "stillhouse:mlp", "objectives": ["ce"]}
    with pytest.raises(UserError, match=r"data\.unlabelled does nothing for the method 'distillation'"):
        validate(recipe)

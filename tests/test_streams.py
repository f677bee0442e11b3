"""Labelled and unlabelled batches side by side: the shorter is cycled by key, and a start anywhere gives the same."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stillhouse.config.specs import DataSpec, TrainSpec
from stillhouse.data import BatchLoader, Loader, Streams, adapt, load
from stillhouse.errors import UserError
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

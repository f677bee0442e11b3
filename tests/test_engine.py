"""What one optimiser step of `fit` is made of: the tokens and samples of accumulated batches weigh alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stillhouse import Distillation
from stillhouse.config.specs import TrainSpec
from stillhouse.data import adapt
from stillhouse.objectives.ce import CrossEntropy
from stillhouse.objectives.gkd import GKD
from stillhouse.signals import Batch
from stillhouse.training.engine import fit

TOKENS = 13


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(TOKENS, 6), nn.Linear(6, TOKENS))


def text(counts: list[int]) -> Batch:
    """Rows of ten tokens, of which so many count."""
    draws = torch.Generator().manual_seed(sum(counts))
    ids, label = (torch.randint(TOKENS, (len(counts), 10), generator=draws) for _ in range(2))
    return {"input": ids, "label": torch.stack([row.where(torch.arange(10) < n, torch.tensor(-100)) for row, n in zip(label, counts)])}


def together(*batches: Batch) -> Batch:
    return {key: torch.cat([b[key] for b in batches]) for key in batches[0]}


def trained(batches: list[Batch], folder: Path, **train: object) -> Tensor:
    """The student's weights after an epoch of plain gradient descent."""
    module = Distillation(net(0), net(1), [CrossEntropy(), (GKD(), 1.0)])
    optimizer = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    spec = TrainSpec.model_validate({"epochs": 1, "optimizer": optimizer, "schedule": {"name": "constant"}, **train})
    fit(module, adapt(batches), spec, folder=folder, cpu=True)
    module.close()
    return torch.cat([p.detach().flatten() for p in module.student.parameters()])


def test_accumulated_batches_of_unequal_tokens_step_as_one_big_batch(tmp_path: Path) -> None:
    few, many = text([1, 2]), text([10, 9])
    accumulated = trained([few, many], tmp_path / "two", accumulate=2)
    torch.testing.assert_close(accumulated, trained([together(few, many)], tmp_path / "one"))
    assert not torch.equal(accumulated, trained([many, many], tmp_path / "other", accumulate=2))


def test_a_last_step_of_fewer_batches_is_their_mean(tmp_path: Path) -> None:
    first, second, last = text([3, 9]), text([10, 1]), text([2, 4])
    accumulated = trained([first, second, last], tmp_path / "three", accumulate=2)
    torch.testing.assert_close(accumulated, trained([together(first, second), last], tmp_path / "two"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_masks_tokens_are_those_that_count(tmp_path: Path, accumulate: int) -> None:
    batches = [{**text([10, 10]), "mask": torch.arange(10).expand(2, -1) < n} for n in (2, 8)]
    expected = trained([together(*batches)] if accumulate == 2 else batches, tmp_path / "as_one")
    torch.testing.assert_close(trained(batches, tmp_path / "given", accumulate=accumulate), expected)

"""Objectives side by side in one distillation: any of them together, each saying what it says alone; and a sentence
where they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import stillhouse
from stillhouse import catalog, models
from stillhouse.config.specs import ModelSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.distillation.teachers import CoTrainedTeacher, FrozenTeacher, PastSelf
from stillhouse.distillation.weighted import WeightedObjective
from stillhouse.errors import UserError

FROZEN = [
    "ce",
    "kd",
    "nkd",
    "uskd",
    "pld",
    "nd",
    "dkd",
    "fitnet",
    "at",
    "nst",
    "sp",
    "rkd",
    "pkt",
    "vid",
    "dist",
    "logit_standardisation",
    "review_kd",
    "ofa_kd",
]
WITHOUT_LAYERS = ["ce", "kd", "nkd", "pld", "dkd", "at", "nst", "sp", "rkd", "pkt", "dist", "logit_standardisation"]
OPTIONS = {"ofa_kd": {"stages": [2, 3, 4]}}
SPAN = Progress(epoch=5, epochs=10)


def network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return models.build(ModelSpec(model="stillhouse:resnet8"), 5, (3, 16, 16))


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "input": torch.randn(6, 3, 16, 16, generator=generator),
        "label": torch.tensor([0, 1, 2, 3, 4, 4]),
        "index": torch.arange(6),
    }


class Whole:
    """The training set that `prepare` asks about."""

    def labels(self, split: str = "train") -> torch.Tensor:
        return torch.arange(20) % 5

    def class_mean(self, what: str, of: str = "teacher") -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(5, 64, generator=torch.Generator().manual_seed(1)), torch.full((5,), 4)


def terms(names: list[str]) -> dict[str, torch.Tensor]:
    objectives = [catalog.objective(n)(**OPTIONS.get(n, {})) for n in names]
    module = Distillation(
        network(1),
        {"teacher": FrozenTeacher(network(0))},
        [WeightedObjective(o, 1.0, n) for o, n in zip(objectives, names)],
    )
    module.build(batch())
    module.prepare(Whole())
    module.train()
    torch.manual_seed(0)
    out = module(batch(), SPAN)
    out["loss"].backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in module.parameters())
    module.close()
    return out


def test_all_objectives_of_a_frozen_teacher_run_in_one_distillation_and_their_sum_is_the_loss() -> None:
    out = terms(FROZEN)
    parts = [v for k, v in out.items() if k != "loss"]
    assert len(parts) >= len(FROZEN) and all(bool(v.isfinite()) for v in parts)


def test_an_objective_says_beside_others_what_it_says_alone() -> None:
    together = terms(WITHOUT_LAYERS)
    for name in WITHOUT_LAYERS:
        alone = terms([name])
        for key in (k for k in alone if k != "loss"):
            assert torch.allclose(together[key], alone[key], rtol=1e-5), key


def test_teachers_of_several_kinds_serve_their_own_objectives_in_one_distillation() -> None:
    past = PastSelf()
    past.start(torch.arange(20) % 5, 5)
    teachers = {"teacher": FrozenTeacher(network(0)), "peer": CoTrainedTeacher(network(2)), "past": past}
    objectives = [catalog.objective("kd")(), catalog.objective("dml")(), catalog.objective("ps_kd")()]
    objectives[1].teacher, objectives[2].teacher = "peer", "past"
    module = Distillation(network(1), teachers, objectives)
    module.build(batch())
    module.train()
    module(batch(), SPAN)["loss"].backward()
    peer = module.teachers["peer"]
    assert all(p.grad is not None for p in peer.parameters()), "the peer learns too"
    module.close()


@pytest.mark.parametrize("name", ["ce", "dkd", "nkd", "pld"])
def test_an_objective_that_needs_labels_is_refused_over_unlabelled_samples(name: str, tmp_path: Path) -> None:
    data = batch()
    labels = torch.tensor([0, 1, -1, 3, -1, 4])
    loader = DataLoader(TensorDataset(data["input"], labels), batch_size=6)
    with pytest.raises(UserError, match=f"'{name}' needs labels, but 2 training samples have none"):
        stillhouse.distill(
            network(0), network(1), loader, ["kd", name], train={"epochs": 1}, folder=tmp_path, progress=False
        )


def test_objectives_without_labels_train_on_unlabelled_samples(tmp_path: Path) -> None:
    data = batch()
    loader = DataLoader(TensorDataset(data["input"], torch.full((6,), -1)), batch_size=6)
    stillhouse.distill(
        network(0), network(1), loader, ["kd", "rkd", "fitnet"], train={"epochs": 1}, folder=tmp_path, progress=False
    )
    assert "kd" in (tmp_path / "metrics.csv").read_text()


def test_an_objective_whose_batch_has_no_label_is_refused_by_name() -> None:
    module = Distillation(network(1), {"teacher": FrozenTeacher(network(0))}, [catalog.objective("dkd")()])
    bare = {k: v for k, v in batch().items() if k != "label"}
    with pytest.raises(UserError, match="'dkd' needs `label`"):
        module.build(bare)

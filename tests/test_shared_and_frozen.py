"""What a teacher may not share with its student, and what of a student stays frozen while it trains."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stillhouse
from stillhouse import CoTrainedTeacher, Ensemble, FrozenTeacher, Momentum
from stillhouse.errors import UserError

DATA = [(torch.randn(8, 5, generator=torch.Generator().manual_seed(i)), torch.arange(8) % 3) for i in range(3)]
TRAIN = {"epochs": 1, "optimizer": {"name": "sgd", "lr": 0.1}}


class Net(nn.Module):
    def __init__(self, body: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.head = body, head or nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def body(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), *layers)


def distill(teacher: Any, student: nn.Module) -> None:
    stillhouse.distill(teacher, student, DATA, ["ce", "kd"], train=TRAIN, progress=False)


KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "a plain module": lambda network: network,
    "a member of an ensemble": lambda network: Ensemble([FrozenTeacher(Net(body())), FrozenTeacher(network)]),
    "a peer": CoTrainedTeacher,
    "the second by name": lambda network: {"teacher": Net(body()), "other": network},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_shares_a_trunk_is_refused_whatever_its_kind(kind: str) -> None:
    trunk = body(nn.Dropout(0.5))
    with pytest.raises(UserError, match=r"shares 'body\.0\.weight' with the student \(and \d+ more\).*copy\.deepcopy"):
        distill(KINDS[kind](Net(trunk)), Net(trunk))


def test_the_student_itself_a_shared_norm_and_a_shared_dropout_are_refused() -> None:
    student = Net(body())
    with pytest.raises(UserError, match="shares"):
        distill(student, student)
    norm, drop = nn.BatchNorm1d(6, affine=False), nn.Dropout(0.5)
    with pytest.raises(UserError, match=r"shares 'body\.1\.running_mean'"):
        distill(Net(nn.Sequential(nn.Linear(5, 6), norm)), Net(nn.Sequential(nn.Linear(5, 6), norm)))
    with pytest.raises(UserError, match=r"shares 'body\.2'"):
        distill(Net(body(drop)), Net(body(drop)))
    tied = Net(body())
    tied.head.weight.data = student.head.weight.data  # one storage in two parameters
    with pytest.raises(UserError, match=r"shares 'head\.weight'"):
        distill(tied, student)


def test_copies_a_momentum_teacher_and_a_shared_frozen_layer_are_not_refused() -> None:
    student = Net(body())
    distill({"teacher": copy.deepcopy(student), "own": Momentum(0.9)}, student)
    head = nn.Linear(6, 3).requires_grad_(False)
    distill(Net(body(), head), Net(body(), head))


def frozen_by_mode(norm: nn.Module) -> None:
    norm.eval()


def frozen_by_weights(norm: nn.Module) -> None:
    norm.requires_grad_(False)


@pytest.mark.parametrize("freeze", [frozen_by_mode, frozen_by_weights])
def test_frozen_batch_norm_stays_frozen(freeze: Callable[[nn.Module], None]) -> None:
    student = Net(body(nn.Linear(6, 6), nn.BatchNorm1d(6)))
    freeze(student.body[1])
    before, moved = student.body[1].running_mean.clone(), student.body[3].running_mean.clone()
    validation = [(torch.randn(4, 5), torch.arange(4) % 3)]  # evaluation and training mode take turns
    stillhouse.distill(
        Net(body()), student, DATA, ["ce", "kd"], val_loader=validation, train={**TRAIN, "epochs": 3}, progress=False
    )
    assert torch.equal(student.body[1].running_mean, before)
    assert not torch.equal(student.body[3].running_mean, moved)


def test_a_student_in_evaluation_mode_is_trained() -> None:
    student = Net(body()).eval()
    before = student.body[1].running_mean.clone()
    distill(Net(body()), student)
    assert not torch.equal(student.body[1].running_mean, before)


def test_frozen_batch_norm_takes_batches_of_one() -> None:
    student = Net(body())
    student.body[1].requires_grad_(False)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(4, 5), torch.arange(4) % 3), batch_size=1
    )
    stillhouse.distill(Net(body()), student, loader, ["ce", "kd"], train=TRAIN, progress=False)


def test_frozen_batch_norm_stays_frozen_under_other_trainers(tmp_path: Path) -> None:
    lightning, transformers = pytest.importorskip("lightning.pytorch"), pytest.importorskip("transformers")
    from stillhouse.integrations.lightning import DistillationModule
    from stillhouse.integrations.transformers import DistillationTrainer

    class Wrapped(Net):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": super().forward(x)}

    for use in ("lightning", "transformers"):
        student = Wrapped(body(nn.Linear(6, 6), nn.BatchNorm1d(6)))
        frozen_by_weights(student.body[1])
        before, moved = student.body[1].running_mean.clone(), student.body[3].running_mean.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if use == "lightning":
                module = DistillationModule(student, Net(body()), optimizer={"lr": 0.1})
                quiet = {
                    "logger": False,
                    "enable_progress_bar": False,
                    "enable_model_summary": False,
                    "enable_checkpointing": False,
                }
                loader = torch.utils.data.DataLoader(DATA, batch_size=None)
                lightning.Trainer(accelerator="cpu", max_epochs=2, default_root_dir=str(tmp_path), **quiet).fit(
                    module, loader, loader
                )
            else:
                arguments = transformers.TrainingArguments(
                    str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", num_train_epochs=2
                )
                rows = [{"x": x, "labels": int(y)} for batch in DATA for x, y in zip(*batch)]
                DistillationTrainer(
                    student, arguments, train_dataset=rows, teachers=FrozenTeacher(Wrapped(body()))
                ).train()
        assert torch.equal(student.body[1].running_mean, before), use
        assert not torch.equal(student.body[3].running_mean, moved), use

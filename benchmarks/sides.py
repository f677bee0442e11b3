"""One distillation step four ways: a hand-written loop, Stillhouse, torchdistill and NVIDIA Model Optimizer, each used
as its documentation shows.

All lower 0.1 CE + 0.9 T^2 KL at T = 4 by SGD with momentum; the teacher is frozen, in evaluation mode and outside
autograd; batches are in memory, and no side writes checkpoints. torchdistill leaves the teacher's mode to the user:
without the `eval()` here it would train the teacher's batch norm.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from turns import Step

from stillhouse import models
from stillhouse.config.specs import ModelSpec, TrainSpec
from stillhouse.signals import Batch

TEMPERATURE, CE_WEIGHT, KD_WEIGHT = 4.0, 0.1, 0.9
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
CLASSES = 100


@dataclass(frozen=True)
class Pair:
    """A teacher and a student by name; `make` gives the same initial weights every time."""

    teacher: str
    student: str
    device: torch.device
    size: int = 32

    def make(self) -> tuple[nn.Module, nn.Module]:
        """(teacher, student) of one side, on the device."""
        torch.manual_seed(0)
        shape = (3, self.size, self.size)
        teacher = models.build(ModelSpec(model=self.teacher), CLASSES, shape).eval()
        student = models.build(ModelSpec(model=self.student), CLASSES, shape).train()
        return teacher.to(self.device), student.to(self.device)

    def data(self, batch_size: int, count: int = 4) -> list[Batch]:
        """`count` batches of random images and labels, on the device."""
        made = torch.Generator().manual_seed(1)
        images = torch.randn(count, batch_size, 3, self.size, self.size, generator=made).to(self.device)
        labels = torch.randint(CLASSES, (count, batch_size), generator=made).to(self.device)
        return [{"input": x, "label": y} for x, y in zip(images, labels)]


def hand_written(teacher: nn.Module, student: nn.Module) -> Step:
    """The loop that anybody would write."""
    optimizer = torch.optim.SGD(student.parameters(), **SGD)

    def step(batch: Batch) -> None:
        with torch.no_grad():
            targets = F.log_softmax(teacher(batch["input"]) / TEMPERATURE, dim=-1)
        logits = student(batch["input"])
        kd = F.kl_div(F.log_softmax(logits / TEMPERATURE, dim=-1), targets, reduction="batchmean", log_target=True)
        loss = CE_WEIGHT * F.cross_entropy(logits, batch["label"]) + KD_WEIGHT * TEMPERATURE**2 * kd
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def torchdistill(teacher: nn.Module, student: nn.Module) -> Step:
    """torchdistill's distillation box under its documented training loop
    (examples/torchvision/image_classification.py), logger included.

    Raises:
        ImportError: where torchdistill is not installed.
    """
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.misc.log import MetricLogger, SmoothedValue

    logging.getLogger("torchdistill").setLevel(logging.WARNING)
    device = next(student.parameters()).device
    paths = {
        f"{who}_module_{what}": value
        for who in ("student", "teacher")
        for what, value in (("path", "."), ("io", "output"))
    }
    loss = {
        "key": "KDLoss",
        "kwargs": {
            **paths,
            "temperature": TEMPERATURE,
            "alpha": CE_WEIGHT,
            "beta": KD_WEIGHT,
            "reduction": "batchmean",
        },
    }
    config = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": dict(SGD)},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}}},
    }
    box = get_distillation_box(teacher, student, {}, config, device, None, False, 1)
    box.pre_epoch_process(epoch=0)
    teacher.eval()
    metrics = MetricLogger(delimiter="  ")
    metrics.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
    metrics.add_meter("img/s", SmoothedValue(window_size=10, fmt="{value}"))

    def step(batch: Batch) -> None:
        began = time.time()
        images, labels = batch["input"].to(device), batch["label"].to(device)
        loss = box.forward_process(images, labels, {})
        box.post_forward_process(loss=loss)
        metrics.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
        metrics.meters["img/s"].update(len(images) / (time.time() - began))
        if torch.isnan(loss) or torch.isinf(loss):
            raise ValueError(f"The training loop was broken due to loss = {loss}")

    return step


def model_optimizer(teacher: nn.Module, student: nn.Module) -> Step:
    """NVIDIA Model Optimizer's distillation model in a plain loop, as its guide shows.

    Raises:
        ImportError: where nvidia-modelopt, or something that it imports, is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of other libraries' versions, and a reminder of the student's loss, which `step` passes
        import modelopt.torch.distill as mtd

        config = {
            "teacher_model": teacher,
            "criterion": mtd.LogitsDistillationLoss(temperature=TEMPERATURE, reduction="batchmean"),
            "loss_balancer": mtd.StaticLossBalancer(kd_loss_weight=KD_WEIGHT),
        }
        model = mtd.convert(student, mode=[("kd_loss", config)])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)

    def step(batch: Batch) -> None:
        output = model(batch["input"])
        loss = model.compute_kd_loss(student_loss=F.cross_entropy(output, batch["label"]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def stillhouse(teacher: nn.Module, student: nn.Module, loader: Any) -> None:
    """Stillhouse: a `Distillation` with `ce` and `kd` through its own loop, over the loader's one epoch."""
    from stillhouse.distillation.distillation import Distillation
    from stillhouse.objectives.ce import CrossEntropy
    from stillhouse.objectives.kd import KD
    from stillhouse.training.engine import fit

    module = Distillation(student, teacher, [(CrossEntropy(), CE_WEIGHT), (KD(TEMPERATURE), KD_WEIGHT)])
    with tempfile.TemporaryDirectory() as folder:
        fit(module, loader, options(), folder=Path(folder), cpu=next(student.parameters()).device.type == "cpu")
    module.close()


def options() -> TrainSpec:
    """Stillhouse's defaults, at the constant learning rate that all sides have, without checkpoints while it runs."""
    return TrainSpec.model_validate(
        {"epochs": 1, "optimizer": {"name": "sgd", **SGD}, "schedule": {"name": "constant"}, "checkpoint_seconds": 1e9}
    )


@torch.no_grad()
def gap(student: nn.Module, reference: nn.Module) -> float:
    """Relative distance of a student's parameters from the reference's: evidence that two sides did the same
    arithmetic."""
    mine, theirs = dict(student.named_parameters()), dict(reference.named_parameters())
    distances = torch.stack([(mine[name] - value).norm() for name, value in theirs.items()])
    return float(distances.norm() / torch.stack([value.norm() for value in theirs.values()]).norm())


PEERS: dict[str, tuple[Callable[[nn.Module, nn.Module], Step], str]] = {
    "torchdistill": (torchdistill, "torchdistill"),
    "model_optimizer": (model_optimizer, "nvidia-modelopt"),
}
"""Name -> (its step, its distribution on PyPI)."""


def twin(pair: tuple[nn.Module, nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A copy of teacher and student for another side."""
    return copy.deepcopy(pair[0]), copy.deepcopy(pair[1])

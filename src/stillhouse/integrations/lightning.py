"""Distillation inside Lightning: `DistillationModule`, for a `Trainer` of your own.

Hooks and the objectives' own layers are created in `setup`, before the optimiser and before a checkpoint is restored;
frozen teachers stay outside the module tree. Works with the package `lightning` or `pytorch_lightning`, whichever is in
use.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import OptimizerSpec, TrainSpec
from stillhouse.data import AdaptedLoader
from stillhouse.data.loader import as_batch
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.distillation.teachers import Teacher
from stillhouse.distillation.weighted import Objectives
from stillhouse.errors import MissingExtra, UserError
from stillhouse.functional.counting import IGNORED, counted, has_positions, step_count
from stillhouse.integrations.context import LoaderContext
from stillhouse.randomness import keyed
from stillhouse.signals import Batch, call_model, read_logits
from stillhouse.training.accumulation import StepMean, samples
from stillhouse.training.optimizers import make_optimizer, trained_in_float32


def _pytorch_lightning() -> Any:
    """The package whose Trainer the user has: the one imported already, else the one installed."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in [n for n in names if n in sys.modules] + list(names):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise MissingExtra("Training inside Lightning", "lightning")


_lightning = _pytorch_lightning()


class DistillationModule(_lightning.LightningModule):  # type: ignore[misc, name-defined]
    """A student that learns from teachers under Lightning's Trainer.

    Checkpoints hold the student (`distillation.student.…`), what objectives own and what teachers learn; never a frozen
    teacher. Terms are logged as `train/NAME` at the Trainer's `log_every_n_steps`, validation as `val/accuracy` and
    `val/nll`. Objectives that look at the whole training set (class means) read your training loader as it is. Each
    call of `fit` creates the objectives' own layers again, unless it restores a checkpoint.

    Args:
        student: the model being trained; the same object holds the weights afterwards. One in half precision is trained
            in float32, unless the Trainer's precision is `bf16-true` or `16-true`.
        teachers: one teacher (any module that gives logits, or a teacher of `stillhouse.distillation.teachers`),
            several by name, or None.
        objectives: names, mappings, `Objective`s or (Objective, weight) pairs, as in `stillhouse.distill`.
        optimizer: a function of the parameter groups that returns an optimiser (or whatever `configure_optimizers` may
            return), or options such as {"name": "adamw", "lr": 1e-3}.
        seed: seeds the layers that objectives make.
        embedding: the student's classifier submodule, where it is not found by itself.

    Batches are (input, label), or mappings with `input`, `label` and, for objectives that need it, `index`; or as
    transformers models take them.

    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> data = DataLoader(TensorDataset(torch.randn(16, 4), torch.arange(16) % 3), batch_size=8)
    >>> student, sgd = nn.Linear(4, 3), {"name": "sgd", "lr": 0.1}
    >>> module = DistillationModule(student, nn.Linear(4, 3), ["ce", "kd"], optimizer=sgd)
    >>> trainer = _lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False)  # doctest: +SKIP
    >>> trainer.fit(module, data)  # doctest: +SKIP
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: nn.Module | Teacher | Mapping[str, nn.Module | Teacher] | None,
        objectives: Objectives = ("ce", "kd"),
        *,
        optimizer: Callable[[list[dict[str, Any]]], Any] | OptimizerSpec | Mapping[str, Any],
        seed: int = 0,
        embedding: str | None = None,
    ) -> None:
        super().__init__()
        self.distillation = Distillation(
            student, teachers, [Distillation.entry(o) for o in objectives], seed=seed, embedding=embedding
        )
        self._optimizer = (
            optimizer
            if isinstance(optimizer, OptimizerSpec) or callable(optimizer)
            else OptimizerSpec.model_validate(dict(optimizer))
        )
        self._seed = seed
        self._ready = False
        self._batch: Batch = {}
        self._mean: StepMean | None = None  # of the optimiser step in progress

    @property
    def student(self) -> nn.Module:
        """The model being trained."""
        return self.distillation.student

    def forward(self, x: Any) -> Tensor:
        """Logits of the student for a batch's `input`."""
        return read_logits(call_model(self.student, {"input": x}))

    # ---- before training ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        trained_in_float32(self.student)
        self.trainer.fit_loop.setup_data()
        self._loader = AdaptedLoader(self.trainer.train_dataloader, self._seed, self.student)
        self._progress = _progress(self.trainer)
        with keyed("probe", self._seed):
            probe = next(iter(self._loader))
        self.distillation.build(probe)
        self._ready = True

    def configure_callbacks(self) -> list[Any]:
        return [_CloseOnError()]

    def configure_optimizers(self) -> Any:
        groups = self.distillation.param_groups()
        if isinstance(self._optimizer, OptimizerSpec):
            return make_optimizer(groups, TrainSpec.model_validate({"optimizer": self._optimizer}), self.student)
        return self._optimizer(groups)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Outside training there are no objectives' layers, so their weights are ignored."""
        if not self._ready:
            mine = self.state_dict()
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in mine}

    def on_fit_start(self) -> None:
        for teacher in self.distillation.teachers.values():
            if not isinstance(teacher, nn.Module):
                teacher.to(self.device)
        self._context = LoaderContext(
            self.distillation,
            self._progress,
            self._loader,
            self._seed,
            self.device,
            Path(self.trainer.default_root_dir),
        )
        self.distillation.prepare(self._context)

    def on_train_start(self) -> None:
        self.distillation.train()

    # ---- training ----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        now = self._progress
        now.step, now.epoch, now.batch = self.trainer.global_step, self.trainer.current_epoch, batch_idx
        if batch_idx == 0:
            self.distillation.begin_epoch(self._context)
            self.distillation.train()
        self._batch = as_batch(batch, self.student)
        if not has_positions(self._batch):
            self._batch["weighed"] = True  # by `_weighed`
        with self.trainer.precision_plugin.forward_context():
            self.distillation.before_step(self._batch, self._context)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        terms = self.distillation(self._batch, self._progress)
        if (self.trainer.global_step + 1) % max(self.trainer.log_every_n_steps, 1) == 0:
            self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        return self._weighed(terms["loss"])

    def _weighed(self, loss: Tensor) -> Tensor:
        """The loss as its batch's share of the optimiser step: every sample, or counted token, weighs the same."""
        if has_positions(self._batch):
            label = self._batch["label"]
            size: Tensor | int = step_count(self._batch, label, counted(self._batch, label.shape))
            usual: Tensor | int = size
        else:
            size, usual = samples(self._batch), self._loader.batch_size or 1
        if self._mean is None:
            self._mean = StepMean(
                usual, self.trainer.world_size, partial(self.trainer.strategy.reduce, reduce_op="sum")
            )
        return self._mean.weigh(loss, size)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        mean, self._mean = self._mean, None
        if mean is not None and not self.trainer.strategy.handles_gradient_accumulation:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            mean.finish(parameters, self.trainer.accumulate_grad_batches, shared=has_positions(self._batch))
        self.distillation.before_update(self._context)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.distillation.after_step(self._batch, self._progress, self.trainer.global_step > self._progress.step)
        self._batch = {}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy and mean negative log-likelihood, for labels that are ids of classes (B,) or of tokens (B, L)."""
        read = as_batch(batch, self.student)
        logits, labels = self(read["input"]).float().flatten(0, -2), read["label"].flatten()
        counts = labels != IGNORED
        figures = {
            "val/accuracy": ((logits.argmax(-1) == labels) & counts).sum() / counts.sum(),
            "val/nll": F.cross_entropy(logits, labels, ignore_index=IGNORED),
        }
        self.log_dict(figures, batch_size=int(counts.sum()), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits."""
        logits: Tensor = self(as_batch(batch)["input"])
        return logits

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            self.close()

    def close(self) -> None:
        """Leave no hook on any model; done at the end of every fit."""
        self.distillation.close()
        self._ready = False


class _CloseOnError(_lightning.Callback):  # type: ignore[misc, name-defined]
    """A fit that fails or is interrupted leaves no hooks either."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        pl_module.close()


def _progress(trainer: Any) -> Progress:
    """The length of a training, for schedules of weights. Raises `UserError` where it has no end."""
    batches, accumulate, steps = trainer.num_training_batches, trainer.accumulate_grad_batches, trainer.max_steps
    epochs = trainer.max_epochs
    if epochs in (None, -1) or math.isinf(batches):
        if steps == -1:
            raise UserError(
                "The length of this training is not known: give the Trainer max_epochs and a loader with a length, or "
                "max_steps."
            )
        if math.isinf(batches):
            batches, epochs = steps * accumulate, 1
        else:
            epochs = math.ceil(steps * accumulate / max(batches, 1))
    elif steps != -1:
        epochs = min(epochs, math.ceil(steps * accumulate / max(batches, 1)))
    return Progress(steps_per_epoch=int(batches), epochs=max(int(epochs), 1))

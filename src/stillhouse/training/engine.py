"""`fit`: a module trained over a loader, on the resumable loop and Hugging Face Accelerate: epochs, schedule,
precision, processes, averages, evaluation, best-of."""

from __future__ import annotations

import importlib.util
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.config.specs import TrainSpec
from stillhouse.errors import MissingExtra, UserError, unknown
from stillhouse.evaluation.quantities import quantity
from stillhouse.files import atomic_write
from stillhouse.functional.counting import has_positions, weigh_positions_alike
from stillhouse.models.recompute import recomputed
from stillhouse.signals import Batch, to_device
from stillhouse.training.accumulation import StepMean, samples
from stillhouse.training.context import Progress, TrainingContext
from stillhouse.training.display import Display
from stillhouse.training.loop import Loop, Stateful
from stillhouse.training.module import TrainingModule
from stillhouse.training.optimizers import make_optimizer, rate_factor


@dataclass
class FitResult:
    """The outcome of a fit: the last (or best) evaluation, the seconds spent in steps, and the epochs done."""

    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    epochs: int = 0


def check_trackers(spec: TrainSpec, where: str = "train") -> None:
    """Raises `MissingExtra` for a tracker that is not installed, which Accelerate would ignore."""
    for tracker in spec.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise MissingExtra(f"{where}.trackers: {tracker}", {"tensorboard": "trackers"}.get(tracker, tracker))


def make_accelerator(spec: TrainSpec, folder: Path | None = None, cpu: bool = False) -> Any:
    """An `Accelerator` for one fit: device, processes and precision are Accelerate's."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
    from accelerate.state import AcceleratorState

    check_trackers(spec)
    if spec.precision == "fp16" and (cpu or PartialState().device.type == "cpu"):
        raise UserError("train.precision: fp16 needs a GPU, and this training is on the CPU; take bf16 or full.")
    AcceleratorState._reset_state()  # the precision may differ between the stages of one run
    precision = {"full": "no", "bf16": "bf16", "fp16": "fp16"}[spec.precision]
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        log_with=list(spec.trackers) or None,
        project_dir=None if folder is None else str(folder),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if spec.deterministic:
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
    return accelerator


def fit(
    module: TrainingModule,
    train: Any,
    spec: TrainSpec,
    *,
    folder: Path,
    stage: str = "student",
    seed: int = 0,
    evaluate: Callable[[nn.Module, torch.device], dict[str, float]] | None = None,
    splits: Mapping[str, Any] | None = None,
    live: Display | None = None,
    cpu: bool = False,
    accelerator: Any = None,
) -> FitResult:
    """Train a module over a loader: epochs, schedule, precision, processes, EMA, evaluation, best-of, early stop,
    checkpoints.

    Args:
        module: a `Distillation`, or a `TrainingModule` of your own.
        train: a `stillhouse.data.Loader`.
        spec: epochs, optimiser and the rest.
        folder: where metrics.csv and checkpoints/ go; a checkpoint of the same stage there is resumed.
        evaluate: (student, device) -> figures, at the end of epochs; written as `val/NAME`.
        splits: evaluation loaders by split, for `Context.sweep`.

    On return `module.student` has its final weights: the average where `ema` is set, the best where `best` is.

    Raises:
        UserError: a module that is no `TrainingModule`, training data without samples, one sample a batch for batch
            norm, training that diverges.
    """
    if not isinstance(module, TrainingModule):
        raise UserError(
            f"fit trains a TrainingModule, but was given a {type(module).__name__}: wrap a network in a Distillation, "
            "or subclass stillhouse.training.module.TrainingModule."
        )
    accelerator = accelerator or make_accelerator(spec, folder, cpu)
    with recomputed(module.student) if spec.gradient_checkpointing else nullcontext():
        return _Fit(module, train, spec, accelerator, folder, stage, seed, evaluate, splits or {}, live).run()


class _Fit:
    """The setup of one training, its step, and the end of an epoch."""

    def __init__(
        self,
        module: TrainingModule,
        train: Any,
        spec: TrainSpec,
        accelerator: Any,
        folder: Path,
        stage: str,
        seed: int,
        evaluate: Callable[[nn.Module, torch.device], dict[str, float]] | None,
        splits: Mapping[str, Any],
        live: Display | None,
    ) -> None:
        self.module, self.spec, self.accelerator, self.evaluate = module, spec, accelerator, evaluate
        self.device = accelerator.device
        self.batches = _Batches(train, spec)
        if self.batches.per_epoch == 0:
            raise UserError("The training data holds no samples.")
        module.to(self.device)
        if type(module).build is not TrainingModule.build:  # which alone needs a batch
            module.build(next(iter(train.batches(0, 0, 1))))
            module.to(self.device)
        _refuse_lonely_batch_norm(module, train)
        if spec.channels_last:
            set_memory(module, torch.channels_last)
        self.optimizer: Any = make_optimizer(module.param_groups(), spec, module.student)
        self.rates = [g["lr"] for g in self.optimizer.param_groups]
        self.ema = _average(module.student, spec)
        if spec.compile:
            module.compile()
        self.progress = Progress(steps_per_epoch=self.batches.per_epoch, epochs=spec.epochs)
        self.ctx = TrainingContext(module, self.progress, splits, seed, self.device, folder, train)
        module.prepare(self.ctx)
        self.wrapped = accelerator.prepare(module)
        if accelerator.scaler is not None or accelerator.distributed_type.value in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
            self.optimizer = accelerator.prepare(
                self.optimizer
            )  # elsewhere the wrapper does nothing, and costs 0.2 ms a step
        if spec.trackers and accelerator.is_main_process:
            accelerator.init_trackers(folder.name)
        self._unscaled = False  # whether the gradients of this step lost the scale of fp16 already
        self.step_mean = None
        if (spec.accumulate > 1 or accelerator.num_processes > 1) and not getattr(train, "even", False):
            self.step_mean = StepMean(getattr(train, "usual_size", 1), accelerator.num_processes, accelerator.reduce)
        self.loop = _FitLoop(self, folder, stage, seed, live)
        self.loop.restore()
        self.keeper = _Best(spec, folder, stage, self.loop)

    def run(self) -> FitResult:
        """Train to the end, and leave the final weights in the student."""
        self.module.train()
        self.loop.run(self.step, self.boundary)
        self.batches.close()
        extra = self.loop.extra
        if not extra.get("closed"):
            if self.ema is not None:
                self.module.student.load_state_dict(self.ema.module.state_dict())
            self.keeper.load_into(self.module.student)
            extra["closed"] = True
            self.loop.save()
        if self.spec.channels_last:
            set_memory(self.module, torch.contiguous_format)
        if self.spec.trackers:
            self.accelerator.end_training()
        return FitResult(
            dict(extra.get("figures", {})), self.loop.seconds, math.ceil(self.loop.done / self.batches.per_epoch)
        )

    def step(self, i: int) -> Mapping[str, Tensor]:
        """Forward and backward of batch i, and, with the last of the batches that are accumulated, a step of the
        optimiser."""
        module, progress, accumulate = self.module, self.progress, self.spec.accumulate
        progress.epoch, progress.batch = divmod(i, self.batches.per_epoch)
        progress.step = i // accumulate
        if progress.batch == 0:
            module.begin_epoch(self.ctx)
            module.train()
        batch = to_device(self.batches.fetch(i), self.device)
        if self.spec.channels_last:
            batch["input"] = channels_last(batch["input"])
        steps_now = (i + 1) % accumulate == 0 or i + 1 == self.batches.total
        factor = rate_factor(self.spec, i / self.batches.per_epoch)
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * factor
        with self.accelerator.autocast():
            module.before_step(batch, self.ctx)
        with nullcontext() if steps_now else self.accelerator.no_sync(self.wrapped):
            terms = self._backward(batch, self.batches.of_step(i))
        if steps_now:
            if self.step_mean is not None and not has_positions(batch):
                self.step_mean.finish(self._parameters(), self.batches.of_step(i))
            self._unscale()
            module.before_update(self.ctx)
            self._clip()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.update_parameters(module.student)
        module.after_step(batch, progress, steps_now)
        return terms

    def _backward(self, batch: Batch, averaged: int) -> Mapping[str, Tensor]:
        weighed = self.step_mean is not None and not has_positions(
            batch
        )  # positions weigh alike by their batches' `token_count`
        if weighed:
            batch["weighed"] = True
        try:
            terms: Mapping[str, Tensor] = self.wrapped(batch, self.progress)
        except ValueError as error:
            raise _batch_of_one(error, batch) from error
        loss = terms["loss"] if averaged == 1 else terms["loss"] / averaged
        if self.step_mean is not None and weighed:
            loss = self.step_mean.weigh(loss, samples(batch))
        self.accelerator.backward(loss) if self.accelerator.scaler is not None else loss.backward()
        return terms

    def _unscale(self) -> None:
        if self.accelerator.scaler is not None and not self._unscaled:
            self.accelerator.unscale_gradients(self.optimizer)
            self._unscaled = True

    def _clip(self) -> None:
        if self.spec.clip is not None:
            if self._unscaled:  # which Accelerate would do a second time
                nn.utils.clip_grad_norm_(self.wrapped.parameters(), self.spec.clip)
            else:
                self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.spec.clip)
        self._unscaled = False

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def boundary(self, done: int) -> bool:
        """Evaluate after an epoch, where it is time; True: training has waited long enough for a better one."""
        epoch, every = done // self.batches.per_epoch, self.spec.eval_every
        if self.evaluate is None or not (done == self.batches.total or (every and epoch % every == 0)):
            return False
        self.loop.check()
        model = self.ema.module if self.ema is not None else self.module.student
        figures = self.evaluate(model, self.device)
        self.module.train()
        self.loop.log({f"val/{k}": v for k, v in figures.items()})
        return self.keeper.consider(figures, model, epoch)


class _FitLoop(Loop):
    """The loop of a fit: whole between optimiser steps, with an end to each epoch, and keys by epoch and batch."""

    def __init__(self, fit: _Fit, folder: Path, stage: str, seed: int, live: Display | None) -> None:
        spec, per_epoch = fit.spec, fit.batches.per_epoch
        state: dict[str, Stateful] = {"module": fit.module, "optimizer": fit.optimizer}
        if fit.ema is not None:
            state["ema"] = fit.ema
        if fit.accelerator.scaler is not None:
            state["scaler"] = fit.accelerator.scaler
        super().__init__(
            folder,
            stage,
            fit.batches.total,
            state,
            seed=seed,
            log_every=spec.log_every,
            checkpoint_seconds=spec.checkpoint_seconds,
            accelerator=fit.accelerator,
            keys=lambda i: divmod(i, per_epoch),
            where=lambda i: (i // per_epoch, i + 1),
            live=live,
            trackers=bool(spec.trackers),
        )
        self._per_epoch, self._accumulate, self._optimizer = per_epoch, spec.accumulate, fit.optimizer

    def ends_epoch(self, done: int) -> bool:
        return done % self._per_epoch == 0

    def whole(self, done: int) -> bool:
        return done % self._accumulate == 0  # between them, gradients are being accumulated

    def row_extras(self) -> dict[str, float]:
        return {"lr": self._optimizer.param_groups[0]["lr"]}


class _Batches:
    """A fit's batches, in one stream over its epochs; those of an optimiser step are weighed position by position,
    where they hold tokens or pixels."""

    def __init__(self, train: Any, spec: TrainSpec) -> None:
        self.train, self.accumulate, self.epochs, self.per_epoch = train, spec.accumulate, spec.epochs, len(train)
        self.total = spec.epochs * self.per_epoch
        self._stream: Iterator[Batch] | None = None
        self._ready: deque[Batch] = deque()

    def of_step(self, i: int) -> int:
        """How many batches make the optimiser step that batch i is a part of: the last step may have fewer."""
        return min(self.accumulate, self.total - (i - i % self.accumulate))

    def fetch(self, i: int) -> Batch:
        """Batch i: the first that is asked for begins the stream, then one after the other."""
        if self._stream is None:
            self._stream = iter(self.train.batches(*divmod(i, self.per_epoch), self.epochs))
        if not self._ready:
            self._ready.append(next(self._stream))
            if self.of_step(i) > 1 and has_positions(self._ready[0]):
                self._ready.extend(islice(self._stream, self.of_step(i) - 1))
                weigh_positions_alike(self._ready)
        return self._ready.popleft()

    def close(self) -> None:
        """End the loader's workers."""
        if self._stream is not None and hasattr(self._stream, "close"):
            self._stream.close()


class _Best:
    """Saves the weights of the best evaluation, and reports when patience has run out."""

    def __init__(self, spec: TrainSpec, folder: Path, stage: str, loop: Loop) -> None:
        self.spec, self.loop = spec, loop
        self.path = folder / "checkpoints" / f"{stage}.best.pt"

    def consider(self, figures: dict[str, float], model: nn.Module, epoch: int) -> bool:
        extra, name = self.loop.extra, self.spec.best
        if name is None:
            extra["figures"] = dict(figures)
            return False
        if name not in figures:
            raise unknown("figure for train.best", name, figures)
        value = figures[name] if quantity(name).better >= 0 else -figures[name]
        if "best" not in extra or value > extra["best"]:
            extra.update(best=value, best_epoch=epoch, waited=0, figures=dict(figures))
            if self.loop.main:
                with atomic_write(self.path) as temporary:
                    torch.save({"epoch": epoch, "model": model.state_dict()}, temporary)
            return False
        extra["waited"] = extra.get("waited", 0) + 1
        return self.spec.patience is not None and extra["waited"] >= self.spec.patience

    def load_into(self, student: nn.Module) -> None:
        if self.spec.best is not None and self.path.exists():
            if self.loop.world > 1:
                self.loop.accelerator.wait_for_everyone()
            student.load_state_dict(torch.load(self.path, map_location="cpu", weights_only=True)["model"])


def set_memory(module: TrainingModule, layout: torch.memory_format) -> None:
    """Lay out the weights of a module, and of the live teachers outside it, in memory."""
    module.to(memory_format=layout)
    for teacher in module.teachers.values():
        for reader in teacher.readers():
            reader.model.to(memory_format=layout)


def channels_last(x: Any) -> Any:
    """Images (B, C, H, W), alone or in a mapping, in channels-last memory; all else as it is."""
    if isinstance(x, Mapping):
        return {k: channels_last(v) for k, v in x.items()}
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.ndim == 4 else x


def _average(student: nn.Module, spec: TrainSpec) -> Any:
    """The exponential moving average of the student's weights and buffers, where the spec has one."""
    if spec.ema is None:
        return None
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(spec.ema), use_buffers=True)


def _refuse_lonely_batch_norm(module: nn.Module, train: Any) -> None:
    module.train()
    if getattr(train, "batch_size", 2) == 1 and any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in module.modules()
    ):
        raise UserError(
            "train.batch_size is 1, but the network has batch normalisation, which needs at least two samples a "
            "batch; use a larger batch."
        )


def _batch_of_one(error: ValueError, batch: Batch) -> Exception:
    if "Expected more than 1 value per channel" in str(error):
        return UserError(
            "A training batch holds one sample, but the network has batch normalisation, which needs at least two; "
            "use a larger batch or more data."
        )
    return error

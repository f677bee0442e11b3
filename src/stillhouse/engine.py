"""`fit`: a module trained over a loader, on the resumable loop and Hugging Face Accelerate: epochs, schedule, precision, processes, averages, evaluation, best-of."""

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

from stillhouse.context import TrainingContext
from stillhouse.distillation import to_device
from stillhouse.errors import MissingExtra, UserError, unknown
from stillhouse.files import written_beside
from stillhouse.functional.token_losses import has_tokens, weigh_tokens_alike
from stillhouse.live import Live
from stillhouse.loop import Loop, Stateful
from stillhouse.objective import Progress
from stillhouse.recipe import TrainSpec
from stillhouse.signals import Batch

SMALLER_IS_BETTER = frozenset({"loss", "nll", "ece", "brier", "aurc", "perplexity"})


@dataclass
class Fitted:
    """What a fit leaves: the last (or best) evaluation, the seconds spent in steps, and the epochs done."""

    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    epochs: int = 0


def make_accelerator(spec: TrainSpec, folder: Path | None = None, cpu: bool = False) -> Any:
    """An `Accelerator` for one fit: device, processes and precision are Accelerate's."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    for tracker in spec.trackers:  # Accelerate would leave a missing one out without a word
        if importlib.util.find_spec(tracker) is None:
            raise MissingExtra(f"train.trackers: {tracker}", {"tensorboard": "trackers"}.get(tracker, tracker))
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


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """A class of torch.optim by its name in any case. Raises `UserError` with the nearest names."""
    classes = {
        n.lower(): c for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer) and n != "Optimizer"
    }
    if name.lower() not in classes:
        raise unknown("optimizer", name, classes)
    return classes[name.lower()]


def make_optimizer(groups: list[dict[str, Any]], spec: TrainSpec) -> torch.optim.Optimizer:
    """The optimiser that a recipe names, any of torch.optim, over parameter groups that may set their own lr and weight_decay."""
    try:
        return optimizer_class(spec.optimizer.name)(groups, **spec.optimizer.arguments())
    except TypeError as error:
        raise UserError(f"train.optimizer: {spec.optimizer.name} takes no such option: {str(error).split('.__init__() ')[-1]}.") from None


def rate_factor(spec: TrainSpec, progress_epochs: float) -> float:
    """The factor on the learning rate after so many (fractional) epochs."""
    s = spec.schedule
    if progress_epochs < s.warmup_epochs:
        return progress_epochs / s.warmup_epochs
    if s.name == "step":
        return s.gamma ** sum(progress_epochs >= m for m in s.milestones)
    if s.name == "constant":
        return 1.0
    share = min((progress_epochs - s.warmup_epochs) / max(spec.epochs - s.warmup_epochs, 1e-9), 1.0)
    floor = s.min_lr / spec.optimizer.lr
    falling = 0.5 * (1 + math.cos(math.pi * share)) if s.name == "cosine" else 1 - share
    return floor + (1 - floor) * falling


class _FitLoop(Loop):
    steps_per_epoch = 1
    optimizer: Any = None
    accumulate = 1

    def ends_epoch(self, done: int) -> bool:
        return done % self.steps_per_epoch == 0

    def whole(self, done: int) -> bool:
        return done % self.accumulate == 0  # between them, gradients are being accumulated

    def row_extras(self) -> dict[str, float]:
        return {"lr": self.optimizer.param_groups[0]["lr"]}


def fit(
    module: Any,
    train: Any,
    spec: TrainSpec,
    *,
    folder: Path,
    stage: str = "student",
    seed: int = 0,
    evaluate: Callable[[nn.Module, torch.device], dict[str, float]] | None = None,
    splits: Mapping[str, Any] | None = None,
    live: Live | None = None,
    cpu: bool = False,
    accelerator: Any = None,
) -> Fitted:
    """Train a module over a loader: epochs, schedule, precision, processes, EMA, evaluation, best-of, early stop, checkpoints.

    Args:
        module: a `Distillation`, or any module with `forward(batch, progress) -> {"loss": …, term: …}`, `param_groups()`, `student`, and, where it has
            them, `build(batch)`, `prepare(ctx)`, `begin_epoch(ctx)`, `before_step(batch, ctx)`, `after_step(batch, progress, stepped)`, `compile()`.
        train: a `stillhouse.data.Loader`.
        spec: epochs, optimiser and the rest.
        folder: where metrics.csv and checkpoints/ go; a checkpoint of the same stage there is gone on from.
        evaluate: (student, device) -> figures, at the end of epochs; written as `val/NAME`.
        splits: evaluation loaders by split, for `Context.sweep`.

    On return `module.student` holds the weights to keep: the average where `ema` is set, the best where `best` is.
    """
    accelerator = accelerator or make_accelerator(spec, folder, cpu)
    device = accelerator.device
    batches = _Batches(train, spec)
    per_epoch = batches.per_epoch
    if per_epoch == 0:
        raise UserError("The training data holds no samples.")
    module.to(device)
    if hasattr(module, "build"):
        module.build(next(iter(train.batches(0, 0, 1))))
        module.to(device)
    _refuse_lonely_batch_norm(module, train)
    optimizer = make_optimizer(module.param_groups(), spec)
    base_rates = [g["lr"] for g in optimizer.param_groups]
    ema = None
    if spec.ema is not None:
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        ema = AveragedModel(module.student, multi_avg_fn=get_ema_multi_avg_fn(spec.ema), use_buffers=True)
    if spec.compile:
        module.compile()
    progress = Progress(steps_per_epoch=per_epoch, epochs=spec.epochs)
    ctx = TrainingContext(module, progress, splits or {}, seed, device, folder, train)
    if hasattr(module, "prepare"):
        module.prepare(ctx)
    wrapped = accelerator.prepare(module)
    if accelerator.scaler is not None or accelerator.distributed_type.value in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        optimizer = accelerator.prepare(optimizer)  # elsewhere the wrapper does nothing, and costs 0.2 ms a step
    if spec.trackers and accelerator.is_main_process:
        accelerator.init_trackers(folder.name)
    total = batches.total
    state: dict[str, Stateful] = {"module": module, "optimizer": optimizer}
    if ema is not None:
        state["ema"] = ema
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler
    loop = _FitLoop(
        folder,
        stage,
        total,
        state,
        seed=seed,
        log_every=spec.log_every,
        checkpoint_seconds=spec.checkpoint_seconds,
        accelerator=accelerator,
        keys=lambda i: divmod(i, per_epoch),
        where=lambda i: (i // per_epoch, i + 1),
        live=live,
        trackers=bool(spec.trackers),
    )
    loop.steps_per_epoch, loop.optimizer, loop.accumulate = per_epoch, optimizer, spec.accumulate
    loop.restore()
    keeper = _Best(spec, folder, stage, loop)
    module.train()
    nothing = nullcontext()
    before_step = getattr(module, "before_step", None)

    def step(i: int) -> Mapping[str, Tensor]:
        epoch, batch_number = divmod(i, per_epoch)
        progress.epoch, progress.batch, progress.step = epoch, batch_number, i // spec.accumulate
        if batch_number == 0 and hasattr(module, "begin_epoch"):
            module.begin_epoch(ctx)
            module.train()
        batch = to_device(batches.fetch(i), device)
        steps_now = (i + 1) % spec.accumulate == 0 or i + 1 == total
        factor = rate_factor(spec, i / per_epoch)
        for group, rate in zip(optimizer.param_groups, base_rates):
            group["lr"] = rate * factor
        if before_step is not None:
            with accelerator.autocast():
                before_step(batch, ctx)
        with nothing if steps_now else accelerator.no_sync(wrapped):
            try:
                terms = wrapped(batch, progress)
            except ValueError as error:
                raise _batch_of_one(error, batch) from error
            loss, averaged = terms["loss"], batches.of_step(i)
            loss = loss if averaged == 1 else loss / averaged
            accelerator.backward(loss) if accelerator.scaler is not None else loss.backward()
        if steps_now:
            if spec.clip is not None:
                accelerator.clip_grad_norm_(wrapped.parameters(), spec.clip)
            optimizer.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.update_parameters(module.student)
        if hasattr(module, "after_step"):
            module.after_step(batch, progress, steps_now)
        return terms

    def boundary(done: int) -> bool:
        epoch = done // per_epoch
        last = done == total
        if evaluate is None or not (last or (spec.eval_every and epoch % spec.eval_every == 0)):
            return False
        model = ema.module if ema is not None else module.student
        figures = evaluate(model, device)
        module.train()
        loop.log({f"val/{k}": v for k, v in figures.items()})
        return keeper.consider(figures, model, epoch)

    loop.run(step, boundary)
    batches.close()
    if not loop.extra.get("closed"):
        if ema is not None:
            module.student.load_state_dict(ema.module.state_dict())
        keeper.load_into(module.student)
        loop.extra["closed"] = True
        loop.save()
    if spec.trackers:
        accelerator.end_training()
    return Fitted(dict(loop.extra.get("figures", {})), loop.seconds, math.ceil(loop.done / per_epoch))


class _Batches:
    """A fit's batches, in one stream over its epochs; those of an optimiser step are weighed token by token, where they hold tokens."""

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
            if self.of_step(i) > 1 and has_tokens(self._ready[0]):
                self._ready.extend(islice(self._stream, self.of_step(i) - 1))
                weigh_tokens_alike(self._ready)
        return self._ready.popleft()

    def close(self) -> None:
        """End the loader's workers."""
        if self._stream is not None and hasattr(self._stream, "close"):
            self._stream.close()


class _Best:
    """Keeps the weights of the best evaluation, and says when patience has run out."""

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
        value = figures[name] if name not in SMALLER_IS_BETTER else -figures[name]
        if "best" not in extra or value > extra["best"]:
            extra.update(best=value, best_epoch=epoch, waited=0, figures=dict(figures))
            if self.loop.main:
                with written_beside(self.path) as beside:
                    torch.save({"epoch": epoch, "model": model.state_dict()}, beside)
            return False
        extra["waited"] = extra.get("waited", 0) + 1
        return self.spec.patience is not None and extra["waited"] >= self.spec.patience

    def load_into(self, student: nn.Module) -> None:
        if self.spec.best is not None and self.path.exists():
            if self.loop.world > 1:
                self.loop.accelerator.wait_for_everyone()
            student.load_state_dict(torch.load(self.path, map_location="cpu", weights_only=True)["model"])


def _refuse_lonely_batch_norm(module: nn.Module, train: Any) -> None:
    if getattr(train, "batch_size", 2) == 1 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        raise UserError(
            "train.batch_size is 1, but the network has batch normalisation, which needs at least two samples a batch; use a larger batch."
        )


def _batch_of_one(error: ValueError, batch: Batch) -> Exception:
    if "Expected more than 1 value per channel" in str(error):
        return UserError(
            "A training batch holds one sample, but the network has batch normalisation, which needs at least two; use a larger batch or more data."
        )
    return error

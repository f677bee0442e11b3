"""The one resumable loop, on Hugging Face Accelerate: `Loop` drives any step function; `fit` makes one from a module and a loader.

Randomness is a function of (seed, stage, epoch, batch, rank), so a checkpoint holds no random state and a killed run goes on to the same bits.
Terms stay on the device; every `log_every` steps they are read at once, checked to be finite, written to metrics.csv, and then a checkpoint may follow.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stillhouse.distillation import to_device
from stillhouse.errors import MissingExtra, TrainingDiverged, UserError, unknown
from stillhouse.files import is_full, written_beside
from stillhouse.live import Live
from stillhouse.objective import Context, Progress
from stillhouse.randomness import generator, seed_step
from stillhouse.recipe import TrainSpec
from stillhouse.signals import Batch, Signals

SMALLER_IS_BETTER = frozenset({"loss", "nll", "ece", "brier", "aurc", "perplexity"})


class Stateful(Protocol):
    """Anything whose state a checkpoint keeps."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...


# ---- files ---------------------------------------------------------------------------------------------------------------------------------


class Metrics:
    """metrics.csv of a run: rows of named figures, `stage`, `epoch` and `step` first. New columns rewrite the file; else rows are appended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = ["stage", "epoch", "step"]
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with open(path, newline="") as handle:
                self.rows = [r for r in csv.DictReader(handle) if r.get("step")]
            for row in self.rows:
                self._widen(row)

    def _widen(self, row: Mapping[str, Any]) -> bool:
        new = [c for c in row if c not in self.columns]
        self.columns += new
        return bool(new)

    def keep(self, stage: str, count: int) -> None:
        """Drop the rows of a stage after its first `count`: what a killed run wrote past its last checkpoint."""
        seen, kept = 0, []
        for row in self.rows:
            if row["stage"] == stage:
                seen += 1
                if seen > count:
                    continue
            kept.append(row)
        self.rows = kept
        self._rewrite()

    def count(self, stage: str) -> int:
        return sum(1 for r in self.rows if r["stage"] == stage)

    def add(self, stage: str, epoch: int, step: int, values: Mapping[str, float]) -> None:
        row = {"stage": stage, "epoch": str(epoch), "step": str(step), **{k: repr(float(v)) for k, v in values.items()}}
        widened = self._widen(row)
        self.rows.append(row)
        if widened or not self.path.exists():
            self._rewrite()
        else:
            self._append(row)

    def _append(self, row: Mapping[str, str]) -> None:
        try:
            with open(self.path, "a", newline="") as handle:
                csv.DictWriter(handle, self.columns, restval="").writerow(row)
        except OSError as error:
            if is_full(error):
                raise UserError(
                    f"Could not write {self.path}: the disk is full. The last checkpoint is kept; free some space and start again."
                ) from error
            raise

    def _rewrite(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="")
        writer.writeheader()
        writer.writerows(self.rows)
        with written_beside(self.path) as beside:
            beside.write_text(text.getvalue())


# ---- the loop ------------------------------------------------------------------------------------------------------------------------------


class Loop:
    """Runs `step(i)` for i in [start, steps): seeds each, collects its terms, logs, checks, checkpoints, and answers Ctrl-C at the next step.

    Args:
        folder: where metrics.csv and checkpoints/ are.
        stage: name of this piece of training, unique in the folder.
        steps: how many.
        state: what a checkpoint holds, by name.
        keys: step -> the keys of its randomness, after (seed, stage); default (step,).
        where: step -> (epoch, step to show) for rows of metrics.csv.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        steps: int,
        state: Mapping[str, Stateful],
        *,
        seed: int = 0,
        log_every: int = 50,
        checkpoint_seconds: float = 20.0,
        accelerator: Any = None,
        keys: Callable[[int], tuple[int | str, ...]] | None = None,
        where: Callable[[int], tuple[int, int]] | None = None,
        live: Live | None = None,
        trackers: bool = False,
    ) -> None:
        self.folder, self.stage, self.steps, self.state = folder, stage, steps, dict(state)
        self.seed, self.log_every, self.checkpoint_seconds = seed, log_every, checkpoint_seconds
        self.accelerator = accelerator
        self.keys = keys or (lambda i: (i,))
        self.where = where or (lambda i: (0, i + 1))
        self.live = live or Live()
        self.trackers = trackers
        self.main = accelerator is None or accelerator.is_main_process
        self.world = 1 if accelerator is None else accelerator.num_processes
        self.path = folder / "checkpoints" / f"{stage}.pt"
        self.metrics = Metrics(folder / "metrics.csv")
        self.done, self.seconds = 0, 0.0
        self.finished = False
        self.extra: dict[str, Any] = {}
        self._window: list[tuple[tuple[str, ...], Tensor]] = []
        self._window_start = 0
        self._last_save = time.monotonic()
        self._interrupted = False

    def restore(self) -> bool:
        """Load the checkpoint, if there is one; True if so."""
        if not self.path.exists():
            if self.main:
                self.metrics.keep(self.stage, 0)
            return False
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"The checkpoint {self.path} cannot be read ({type(error).__name__}); remove it to start this stage anew.") from error
        for name, item in self.state.items():
            item.load_state_dict(saved["state"][name])
        self.done, self.seconds, self.finished, self.extra = saved["done"], saved["seconds"], saved["finished"], saved["extra"]
        self._window = [(tuple(names), torch.tensor(values)) for names, values in saved["window"]]
        if self.main:
            self.metrics.keep(self.stage, saved["rows"])
        return True

    def save(self) -> None:
        """Write a checkpoint now (the main process; the others wait)."""
        if self.main:
            content = {
                "state": {name: item.state_dict() for name, item in self.state.items()},
                "done": self.done,
                "seconds": self.seconds,
                "finished": self.finished,
                "extra": self.extra,
                "rows": self.metrics.count(self.stage),
                "window": [(list(names), values.tolist()) for names, values in self._window],
            }
            with written_beside(self.path) as beside:
                torch.save(content, beside)
        if self.world > 1:
            self.accelerator.wait_for_everyone()
        self._last_save = time.monotonic()

    def run(self, step: Callable[[int], Mapping[str, Tensor]], boundary: Callable[[int], bool] | None = None) -> None:
        """Go on to the end. `boundary(done)` is called after every step that ends an epoch (see `ends_epoch`); True stops early."""
        if self.finished:
            return
        rank = 0 if self.accelerator is None else self.accelerator.process_index
        self.live.start(self.stage, self.steps, self.done)
        clock = time.monotonic()
        with self._answering_interrupts():
            while self.done < self.steps and not self.finished:
                i = self.done
                seed_step(self.seed, self.stage, *self.keys(i), rank)
                terms = step(i)
                self._collect(i, terms)
                self.done = i + 1
                self.live.advance(self.done)
                at_end = self.ends_epoch(self.done)
                if self.done % self.log_every == 0 or at_end or self.done == self.steps:
                    self._flush()
                    if at_end and boundary is not None and boundary(self.done):
                        self.finished = True
                    now = time.monotonic()
                    self.seconds, clock = self.seconds + now - clock, now
                    if self.done < self.steps and not self.finished and self._due(now) and self.whole(self.done):
                        self.save()
                if self._interrupted and self.whole(self.done):
                    self.seconds += time.monotonic() - clock
                    self.save()
                    raise KeyboardInterrupt
        self.finished = True
        self.live.stop(self.stage)

    def ends_epoch(self, done: int) -> bool:
        return False

    def whole(self, done: int) -> bool:
        """Whether nothing is half done after so many steps, so that a checkpoint says all."""
        return True

    def _due(self, now: float) -> bool:
        due = now - self._last_save >= self.checkpoint_seconds
        if self.world > 1:
            flag = torch.tensor(int(due), device=self.accelerator.device)
            torch.distributed.broadcast(flag, 0)
            due = bool(flag.item())
        return due

    def _collect(self, i: int, terms: Mapping[str, Tensor]) -> None:
        if not self._window:
            self._window_start = i
        values = [t.detach() for t in terms.values()]
        if values:
            self._window.append((tuple(terms), torch.stack(values) if len(values) > 1 else values[0].reshape(1)))

    def _flush(self) -> None:
        """Read the window's terms at once, check them, and write their means as one row."""
        if not self._window:
            return
        sums: dict[str, list[float]] = {}
        shape = {names for names, _ in self._window}
        if len(shape) == 1:
            stacked = torch.stack([v.to(self._window[-1][1].device).float() for _, v in self._window])
            if self.world > 1:
                stacked = self.accelerator.reduce(stacked, reduction="mean")
            table = [(self._window[0][0], row) for row in stacked.tolist()]
        else:
            table = [(names, (self.accelerator.reduce(v, reduction="mean") if self.world > 1 else v).tolist()) for names, v in self._window]
        for offset, (names, row) in enumerate(table):
            bad = [n for n, v in zip(names, row) if not math.isfinite(v)]
            if bad:
                at = self._window_start + offset
                values = ", ".join(f"{n} = {v:.4g}" for n, v in zip(names, row))
                kept = (
                    f"the checkpoint of step {torch.load(self.path, weights_only=True)['done']} is kept"
                    if self.path.exists()
                    else "no checkpoint had been written yet"
                )
                self._window.clear()
                raise TrainingDiverged(
                    f"{self.stage}: {' and '.join(bad)} not finite at step {at + 1} ({values}); {kept}. Lower the learning rate or the term's weight, or clip the gradient (train.clip)."
                )
            for n, v in zip(names, row):
                sums.setdefault(n, []).append(v)
        self._window.clear()
        means = {n: sum(v) / len(v) for n, v in sums.items()}
        means.update(self.row_extras())
        self.log(means)

    def row_extras(self) -> dict[str, float]:
        """Further figures of a row, such as the learning rate."""
        return {}

    def log(self, values: Mapping[str, float]) -> None:
        """A row of metrics.csv, the live display, and the trackers."""
        epoch, shown = self.where(self.done - 1)
        if self.main:
            self.metrics.add(self.stage, epoch, shown, values)
            self.live.figures(values)
            if self.trackers:
                self.accelerator.log({f"{self.stage}/{k}": v for k, v in values.items()}, step=self.done)

    @contextmanager
    def _answering_interrupts(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def answer(number: int, frame: FrameType | None) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            self.live.say("Stopping after this step; start again to go on from here.")

        before = {s: signal.signal(s, answer) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


# ---- fitting a module on a loader ----------------------------------------------------------------------------------------------------------


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
        return optimizer_class(spec.optimizer.name)(groups, **spec.optimizer.arguments())  # type: ignore[arg-type]
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
    per_epoch = len(train)
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
    total = spec.epochs * per_epoch
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
    stream: Iterator[Batch] | None = None
    nothing = nullcontext()
    before_step = getattr(module, "before_step", None)

    def step(i: int) -> Mapping[str, Tensor]:
        nonlocal stream
        epoch, batch_number = divmod(i, per_epoch)
        progress.epoch, progress.batch, progress.step = epoch, batch_number, i // spec.accumulate
        if stream is None:
            stream = train.batches(epoch, batch_number, spec.epochs)
        if batch_number == 0 and hasattr(module, "begin_epoch"):
            module.begin_epoch(ctx)
            module.train()
        batch = to_device(next(stream), device)
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
            loss = terms["loss"]
            loss = loss if spec.accumulate == 1 else loss / spec.accumulate
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
    if stream is not None and hasattr(stream, "close"):
        stream.close()
    if not loop.extra.get("closed"):
        if ema is not None:
            module.student.load_state_dict(ema.module.state_dict())
        keeper.load_into(module.student)
        loop.extra["closed"] = True
        loop.save()
    if spec.trackers:
        accelerator.end_training()
    return Fitted(dict(loop.extra.get("figures", {})), loop.seconds, math.ceil(loop.done / per_epoch))


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


def loop(
    folder: Path,
    stage: str,
    state: Mapping[str, Stateful],
    step: Callable[[int], Mapping[str, Tensor]],
    steps: int,
    *,
    seed: int = 0,
    log_every: int = 50,
    checkpoint_seconds: float = 20.0,
    live: Live | None = None,
) -> float:
    """The same loop where there is no loader: `step(i)` does what the method does and returns named terms. Returns the seconds spent."""
    driver = Loop(folder, stage, steps, state, seed=seed, log_every=log_every, checkpoint_seconds=checkpoint_seconds, live=live)
    driver.restore()
    driver.run(step)
    driver.save()
    return driver.seconds


class TrainingContext(Context):
    """What objectives may ask of a fit."""

    def __init__(self, module: Any, progress: Progress, splits: Mapping[str, Any], seed: int, device: torch.device, folder: Path, train: Any) -> None:
        self.module, self.progress, self._splits, self._seed, self._device = module, progress, dict(splits), seed, device
        self._train = train
        self._means: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self._holdout_batches: Any = None

    @property
    def student(self) -> nn.Module:
        return self.module.student

    @property
    def teachers(self) -> Mapping[str, Any]:
        return self.module.teachers

    def split(self, name: str) -> Any:
        """The evaluation loader of a split."""
        if name not in self._splits:
            raise UserError(
                f"This training was given no '{name}' split"
                + ("; set data.holdout to a share above 0." if name == "holdout" else f"; it has: {', '.join(self._splits) or 'none'}.")
            )
        return self._splits[name]

    def labels(self, split: str = "train") -> Tensor:
        """Labels of a split in index order, (N,)."""
        source = self._train if split == "train" else self.split(split)
        labels = source.labels() if hasattr(source, "labels") else None
        if labels is None:
            raise UserError(
                f"The labels of the '{split}' split are not known beforehand; train from a recipe, or give the loader's data set a `labels()`."
            )
        return labels

    def count(self, split: str = "train") -> int:
        return len(self.labels(split))

    @torch.no_grad()
    def sweep(self, split: str, of: str = "teacher") -> Iterator[tuple[Batch, Signals]]:
        student = self.module.student
        mode = student.training
        student.eval()
        try:
            for batch in self.split(split):
                batch = to_device(batch, self._device)
                yield batch, self.module._reader(batch) if of == "student" else self.module.teachers[of](batch)
        finally:
            student.train(mode)

    def class_mean(self, what: str, of: str = "teacher") -> tuple[Tensor, Tensor]:
        if (what, of) in self._means and of != "student":
            return self._means[what, of]
        sums = counts = None
        for batch, said in self.sweep("train", of):
            value = {"probs": lambda s: s.log_probs().exp(), "logits": lambda s: s.log_probs(), "embedding": lambda s: s.embedding}[what](said)
            labels = batch["label"]
            if labels.ndim != 1:
                raise UserError(
                    "Class means need class ids, but the training labels are soft; switch mixup and cutmix off for the sweep, or label the data hard."
                )
            if sums is None:
                classes = said.log_probs().shape[-1]
                sums = torch.zeros(classes, value.shape[-1], dtype=torch.float64, device=value.device)
                counts = torch.zeros(classes, dtype=torch.float64, device=value.device)
            sums.index_add_(0, labels, value.double())
            counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        if sums is None or counts is None:
            raise UserError("The training data holds no samples.")
        mean = (sums / counts.clamp_min(1).unsqueeze(1)).float()
        self._means[what, of] = (mean, counts.long())
        return self._means[what, of]

    def holdout(self, n: int) -> Batch:
        from stillhouse.data import Loader

        source = self.split("holdout")
        dataset = source.dataset
        if self._holdout_batches is None or self._holdout_batches.batch_size != n:
            self._holdout_batches = Loader(dataset, min(n, len(dataset)), seed=self._seed, shuffle=True, drop_last=True)
        loader = self._holdout_batches
        epoch, batch = divmod(self.progress.epoch * self.progress.steps_per_epoch + self.progress.batch, len(loader))
        return to_device(next(iter(loader.batches(epoch, batch, epoch + 1))), self._device)

    def generator(self, *keys: int | str) -> torch.Generator:
        return generator(self._seed, *keys)

    def gather(self, x: Tensor) -> Tensor:
        from stillhouse.functional.gather import gather

        return gather(x)


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

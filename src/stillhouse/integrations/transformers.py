"""Distillation inside Hugging Face transformers: `DistillationTrainer`, a `Trainer` whose training loss comes from a
`Distillation`.

All else (arguments, evaluation, checkpoints, `save_model`, pushing) is the Trainer's own. The forward pass of the
student goes through the model that the Trainer has wrapped, so that DDP reduces its gradients; what objectives own is
reduced here.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stillhouse.data import AdaptedLoader
from stillhouse.data.loader import as_batch
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Objective, Progress
from stillhouse.distillation.teachers import Teacher
from stillhouse.distillation.weighted import Objectives
from stillhouse.errors import MissingExtra, UserError
from stillhouse.files import atomic_write
from stillhouse.functional.counting import IGNORED
from stillhouse.integrations.context import LoaderContext
from stillhouse.models.token_labels import are_of_tokens, place, predicts_next
from stillhouse.randomness import keyed
from stillhouse.signals import Batch
from stillhouse.tasks.tokens import Tokens
from stillhouse.training.optimizers import trained_in_float32

try:
    _transformers: Any = importlib.import_module("transformers")
except ImportError:
    raise MissingExtra("Training with the transformers Trainer", "text") from None

STATE_FILE = "distillation.pt"
_CAUSAL, _MASKED, _SEQ2SEQ = (
    getattr(_transformers, f"MODEL_FOR_{name}_MAPPING") for name in ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM")
)


class DistillationTrainer(_transformers.Trainer):  # type: ignore[misc]
    """A transformers `Trainer` that distils.

    Takes what `Trainer` takes (its `model` is the student) and, by keyword, teachers and objectives. Evaluation is the
    Trainer's own: the student's loss and your `compute_metrics`. Terms are logged by name with `loss` at
    `logging_steps`. `save_model` and checkpoints hold the student; what objectives own is in a checkpoint's
    `distillation.pt`. `max_grad_norm` clips the student's gradient. Objectives that look at the whole training set
    (class means) read the training loader as it is. Labels of tokens (B, L) are as transformers has them: those of a
    causal model are shifted here, and every counted token of an optimiser step weighs the same, whichever of its
    accumulated batches it lies in. Each call of `train` creates the objectives' own layers and the optimiser again,
    unless it resumes. One process or DDP.

    Args:
        teachers: one teacher (any module that gives logits or an output with `.logits`, or a teacher of
            `stillhouse.distillation.teachers`), several by name, or None.
        objectives: names, mappings, `Objective`s or (Objective, weight) pairs, as in `stillhouse.distill`.
        embedding: the student's classifier submodule, where it is not found by itself.
        shift_labels: whether labels (B, L) name the input tokens, so that those of the next position are learned;
            default: for causal language models.
        vocabulary: how many tokens the tokenizer has, where teacher and student pad their embeddings to different
            sizes; default: those of `processing_class`, where that is a tokenizer.
        half_weights: train a student in half precision as it is; else it is turned to float32, as small updates of
            half-precision weights round to nothing. For speed there are the arguments `bf16` and `fp16`.

    >>> trainer = DistillationTrainer(  # doctest: +SKIP
    ...     student, args, train_dataset=data, teachers=teacher, objectives=["ce", "kd"]
    ... )
    >>> trainer.train()  # doctest: +SKIP
    """

    loss_is_scaled_for_ga = False  # the loss is a mean over the batch

    def __init__(
        self,
        *args: Any,
        teachers: nn.Module | Teacher | Mapping[str, nn.Module | Teacher] | None,
        objectives: Objectives = ("ce", "kd"),
        embedding: str | None = None,
        shift_labels: bool | None = None,
        vocabulary: int | None = None,
        half_weights: bool = False,
        **kwargs: Any,
    ) -> None:
        self.distillation: Distillation | None = None
        self._parts = (teachers, [Distillation.entry(o) for o in objectives], embedding)
        self._half_weights = half_weights
        self._given_optimizer = (kwargs.get("optimizers") or (None,))[0] is not None
        self._resume_from: str | None = None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._mean_size: Any = 1.0
        super().__init__(*args, **kwargs)
        self._shifts = predicts_next(self.model) if shift_labels is None else shift_labels
        tokens = self.processing_class
        self._vocabulary = vocabulary or (
            max(tokens.get_vocab().values()) + 1 if hasattr(tokens, "get_vocab") else None
        )
        self.model_accepts_loss_kwargs = False  # as above, for versions without `loss_is_scaled_for_ga`
        if self.args.label_smoothing_factor or getattr(self, "compute_loss_func", None) is not None:
            raise UserError(
                "The loss consists of the objectives: instead of label_smoothing_factor or compute_loss_func, give "
                "{'name': 'ce', 'label_smoothing': …}."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.n_gpu > 1:
            raise UserError(
                "DistillationTrainer trains in one process a device (DDP); without FSDP, DeepSpeed or DataParallel: "
                "launch it with torchrun."
            )
        self.add_callback(_Steps(self))

    # ---- before training ---------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; leaves no hook on any model, however it ends."""
        self._resume_from = (
            _transformers.trainer_utils.get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is True
            else resume_from_checkpoint or None
        )
        if self.distillation is not None and not self._given_optimizer:
            self.optimizer = None
        self.distillation = None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self.distillation is not None:
                self.distillation.close()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's optimiser, with a group for what objectives (and teachers that learn) own."""
        if self.distillation is not None:
            return self.optimizer
        teachers, entries, embedding = self._parts
        if not self._half_weights:
            trained_in_float32(self.model)
        task = Tokens("causal", self._vocabulary) if self._vocabulary is not None and self._of_tokens() else None
        self.distillation = Distillation(
            self.model, teachers, entries, seed=self.args.seed, embedding=embedding, task=task
        )
        self._build(self.distillation)
        optimizer = super().create_optimizer(*args, **kwargs)
        groups = self.distillation.param_groups()[1:]
        if groups and self._given_optimizer:
            raise UserError(
                "These objectives own parameters, which the optimizer passed as `optimizers` does not have; use "
                "`optimizer_cls_and_kwargs`, or the arguments."
            )
        for group in groups:
            optimizer.add_param_group({"weight_decay": self.args.weight_decay, **group})
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Reads the student as `from_pretrained` does: files may hold other names than the model, and the Trainer's own
        reading skips those with a warning."""
        if model is not None or not isinstance(self.model, _transformers.PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.model.load_state_dict(
                type(self.model).from_pretrained(resume_from_checkpoint, config=self.model.config).state_dict()
            )

    def _load_best_model(self) -> None:
        if isinstance(self.model, _transformers.PreTrainedModel) and self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _build(self, distillation: Distillation) -> None:
        loader = self.get_train_dataloader()
        self._loader = _Loader(getattr(loader, "base_dataloader", loader), self.args.seed, self._as_batch)
        with keyed("probe", self.args.seed):
            probe = next(iter(self._loader))
        distillation.build(probe)
        self._own = [p for group in distillation.param_groups()[1:] for p in group["params"]]
        try:
            per_epoch, epochs = len(loader), math.ceil(self.args.num_train_epochs)
        except TypeError:
            per_epoch, epochs = self.args.max_steps * self.args.gradient_accumulation_steps, 1
        else:
            if self.args.max_steps > 0:
                epochs = math.ceil(self.args.max_steps * self.args.gradient_accumulation_steps / per_epoch)
        self._progress = Progress(steps_per_epoch=per_epoch, epochs=max(epochs, 1))
        self._context = LoaderContext(
            distillation, self._progress, self._loader, self.args.seed, self.args.device, Path(self.args.output_dir)
        )

    def _set_signature_columns_if_needed(self) -> None:
        """Also keeps the column `index`, which the student never sees but some objectives and teachers read."""
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if first:
            self._signature_columns.append("index")

    # ---- training ----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of one optimiser step; a smaller one among them weighs less, so that their mean is that of all
        their samples."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        if samples and _has_tokens(samples[0]):
            self._mean_size = sum(self._counted(s["labels"]).sum() for s in samples) / len(samples)
        else:
            self._mean_size = sum(map(_size, samples)) / max(len(samples), 1)
        return samples, items

    def _counted(self, labels: Tensor) -> Tensor:
        return (labels[:, 1:] if self._shifts else labels) != IGNORED

    def _of_tokens(self) -> bool:
        """Whether the student predicts tokens."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return any(type(model) in mapping.values() for mapping in (_CAUSAL, _MASKED, _SEQ2SEQ))

    def _as_batch(self, inputs: Any) -> Batch:
        """A batch of ours: labels of tokens stand where their predictions stand, and a decoder has its inputs."""
        return place(as_batch(inputs), self.model, self._shifts)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if self._own and self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            average_gradients(self._own)
        if self.distillation is not None and self.accelerator.sync_gradients:
            self._before_update(self.distillation)
        return loss

    def _before_update(self, distillation: Distillation) -> None:
        """The hook of objectives that look at gradients; those of fp16 are shown to it without their scale."""
        if not any(type(e.objective).before_update is not Objective.before_update for e in distillation.entries):
            return
        scaler = self.accelerator.scaler
        gradients = [p.grad for p in distillation.parameters() if p.grad is not None]
        scale = 1.0 if scaler is None else scaler.get_scale()
        if scale != 1.0:
            torch._foreach_div_(gradients, scale)
        distillation.before_update(self._context)
        if scale != 1.0:
            torch._foreach_mul_(gradients, scale)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """In training, the weighted sum of the objectives' terms, a mean over the batch; in evaluation, the student's
        own loss."""
        if self.distillation is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        tokens = _has_tokens(inputs)
        self._batch: Batch = self._as_batch(inputs)
        if tokens:
            self._batch["token_count"] = torch.as_tensor(self._mean_size, device=inputs["labels"].device)
        self.distillation.hold_frozen()  # the Trainer has put its model into training mode
        with self.accelerator.autocast():
            self.distillation.before_step(self._batch, self._context)
            self.distillation._reader.model = model
            terms = self.distillation(self._batch, self._progress)
        for name, value in terms.items():
            if name != "loss":
                self._sums[name] = self._sums.get(name, 0.0) + value.detach()
                self._counts[name] = self._counts.get(name, 0) + 1
        loss, size = terms["loss"], _size(inputs)
        loss = loss if tokens or size == self._mean_size else loss * (size / self._mean_size)
        return (loss, terms) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, {k: v for k, v in inputs.items() if k != "index"}, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log; with the mean of each term since the last, over processes."""
        if "loss" in logs and self._sums:
            means = torch.stack([self._sums[n].float() / self._counts[n] for n in self._sums])
            logs = {**logs, **dict(zip(self._sums, self.accelerator.reduce(means, reduction="mean").tolist()))}
            self._sums, self._counts = {}, {}
        super().log(logs, *args, **kwargs)

    # ---- what the callback does --------------------------------------------------------------------------------------

    def _begin(self) -> None:
        assert self.distillation is not None
        self.distillation.prepare(self._context)
        self._sums, self._counts = {}, {}
        if self._resume_from is not None:
            path = Path(self._resume_from) / STATE_FILE
            if path.exists():
                self.distillation.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=False)
            elif self._own:
                raise UserError(
                    f"The checkpoint {self._resume_from} holds no {STATE_FILE}, so what the objectives had learned is "
                    "lost; start from the beginning."
                )
        self.distillation.train()

    def _begin_epoch(self) -> None:
        assert self.distillation is not None
        now, at = self._progress, self.state.epoch or 0.0
        now.step, now.epoch = self.state.global_step, math.floor(at + 1e-6)
        now.batch = max(round((at - now.epoch) * now.steps_per_epoch), 0)
        if now.batch == 0:
            self.distillation.begin_epoch(self._context)
            self.distillation.train()

    def _begin_step(self) -> None:
        self._progress.step = self.state.global_step
        for p in self._own:
            p.grad = None  # the Trainer clears the gradients of its model alone

    def _end_batch(self, stepped: bool) -> None:
        assert self.distillation is not None
        self.distillation.after_step(self._batch, self._progress, stepped)
        self._progress.batch += 1

    def _save_state(self) -> None:
        assert self.distillation is not None
        if self.is_world_process_zero() and not self.args.save_only_model:
            state = {k: v for k, v in self.distillation.state_dict().items() if not k.startswith("student.")}
            with atomic_write(
                Path(self.args.output_dir)
                / f"{_transformers.trainer_utils.PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                / STATE_FILE
            ) as temporary:
                torch.save(state, temporary)


class _Steps(_transformers.TrainerCallback):  # type: ignore[misc]
    """Calls the hooks of a distillation at the Trainer's events."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._begin()

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._begin_epoch()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._begin_step()

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._end_batch(stepped=False)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._end_batch(stepped=True)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._save_state()


class _Loader(AdaptedLoader):
    """Knows the labels of a `datasets.Dataset` by their column, and reads a batch as the Trainer's training does."""

    def __init__(self, loader: Any, seed: int, read: Callable[[Any], Batch]) -> None:
        super().__init__(_Read(loader, read), seed)

    def labels(self) -> Tensor:
        dataset = getattr(self.loader, "dataset", None)
        column = next((c for c in ("labels", "label") if c in (getattr(dataset, "column_names", None) or ())), None)
        if dataset is None or column is None:
            return super().labels()
        if not hasattr(dataset, "__len__"):
            raise UserError("The training data is a stream, so the class of each sample is not known beforehand.")
        values = dataset[column][:]
        if len(values) and hasattr(values[0], "__len__") and getattr(values[0], "ndim", 1):
            raise UserError("The training data has many labels a sample, so there is no class of each sample.")
        return torch.as_tensor(values).to(torch.int64)


class _Read:
    """A loader whose batches are read by a function; all else is the loader's."""

    def __init__(self, loader: Any, read: Callable[[Any], Batch]) -> None:
        self._loader, self._as = loader, read

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._as, self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)


def _has_tokens(inputs: Mapping[str, Any]) -> bool:
    """Whether the labels are of tokens, (B, L) ids."""
    return are_of_tokens(inputs.get("labels"))


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace each gradient by its mean over processes, in one reduction."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, mean in zip(parameters, torch.split(flat, [p.numel() for p in parameters])):
        p.grad = mean.view_as(p)


def _size(inputs: Mapping[str, Any]) -> int:
    """Samples of a batch as a collator makes it."""
    return next(len(v) for v in inputs.values() if isinstance(v, Tensor) and v.ndim)

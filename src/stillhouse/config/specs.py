"""The typed options that recipes share (`DataSpec`, `ModelSpec`, `TrainSpec`, …), and the base of every method's
config.

A recipe file IS the config of its method: `method:` names the class (default `distillation`), every other key is a
field of its `Config`. Importing this module loads neither torch nor any method.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from stillhouse.config.names import folder_name
from stillhouse.errors import UserError


class Spec(BaseModel):
    """Base of all options: unknown keys are errors, values are coerced only where nothing is lost."""

    model_config = ConfigDict(extra="forbid", validate_default=False, protected_namespaces=(), allow_inf_nan=False)
    later: ClassVar[frozenset[str]] = frozenset()
    """Fields that came later: a dump leaves them out at their defaults, so that stages and run folders of before stay
    valid."""

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        out: dict[str, Any] = plain(self)
        for name in self.later:
            if name in out and getattr(self, name) == type(self).model_fields[name].default:
                del out[name]
        return out


class NamedSpec(Spec):
    """Data by name, whatever its task."""

    name: str = Field(description="A data set; what stands before a colon is the scheme, which settles the task.")
    root: str | None = Field(
        None,
        description="Folder that holds the data; default: --data-root, then STILLHOUSE_DATA, then the user's cache.",
    )

    def bundle(self, data_root: str | Path | None, seed: int) -> Any:
        """The data, of a spec that is no `DataSpec` and brings its own reading (see `stillhouse.data.load`)."""
        raise UserError(f"Data of a {type(self).__name__} is read by its method alone.")


class UnlabelledSpec(Spec):
    """Samples that are read without their labels, for methods that learn from both kinds."""

    data: DataSpec | None = Field(
        None,
        description="Another data set, whose training samples they are, as augmented there; default: the training "
        "samples that data.size leaves over, as augmented here.",
    )
    size: int | None = Field(None, ge=1, description="How many, seeded, whatever their classes; default: all.")
    foreign: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Share of them that is of classes outside data.classes: m brings ceil(m * T / (1 - m)) samples to "
        "T of these classes.",
    )
    batch_size: int | None = Field(None, ge=1, description="Samples of a batch; default: train.batch_size.")

    @model_validator(mode="after")
    def _one_source(self) -> UnlabelledSpec:
        if self.data is not None and (self.size is not None or self.foreign):
            raise ValueError("size and foreign are for what data.size leaves over; with `data`, set data.size there")
        if self.data is not None and self.data.unlabelled is not None:
            raise ValueError("unlabelled data cannot have unlabelled data of its own")
        return self


class DataSpec(NamedSpec):
    """A data set by name, its splits, and its augmentation."""

    later = frozenset({"long_tail", "views", "unlabelled"})
    name: str = Field(
        description="digits | cifar10 | camvid | fsdd | text:NAME | conversations:PATH | masks:PATH | "
        "instances:PATH | voc:PATH | coco:PATH | restore:PATH | captions:NAME | pairs:PATH | shards:PATH | "
        "styled:NAME | pasted:NAME | imagefolder:PATH | images:PATH | multilabel:PATH | "
        "torchvision:CLASS | hf:REPO | parquet:PATH | synthetic:PATH | file:PATH.py:FUNCTION | SCHEME:NAME of an "
        "installed package"
    )
    size: int | None = Field(
        None,
        ge=1,
        description="Train on a class-balanced, seeded subset of this many samples (taken before the holdout).",
    )
    long_tail: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="Thin the training classes out to a long tail: class c of C keeps n * long_tail^(c / (C - 1)) "
        "samples, seeded (taken after `size`).",
    )
    test_size: int | None = Field(
        None, ge=1, description="Evaluate on a class-balanced, seeded subset of this many test samples."
    )
    holdout: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Share of the training samples left out of training, for choices that must not see test data.",
    )
    val: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Share of the training samples used for validation, where the data set has no validation split.",
    )
    classes: list[int] | None = Field(None, description="Keep only these class ids, renumbered in this order.")
    image_size: Annotated[int, Field(ge=4)] | tuple[Annotated[int, Field(ge=4)], Annotated[int, Field(ge=4)]] | None = (
        Field(
            None,
            description="Resize images to this many pixels a side, or to [height, width]; default: the data set's own "
            "size.",
        )
    )
    augment: Literal["standard", "plain"] | list[str | dict[str, Any]] = Field(
        "standard",
        description="`standard`: the data set's usual training augmentation; `plain`: none; or a list of "
        "torchvision.transforms.v2 classes by name with their arguments, such as "
        "[{RandomCrop: {size: 32, padding: 4}}, RandomHorizontalFlip].",
    )
    views: dict[str, list[str | dict[str, Any]]] | None = Field(
        None,
        description="Further views of each training sample, name -> transforms as in augment; a batch holds them under "
        "`views`, and a teacher may read one.",
    )
    mixup: float = Field(0.0, ge=0.0, description="Mixup's alpha; 0 is off.")
    cutmix: float = Field(
        0.0,
        ge=0.0,
        description="CutMix's alpha; 0 is off. With mixup also on, each batch takes one of the two at random.",
    )
    label_noise: float = Field(
        0.0, ge=0.0, le=1.0, description="Share of training labels replaced by another class, seeded."
    )
    seed: int = Field(
        0, description="Seed of the subset, the splits and the label noise: one split for all seeds of a run."
    )
    unlabelled: UnlabelledSpec | None = Field(
        None, description="Samples read without their labels, for methods that learn from both kinds."
    )
    workers: int = Field(0, ge=0, description="Loader processes.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="What the data format takes besides, such as split and column names.",
    )

    @model_validator(mode="after")
    def _has_samples_without_labels(self) -> DataSpec:
        if self.unlabelled is not None and self.unlabelled.data is None and self.size is None:
            raise ValueError("unlabelled samples are those that `size` leaves over: set size, or unlabelled.data")
        if self.unlabelled is not None and self.unlabelled.foreign and self.classes is None:
            raise ValueError("unlabelled.foreign needs `classes`, outside which its samples lie")
        return self


UnlabelledSpec.model_rebuild()  # it names DataSpec, which names it


class CheckpointSpec(Spec):
    """A file of weights, and how it fits a network."""

    path: str = Field(description=".safetensors, or a .pt/.pth state dict (read with weights_only).")
    rename: list[tuple[str, str]] | Literal["open_clip"] = Field(
        default_factory=list,
        description="The file's names to the network's: [regular expression, replacement] pairs, applied in order, "
        "such as [['^backbone\\.', '']]; open_clip: names of OpenAI's and open_clip's CLIP, for stillhouse:clip.",
    )
    classifier: Literal["same", "new", "none"] | None = Field(
        None,
        description="same: the file's; new: not loaded where its classes differ or the file has none; none: not loaded "
        "and of one output, for a teacher of features. Default: new for a network that is trained, else same.",
    )


class ModelSpec(Spec):
    """A network by name."""

    model: str = Field(
        description="timm:NAME | torchvision:NAME | hf:PATH-OR-CONFIG | file:PATH.py:CLASS | stillhouse:NAME"
    )
    checkpoint: str | CheckpointSpec | None = Field(
        None,
        description="Weights to load: a file, also one under the data root, or {path, rename, classifier}.",
    )
    pretrained: bool = Field(
        False, description="Take the published weights of the library that the model comes from (needs the network)."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Further arguments of the model's constructor.")
    embedding: str | None = Field(
        None, description="The classifier submodule whose input is the embedding; found by itself for most models."
    )

    @property
    def weights(self) -> CheckpointSpec | None:
        """The checkpoint with its options."""
        return CheckpointSpec(path=self.checkpoint) if isinstance(self.checkpoint, str) else self.checkpoint

    def with_classifier(self, choice: Literal["same", "new"]) -> ModelSpec:
        """The same network, whose checkpoint's classifier is treated so where the recipe leaves it open."""
        weights = self.weights
        if weights is None or weights.classifier is not None:
            return self
        return self.model_copy(update={"checkpoint": weights.model_copy(update={"classifier": choice})})


class OptimizerSpec(Spec):
    """An optimiser of torch.optim by name; further keys are its arguments."""

    later = frozenset({"decay", "layer_decay"})
    model_config = ConfigDict(extra="allow")
    name: str = Field("sgd", description="Any class of torch.optim, in lower case: sgd, adamw, adam, rmsprop, …")
    lr: float = Field(0.05, gt=0, description="Learning rate; the schedule moves it.")
    weight_decay: float = Field(5e-4, ge=0, description="Of the parameters that `decay` names.")
    decay: Literal["all", "matrices"] = Field(
        "all",
        description="What weight decay is for: all parameters, or those of two axes or more, without norms, biases, "
        "tokens and positions.",
    )
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="The student's learning rate is multiplied by this once for each layer (or stage) that lies "
        "between it and the output.",
    )

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the optimiser's class; sgd has momentum 0.9 by default."""
        extra = dict(self.model_extra or {})
        if self.name == "sgd":
            extra.setdefault("momentum", 0.9)
        return {"lr": self.lr, "weight_decay": self.weight_decay, **extra}


class LRSchedule(Spec):
    """Learning rate over training."""

    later = frozenset({"power"})
    name: Literal["cosine", "step", "linear", "constant", "poly", "exponential", "onecycle"] = Field(
        "cosine",
        description="cosine, linear, poly: falling to min_lr at the end; step: by gamma at each milestone; "
        "exponential: by gamma after each epoch; "
        "onecycle: rising from lr / 25 to lr over warmup_epochs (or 30 % of the training), then falling along a "
        "cosine.",
    )
    warmup_epochs: float = Field(0.0, ge=0, description="Linear from 0 over this many epochs, before the schedule.")
    milestones: list[float] = Field(
        default_factory=list, description="step: epochs at which the rate is multiplied by gamma."
    )
    gamma: float = Field(0.1, gt=0, description="step, exponential: the factor.")
    min_lr: float = Field(0.0, ge=0, description="cosine, linear, poly, exponential, onecycle: where the rate ends.")
    power: float = Field(0.9, gt=0, description="poly: the exponent of the share of training that is left.")


class TrainSpec(Spec):
    """How one network (with its objectives) is fitted."""

    later = frozenset({"channels_last", "gradient_checkpointing"})
    epochs: int = Field(10, ge=1, description="Passes over the training split.")
    batch_size: int = Field(
        128, ge=1, description="Samples of one optimiser step over all processes, before accumulation."
    )
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec, description="Default: SGD with momentum 0.9.")
    schedule: LRSchedule = Field(default_factory=LRSchedule, description="The learning rate over training.")
    clip: float | None = Field(None, gt=0, description="Clip the gradient's norm.")
    accumulate: int = Field(1, ge=1, description="Batches whose gradients are averaged for one optimiser step.")
    precision: Literal["full", "bf16", "fp16"] = Field(
        "full", description="bf16, fp16: mixed precision; losses stay in float32."
    )
    channels_last: bool = Field(
        False, description="Keep images and networks in channels-last memory, which is faster on many devices."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute the student's activations again in the backward pass: less memory for a third more time "
        "(networks of transformers and timm).",
    )
    compile: bool = Field(False, description="torch.compile the student and the live teachers.")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of an exponential moving average of the student, which is evaluated and saved in its place.",
    )
    eval_every: int = Field(1, ge=0, description="Epochs between evaluations; 0: only at the end.")
    best: str | None = Field(
        None,
        description="Keep the weights of the best evaluation by this figure (needs a val or holdout split), such as "
        "accuracy.",
    )
    patience: int | None = Field(
        None, ge=1, description="Stop after this many evaluations without a better `best` figure."
    )
    log_every: int = Field(50, ge=1, description="Steps between rows of metrics.csv.")
    checkpoint_seconds: float = Field(
        20.0, ge=0, description="Seconds between checkpoints, at log points and epoch ends; 0: at every one."
    )
    deterministic: bool = Field(
        False, description="Deterministic kernels on a GPU (slower); the CPU is deterministic as it is."
    )
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        default_factory=list, description="Where figures are logged besides metrics.csv; each is an extra to install."
    )

    @model_validator(mode="after")
    def _best_needs_patience(self) -> TrainSpec:
        if self.patience is not None and self.best is None:
            raise ValueError("patience needs `best`, the figure to watch")
        return self

    def identity(self) -> dict[str, Any]:
        """What trained weights depend on, as JSON data: all but how often is logged and saved, where figures go,
        and how the same is computed."""
        return self.model_dump(
            mode="json",
            exclude={
                "log_every",
                "checkpoint_seconds",
                "trackers",
                "compile",
                "channels_last",
                "gradient_checkpointing",
            },
        )


def _shorthand(key: str) -> BeforeValidator:
    return BeforeValidator(lambda v: {key: v} if isinstance(v, str) else v)


class StoreSpec(Spec):
    """Which of a teacher's signals are stored, and how (see docs/store.md)."""

    top: int | None = Field(
        None, ge=1, description="Store the k most probable classes and the mass of all others; default: full logits."
    )
    logits: bool = Field(True, description="Store class scores; false: only embedding and taps.")
    embedding: bool = Field(False, description="Store the embedding.")
    taps: list[str] = Field(default_factory=list, description="Store these taps: submodules, or stage:N.")
    precision: Literal["fp32", "fp16", "bf16", "int8"] = Field(
        "fp32", description="Of the stored values; the rounding error is recorded."
    )
    views: int = Field(
        1, ge=1, description="Augmented views of each sample; epoch e of a training replays view e mod views."
    )
    seed: int = Field(0, description="Of the views: view v of sample i is drawn by the key (seed, v, i).")
    shard_rows: int | None = Field(
        None, ge=1, description="Samples of a shard; default: about 64 MB, and at least 16 shards for many samples."
    )

    @model_validator(mode="after")
    def _keeps_something(self) -> StoreSpec:
        if not (self.logits or self.embedding or self.taps):
            raise ValueError("it keeps nothing: set logits, embedding or taps")
        if self.top is not None and not self.logits:
            raise ValueError("top keeps class scores, but logits is false")
        return self


class InputSpec(Spec):
    """A teacher's own input, computed from the student's: back to pixels in [0, 1], pooled, resized, and normalised as
    in the teacher's training."""

    later = frozenset({"interpolation"})
    size: int | tuple[int, int] | None = Field(
        None, description="Resize to this many pixels a side, or to [height, width]."
    )
    mean: tuple[float, ...] | None = Field(
        None, description="The teacher's mean per channel; default: as it was published, else the data's."
    )
    std: tuple[float, ...] | None = Field(None, description="Its standard deviation per channel.")
    pool: int | None = Field(None, ge=2, description="Average squares of this many pixels a side first.")
    interpolation: Literal["bilinear", "bicubic"] = Field("bilinear", description="How to resize.")

    @model_validator(mode="after")
    def _both_or_neither(self) -> InputSpec:
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ValueError("give mean and std together, with as many channels each")
        if any(s <= 0 for s in self.std or ()) or any(
            s < 1 for s in ((self.size,) if isinstance(self.size, int) else self.size or ())
        ):
            raise ValueError("std and size must be above 0")
        return self


class TeacherSpec(Spec):
    """A source of knowledge. Exactly one of `model`, `ensemble`, `momentum`, `past_self`, `peer`, `store: PATH`."""

    later = frozenset({"input", "view", "objectives", "teacher"})
    model: str | None = Field(None, description="A live, frozen network by name.")
    checkpoint: str | CheckpointSpec | None = Field(None, description="As of a student's model.")
    pretrained: bool = Field(False, description="As of a student's model.")
    options: dict[str, Any] = Field(default_factory=dict, description="As of a student's model.")
    embedding: str | None = Field(None, description="As of a student's model.")
    input: InputSpec | None = Field(
        None,
        description="Of `model`: its own input, {size, mean, std, pool}. With pretrained and without train, its "
        "published normalisation is used by itself.",
    )
    view: str | None = Field(
        None, description="Of `model`: which of data.views it reads in training, in place of the student's input."
    )
    data: DataSpec | None = Field(
        None, description="What the teacher is trained on; default: the recipe's data. The classes must be the same."
    )
    train: TrainSpec | None = Field(
        None,
        description="How the teacher is trained first (with checkpoint or pretrained: fine-tuned); once, then read "
        "from the cache.",
    )
    objectives: list[ObjectiveSpec] | None = Field(
        None, description="What `train` minimises; default: the plain training of its task, such as cross-entropy."
    )
    teacher: TeacherSpec | None = Field(
        None, description="Whom `objectives` read: a teacher that was distilled itself."
    )
    seed: int | None = Field(
        None,
        description="Seed of the teacher's own training; default 0, so that all seeds of a bench share one teacher.",
    )
    ensemble: list[TeacherSpec] | None = Field(None, description="Several live teachers as one.")
    mean: Literal["probs", "logits"] = Field("probs", description="ensemble: what is averaged.")
    momentum: float | None = Field(
        None, gt=0, lt=1, description="The student's own exponential moving average, with this momentum."
    )
    past_self: bool = Field(False, description="The student's predictions of its last epoch, by sample index.")
    peer: ModelSpec | None = Field(None, description="A second network trained together with the student.")
    store: str | StoreSpec | None = Field(
        None,
        description="A folder that `stillhouse cache` wrote: its signals are the teacher. Or, with model or "
        "ensemble, what to store: written once, named by its content, and read in place of the live teacher.",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> TeacherSpec:
        given = [k for k in ("model", "ensemble", "momentum", "past_self", "peer") if getattr(self, k)]
        given += ["store"] if isinstance(self.store, str) else []
        if len(given) != 1:
            raise ValueError(
                "give exactly one of model, ensemble, momentum, past_self, peer, store: PATH (given: "
                f"{', '.join(given) or 'none'})"
            )
        for key in ("input", "view"):
            if getattr(self, key) is not None and self.model is None:
                raise ValueError(f"{key} is for a teacher of `model`, not for {given[0]}")
        for key in ("objectives", "teacher"):
            if getattr(self, key) is not None and self.train is None:
                raise ValueError(f"{key} says how the teacher is trained, so it needs `train`")
        if self.teacher is not None and self.objectives is None:
            raise ValueError("a teacher's own `teacher` needs `objectives` that read it")
        if self.view is not None and self.store is not None:
            raise ValueError("a store holds outputs for the student's input, so its teacher cannot read a view")
        if self.store is not None and given[0] not in ("model", "ensemble", "store"):
            raise ValueError(f"{given[0]} changes as the student learns, so it cannot be stored")
        return self

    @property
    def network(self) -> ModelSpec:
        """The model part, for a live teacher."""
        assert self.model is not None
        return ModelSpec(
            model=self.model,
            checkpoint=self.checkpoint,
            pretrained=self.pretrained,
            options=self.options,
            embedding=self.embedding,
        )


class WeightSpec(Spec):
    """An objective's weight over training."""

    kind: Literal["constant", "linear", "cosine", "warmup"] = Field(
        "constant",
        description="constant: end; linear, cosine: from start to end over the span, then end; warmup: linear from 0 "
        "to end.",
    )
    start: float = Field(0.0, description="linear, cosine: the weight at the start.")
    end: float = Field(1.0, description="The weight at the end of the span.")
    epochs: float | None = Field(
        None, gt=0, description="The span in epochs, constant inside each; neither this nor steps: the whole training."
    )
    steps: int | None = Field(None, gt=0, description="The span in optimiser steps.")


class ObjectiveSpec(Spec):
    """One objective; all other keys are the options of the objective that `name` names."""

    model_config = ConfigDict(extra="allow")
    name: str = Field(description="An objective of the catalogue, or file:PATH.py:CLASS.")
    weight: float | WeightSpec | None = Field(
        None, description="A number, or a schedule; default: the published weight."
    )
    teacher: str = Field("teacher", description="Which named teacher it reads.")
    label: str | None = Field(
        None, description="Its name in logs, where one objective is used twice; default: its name."
    )

    @model_validator(mode="before")
    @classmethod
    def _options_of_its_class(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        return value

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


TeacherSpec.model_rebuild()  # whose trained form names objectives; subclasses elsewhere could not resolve the name
Objectives = Annotated[list[ObjectiveSpec], Field(min_length=1)]
Model = Annotated[ModelSpec, _shorthand("model")]
Teacher = Annotated[TeacherSpec, _shorthand("model")]
Data = Annotated[DataSpec, _shorthand("name")]


class ClaimSpec(Spec):
    """One checkable sentence of a paper, as a comparison of figures (see docs/claims.md). Exactly one of `over`,
    `at_least`, `at_most`.

    Amounts are in the unit in which reports show the figure: percentage points for an accuracy.
    """

    says: str = Field(min_length=1, description="The claim, in one sentence.")
    figure: str = Field(description="The figure that decides it, such as accuracy.")
    of: str = Field(
        description="The row it is about: a variant, or base for the recipe itself; VARIANT/GROUP where a recipe has "
        "groups."
    )
    over: str | None = Field(None, description="The row that must be worse.")
    at_least: float | None = Field(None, description="A lower bound of the figure's mean.")
    at_most: float | None = Field(None, description="An upper bound of the figure's mean.")
    by: float = Field(0.0, ge=0, description="over: how much better, at least.")
    within: float | None = Field(
        None, gt=0, description="over: the row may be worse than the other, but by no more than this."
    )
    better: Literal["higher", "lower"] | None = Field(
        None, description="Which way the figure is better; must be given for one that reports do not know."
    )
    because: str | None = Field(None, description="One sentence on why it was not shown, or not measured.")
    paper: str | None = Field(
        None,
        description="The card whose claim it is; default: that of the recipe's name, else those that the row runs.",
    )

    @model_validator(mode="after")
    def _one_question(self) -> ClaimSpec:
        given = [k for k in ("over", "at_least", "at_most") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of over, at_least, at_most (given: {', '.join(given) or 'none'})")
        needless = [k for k in ("by", "within") if getattr(self, k)]
        if self.over is None and needless:
            raise ValueError(f"{needless[0]} belongs to a comparison, so it needs `over`; a bound is {given[0]} alone")
        if self.by and self.within is not None:
            raise ValueError("give by (how much better) or within (how much worse is allowed), not both")
        return self


class MethodConfig(Spec):
    """What every recipe has. A method's `Config` adds its own keys."""

    method: str = Field("distillation", description="The method's slug.")
    name: str | None = Field(None, description="The run's name; default: the recipe's file name.")
    seed: int = Field(0, ge=0, description="Of the student's weights, the order of samples and augmentation.")
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Named overrides (dotted keys), chosen by --variant: the paper's setting, the baselines.",
    )
    groups: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="For `stillhouse bench`: one dotted key and its named values, such as two students; every variant "
        "is run with each.",
    )
    claims: list[ClaimSpec] = Field(
        default_factory=list,
        description="What the paper says will happen; `stillhouse bench` gives each claim its verdict.",
    )

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str | None) -> str | None:
        return None if name is None else folder_name(name, "a run's folder is named by it")

"""PELA: make a trained network smaller by low-rank factors once, repair it by its own features, and fine-tune only the
small one afterwards.

paper: Learning Parameter-Efficient Models with Low-Rank Approximation
venue: CVPR 2024
arxiv: 2310.10700
task: classification
family: low-rank compression
use when: a trained transformer shall be fine-tuned and deployed with a half or a third of its weights
needs: a trained network of linear layers, and data of the task that it was trained for (labels are optional)

Every linear layer but the classifier becomes two thin ones by a truncated singular value decomposition. The low-rank
copy is trained on with the task's loss, the mean squared distance of its block outputs to the original's
(`feature_weight`), and (d - eps)^2 for the largest entry d of |B A - W| of each layer (`perturbation_weight`), which
pulls d to eps from both sides unless `hinge`. The paper sets all three on; the released scripts leave one or the other
out (DeiT: no perturbation term; Swin: eps 0). Features are those of all blocks, as the paper has it and the released
Swin trainer has not. `finetune` then trains the small network on other data, with a new classifier. Extensions of ours:
`pointwise` factorises 1x1 convolutions too, so that convolutional networks can be a subject; nn.MultiheadAttention is
taken apart into linear layers first. `ratio: null` is the dense baseline, `start: random` the same structure without
the decomposition, `train: null` the decomposition alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, DataSpec, MethodConfig, ModelSpec, Spec, Teacher, TrainSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Objective, Progress
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.evaluation import cost
from stillhouse.functional.precision import full_precision
from stillhouse.methods.distillation import describe
from stillhouse.models import load_weights
from stillhouse.models.anatomy import classifier
from stillhouse.nn.low_rank import Replacement, decompose, repeated_blocks
from stillhouse.objectives.ce import CrossEntropy
from stillhouse.randomness import keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.judging import check_groups, evaluate
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, Signals
from stillhouse.tasks.base import Task
from stillhouse.tasks.classification import Classification

# ---- losses ----------------------------------------------------------------------------------------------------------


@full_precision
def mean_squared(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over all elements of the squared difference; the teacher's is a constant."""
    return F.mse_loss(student, teacher.detach())


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """L_F: `mean_squared` of each block's output, averaged over the blocks."""
    return torch.stack([mean_squared(s, t) for s, t in zip(student, teacher, strict=True)]).mean()


@full_precision
def largest_entry(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """d = max_ij |(B A - W)_ij| of A (r, in), B (out, r), W (out, in), a scalar; the gradient goes to the one entry, so
    it is cheap."""
    with torch.no_grad():
        at = torch.addmm(weight, second, first, beta=-1).abs().argmax()
        row, column = at // weight.shape[1], at % weight.shape[1]
    entry = (second.index_select(0, row[None])[0] * first.index_select(1, column[None])[:, 0]).sum()
    return (entry - weight.index_select(0, row[None])[0].index_select(0, column[None])[0]).abs()


def perturbation_loss(layers: Sequence[tuple[Tensor, Tensor, Tensor]], eps: float, hinge: bool = False) -> Tensor:
    """L_W: (d - eps)^2, averaged over layers (A, B, W); with `hinge` only where d is above eps."""
    gaps = torch.stack([largest_entry(*layer) for layer in layers]) - eps
    return (gaps.clamp_min(0) if hinge else gaps).square().mean()


class FeatureImitation(Objective):
    """The distance of block outputs to the original's.

    Args:
        blocks: their submodules, of the same names in both networks.
    """

    name = "features"

    def __init__(self, blocks: Sequence[str]) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        self.needs = frozenset(f"{side}.tap:{b}" for side in ("student", "teacher") for b in blocks)

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        for block in self.blocks:
            mine, theirs = student.taps[block].shape, teacher.taps[block].shape
            if mine != theirs:
                raise UserError(
                    f"pela: '{block}' gives shape {tuple(mine)} but in the original {tuple(theirs)}; they must be "
                    "equal.",
                )

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"loss": feature_loss([student.taps[b] for b in self.blocks], [teacher.taps[b] for b in self.blocks])}


class LogitImitation(Objective):
    """The squared distance of the logits."""

    name = "logits"
    needs = frozenset({"student.logits", "teacher.logits"})

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"loss": mean_squared(student.require("logits"), teacher.require("logits"))}


class Perturbation(Objective):
    """How far the factors' products may go from the original weights. The layers are the student's; they are not this
    module's.

    Args:
        replaced: layers with their original weights.
        eps, hinge: see `perturbation_loss`.
    """

    name = "perturbation"
    needs = frozenset()

    def __init__(self, replaced: Sequence[Replacement], eps: float = 1e-3, hinge: bool = False) -> None:
        super().__init__()
        self._layers, self.eps, self.hinge = [r.layer for r in replaced], eps, hinge
        for i, r in enumerate(replaced):
            self.register_buffer(f"weight{i}", r.weight, persistent=False)

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        layers = [(layer.first, layer.second, self.get_buffer(f"weight{i}")) for i, layer in enumerate(self._layers)]
        return {"loss": perturbation_loss(layers, self.eps, self.hinge)}


# ---- the recipe ------------------------------------------------------------------------------------------------------


class LowRankShape(Spec):
    """Which layers are factorised, and how much; what a product needs to build its network."""

    ratio: float | None = None
    omit: list[str] = Field(default_factory=list)
    keep: list[str] = Field(default_factory=list)
    min_outputs: int = 10
    pointwise: bool = False

    def applied(self, network: nn.Module, approximate: bool) -> list[Replacement]:
        """Factorise a network's layers in place; what was replaced."""
        if self.ratio is None:
            return []
        return decompose(network, self.ratio, self.omit, self.keep, self.min_outputs, self.pointwise, approximate)


class Config(MethodConfig):
    data: Data = Field(description="What the small network is for.")
    original: Data | None = Field(
        None,
        description="What the original was trained for, on which the copy is repaired; null: the same as data.",
    )
    teacher: Teacher = Field(description="The original network.")
    ratio: float | None = Field(
        2.0,
        gt=0,
        description="How many times fewer weights a linear layer shall have; null: the network stays dense.",
    )
    omit: list[str] = Field(
        default_factory=lambda: ["norm", "head", "patch_embed", "downsample"],
        description="Layers whose name contains one of these stay, and so does the classifier (Swin: attn.proj too).",
    )
    min_outputs: int = Field(10, ge=1, description="Layers with fewer outputs stay.")
    pointwise: bool = Field(False, description="Factorise 1x1 convolutions too.")
    start: Literal["svd", "random"] = Field("svd", description="random: the same layers without the decomposition.")
    blocks: list[str] | None = Field(
        None,
        description="Submodules whose outputs are compared; null: the blocks that hold the factorised layers.",
    )
    label_weight: float = Field(1.0, ge=0, description="Of the cross-entropy; 0: repair without labels.")
    feature_weight: float = Field(1.0, ge=0, description="w_F.")
    logit_weight: float = Field(0.0, ge=0, description="w_B, of the squared distance of the logits.")
    perturbation_weight: float = Field(1.0, ge=0, description="w_W.")
    eps: float = Field(1e-3, ge=0)
    hinge: bool = Field(False, description="Leave products alone that are nearer than eps.")
    train: TrainSpec | None = Field(default_factory=TrainSpec, description="The repair; null: the decomposition alone.")
    finetune: TrainSpec | None = Field(None, description="Training on `data` with a new classifier, after the repair.")
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])

    @model_validator(mode="after")
    def _something_is_learned(self) -> Config:
        weights = (self.label_weight, self.feature_weight, self.logit_weight, self.perturbation_weight)
        if self.train is not None and not any(weights):
            raise ValueError(
                "all weights are 0: there is nothing to train on; set train: null for the decomposition alone",
            )
        if self.original is not None and self.finetune is None:
            raise ValueError(
                "original is other data than `data`, so `finetune` must say how a new classifier is trained"
            )
        return self

    @property
    def source(self) -> DataSpec:
        """What the original was trained for, on which the copy is repaired."""
        return self.original or self.data


class Pela(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        check_groups(run.data(config.data, Classification).task, config.evaluate)
        source, spec = config.source, config.teacher
        original = run.model(spec.network, source, "teacher", spec.seed or 0)
        stages = []
        if spec.train is not None:
            network = {"teacher": describe(spec.network.model, original)}
            batches = steps(run, spec.data or source, spec.train)
            stages.append(
                Stage("teacher", "train the original with cross-entropy (stored, shared)", network, steps=batches)
            )
        count = len(shape_of(config, run, original).applied(original, approximate=False))
        network = {"student": describe(spec.network.model, original)}
        if config.train is not None:
            does = f"repair the copy on {run.data(source).name}, {count} of whose layers are factorised"
            stages.append(Stage("student", does, network, steps=steps(run, source, config.train)))
        if config.finetune is not None:
            does = f"fine-tune it on {run.data(config.data).name} with a new classifier"
            stages.append(Stage("finetune", does, network, steps=steps(run, config.data, config.finetune)))
        return stages

    def run(self, config: Config, run: Run) -> LowRankStudent:
        teacher = run.teacher("teacher", config.teacher, config.source)
        if not isinstance(teacher, FrozenTeacher):
            raise UserError("pela: the teacher must be one network, which is made smaller.")
        network = run.model(config.teacher.network, config.source)
        network.load_state_dict(teacher.model.state_dict())
        parameters, shape = cost.parameters(network), shape_of(config, run, network)
        with keyed("factors", run.seed):
            replaced = shape.applied(network, approximate=config.start == "svd")
        figures = {"parameters_share": cost.parameters(network) / parameters}
        if config.train is not None:
            figures |= self.repaired(config, config.train, run, network, teacher, replaced)
        if replaced:
            largest = [largest_entry(r.layer.first, r.layer.second, r.weight.to(r.layer.first)) for r in replaced]
            figures["perturbation"] = torch.stack(largest).mean().item()
        if config.finetune is not None:
            network, figures["finetune_seconds"] = self.fine_tuned(config, config.finetune, run, network, shape)
        run.record["weights"] = {"teacher": teacher.fingerprint()}
        plain = run.student(network, config.teacher.network, config.data, figures)
        return LowRankStudent(plain.module, plain.model, plain.task, plain.figures, shape)

    def repaired(
        self,
        config: Config,
        spec: TrainSpec,
        run: Run,
        network: nn.Module,
        teacher: FrozenTeacher,
        replaced: Sequence[Replacement],
    ) -> dict[str, float]:
        """Train the low-rank copy in place; its accuracy before where there is a test split, and the seconds."""
        source = config.source
        bundle, figures = run.data(source), {}
        if bundle.has("test"):
            judged = run.figures(network.to(run.device), source, run.loader(source, "test"), run.device, ["accuracy"])
            figures["accuracy_before"] = judged["accuracy"]
        blocks = repeated_blocks([r.name for r in replaced]) if config.blocks is None else config.blocks
        terms: list[tuple[Objective, float]] = [
            (CrossEntropy(), config.label_weight),
            (FeatureImitation(blocks), config.feature_weight if blocks else 0.0),
            (LogitImitation(), config.logit_weight),
            (Perturbation(replaced, config.eps, config.hinge), config.perturbation_weight if replaced else 0.0),
        ]
        module = Distillation(network, teacher, [(o, w) for o, w in terms if w], seed=run.seed, task=bundle.task)
        return {**figures, "train_seconds": fitted("student", module, source, spec, run)}

    def fine_tuned(
        self,
        config: Config,
        spec: TrainSpec,
        run: Run,
        network: nn.Module,
        shape: LowRankShape,
    ) -> tuple[nn.Module, float]:
        """The network with a new classifier, trained on the data that it is for, and the seconds."""
        plain = config.teacher.network.model_copy(update={"checkpoint": None, "pretrained": False})
        fresh = run.model(plain, config.data)
        shape.applied(fresh, approximate=False)
        held = {k: v for k, v in network.state_dict().items() if k.rpartition(".")[0] not in shape.keep}
        fresh.load_state_dict(held, strict=False)
        module = Distillation(fresh, None, [CrossEntropy()], seed=run.seed, task=run.data(config.data).task)
        return fresh, fitted("finetune", module, config.data, spec, run)


def shape_of(config: Config, run: Run, network: nn.Module) -> LowRankShape:
    """Which layers of a network are factorised, and how much; the classifier never is."""
    head = config.teacher.embedding or classifier(network, next(iter(run.loader(config.source, "train", 2))))
    options = config.model_dump(include={"ratio", "omit", "min_outputs", "pointwise"})
    return LowRankShape(keep=[head], **options)


def steps(run: Run, data: DataSpec, spec: TrainSpec) -> int:
    """Batches of a training."""
    return spec.epochs * len(run.loader(data, "train", spec.batch_size, train=True))


def fitted(name: str, module: Distillation, data: DataSpec, spec: TrainSpec, run: Run) -> float:
    """Fit a module on a data set; the seconds it took."""
    loader = run.loader(data, "train", spec.batch_size, train=True)
    done = run.fit(name, module, loader, spec, evaluate=run.validating(data), splits=run.splits(data))
    module.close()
    return done.seconds


# ---- the product -----------------------------------------------------------------------------------------------------


@dataclass
class LowRankStudent(Student):
    """A network whose linear layers are factorised.

    Attributes:
        shape: which of them, and how much; the network is built again by it.
    """

    kind: ClassVar[str] = "stillhouse.methods.compression.pela:LowRankStudent"
    shape: LowRankShape = field(default_factory=LowRankShape)

    def extras(self) -> dict[str, Any]:
        return {"low_rank": self.shape.model_dump(mode="json")}

    @classmethod
    def rebuilt(cls, meta: Mapping[str, Any], spec: ModelSpec, task: Task, folder: Path) -> LowRankStudent:
        shape, module = LowRankShape.model_validate(meta["low_rank"]), task.build(spec)
        shape.applied(module, approximate=False)
        load_weights(module, task.weights_file(folder), owner=f"model {spec.model}")
        return cls(module.eval(), spec, task, shape=shape)


evaluates(LowRankStudent.kind)(evaluate)

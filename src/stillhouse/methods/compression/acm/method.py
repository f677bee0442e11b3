"""ACM: turn a trained transformer into one whose MLPs and attention projections do as much work for a token as it
needs.

paper: Adaptive Computation Modules: Granular Conditional Computation For Efficient Inference
venue: AAAI 2025
arxiv: 2312.10193
task: classification
family: conditional computation
use when: a trained transformer shall be faster on average, at a budget of your choice
needs: a trained transformer whose MLPs and projections are modules of one width

Each MLP and projection becomes N small learners that add up, and a gate that says how many of them a token gets. Phase
1 trains the learners to give what the module gave, for every k at once, each module alone, on the trained network's own
inputs; phase 2 the gates, to predict the k after which a further learner improves the output by less than a fifth;
phase 3 all weights, by `objectives`, a budget, and two losses that keep choices diverse within a sample (entropy) and
between samples. The product skips what is not chosen. Followed is the paper where the released code differs: learners
get the gradient of every k (`detached: true` for theirs), gate labels start from the second learner (`rule: released`),
gates are trained by cross-entropy (`gate_loss: released`: of the hard sample), and in phase 3 the output depends on the
gate by its straight-through sample, where the released one trains gates by the auxiliary losses alone and never runs
the last learner. Projections have learners without an activation, as released. Baselines: `fixed: k` gives every token
k learners, without gates; with `learners: 1`, `fixed: 1` and `total_factor` it is a narrower MLP, trained alike;
`early_exit` trains a classifier after each block instead, and lets samples leave that are sure. Left out: an output
bias, dropout, and the Triton kernels; here tokens are sorted by their k.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stillhouse.config.specs import Data, MethodConfig, ModelSpec, Objectives, OptimizerSpec, Teacher, TrainSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Objective, Progress
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.errors import UserError
from stillhouse.evaluation import cost
from stillhouse.methods.compression.acm.early_exit import EarlyExit, ExitLoss, threshold_for
from stillhouse.methods.compression.acm.modules import (
    AdaptiveModule,
    Shape,
    budget_fraction,
    budget_loss,
    diversity_loss,
    entropy_loss,
    executed,
    gate_labels,
    gate_loss,
    learner_loss,
    released_gate_loss,
    separated,
    shape_of,
)
from stillhouse.methods.distillation import describe
from stillhouse.models import load_weights
from stillhouse.nn.low_rank import repeated_blocks
from stillhouse.randomness import keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.judging import check_groups
from stillhouse.runs.judging import evaluate as evaluate_student
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, Signals, Taps, evaluating, to_device
from stillhouse.tasks.base import Task
from stillhouse.training.module import TrainingModule

JUDGED = 8  # test batches by which gates and work are judged
MLPS = ["mlp", "feed_forward"]
PROJECTIONS = ["qkv", "q", "k", "v", "proj", "out", "q_proj", "k_proj", "v_proj", "out_proj", "query", "key", "value"]


# ---- phases 1 and 2 --------------------------------------------------------------------------------------------------


class _ModuleWise(TrainingModule):
    """Adaptive modules, each trained by itself on what the teacher's module takes and gives.

    Args:
        network: with adaptive modules.
        modules: by name.
        teacher: of the same network before; its attention is taken apart.
        task: how it is called.
    """

    def __init__(
        self, network: nn.Module, modules: Mapping[str, AdaptiveModule], teacher: nn.Module, task: Task
    ) -> None:
        super().__init__()
        self.student = network
        self.adaptive = dict(modules)
        self.teacher = FrozenTeacher(teacher, task=task)

    def build(self, batch: Batch) -> None:
        device = next(self.student.parameters()).device
        wanted = [f"tap:{tap}" for name in self.adaptive for tap in (name, f"{name}:in")]
        self.teacher.to(device).attach(wanted, to_device(batch, device), self.student)

    def tokens(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """z and o of each module, (B, ..., D)."""
        taps = self.teacher(batch).taps
        return {name: (taps[f"{name}:in"], taps[name]) for name in self.adaptive}


class LearnerTraining(_ModuleWise):
    """Phase 1: the learners of every module, for every k."""

    detached = False

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for m in self.adaptive.values() for p in m.learners.parameters()]}]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """`loss`: the mean over modules of their mean squared errors over k."""
        losses = [
            learner_loss(self.adaptive[name].learners.all(z, self.detached), o)
            for name, (z, o) in self.tokens(batch).items()
        ]
        return {"loss": torch.stack(losses).mean()}


class GateTraining(_ModuleWise):
    """Phase 2: the gates, on labels from the learners, which stay."""

    factor: float = 1.2
    rule: Literal["paper", "released"] = "paper"
    released = False

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for m in self.adaptive.values() for p in m.gate.parameters()]}]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """`loss`: the mean over modules."""
        losses = []
        for name, (z, o) in self.tokens(batch).items():
            gate = self.adaptive[name].gate
            labels = self.labels(name, z, o)
            loss = (
                released_gate_loss(gate(z), labels) if self.released else gate_loss(gate.logits(z), labels, gate.least)
            )
            losses.append(loss)
        return {"loss": torch.stack(losses).mean()}

    @torch.no_grad()
    def labels(self, name: str, z: Tensor, o: Tensor) -> Tensor:
        """How many learners each token of a module should have."""
        return gate_labels(self.adaptive[name].learners.all(z), o, self.factor, self.rule)


# ---- phase 3 ---------------------------------------------------------------------------------------------------------


class _OfGates(Objective):
    """A loss of the gates' choices.

    Args:
        modules: names of the adaptive modules.
    """

    def __init__(self, modules: list[str]) -> None:
        super().__init__()
        self.taps = [f"{name}.gate" for name in modules]
        self.needs = frozenset(f"student.tap:{tap}" for tap in self.taps)

    def gates(self, student: Signals) -> list[Tensor]:
        return [student.taps[tap] for tap in self.taps]


class Budget(_OfGates):
    """The distance of the batch's cost from the budget.

    Args:
        costs: of a learner of each module.
        target, kind: the budget, and l1 or l2.
    """

    name = "budget"

    def __init__(self, modules: list[str], costs: list[float], target: float, kind: Literal["l1", "l2"]) -> None:
        super().__init__(modules)
        self.costs, self.target, self.kind = costs, target, kind

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        fraction = budget_fraction(self.gates(student), self.costs)
        return {"loss": budget_loss(fraction, self.target, self.kind), "log:fraction": fraction}


class Entropy(_OfGates):
    """`entropy_loss`."""

    name = "entropy"

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"loss": entropy_loss(self.gates(student)).float()}


class Diversity(_OfGates):
    """`diversity_loss`."""

    name = "diversity"

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"loss": diversity_loss(self.gates(student)).float()}


# ---- the recipe ------------------------------------------------------------------------------------------------------


def _adamw(lr: float) -> TrainSpec:
    return TrainSpec(optimizer=OptimizerSpec(name="adamw", lr=lr, weight_decay=0.0), clip=1.0)


class Config(MethodConfig):
    data: Data
    teacher: Teacher = Field(description="The trained network.")
    mlps: list[str] = Field(default_factory=lambda: list(MLPS), description="Last parts of the names of MLPs.")
    projections: list[str] = Field(
        default_factory=lambda: list(PROJECTIONS),
        description="Last parts of the names of attention's projections; []: MLPs alone.",
    )
    learners: int = Field(4, ge=1, description="N.")
    total_factor: float = Field(1.0, gt=0, description="Cost of all learners over that of what they replace.")
    detached: bool = Field(False, description="A learner gets the gradient of its own k alone.")
    learner_train: TrainSpec | None = Field(
        default_factory=lambda: _adamw(1e-3), description="Phase 1; null: learners start at random."
    )
    factor: float = Field(1.2, gt=1, description="A learner that improves the output by less is the last.")
    rule: Literal["paper", "released"] = "paper"
    gate_loss: Literal["cross_entropy", "released"] = "cross_entropy"
    gate_train: TrainSpec = Field(default_factory=lambda: _adamw(1e-2), description="Phase 2.")
    budget: float = Field(0.6, gt=0, lt=1, description="Share of the learners' cost that shall be spent.")
    budget_kind: Literal["l1", "l2"] = "l1"
    budget_weight: float = Field(0.1, ge=0)
    entropy_weight: float = Field(0.05, ge=0)
    diversity_weight: float = Field(0.05, ge=0)
    objectives: Objectives = Field(default_factory=lambda: ["ce"], validate_default=True, description="Of phase 3.")
    train: TrainSpec | None = Field(
        default_factory=lambda: _adamw(1e-4), description="Phase 3, of all weights; null: phases 1 and 2 alone."
    )
    fixed: int | None = Field(None, ge=0, description="Every token gets so many learners, without gates.")
    early_exit: float | None = Field(
        None, gt=0, le=1, description="The baseline: samples go through this share of the blocks on average."
    )
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.fixed is not None and self.fixed > self.learners:
            raise ValueError(f"fixed: {self.fixed} is more than there are learners ({self.learners})")
        if self.early_exit is not None and (self.train is None or self.fixed is not None):
            raise ValueError("early_exit has no learners: it needs `train`, and leaves out `fixed`")
        return self


TEACHER = Stage("teacher", "train the network with cross-entropy (shared)")
LEARNERS = Stage("learners", "train the learners of every module for every k (shared)")
GATES = Stage("gates", "train the gates (shared)")
STUDENT = Stage("student", "train all weights on the budget")


class AdaptiveComputation(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        check_groups(run.data(config.data).task, config.evaluate)
        spec, out = config.teacher, []
        network = run.model(spec.network, config.data, "teacher", spec.seed or 0)
        if spec.train is not None and spec.checkpoint is None:
            named = {"teacher": describe(spec.network.model, network)}
            out.append(TEACHER.filled(models=named, steps=self.steps(config, spec.train, run, spec.data)))
        if config.early_exit is not None and config.train is not None:
            does = "train all weights with a classifier after each block"
            return [*out, STUDENT.filled(does=does, steps=self.steps(config, config.train, run))]
        places = shape(config, run, network).places
        projections = sum(place.projection for place in places.values())
        does = f"train the learners of {len(places) - projections} MLPs and {projections} projections for every k"
        if config.learner_train is not None:
            out.append(LEARNERS.filled(does=f"{does} (shared)", steps=self.steps(config, config.learner_train, run)))
        if config.fixed is None:
            out.append(GATES.filled(steps=self.steps(config, config.gate_train, run)))
        if config.train is not None:
            out.append(STUDENT.filled(steps=self.steps(config, config.train, run)))
        return out

    def run(self, config: Config, run: Run) -> AdaptiveStudent:
        given = run.teacher("teacher", config.teacher, config.data)
        if not isinstance(given, FrozenTeacher):
            raise UserError("acm: the teacher must be one network, whose modules are replaced.")
        run.record["weights"] = {"teacher": given.fingerprint()}
        task = run.data(config.data).task
        network = run.model(config.teacher.network, config.data)
        network.load_state_dict(given.model.state_dict())
        network.to(next(given.model.parameters()).device)
        teacher = separated(copy.deepcopy(network), config.projections)
        built = shape(config, run, network)
        if config.early_exit is not None and config.train is not None:
            return self.with_exits(config, config.train, config.early_exit, run, network, built)
        with keyed("learners", run.seed):
            modules = built.applied(network)
        figures = self.learned(config, run, network, modules, teacher, built)
        if config.fixed is None:
            figures |= self.gated(config, run, network, modules, teacher, built)
        if config.train is not None:
            figures["train_seconds"] = self.end_to_end(config, config.train, run, network, modules)
        return AdaptiveStudent(network, config.teacher.network, task, figures, shape=built)

    def learned(
        self,
        config: Config,
        run: Run,
        network: nn.Module,
        modules: Mapping[str, AdaptiveModule],
        teacher: nn.Module,
        built: Shape,
    ) -> dict[str, float]:
        """Phase 1, in place; `accuracy_first_k` of the network when every token has k learners, and `error_first_k`,
        their mean squared error over the modules' own power."""
        spec = config.learner_train
        if spec is None:
            return {}

        def make() -> dict[str, Any]:
            module = LearnerTraining(network, modules, teacher, run.data(config.data).task)
            module.detached = config.detached
            figures = {"learner_seconds": self.fitted(LEARNERS, module, spec, config, run)}
            figures |= self.by_count(config, run, network, module)
            return {"weights": state_on_cpu(network), "figures": figures}

        held = run.stage(LEARNERS, make, self.uses(config, run, teacher, built))
        network.load_state_dict(held["weights"])
        return dict(held["figures"])

    @staticmethod
    def by_count(config: Config, run: Run, network: nn.Module, module: LearnerTraining) -> dict[str, float]:
        """What the learners are worth before anything else is trained."""
        data = config.data
        if not run.data(data).has("test"):
            return {}
        device = next(network.parameters()).device
        out: dict[str, float] = {}
        fixed = {name: m.fixed for name, m in module.adaptive.items()}
        errors = torch.zeros(config.learners + 1, device=device)
        with evaluating(network):
            for batch in islice(run.loader(data, "test"), JUDGED):
                for name, (z, o) in module.tokens(to_device(batch, device)).items():
                    squared = (module.adaptive[name].learners.all(z) - o.unsqueeze(-2)).square()
                    errors += squared.flatten(0, -3).mean((0, 2)) / o.square().mean()
        for k, error in enumerate((errors / errors[0].clone()).tolist()):
            for adaptive in module.adaptive.values():
                adaptive.fixed = k
            judged = run.figures(network, data, run.loader(data, "test"), device, [run.data(data).task.groups[0]])
            out |= {f"accuracy_first_{k}": judged["accuracy"], f"error_first_{k}": error}
        for name, adaptive in module.adaptive.items():
            adaptive.fixed = fixed[name]
        return out

    def gated(
        self,
        config: Config,
        run: Run,
        network: nn.Module,
        modules: Mapping[str, AdaptiveModule],
        teacher: nn.Module,
        built: Shape,
    ) -> dict[str, float]:
        """Phase 2, in place; `gate_accuracy` on test data, and `gate_gain` over the most frequent label."""

        def make() -> dict[str, Any]:
            module = GateTraining(network, modules, teacher, run.data(config.data).task)
            module.factor, module.rule, module.released = config.factor, config.rule, config.gate_loss == "released"
            figures = {"gate_seconds": self.fitted(GATES, module, config.gate_train, config, run)}
            return {"weights": state_on_cpu(network), "figures": figures | self.gate_figures(config, run, module)}

        gates = {k: getattr(config, k) for k in ("factor", "rule", "gate_loss", "gate_train")}
        held = run.stage(GATES, make, {**self.uses(config, run, teacher, built), "gates": gates})
        network.load_state_dict(held["weights"])
        return dict(held["figures"])

    @staticmethod
    @torch.no_grad()
    def gate_figures(config: Config, run: Run, module: GateTraining) -> dict[str, float]:
        """How the gates do on data that they did not see."""
        if not run.data(config.data).has("test"):
            return {}
        module.eval()
        device = next(module.student.parameters()).device
        tables = torch.zeros(len(module.adaptive), config.learners + 1, config.learners + 1)
        for batch in islice(run.loader(config.data, "test"), JUDGED):
            for i, (name, (z, o)) in enumerate(module.tokens(to_device(batch, device)).items()):
                gate = module.adaptive[name].gate
                labels = module.labels(name, z, o).clamp_min(gate.least)
                pairs = labels * (config.learners + 1) + gate(z).argmax(-1)
                tables[i] += pairs.flatten().bincount(minlength=tables[i].numel()).view_as(tables[i]).cpu()
        shares = tables / tables.sum((1, 2), keepdim=True)
        right, majority = shares.diagonal(dim1=1, dim2=2).sum(1), shares.sum(2).amax(1)
        wanted = shares.sum(2).mean(0).tolist()
        return {
            "gate_accuracy": right.mean().item(),
            "gate_gain": (right - majority).mean().item(),
            **{f"label_share_{k}": share for k, share in enumerate(wanted)},
        }

    def end_to_end(
        self, config: Config, spec: TrainSpec, run: Run, network: nn.Module, modules: Mapping[str, AdaptiveModule]
    ) -> float:
        """Phase 3, in place; the seconds."""
        network.requires_grad_(True)
        names = list(modules)
        losses: list[Any] = [objective_from_spec(o) for o in config.objectives]
        if config.fixed is None:
            costs = [float(module.learners.cost) for module in modules.values()]
            own: list[tuple[Objective, float]] = [
                (Budget(names, costs, config.budget, config.budget_kind), config.budget_weight),
                (Entropy(names), config.entropy_weight),
                (Diversity(names), config.diversity_weight),
            ]
            losses += [(objective, weight) for objective, weight in own if weight]
        task = run.data(config.data).task
        module = Distillation(network, None, losses, seed=run.seed, task=task)
        seconds = self.fitted(STUDENT, module, spec, config, run)
        module.close()
        return seconds

    def with_exits(
        self, config: Config, spec: TrainSpec, share: float, run: Run, network: nn.Module, built: Shape
    ) -> AdaptiveStudent:
        """The baseline: samples leave early. The threshold is found on validation data where there are any, else on
        training data."""
        blocks = repeated_blocks(list(built.places))[:-1]
        dims = {block: next(p.dim for name, p in built.places.items() if name.startswith(block)) for block in blocks}
        if not dims or share <= 1 / (len(dims) + 1):
            raise UserError(
                f"acm: samples go through the first of {len(dims) + 1} blocks, more than early_exit: {share}."
            )
        task = run.data(config.data).task
        with keyed("exits", run.seed):
            module = EarlyExit(network, blocks, list(dims.values()), len(task.class_names))
        module.to(next(network.parameters()).device)
        losses: list[Any] = [objective_from_spec(o) for o in config.objectives]
        distillation = Distillation(module, None, [*losses, (ExitLoss(len(blocks)), 1.0)], seed=run.seed, task=task)
        seconds = self.fitted(STUDENT, distillation, spec, config, run)
        distillation.close()
        taps = Taps(module, [f"heads.{i}" for i in range(len(blocks))])
        device, found = next(module.parameters()).device, []
        with evaluating(module):
            for batch in run.validation(config.data) or run.loader(config.data, "train"):
                with taps.capture() as got:
                    task.call(module, to_device(batch, device))
                found.append(torch.stack([got[name].softmax(-1).amax(-1) for name in taps.names], 1))
        taps.remove()
        module.threshold.fill_(threshold_for(torch.cat(found), share))
        shape = built.model_copy(update={"places": {}, "exits": dims})
        return AdaptiveStudent(module, config.teacher.network, task, {"train_seconds": seconds}, shape=shape)

    @staticmethod
    def uses(config: Config, run: Run, teacher: nn.Module, built: Shape) -> dict[str, Any]:
        """What phase 1 depends on."""
        return {
            "teacher": teacher,
            "data": run.data(config.data),
            "augment": config.data.model_dump(mode="json", include={"augment", "mixup", "cutmix", "image_size"}),
            "shape": built.model_dump(mode="json", exclude={"fixed"}),
            "train": config.learner_train,
            "detached": config.detached,
            "seed": run.seed,
        }

    @staticmethod
    def steps(config: Config, spec: TrainSpec, run: Run, data: Any = None) -> int:
        """Batches of a training."""
        return spec.epochs * len(run.loader(data or config.data, "train", spec.batch_size, train=True))

    @staticmethod
    def fitted(stage: Stage, module: TrainingModule, spec: TrainSpec, config: Config, run: Run) -> float:
        """Fit a module on the recipe's data; the seconds it took."""
        loader = run.loader(config.data, "train", spec.batch_size, train=True)
        validating = run.validating(config.data) if stage is STUDENT else None
        return run.fit(stage, module, loader, spec, evaluate=validating, splits=run.splits(config.data)).seconds


def shape(config: Config, run: Run, network: nn.Module) -> Shape:
    """Which modules of a network are replaced; its attention is taken apart."""
    device = next(network.parameters()).device
    batch = to_device(next(iter(run.loader(config.data, "train", 2))), device)
    names = config.mlps, config.projections
    found = shape_of(network, *names, config.learners, config.total_factor, run.data(config.data).task, batch)
    return found.model_copy(update={"fixed": config.fixed})


# ---- the product -----------------------------------------------------------------------------------------------------


@dataclass
class AdaptiveStudent(Student):
    """A network whose MLPs and projections are adaptive.

    Attributes:
        shape: which of them; the network is built again by it.
    """

    kind: ClassVar[str] = "stillhouse.methods.compression.acm:AdaptiveStudent"
    shape: Shape = field(default_factory=lambda: Shape(places={}, count=1, projections=[]))

    @property
    def modules(self) -> dict[str, AdaptiveModule]:
        """The adaptive modules by name."""
        found = {name: self.module.get_submodule(name) for name in self.shape.places}
        return {name: m for name, m in found.items() if isinstance(m, AdaptiveModule)}

    def extras(self) -> dict[str, Any]:
        return {"adaptive": self.shape.model_dump(mode="json")}

    @classmethod
    def rebuilt(cls, meta: Mapping[str, Any], spec: ModelSpec, task: Task, folder: Path) -> AdaptiveStudent:
        shape, module = Shape.model_validate(meta["adaptive"]), task.build(spec)
        if shape.exits is not None:
            separated(module, shape.projections)
            module = EarlyExit(module, list(shape.exits), list(shape.exits.values()), len(task.class_names))
        shape.applied(module)
        load_weights(module, task.weights_file(folder), owner=f"model {spec.model}")
        return cls(module.eval(), spec, task, shape=shape)


@evaluates(AdaptiveStudent.kind)
@torch.no_grad()
def evaluate(product: AdaptiveStudent, run: Run) -> dict[str, float]:
    """The figures of its task; `learners_share`, the cost of the learners that ran on the same samples over that of
    all, `token_spread` and `sample_spread`, the standard deviation of k / N over tokens and of its mean over samples;
    with `cost`, `mean_multiply_adds` as counted while they ran, and `speedup` over the dense network on one batch."""
    figures = evaluate_student(product, run)
    network, task, modules = product.module, product.task, product.modules
    device, loader = next(network.parameters()).device, run.loader(*run.judging_data())
    first: Batch = {}
    if product.shape.exits is not None:
        pass  # it has no learners
    elif product.shape.fixed is not None:
        figures["learners_share"] = product.shape.fixed / product.shape.count
    else:
        taps = Taps(network, [f"{name}.gate" for name in modules])
        counts: dict[str, list[Tensor]] = {name: [] for name in modules}
        with evaluating(network):
            for batch in loader:
                with taps.capture() as got:
                    task.call(network, to_device(batch, device))
                for name in modules:
                    counts[name].append(executed(got[f"{name}.gate"]).flatten(1) / product.shape.count)
        taps.remove()
        joined = {name: torch.cat(found) for name, found in counts.items()}
        costs = {name: m.learners.cost for name, m in modules.items()}
        spent = sum(costs[name] * shares.mean().item() for name, shares in joined.items())
        figures["learners_share"] = spent / sum(costs.values())
        figures["token_spread"] = torch.stack([shares.std() for shares in joined.values()]).mean().item()
        figures["sample_spread"] = torch.stack([s.mean(1) for s in joined.values()]).mean(0).std().item()
    if "cost" in getattr(run.config, "evaluate", ["cost"]):
        count, counter = 0, FlopCounterMode(display=False)
        with evaluating(network), counter:
            for batch in islice(loader, JUDGED):
                first = first or to_device(batch, device)
                task.call(network, to_device(batch, device))
                count += len(batch["label"])
        figures["mean_multiply_adds"] = counter.get_total_flops() / 2 / count
        dense = task.build(product.model).to(device)
        with evaluating(network), evaluating(dense):
            works = {"dense": lambda: task.call(dense, first), "ours": lambda: task.call(network, first)}
            seconds = cost.times_in_turns(works, device)
        figures["speedup"] = seconds["dense"] / seconds["ours"]
    return figures

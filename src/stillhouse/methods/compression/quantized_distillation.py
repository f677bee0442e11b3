"""Quantized distillation: train a small student whose weights lie on a grid of a few levels, by distillation; or learn
where the levels are.

paper: Model Compression via Distillation and Quantization
venue: ICLR 2018
arxiv: 1802.05668
task: any
family: weight quantisation
use when: a student should be stored in 2 to 4 bits a weight
needs: a student; for the distillation loss a teacher's logits

`mode: qd` takes the gradient at the quantised weights and applies it to those in full precision, from the first step
on. `mode: dq` trains the student in full precision, fixes its weights, and learns the positions of each tensor's levels
by SGD, taught by the student before quantisation; a weight takes the nearest position at every step. Buckets of k
consecutive weights are scaled to [0, 1] each by itself, which is what makes few bits work.
Loss: 0.3 of cross-entropy and 0.7 of the KL divergence at temperature 2 times T^2, the paper's. The released code
divides the divergence by the number of classes too; weigh `kd` by 0.7 / C for that. All parameters are quantised,
biases and those of batch norm too, as in the released code; `tensors: matrices` spares them. `allocate` moves levels to
tensors with a large gradient (dq and post_training). The product stores packed codes, and two float32 numbers a bucket.
Left out: the released code's masks of samples on which to ask the teacher (off by default there), and its gradient
through the scales. Baselines: `mode: post_training` rounds the trained student; `mode: qd` with `objectives: [ce]` is
quantisation-aware training alone.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.config.specs import ModelSpec, Objectives, OptimizerSpec, Spec, TrainSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.methods import distillation as general
from stillhouse.models.weights import load_state
from stillhouse.nn import quantise
from stillhouse.nn.quantise import Levels, PackedTensor, UniformLevels
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.judging import evaluate
from stillhouse.runs.method import Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, to_device
from stillhouse.tasks.base import Task

# ---- mathematics -----------------------------------------------------------------------------------------------------


def quantile_points(scaled: Tensor, count: int) -> Tensor:
    """(count,) the percentiles 0 … 100, evenly spaced, of scaled weights: sorted, and equal where many weights are."""
    return torch.quantile(
        scaled.detach().double().reshape(-1),
        torch.linspace(0, 1, count, dtype=torch.double, device=scaled.device),
    ).float()


def quantise_to_points(x: Tensor, points: Tensor, alpha: Tensor, beta: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
    """x with each element at the nearest point of its bucket, and the index of that point, both of x's shape.

    The gradient of point j is the sum, over the elements that take it, of alpha of their bucket times their gradient.

    Args:
        x: gives the shape.
        points: (p,) sorted, in scaled space.
        alpha, beta: (n, 1) of each bucket; scaled: (n, k), as `quantise.scale` gives them.
    """
    index = quantise.nearest_points(scaled, points)
    return quantise.unscale(points[index], alpha, beta, x.shape), index.reshape(-1)[: x.numel()].view_as(x)


def allocate_levels(norms: Sequence[float], initial: int | Sequence[int], bits: bool = False) -> list[int]:
    """How many levels each tensor gets when half of them are dealt again in proportion to the norms of the tensors'
    gradients.

    Args:
        norms: of the gradients, one a tensor.
        initial: levels a tensor before (or of each).
        bits: count bits, of which each tensor gives up one, rather than levels.

    Rounding may leave a rest, which goes to the tensor with the fewest, or is taken from the one with the most.
    """
    before = [initial] * len(norms) if isinstance(initial, int) else list(initial)
    kept = [n - 1 if bits else n // 2 for n in before]
    free, total = sum(before) - sum(kept), sum(norms)
    out = [k + round(norm / total * free) for k, norm in zip(kept, norms)]
    rest = sum(before) - sum(out)
    out[out.index(min(out) if rest > 0 else max(out))] += rest
    return out


def huffman_bits(counts: Sequence[int]) -> float:
    """Mean length in bits of a Huffman code of symbols that occur so many times; 0 where there is one symbol only.

    >>> huffman_bits([4, 2, 1, 1])
    1.75
    """
    heap = [c for c in counts if c]
    heapq.heapify(heap)
    total, bits = sum(heap), 0
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        bits += joined
        heapq.heappush(heap, joined)
    return bits / total if total else 0.0


def compression(bits: float, bucket: int | None) -> float:
    """How many times smaller than float32 weights of so many bits are, with two float32 numbers a bucket.

    >>> compression(4, 256), compression(4, None)
    (7.529411764705882, 8.0)
    """
    return 32 / bits if bucket is None else bucket * 32 / (bucket * bits + 2 * 32)


# ---- learned levels --------------------------------------------------------------------------------------------------


class LearnedLevels(Levels):
    """Levels of one tensor whose positions are learned while its weights stay; coincident positions are no error, and
    they may leave [0, 1].

    Args:
        weight: the trained tensor.
        levels: how many.
        bucket: k, or None.
        start: at the weights' quantiles, or evenly spaced.
    """

    def __init__(
        self,
        weight: Tensor,
        levels: int,
        bucket: int | None,
        start: Literal["quantiles", "uniform"] = "quantiles",
    ) -> None:
        super().__init__()
        quantise.check(levels, bucket)
        scaled = quantise.scale(weight.detach(), bucket)[0]
        own = scaled.reshape(-1)[: weight.numel()]
        even = torch.linspace(0, 1, levels, device=weight.device)
        self.points = nn.Parameter(quantile_points(own, levels) if start == "quantiles" else even)
        self.bucket = bucket

    def forward(self, weight: Tensor) -> Tensor:
        scaled, alpha, beta = quantise.scale(weight.detach(), self.bucket)
        return quantise_to_points(weight, self.points, alpha, beta, scaled)[0].to(weight.dtype)

    @torch.no_grad()
    def sort(self) -> None:
        """Put the points in order again, after a step."""
        self.points.copy_(self.points.sort().values)

    @torch.no_grad()
    def pack(self, weight: Tensor) -> PackedTensor:
        scaled, alpha, beta = quantise.scale(weight, self.bucket)
        codes = quantise.nearest_points(scaled, self.points)
        return quantise.packed(codes, len(self.points), alpha, beta, weight.shape, self.bucket, self.points)


class LearningLevels(Distillation):
    """A distillation that learns the levels' positions alone. The weights stay; running statistics of batch norm follow
    the quantised forward pass."""

    def param_groups(self) -> list[dict[str, Any]]:
        points = [m.points for m in self.student.modules() if isinstance(m, LearnedLevels)]
        return [{"params": list(dict.fromkeys(points))}]

    def after_step(self, batch: Batch, progress: Progress, stepped: bool) -> None:
        super().after_step(batch, progress, stepped)
        if stepped:
            for module in self.student.modules():
                if isinstance(module, LearnedLevels):
                    module.sort()


# ---- the recipe ------------------------------------------------------------------------------------------------------


class LevelsSpec(Spec):
    """dq: how the positions are learned."""

    start: Literal["quantiles", "uniform"] = Field(
        "quantiles",
        description="Where they start: at quantiles of the weights, or evenly spaced.",
    )
    objectives: Objectives = Field(
        default_factory=lambda: [{"name": "ce", "weight": 0.3}, {"name": "kd", "weight": 0.7, "temperature": 2.0}],
        validate_default=True,
        description="The losses; the teacher is the student in full precision.",
    )
    train: TrainSpec = Field(
        default_factory=lambda: TrainSpec(epochs=30, optimizer=OptimizerSpec(lr=1e-5, weight_decay=0.0, nesterov=True)),
        description="Of the positions; the published rate is 1e-5 (1e-4 on CIFAR-100).",
    )


class AllocateSpec(Spec):
    """Levels dealt to tensors by the norm of their gradients."""

    batches: int = Field(
        5,
        ge=1,
        description="Training batches over which the gradient of the cross-entropy is averaged.",
    )


class Config(general.Config):
    objectives: Objectives = Field(
        default_factory=lambda: [{"name": "ce", "weight": 0.3}, {"name": "kd", "weight": 0.7, "temperature": 2.0}],
        validate_default=True,
        description="The student's losses.",
    )
    mode: Literal["qd", "dq", "post_training", "full"] = Field(
        "qd",
        description="qd: train the quantised student; dq: train in full precision, then learn the levels; "
        "post_training: train, then round; full: no quantisation.",
    )
    bits: int = Field(4, ge=1, le=quantise.MOST_BITS, description="2^bits levels a tensor.")
    bucket: int | None = Field(
        256,
        ge=1,
        description="Consecutive weights that are scaled together; null: the whole tensor.",
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest",
        description="qd: to the nearest level, or up at random in training.",
    )
    limit: float | None = Field(
        None,
        gt=0,
        description="qd: clamp weights to [-limit, limit] and stop gradients outside (released code: 1).",
    )
    tensors: Literal["all", "matrices"] = Field(
        "all",
        description="matrices: leave biases and normalisation in full precision.",
    )
    first_and_last: bool = Field(
        True,
        description="Quantise the first and the last parameter tensor too (the last is usually a bias).",
    )
    allocate: AllocateSpec | None = Field(
        None,
        description="dq, post_training: deal the levels to tensors by their gradients.",
    )
    levels: LevelsSpec = Field(default_factory=LevelsSpec)

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.allocate is not None and self.mode not in ("dq", "post_training"):
            raise ValueError(
                "allocate reads the gradients of trained weights: it is for mode: dq and mode: post_training",
            )
        if self.mode != "qd" and (self.rounding == "stochastic" or self.limit is not None):
            raise ValueError("rounding: stochastic and limit are for mode: qd")
        return self


class QuantizedDistillation(general.GeneralDistillation[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        *before, student = super().plan(config, run)
        names = self.chosen(config, run.model(config.student, config.data))
        grid = f"{len(names)} tensors at {2**config.bits} levels in buckets of {config.bucket or 'a tensor'}"
        if config.mode == "qd":
            student.does += f", the gradient taken at quantised weights ({grid})"
            return [*before, student]
        student.does += ", in full precision (stored, shared)"
        after = []
        if config.mode == "dq":
            steps = config.levels.train.epochs * len(
                run.loader(config.data, "train", config.levels.train.batch_size, train=True),
            )
            after = [Stage("levels", f"learn the positions of the levels of {grid}", steps=steps)]
        return [*before, student, *after]

    def run(self, config: Config, run: Run) -> Student:
        if config.mode == "qd":
            return self.trained_on_the_grid(config, run)
        student, figures = self.in_full_precision(config, run)
        if config.mode == "full":
            return run.student(student, config.student, config.data, figures)
        counts = self.counts(config, run, student)
        if config.mode == "post_training":
            quantise.attach(student, {n: UniformLevels(c, config.bucket) for n, c in counts.items()})
            return packed_student(run, config, student, figures)
        return self.with_learned_levels(config, run, student, counts, figures)

    def chosen(self, config: Config, student: nn.Module) -> list[str]:
        """Names of the parameters that are quantised."""
        only = (lambda p: p.ndim >= 2) if config.tensors == "matrices" else None
        return quantise.quantisable(student, only, config.first_and_last)

    def trained_on_the_grid(self, config: Config, run: Run) -> Student:
        """QD."""
        teachers, student = self.teachers(config, run), run.model(config.student, config.data)
        names, stochastic = self.chosen(config, student), config.rounding == "stochastic"
        grid = {n: UniformLevels(2**config.bits, config.bucket, stochastic, config.limit) for n in names}
        quantise.attach(student, grid)
        module = self.module(config, run, student, teachers)
        seconds = self.fitted("student", module, config.train, config, run)
        run.record["weights"] = fingerprints(teachers)
        return packed_student(run, config, student, {"train_seconds": seconds})

    def in_full_precision(self, config: Config, run: Run) -> tuple[nn.Module, dict[str, float]]:
        """The distilled student before quantisation, kept and shared by all recipes that quantise it in another way."""
        teachers, student = self.teachers(config, run), run.model(config.student, config.data)

        def make() -> dict[str, Any]:
            seconds = self.fitted("student", self.module(config, run, student, teachers), config.train, config, run)
            return {"weights": dict(student.state_dict()), "figures": {"train_seconds": seconds}}

        uses = {
            "data": run.data(config.data).fingerprint,
            "augment": config.data.model_dump(mode="json", include={"augment", "mixup", "cutmix"}),
            "teachers": fingerprints(teachers),
            "recipe": config.model_dump(
                mode="json",
                include={"student", "objectives", "teacher", "teachers", "chunked"},
            ),
            "train": config.train.identity(),
            "seed": run.seed,
        }
        held = run.stage("student", make, uses)
        run.record["weights"] = fingerprints(teachers)
        student.load_state_dict(held["weights"])
        return student, dict(held["figures"])

    def with_learned_levels(
        self,
        config: Config,
        run: Run,
        student: nn.Module,
        counts: Mapping[str, int],
        figures: dict[str, float],
    ) -> Student:
        """DQ."""
        teacher = FrozenTeacher(run.model(config.student, config.data))
        teacher.model.load_state_dict(student.state_dict())
        start, weights = config.levels.start, dict(student.named_parameters())
        quantise.attach(student, {n: LearnedLevels(weights[n], c, config.bucket, start) for n, c in counts.items()})
        objectives = [objective_from_spec(o) for o in config.levels.objectives]
        module = LearningLevels(student, teacher, objectives, seed=run.seed, task=run.data(config.data).task)
        seconds = self.fitted("levels", module, config.levels.train, config, run)
        return packed_student(run, config, student, {**figures, "levels_seconds": seconds})

    def counts(self, config: Config, run: Run, student: nn.Module) -> dict[str, int]:
        """Levels of each quantised tensor."""
        names = self.chosen(config, student)
        if config.allocate is None:
            return dict.fromkeys(names, 2**config.bits)
        loader = run.loader(config.data, "train", config.train.batch_size, train=True)
        batches = list(islice(loader, config.allocate.batches))
        norms = gradient_norms(student, run.data(config.data).task, batches, names, run.device)
        counts = dict(zip(names, (max(c, 2) for c in allocate_levels(norms, 2**config.bits))))
        run.record["levels"] = counts
        return counts

    def fitted(self, name: str, module: Distillation, spec: TrainSpec, config: Config, run: Run) -> float:
        """Fit a module on the recipe's data; the seconds it took."""
        loader = run.loader(config.data, "train", spec.batch_size, train=True)
        fitted = run.fit(
            name,
            module,
            loader,
            spec,
            evaluate=run.validating(config.data),
            splits=run.splits(config.data),
        )
        module.close()
        return fitted.seconds


def fingerprints(teachers: Mapping[str, Any]) -> dict[str, str]:
    """A hash of each teacher's weights, by its name, where they are known."""
    return {name: hashed for name, t in teachers.items() if (hashed := t.fingerprint()) is not None}


def gradient_norms(
    student: nn.Module,
    task: Task,
    batches: Sequence[Batch],
    names: Sequence[str],
    device: torch.device,
) -> list[float]:
    """The norm of each tensor's gradient of the task's supervised loss, averaged over batches."""
    network = copy.deepcopy(student).to(device)
    module = Distillation(network, None, [objective_from_spec(o) for o in task.supervised], task=task)
    module.build(batches[0]).train()
    for batch in batches:
        (module(to_device(batch, device), Progress())["loss"] / len(batches)).backward()
    module.close()
    gradients = [network.get_parameter(name).grad for name in names]
    return [0.0 if g is None else g.norm().item() for g in gradients]


# ---- the product -----------------------------------------------------------------------------------------------------


@dataclass
class QuantizedStudent(Student):
    """A student whose weights are stored as packed codes and scales; loaded, it is the plain network with these
    weights.

    Attributes:
        codes: of each quantised parameter, by its name.
    """

    kind: ClassVar[str] = "stillhouse.methods.compression.quantized_distillation:QuantizedStudent"
    codes: dict[str, PackedTensor] = field(default_factory=dict)

    def write_weights(self, folder: Path) -> None:
        super().write_weights(folder)  # with what else the task writes
        state = self.module.state_dict()
        places = {state[n].data_ptr() for n in self.codes}
        tied = {n for n, v in state.items() if v.numel() and v.data_ptr() in places}
        others = {n: v.detach().cpu() for n, v in state.items() if n not in self.codes and n not in tied}
        quantise.save(self.codes, others, self.task.weights_file(folder))

    @classmethod
    def rebuilt(cls, meta: Mapping[str, Any], spec: ModelSpec, task: Task, folder: Path) -> QuantizedStudent:
        path, module = task.weights_file(folder), task.build(spec)
        codes, others = quantise.load(path)
        weights = {name: code.unpack() for name, code in codes.items()}
        load_state(module, {**others, **weights}, path, f"model {spec.model}")
        return cls(module.eval(), spec, task, {}, codes)


evaluates(QuantizedStudent.kind)(evaluate)


def packed_student(run: Run, config: Config, network: nn.Module, figures: Mapping[str, float]) -> QuantizedStudent:
    """The product of a network with levels attached, which leaves it plain, with its quantised weights."""
    codes = quantise.detach(network)
    plain = run.student(
        network,
        config.student,
        config.data,
        {**figures, **size_figures(codes, sum(p.numel() for p in network.parameters()))},
    )
    return QuantizedStudent(plain.module, plain.model, plain.task, plain.figures, codes)


def size_figures(codes: Mapping[str, PackedTensor], parameters: int) -> dict[str, float]:
    """`bits_per_weight` of a code of fixed length and `huffman_bits` of one code for all quantised weights (means);
    `weights_mb` and `compression` with the former, two float32 numbers a bucket and four bytes a weight that is not
    quantised, `huffman_mb` with the latter."""
    weights = sum(c.count for c in codes.values())
    scales = sum(8 * len(c.alpha) for c in codes.values())
    counted = torch.zeros(max((c.levels for c in codes.values()), default=0), dtype=torch.long)
    for code in codes.values():
        counted += code.indices.bincount(minlength=len(counted))
    bits = sum(c.bits * c.count for c in codes.values()) / max(weights, 1)
    shorter = huffman_bits(counted.tolist())
    size = {m: (4 * (parameters - weights) + weights * m / 8 + scales) / 1e6 for m in (bits, shorter)}
    return {
        "bits_per_weight": bits,
        "huffman_bits": shorter,
        "weights_mb": size[bits],
        "huffman_mb": size[shorter],
        "compression": 4e-6 * parameters / size[bits],
    }

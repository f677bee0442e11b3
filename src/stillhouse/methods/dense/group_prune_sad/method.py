"""Group channel pruning: channels of a detector go by group, and what is left learns where the whole one attends.

paper: Group channel pruning and spatial attention distilling for object detection
venue: Applied Intelligence 2022
arxiv: 2306.01526
task: detection
family: structured pruning
use when: a convolutional detector must become smaller and faster without special kernels
needs: boxes, and a detector of convolutions and batch norm whose layers are written down (stillhouse:one_stage, yolov4)

Three stages after the dense training. Dynamic sparse training: a pull of constant size on batch norm's scales; after
40 % of the epochs the largest 35 % feel a hundredth of it. Pruning: layers are grouped by the size of their maps and by
what they are for; each group has its own ratio and threshold, layers whose outputs are added share a mask by majority,
and what a removed channel would still give, a constant, moves into the next layer. Recovery: the dense network teaches
the spatial attention of chosen layers, weighted by group, the scores of all places, and the boxes of those that answer.
The released code adds up the scales of two of its five groups wrongly, which lowers their thresholds; here they are
pooled as the paper says. Its pull runs on one GPU alone, and at every batch of an accumulated step; here once a step,
on all. Its losses are multiplied by batch / 64, which Adam does not notice; here they are not. The published betas
(1e6, 1e3, 1e4) are for maps of 416 x 416 images: a squared difference of unit vectors is about 1 / (H W), so smaller
images need smaller ones. `keep_parameters` scales all ratios alike until that share of the weights is left, so that
ways to prune are compared at equal size.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config.specs import Data, MethodConfig, Model, ModelSpec, Spec, TrainSpec
from stillhouse.distillation.objective import Context, Progress
from stillhouse.errors import UserError
from stillhouse.evaluation import cost
from stillhouse.functional.grids import assigned
from stillhouse.methods.dense.group_prune_sad.distilling import attention_loss, box_loss, class_loss
from stillhouse.methods.dense.group_prune_sad.pruning import (
    Masks,
    copy_kept,
    largest,
    mask_network,
    masks_of,
    norm,
    prunable,
    pulled,
    widths_of,
)
from stillhouse.methods.distillation import describe
from stillhouse.models.layer_graph import LayerGraph
from stillhouse.models.one_stage import GraphDetector
from stillhouse.runs.judging import check_groups
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch
from stillhouse.tasks.detection import TARGET, Detection
from stillhouse.training.module import TrainingModule


class Sparsity(Spec):
    """Dynamic sparse training."""

    strength: float = Field(1e-3, ge=0, description="s, the pull on each scale in a step.")
    dynamic: bool = Field(True, description="False: the same pull on all scales, to the end.")
    switch: float = Field(0.4, ge=0, le=1, description="Share of the epochs after which the largest are protected.")
    percent: float = Field(0.65, gt=0, lt=1, description="Share of the scales, the smallest, that are not protected.")
    relief: float = Field(0.99, ge=0, le=1, description="Share of the pull that the protected ones do not feel.")
    train: TrainSpec = Field(default_factory=TrainSpec, description="How it is trained, from the dense network.")


class Pruning(Spec):
    """Which channels go."""

    scope: Literal["group", "global"] = Field("group", description="global: one threshold for all layers.")
    ratios: dict[str, float] = Field(
        default_factory=lambda: {"backbone_high": 0.5, "backbone_low": 0.7, "neck": 0.7, "head": 0.7},
        description="Share of the channels that goes, by group.",
    )
    keep_parameters: float | None = Field(
        None, gt=0, lt=1, description="Scale all ratios alike until about this share of the parameters is left."
    )
    layer_keep: float = Field(0.01, ge=0, le=1, description="Share of a layer's channels that stays in any case.")
    fewest: int = Field(16, ge=1, description="Channels that stay in any case, where that share is none.")


class Recovery(Spec):
    """What the pruned network learns besides its own losses; weights of 0 leave a term out."""

    betas: dict[str, float] = Field(
        default_factory=lambda: {"backbone_high": 1e3, "backbone_low": 1e2, "neck": 1e2, "head": 1e2},
        description="Weight of the attention of each group's layers.",
    )
    layers: dict[int, float] | None = Field(
        None,
        description="Layers whose attention is copied, with their weights, in place of betas; default: the last of "
        "each group's, at each size of map.",
    )
    class_weight: float = Field(1e-3, ge=0, description="Of the scores of all places.")
    box_weight: float = Field(1e-3, ge=0, description="Of the boxes, in cells of their grid.")
    temperature: float = Field(3.0, gt=0, description="Of the scores.")
    train: TrainSpec = Field(default_factory=TrainSpec, description="How it is trained.")


class Config(MethodConfig):
    data: Data
    student: Model = Field(description="The dense detector: stillhouse:one_stage.")
    train: TrainSpec = Field(default_factory=TrainSpec, description="The dense training; shared by all seeds.")
    sparse: Sparsity = Field(default_factory=Sparsity)
    prune: Pruning = Field(default_factory=Pruning)
    recover: Recovery = Field(default_factory=Recovery)
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])


DENSE = Stage("teacher", "train the dense detector on its own losses (stored, shared)")
SPARSE = Stage("sparse", "train on with a pull on the scales (stored, shared)")
PRUNE = Stage("prune", "take out channels by group (stored, shared)")
STUDENT = Stage("student", "recover under the dense detector")


def own_losses(task: Detection, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A detector's losses on a batch."""
    return task.read(task.call(network, batch, losses=True), batch).losses


class SparseTraining(TrainingModule):
    """The detector's own losses, and the pull on the scales of the layers that can be pruned. Scales have no weight
    decay, which would be a further pull.

    Args:
        student: with trained weights.
        task: how it is called.
        options: of the pull.
    """

    def __init__(self, student: GraphDetector, task: Detection, options: Sparsity) -> None:
        super().__init__()
        self.student: GraphDetector = student
        self.task, self.options = task, options
        self._gammas = [norm(student.graph, i).weight for i in prunable(student.graph.plan)]

    def param_groups(self) -> list[dict[str, Any]]:
        scales = {id(m.weight) for m in self.student.modules() if isinstance(m, nn.BatchNorm2d)}
        trained = [p for p in self.student.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if id(p) not in scales]},
            {"params": [p for p in trained if id(p) in scales], "weight_decay": 0.0},
        ]

    def before_update(self, ctx: Context) -> None:
        """Add the pull to the scales' gradients, once a step."""
        options, late = self.options, ctx.progress.epoch > self.options.switch * ctx.progress.epochs
        protected: list[Tensor | None] = [None] * len(self._gammas)
        if options.dynamic and late:
            protected = [*largest(self._gammas, options.percent)]
        for gamma, kept in zip(self._gammas, protected):
            if gamma.grad is not None:
                gamma.grad.copy_(pulled(gamma.grad, gamma, options.strength, kept, options.relief))

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """`loss`, and the detector's own terms."""
        terms = own_losses(self.task, self.student, batch)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}


class RecoveryTraining(TrainingModule):
    """The pruned detector's own losses, the attention of chosen layers, and the heads' scores and boxes.

    Args:
        student: the compact network.
        teacher: the dense one; it is in no checkpoint and no optimiser.
        task: how they are called.
        options: weights.

    Raises:
        UserError: a layer that is none, or a group without a weight.
    """

    def __init__(self, student: GraphDetector, teacher: GraphDetector, task: Detection, options: Recovery) -> None:
        super().__init__()
        self.student: GraphDetector = student
        self.task, self.options = task, options
        self._teacher = (teacher.eval().requires_grad_(False),)
        self._chosen = attended(student.graph, options)
        self._teaches = bool(self._chosen or options.class_weight or options.box_weight)

    def build(self, batch: Batch) -> None:
        """Move the teacher to the student's device."""
        self._teacher[0].to(next(self.student.parameters()).device)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """`loss`; the detector's own terms; `attention`, weighted by group, `scores` and `boxes`, unweighted."""
        images, options, (teacher,) = batch["input"], self.options, self._teacher
        targets = [{k: t[k] for k in ("boxes", "labels")} for t in batch[TARGET]]
        places = [i for i, _ in self._chosen]
        outputs, ours = self.student.graph.values(images, places)
        grids = [self.student.as_grid(x) for x in outputs]
        terms = self.student.losses(grids, targets)
        loss = torch.stack(list(terms.values())).sum()
        if not self._teaches:
            return {"loss": loss, **terms}
        with torch.no_grad():
            raw, theirs = teacher.graph.values(images, places)
            wanted = [teacher.as_grid(x) for x in raw]
        if self._chosen:
            betas = [beta for _, beta in self._chosen]
            terms["attention"] = attention_loss([ours[i] for i in places], [theirs[i] for i in places], betas)
            loss = loss + terms["attention"]
        if options.class_weight:
            terms["scores"] = class_loss(grids, wanted, options.temperature)
            loss = loss + options.class_weight * terms["scores"]
        if options.box_weight:
            terms["boxes"] = self._boxes(grids, wanted, targets)
            loss = loss + options.box_weight * terms["boxes"]
        return {"loss": loss, **terms}

    def _boxes(self, grids: list[Tensor], wanted: list[Tensor], targets: Any) -> Tensor:
        levels, terms = self.student.levels, []
        for grid, theirs, level, match in zip(grids, wanted, levels, assigned(grids, targets, levels)):
            flat, other = grid.reshape(-1, grid.shape[-1]), theirs.reshape(-1, theirs.shape[-1])
            anchors = (level.anchors / level.stride).expand(*match.places.shape, 2)
            terms.append(box_loss(flat[match.places], other[match.places], anchors, match.weights))
        return torch.stack(terms).sum()


def attended(graph: LayerGraph, options: Recovery) -> list[tuple[int, float]]:
    """The layers whose attention is copied, with their weights: of each group the last layer at each size of map.

    Raises:
        UserError: a layer that is none, or a group without a weight.
    """
    strides: list[int] = []
    for layer in graph.plan:
        given = 1 if layer.sources[0] < 0 else strides[layer.sources[0]]
        strides.append(given * layer.stride // (2 if layer.kind == "upsample" else 1))
    last = {(layer.group, strides[i]): i for i, layer in enumerate(graph.plan) if layer.kind in ("conv", "add")}
    chosen = sorted(last.values()) if options.layers is None else list(options.layers)
    wrong = [i for i in chosen if not 0 <= i < len(graph.plan) or graph.plan[i].kind == "out"]
    if wrong:
        raise UserError(
            f"recover.layers: {wrong[0]} is no layer before the heads; there are 0 to {len(graph.plan) - 1}."
        )
    if options.layers is not None:
        return [(i, beta) for i, beta in options.layers.items() if beta]
    missing = sorted({graph.plan[i].group for i in chosen} - set(options.betas))
    if missing:
        raise UserError(
            f"recover.betas has no weight for the group '{missing[0]}'; groups are "
            f"{', '.join(dict.fromkeys(layer.group for layer in graph.plan))}."
        )
    return [(i, options.betas[graph.plan[i].group]) for i in chosen if options.betas[graph.plan[i].group]]


def compact_spec(spec: ModelSpec, widths: list[int]) -> ModelSpec:
    """The spec that builds the pruned network."""
    return spec.model_copy(update={"options": {**spec.options, "widths": widths}, "checkpoint": None})


class GroupPruning(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data, Detection)
        check_groups(bundle.task, config.evaluate)
        dense = self._network(config, run)
        masks_of(dense.graph, config.prune.ratios, by_group=config.prune.scope == "group")
        attended(dense.graph, config.recover)
        named = describe(config.student.model, dense)
        return [
            DENSE.filled(models={"dense": named}, steps=self._steps(config, config.train, run)),
            SPARSE.filled(steps=self._steps(config, config.sparse.train, run)),
            PRUNE,
            STUDENT.filled(steps=self._steps(config, config.recover.train, run)),
        ]

    @staticmethod
    def _steps(config: Config, train: TrainSpec, run: Run) -> int:
        return train.epochs * len(run.loader(config.data, "train", train.batch_size, train=True))

    @staticmethod
    def _network(config: Config, run: Run, widths: list[int] | None = None) -> GraphDetector:
        spec = config.student if widths is None else compact_spec(config.student, widths)
        network = run.model(spec, config.data, "teacher", 0)
        if not isinstance(network, GraphDetector):
            raise UserError(
                "group_prune_sad prunes networks whose layers are written down, stillhouse:one_stage or "
                f"stillhouse:yolov4, not '{config.student.model}'."
            )
        return network

    def run(self, config: Config, run: Run) -> Student:
        dense = self._network(config, run)
        trained = run.trained("teacher", dense, config.student, config.train, config.data, 0)
        dense.load_state_dict(trained["weights"])
        sparse = self._sparse(config, run, dense)
        pruned = self._pruned(config, run, sparse["weights"])
        student = self._network(config, run, pruned["widths"])
        student.load_state_dict(pruned["weights"])
        task = run.data(config.data, Detection).task
        module = RecoveryTraining(student, dense, task, config.recover)
        loader = run.loader(config.data, "train", config.recover.train.batch_size, train=True)
        evaluate, splits = run.validating(config.data), run.splits(config.data)
        fitted = run.fit(STUDENT, module, loader, config.recover.train, evaluate=evaluate, splits=splits)
        figures = {
            "ap_dense": trained["figures"].get("ap", float("nan")),
            **sparse["figures"],
            **pruned["figures"],
            "train_seconds": fitted.seconds,
        }
        return run.student(student, compact_spec(config.student, pruned["widths"]), config.data, figures)

    def _sparse(self, config: Config, run: Run, dense: GraphDetector) -> dict[str, Any]:
        """Weights after sparse training, and its test figures."""
        task, options = run.data(config.data, Detection).task, config.sparse

        def make() -> dict[str, Any]:
            student = copy.deepcopy(dense)
            with run.seeded(0):
                loader = run.loader(config.data, "train", options.train.batch_size, train=True)
                run.fit(SPARSE, SparseTraining(student, task, options), loader, options.train)
            gammas = torch.cat([norm(student.graph, i).weight.detach().abs() for i in prunable(student.graph.plan)])
            kept = gammas >= gammas.quantile(options.percent)
            figures = {
                "ap_sparse": self._ap(run, config, student),
                "scale_ratio": float(gammas[kept].mean() / gammas[~kept].mean().clamp_min(1e-12)),
            }
            return {"weights": state_on_cpu(student), "figures": figures}

        uses = {
            "data": config.data,
            "samples": run.data(config.data),
            "network": config.student,
            "train": config.train,
            "sparse": options,
        }
        return run.stage(SPARSE, make, uses)

    def _ap(self, run: Run, config: Config, network: nn.Module) -> float:
        spec, split = run.judging_data()
        device = next(network.parameters()).device
        return run.figures(network, config.data, run.loader(spec, split), device, ["detection"])["ap"]

    def _pruned(self, config: Config, run: Run, weights: dict[str, Tensor]) -> dict[str, Any]:
        """Widths and weights of the compact network, and what pruning did."""

        def make() -> dict[str, Any]:
            network = self._network(config, run)
            network.load_state_dict(weights)
            network.eval()
            whole = cost.parameters(network)
            masks = self._masks(config, run, network)
            compact = self._network(config, run, widths_of(network.graph, masks)).eval()
            masked = copy.deepcopy(network)
            mask_network(masked.graph, masks)
            copy_kept(masked.graph, masks, compact.graph)
            task = run.data(config.data, Detection).task
            example = task.example()
            probe = next(iter(run.loader(config.data, "train", 4)))["input"]
            with torch.no_grad():
                error = max(float((a - b).abs().max()) for a, b in zip(masked.grids(probe), compact.grids(probe)))
            figures = {
                "ap_pruned": self._ap(run, config, compact.to(run.device)),
                "parameters_kept": cost.parameters(compact) / whole,
                "multiply_adds_kept": cost.multiply_adds(compact.cpu(), example, task)
                / cost.multiply_adds(network, example, task),
                "compact_error": error,
            }
            return {"widths": widths_of(network.graph, masks), "weights": state_on_cpu(compact), "figures": figures}

        uses = {"weights": weights, "prune": config.prune, "network": config.student, "samples": run.data(config.data)}
        return run.stage(PRUNE, make, uses)

    def _masks(self, config: Config, run: Run, network: GraphDetector) -> Masks:
        """The masks; with `keep_parameters`, of the ratios whose common factor leaves that share, by bisection."""
        options, whole = config.prune, cost.parameters(network)

        def at(factor: float) -> Masks:
            ratios = {g: min(r * factor, 0.999) for g, r in options.ratios.items()}
            return masks_of(
                network.graph,
                ratios,
                by_group=options.scope == "group",
                layer_keep=options.layer_keep,
                fewest=options.fewest,
            )

        def left(masks: Masks) -> float:
            return cost.parameters(self._network(config, run, widths_of(network.graph, masks))) / whole

        if options.keep_parameters is None:
            return at(1.0)
        low, high = 0.0, 1.0 / max(max(options.ratios.values()), 1e-3) if options.ratios else 1.0
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if left(at(middle)) > options.keep_parameters else (low, middle)
        return at(high)

"""Dynamic Y-KD: a detector learns new classes while the old head, which reads the new features, holds what it knew;
old extractors stay for old classes, and heads are averaged.

paper: Dynamic Y-KD: A Hybrid Approach to Continual Instance Segmentation
arxiv: 2303.06015
task: detection
family: continual learning
use when: classes come one after the other, each with images labelled for it alone, and old images are gone
needs: boxes, or boxes and masks; a two-stage detector (stillhouse:faster_rcnn, stillhouse:mask_rcnn, or torchvision's)

In each step the network starts from the last one, with rows for the new classes, and learns from images in which only
these are labelled. Teacher and student share the trunk and part like a Y: the old head reads the student's current
features, and on 64 regions that it proposes the new head must give its scores, boxes and masks; what the old first
stage finds more surely is kept as well. So the head is held and the extractor is free. What that costs old classes is
paid by storing the extractor of every task: in evaluation each feeds the newest head, finds the classes of its own
task, and the union is the result; cost grows with the tasks. Heads of successive steps are averaged afterwards, old
rows with weight w for the newer: w is the user's choice between old and new classes (figures `ap50_old_at_W`).

The released code loads an old extractor into the newest network by hand and reports groups of classes by themselves;
the union here is the reading of the paper's abstract. Images of a step may show old objects, without labels: they are
background to the losses, and what is distilled works against it. A step trains on from the head as it was trained, not
from the averaged one (the paper leaves this open). Batch norm is in evaluation mode after the first task; the small
networks here have group norm instead. CamVid has no numbers of objects: the recipe of its masks takes the connected
parts of a class as objects, so cars that touch are one. Which regions are left after suppression is read by the host
in every step, as in torchvision's detectors. `feature_weight` is a loss of the released code, not of the paper.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from typing_extensions import Self

from stillhouse.config.specs import Data, MethodConfig, Model, ModelSpec, Spec, TrainSpec
from stillhouse.data.dataset import BatchKey
from stillhouse.data.loader import Loader
from stillhouse.data.subset import Subset
from stillhouse.distillation.objective import Progress
from stillhouse.errors import UserError, unknown
from stillhouse.evaluation.detection import MASKS, DetectionMeter, class_precision
from stillhouse.evaluation.judge import measured
from stillhouse.methods.dense.dynamic_ykd.heads import (
    Branches,
    State,
    averaged_heads,
    background_rows,
    branched,
    carry_over,
    with_classes,
)
from stillhouse.methods.dense.dynamic_ykd.losses import (
    Scores,
    box_loss,
    feature_loss,
    mask_loss,
    region_loss,
    score_loss,
    unbiased_cross_entropy,
)
from stillhouse.methods.distillation import describe
from stillhouse.models import load_weights
from stillhouse.models.region_detector import box_outputs, mask_outputs, propose, region_losses
from stillhouse.processes import rank_world
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.judging import check_groups, evaluate
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch
from stillhouse.tasks.base import Task
from stillhouse.tasks.detection import TARGET, Detection, torchvision_images, torchvision_targets
from stillhouse.training.module import TrainingModule


class Keeping(Spec):
    """What the new head keeps of the old one."""

    path: Literal["shared", "separate", "none"] = Field(
        "shared",
        description="What the old head reads: the student's features (Y-KD), or those of its own extractor (the usual "
        "way); none: nothing is distilled.",
    )
    scores: Scores = Field("l2", description="How class scores are compared: l2, uce (as MMA), ce, ce_ada.")
    class_weight: float | Literal["share"] = Field(
        1.0, description="Of scores and boxes; share: old classes / (all classes + 1)."
    )
    mask_weight: float | Literal["share"] = Field(1.0, description="Of masks.")
    region_weight: float = Field(1.0, ge=0, description="Of the first stage, as in the released scripts.")
    region_threshold: float = Field(0.1, description="How much surer the old first stage must be of a box.")
    feature_weight: float = Field(0.0, ge=0, description="Of the old extractor's maps; not a part of the method.")
    candidates: int = Field(128, ge=1, description="The best regions of the old first stage, of which some are drawn.")
    regions: int = Field(64, ge=1, description="How many of an image are drawn in a step.")
    unbiased: bool = Field(False, description="Count old classes as background in the class loss.")
    background_start: bool = Field(False, description="Let scores of new classes start as the background's.")


class Config(MethodConfig):
    data: Data
    student: Model = Field(description="A two-stage detector.")
    tasks: list[list[str]] = Field(min_length=1, description="The classes of each task, in the order of the tasks.")
    joint: bool = Field(False, description="The upper bound: all classes at once, with all labels.")
    train: TrainSpec = Field(default_factory=TrainSpec, description="Of the first task.")
    step: TrainSpec = Field(default_factory=TrainSpec, description="Of each further task.")
    keep: Keeping = Field(default_factory=Keeping)
    freeze: list[str] = Field(
        default_factory=list, description="Parts of the extractor that later tasks leave as they are; stored once."
    )
    averaging: float | list[float] = Field(
        0.5, description="w, the newest head's weight, the one before has 1 - w; or a weight each, the newest first."
    )
    inference: Literal["dynamic", "last", "first"] = Field(
        "dynamic", description="Each task's own extractor, or that of the last or the first task for all classes."
    )
    curve: list[float] = Field(default_factory=list, description="Further values of w to judge on the test data.")
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])


# ---- a step ----------------------------------------------------------------------------------------------------------


class LabelledFor:
    """Training images with the labels of some classes alone, as if nobody had marked the others.

    Args:
        dataset: images with `target`.
        places: class id in the data -> label, of those that are labelled.
    """

    def __init__(self, dataset: Any, places: Mapping[int, int]) -> None:
        self.dataset, self.places = dataset, dict(places)

    def __len__(self) -> int:
        return len(self.dataset)

    def labels(self) -> Any:
        return self.dataset.labels()

    def batch(self, key: BatchKey, seed: int) -> Batch:
        made = self.dataset.batch(key, seed)
        return {**made, TARGET: [self._chosen(target) for target in made[TARGET]]}

    def _chosen(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        known = torch.full((int(max([*self.places, *target["labels"].tolist()])) + 1,), -1)
        known[list(self.places)] = torch.tensor(list(self.places.values()))
        labels = known[target["labels"]]
        kept = labels >= 0
        return {k: v if k == "size" else labels[kept] if k == "labels" else v[kept] for k, v in target.items()}


def drawn(regions: Sequence[Tensor], candidates: int, number: int) -> list[Tensor]:
    """`number` of the best `candidates` regions (n, 4) of each image, at random; all where there are fewer."""
    best = [r[:candidates] for r in regions]
    return [r[torch.randperm(len(r), device=r.device)[:number]] for r in best]


class StepTraining(TrainingModule):
    """The detector's own losses, and what the old head gives on the same features.

    Args:
        student: the detector, with rows for the new classes.
        old: the detector of the last step; None: the first task.
        task: how images and targets are given.
        keep: the weights.
        freeze: parts of the extractor that stay as they are.

    Raises:
        UserError: a part to freeze that the extractor does not have.
    """

    def __init__(
        self,
        student: GeneralizedRCNN,
        old: GeneralizedRCNN | None,
        task: Detection,
        keep: Keeping,
        freeze: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.student: GeneralizedRCNN = student
        self.task, self.keep = task, keep
        self._old = (None if old is None or keep.path == "none" else old.eval().requires_grad_(False),)
        self._first = old is None
        self.old_classes = 0 if old is None else classes_of(old)
        parts = dict(student.backbone.named_modules())
        for name in freeze if old is not None else ():
            if name not in parts:
                raise unknown("part of the extractor for `freeze`:", name, parts)
            parts[name].requires_grad_(False)

    def build(self, batch: Batch) -> None:
        """Move the old detector to the student's device."""
        for old in self._old:
            if old is not None:
                old.to(next(self.student.parameters()).device)

    def train(self, mode: bool = True) -> Self:
        """After the first task, statistics of batch norm stay as they are: stored extractors are read with them."""
        super().train(mode)
        if not self._first:
            for module in self.student.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """`loss`; the detector's own terms; what is kept of scores, boxes, masks and regions (`kept_…`), unweighted."""
        student, keep = self.student, self.keep
        given = [{k: t[k] for k in ("boxes", "labels", "masks") if k in t} for t in batch[TARGET]]
        images, targets = student.transform(
            torchvision_images(batch["input"], self.task), torchvision_targets(student, given)
        )
        features = student.backbone(images.tensors)
        proposed = propose(student, images, features, targets)
        class_loss = partial(unbiased_cross_entropy, old=self.old_classes) if keep.unbiased else F.cross_entropy
        terms = {
            **proposed.losses,
            **region_losses(student, features, proposed.regions, images.image_sizes, targets, class_loss),
        }
        loss = torch.stack(list(terms.values())).sum()
        (old,) = self._old
        if old is None:
            return {"loss": loss, **terms}
        sizes, masks = images.image_sizes, student.roi_heads.has_mask()
        with torch.no_grad():
            own = keep.path == "separate" or keep.feature_weight > 0
            theirs = old.backbone(images.tensors) if own else features
            read = features if keep.path == "shared" else theirs
            sure = propose(old, images, read)
            regions = drawn(sure.regions, keep.candidates, keep.regions)
            scores, boxes = box_outputs(old, read, regions, sizes)
            outlines = mask_outputs(old, read, regions, sizes) if masks else None
        mine, moved = box_outputs(student, features, regions, sizes)
        kept = {"kept_scores": score_loss(mine, scores, keep.scores), "kept_boxes": box_loss(moved, boxes)}
        loss = loss + self._weight(keep.class_weight) * (kept["kept_scores"] + kept["kept_boxes"])
        if outlines is not None:
            kept["kept_masks"] = mask_loss(mask_outputs(student, features, regions, sizes), outlines)
            loss = loss + self._weight(keep.mask_weight) * kept["kept_masks"]
        if keep.region_weight:
            kept["kept_regions"] = region_loss(
                proposed.objectness, proposed.deltas, sure.objectness, sure.deltas, keep.region_threshold
            )
            loss = loss + keep.region_weight * kept["kept_regions"]
        if keep.feature_weight:
            pairs = zip(features.values(), theirs.values())
            kept["kept_features"] = torch.stack([feature_loss(a, b) for a, b in pairs]).sum()
            loss = loss + keep.feature_weight * kept["kept_features"]
        return {"loss": loss, **terms, **kept}

    def _weight(self, weight: float | str) -> float:
        return self.old_classes / (classes_of(self.student) + 1) if isinstance(weight, str) else weight


def classes_of(network: GeneralizedRCNN) -> int:
    """Classes of a detector, without the background."""
    return int(network.roi_heads.box_predictor.cls_score.out_features) - 1


# ---- the procedure ---------------------------------------------------------------------------------------------------

TASK = Stage("task", "train each task, the later ones under the head of the one before (stored, shared)")
CURVE = Stage("curve", "judge averaged heads (stored, shared)")


class DynamicYKD(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data, Detection)
        check_groups(bundle.task, config.evaluate)
        tasks = self._tasks(config, run)
        network = self._network(config, run, 0, len(bundle.task.classes))
        StepTraining(network, copy.deepcopy(network), bundle.task, config.keep, config.freeze)
        self._weights(config, len(tasks))
        steps = sum(self._train(config, t).epochs * len(self._loader(config, run, tasks, t)) for t in range(len(tasks)))
        named = {"student": describe(config.student.model, network)}
        stages = [TASK.filled(models=named, steps=steps)]
        return [*stages, CURVE] if config.curve and len(tasks) > 1 else stages

    def run(self, config: Config, run: Run) -> ContinualStudent:
        tasks = self._tasks(config, run)
        states: list[State] = []
        for t in range(len(tasks)):
            states.append(self._trained(config, run, tasks, t, states[-1] if states else None))
        figures: dict[str, float] = {}
        if len(tasks) > 1:
            before = self._branches(config, run, tasks[:1], [states[0]], [1.0])
            figures |= {f"{k}_before": v for k, v in self._judged(config, run, before, {"old": tasks[0]}).items()}
            figures["feature_drift"] = self._drift(config, run, states)
        if config.curve and len(tasks) > 1:
            figures |= self._curve(config, run, tasks, states)
        weights = self._weights(config, len(tasks))
        module = self._branches(config, run, tasks, states, weights)
        old, new = self._old_and_new(config, run)
        groups = {"old": old, "new": new, "all": [*old, *new]}
        figures |= self._judged(config, run, module, groups)
        shape = BranchShape(
            classes=self._found(config, tasks),
            order=[c for some in tasks for c in some],
            shared=config.freeze if config.inference == "dynamic" else [],
        )
        task = run.data(config.data).task
        return ContinualStudent(module, config.student, task, figures, shape=shape)

    # ---- the tasks ---------------------------------------------------------------------------------------------------

    def _tasks(self, config: Config, run: Run) -> list[list[int]]:
        """The class ids of each task; one task of all in joint training.

        Raises:
            UserError: a name that is no class, one that comes twice, or one that never comes.
        """
        names = run.data(config.data).task.classes
        listed = [name for some in config.tasks for name in some]
        for name in listed:
            if name not in names:
                raise unknown("class for `tasks`:", name, names)
        if len(set(listed)) < len(listed) or set(listed) != set(names) or not all(config.tasks):
            raise UserError(
                f"tasks: each class of the data ({', '.join(names)}) must come in one task, and each task have one; "
                f"given: {config.tasks}. Leave a class out by data.options."
            )
        ids = [[names.index(name) for name in some] for some in config.tasks]
        return [[c for some in ids for c in some]] if config.joint else ids

    def _old_and_new(self, config: Config, run: Run) -> tuple[list[int], list[int]]:
        names = run.data(config.data).task.classes
        ids = [[names.index(name) for name in some] for some in config.tasks]
        return [c for some in ids[:-1] for c in some], ids[-1]

    @staticmethod
    def _train(config: Config, t: int) -> TrainSpec:
        return config.step if t else config.train

    def _loader(self, config: Config, run: Run, tasks: list[list[int]], t: int) -> Loader:
        """The images that show a class of the task, with the labels of these alone."""
        bundle, wanted = run.data(config.data), tasks[t]
        if bundle.contents is None:
            raise UserError(f"dynamic_ykd: '{config.data.name}' does not say which classes an image shows.")
        places = bundle.splits["train"]
        rows = [i for i, place in enumerate(places) if np.isin(bundle.contents(int(place)), wanted).any()]
        if not rows:
            names = ", ".join(bundle.task.classes[c] for c in wanted)
            raise UserError(f"tasks: no training image of '{config.data.name}' shows {names}.")
        before = sum(len(some) for some in tasks[:t])
        labels = {c: before + i for i, c in enumerate(wanted)}
        data = LabelledFor(Subset(bundle.dataset("train", train=True), rows), labels)
        rank, world = rank_world()
        size = min(self._train(config, t).batch_size, len(rows))
        return Loader(
            data,
            size,
            seed=run.seed,
            shuffle=True,
            drop_last=True,
            workers=config.data.workers,
            rank=rank,
            world=world,
        )

    @staticmethod
    def _network(config: Config, run: Run, t: int, classes: int) -> GeneralizedRCNN:
        """A network of as many classes, its new rows drawn for task t."""
        network = run.model(config.student, config.data, f"task.{t}")
        if not isinstance(network, GeneralizedRCNN) or not hasattr(network.roi_heads, "box_predictor"):
            raise UserError(
                "dynamic_ykd needs a detector with regions, such as stillhouse:faster_rcnn, stillhouse:mask_rcnn or "
                f"torchvision:maskrcnn_resnet50_fpn, not '{config.student.model}'."
            )
        return with_classes(network, classes)

    def _trained(
        self, config: Config, run: Run, tasks: list[list[int]], t: int, before: State | None
    ) -> dict[str, Tensor]:
        """The weights after task t."""
        known = sum(len(some) for some in tasks[:t])
        network = self._network(config, run, t, known + len(tasks[t]))
        old = None
        if before is not None:
            carry_over(network, before)
            if config.keep.background_start:
                background_rows(network, known)
            old = self._network(config, run, 0, known)
            old.load_state_dict(before)
        task, train = run.data(config.data).task, self._train(config, t)

        def make() -> dict[str, Tensor]:
            module = StepTraining(network, old, task, config.keep, config.freeze)
            run.fit(f"{TASK}.{t}", module, self._loader(config, run, tasks, t), train)
            return state_on_cpu(network)

        uses: dict[str, Any] = {
            "samples": run.data(config.data),
            "data": config.data,
            "network": config.student,
            "classes": tasks[: t + 1],
            "train": train,
            "seed": run.seed,
        }
        if before is not None:
            uses |= {"before": dict(before), "keep": config.keep, "freeze": config.freeze}
        made: dict[str, Tensor] = run.stage(f"{TASK}.{t}", make, uses)
        return made

    # ---- the product -------------------------------------------------------------------------------------------------

    @staticmethod
    def _weights(config: Config, tasks: int) -> list[float]:
        """Of the newest heads in the average, the newest first."""
        given = config.averaging
        weights = given if isinstance(given, list) else [given, 1 - given]
        if not isinstance(given, list) and not 0 <= given <= 1:
            raise UserError(f"averaging: w must be from 0 to 1; given: {given}.")
        if tasks == 1:
            return [1.0]
        if isinstance(given, list) and (len(given) > tasks or abs(sum(given) - 1) > 1e-6 or min(given) < 0):
            raise UserError(
                f"averaging: give at most {tasks} weights of at least 0, which sum to 1; given: {list(given)}."
            )
        return list(weights)

    @staticmethod
    def _found(config: Config, tasks: list[list[int]]) -> list[list[int]]:
        """Of each branch, the places in the head that it finds."""
        places, found = 1, []
        for some in tasks:
            found.append(list(range(places, places + len(some))))
            places += len(some)
        return found if config.inference == "dynamic" else [[p for some in found for p in some]]

    def _branches(
        self,
        config: Config,
        run: Run,
        tasks: list[list[int]],
        states: Sequence[State],
        weights: Sequence[float],
    ) -> Branches:
        """The averaged head on the extractors that evaluation uses."""
        order = [c for some in tasks for c in some]
        network = self._network(config, run, 0, len(order))
        newest = list(reversed(states))[: len(weights)]
        network.load_state_dict(averaged_heads(newest, weights))
        chosen = {"dynamic": states, "last": states[-1:], "first": states[:1]}[config.inference]
        extractors = [
            {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")} for state in chosen
        ]
        shared = config.freeze if config.inference == "dynamic" else []
        return branched(network, extractors, self._found(config, tasks), order, shared).to(run.device)

    def _judged(
        self, config: Config, run: Run, module: nn.Module, groups: Mapping[str, Sequence[int]]
    ) -> dict[str, float]:
        """AP50 and AP of groups of classes on test data, of boxes, and of masks where there are some."""
        loader, task = run.loader(*run.judging_data()), run.data(config.data).task
        meter = measured(task, module, loader, run.device, task.meter(task.groups))
        assert isinstance(meter, DetectionMeter)
        out = {}
        for prefix in ("", "mask_") if MASKS in task.groups else ("",):
            table = class_precision(meter.evaluated(masks=bool(prefix)))
            for name, classes in groups.items():
                occurring = [c for c in classes if not np.isnan(table[0, c])]
                if occurring:
                    out[f"{prefix}ap50_{name}"] = float(table[0, occurring].mean())
                    out[f"{prefix}ap_{name}"] = float(table[:, occurring].mean())
        return out

    def _curve(self, config: Config, run: Run, tasks: list[list[int]], states: Sequence[State]) -> dict[str, float]:
        """AP50 of old and new classes by w, and the rank correlation of each with w."""
        old, new = self._old_and_new(config, run)

        def make() -> dict[str, float]:
            found: dict[str, float] = {}
            for w in config.curve:
                module = self._branches(config, run, tasks, states, [w, 1 - w])
                for name, value in self._judged(config, run, module, {"old": old, "new": new}).items():
                    found[f"{name}_at_{w:g}"] = value
            return found

        uses = {
            "states": [dict(state) for state in states],
            "data": config.data,
            "samples": run.data(config.data),
            "network": config.student,
            "curve": config.curve,
            "inference": config.inference,
        }
        found: dict[str, float] = run.stage(CURVE, make, uses)
        kind = "mask_ap50" if f"mask_ap50_old_at_{config.curve[0]:g}" in found else "ap50"
        for name in ("old", "new"):
            values = [found.get(f"{kind}_{name}_at_{w:g}", float("nan")) for w in config.curve]
            if len(set(values)) > 1:
                found[f"curve_{name}"] = float(spearmanr(config.curve, values).statistic)
        return found

    @torch.no_grad()
    def _drift(self, config: Config, run: Run, states: Sequence[State]) -> float:
        """How far the last extractor's maps of test images lie from the first one's, as a share of these."""
        images = next(iter(run.loader(*run.judging_data())))["input"]
        task, maps = run.data(config.data).task, []
        for state in (states[0], states[-1]):
            network = self._network(config, run, 0, classes_in(state)).eval()
            network.load_state_dict(state)
            seen, _ = network.transform(torchvision_images(images, task))
            maps.append(list(network.backbone(seen.tensors).values()))
        shares = [(b - a).norm() / a.norm().clamp_min(1e-12) for a, b in zip(*maps)]
        return float(torch.stack(shares).mean())


def classes_in(state: State) -> int:
    """Classes of a detector's weights, without the background."""
    return len(state["roi_heads.box_predictor.cls_score.bias"]) - 1


class BranchShape(Spec):
    """How a product's branches are built again."""

    classes: list[list[int]] = Field(default_factory=lambda: [[1]])
    order: list[int] = Field(default_factory=lambda: [0])
    shared: list[str] = Field(default_factory=list)


@dataclass
class ContinualStudent(Student):
    """A detector with one head and an extractor for each task.

    Attributes:
        shape: which classes a branch finds, their order, and what the extractors share.
    """

    kind: ClassVar[str] = "stillhouse.methods.dense.dynamic_ykd:ContinualStudent"
    shape: BranchShape = field(default_factory=BranchShape)

    def extras(self) -> dict[str, Any]:
        return {"branches": self.shape.model_dump(mode="json")}

    @classmethod
    def rebuilt(cls, meta: Mapping[str, Any], spec: ModelSpec, task: Task, folder: Path) -> ContinualStudent:
        shape = BranchShape.model_validate(meta["branches"])
        options = {k: v for k, v in spec.options.items() if k != "backbone_weights"}  # the product has its own
        network = task.build(spec.model_copy(update={"options": options}))
        assert isinstance(network, GeneralizedRCNN)
        module = branched(network, [{}] * len(shape.classes), shape.classes, shape.order, shape.shared)
        load_weights(module, task.weights_file(folder), owner=f"model {spec.model}")
        return cls(module.eval(), spec, task, shape=shape)


evaluates(ContinualStudent.kind)(evaluate)

"""FerKD: a student learns from stored labels of many regions of each image, trusted by how sure the teacher was of each
region.

paper: FerKD: Surgical Label Adaptation for Efficient Distillation
venue: ICCV 2023
arxiv: 2312.17473
task: classification
family: logits, stored labels
use when: the teacher is large and many students or epochs follow: it looks at the data once
needs: teacher logits (once), labels

Built on FKD (Shen and Xing, ECCV 2022, arXiv 2112.01528), which is `adapt: null, mix.how: none`. In a stage the teacher
reads, once, K random regions of every image and keeps boxes, flips and compressed probabilities; the student replays
them, `crops` regions an image, so its training has no teacher. One load of all images counts as `crops` epochs; the
last `crops` epochs take one region an image. The rest follows the released FKD code. FerKD's labels have no
released code: confidence is the teacher's largest probability; regions below `adapt.low` are dropped, up to
`adapt.middle` they get the smoothed label of the image, above `adapt.high` they are too easy and dropped. Its constants
(0.15, 0.30, 1.0, smoothing 0.1) are recommendations, not the paper's. An image that would lose all regions keeps the
most confident one. SelfMix is CutMix between regions of one image, which replaces mixing across images (`mix.how:
batch`, as FKD may); its share is drawn from Beta(1, 1) (a recommendation). Simplification: teacher and student see
regions at one size, that of the data (`data.image_size`), cut from the images as they are evaluated; `data.augment`
does not touch the student. `labels: live` runs the teacher at every step instead, which is the cost that the store
saves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.config.specs import Data, MethodConfig, Model, Spec, Teacher, TrainSpec
from stillhouse.data import BatchKey, Loader
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Objective, Progress
from stillhouse.errors import UserError
from stillhouse.files import cache_folder
from stillhouse.functional.divergences import soft_cross_entropy
from stillhouse.methods.classification.ferkd.batches import Mixing, MixSpec, RegionReplay, Thresholds
from stillhouse.methods.classification.ferkd.labels import HARDENED, KEPT, LabelType, adapt, compress
from stillhouse.methods.classification.ferkd.regions import RegionStore, draw_regions, replay
from stillhouse.processes import rank_world
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, Signals


class RegionsConfig(Spec):
    """What is stored of every image."""

    crops: int = Field(500, ge=1, description="K, regions an image.")
    scale: tuple[float, float] = Field(
        (0.08, 0.936),
        description="Range of a region's share of the image; the published one is that of EfficientNet-L2-475.",
    )
    ratio: tuple[float, float] = Field((0.75, 4 / 3), description="Range of width / height.")
    label_type: LabelType = "marginal_smoothing"
    top: int = Field(5, ge=1, description="Probabilities kept of a region, for the marginal types.")
    temperature: float = Field(1.0, gt=0, description="Of the teacher.")
    precision: Literal["float32", "float16"] = "float32"
    seed: int = Field(0, description="Of the regions: one store for all seeds of a run.")
    path: str | None = Field(
        None, description="A finished store to use instead; it must be of the same data, classes and input size."
    )


class AdaptConfig(Spec):
    """Which stored labels are trusted, by the teacher's largest probability."""

    low: float = Field(0.15, ge=0, description="Below: dropped.")
    middle: float = Field(0.30, ge=0, description="From low to below this: the smoothed label of the image.")
    high: float = Field(1.0, ge=0, description="Above: too easy, dropped.")
    smoothing: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _rising(self) -> AdaptConfig:
        if self.low > self.middle:
            raise ValueError(f"low ({self.low}) must not exceed middle ({self.middle})")
        return self


class MixConfig(Spec):
    """How regions of a batch are mixed."""

    how: Mixing = Field(
        "selfmix", description="none; selfmix: CutMix within an image; batch: mixup or CutMix across images."
    )
    mixup: float = Field(0.8, ge=0, description="batch: mixup's alpha; 0 is off.")
    cutmix: float = Field(1.0, ge=0, description="CutMix's alpha.")
    probability: float = Field(1.0, ge=0, le=1, description="That a batch is mixed.")
    switch: float = Field(0.5, ge=0, le=1, description="batch: that a mixed batch takes mixup.")


class Config(MethodConfig):
    data: Data
    teacher: Teacher
    student: Model
    regions: RegionsConfig = Field(default_factory=RegionsConfig)
    adapt: AdaptConfig | None = Field(
        default_factory=AdaptConfig, description="null: every stored label is trusted, which is FKD."
    )
    crops: int = Field(4, ge=1, description="Regions taken from each image that is loaded.")
    mix: MixConfig = Field(default_factory=MixConfig)
    labels: Literal["stored", "live"] = Field(
        "stored", description="live: the teacher answers at every step, on the same regions."
    )
    temperature: float = Field(1.0, gt=0, description="Of the student.")
    train: TrainSpec = Field(default_factory=TrainSpec)
    evaluate: list[str] = Field(default_factory=lambda: ["accuracy", "calibration", "cost"])

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.crops > self.regions.crops:
            raise ValueError(
                f"crops takes {self.crops} regions of an image, but regions.crops stores only {self.regions.crops}"
            )
        if self.train.batch_size % self.crops:
            raise ValueError(f"train.batch_size ({self.train.batch_size}) must be a multiple of crops ({self.crops})")
        if self.labels == "live" and self.adapt is not None:
            raise ValueError("labels: live takes the teacher's own answers, so set adapt: null")
        if self.mix.how != "none" and self.mix.cutmix == 0 and (self.mix.how == "selfmix" or self.mix.mixup == 0):
            raise ValueError(f"mix.how is {self.mix.how}, but its alphas are 0; set mix.how: none")
        return self


class StoredLabels(Objective):
    """Cross-entropy with the labels of the store, `stored` (B, C) of the batch; or, live, with the teacher's answers.

    Args:
        temperature: of the student.
        teacher_temperature: of a live teacher.
        live: learn from the teacher itself.
    """

    name = "ferkd"

    def __init__(self, temperature: float = 1.0, teacher_temperature: float = 1.0, live: bool = False) -> None:
        super().__init__()
        self.temperature, self.teacher_temperature, self.live = temperature, teacher_temperature, live
        self.needs = frozenset({"student.logits", "teacher.logits"} if live else {"student.logits"})

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        logits = student.require("logits")
        targets = teacher.log_probs(self.teacher_temperature).exp() if self.live else batch["stored"]
        return {"loss": soft_cross_entropy(logits / self.temperature, targets)}


class FerKD(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data)
        images = len(bundle.dataset("train", train=False))
        steps = config.train.epochs * (images // config.train.batch_size)
        return [
            Stage("teacher", "train the teacher with cross-entropy (stored, shared)"),
            Stage(
                "regions",
                f"store the teacher's labels of {config.regions.crops} regions of each of {images} images (stored, "
                "shared)",
            ),
            Stage("bands", "sort the stored regions by the teacher's confidence"),
            Stage("student", f"train the student on {config.crops} regions an image", steps=steps),
        ]

    def run(self, config: Config, run: Run) -> Student:
        bundle = run.data(config.data)
        size, count = config.train.batch_size, len(bundle.dataset("train", train=False))
        if size > count:
            raise UserError(f"train.batch_size is {size}, but there are only {count} training images.")
        teacher = run.teacher("teacher", config.teacher, config.data)
        if isinstance(teacher, nn.Module):
            raise UserError(
                "ferkd: the teacher must be a trained network or an ensemble: it answers once, before the student "
                "trains."
            )
        store = region_store(config, run, teacher)
        thresholds = Thresholds() if config.adapt is None else Thresholds(**config.adapt.model_dump())
        facts = run.stage(
            "bands",
            lambda: count_bands(store, thresholds, bundle.dataset("train", train=False).labels(), bundle.classes),
            {"store": store.facts, "thresholds": vars(thresholds)},
        )
        if facts["lost"]:
            run.live.say(
                f"No region survives of any image of {', '.join(facts['lost'])}; they train on smoothed labels."
            )

        dataset = RegionReplay(
            bundle.dataset("train", train=False),
            store,
            size,
            config.train.epochs,
            config.crops,
            thresholds,
            MixSpec(**config.mix.model_dump()),
        )
        rank, world = rank_world()
        if size % (config.crops * world):
            raise UserError(
                f"train.batch_size ({size}) must be a multiple of crops x processes ({config.crops} x {world})."
            )
        loader = Loader(
            dataset, size, seed=run.seed, drop_last=True, workers=config.data.workers, rank=rank, world=world
        )
        student = run.model(config.student, config.data)
        live = config.labels == "live"
        objective = StoredLabels(config.temperature, config.regions.temperature, live)
        module = Distillation(
            student, teacher if live else None, [objective], seed=run.seed, embedding=config.student.embedding
        )
        fitted = run.fit(
            "student",
            module,
            loader,
            config.train,
            evaluate=run.validating(config.data),
            splits=run.splits(config.data),
        )
        module.close()
        run.record["store"] = {"folder": str(store.folder), **store.facts}
        figures = {
            "train_seconds": fitted.seconds,
            "samples_per_second": config.train.epochs * len(loader) * size / max(fitted.seconds, 1e-9),
            "label_bytes": float(store.label_bytes),
            "label_compression": 4.0 * len(store) * store.crops * bundle.num_classes / store.label_bytes,
            **facts["figures"],
        }
        return run.student(student, config.student, config.data, figures)


def region_store(config: Config, run: Run, teacher: Any) -> RegionStore:
    """The store that the recipe names, or the one that a stage makes (one that was interrupted is resumed, image by
    image)."""
    bundle, regions = run.data(config.data), config.regions
    must = {
        "data": bundle.fingerprint,
        "num_classes": bundle.num_classes,
        "input_shape": list(bundle.input_shape),
        "temperature": regions.temperature,
    }
    if regions.path is not None:
        return RegionStore.open(Path(regions.path).expanduser(), must)
    facts = {**must, **regions.model_dump(mode="json", exclude={"path"}), "teacher": teacher.fingerprint()}

    def make() -> dict[str, str]:
        dataset = bundle.dataset("train", train=False)
        store = RegionStore.create(run.folder, len(dataset), facts)
        teacher.to(run.device)
        rows_left = store.missing()
        at_once = max(1, 1024 // regions.crops)
        for begin in range(0, len(rows_left), at_once):
            rows = rows_left[begin : begin + at_once]
            images = dataset.batch(BatchKey(0, rows, 0, len(rows)), 0)["input"].to(run.device)
            coords, flips = draw_regions(
                rows, regions.crops, tuple(images.shape[-2:]), regions.scale, regions.ratio, regions.seed
            )
            crops = replay(images, coords.to(run.device), flips.to(run.device), tuple(images.shape[-2:])).flatten(0, 1)
            probs = torch.cat(
                [teacher({"input": part}).log_probs(regions.temperature).exp() for part in crops.split(512)]
            )
            values, classes = compress(probs.unflatten(0, (len(rows), regions.crops)), regions.label_type, regions.top)
            store.write(rows, coords, flips, values.cpu(), classes.cpu())
        return {"folder": run.folder.name.removesuffix(".partial")}

    stored = run.stage("regions", make, facts)
    return RegionStore.open(cache_folder() / "stages" / stored["folder"], must)


def count_bands(store: RegionStore, thresholds: Thresholds, labels: Tensor, classes: list[str]) -> dict[str, Any]:
    """One pass over the store's labels, without images or a teacher.

    Returns:
        `figures`: the share of regions that are kept with the teacher's label, with the image's, and dropped; and the
            share whose largest entry is the image's class, before and among those left after adapting.
        `lost`: classes all of whose images lose every region.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    survivors = torch.zeros(len(classes), dtype=torch.int64)
    for rows in torch.arange(len(store)).split(4096):
        ids, every = rows.numpy(), torch.arange(store.crops).expand(len(rows), -1).numpy()
        confidence, target = store.confidence(ids), labels[rows][:, None].expand(-1, store.crops)
        band = thresholds.of(confidence)
        soft = store.labels(ids, every)
        left = (band == KEPT) | (band == HARDENED)
        right = soft.argmax(-1) == target
        adapted = adapt(soft, target, band, thresholds.smoothing).argmax(-1) == target
        sums += torch.stack(
            [(band == KEPT).sum(), (band == HARDENED).sum(), left.sum(), right.sum(), (adapted & left).sum()]
        )
        raw = left & (confidence >= thresholds.low) & (confidence <= thresholds.high)
        survivors.index_add_(0, labels[rows], raw.sum(1))
    total = len(store) * store.crops
    kept, hardened, left_all, right_all, adapted_all = sums.tolist()
    figures = {
        "regions_kept": kept / total,
        "regions_hardened": hardened / total,
        "regions_dropped": 1 - left_all / total,
        "region_label_accuracy": right_all / total,
        "adapted_label_accuracy": adapted_all / max(left_all, 1),
    }
    present = set(labels.unique().tolist())
    return {"figures": figures, "lost": [name for c, name in enumerate(classes) if c in present and not survivors[c]]}

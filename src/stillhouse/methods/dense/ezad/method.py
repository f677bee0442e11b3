"""EZAD: an image-text teacher is first adapted to crops of detection, then chooses by itself the regions of which a
detector learns its features.

paper: Efficient Feature Distillation for Zero-shot Annotation Object Detection
venue: WACV 2024
arxiv: 2303.12145
task: detection
family: vision-language features
use when: things of classes without boxes are in the training images, their names are known, and training must be short
needs: boxes of some classes, a CLIP with layer norms (hf:config:clip, stillhouse:clip, stillhouse:hybrid_clip) and a
    two-stage detector (stillhouse:text_rcnn)

Five stages, each stored. The CLIP; its layer norms alone are tuned on crops of the known boxes, against the class
vectors of the known names, which are made again in every step (adapt). The adapted CLIP looks at crops on a dense
grid of anchors and keeps those whose probabilities over all names, the new ones included, have the lowest entropy
(search). Those that lie on a known box go; of the rest, cropped with some margin, the features of those that it does
not call a known class are stored, with how sure it is, and those of the known boxes (features). The detector learns
its labels, and the stored features through the same head: d times the mean absolute difference of unit vectors, where
the weights of an image's rows have the mean 1. Boxes are corrected knowing the class vector, of zeros for background;
in evaluation that of the best class. The class vectors are those of the adapted CLIP. The published loss of the
tuning takes each class against the rest (`sigmoid`); with few classes it was seen to push the cosines of all known
ones below those of the new ones, until the CLIP called every crop new, so the recipe takes `softmax`. `extra_names`
are further names that the CLIP may call a crop; the published runs on COCO use all 80, 15 of which are neither known
nor new. An image without rows has no term, where the released code makes up a row of zeros. Instance masks, the
seesaw loss and the options that the paper does not use are left out. The captions of its recipe are made from class
names: its CLIP knows class names, not language.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, MethodConfig, Model, ModelSpec, Spec, Teacher, TrainSpec
from stillhouse.data.boxes import REGIONS, with_regions
from stillhouse.data.dataset import BatchKey
from stillhouse.data.loader import Loader
from stillhouse.distillation.objective import Progress
from stillhouse.distillation.own_input import OwnInput
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.evaluation.detection import region_shares
from stillhouse.functional.boxes import pairwise_iou, unsuppressed
from stillhouse.functional.counting import IGNORED
from stillhouse.functional.regions import weighted_mean
from stillhouse.methods.dense.ezad.regions import certainty, feature_loss, grid, row_weights, square_crop
from stillhouse.methods.distillation import describe
from stillhouse.models.image_text import image_features, scale, text_features
from stillhouse.models.text_rcnn import TextRCNN, best_proposals
from stillhouse.models.tokenizer import texts_padded
from stillhouse.processes import rank_world
from stillhouse.runs.judging import check_groups
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch
from stillhouse.store.regions import RegionStore, write_regions
from stillhouse.tasks.detection import TARGET, Detection
from stillhouse.tasks.image_text import ImageText
from stillhouse.training.module import TrainingModule

# ---- the recipe ------------------------------------------------------------------------------------------------------


class Adapt(Spec):
    """Tuning of the CLIP's layer norms on crops of known boxes."""

    loss: Literal["sigmoid", "softmax"] = Field(
        "sigmoid", description="One class against the rest each, or all at once."
    )
    template: str = Field("a photo of a {}", description="The text of a class.")
    enlarge: float = Field(1.2, ge=1, description="A crop's side to its box's, here and for features.")
    train: TrainSpec = Field(default_factory=TrainSpec)


class Search(Spec):
    """How the CLIP looks for regions."""

    stride: float = Field(32.0, gt=0, description="Pixels from one anchor to the next.")
    sides: list[float] = Field(default_factory=lambda: [32.0, 64.0, 128.0, 256.0, 512.0], description="Pixels a side.")
    ratios: list[float] = Field(default_factory=lambda: [0.5, 1.0, 2.0], description="Height over width.")
    resize: tuple[int, int] | None = Field(
        None, description="Pixels of the shorter side, and of the longer at most, in which the grid is laid."
    )
    overlap: float = Field(0.7, gt=0, le=1)
    keep: int = Field(1000, ge=1)
    extra_names: list[str] = Field(default_factory=list, description="Further names that a crop may be called.")


class Features(Spec):
    """Which of the found regions are learned from."""

    base_overlap: float = Field(0.3, ge=0, le=1, description="Regions that overlap a known box by this much go.")
    most: int = Field(200, ge=1, description="Regions of an image at most.")
    weighted: bool = Field(True, description="By how sure the CLIP is; false: all alike.")


class Config(MethodConfig):
    data: Data = Field(description="Images with boxes, some classes of which are new (data.options.new).")
    teacher: Teacher = Field(description="A CLIP, with data of its own.")
    student: Model = Field(
        description="The detector, stillhouse:text_rcnn; its classes and head are set by the method."
    )
    train: TrainSpec = Field(default_factory=TrainSpec)
    adapt: Adapt | None = Field(default_factory=Adapt, description="null: the CLIP stays as it is.")
    regions: Literal["clip", "rpn", "none"] = Field(
        "clip", description="rpn: proposals of a detector trained on known boxes; none: no features are learned."
    )
    search: Search = Field(default_factory=Search)
    features: Features = Field(default_factory=Features)
    factor: float = Field(1.0, ge=0, description="Weight of the loss of features.")
    conditioned: bool = Field(True, description="Boxes are corrected knowing the class vector.")
    probe: int = Field(48, ge=0, description="Test images on which teacher and regions are measured; 0: none.")
    evaluate: list[str] = Field(default_factory=lambda: ["detection", "cost"])


TEACHER = Stage("teacher", "train the CLIP (stored, shared)")
ADAPT = Stage("adapt", "tune the CLIP's layer norms on crops of known boxes (stored, shared)")
SEARCH = Stage("search", "let the CLIP look for regions (stored, shared)")
FEATURES = Stage("features", "store features of regions and of known boxes (shared)")
STUDENT = Stage("student", "train the detector on labels and stored features")


# ---- adapting the teacher --------------------------------------------------------------------------------------------


class BoxCrops:
    """Images with boxes as the square crops of their boxes, labelled: a batch of B images has as many crops as they
    have boxes.

    Args:
        dataset: images with boxes.
        task: the CLIP's, which prepares crops.
        enlarge: of a crop.
    """

    def __init__(self, dataset: Any, task: ImageText, enlarge: float) -> None:
        self._dataset, self._task, self._enlarge = dataset, task, enlarge

    def __len__(self) -> int:
        return len(self._dataset)

    def labels(self) -> Tensor:
        return torch.zeros(len(self), dtype=torch.int64)

    def batch(self, key: BatchKey, seed: int) -> Batch:
        """`input` (n, C, H, W) and `label` (n,) of the crops, `index` (B,) of the images."""
        own = key.indices[key.start : key.stop]
        crops, labels = [], []
        for index in own.tolist():
            sample = self._dataset.raw(index)
            for box, label in zip(boxes_of(sample), sample["labels"][~sample["crowd"]]):
                crops.append(square_crop(image_of(sample), box, self._enlarge))
                labels.append(label)
        if not crops:  # one that counts for nothing
            crops, labels = [torch.zeros(len(self._task.mean), 1, 1, dtype=torch.uint8)], [torch.tensor(IGNORED)]
        label = torch.stack(labels)
        return {"input": self._task.prepared(crops), "label": label, "index": torch.from_numpy(own)}


def boxes_of(sample: Any) -> Tensor:
    """(n, 4) boxes of a sample as its source has it, without crowds."""
    found: Tensor = sample["boxes"].as_subclass(Tensor)[~sample["crowd"]]
    return found


def image_of(sample: Any) -> Tensor:
    """uint8 (3, H, W) of a sample as its source has it."""
    found: Tensor = sample["input"].as_subclass(Tensor)
    return found


class AdaptTraining(TrainingModule):
    """A CLIP whose layer norms learn to tell crops of known classes apart; its class vectors follow.

    Args:
        student: the CLIP.
        tokens: of the texts of all known classes, (K, L) each.
        position: (all classes,) the place of a known class among them.
        loss: sigmoid or softmax.
    """

    position: Tensor

    def __init__(self, student: nn.Module, tokens: Mapping[str, Tensor], position: Tensor, loss: str) -> None:
        super().__init__()
        self.student, self._loss = student, loss
        self.register_buffer("position", position)
        self._names = list(tokens)
        for name, value in tokens.items():
            self.register_buffer(f"tokens_{name}", value)
        tune_norms(student)

    def train(self, mode: bool = True) -> AdaptTraining:
        """As `nn.Module.train`; batch normalisation and dropout stay as in evaluation."""
        super().train(mode)
        self.student.eval()
        return self

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        tokens = {name: getattr(self, f"tokens_{name}") for name in self._names}
        text = F.normalize(text_features(self.student, tokens).float(), dim=-1)
        image = F.normalize(image_features(self.student, batch["input"]).float(), dim=-1)
        logits, counted = scale(self.student) * image @ text.T, batch["label"] != IGNORED
        labels = self.position[batch["label"].clamp_min(0)]
        if self._loss == "softmax":
            loss = F.cross_entropy(logits, labels, reduction="none")
        else:
            wanted = F.one_hot(labels, len(text)).to(logits.dtype)
            loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
        return {"loss": weighted_mean(loss, counted)}


def tune_norms(network: nn.Module) -> None:
    """Let the layer norms of a network learn, and nothing else.

    Raises:
        UserError: a network without layer norms.
    """
    network.requires_grad_(False)
    norms = [m for m in network.modules() if isinstance(m, nn.LayerNorm)]
    if not norms:
        raise UserError(f"ezad: a {type(network).__name__} has no layer norm to tune; take a CLIP of transformers.")
    for norm in norms:
        norm.requires_grad_(True)


# ---- what the teacher finds ------------------------------------------------------------------------------------------


class Finder:
    """The adapted CLIP that looks at images.

    Args:
        task: its task, with class vectors.
        network: itself.
        vectors: (K + E, D) unit vectors of all classes and of further names.
        known: ids of the classes that have boxes.
        config: how it looks.
    """

    def __init__(self, task: ImageText, network: nn.Module, vectors: Tensor, known: list[int], config: Config) -> None:
        self.task, self.network, self.vectors, self.known, self.config = task, network, vectors.cpu(), known, config
        self.scale = float(scale(network))
        self.enlarge = config.adapt.enlarge if config.adapt is not None else Adapt.model_fields["enlarge"].default

    def look(self, image: Tensor, boxes: Tensor, enlarge: float) -> tuple[Tensor, Tensor]:
        """Unit embeddings (n, D) and scores (n, K + E) of boxes (n, 4) in a uint8 image (3, H, W)."""
        crops = [square_crop(image, box, enlarge) for box in boxes]
        found = self.task.embed_images(self.network, crops).cpu()
        return found, self.scale * found @ self.vectors.T

    def search(self, image: Tensor) -> dict[str, Tensor]:
        """`boxes` (n, 4) and `scores` (n,) of the regions that it is most certain of."""
        options = self.config.search
        height, width = image.shape[-2:]
        times = 1.0
        if options.resize is not None:
            short, long = options.resize
            times = min(short / min(height, width), long / max(height, width))
        sides, stride = [s / times for s in options.sides], options.stride / times
        boxes = grid(width, height, stride, sides, options.ratios)
        sure = certainty(self.look(image, boxes, 1.0)[1])
        order = sure.argsort(descending=True, stable=True)
        boxes, sure = boxes[order], sure[order]
        left = unsuppressed(boxes[None], torch.zeros(1, len(boxes), dtype=torch.int64), options.overlap)[0]
        return {"boxes": boxes[left][: options.keep], "scores": sure[left][: options.keep]}

    def features(self, image: Tensor, base: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """`boxes` (m, 4), `vectors` (m, D) and `weights` (m,) of the known boxes and of the regions (n, 4) that are
        none of them and that it does not call a known class."""
        options = self.config.features
        if len(base) and len(boxes):
            boxes = boxes[pairwise_iou(boxes, base).amax(1) < options.base_overlap]
        vectors, scores = self.look(image, torch.cat([base, boxes]), self.enlarge)
        probs, called = scores[len(base) :].softmax(-1).max(-1)
        kept = torch.nonzero(~torch.isin(called, torch.tensor(self.known)))[: options.most, 0]
        weights = torch.cat([torch.ones(len(base)), probs[kept] if options.weighted else torch.ones(len(kept))])
        return {
            "boxes": torch.cat([base, boxes[kept]]),
            "vectors": torch.cat([vectors[: len(base)], vectors[len(base) :][kept]]).half(),
            "weights": weights,
        }


# ---- training --------------------------------------------------------------------------------------------------------


class FeatureTraining(TrainingModule):
    """A detector's own losses, and stored features of regions through its own head.

    Args:
        student: with its class vectors.
        factor: weight of the loss of features.
    """

    def __init__(self, student: TextRCNN, factor: float) -> None:
        super().__init__()
        self.student: TextRCNN = student
        self.factor = factor

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """`loss`; the detector's own terms; `features`, unweighted."""
        images, student = batch["input"], self.student
        maps = student.pyramid(images)
        terms = student.losses(maps, (images.shape[-2], images.shape[-1]), batch[TARGET])
        loss = torch.stack(list(terms.values())).sum()
        if REGIONS not in batch:
            return {"loss": loss, **terms}
        pad, regions = nn.utils.rnn.pad_sequence, batch[REGIONS]
        boxes, vectors, weights = (
            pad([r[k] for r in regions], batch_first=True) for k in ("boxes", "vectors", "weights")
        )
        if not boxes.shape[1]:
            return {"loss": loss, **terms, "features": loss.new_zeros(())}
        there = pad([torch.ones_like(r["weights"]) for r in regions], batch_first=True)
        raw = student.embed(maps, boxes)
        value = feature_loss(raw, vectors.float(), row_weights(weights.float(), there), there)
        return {"loss": loss + self.factor * value, **terms, "features": value}


# ---- the method ------------------------------------------------------------------------------------------------------


class EZAD(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data, Detection)
        check_groups(bundle.task, config.evaluate)
        if config.data.augment == "standard" and config.regions != "none":
            raise UserError(
                "ezad: stored features are those of whole regions, which data.augment: standard crops; set it to "
                "plain or [RandomHorizontalFlip]."
            )
        stages = [TEACHER] if config.teacher.train or config.regions == "rpn" else []
        if config.adapt is not None:
            stages.append(ADAPT)
        if config.regions != "none":
            stages += [SEARCH, FEATURES]
        named = describe(config.student.model, self.network(config, run, 8))
        steps = config.train.epochs * len(run.loader(config.data, "train", config.train.batch_size, train=True))
        return [*stages, STUDENT.filled(models={"student": named}, steps=steps)]

    def spec(self, config: Config, run: Run, dim: int) -> ModelSpec:
        """The student's spec with what the method decides."""
        task = run.data(config.data, Detection).task
        known = [i for i in range(len(task.classes)) if i not in task.new]
        own = {"dim": dim, "known": known, "conditioned": config.conditioned, "unit_background": False}
        return config.student.model_copy(update={"options": {**config.student.options, **own}})

    def network(self, config: Config, run: Run, dim: int, role: str = "student", seed: int | None = None) -> TextRCNN:
        """The student, without class vectors."""
        network = run.model(self.spec(config, run, dim), config.data, role, seed)
        if not isinstance(network, TextRCNN):
            raise UserError(
                f"ezad trains a detector with class vectors, stillhouse:text_rcnn, not '{config.student.model}'."
            )
        return network

    def run(self, config: Config, run: Run) -> Student:
        teacher = run.teacher("teacher", config.teacher, config.data)
        if not isinstance(teacher, FrozenTeacher) or not isinstance(teacher.task, ImageText):
            raise UserError("ezad: the teacher must embed images and texts; its data may be captions:pasted:digits.")
        teacher.to(run.device)
        own = run.own_input(config.teacher, teacher.model, config.data)
        task = teacher.task.seeing(own.own if isinstance(own, OwnInput) else None)
        clip = self._adapted(config, run, teacher, task)
        classes = list(task.classes)
        vectors = task.class_vectors(clip, [*classes, *config.search.extra_names]).cpu()
        student = self.network(config, run, vectors.shape[1])
        student.set_text(vectors[: len(classes)])
        known = [i for i in range(len(classes)) if i not in run.data(config.data).task.new]
        finder = Finder(task, clip, vectors, known, config)
        data: Any = run.data(config.data, Detection).dataset("train", train=True)
        figures: dict[str, float] = {}
        if config.regions != "none":
            regions, propose = self._found(config, run, finder)
            data = with_regions(data, self._features(config, run, finder, regions).rows)
            figures = self._measured(config, run, finder, propose)
        module = FeatureTraining(student, config.factor)
        rank, world = rank_world()
        size = min(config.train.batch_size, len(data))
        options: dict[str, Any] = {"workers": config.data.workers, "rank": rank, "world": world}
        loader = Loader(data, size, seed=run.seed, shuffle=True, drop_last=True, **options)
        fitted = run.fit(STUDENT, module, loader, config.train)
        figures["train_seconds"] = fitted.seconds
        run.record["weights"] = {"teacher": teacher.fingerprint()}
        return run.student(student, self.spec(config, run, vectors.shape[1]), config.data, figures)

    def _adapted(self, config: Config, run: Run, teacher: FrozenTeacher, task: ImageText) -> nn.Module:
        """The CLIP with tuned layer norms; shared by all seeds."""
        clip = copy.deepcopy(teacher.model)
        if config.adapt is None:
            return clip.eval()
        options, bundle = config.adapt, run.data(config.data, Detection)
        known = [i for i in range(len(bundle.task.classes)) if i not in bundle.task.new]
        texts = [options.template.format(bundle.task.classes[i].replace("_", " ")) for i in known]
        tokens = texts_padded(task.tokenizer, texts, task.context)
        position = torch.zeros(len(bundle.task.classes), dtype=torch.int64)  # boxes of new classes are not there
        position[known] = torch.arange(len(known))

        def make() -> dict[str, Any]:
            crops = BoxCrops(bundle.dataset("train", train=False), task, options.enlarge)
            module = AdaptTraining(clip, tokens, position, options.loss)
            rank, world = rank_world()
            size = min(options.train.batch_size, len(crops))
            more: dict[str, Any] = {"workers": config.data.workers, "rank": rank, "world": world}
            loader = Loader(crops, size, seed=run.seed, shuffle=True, drop_last=True, **more)
            run.fit(ADAPT, module, loader, options.train)
            return {"weights": state_on_cpu(clip)}

        uses = {"teacher": teacher, "data": bundle, "classes": list(bundle.task.classes), "adapt": options}
        uses["train"] = options.train
        with run.seeded(0):
            clip.load_state_dict(run.stage(ADAPT, make, uses)["weights"])
        return clip.requires_grad_(False).to(run.device).eval()

    def _found(self, config: Config, run: Run, finder: Finder) -> tuple[RegionStore, Any]:
        """The stored regions of the training images; and what finds those of further images."""
        bundle = run.data(config.data, Detection)
        uses: dict[str, Any] = {"data": bundle, "regions": config.regions}
        if config.regions == "clip":
            uses |= {"clip": finder.network, "vectors": finder.vectors, "search": config.search}

            def propose(dataset: Any, rows: range) -> list[dict[str, Tensor]]:
                return [finder.search(image_of(dataset.raw(i))) for i in rows]

        else:
            detector = self._trained(config, run, finder)
            uses |= {"detector": detector, "keep": config.search.keep, "overlap": config.search.overlap}

            def propose(dataset: Any, rows: range) -> list[dict[str, Tensor]]:
                batch = dataset.batch(BatchKey(0, np.array(rows), 0, len(rows)), 0)
                sizes = [(int(h), int(w)) for h, w in (t["size"].tolist() for t in batch[TARGET])]
                images, options = batch["input"].to(run.device), config.search
                found = best_proposals(detector, images, sizes, options.keep, options.overlap)
                return [{"boxes": boxes, "scores": torch.ones(len(boxes))} for boxes in found]

        dataset = bundle.dataset("train", train=False)

        def make() -> None:
            write_regions(run.folder, len(dataset), lambda rows: propose(dataset, rows))

        return RegionStore(run.files(SEARCH, make, uses)), propose

    def _trained(self, config: Config, run: Run, finder: Finder) -> TextRCNN:
        """A detector trained on the known boxes alone; shared by all seeds."""
        detector = self.network(config, run, finder.vectors.shape[1], "teacher", 0)
        detector.set_text(finder.vectors[: len(detector.text)])
        spec = self.spec(config, run, finder.vectors.shape[1])
        found = run.trained("teacher", detector, spec, config.train, config.data, 0)
        detector.load_state_dict(found["weights"])
        return detector.to(run.device).eval()

    def _features(self, config: Config, run: Run, finder: Finder, regions: RegionStore) -> RegionStore:
        bundle = run.data(config.data, Detection)
        dataset = bundle.dataset("train", train=False)

        def rows(images: range) -> list[dict[str, Tensor]]:
            out = []
            for i in images:
                sample = dataset.raw(i)
                out.append(finder.features(image_of(sample), boxes_of(sample), regions.rows(i)["boxes"]))
            return out

        def make() -> None:
            write_regions(run.folder, len(dataset), rows)

        uses = {
            "regions": regions.folder.name,
            "data": bundle,
            "clip": finder.network,
            "vectors": finder.vectors,
            "features": config.features,
            "enlarge": finder.enlarge,
        }
        return RegionStore(run.files(FEATURES, make, uses))

    @torch.no_grad()
    def _measured(self, config: Config, run: Run, finder: Finder, propose: Any) -> dict[str, float]:
        """On test images: how many true boxes the regions that are learned from would meet, and how many of the true
        boxes the CLIP names rightly."""
        if not config.probe:
            return {}
        spec, split = run.judging_data()
        bundle = run.data(spec)
        dataset, new = bundle.dataset(split, train=False), torch.tensor(bundle.task.new, dtype=torch.int64)
        count, most, out = min(config.probe, len(dataset)), config.features.most, []
        for first in range(0, count, 16):
            rows = range(first, min(first + 16, count))
            for i, found in zip(rows, propose(dataset, rows)):
                sample = dataset.raw(i)
                boxes, labels = boxes_of(sample), sample["labels"][~sample["crowd"]]
                if not len(boxes):
                    continue
                named = finder.look(image_of(sample), boxes, finder.enlarge)[1][:, : len(bundle.task.classes)].argmax(1)
                regions = found["boxes"][:most]
                met = (pairwise_iou(boxes, regions) >= 0.5).any(1) if len(regions) else torch.zeros(len(boxes)) > 0
                out.append(torch.stack([torch.isin(labels, new), met, named == labels], 1))
        return region_shares(*torch.cat(out).unbind(1)) if out else {}

"""OADP: a detector learns from an image-text teacher what objects, blocks and whole images are, and so finds classes of
which it saw no box.

paper: Object-Aware Distillation Pyramid for Open-Vocabulary Object Detection
venue: CVPR 2023
arxiv: 2303.05892
task: detection
family: vision-language features
use when: a detector must find classes that are known by name alone, and a CLIP knows what they look like
needs: boxes of some classes, a CLIP whose image half is a vision transformer (hf:config:clip, stillhouse:clip,
    stillhouse:hybrid_clip), and a two-stage detector (stillhouse:text_rcnn)

Four steps. A proposer is trained on the known boxes to tell how well a place lies on a thing, whatever it is. OAKE
reads each proposal: a square eight times as large is cropped, moved into the image, and a further token goes through
the CLIP, at twice the density of patches, that attends to the patches of the proposal alone; overlapping blocks of
the image and of smaller copies, and the whole, are read as they are. All is stored. The detector then learns the
labels of the known classes by a head whose classifier is the class vectors, and the stored embeddings at three
levels: a second head those of objects (mean absolute difference), a third those of blocks (and all cosines between
the blocks of a batch), a fourth that of the whole from the coarsest map; blocks and the whole also tell which known
classes are in them. The last two heads are dropped. Scores are p^(2/3) q^(1/3) of both heads for known classes, the
reverse for new ones. Images are resized and mirrored only, as what was stored is of whole images. The CLIP of the
recipe sees 32 pixels, of which a crop eight times as large leaves 11 to an object, and reads such objects worse than
plain crops; its recipe takes crops twice as large, which it reads better than plain ones (`ratio_8` is the published
size). Published gains are for embeddings of 512 numbers; a mean absolute difference grows with one over the root of
their number. The factor and the constant of the scores of several labels came as a file with the paper: here the
CLIP's own scale, and the constant at which present and absent classes are told apart best on average (`labels.bias`
sets another). The released code never steps the warm-up of the losses of several labels, which leaves them at a
thousandth and less; `gains.frozen_label_warmup` does the same. The box of the block that is the whole image is its
centre square, which the released code stores wrongly. A proposer as OLN has it is part of the recipe, without its
second stage; masks of instances (LVIS) are not learned, as data here have boxes. The captions of its recipe are made
from class names: its CLIP knows class names, not language.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from stillhouse.functional.boxes import pairwise_iou
from stillhouse.functional.crops import centre_square, cut
from stillhouse.functional.pictures import resized
from stillhouse.functional.regions import padded_truth
from stillhouse.methods.dense.oadp.losses import (
    asymmetric_loss,
    embedding_loss,
    present,
    relation_loss,
    whole_loss,
)
from stillhouse.methods.dense.oadp.oake import ObjectReader, block_boxes, blocks, outside, windows
from stillhouse.methods.distillation import describe
from stillhouse.models.clip import as_clip
from stillhouse.models.image_text import scale
from stillhouse.models.text_rcnn import TextRCNN, Trunk, best_proposals
from stillhouse.processes import rank_world
from stillhouse.randomness import keyed
from stillhouse.runs.judging import check_groups
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, evaluating
from stillhouse.store.regions import RegionStore, write_regions
from stillhouse.tasks.detection import TARGET, Detection
from stillhouse.tasks.image_text import ImageText
from stillhouse.training.module import TrainingModule

AT_ONCE = 128  # images that the teacher reads at a time

# ---- the recipe ------------------------------------------------------------------------------------------------------


class Proposals(Spec):
    """Regions that may hold a thing of any class."""

    train: TrainSpec = Field(default_factory=TrainSpec, description="Of the proposer, on the known boxes.")
    keep: int = Field(8, ge=1, description="Proposals of an image that are read and learned from, the best ones.")
    overlap: float = Field(
        0.5, gt=0, le=1, description="Proposals overlap by an intersection over union of at most this."
    )


class Objects(Spec):
    """How the teacher reads a proposal."""

    token: bool = Field(True, description="By a token that sees the proposal alone; false: the crop as it is.")
    ratio: float = Field(
        8.0, ge=1, description="Area of the crop to that of the proposal; with token: false, 1 crops it."
    )
    dense: bool = Field(True, description="With a token: patches at half their stride.")


class Blocks(Spec):
    """Blocks of an image."""

    size: int | None = Field(None, ge=8, description="Pixels a side; default: of the teacher's input.")
    stride: int | None = Field(None, ge=1, description="Pixels from one to the next at most; default: half the size.")
    rescale: float = Field(1.5, gt=1, description="Each further copy of the image is smaller by this.")


class Gains(Spec):
    """Weights of what is learned besides labels of boxes; 0 leaves a term out."""

    object: float = Field(256.0, ge=0)
    block: float = Field(128.0, ge=0)
    relation: float = Field(8.0, ge=0, description="Of the cosines between blocks.")
    whole: float = Field(0.5, ge=0, description="Of a sum over the batch, not a mean.")
    block_labels: float = Field(16.0, ge=0, description="Which known classes are in a block.")
    whole_labels: float = Field(4.0, ge=0, description="Which known classes are in the image.")
    warmup: int = Field(200, ge=0, description="Steps in which the first four grow to their weight.")
    block_labels_warmup: int = Field(1000, ge=0)
    whole_labels_warmup: int = Field(2000, ge=0)
    frozen_label_warmup: bool = Field(False, description="Leave the last two where they begin, as the released code.")

    @property
    def learns_blocks(self) -> bool:
        return any((self.block, self.relation, self.block_labels))

    @property
    def learns_whole(self) -> bool:
        return any((self.whole, self.whole_labels))

    def at(self, name: str, step: int) -> float:
        """The weight of a term at a step, which counts from 0."""
        gain: float = getattr(self, name)
        labels = name.endswith("_labels")
        steps: int = getattr(self, f"{name}_warmup") if labels else self.warmup
        done = 1 if labels and self.frozen_label_warmup else min(step + 1, steps)
        return gain * done / steps if steps else gain


class Labels(Spec):
    """Scores of several labels: scale * cosine - bias."""

    scale: float | None = Field(None, gt=0, description="Default: what the teacher multiplies cosines by.")
    bias: float | None = Field(None, description="Default: midway between the means of present and of absent classes.")


class Config(MethodConfig):
    data: Data = Field(description="Images with boxes, some classes of which are new (data.options.new).")
    teacher: Teacher = Field(description="A CLIP, with data of its own.")
    student: Model = Field(
        description="The detector, stillhouse:text_rcnn; its classes and heads are set by the method."
    )
    train: TrainSpec = Field(default_factory=TrainSpec)
    proposals: Proposals = Field(default_factory=Proposals)
    objects: Objects = Field(default_factory=Objects)
    blocks: Blocks = Field(default_factory=Blocks)
    gains: Gains = Field(default_factory=Gains)
    labels: Labels = Field(default_factory=Labels)
    probe: int = Field(48, ge=0, description="Test images on which teacher and proposals are measured; 0: none.")
    evaluate: list[str] = Field(default_factory=lambda: ["detection", "cost"])


TEACHER = Stage("teacher", "train the CLIP (stored, shared)")
PROPOSER = Stage("proposer", "train the proposer on known boxes (stored, shared)")
READ = Stage("read", "read objects, blocks and whole images (stored, shared)")
STUDENT = Stage("student", "train the detector on labels and stored embeddings")

# ---- what the teacher says -------------------------------------------------------------------------------------------


class Reader:
    """A CLIP that reads parts of images.

    Args:
        teacher: a frozen CLIP.
        task: its own, with class vectors.
        objects, blocks: how.
        device: where it works.
    """

    def __init__(
        self, teacher: FrozenTeacher, task: ImageText, objects: Objects, blocks: Blocks, device: torch.device
    ) -> None:
        teacher.to(device)
        self.task, self.objects, self.device = task, objects, device
        self.model = teacher.model
        self._token = ObjectReader(as_clip(teacher.model), objects.dense).eval().to(device) if objects.token else None
        self.block = blocks.size or self.task.size[0]
        self.stride, self.rescale = blocks.stride or max(self.block // 2, 1), blocks.rescale

    def of_objects(self, image: Tensor, boxes: Tensor) -> Tensor:
        """(n, D) unit embeddings of boxes (n, 4) in a uint8 image (3, H, W)."""
        height, width = image.shape[-2:]
        squares = windows(boxes, (width, height), self.objects.ratio)
        crops = [cut(image, _whole_pixels(w)) for w in (squares if self._token or self.objects.ratio > 1 else boxes)]
        if self._token is None or not crops:
            return self.task.embed_images(self.model, crops)
        masks, out = outside(boxes, squares, self._token.grid), []
        for first in range(0, len(crops), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            out.append(self._token(self.task.prepared(crops[part]).to(self.device), masks[part].to(self.device)))
        return torch.cat(out)

    def of_blocks(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(m, D) and boxes (m, 4) of the blocks of an image: the first is its centre square."""
        height, width = image.shape[-2:]
        middle = centre_square(width, height)
        crops = [cut(image, middle)]
        copies: dict[tuple[int, int], Tensor] = {}
        for _, (w, h), (x, y) in blocks(width, height, self.block, self.stride, self.rescale):
            if (w, h) not in copies:
                copies[w, h] = resized(image, (h, w))
            crops.append(cut(copies[w, h], (x, y, x + self.block, y + self.block)))
        own = block_boxes(width, height, self.block, self.stride, self.rescale)
        return self.task.embed_images(self.model, crops), torch.cat([torch.tensor([middle], dtype=torch.float32), own])


def _whole_pixels(window: Tensor) -> tuple[int, int, int, int]:
    left, top, right, bottom = window.round().int().tolist()
    return left, top, max(right, left + 1), max(bottom, top + 1)


def raw_image(sample: Any) -> Tensor:
    """uint8 (3, H, W) of a sample as its source has it."""
    found: Tensor = sample["input"].as_subclass(Tensor)
    return found


# ---- training --------------------------------------------------------------------------------------------------------


class ProposerTraining(TrainingModule):
    """The proposer with its maps; the heads stay as they are."""

    def __init__(self, student: TextRCNN) -> None:
        super().__init__()
        self.student: TextRCNN = student

    def param_groups(self) -> list[dict[str, Any]]:
        heads = {id(p) for head in (self.student.first, self.student.second) if head for p in head.parameters()}
        return [{"params": [p for p in self.student.parameters() if p.requires_grad and id(p) not in heads]}]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        images = batch["input"]
        _, _, made = self.student.propose(self.student.pyramid(images), (images.shape[-2], images.shape[-1]))
        terms = self.student.proposer_losses(made, batch[TARGET])
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}


class PyramidTraining(TrainingModule):
    """A detector's own losses, and the embeddings of objects, blocks and whole images.

    A batch's `regions` hold for each image `boxes` (m, 4), `vectors` (m, D) and `counts` (m,): first the whole, then as
    many objects for each image, then blocks.

    Args:
        student: with its class vectors.
        gains: weights.
        objects: how many an image has.
        scale, bias: of the scores of several labels.
    """

    def __init__(self, student: TextRCNN, gains: Gains, objects: int, scale: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.student: TextRCNN = student
        self.gains, self.objects, self.scale, self.bias = gains, objects, scale, bias
        width, dim = student.width, student.dim
        self.block: nn.Module | None = None
        self.whole: nn.Module | None = None
        if gains.learns_blocks:
            self.block = nn.Sequential(Trunk(width, student.pool, 0, 2, 2 * width), nn.Linear(2 * width, dim))
        if gains.learns_whole:
            self.whole = nn.Linear(width, dim)

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """`loss`; the detector's own terms; `object`, `block`, `relation`, `whole`, `block_labels` and `whole_labels`,
        unweighted."""
        images, student = batch["input"], self.student
        maps = student.pyramid(images)
        own = student.losses(maps, (images.shape[-2], images.shape[-1]), batch[TARGET])
        loss = torch.stack(list(own.values())).sum()
        if REGIONS not in batch:
            return {"loss": loss, **own}
        terms = self.distilled(maps, batch)
        for name, value in terms.items():
            loss = loss + self.gains.at(name, progress.step) * value
        return {"loss": loss, **own, **terms}

    def distilled(self, maps: Sequence[Tensor], batch: Batch) -> dict[str, Tensor]:
        """The terms of all levels, unweighted."""
        gains, student, last = self.gains, self.student, 1 + self.objects
        pad, regions = nn.utils.rnn.pad_sequence, batch[REGIONS]
        boxes, vectors, counts = (
            pad([r[k] for r in regions], batch_first=True) for k in ("boxes", "vectors", "counts")
        )
        vectors, counts = vectors.float(), counts.float()
        truth = padded_truth(batch[TARGET], boxes.device)
        classes = len(student.text)
        terms: dict[str, Tensor] = {}
        if gains.object:
            e = F.normalize(student.embed(maps, boxes[:, 1:last], second=True).float(), dim=-1)
            terms["object"] = embedding_loss(e, vectors[:, 1:last], counts[:, 1:last])
        if self.block is not None:
            at, teacher, weights = boxes[:, last:], vectors[:, last:], counts[:, last:]
            e = F.normalize(self.block(student.pooled(maps, at)).float(), dim=-1).unflatten(0, at.shape[:2])
            terms["block"] = embedding_loss(e, teacher, weights)
            terms["relation"] = relation_loss(e.flatten(0, 1), teacher.flatten(0, 1), weights.flatten())
            if gains.block_labels:
                there = present(at, truth.boxes, truth.labels, truth.real, classes)
                terms["block_labels"] = asymmetric_loss(self.scores(e), there, weights=weights)
        if self.whole is not None:
            e = F.normalize(self.whole(maps[-1].mean((2, 3))).float(), dim=-1)
            terms["whole"] = whole_loss(e, vectors[:, 0])
            if gains.whole_labels:
                rows = F.one_hot(truth.labels, classes) * truth.real[..., None]
                terms["whole_labels"] = asymmetric_loss(self.scores(e), rows.amax(1))
        return terms

    def scores(self, embeddings: Tensor) -> Tensor:
        """(..., K) of several labels; minus infinity for classes that are not known."""
        scores = self.scale * embeddings @ self.student.text.T - self.bias
        return scores.masked_fill(~self.student.is_known, -torch.inf)


# ---- the method ------------------------------------------------------------------------------------------------------


class OADP(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data, Detection)
        check_groups(bundle.task, config.evaluate)
        if config.data.augment == "standard" and self.distils(config):
            raise UserError(
                "oadp: stored embeddings are those of whole images, which data.augment: standard crops; set it to "
                "plain or [RandomHorizontalFlip]."
            )
        stages = [TEACHER] if config.teacher.train else []
        if self.distils(config):
            stages += [PROPOSER.filled(steps=self._steps(config, config.proposals.train, run)), READ]
        named = describe(config.student.model, self.network(config, run, 8, 1.0))
        return [*stages, STUDENT.filled(models={"student": named}, steps=self._steps(config, config.train, run))]

    @staticmethod
    def _steps(config: Config, train: TrainSpec, run: Run) -> int:
        return train.epochs * len(run.loader(config.data, "train", train.batch_size, train=True))

    @staticmethod
    def distils(config: Config) -> bool:
        """Whether anything is learned of the teacher besides its class vectors."""
        gains = config.gains
        return bool(gains.object or gains.learns_blocks or gains.learns_whole)

    def spec(self, config: Config, run: Run, dim: int, scale: float) -> ModelSpec:
        """The student's spec with what the method decides."""
        task = run.data(config.data, Detection).task
        known = [i for i in range(len(task.classes)) if i not in task.new]
        own = {"dim": dim, "known": known, "second": bool(config.gains.object), "second_scale": scale}
        return config.student.model_copy(update={"options": {**config.student.options, **own}})

    def network(self, config: Config, run: Run, dim: int, scale: float, role: str = "student") -> TextRCNN:
        """The student, without class vectors."""
        network = run.model(self.spec(config, run, dim, scale), config.data, role)
        if not isinstance(network, TextRCNN):
            raise UserError(
                f"oadp trains a detector with class vectors, stillhouse:text_rcnn, not '{config.student.model}'."
            )
        return network

    def run(self, config: Config, run: Run) -> Student:
        teacher = run.teacher("teacher", config.teacher, config.data)
        if not isinstance(teacher, FrozenTeacher) or not isinstance(teacher.task, ImageText):
            raise UserError(
                "oadp: the teacher must embed images and texts: give it data such as captions:pasted:cifar10."
            )
        vectors = teacher.task.vectors
        assert vectors is not None
        factor = float(scale(teacher.model))
        student = self.network(config, run, vectors.shape[1], factor)
        student.set_text(vectors.cpu())
        figures: dict[str, float] = {}
        data: Any = run.data(config.data, Detection).dataset("train", train=True)
        bias, labels_scale = config.labels.bias or 0.0, config.labels.scale or factor
        if self.distils(config):
            proposer = self._proposer(config, run)
            own = run.own_input(config.teacher, teacher.model, config.data)
            task = teacher.task.seeing(own.own if isinstance(own, OwnInput) else None)
            reader = Reader(teacher, task, config.objects, config.blocks, run.device)
            store = self._read(config, run, proposer, reader, teacher)
            if config.labels.bias is None:
                bias = midway(store, data, config.proposals.keep, student.text, student.is_known, labels_scale)
            data = with_regions(data, store.rows)
            figures |= self._measured(config, run, proposer, reader)
        with keyed("heads", run.seed):
            module = PyramidTraining(student, config.gains, config.proposals.keep, labels_scale, bias)
        fitted = run.fit(STUDENT, module, self._loader(config, run, data), config.train)
        figures["train_seconds"] = fitted.seconds
        run.record["weights"] = {"teacher": teacher.fingerprint()}
        return run.student(student, self.spec(config, run, vectors.shape[1], factor), config.data, figures)

    @staticmethod
    def _loader(config: Config, run: Run, data: Any) -> Loader:
        rank, world = rank_world()
        options = {"workers": config.data.workers, "rank": rank, "world": world}
        size = min(config.train.batch_size, len(data))
        return Loader(data, size, seed=run.seed, shuffle=True, drop_last=True, **options)

    def _proposer(self, config: Config, run: Run) -> TextRCNN:
        """A network whose proposals say how well they lie on a thing; shared by all seeds."""
        spec = config.student.model_copy(update={"options": {**config.student.options, "quality": True}})
        with run.seeded(0):
            network = run.model(spec, config.data, "proposer", 0)
            assert isinstance(network, TextRCNN)

            def make() -> dict[str, Any]:
                loader = run.loader(config.data, "train", config.proposals.train.batch_size, train=True)
                run.fit(PROPOSER, ProposerTraining(network), loader, config.proposals.train)
                return {"weights": state_on_cpu(network)}

            uses = {
                "network": spec,
                "data": run.data(config.data),
                "augment": config.data.model_dump(mode="json", include={"augment"}),
                "train": config.proposals.train,
            }
            network.load_state_dict(run.stage(PROPOSER, make, uses)["weights"])
        return network.to(run.device).eval()

    @torch.no_grad()
    def _proposed(self, config: Config, proposer: TextRCNN, dataset: Any, rows: range, device: Any) -> list[Tensor]:
        """The best proposals (n, 4) of images, in pixels of their own size."""
        batch = dataset.batch(BatchKey(0, np.array(rows), 0, len(rows)), 0)
        sizes = [(int(h), int(w)) for h, w in (t["size"].tolist() for t in batch[TARGET])]
        options = config.proposals
        return best_proposals(proposer, batch["input"].to(device), sizes, options.keep, options.overlap)

    def _read(
        self, config: Config, run: Run, proposer: TextRCNN, reader: Reader, teacher: FrozenTeacher
    ) -> RegionStore:
        """The stored embeddings of the training images."""
        dataset, keep = run.data(config.data).dataset("train", train=False), config.proposals.keep

        def rows(images: range) -> list[dict[str, Tensor]]:
            proposals = self._proposed(config, proposer, dataset, images, run.device)
            out = []
            for i, boxes in zip(images, proposals):
                image = raw_image(dataset.raw(i))
                height, width = image.shape[-2:]
                vectors, places = reader.of_blocks(image)
                objects, missing = reader.of_objects(image, boxes), keep - len(boxes)
                whole = torch.tensor([[0.0, 0.0, width, height]])
                filled = [F.pad(x.cpu().float(), (0, 0, 0, missing)) for x in (objects, boxes)]
                counts = torch.tensor([1] * (1 + len(boxes)) + [0] * missing + [1] * len(places))
                out.append(
                    {
                        "vectors": torch.cat([vectors[:1].cpu(), filled[0], vectors.cpu()]).half(),
                        "boxes": torch.cat([whole, filled[1], places]),
                        "counts": counts.to(torch.uint8),
                    }
                )
            return out

        uses = {
            "teacher": teacher,
            "proposer": proposer,
            "data": run.data(config.data),
            "objects": config.objects,
            "blocks": config.blocks,
            "proposals": config.proposals.model_dump(mode="json", exclude={"train"}),
        }

        def make() -> None:
            write_regions(run.folder, len(dataset), rows)

        return RegionStore(run.files(READ, make, uses))

    @torch.no_grad()
    def _measured(self, config: Config, run: Run, proposer: TextRCNN, reader: Reader) -> dict[str, float]:
        """On test images: how many true boxes proposals find, and how many of those boxes the teacher names rightly."""
        if not config.probe:
            return {}
        spec, split = run.judging_data()
        bundle = run.data(spec)
        dataset, new = bundle.dataset(split, train=False), bundle.task.new
        assert reader.task.vectors is not None
        vectors = reader.task.vectors.cpu()
        rows_of: list[Tensor] = []
        with evaluating(proposer):
            for first in range(0, min(config.probe, len(dataset)), 16):
                rows = range(first, min(first + 16, config.probe, len(dataset)))
                for i, found in zip(rows, self._proposed(config, proposer, dataset, rows, run.device)):
                    sample = dataset.raw(i)
                    counted = ~sample["crowd"]
                    boxes, labels = sample["boxes"].as_subclass(Tensor)[counted], sample["labels"][counted]
                    if not len(boxes):
                        continue
                    named = (reader.of_objects(raw_image(sample), boxes).cpu() @ vectors.T).argmax(1)
                    met = (pairwise_iou(boxes, found) >= 0.5).any(1) if len(found) else torch.zeros(len(boxes)) > 0
                    is_new = torch.isin(labels, torch.tensor(new, dtype=labels.dtype))
                    rows_of.append(torch.stack([is_new, met, named == labels], 1))
        return region_shares(*torch.cat(rows_of).unbind(1)) if rows_of else {}


def midway(
    store: RegionStore, dataset: Any, objects: int, text: Tensor, known: Tensor, scale: float, most: int = 256
) -> float:
    """Midway between the mean scores of the known classes that are in blocks and of those that are not."""
    sums = torch.zeros(2, 2, dtype=torch.float64)
    text, known = text.cpu(), known.cpu()
    for i in range(min(most, len(store))):
        rows, sample = store.rows(i), dataset.raw(i)
        truth = padded_truth([{"boxes": sample["boxes"].as_subclass(Tensor), "labels": sample["labels"]}], text.device)
        boxes = rows["boxes"][None, 1 + objects :]
        there = present(boxes, truth.boxes, truth.labels, truth.real, len(text))[0][:, known]
        scores = (scale * rows["vectors"][1 + objects :].float() @ text.T)[:, known].double()
        for k, chosen in enumerate((there, ~there)):
            sums[k] += torch.stack([(scores * chosen).sum(), chosen.sum().double()])
    means = sums[:, 0] / sums[:, 1].clamp_min(1)
    return float(means.mean())

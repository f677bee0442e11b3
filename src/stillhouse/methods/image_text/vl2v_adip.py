"""VL2V-ADiP: a vision-only student takes over the space of a vision-language model of which only embeddings are known:
align, distil, predict.

paper: Leveraging Vision-Language Models for Improving Domain Generalization in Image Classification
venue: CVPR 2024
arxiv: 2310.08255
task: classification, domain generalisation
family: features
use when: a student must hold up on kinds of images that its training did not have, and the teacher answers with
    embeddings alone
needs: a teacher that embeds images and texts (two functions are enough), a pre-trained student, labelled images of two
    or more domains

First a linear map from the frozen student's features into the teacher's space is trained (align), then the map is
frozen and the backbone trained (distil), both with one loss: -lambda cos(p, image embedding of the input) - (1 -
lambda) cos(p, text embedding of its class). Prediction is the class whose text embedding is nearest. The backbone is in
evaluation mode while it is frozen, where the released vision transformer is left in training mode; batch normalisation
keeps its statistics throughout (`freeze_norms`), as in the released ResNet. Each batch has as many images of every
source domain. The weights of each stage are averaged as SWAD does, evaluated at the end of every epoch on held-out
source images; `swad: null` keeps the last. The input of the teacher is normalised as its own; the released code gives
it the student's. A zero projection is normalised with torch's guard instead of giving NaN. Mixed samples (data.cutmix)
use the text embeddings of both classes by their shares. With `student: null` the student is the teacher's own image
half (the white-box form, without align). One domain, `target`, is left out of training and judged: `accuracy`;
`accuracy_source` is that on the others. Baselines: `mode: one_stage`, `ce`, `kd` (cross-entropy and a KL divergence
from the teacher's class probabilities at temperature 1), each with the training of `distil` alone. It transfers the
teacher's robustness, so look at `accuracy_teacher` first: where the teacher is weak on the target, nothing can be
concluded. The captions of its recipe are written from class labels and masks: what its networks learn is class names,
not language.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, DataSpec, MethodConfig, ModelSpec, Spec, Teacher, TeacherSpec, TrainSpec
from stillhouse.data.loader import BatchLoader
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.functional.labels import check_range, is_soft
from stillhouse.functional.precision import full_precision
from stillhouse.models.backbone import Backbone, backbone
from stillhouse.models.image_text import ImageTower, image_tower
from stillhouse.models.weights import load_weights
from stillhouse.objectives.ce import cross_entropy
from stillhouse.randomness import keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.judging import check_groups, evaluate
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, Signals, evaluating, to_device
from stillhouse.tasks.base import Task
from stillhouse.tasks.classification import Classification
from stillhouse.tasks.image_text import ImageText
from stillhouse.training.context import Progress
from stillhouse.training.module import TrainingModule
from stillhouse.training.swad import DenseAverage

# ---- the mathematics -------------------------------------------------------------------------------------------------


@full_precision
def adip_loss(embedding: Tensor, image: Tensor, vectors: Tensor, labels: Tensor, weight: float = 0.5) -> Tensor:
    """-weight * mean cos(embedding, image) - (1 - weight) * mean cos(embedding, vectors[label]).

    Args:
        embedding: (B, d) of the student, of any length.
        image: (B, d) of the teacher's image embeddings, of any length; detached.
        vectors: (C, d) text embeddings of the classes, of any length; detached.
        labels: (B,) class ids, or (B, C) shares of mixed samples.
        weight: lambda.

    Raises:
        UserError: on the CPU, a label that is no class.
    """
    to_image = F.cosine_similarity(embedding, image.detach(), dim=-1).mean()
    if is_soft(labels):
        cosines = F.normalize(embedding, dim=-1) @ F.normalize(vectors.detach(), dim=-1).T
        to_text = (labels * cosines).sum(-1).mean()
    else:
        if labels.device.type == "cpu":
            check_range("vl2v_adip", labels, len(vectors))
        to_text = F.cosine_similarity(embedding, vectors.detach()[labels], dim=-1).mean()
    return -weight * to_image - (1 - weight) * to_text


def class_vectors(texts: Tensor) -> Tensor:
    """(C, d) unit vectors of classes from the embeddings (C, T, d) of T templates: unit, averaged, unit."""
    return F.normalize(F.normalize(texts, dim=-1).mean(1), dim=-1)


class EmbeddingClassifier(nn.Module):
    """Features, mapped into the space of class vectors, classified by cosine.

    Args:
        features: images to (B, D).
        projection: (B, D) to (B, d).
        vectors: (C, d) unit class vectors.
        scale: what cosines are multiplied by.
    """

    vectors: Tensor
    scale: Tensor

    def __init__(self, features: nn.Module, projection: nn.Module, vectors: Tensor, scale: float = 100.0) -> None:
        super().__init__()
        self.features, self.projection = features, projection
        self.register_buffer("vectors", vectors)
        self.register_buffer("scale", torch.tensor(scale))

    def embed(self, images: Tensor) -> Tensor:
        """(B, d), of any length."""
        found: Tensor = self.projection(self.features(images))
        return found

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * F.normalize(self.embed(images), dim=-1) @ self.vectors.T


class LinearClassifier(nn.Module):
    """The baselines' student: features and a linear layer."""

    def __init__(self, features: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.features, self.head = features, nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.features(images))
        return found


@dataclass(frozen=True)
class BlackBox:
    """A vision-language model as two functions, both of which give embeddings of any length.

    Attributes:
        embed_images: (B, C, H, W), as the student has them, to (B, d).
        embed_classes: names to (C, d).
        source: what the answers depend on, for the hash of stored stages.
    """

    embed_images: Callable[[Tensor], Tensor]
    embed_classes: Callable[[list[str]], Tensor]
    source: Any = None


# ---- training --------------------------------------------------------------------------------------------------------


class AdipTraining(TrainingModule):
    """One stage: the loss on what is trained, while the rest stays as it is, to the bit.

    Args:
        student: the whole.
        trained: its parts that learn, by name: `projection`, `features`, `head`.
        embed_images: of the teacher; None: not needed.
        mode: the loss.
        weight: lambda.
        freeze_norms: batch normalisation keeps its statistics.
        average: dense averaging; None: none.
    """

    def __init__(
        self,
        student: nn.Module,
        trained: tuple[str, ...],
        embed_images: Callable[[Tensor], Tensor] | None,
        mode: str = "adip",
        weight: float = 0.5,
        vectors: Tensor | None = None,
        scale: float = 100.0,
        freeze_norms: bool = True,
        average: DenseAverage | None = None,
    ) -> None:
        super().__init__()
        self.student, self._trained, self._embed, self._mode, self._weight = (
            student,
            trained,
            embed_images,
            mode,
            weight,
        )
        self._vectors, self._scale, self._freeze_norms, self.average = vectors, scale, freeze_norms, average
        for name, part in student.named_children():
            part.requires_grad_(name in trained)

    def train(self, mode: bool = True) -> AdipTraining:
        super().train(mode)
        for name, part in self.student.named_children():
            if name not in self._trained:
                part.eval()
        if self._freeze_norms:
            for module in self.student.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        images, labels = batch["input"], batch["label"]
        if isinstance(self.student, EmbeddingClassifier):
            assert self._embed is not None
            embedding = self.student.embed(images)
            return {"loss": adip_loss(embedding, self._embed(images), self.student.vectors, labels, self._weight)}
        logits = self.student(images)
        loss = cross_entropy(logits, labels)
        if self._mode != "kd":
            return {"loss": loss}
        assert self._embed is not None and self._vectors is not None
        theirs = self._scale * F.normalize(self._embed(images), dim=-1) @ self._vectors.to(images.device).T
        mine = logits.float().log_softmax(-1)
        kd = F.kl_div(mine, theirs.log_softmax(-1), reduction="batchmean", log_target=True)
        return {"loss": loss + kd, "ce": loss, "kd": kd}

    def after_step(self, batch: Batch, progress: Progress, stepped: bool) -> None:
        if self.average is not None and stepped:
            self.average.add(self.student)

    def read_student(self, batch: Batch) -> Signals:
        return Signals(logits=self.student(batch["input"]))


class DomainBatches(BatchLoader):
    """Batches of several data sets side by side, joined into one; the shorter are cycled.

    Args:
        parts: a loader a domain.
    """

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return max(map(len, self.parts))

    @property
    def batch_size(self) -> int:
        """Samples of one batch, over all processes."""
        return sum(int(p.batch_size) for p in self.parts)

    @property
    def even(self) -> bool:
        """Whether all batches hold equally many samples."""
        return all(p.even for p in self.parts)

    @property
    def usual_size(self) -> int:
        return sum(int(p.usual_size) for p in self.parts)

    @property
    def count(self) -> int:
        return sum(int(p.count) for p in self.parts)

    def labels(self) -> Tensor:
        return torch.cat([p.labels() for p in self.parts])

    def batches(self, epoch: int = 0, batch: int = 0, epochs: int | None = None) -> Iterator[Batch]:
        first = epoch * len(self) + batch
        end = None if epochs is None else epochs * len(self)
        streams = [p.batches(*divmod(first, len(p))) for p in self.parts]
        number = first
        while end is None or number < end:
            found = [next(s) for s in streams]
            yield {key: torch.cat([b[key] for b in found]) for key in ("input", "label", "index")}
            number += 1


# ---- the recipe ------------------------------------------------------------------------------------------------------


class SwadSpec(Spec):
    """Averaging of weights over the flat valley of the validation loss."""

    n_converge: int = Field(3, ge=1)
    n_tolerance: int = Field(6, ge=1)
    tolerance: float = Field(0.3, ge=0)


class Config(MethodConfig):
    domains: dict[str, Data] = Field(
        description="Data of each domain, by name; all with the same classes, and each with `val` above 0 for SWAD."
    )
    target: str = Field(
        description="The domain that is left out of training, on whose test split the student is judged."
    )
    teacher: Teacher = Field(description="A network that embeds images and texts.")
    student: Teacher | None = Field(
        description="The student's network, pre-trained: `pretrained`, `checkpoint`, or `train` on its own `data`; "
        "null: the teacher's image half."
    )
    mode: Literal["adip", "one_stage", "ce", "kd"] = Field("adip", description="The others are baselines.")
    weight: float = Field(0.5, ge=0, le=1, description="lambda: of the image embeddings; the rest is the texts'.")
    align: TrainSpec | None = Field(default_factory=TrainSpec, description="Of the map; null: it stays as it begins.")
    distil: TrainSpec = Field(default_factory=TrainSpec, description="Of the backbone. Batches are a domain's.")
    swad: SwadSpec | None = Field(default_factory=SwadSpec, description="null: the last weights.")
    freeze_norms: bool = Field(True, description="Batch normalisation keeps its statistics.")
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])

    @model_validator(mode="after")
    def _has_sources(self) -> Config:
        if self.target not in self.domains:
            raise ValueError(f"target '{self.target}' is none of the domains: {', '.join(self.domains)}")
        if len(self.domains) < 2:
            raise ValueError("domains needs two at least: one is left out of training")
        if self.student is None and self.mode in ("ce", "kd", "one_stage"):
            raise ValueError("student: null is for mode adip, in which the teacher's own projection is kept")
        return self

    @property
    def data(self) -> DataSpec:
        """What the student is judged on."""
        return self.domains[self.target]

    @property
    def sources(self) -> dict[str, DataSpec]:
        """The domains that are trained on."""
        return {k: v for k, v in self.domains.items() if k != self.target}


PRETRAIN = Stage("teacher", "train the teacher, and pre-train the student (stored, shared)")
ALIGN = Stage("align", "train the map into the teacher's space")
DISTIL = Stage("distil", "train the backbone")


class VL2VADiP(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        classes = {run.data(d, Classification).task.classes for d in config.domains.values()}
        if len(classes) > 1:
            raise UserError("vl2v_adip: the domains have different classes; keep the same ones (data.classes).")
        check_groups(run.data(config.data).task, config.evaluate)
        stages = [PRETRAIN] if any(t and t.train for t in (config.teacher, config.student)) else []
        length = len(self.loader(config, run, config.distil))
        if config.mode == "adip" and config.align is not None and config.student is not None:
            stages.append(ALIGN.filled(steps=config.align.epochs * len(self.loader(config, run, config.align))))
        return [*stages, DISTIL.filled(steps=config.distil.epochs * length)]

    def loader(self, config: Config, run: Run, train: TrainSpec) -> DomainBatches:
        parts = [run.loader(d, "train", train.batch_size, train=True) for d in config.sources.values()]
        return DomainBatches(parts)

    def run(self, config: Config, run: Run) -> VL2VStudent:
        task = run.data(config.data, Classification).task
        teacher = run.teacher("teacher", config.teacher, config.data)
        box = black_box(teacher, run.device)
        names = [name.replace("_", " ") for name in task.classes]
        vectors = F.normalize(box.embed_classes(names).float(), dim=-1).cpu()
        figures = {"accuracy_teacher": self._teacher_accuracy(config, run, box, vectors)}
        spec, features, width = self.backbone(config, run, teacher)
        module: nn.Module
        if config.mode in ("ce", "kd"):
            with keyed("head", run.seed):
                module = LinearClassifier(features, width, len(task.classes))
            seconds = self._fit(config, run, "distil", module, ("features", "head"), config.distil, box, vectors)
        else:
            with keyed("head", run.seed):
                projection = nn.Identity() if config.student is None else nn.Linear(width, vectors.shape[1])
            module = EmbeddingClassifier(features, projection, vectors)
            seconds = 0.0
            parts: tuple[str, ...] = ("features",)
            if config.mode == "one_stage":
                parts = ("features", "projection")
            elif config.align is not None and config.student is not None:
                seconds = self._fit(config, run, "align", module, ("projection",), config.align, box, vectors)
            seconds += self._fit(config, run, "distil", module, parts, config.distil, box, vectors)
        module.requires_grad_(True)
        figures |= {"train_seconds": seconds, "accuracy_source": self._source_accuracy(config, run, module)}
        run.record["weights"] = {"teacher": teacher.fingerprint()}
        plain = run.student(module.eval(), spec, config.data, figures)
        shape = VL2VShape(tower=config.student is None, dim=None if config.mode in ("ce", "kd") else vectors.shape[1])
        return VL2VStudent(plain.module, plain.model, plain.task, plain.figures, shape)

    def backbone(self, config: Config, run: Run, teacher: FrozenTeacher) -> tuple[ModelSpec, nn.Module, int]:
        """The student's network without its classifier, with its pre-trained weights."""
        shape = run.data(config.data).input_shape
        example = torch.zeros(1, *shape)
        if config.student is None:
            tower = ImageTower(copy.deepcopy(teacher.model), example)
            return config.teacher.network, tower, tower.width
        spec: TeacherSpec = config.student
        features = Backbone(run.network("student", spec, config.data), example, spec.embedding)
        return spec.network, features, features.width

    def _fit(
        self,
        config: Config,
        run: Run,
        name: str,
        student: nn.Module,
        trained: tuple[str, ...],
        train: TrainSpec,
        box: BlackBox,
        vectors: Tensor,
    ) -> float:
        """A stage; the student has its weights afterwards. Stored in the run's folder, so that an interrupted run
        resumes."""
        average = None if config.swad is None else DenseAverage()
        module = AdipTraining(
            student, trained, box.embed_images, config.mode, config.weight, vectors, 100.0, config.freeze_norms, average
        )

        def make() -> dict[str, Any]:
            checks = [run.loader(d, "val") for d in config.sources.values() if run.data(d).has("val")]
            if average is not None and len(checks) < len(config.sources):
                raise UserError("vl2v_adip: SWAD looks at held-out images of every source domain; set `val` of each.")

            def judged(model: nn.Module, device: torch.device) -> dict[str, float]:
                figures = validated(model, checks, box, config, device)
                if average is not None:
                    average.evaluated(figures["loss"])
                return figures

            fitted = run.fit(name, module, self.loader(config, run, train), train, evaluate=judged if checks else None)
            found = None if average is None or config.swad is None else average.result(**config.swad.model_dump())
            if found is not None:
                student.load_state_dict(found)
            return {"weights": state_on_cpu(student), "figures": {"seconds": fitted.seconds}}

        uses = {
            "start": student,
            "trained": list(trained),
            "train": train,
            "domains": {k: run.data(d) for k, d in config.sources.items()},
            "augment": [
                d.model_dump(mode="json", include={"augment", "cutmix", "mixup"}) for d in config.sources.values()
            ],
            "vectors": vectors,
            "teacher": box.source,
            "how": config.model_dump(mode="json", include={"mode", "weight", "swad", "freeze_norms"}),
            "seed": run.seed,
        }
        found = run.stage(name, make, uses, shared=False)
        student.load_state_dict(found["weights"])
        return float(found["figures"]["seconds"])

    def _source_accuracy(self, config: Config, run: Run, module: nn.Module) -> float:
        """Mean over the source domains of the accuracy on their test splits."""
        module = module.to(run.device)
        found = []
        for spec in config.sources.values():
            loader = run.loader(spec, "test" if run.data(spec).has("test") else "val")
            found.append(run.figures(module, spec, loader, run.device, ["accuracy"])["accuracy"])
        return sum(found) / len(found)

    @torch.no_grad()
    def _teacher_accuracy(self, config: Config, run: Run, box: BlackBox, vectors: Tensor) -> float:
        """Zero-shot accuracy of the teacher on the target domain."""
        spec, split = run.judging_data()
        right = count = 0
        for batch in run.loader(spec, split):
            batch = to_device(batch, run.device)
            near = F.normalize(box.embed_images(batch["input"]), dim=-1) @ vectors.to(run.device).T
            right += int((near.argmax(-1) == batch["label"]).sum())
            count += len(batch["label"])
        return right / count


def black_box(teacher: Any, device: torch.device) -> BlackBox:
    """A teacher that embeds images and texts, as two functions.

    Raises:
        UserError: a teacher of another task.
    """
    if not isinstance(teacher, FrozenTeacher) or not isinstance(teacher.task, ImageText):
        raise UserError(
            "vl2v_adip: the teacher must embed images and texts: give it data of that kind, such as data: "
            "{name: captions:cifar10}."
        )
    teacher.to(device)
    task = teacher.task

    def embed_images(images: Tensor) -> Tensor:
        found: Tensor = teacher({"input": images}).require("embedding")
        return found

    return BlackBox(embed_images, lambda names: task.class_vectors(teacher.model, names), teacher)


def validated(
    model: nn.Module, checks: list[Any], box: BlackBox, config: Config, device: torch.device
) -> dict[str, float]:
    """The mean loss and accuracy on held-out images of the source domains."""
    losses, rights = [], []
    with evaluating(model):
        for loader in checks:
            for batch in loader:
                batch = to_device(batch, device)
                images, labels = batch["input"], batch["label"]
                logits = model(images)
                rights.append((logits.argmax(-1) == labels).double())
                if isinstance(model, EmbeddingClassifier):
                    loss = adip_loss(
                        model.embed(images), box.embed_images(images), model.vectors, labels, config.weight
                    )
                    loss = loss + 1  # above 0, as SWAD's tolerance is a share
                else:
                    loss = F.cross_entropy(logits, labels)
                losses.append(loss.double() * len(labels))
    count = sum(len(r) for r in rights)
    return {"loss": float(torch.stack(losses).sum() / count), "accuracy": float(torch.cat(rights).mean())}


# ---- the product -----------------------------------------------------------------------------------------------------


class VL2VShape(Spec):
    """How a product's student is built again."""

    tower: bool = False
    dim: int | None = None


@dataclass
class VL2VStudent(Student):
    """Features with a map and class vectors, or with a linear classifier.

    Attributes:
        shape: how it is built again.
    """

    kind: ClassVar[str] = "stillhouse.methods.image_text.vl2v_adip:VL2VStudent"
    shape: VL2VShape = field(default_factory=VL2VShape)

    def extras(self) -> dict[str, Any]:
        return {"shape": self.shape.model_dump(mode="json")}

    @classmethod
    def rebuilt(cls, meta: Mapping[str, Any], spec: ModelSpec, task: Task, folder: Path) -> VL2VStudent:
        assert isinstance(task, Classification)
        shape, classes = VL2VShape.model_validate(meta["shape"]), len(task.classes)
        features = image_tower(spec, task.input_shape) if shape.tower else backbone(spec, task.input_shape)
        module: nn.Module
        if shape.dim is None:
            module = LinearClassifier(features, features.width, classes)
        else:
            projection = nn.Identity() if shape.tower else nn.Linear(features.width, shape.dim)
            module = EmbeddingClassifier(features, projection, torch.zeros(classes, shape.dim))
        load_weights(module, task.weights_file(folder), owner=f"model {spec.model}")
        return cls(module.eval(), spec, task, shape=shape)


evaluates(VL2VStudent.kind)(evaluate)

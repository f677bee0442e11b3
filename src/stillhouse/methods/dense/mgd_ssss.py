"""MGD: two complementary teachers of few labels teach a light student, by images, regions and pixels.

paper: Multi-Granularity Distillation Scheme Towards Lightweight Semi-Supervised Semantic Segmentation
venue: ECCV 2022
arxiv: 2208.10169
task: segmentation
family: semi-supervised
use when: few images have masks and many do not, and the network to be shipped is small
needs: images with masks, `data.unlabelled`, and two networks of other shapes than the student's, better than it

Stage 0 trains each teacher, one deep and thin, one wide and shallow, by cross pseudo supervision: two copies from
different initialisations learn the masks, and on unlabelled images each learns the other's hard labels; the first copy
is left. Stage 1 trains the student on three batches: one with masks, and two without, which are mixed (CutMix: three
boxes, which flip what they cover). It learns the masks; both teachers' hard labels on both kinds of images (pixels);
the deep teacher's mean logits of the mixed image (image: a sum, so its weight grows with the batch); and which of 7 x 7
regions are alike, by cosines of pooled last features, as the wide teacher has it (region). Both teachers are left out
afterwards.

Departures. The released loop leaves the teachers in training mode, so that their statistics drift; here they are in
evaluation mode (`teacher_train_bn` for theirs), and the student's own hard labels, which enter constants alone, are not
computed (`report_symmetric` adds these constants to what is logged). One forward of the student serves both batches. A
small number (1e-8) is added to the lengths of pooled features. Without a pre-trained wide and shallow network at hand,
the recipe's wide teacher is a wide pyramid on the first stages of the same published backbone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, MethodConfig, ModelSpec, TrainSpec
from stillhouse.distillation.objective import Progress
from stillhouse.distillation.teachers import Reader
from stillhouse.errors import UserError
from stillhouse.evaluation.judge import judge
from stillhouse.functional.counting import IGNORED
from stillhouse.functional.precision import full_precision
from stillhouse.methods.distillation import describe
from stillhouse.objectives.ce import cross_entropy
from stillhouse.runs.judging import check_groups
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, first_samples, to_device
from stillhouse.tasks.segmentation import Segmentation
from stillhouse.training.module import TrainingModule

SECOND = "unlabelled again"
"""The name of the second unlabelled batch."""
GRID = 7
COMPARED = 64  # test images on which networks are compared


# ---- mixing ----------------------------------------------------------------------------------------------------------


def box_masks(
    share: Tensor,
    aspect: Tensor,
    position: Tensor,
    size: tuple[int, int],
    area: tuple[float, float] = (0.25, 0.5),
) -> Tensor:
    """CutMix masks (n, 1, H, W) of 0 and 1: each of b boxes flips the pixels that it covers.

    A box has an area a and a height share a^v; both sides are multiplied by sqrt(1 / b), rounded to whole pixels, half
    to even, and placed where the rest leaves room.

    Args:
        share, aspect: (n, b) uniform in [0, 1): of the area between both ends of `area`, and v.
        position: (n, b, 2) uniform in [0, 1).
        size: H and W.
        area: the share of the image that all boxes cover together, if none overlaps.
    """
    room = torch.tensor(size, dtype=torch.float64, device=share.device)
    covered = area[0] + (area[1] - area[0]) * share.double()
    height = covered ** aspect.double()
    sides = torch.stack([height, covered / height], -1) * math.sqrt(1 / share.shape[1])
    sides = (sides * room).round()
    corner = ((room - sides) * position.double()).round()
    low, high = corner[..., None, None], (corner + sides)[..., None, None]
    rows = torch.arange(size[0], device=share.device)[:, None]
    columns = torch.arange(size[1], device=share.device)
    inside = (rows >= low[:, :, 0]) & (rows < high[:, :, 0]) & (columns >= low[:, :, 1]) & (columns < high[:, :, 1])
    return (inside.sum(1, keepdim=True) % 2).float()


def mixed(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """first where the mask is 0, second where it is 1: images or logits (B, C, H, W), masks (B, 1, H, W).

    Raises:
        UserError: shapes that do not fit, or on the CPU a mask of other values.
    """
    wanted = (len(first), 1, *first.shape[2:])
    if first.shape != second.shape or tuple(mask.shape) != wanted:
        raise UserError(
            f"mgd_ssss: batches of {tuple(first.shape)} and {tuple(second.shape)} cannot be mixed by masks of "
            f"{tuple(mask.shape)}; both must be alike, and masks {wanted}."
        )
    if mask.device.type == "cpu" and not bool(((mask == 0) | (mask == 1)).all()):
        raise UserError("mgd_ssss: a mask for mixing holds 0 and 1 alone, else labels of mixed logits mean nothing.")
    return torch.where(mask > 0, second, first)


# ---- terms -----------------------------------------------------------------------------------------------------------


@full_precision
def pixel_loss(logits: Tensor, labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Mean cross-entropy of maps (B, K, H, W) and labels (B, H, W); 0 where no pixel counts."""
    return cross_entropy(logits.movedim(1, -1), labels, ignore_index=ignore_index)


@full_precision
def hard_pixel_loss(
    logits: Tensor, labels: Tensor, ignore_index: int = IGNORED, threshold: float = 0.7, fewest: int = 100_000
) -> Tensor:
    """The cross-entropy of hard pixels (OHEM): those whose class has a probability of at most `threshold`, and the
    `fewest` least probable ones at least."""
    counted = labels != ignore_index
    plain = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    right = torch.where(counted, (-plain).exp().detach(), torch.inf)
    place = min(fewest, right.numel())
    least = right.flatten().kthvalue(place).values if place else right.new_zeros(())
    hard = counted & (right <= least.clamp_min(threshold))
    return (plain * hard).sum() / hard.sum().clamp_min(1)


@full_precision
def image_loss(student: Tensor, teacher: Tensor, reduction: Literal["sum", "mean"] = "sum") -> Tensor:
    """Sum over images and classes of |mean logit - the teacher's|; maps (B, K, H, W), the teacher's are constants.

    Raises:
        UserError: other classes or images.
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise UserError(
            f"mgd_ssss: the student gives {tuple(student.shape[:2])} images and classes, the deep teacher "
            f"{tuple(teacher.shape[:2])}; they must be alike."
        )
    apart = (student.mean((2, 3)) - teacher.detach().mean((2, 3))).abs()
    return apart.sum() if reduction == "sum" else apart.mean()


@full_precision
def affinity(features: Tensor, grid: int = GRID) -> Tensor:
    """(B, g^2, g^2) cosines of the regions of a grid, of maps (B, C, h, w) pooled to it.

    Raises:
        UserError: features that are no maps.
    """
    if features.ndim != 4:
        raise UserError(
            "mgd_ssss: the last features must be maps (B, C, h, w); given: "
            f" {tuple(features.shape)}. Name another `layer`."
        )
    q = F.adaptive_avg_pool2d(features, grid).flatten(2)
    length = q.norm(dim=1)
    return q.transpose(1, 2) @ q / (length[:, :, None] * length[:, None] + 1e-8)


@full_precision
def region_loss(student: Tensor, teacher: Tensor, grid: int = GRID) -> Tensor:
    """Mean square of the difference of affinities, of maps of any channels; the teacher's are constants."""
    return (affinity(student, grid) - affinity(teacher.detach(), grid)).square().mean()


@dataclass
class Outputs:
    """What a network gives in a step: logits (B, K, H, W) of labelled images, of both unlabelled batches and of the
    mixed one, and the last features (B, C, h, w) of the mixed one. None where nobody asks."""

    labelled: Tensor
    mixed: Tensor
    features: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None

    def pseudo(self, mask: Tensor) -> Tensor:
        """(B, H, W) hard labels of the mixed image: the arg max of mixed logits, without a threshold."""
        assert self.first is not None and self.second is not None
        return mixed(self.first, self.second, mask).argmax(1)

    def detached(self) -> Outputs:
        """The same as constants."""
        given = (self.labelled, self.mixed, self.features, self.first, self.second)
        return Outputs(*(None if x is None else x.detach() for x in given))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Rules:
    """Weights and forms of the terms: `image` lambda_1, `region` lambda_2, `pixel` 1; `teachers` whose hard labels
    count; `symmetric` whether losses of the teachers, which are constants, are given too."""

    image: float = 0.002
    region: float = 100.0
    pixel: float = 1.0
    teachers: tuple[str, ...] = ("wide", "deep")
    reduction: Literal["sum", "mean"] = "sum"
    grid: int = GRID
    hard: bool = False
    threshold: float = 0.7
    fewest: int = 100_000
    ignore_index: int = IGNORED
    symmetric: bool = False


def supervised_loss(logits: Tensor, labels: Tensor, rules: Rules) -> Tensor:
    """Of masks: the mean cross-entropy, or that of hard pixels."""
    if not rules.hard:
        return pixel_loss(logits, labels, rules.ignore_index)
    return hard_pixel_loss(logits, labels, rules.ignore_index, rules.threshold, rules.fewest)


def terms_of(
    student: Outputs, teachers: dict[str, Outputs], labels: Tensor, mask: Tensor, rules: Rules
) -> dict[str, Tensor]:
    """The weighted terms by name: `supervised`, `pixel_mixed`, `pixel_labelled`, `image`, `region`; and with
    `symmetric` the constants `supervised_wide`, `supervised_deep`, and those within the terms of pixels.

    Args:
        teachers: `wide` and `deep`; none are read that no weight needs.
        labels: (B, H, W).
        mask: (B, 1, H, W) of the mixing.
    """
    out = {"supervised": supervised_loss(student.labelled, labels, rules)}
    theirs = {name: teachers[name].detached() for name in teachers}
    if rules.pixel and rules.teachers:
        on_mixed = [pixel_loss(student.mixed, theirs[n].pseudo(mask)) for n in rules.teachers]
        on_labelled = [pixel_loss(student.labelled, theirs[n].labelled.argmax(1)) for n in rules.teachers]
        if rules.symmetric:
            own = student.detached()
            on_mixed += [pixel_loss(theirs[n].mixed, own.pseudo(mask)) for n in rules.teachers]
            on_labelled += [pixel_loss(theirs[n].labelled, own.labelled.argmax(1)) for n in rules.teachers]
        out["pixel_mixed"] = rules.pixel * torch.stack(on_mixed).sum()
        out["pixel_labelled"] = rules.pixel * torch.stack(on_labelled).sum()
    if rules.image:
        out["image"] = rules.image * image_loss(student.mixed, theirs["deep"].mixed, rules.reduction)
    if rules.region:
        mine, other = student.features, theirs["wide"].features
        assert mine is not None and other is not None
        out["region"] = rules.region * region_loss(mine, other, rules.grid)
    if rules.symmetric:
        out |= {f"supervised_{n}": supervised_loss(theirs[n].labelled, labels, rules) for n in ("wide", "deep")}
    return out


# ---- the recipe ------------------------------------------------------------------------------------------------------


class Network(ModelSpec):
    """A network, and where its last features are."""

    layer: str = Field(
        "decoder", description="The submodule whose output is the last map before the classifier; NAME:in is its input."
    )

    @property
    def network(self) -> ModelSpec:
        """The network alone."""
        return ModelSpec(**self.model_dump(include=set(ModelSpec.model_fields)))


class TrainedNetwork(Network):
    """A teacher and its training (stage 0)."""

    train: TrainSpec = Field(default_factory=TrainSpec, description="How it is fitted; once, shared by all seeds.")
    cross: float = Field(1.0, ge=0, description="Weight of the other copy's hard labels; 0: masks alone, one copy.")
    seed: int = Field(0, description="Of its weights and training.")


class Config(MethodConfig):
    data: Data = Field(description="With `unlabelled`.")
    student: Network
    deep: TrainedNetwork = Field(description="The deep and thin teacher, of image and pixels.")
    wide: TrainedNetwork = Field(description="The wide and shallow teacher, of regions and pixels.")
    image: float = Field(0.002, ge=0, description="lambda_1, times a sum over images and classes.")
    region: float = Field(100.0, ge=0, description="lambda_2, times a mean.")
    pixel: float = Field(1.0, ge=0, description="Of hard labels.")
    hard_labels: tuple[Literal["wide", "deep"], ...] = Field(
        ("wide", "deep"), description="Teachers whose hard labels count."
    )
    reduction: Literal["sum", "mean"] = Field("sum", description="Of the image's term; mean needs another lambda_1.")
    grid: int = Field(GRID, ge=1, description="Regions are of a grid of so many rows and columns.")
    boxes: int = Field(3, ge=1, description="Of CutMix.")
    area: tuple[float, float] = Field((0.25, 0.5), description="Share of the image that they cover together.")
    ohem: bool = Field(False, description="Of masks, learn hard pixels alone.")
    ohem_threshold: float = Field(0.7, gt=0, lt=1)
    ohem_fewest: int = Field(100_000, ge=1, description="Pixels of a batch that count at least.")
    teacher_train_bn: bool = Field(False, description="As released: the teachers' batch norms are in training mode.")
    report_symmetric: bool = Field(False, description="Log the teachers' losses too, which are constants.")
    train: TrainSpec = Field(default_factory=TrainSpec, description="How the student is fitted.")
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])

    @model_validator(mode="after")
    def _has_unlabelled_images(self) -> Config:
        if self.data.unlabelled is None:
            raise ValueError("it learns from unlabelled images too: set data.unlabelled, such as {size: 300}")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError("area is two shares of the image, the smaller first")
        return self

    @property
    def rules(self) -> Rules:
        """Weights and forms of the terms."""
        return Rules(
            self.image,
            self.region,
            self.pixel,
            self.hard_labels,
            self.reduction,
            self.grid,
            self.ohem,
            self.ohem_threshold,
            self.ohem_fewest,
            symmetric=self.report_symmetric,
        )

    @property
    def needs_teachers(self) -> tuple[str, ...]:
        """Teachers that some weight asks for."""
        wanted = set(self.hard_labels) if self.pixel else set()
        wanted |= {"deep"} if self.image else set()
        wanted |= {"wide"} if self.region else set()
        wanted |= {"wide", "deep"} if self.report_symmetric else set()
        return tuple(sorted(wanted))


class Mixing:
    """Draws masks, and mixes both unlabelled batches of a batch.

    Args:
        boxes: of a mask.
        area: the share that they cover.
    """

    def __init__(self, boxes: int, area: tuple[float, float]) -> None:
        self.boxes, self.area = boxes, area

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First and second images, masks by torch's generator, and the mixed images."""
        first, second = batch["unlabelled"]["input"], batch[SECOND]["input"]
        count = min(len(first), len(second))
        first, second = first[:count], second[:count]
        draws = torch.rand(count, self.boxes, 4, device=first.device)
        mask = box_masks(draws[..., 0], draws[..., 1], draws[..., 2:], tuple(first.shape[-2:]), self.area)
        mask = mask.to(first.dtype)
        return first, second, mask, mixed(first, second, mask)


def at_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Maps (B, K, H, W) at the pixels of labels (B, h, w), which are every n-th in each direction."""
    rows, columns = (-(-logits.shape[2 + i] // labels.shape[1 + i]) for i in (0, 1))
    return logits[:, :, ::rows, ::columns]


class CrossPseudo(TrainingModule):
    """Stage 0: two copies, each of which learns the masks and the other's hard labels of mixed images.

    Args:
        first, second: the copies; without a second, masks alone.
        task: how they are called.
        config: of the mixing and the masks' term.
        weight: of the other's hard labels.
    """

    def __init__(
        self, first: nn.Module, second: nn.Module | None, task: Segmentation, config: Config, weight: float
    ) -> None:
        super().__init__()
        self.student = nn.ModuleList([first] if second is None else [first, second])
        self.rules, self.weight = config.rules, weight
        self._mix = Mixing(config.boxes, config.area)
        self._readers = [Reader(network, "teacher", task=task) for network in self.student]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """`loss`, `supervised` and `cross`, unweighted."""
        images, labels = batch["input"], batch["label"]
        if len(self._readers) == 1:
            ce = supervised_loss(at_labels(_maps(self._readers[0], images), labels), labels, self.rules)
            return {"loss": ce, "supervised": ce}
        first, second, mask, both = self._mix(batch)
        with torch.no_grad():
            found = [_maps(reader, torch.cat([first, second])).chunk(2) for reader in self._readers]
            pseudo = [mixed(a, b, mask).argmax(1) for a, b in found]
        known_losses: list[Tensor] = []
        crossed_losses: list[Tensor] = []
        for reader, other in zip(self._readers, reversed(pseudo)):
            known, unknown = _maps(reader, torch.cat([images, both])).split([len(images), len(both)])
            known_losses.append(supervised_loss(at_labels(known, labels), labels, self.rules))
            crossed_losses.append(pixel_loss(unknown, other))
        supervised, crossed = torch.stack(known_losses).sum(), torch.stack(crossed_losses).sum()
        return {"loss": supervised + self.weight * crossed, "supervised": supervised, "cross": crossed}


def _maps(reader: Reader, images: Tensor) -> Tensor:
    """(B, K, H, W) at the images' size."""
    return reader({"input": images}).require("logits").movedim(-1, 1)


class MultiGranularity(TrainingModule):
    """Stage 1: the student, and both teachers, which are no part of the module.

    Args:
        student: the network.
        teachers: `wide` and `deep`, as far as they are needed.
        task: how networks are called.
        config: layers and weights.
    """

    def __init__(self, student: nn.Module, teachers: dict[str, nn.Module], task: Segmentation, config: Config) -> None:
        super().__init__()
        if any(student is teacher for teacher in teachers.values()):
            raise UserError("mgd_ssss: the student is a teacher itself; give networks of their own.")
        self.student = student
        self.config, self.rules = config, config.rules
        self._mix = Mixing(config.boxes, config.area)
        self._readers = {"student": Reader(student, "student", task=task)}
        self._readers |= {name: Reader(network, f"{name} teacher", task=task) for name, network in teachers.items()}

    def build(self, batch: Batch) -> None:
        """Move the teachers to the student's device, and make the hooks of regions."""
        device = next(self.student.parameters()).device
        for name, reader in self._readers.items():
            if name != "student":
                reader.model.to(device).requires_grad_(False).train(self.config.teacher_train_bn)
            if self.config.region and name in ("student", "wide"):
                probe = {"input": first_samples(batch, 2)["input"].to(device)}
                reader.attach({f"tap:{self._layer(name)}"}, probe)

    def close(self) -> None:
        """Leave no hook on the networks."""
        for reader in self._readers.values():
            reader.close()

    def _layer(self, name: str) -> str:
        layer: str = getattr(self.config, name).layer
        return layer

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.student.parameters())}]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """`loss` and the weighted terms."""
        images, labels = batch["input"], batch["label"]
        if len(self._readers) == 1:
            ce = supervised_loss(at_labels(_maps(self._readers["student"], images), labels), labels, self.rules)
            return {"loss": ce, "supervised": ce}
        first, second, mask, both = self._mix(batch)
        student = self._outputs("student", [images, both], labels)
        if self.rules.symmetric:
            with torch.no_grad():
                plain = self._outputs("student", [images, both, first, second], labels)
            student.first, student.second = plain.first, plain.second
        with torch.no_grad():
            inputs = [images, both, first, second]
            teachers = {n: self._outputs(n, inputs, labels) for n in self._readers if n != "student"}
        terms = terms_of(student, teachers, labels, mask, self.rules)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def _outputs(self, name: str, inputs: list[Tensor], labels: Tensor) -> Outputs:
        """One forward of a network over batches: labelled, mixed, and if given first and second."""
        signals = self._readers[name]({"input": torch.cat(inputs)})
        maps = signals.require("logits").movedim(-1, 1).split([len(x) for x in inputs])
        tap = signals.taps.get(self._layer(name))
        features = None if tap is None else tap[len(inputs[0]) : len(inputs[0]) + len(inputs[1])]
        return Outputs(at_labels(maps[0], labels), maps[1], features, *maps[2:])


# ---- the procedure ---------------------------------------------------------------------------------------------------

TEACHER = Stage("teacher", "train a teacher by cross pseudo supervision (stored, shared)")
STUDENT = Stage("student", "train the student")


class MultiGranularityDistillation(Method[Config]):
    unlabelled = True

    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data, Segmentation)
        check_groups(bundle.task, config.evaluate)
        stages = []
        if config.needs_teachers:
            networks = {name: self._teacher(name, config, run) for name in config.needs_teachers}
            specs = {name: getattr(config, name) for name in networks}
            steps = sum(s.train.epochs * len(run.streams(config.data, s.train.batch_size)) for s in specs.values())
            described = {name: describe(specs[name].model, network) for name, network in networks.items()}
            stages.append(TEACHER.filled(models=described, steps=steps))
        student = {"student": describe(config.student.model, run.model(config.student.network, config.data))}
        steps = config.train.epochs * len(run.streams(config.data, config.train.batch_size))
        does = f"train the student with {len(run.unlabelled(config.data, train=False))} unlabelled images"
        return [*stages, STUDENT.filled(does=does, models=student, steps=steps)]

    def run(self, config: Config, run: Run) -> Student:
        task = run.data(config.data, Segmentation).task
        figures: dict[str, float] = {}
        teachers: dict[str, nn.Module] = {}
        for name in config.needs_teachers:
            teachers[name] = self._teacher(name, config, run)
            trained = self._trained(name, config, run, teachers[name])
            teachers[name].load_state_dict(trained["weights"])
            figures |= trained["figures"]
        if config.image and config.reduction != "sum":
            run.live.say(
                "mgd_ssss: the image's term is a mean, so lambda_1 is not that of the paper, whose term is a sum."
            )
        student = run.model(config.student.network, config.data)
        module = MultiGranularity(student, teachers, task, config)
        loader = run.streams(config.data, config.train.batch_size, second=SECOND)
        evaluate, splits = run.validating(config.data), run.splits(config.data)
        fitted = run.fit(STUDENT, module, loader, config.train, evaluate=evaluate, splits=splits)
        figures |= likeness(module, run.loader(config.data, "test"), run.device)
        module.close()
        return run.student(student, config.student.network, config.data, {**figures, "train_seconds": fitted.seconds})

    @staticmethod
    def _teacher(name: str, config: Config, run: Run, role: str = "") -> nn.Module:
        spec: TrainedNetwork = getattr(config, name)
        return run.model(spec.network, config.data, f"{name} teacher{role}", spec.seed)

    def _trained(self, name: str, config: Config, run: Run, network: nn.Module) -> dict[str, Any]:
        """The weights of a teacher after stage 0, and its figures on test images: `miou_deep` or `miou_wide`."""
        spec: TrainedNetwork = getattr(config, name)
        bundle = run.data(config.data)

        def make() -> dict[str, Any]:
            with run.seeded(spec.seed):
                second = self._teacher(name, config, run, " copy") if spec.cross else None
                module = CrossPseudo(network, second, bundle.task, config, spec.cross)
                loader = run.streams(config.data, spec.train.batch_size, second=SECOND)
                run.fit(f"{TEACHER}.{name}", module, loader, spec.train)
            device = next(network.parameters()).device
            found = judge(bundle.task, network, run.loader(config.data, "test"), device, ["segmentation"])
            return {"weights": state_on_cpu(network), "figures": {f"miou_{name}": found["miou"]}}

        uses = {
            "teacher": spec.model_dump(mode="json", exclude={"train", "layer"}),
            "train": spec.train,
            "config": config.model_dump(
                mode="json", include={"data", "boxes", "area", "ohem", "ohem_threshold", "ohem_fewest"}
            ),
            "content": bundle.fingerprint,
        }
        return run.stage(f"{TEACHER}.{name}", make, uses)


@torch.no_grad()
def likeness(module: MultiGranularity, batches: Any, device: torch.device) -> dict[str, float]:
    """How the student compares with its teachers on test images: `affinity_error`, the mean square of the difference of
    regions' affinities to the wide one, `evidence_error`, the mean difference of mean logits to the deep one, and
    `teachers_differ`, the share of pixels that the teachers label differently."""
    readers, sums, seen = module._readers, dict[str, Tensor](), 0
    for batch in batches:
        if seen >= COMPARED:
            break
        images = to_device(batch, device)["input"]
        found, found_taps = {}, {}
        for name, reader in readers.items():
            reader.model.eval()
            signals = reader({"input": images})
            found[name] = signals.require("logits").movedim(-1, 1)
            found_taps[name] = signals.taps.get(module._layer(name))
        values: dict[str, Tensor] = {}
        mine, other = found_taps["student"], found_taps.get("wide")
        if mine is not None and other is not None:
            values["affinity_error"] = region_loss(mine, other, module.rules.grid)
        if "deep" in found:
            values["evidence_error"] = image_loss(found["student"], found["deep"], "mean")
        if "deep" in found and "wide" in found:
            values["teachers_differ"] = (found["deep"].argmax(1) != found["wide"].argmax(1)).float().mean()
        for key, value in values.items():
            sums[key] = sums.get(key, torch.zeros_like(value)) + value * len(images)
        seen += len(images)
    return {key: float(value) / seen for key, value in sums.items()}

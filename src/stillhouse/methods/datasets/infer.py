"""INFER: one additive tensor, learned for all classes at once, makes several versions of every real image, and one
stored logit vector labels each.

paper: Breaking Class Barriers: Efficient Dataset Distillation via Inter-Class Feature Compensator
venue: ICLR 2025
arxiv: 2408.06927
task: classification
family: dataset distillation
use when: per-epoch soft labels cost too much, and a few real images may be kept
needs: networks with BatchNorm2d of different architectures, trained on the real data; P real images a class

Of a budget of ipc images a class, P = floor(ipc / (M / classes + 1)) are natural; each of M networks adds P
compensators, shared by all classes, to one image of every class, so that P (M + 1) images train. A compensator lowers
cross-entropy plus the distance to the network's batch norms (first layer ten times) over a batch of one image of each
class. Labels are static (mean logits, mixed as images are mixed, `labels: static`) or the networks' logits of the mixed
views (`dynamic`, stored; train for epochs / (M + 1)). `compensate: null` spends the budget on natural images;
`iterations: 0` repeats the P images. Departs: sums use the compensator after the last step (the release, before it),
compensators are kept in half precision and images as tensors, not 8-bit files; no batch-norm layer is left out (the
release skips one of EfficientNet); crops are filled with the mean colour, the release's with black; accuracy is the
last epoch's, not the best. On digits (see Evidence) compensators bring the batch-norm distance to a third, and the set
is above as many natural images; but it is not above the same natural images repeated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Spec, Teacher
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.files import atomic_write
from stillhouse.functional.recovery import BatchNormStatistics, clamp_to_pixels, statistics_loss
from stillhouse.randomness import generator, permutation
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import read_meta
from stillhouse.runs.run import Run
from stillhouse.synthetic.config import DatasetConfig, Groups
from stillhouse.synthetic.descent import Cost, batch_view, descend
from stillhouse.synthetic.judging.evaluator import judge
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.real import RealRows
from stillhouse.synthetic.relabel import ViewLabels, Views, relabel, running_logits
from stillhouse.synthetic.synthesis import made_by, plan

Amount = TypeVar("Amount", Tensor, float)


class CompensateSpec(Spec):
    """How compensators are learned."""

    iterations: int = Field(
        1000, ge=0, description="Published: 1000 (CIFAR), 2000 (ImageNet); 0: the natural images, repeated."
    )
    lr: float = Field(
        0.25, gt=0, description="Adam with betas 0.5, 0.9; falls along a cosine. Of tiny images 0.05 to 0.1."
    )
    r_bn: float = Field(1.0, ge=0, description="Weight of the statistics; published: 1 (CIFAR), 0.01 (ImageNet).")
    first: float = Field(10.0, ge=0, description="Factor of the first layer's statistics.")
    jitter: int = Field(4, ge=0, description="Pixels of the random shift; published: 4 at 32, 32 at 224.")
    augment: Groups = Field("", description="Before the shift, one draw a step: resized_crop_flip for ImageNet.")


class Config(DatasetConfig):
    teachers: Annotated[list[Teacher], Field(min_length=1)] = Field(
        description="The networks, of different architectures; published: 4 (CIFAR), 3."
    )
    compensate: CompensateSpec | None = Field(
        default_factory=CompensateSpec, description="null: ipc natural images a class, the baseline."
    )
    labels: Literal["static", "dynamic"] = Field(
        "static", description="static: one vector an image; dynamic: one for each of the views."
    )
    views: Views = Field(
        default_factory=lambda: Views(augment="crop_flip", mix="mixup"),
        description="Crops, flips and mixup of training; `epochs` is of dynamic labels.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.zca:
            raise ValueError("zca whitens images, but the networks' batch norms know normalised ones; leave it false")
        if self.labels == "static" and self.views.mix == "cutmix":
            raise ValueError("views.mix: static labels mix as mixup does; take mixup or none, or labels: dynamic")
        return self


# ---- the mathematics -------------------------------------------------------------------------------------------------


def budget(ipc: int, networks: int, classes: int) -> int:
    """P, the natural images a class such that P * classes images and P * networks compensators are at most ipc *
    classes tensors.

    Raises:
        UserError: a budget too small for one.
    """
    natural = ipc * classes // (networks + classes)
    if natural < 1:
        raise UserError(
            f"ipc {ipc} with {networks} networks and {classes} classes leaves no natural image a class; raise ipc or "
            "take fewer networks."
        )
    return natural


def compensation_loss(
    network: nn.Module,
    statistics: BatchNormStatistics,
    natural: Tensor,
    compensator: Tensor,
    labels: Tensor,
    shift: Sequence[int],
    r_bn: float,
    first: float = 10.0,
) -> dict[str, Tensor]:
    """CE(f(x), y) + r_bn (first r_1 + the other r_l) of x = natural + compensator, rolled, as `loss`, with its parts.

    Args:
        statistics: of the network, which is in evaluation mode.
        natural: (classes, C, H, W), an image of every class.
        compensator: (1, C, H, W).
        labels: (classes,).
        shift: pixels down and right.
    """
    return _loss(network, statistics, torch.roll(natural + compensator, tuple(shift), (2, 3)), labels, r_bn, first)


def _loss(
    network: nn.Module, statistics: BatchNormStatistics, x: Tensor, labels: Tensor, r_bn: float, first: float
) -> dict[str, Tensor]:
    ce = F.cross_entropy(network(x).float(), labels)
    bn = statistics_loss(statistics.distances(), first)
    return {"loss": ce + r_bn * bn, "ce": ce, "bn": bn}


def compensated(natural: Tensor, compensators: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """All images (classes * P (M + 1), C, H, W), class-major: the natural ones, then those plus each network's
    compensators, clipped to pixels.

    Args:
        natural: (P, classes, C, H, W).
        compensators: (M, P, C, H, W).
    """
    sums = natural[None] + compensators.to(natural.dtype)[:, :, None]
    every = torch.cat([natural[None], sums]).flatten(0, 1)  # (M + 1) P, classes, …
    out = every.transpose(0, 1).flatten(0, 1).clone()
    clamp_to_pixels(out, mean, std)
    return out


def mixed(own: Amount, partner: Amount, share: float) -> Amount:
    """share * own + (1 - share) * partner: of images, and of their logits."""
    return share * own + (1 - share) * partner


# ---- the product -----------------------------------------------------------------------------------------------------


class StaticLabels(ViewLabels):
    """Logits (1, N, classes), one vector an image; each batch draws views, and mixes images and logits alike."""

    def batch(self, images: Tensor, rows: Tensor, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """Views and logits (b, classes) of these rows in batch `number` of an epoch."""
        x, partners, share = self.made.mixed(images, rows, epoch, number)
        logits = self.logits[0].float()
        return x, mixed(logits[rows], logits[partners], share)

    def order(self, count: int, epoch: int) -> tuple[Tensor, ...]:
        """The rows of the batches of an epoch."""
        return torch.tensor(permutation(count, self.made.seed, "views", epoch)).split(self.made.batch_size)


@dataclass
class CompensatedSet(SyntheticSet):
    """A synthetic set that keeps natural images (P, classes, C, H, W) and compensators (M, P, C, H, W); `images` are
    made from them."""

    kind: ClassVar[str] = "stillhouse.methods.datasets.infer:CompensatedSet"
    natural: Tensor = field(default_factory=lambda: torch.zeros(0))
    compensators: Tensor = field(default_factory=lambda: torch.zeros(0))

    @classmethod
    def of(
        cls,
        natural: Tensor,
        compensators: Tensor,
        classes: list[str],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        recipe: dict[str, object],
    ) -> CompensatedSet:
        """The set of these tensors; compensators are rounded to half precision."""
        natural, compensators = natural.detach().cpu(), compensators.detach().cpu().half()
        images = compensated(natural, compensators, mean, std)
        labels = torch.arange(len(classes)).repeat_interleave(len(images) // len(classes))
        return cls(
            images, labels, classes, mean, std, bounded=True, made_by=recipe, natural=natural, compensators=compensators
        )

    def __len__(self) -> int:
        """Stored images and compensators."""
        return self.natural.shape[0] * self.natural.shape[1] + self.compensators.shape[0] * self.compensators.shape[1]

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"natural": self.natural, "compensators": self.compensators}
        return {k: v for k, v in tensors.items() if v.numel()} | (
            {} if self.views is None else {"views": self.views.logits.cpu()}
        )

    def save(self, folder: Path) -> None:
        super().save(folder)
        meta = read_meta(folder)
        with atomic_write(folder / "product.json") as temporary:
            temporary.write_text(json.dumps({**meta, "static": isinstance(self.views, StaticLabels)}, indent=1))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> CompensatedSet:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        meta = read_meta(folder)
        try:
            t = load_file(str(Path(folder) / "images.safetensors"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"The compensated set in '{folder}' cannot be read ({error}).") from None
        natural = t["natural"]
        none = torch.zeros(0, *natural.shape[:1], *natural.shape[2:])
        made = cls.of(
            natural,
            t.get("compensators", none),
            meta["classes"],
            tuple(meta["mean"]),
            tuple(meta["std"]),
            meta["made_by"],
        )
        if meta["views"] is not None:
            made.views = (StaticLabels if meta["static"] else ViewLabels)(
                Views.model_validate(meta["views"]), t["views"]
            )
        made.check()
        return made


evaluates(CompensatedSet.kind)(judge)


# ---- the method ------------------------------------------------------------------------------------------------------


class InterClassFeatureCompensator(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        teachers = (
            [Stage("teacher", "train the networks with batch norm (stored, shared)")]
            if any(t.train for t in config.teachers)
            else []
        )
        spec, many = config.compensate, len(config.teachers)
        natural = budget(config.ipc, many, run.data(config.data).num_classes) if spec else config.ipc
        does = f"{natural} natural images a class" + (
            f" and {natural} compensators of each of {many} networks" if spec else ""
        )
        lines = plan(run, config, "compensate", does, natural * many * spec.iterations if spec else 0)
        return [*teachers, lines[0], Stage("relabel", f"{config.labels} labels: the networks' mean logits"), *lines[1:]]

    def run(self, config: Config, run: Run) -> CompensatedSet:
        networks = [
            run.network(f"teacher.{i}", t, config.data).to(run.device).eval().requires_grad_(False)
            for i, t in enumerate(config.teachers)
        ]
        real = RealRows.of(run, config.data)
        spec = config.compensate
        if spec is None:
            return self._labelled(config, run, networks, self._natural(config, run, real, config.ipc), None)
        natural = self._natural(config, run, real, budget(config.ipc, len(networks), len(real.classes)))
        found, cost, ends = [], Cost(), torch.zeros(2)
        for k, network in enumerate(networks):
            statistics = BatchNormStatistics(network)
            for j, images in enumerate(natural):
                u, spent, distances = self._learned(spec, run, network, statistics, images, (k, j))
                found.append(u)
                cost, ends = cost + spent, ends + distances
            statistics.close()
        compensators = torch.stack(found).view(len(networks), len(natural), *natural.shape[2:])
        made = self._labelled(config, run, networks, natural, compensators)
        if config.evaluate.scores and config.evaluate.protocol == "soft":
            made.random = self._labelled(config, run, networks, self._natural(config, run, real, config.ipc), None)
        made.figures |= cost.figures()
        made.figures |= {name: float(end) / len(found) for name, end in zip(("bn_natural", "bn_compensated"), ends)}
        return made

    def _natural(self, config: Config, run: Run, real: RealRows, count: int) -> Tensor:
        """(count, classes, C, H, W): random real images, one of every class in each row."""
        drawn = real.draw(count, generator(run.seed, "initial"), "natural images")
        return drawn.view(len(real.classes), count, *drawn.shape[1:]).transpose(0, 1).contiguous()

    def _learned(
        self,
        spec: CompensateSpec,
        run: Run,
        network: nn.Module,
        statistics: BatchNormStatistics,
        natural: Tensor,
        which: tuple[int, int],
    ) -> tuple[Tensor, Cost, Tensor]:
        """The compensator (C, H, W) of one network and one set of natural images, its cost, and the distances (2,) to
        the batch norms without and with it."""
        u = nn.Parameter(torch.zeros(1, *natural.shape[1:], device=natural.device))
        labels = torch.arange(len(natural), device=natural.device)

        def loss(i: int) -> dict[str, Tensor]:
            x = batch_view(natural + u, spec.augment, spec.jitter, generator(run.seed, "compensate", *which, i))
            return _loss(network, statistics, x, labels, spec.r_bn, spec.first)

        cost = descend(run, f"compensate.{which[0]}.{which[1]}", u, spec.lr, spec.iterations, loss)
        with torch.no_grad():
            ends = [
                compensation_loss(network, statistics, natural, v, labels, (0, 0), spec.r_bn, spec.first)["bn"]
                for v in (0 * u, u)
            ]
        return u.detach()[0], cost, torch.stack(ends).cpu()

    def _labelled(
        self, config: Config, run: Run, networks: list[nn.Module], natural: Tensor, compensators: Tensor | None
    ) -> CompensatedSet:
        """The set with its labels, and how often the networks' mean logits agree with the class."""
        bundle = run.data(config.data)
        none = natural.new_zeros(0, len(natural), *natural.shape[2:])
        made = CompensatedSet.of(
            natural,
            none if compensators is None else compensators,
            list(bundle.classes),
            tuple(bundle.mean),
            tuple(bundle.std),
            made_by(config),
        )
        images = made.images.to(run.device)
        logits = torch.stack([running_logits(network, images).cpu() for network in networks]).mean(0)
        if config.labels == "static":
            made.views = StaticLabels(config.views, logits.half()[None])
        else:
            teachers = [FrozenTeacher(network) for network in networks]
            uses = {"images": made, "views": config.views, "teachers": teachers}
            stored = run.stage("relabel", lambda: {"logits": relabel(networks, images, config.views).logits}, uses)
            made.views = ViewLabels(config.views, stored["logits"])
        made.check()
        made.figures = {"label_agreement": float((logits.argmax(1) == made.labels).double().mean())}
        made.figures["label_mb"] = made.views.logits.numel() * made.views.logits.element_size() / 1e6
        return made

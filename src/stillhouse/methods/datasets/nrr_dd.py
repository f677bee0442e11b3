"""NRR-DD: mosaics of real patches whose active regions stay as they are while the rest is optimised, labelled by two
numbers a view.

paper: Enhancing Dataset Distillation via Non-Critical Region Refinement
venue: CVPR 2025
arxiv: 2503.18267
task: classification
family: dataset distillation
use when: soft labels of every epoch cost too much, and real patches may be shown
needs: a network with BatchNorm2d and one linear layer on its last features, trained on the real data; real images

Discover: of square crops of real images those with the largest share of the class activation map are kept, and of them
the ones the network is least sure of (`choose: high` is RDED's rule) make mosaics. Refine: x <- clamp(x - M step) on
cross-entropy plus batch-norm distances, M = max(0, eps - C) of the mosaic's own map C (`per_patch`: of each patch's own
part of it): critical pixels stay exactly. Relabel: DBR keeps d_org and d_aug, the cross-entropies of the network's
prediction of a mixed view to both one-hot labels; students match them and the mixed hard labels (`labels: soft` stores
logits). No code was released, and eps, weights, iterations and crops are not confirmed by any text we found: they are
our choice, as are Adam (`optimizer: gradient` is the paper's form), ReLU and min-max of the map, one map at the start,
the filter to patches classified rightly, and L1 of distances. Maps are gradient times features, which equals CAM where
one linear layer follows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Spec, Teacher
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.functional.augmentation import apply
from stillhouse.functional.precision import full_precision
from stillhouse.functional.recovery import BatchNormStatistics, clamp_to_pixels, statistics_loss
from stillhouse.models.anatomy import stages
from stillhouse.randomness import generator
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.run import Run
from stillhouse.signals import Taps, evaluating
from stillhouse.synthetic.config import DatasetConfig, Groups
from stillhouse.synthetic.descent import Cost, batch_view, class_batches, descend
from stillhouse.synthetic.judging.evaluator import judge
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.real import RealRows
from stillhouse.synthetic.relabel import ViewLabels, Views, relabel
from stillhouse.synthetic.synthesis import made_by, plan
from stillhouse.synthetic.training import SoftTraining

FARTHEST = 50.0  # distances beyond this are all alike


def activation_map(network: nn.Module, taps: Taps, x: Tensor, labels: Tensor) -> Tensor:
    """Class activation maps (B, h, w) of the classes `labels` (B,), detached: sum_k F_k(h, w) dz_y/dF_k(h, w), times h
    w.

    Where the features are pooled, or flattened, into one linear layer this is the map of Zhou et al. (2016): its mean
    is the logit less the bias.

    Args:
        network: in evaluation mode.
        taps: of the network, with one name: where the features (B, K, h, w) are.
    """
    with torch.enable_grad():
        with taps.capture() as got:
            logits = network(x.detach().requires_grad_())
        features = got[taps.names[0]]
        if features.ndim != 4:
            raise UserError(
                f"An activation map needs features (B, K, h, w), but the tap '{taps.names[0]}' gives "
                f"{tuple(features.shape)}; set cam."
            )
        (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), features)
        found = (features * gradient).sum(1).detach().float()
    return found * found.shape[-2] * found.shape[-1]


def critical(activation: Tensor, size: tuple[int, int], tiles: int = 1) -> Tensor:
    """Maps (B, h, w) as (B, 1, H, W) in [0, 1]: negative parts cut off, enlarged (bilinear), from least to most of each
    image; a constant map is 0.

    Args:
        tiles: a side; above 1 each tile runs from least to most of its own.
    """
    grown = F.interpolate(activation.clamp_min(0)[:, None], size=size, mode="bilinear", align_corners=False)
    grown = grown.view(len(grown), tiles, size[0] // tiles, tiles, size[1] // tiles)
    low, high = grown.amin((2, 4), keepdim=True), grown.amax((2, 4), keepdim=True)
    found = torch.where(high - low > 1e-8, (grown - low) / (high - low).clamp_min(1e-8), torch.zeros_like(grown))
    return found.view(-1, 1, *size)


def mask(criticality: Tensor, eps: float) -> Tensor:
    """M = max(0, eps - C): 0 in critical regions, eps where nothing is active."""
    return (eps - criticality).clamp_min(0)


@torch.no_grad()
def masked_step(x: Tensor, before: Tensor, masked: Tensor) -> None:
    """Turn an optimiser's step, in place, from x into before + M (x - before); a pixel of mask 0 is exactly as it
    was."""
    x.copy_(before + masked * (x - before))


def boxes(count: int, area: float, drawn: torch.Generator) -> Tensor:
    """Square crops (count, 3) as top, left and side, shares of the image; the areas are uniform from `area` to 1."""
    side = (area + torch.rand(count, generator=drawn) * (1 - area)).sqrt()
    return torch.stack(
        [torch.rand(count, generator=drawn) * (1 - side), torch.rand(count, generator=drawn) * (1 - side), side], 1
    )


def share_inside(criticality: Tensor, box: Tensor) -> Tensor:
    """(B,): the part of each map (B, 1, H, W) that lies in its box (B, 3); a map of zeros counts as even."""
    height, width = criticality.shape[-2:]
    top, left, side = (v[:, None] for v in box.to(criticality.device).unbind(1))
    rows = (torch.arange(height, device=criticality.device) + 0.5) / height
    columns = (torch.arange(width, device=criticality.device) + 0.5) / width
    inside = ((rows >= top) & (rows < top + side))[:, :, None] & ((columns >= left) & (columns < left + side))[
        :, None, :
    ]
    weights = torch.where(criticality.amax((1, 2, 3), keepdim=True) > 0, criticality, torch.ones_like(criticality))[
        :, 0
    ]
    return (weights * inside).sum((1, 2)) / weights.sum((1, 2))


@torch.no_grad()
def discover(
    network: nn.Module,
    taps: Taps,
    images: Tensor,
    label: int,
    wanted: int,
    *,
    factor: int,
    crops: int,
    keep: float,
    area: float,
    choose: Literal["low", "high"],
    drawn: torch.Generator,
) -> Tensor:
    """Patches (wanted, C, H / factor, W / factor) of one class, of square crops of its real images (n, C, H, W).

    Those with the largest share of the image's activation are kept (`keep` of all), of them those that the network gets
    right, of them the least sure ones (`choose: high`, as RDED: the surest). Where they do not suffice, wrong ones
    follow, the surest of them first, and then all again, with a warning.
    """
    height, width = images.shape[-2:]
    y = torch.full((len(images),), label, device=images.device)
    maps = critical(activation_map(network, taps, images, y), (height, width))
    patches, shares, sure, right = [], [], [], []
    for _ in range(crops):
        box = boxes(len(images), area, drawn)
        top, left, side = box.unbind(1)
        cut = apply(images, (("resized_crop", (top, left, side, side)),))
        if factor > 1:
            cut = F.interpolate(cut, size=(height // factor, width // factor), mode="bilinear", antialias=True)
        seen = cut if factor == 1 else F.interpolate(cut, size=(height, width), mode="bilinear", align_corners=False)
        with evaluating(network):
            probs = network(seen).float().softmax(1)
        patches.append(cut)
        shares.append(share_inside(maps, box))
        sure.append(probs[:, label])
        right.append(probs.argmax(1) == label)
    patch, share, p, ok = torch.cat(patches), torch.cat(shares), torch.cat(sure), torch.cat(right)
    kept = share.argsort(dim=0, descending=True, stable=True)[: max(int(keep * len(share)), min(wanted, len(share)))]
    order = p[kept].argsort(dim=0, descending=choose == "high", stable=True)
    good, wrong = kept[order][ok[kept][order]], kept[p[kept].argsort(dim=0, descending=True, stable=True)]
    chosen = torch.cat([good, wrong[~ok[wrong]]])
    if len(good) < wanted:
        warnings.warn(
            f"Class {label} has {len(good)} patches that the network gets right, of {wanted} wanted; others follow.",
            stacklevel=2,
        )
        chosen = chosen.repeat(-(-wanted // len(chosen)))
    return patch[chosen[:wanted]]


def mosaic(patches: Tensor, factor: int) -> Tensor:
    """Patches (n factor^2, C, h, w) as (n, C, h factor, w factor), row by row."""
    channels, h, w = patches.shape[1:]
    grid = patches.view(-1, factor, factor, channels, h, w).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, channels, h * factor, w * factor).contiguous()


@full_precision
def distances(logits: Tensor, own: Tensor, partner: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, 2): -log softmax(z / T) at the image's own class and at its partner's, at most 50; logits (B, C), classes
    (B,)."""
    log_probs = F.log_softmax(logits / temperature, -1)
    return -log_probs.gather(1, torch.stack([own, partner], 1)).clamp_min(-FARTHEST)


@full_precision
def distance_loss(student: Tensor, teacher: Tensor, mixed: Tensor, norm: str = "l1") -> Tensor:
    """mean_b |d_org - d^S_org| + |d_aug - d^S_aug|, or squares; distances (B, 2).

    A view that is not mixed (`mixed` (B,) False) counts its distance once.
    """
    gap = (student - teacher).abs() if norm == "l1" else (student - teacher).square()
    return (gap[:, 0] + gap[:, 1] * mixed).mean()


class DiscoverSpec(Spec):
    """Which patches of real images make the mosaics."""

    factor: int = Field(1, ge=1, description="Patches a side; 1 up to 64 pixels, 2 at 224.")
    pool: int = Field(300, ge=1, description="Real images a class that are looked at.")
    crops: int = Field(5, ge=1, description="Crops of each; 1 on ImageNet.")
    area: float = Field(0.25, gt=0, le=1, description="The smallest share of the image that a crop keeps.")
    keep: float = Field(
        0.5, gt=0, le=1, description="The share of crops with the largest activation inside that are kept."
    )
    choose: Literal["low", "high"] = Field(
        "low", description="Of those that the network gets right: the least, or the most confident."
    )


class RefineSpec(Spec):
    """How the non-critical regions are refined."""

    iterations: int = Field(1000, ge=1)
    eps: float = Field(0.5, gt=0, description="Pixels at least this active stay; above 1 all are refined.")
    classes: int | None = Field(
        None, ge=1, description="Classes refined at a time, which bounds the memory; null: all. Published: 100."
    )
    lr: float = Field(0.1, gt=0, description="0.25 at 224 pixels, 0.05 to 0.1 at 32; falls along a cosine.")
    optimizer: Literal["adam", "gradient"] = Field(
        "adam", description="The masked step: of Adam with betas 0.5, 0.9, or the plain gradient."
    )
    alpha_bn: float = Field(0.1, ge=0, description="Weight of the statistics: 0.01 (ImageNet) to 1 (CIFAR).")
    first: float = Field(10.0, ge=0, description="Factor of the first layer's statistics.")
    jitter: int = Field(4, ge=0, description="Pixels of the random shift.")
    augment: Groups = Field("", description="Before the shift, one draw a step: resized_crop_flip for large images.")
    per_patch: bool = Field(
        False,
        description="Each patch of a mosaic has critical pixels of its own: its part of the map runs from 0 to 1.",
    )


class DistanceSpec(Spec):
    """How a student learns from distances."""

    alpha: float = Field(1.0, ge=0, description="Weight of the distances; 0: hard labels of the mixed views alone.")
    temperature: float = Field(1.0, gt=0, description="Of teacher and student.")
    norm: Literal["l1", "squared"] = Field("l1", description="How distances are compared.")


class Config(DatasetConfig):
    teacher: Teacher = Field(description="The network; one with `train` is trained first.")
    cam: str | None = Field(
        None, description="The submodule with the last convolutional features; default: the last stage."
    )
    discover: DiscoverSpec = Field(default_factory=DiscoverSpec)
    refine: RefineSpec | None = Field(default_factory=RefineSpec, description="null: the mosaics as they are.")
    labels: Literal["distances", "soft"] = Field(
        "distances", description="DBR's two numbers a view, or logits of every view."
    )
    relabel: Views = Field(default_factory=lambda: Views(epochs=300), description="The views that are labelled.")
    distances: DistanceSpec = Field(default_factory=DistanceSpec)

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.zca:
            raise ValueError("zca whitens images, but the network's batch norms know normalised ones; leave it false")
        return self


def refine_loss(
    network: nn.Module, statistics: BatchNormStatistics, x: Tensor, labels: Tensor, spec: RefineSpec
) -> dict[str, Tensor]:
    """L_C = CE(T(x), y) + alpha_bn (first r_1 + the other r_l), as `loss`, with its parts; x (B, C, H, W), labels
    (B,)."""
    ce = F.cross_entropy(network(x).float(), labels)
    bn = statistics_loss(statistics.distances(), spec.first)
    return {"loss": ce + spec.alpha_bn * bn, "ce": ce, "bn": bn}


class DistanceLabels(ViewLabels):
    """Two distances (epochs, N, 2) of each view, in half precision, in `logits`."""

    def views(self, images: Tensor, rows: Tensor, epoch: int, number: int) -> tuple[Tensor, Tensor, float, Tensor]:
        """Views, the partners' rows, the share of own pixels, and stored distances (b, 2)."""
        at = epoch % self.made.epochs
        return *self.made.mixed(images, rows, at, number), self.logits[at, rows].float()


@torch.no_grad()
def labelled(teacher: nn.Module, images: Tensor, labels: Tensor, made: Views, temperature: float) -> DistanceLabels:
    """The teacher's distances for all views of images (N, C, H, W) with class ids (N,)."""
    found = DistanceLabels(made, torch.zeros(made.epochs, len(images), 2, dtype=torch.float16))
    with evaluating(teacher):
        for epoch, number, rows in _batches(found, len(images)):
            x, partners, _ = made.mixed(images, rows, epoch, number)
            measured = distances(teacher(x), labels[rows].to(x.device), labels[partners].to(x.device), temperature)
            found.logits[epoch, rows] = measured.half().cpu()
    return found


def _batches(labels: ViewLabels, count: int) -> Iterator[tuple[int, int, Tensor]]:
    for epoch in range(labels.made.epochs):
        for number, rows in enumerate(labels.order(count, epoch)):
            yield epoch, number, rows


@dataclass
class DistanceSet(SyntheticSet):
    """A synthetic set whose views are labelled by two distances each."""

    kind: ClassVar[str] = "stillhouse.methods.datasets.nrr_dd:DistanceSet"

    def check(self) -> None:
        views, self.views = self.views, None
        super().check()
        if views is not None and views.logits.shape[1:] != (len(self.images), 2):
            raise UserError(
                f"Distances of views must have the shape (epochs, {len(self.images)}, 2); given: "
                f"{tuple(views.logits.shape)}."
            )
        self.views = None if views is None else DistanceLabels(views.made, views.logits)


@dataclass
class DistanceTraining(SoftTraining):
    """L = share CE(y_i) + (1 - share) CE(y_j) + alpha L_dbr, of views that are mixed of images i and j; the rest as
    soft training."""

    alpha: float = 1.0
    norm: str = "l1"
    at: float = 1.0  # the distances' temperature

    @classmethod
    def like(cls, given: SoftTraining, spec: DistanceSpec) -> DistanceTraining:
        return cls(**vars(given), alpha=spec.alpha, norm=spec.norm, at=spec.temperature)

    def loss(self, network: nn.Module, i: int) -> Tensor:
        epoch, number = divmod(i, self.steps_per_epoch)
        views, rows = self.synthetic.views, self.order(epoch)[number]
        assert isinstance(views, DistanceLabels)
        x, partners, share, stored = views.views(self.images, rows, epoch, number)
        own, partner = (self.synthetic.labels[r].to(x.device) for r in (rows, partners))
        logits = network(x).float()
        hard = share * F.cross_entropy(logits, own) + (1 - share) * F.cross_entropy(logits, partner)
        mixed = (partners != rows).to(x.device) & (share < 1)
        return hard + self.alpha * distance_loss(
            distances(logits, own, partner, self.at), stored.to(x.device), mixed, self.norm
        )


@evaluates(DistanceSet.kind)
def judge_distances(product: DistanceSet, run: Run) -> dict[str, float]:
    """As of any synthetic set (`stillhouse.synthetic.judging.evaluator`); with `evaluate.protocol: soft` students learn
    from the distances."""
    config: Any = run.config
    return judge(product, run, lambda plain: DistanceTraining.like(plain, config.distances))


def refined(
    spec: RefineSpec,
    run: Run,
    network: nn.Module,
    statistics: BatchNormStatistics,
    taps: Taps,
    start: Tensor,
    classes: slice,
    real: RealRows,
    slot: int,
    end: str,
    factor: int,
) -> tuple[Tensor, dict[str, float], Cost]:
    """Mosaics (C', C, H, W) of factor x factor patches, one of each of these classes, refined outside their critical
    regions, with what that did and cost; `end` is of the descent's name."""
    x, labels = nn.Parameter(start.clone()), torch.arange(classes.start, classes.stop, device=start.device)
    keys = (run.seed, "refine", slot, *([classes.start] if end else []))
    size = (x.shape[-2], x.shape[-1])
    regions = critical(activation_map(network, taps, start, labels), size, factor if spec.per_patch else 1)
    blank = int((regions.amax((1, 2, 3)) == 0).sum())
    if blank:
        warnings.warn(
            f"{blank} of {len(start)} mosaics have no active region; they are refined everywhere.", stacklevel=2
        )
    step_mask = mask(regions, spec.eps)
    before = torch.empty_like(start)

    def loss(i: int) -> dict[str, Tensor]:
        before.copy_(x.detach())
        seen = batch_view(x, spec.augment, spec.jitter, generator(*keys, i))
        return refine_loss(network, statistics, seen, labels, spec)

    def masked() -> None:
        masked_step(x, before, step_mask)
        clamp_to_pixels(x, real.mean, real.std)

    cost = descend(
        run, f"refine.{slot}{end}", x, spec.lr, spec.iterations, loss, plain=spec.optimizer == "gradient", after=masked
    )
    with torch.no_grad():
        ends = [refine_loss(network, statistics, v, labels, spec) for v in (start, x)]
    figures = {
        f"{name}_{when}": float(end[name]) for when, end in zip(("initial", "refined"), ends) for name in ("ce", "bn")
    }
    return x.detach(), figures | {"critical_pixels": float((step_mask == 0).double().mean())}, cost


class NonCriticalRegionRefinement(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        teacher = (
            []
            if config.teacher.train is None
            else [Stage("teacher", "train the network with batch norm (stored, shared)")]
        )
        steps = config.refine.iterations * config.ipc if config.refine else 0
        does = f"{config.ipc} mosaics a class" + (", refined where the network does not look" if config.refine else "")
        lines = plan(run, config, "refine", does, steps)
        return [
            *teacher,
            lines[0],
            Stage("relabel", f"label {config.relabel.epochs} epochs of views: {config.labels}"),
            *lines[1:],
        ]

    def run(self, config: Config, run: Run) -> SyntheticSet:
        network = run.network("teacher", config.teacher, config.data).to(run.device).eval().requires_grad_(False)
        real = RealRows.of(run, config.data)
        taps = Taps(network, [config.cam or stages(network)[-1]], "teacher")
        starts = self._mosaics(config, run, network, taps, real)
        parts, figures, cost = list(starts), {}, Cost()
        if config.refine is not None:
            statistics = BatchNormStatistics(network)
            seen: list[dict[str, float]] = []
            for slot, start in enumerate(starts):
                batches = []
                for classes, end in class_batches(len(start), config.refine.classes):
                    x, found, spent = refined(
                        config.refine, run, network, statistics, taps, start[classes], classes, real, slot, end,
                        config.discover.factor,
                    )  # fmt: skip
                    batches.append(x)
                    seen.append(found)
                    cost += spent
                parts[slot] = torch.cat(batches)
            statistics.close()
            figures = cost.figures() | {name: sum(s[name] for s in seen) / len(seen) for name in seen[0]}
        taps.remove()
        made = self._labelled(config, run, network, real, torch.stack(list(parts), 1).flatten(0, 1))  # class-major
        if config.evaluate.scores and config.evaluate.protocol == "soft":
            made.random = self._labelled(
                config, run, network, real, real.draw(config.ipc, generator(run.seed, "random"), "images (ipc)")
            )
        assert made.views is not None
        made.figures = {**figures, "label_mb": made.views.logits.numel() * made.views.logits.element_size() / 1e6}
        return made

    def _mosaics(self, config: Config, run: Run, network: nn.Module, taps: Taps, real: RealRows) -> Tensor:
        """(ipc, classes, C, H, W). Raises `UserError` for sides that `factor` does not divide."""
        spec, (_, height, width) = config.discover, real.shape
        if height % spec.factor or width % spec.factor:
            raise UserError(f"discover.factor {spec.factor} does not divide images of {height} x {width} pixels.")
        found = []
        for label, rows in enumerate(real.rows):
            drawn = generator(run.seed, "discover", label)
            pool = real.read(rows[torch.randperm(len(rows), generator=drawn)[: spec.pool]])
            patches = discover(
                network, taps, pool, label, config.ipc * spec.factor**2,
                factor=spec.factor, crops=spec.crops, keep=spec.keep, area=spec.area, choose=spec.choose, drawn=drawn,
            )  # fmt: skip
            found.append(mosaic(patches, spec.factor))
        images = torch.stack(found, 1)
        clamp_to_pixels(
            images.view(-1, *images.shape[2:]), real.mean, real.std
        )  # so that rounding does not move critical pixels later
        return images

    def _labelled(self, config: Config, run: Run, network: nn.Module, real: RealRows, images: Tensor) -> SyntheticSet:
        """Class-major images with their labels."""
        kind = DistanceSet if config.labels == "distances" else SyntheticSet
        labels = torch.arange(len(real.classes)).repeat_interleave(config.ipc)
        made = kind(images, labels, real.classes, real.mean, real.std, bounded=True, made_by=made_by(config))
        uses = {
            "images": made.fingerprint,
            "teacher": FrozenTeacher(network).fingerprint(),
            "views": config.relabel.model_dump(mode="json"),
            "labels": config.labels,
            "temperature": config.distances.temperature,
        }

        def make() -> dict[str, Tensor]:
            if config.labels == "soft":
                return {"logits": relabel([network], images, config.relabel).logits}
            return {"logits": labelled(network, images, labels, config.relabel, config.distances.temperature).logits}

        stored = run.stage("relabel", make, uses)["logits"]
        made.views = (DistanceLabels if config.labels == "distances" else ViewLabels)(config.relabel, stored)
        made.check()
        return made

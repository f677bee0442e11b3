"""NRR-DD: mosaics of real patches whose active regions stay as they are while the rest is optimised, labelled by two numbers a view.

paper: Enhancing Dataset Distillation via Non-Critical Region Refinement
venue: CVPR 2025
arxiv: 2503.18267
task: classification
family: dataset distillation
use when: soft labels of every epoch cost too much, and real patches may be shown
needs: a network with BatchNorm2d and one linear layer on its last features, trained on the real data; real images

Discover: of square crops of real images those with the largest share of the class activation map are kept, and of them the ones the network is least
sure of (`choose: high` is RDED's rule) make mosaics. Refine: x <- clamp(x - M step) on cross-entropy plus batch-norm distances, M = max(0, eps - C)
of the mosaic's own map C (`per_patch`: of each patch's own part of it): critical pixels stay exactly. Relabel: DBR keeps d_org and d_aug, the
cross-entropies of the network's prediction of a mixed view to both one-hot labels; students match them beside the mixed hard labels (`labels: soft`
stores logits). No code was released, and eps, weights, iterations and crops are not confirmed by any text we found: they are our choice, as are Adam
(`optimizer: gradient` is the paper's form), ReLU and min-max of the map, one map at the start, the filter to patches classified rightly, and L1 of
distances. Maps are gradient times features, which equals CAM where one linear layer follows.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Spec, Teacher
from stillhouse.distillation.teachers import Frozen
from stillhouse.errors import UserError
from stillhouse.functional.recovery import BatchNormStatistics, clamp_to_pixels, statistics_loss
from stillhouse.methods.datasets.nrr_dd.distances import DistanceLabels, DistanceSet, DistanceSpec, labelled
from stillhouse.methods.datasets.nrr_dd.refining import activation_map, critical, discover, mask, masked_step, mosaic
from stillhouse.models.anatomy import stages
from stillhouse.randomness import generator
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.run import Run
from stillhouse.signals import Taps
from stillhouse.synthetic.config import DatasetConfig, Groups
from stillhouse.synthetic.descent import Cost, batch_view, descend
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.real import RealRows
from stillhouse.synthetic.relabel import ViewLabels, Views, relabel
from stillhouse.synthetic.synthesis import made_by, plan


class DiscoverSpec(Spec):
    """Which patches of real images make the mosaics."""

    factor: int = Field(1, ge=1, description="Patches a side; 1 up to 64 pixels, 2 at 224.")
    pool: int = Field(300, ge=1, description="Real images a class that are looked at.")
    crops: int = Field(5, ge=1, description="Crops of each; 1 on ImageNet.")
    area: float = Field(0.25, gt=0, le=1, description="The smallest share of the image that a crop keeps.")
    keep: float = Field(0.5, gt=0, le=1, description="The share of crops with the largest activation inside that are kept.")
    choose: Literal["low", "high"] = Field("low", description="Of those that the network gets right: the least, or the most confident.")


class RefineSpec(Spec):
    """How the non-critical regions are refined."""

    iterations: int = Field(1000, ge=1)
    eps: float = Field(0.5, gt=0, description="Pixels at least this active stay; above 1 all are refined.")
    lr: float = Field(0.1, gt=0, description="0.25 at 224 pixels, 0.05 to 0.1 at 32; falls along a cosine.")
    optimizer: Literal["adam", "gradient"] = Field("adam", description="The masked step: of Adam with betas 0.5, 0.9, or the plain gradient.")
    alpha_bn: float = Field(0.1, ge=0, description="Weight of the statistics: 0.01 (ImageNet) to 1 (CIFAR).")
    first: float = Field(10.0, ge=0, description="Factor of the first layer's statistics.")
    jitter: int = Field(4, ge=0, description="Pixels of the random shift.")
    augment: Groups = Field("", description="Before the shift, one draw a step: resized_crop_flip for large images.")
    per_patch: bool = Field(False, description="Each patch of a mosaic has critical pixels of its own: its part of the map runs from 0 to 1.")


class Config(DatasetConfig):
    teacher: Teacher = Field(description="The network; one with `train` is trained first.")
    cam: str | None = Field(None, description="The submodule with the last convolutional features; default: the last stage.")
    discover: DiscoverSpec = Field(default_factory=DiscoverSpec)
    refine: RefineSpec | None = Field(default_factory=RefineSpec, description="null: the mosaics as they are.")
    labels: Literal["distances", "soft"] = Field("distances", description="DBR's two numbers a view, or logits of every view.")
    relabel: Views = Field(default_factory=lambda: Views(epochs=300), description="The views that are labelled.")
    distances: DistanceSpec = Field(default_factory=DistanceSpec)

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.zca:
            raise ValueError("zca whitens images, but the network's batch norms know normalised ones; leave it false")
        return self


class NonCriticalRegionRefinement(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        teacher = [] if config.teacher.train is None else [Stage("teacher", "train the network with batch norm (kept, shared)")]
        steps = config.refine.iterations * config.ipc if config.refine else 0
        does = f"{config.ipc} mosaics a class" + (", refined where the network does not look" if config.refine else "")
        lines = plan(run, config, "refine", does, steps)
        return [*teacher, lines[0], Stage("relabel", f"label {config.relabel.epochs} epochs of views: {config.labels}"), *lines[1:]]

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
                parts[slot], found, spent = refined(config.refine, run, network, statistics, taps, start, real, slot, config.discover.factor)
                seen.append(found)
                cost += spent
            statistics.close()
            figures = cost.figures() | {name: sum(s[name] for s in seen) / len(seen) for name in seen[0]}
        taps.remove()
        made = self._labelled(config, run, network, real, torch.stack(list(parts), 1).flatten(0, 1))  # class-major
        if config.evaluate.scores and config.evaluate.protocol == "soft":
            made.random = self._labelled(config, run, network, real, real.draw(config.ipc, generator(run.seed, "random"), "images (ipc)"))
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
        clamp_to_pixels(images.view(-1, *images.shape[2:]), real.mean, real.std)  # so that rounding does not move critical pixels later
        return images

    def _labelled(self, config: Config, run: Run, network: nn.Module, real: RealRows, images: Tensor) -> SyntheticSet:
        """Class-major images with their labels."""
        kind = DistanceSet if config.labels == "distances" else SyntheticSet
        labels = torch.arange(len(real.classes)).repeat_interleave(config.ipc)
        made = kind(images, labels, real.classes, real.mean, real.std, bounded=True, made_by=made_by(config))
        uses = {
            "images": made.fingerprint,
            "teacher": Frozen(network).fingerprint(),
            "views": config.relabel.model_dump(mode="json"),
            "labels": config.labels,
            "temperature": config.distances.temperature,
        }

        def make() -> dict[str, Tensor]:
            if config.labels == "soft":
                return {"logits": relabel([network], images, config.relabel).logits}
            return {"logits": labelled(network, images, labels, config.relabel, config.distances.temperature).logits}

        kept = run.stage("relabel", make, uses)["logits"]
        made.views = (DistanceLabels if config.labels == "distances" else ViewLabels)(config.relabel, kept)
        made.check()
        return made


def refine_loss(network: nn.Module, statistics: BatchNormStatistics, x: Tensor, labels: Tensor, spec: RefineSpec) -> dict[str, Tensor]:
    """L_C = CE(T(x), y) + alpha_bn (first r_1 + the other r_l), as `loss`, with its parts; x (B, C, H, W), labels (B,)."""
    ce = F.cross_entropy(network(x).float(), labels)
    bn = statistics_loss(statistics.distances(), spec.first)
    return {"loss": ce + spec.alpha_bn * bn, "ce": ce, "bn": bn}


def refined(
    spec: RefineSpec,
    run: Run,
    network: nn.Module,
    statistics: BatchNormStatistics,
    taps: Taps,
    start: Tensor,
    real: RealRows,
    slot: int,
    factor: int,
) -> tuple[Tensor, dict[str, float], Cost]:
    """Mosaics (classes, C, H, W) of factor x factor patches, one of every class, refined outside their critical regions, with what that did and cost."""
    x, labels = nn.Parameter(start.clone()), torch.arange(len(start), device=start.device)
    size = (x.shape[-2], x.shape[-1])
    regions = critical(activation_map(network, taps, start, labels), size, factor if spec.per_patch else 1)
    blank = int((regions.amax((1, 2, 3)) == 0).sum())
    if blank:
        warnings.warn(f"{blank} of {len(start)} mosaics have no active region; they are refined everywhere.", stacklevel=2)
    step_mask = mask(regions, spec.eps)
    before = torch.empty_like(start)

    def loss(i: int) -> dict[str, Tensor]:
        before.copy_(x.detach())
        seen = batch_view(x, spec.augment, spec.jitter, generator(run.seed, "refine", slot, i))
        return refine_loss(network, statistics, seen, labels, spec)

    def masked() -> None:
        masked_step(x, before, step_mask)
        clamp_to_pixels(x, real.mean, real.std)

    cost = descend(run, f"refine.{slot}", x, spec.lr, spec.iterations, loss, plain=spec.optimizer == "gradient", after=masked)
    with torch.no_grad():
        ends = [refine_loss(network, statistics, v, labels, spec) for v in (start, x)]
    figures = {f"{name}_{when}": float(end[name]) for when, end in zip(("initial", "refined"), ends) for name in ("ce", "bn")}
    return x.detach(), figures | {"critical_pixels": float((step_mask == 0).double().mean())}, cost

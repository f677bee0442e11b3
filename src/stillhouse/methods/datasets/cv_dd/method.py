"""CV-DD: pairs of a committee of networks vote on each recovered image, and all of them label its views by the
statistics of the batch itself.

paper: Dataset Distillation via Committee Voting
venue: arXiv 2025
arxiv: 2501.07575
task: classification
family: dataset distillation
use when: several trained networks are at hand, and soft labels of every epoch may be stored
needs: networks with BatchNorm2d, trained on the real data; how good the images of each alone are (`priors`); real
images to begin with

Recover: image s of each class is learned under the s-th pair of networks (`pairs`), whose losses (cross-entropy and
batch-norm distances, as SRe2L) are weighted by softmax(prior / 5), priors in percent; it begins as a real crop of
medium difficulty (`init: medium`), and each step sees one crop, flip and shift of the batch. Relabel: batch norms use
the statistics of each half batch of views (`statistics: batch`), and logits are weighted by softmax(prior / 10).
Student: AdamW without decay of one-dimensional parameters, gradients of `accumulate` batches, the rate along a
stretched cosine (`stretch`: the paper's eta). `priors: null` measures them, as the authors do: each network alone makes
images, the first labels them, a network learns from them and is tested, here on all real training images (its own began
as crops of a few). `voters: 1` is SRe2L++, the baseline. `factor: 2` begins with mosaics of four crops. Figures:
`bn_outside_m`, the batch-norm distances under network m of images on which it did not vote; `views_agreement`, how
often labels by the batch and by the running statistics name the same class. Departs: mixup labels are of mixed images,
where the release labels the unmixed; running statistics stay as they were; accuracy is the last epoch's. The networks
of `paper` are this package's forms for 32 pixels. On digits (see Evidence) labels by the batch are worth two points and
name the class of the running statistics on 94 % of views. The vote itself shows no gain: pairs are neither better nor
closer to a third network than the images of one (`one_voter`), and a ResNet learns more from real digits under the same
labels (`random`).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Spec, Teacher
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.functional.augmentation import Strength, all_of, apply
from stillhouse.functional.recovery import BatchNormStatistics, clamp_to_pixels
from stillhouse.methods.datasets.cv_dd.committee import (
    chosen,
    committee_loss,
    compared,
    medium_first,
    relabelled,
    statistics_distance,
    vote_weights,
)
from stillhouse.methods.datasets.cv_dd.training import CommitteeSet, StretchedTraining, StudentSpec
from stillhouse.randomness import generator
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.run import Run
from stillhouse.synthetic.config import DatasetConfig, Groups
from stillhouse.synthetic.descent import Cost, batch_view, class_batches, descend
from stillhouse.synthetic.real import RealRows
from stillhouse.synthetic.relabel import ViewLabels, Views, running_logits
from stillhouse.synthetic.synthesis import made_by, plan
from stillhouse.synthetic.training import SoftTraining, train


class RecoverSpec(Spec):
    """How images are recovered."""

    iterations: int = Field(4000, ge=0, description="0 leaves the images as they began.")
    classes: int | None = Field(
        None, ge=1, description="Classes recovered at a time, which bounds the memory; null: all. Published: 100."
    )
    lr: float = Field(0.25, gt=0, description="Adam with betas 0.5, 0.9; falls along a cosine.")
    r_bn: float = Field(0.01, ge=0, description="Weight of the statistics.")
    first: float = Field(10.0, ge=0, description="Factor of the first layer's statistics.")
    jitter: int = Field(4, ge=0, description="Pixels of the random shift; published: 4, and 32 at 224.")
    augment: Groups = Field("resized_crop_flip", description="Before the shift, one draw a step for the whole batch.")
    area: float = Field(
        0.08, gt=0, le=1, description="The smallest share of the image that a crop keeps, here and where images begin."
    )
    init: Literal["easy", "medium", "hard", "noise"] = Field(
        "medium", description="Real crops by how sure the first network is of their class, or noise."
    )
    factor: int = Field(1, ge=1, description="Crops a side of a mosaic; published: 1 up to 64 pixels, 2 at 224.")
    pool: int = Field(300, ge=1, description="Real images a class that are looked at.")
    crops: int = Field(5, ge=1, description="Crops of each, of which the surest is taken.")


class MeasureSpec(Spec):
    """How priors are measured, once for all seeds and budgets."""

    ipc: int = Field(1, ge=1, description="Images a class of each network alone; published: 50 (CIFAR), 10.")
    epochs: int = Field(30, ge=1, description="Of labels and of the network that learns from them; published: 300.")


class Config(DatasetConfig):
    committee: Annotated[list[Teacher], Field(min_length=1)] = Field(
        description="The networks; published: 5 of different architectures."
    )
    priors: list[float] | None = Field(
        None, description="Accuracy in percent of a network trained on the images of each alone; null: measure."
    )
    measure: MeasureSpec = Field(default_factory=MeasureSpec, description="priors null: how they are measured.")
    voters: int = Field(2, ge=1, description="Networks of one image; 1 is SRe2L++ with the first network alone.")
    vote: Literal["prior", "equal", "random"] = Field("prior", description="Weights of the voters.")
    pairs: Literal["in_turn", "random", "best"] = Field(
        "in_turn", description="Published: best (ipc 1), in_turn (10), random (50)."
    )
    vote_temperature: float = Field(5.0, gt=0, description="Of priors, in recovery.")
    label_temperature: float = Field(10.0, gt=0, description="Of priors, in labelling.")
    recover: RecoverSpec = Field(default_factory=RecoverSpec)
    relabel: Views = Field(default_factory=lambda: Views(epochs=300, batch_size=16))
    statistics: Literal["batch", "running"] = Field("batch", description="Of the batch norms while they label.")
    student: StudentSpec = Field(default_factory=StudentSpec)

    @model_validator(mode="after")
    def _fits(self) -> Config:
        members = len(self.committee)
        if self.zca:
            raise ValueError("zca whitens images, but the networks' batch norms know normalised ones; leave it false")
        if self.voters > members:
            raise ValueError(f"voters is {self.voters}, but the committee has {members}")
        if self.priors is not None:
            if len(self.priors) != members:
                raise ValueError(f"priors has {len(self.priors)} numbers, but the committee has {members}")
            vote_weights(self.priors, 1.0)
        return self


class CommitteeVoting(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        teachers = (
            [Stage("teacher", "train the committee (stored, shared)")] if any(t.train for t in config.committee) else []
        )
        priors = (
            [Stage("priors", "measure how good the images of each network alone are (stored, shared)")]
            if self._measures(config)
            else []
        )
        steps = config.recover.iterations * config.ipc
        lines = plan(
            run,
            config,
            "recover",
            f"{config.ipc} times: recover an image of each class by {config.voters} of the networks",
            steps,
        )
        return [
            *teachers,
            *priors,
            lines[0],
            Stage("relabel", f"label {config.relabel.epochs} epochs of views by all networks"),
            *lines[1:],
        ]

    def _measures(self, config: Config) -> bool:
        return (
            config.priors is None and len(config.committee) > 1 and (config.vote == "prior" or config.pairs == "best")
        )

    def run(self, config: Config, run: Run) -> CommitteeSet:
        members = [
            run.network(f"teacher.{i}", t, config.data).to(run.device).eval().requires_grad_(False)
            for i, t in enumerate(config.committee)
        ]
        real = RealRows.of(run, config.data)
        priors = config.priors or [50.0] * len(members)
        if self._measures(config):
            priors = [self._prior(config, run, real, members, m) for m in range(len(members))]
        parts, cost = [], Cost()
        outside: dict[int, list[float]] = {}
        starts = begin(real, members[0], config.recover, config.ipc, generator(run.seed, "begin")).to(run.device)
        for slot, start in enumerate(starts):
            voters = chosen(slot, len(members), config.voters, config.pairs, priors, run.seed)
            weights = vote(config, [priors[m] for m in voters], generator(run.seed, "vote", slot))
            networks = [members[m] for m in voters]
            x, spent = recover(
                config.recover, run, f"recover.{slot}", networks, weights, start, real, ("recover", run.seed, slot)
            )
            parts.append(x)
            cost += spent
            for m in set(range(len(members))) - set(voters):
                outside.setdefault(m, []).append(statistics_distance(members[m], x, config.recover.first))
        images = torch.stack(parts, 1).flatten(0, 1)  # class-major
        shares = (
            vote_weights(priors, config.label_temperature).tolist()
            if config.vote == "prior"
            else [1 / len(members)] * len(members)
        )
        made = self._labelled(config, run, real, members, shares, images)
        if config.evaluate.scores and config.evaluate.protocol == "soft":
            made.random = self._labelled(
                config, run, real, members, shares, real.draw(config.ipc, generator(run.seed, "random"), "images (ipc)")
            )
        run.record["priors"] = priors
        made.figures = cost.figures() | {f"bn_outside_{m}": fmean(found) for m, found in sorted(outside.items())}
        if config.statistics == "batch":
            made.figures |= compared(members, shares, images, config.relabel)
        made.figures |= {f"prior_{m}": value for m, value in enumerate(priors)} if self._measures(config) else {}
        return made

    def _prior(self, config: Config, run: Run, real: RealRows, members: list[nn.Module], m: int) -> float:
        """Accuracy in percent, on the real training images, of a network trained on images of member m alone, labelled
        by the first member."""
        spec, views = config.measure, config.relabel.model_copy(update={"epochs": config.measure.epochs})

        def alone() -> dict[str, Tensor]:
            starts = begin(real, members[0], config.recover, spec.ipc, generator("begin", m)).to(run.device)
            each = [
                recover(config.recover, run, f"alone.{i}", [members[m]], [1.0], x, real, ("alone", m, i))[0]
                for i, x in enumerate(starts)
            ]
            images = torch.stack(each, 1).flatten(0, 1)
            return {"images": images, "logits": relabelled(members[:1], [1.0], images, views, config.statistics)}

        data = run.data(config.data).fingerprint
        uses = {
            "members": [FrozenTeacher(members[0]).fingerprint(), FrozenTeacher(members[m]).fingerprint()],
            "recover": config.recover.model_dump(mode="json"),
            "labels": [views.model_dump(mode="json"), config.statistics],
            "data": data,
            "member": [m, spec.ipc],
        }
        stored = run.stage(f"priors.{m}", alone, uses)
        made = self._set(config, real, stored["images"])
        made.views = ViewLabels(views, stored["logits"])
        evaluate = config.evaluate.model_copy(update={"epochs": spec.epochs})
        training = StretchedTraining.like(
            SoftTraining.of(made, evaluate, config.augment, run.device, ("prior", m)), config.student
        )

        def learned() -> dict[str, float]:
            network = run.model(config.network, config.data, role="prior", seed=0).to(run.device)
            train(run, "student", network, training)
            right = [
                running_logits(network, real.read(rows)).argmax(1).cpu() == real.labels[rows]
                for rows in torch.arange(len(real.labels)).split(512)
            ]
            return {"prior": 100 * float(torch.cat(right).double().mean())}

        uses = {
            "set": made.fingerprint,
            "training": training.facts(),
            "network": config.network.model_dump(mode="json"),
            "data": data,
        }
        return float(run.stage(f"priors.{m}.student", learned, uses)["prior"])

    def _set(self, config: Config, real: RealRows, images: Tensor) -> CommitteeSet:
        labels = torch.arange(len(real.classes)).repeat_interleave(len(images) // len(real.classes))
        return CommitteeSet(images, labels, real.classes, real.mean, real.std, bounded=True, made_by=made_by(config))

    def _labelled(
        self, config: Config, run: Run, real: RealRows, members: list[nn.Module], shares: list[float], images: Tensor
    ) -> CommitteeSet:
        made = self._set(config, real, images)
        uses = {
            "images": made.fingerprint,
            "members": [FrozenTeacher(network).fingerprint() for network in members],
            "shares": shares,
            "views": config.relabel.model_dump(mode="json"),
            "statistics": config.statistics,
        }
        stored = run.stage(
            "relabel", lambda: {"logits": relabelled(members, shares, images, config.relabel, config.statistics)}, uses
        )
        made.views = ViewLabels(config.relabel, stored["logits"])
        made.check()
        return made


def vote(config: Config, priors: Sequence[float], drawn: torch.Generator) -> list[float]:
    """The weights of the voters with these priors; they sum to 1."""
    if config.vote == "prior":
        return [float(w) for w in vote_weights(priors, config.vote_temperature)]
    shares = torch.rand(len(priors), generator=drawn) if config.vote == "random" else torch.ones(len(priors))
    return [float(w) for w in shares / shares.sum()]


def recover(
    spec: RecoverSpec,
    run: Run,
    name: str,
    networks: Sequence[nn.Module],
    weights: Sequence[float],
    start: Tensor,
    real: RealRows,
    keys: tuple[int | str, ...],
) -> tuple[Tensor, Cost]:
    """Images (classes, C, H, W) learned from `start`, one of every class, under the weighted losses of the networks,
    and what that cost."""
    statistics = [BatchNormStatistics(network) for network in networks]

    def of_classes(classes: slice, end: str) -> tuple[Tensor, Cost]:
        x, labels = nn.Parameter(start[classes].clone()), torch.arange(len(start), device=start.device)[classes]
        drawn = (*keys, *([classes.start] if end else []))

        def loss(i: int) -> dict[str, Tensor]:
            seen = batch_view(x, spec.augment, spec.jitter, generator(*drawn, i), spec.area)
            return committee_loss(networks, statistics, weights, seen, labels, spec.r_bn, spec.first)

        def clamp() -> None:
            clamp_to_pixels(x, real.mean, real.std)

        cost = descend(run, f"{name}{end}", x, spec.lr, spec.iterations, loss, after=clamp)
        return x.detach(), cost

    parts, costs = zip(*(of_classes(*each) for each in class_batches(len(start), spec.classes)))
    for each in statistics:
        each.close()
    return torch.cat(parts), sum(costs, Cost())


@torch.no_grad()
def begin(real: RealRows, judge: nn.Module, spec: RecoverSpec, ipc: int, drawn: torch.Generator) -> Tensor:
    """How images begin: (ipc, classes, C, H, W), noise clamped to pixels, or mosaics of factor x factor real crops of
    the wanted difficulty.

    Of each of `pool` images a class the crop that `judge` is surest of is taken; images are ordered by that
    probability of their class.

    Raises:
        UserError: fewer real images of a class than ipc * factor^2, or sides that `factor` does not divide.
    """
    (channels, height, width), classes = real.shape, len(real.classes)
    if spec.init == "noise":
        x = torch.randn(ipc, classes, *real.shape, generator=drawn)
        clamp_to_pixels(x.view(-1, *real.shape), real.mean, real.std)
        return x
    if height % spec.factor or width % spec.factor:
        raise UserError(f"recover.factor {spec.factor} does not divide images of {height} x {width} pixels.")
    least, wanted = min(spec.pool, int(real.counts.min())), ipc * spec.factor**2
    if wanted > least:
        raise UserError(
            f"{wanted} real images of each class are needed (ipc * factor^2), but {least} are looked at; raise "
            "recover.pool or lower ipc."
        )
    taken = []
    for label, rows in enumerate(real.rows):
        pool = real.read(rows[torch.randperm(len(rows), generator=drawn)[: spec.pool]])
        taken.append(_surest_crops(pool, label, judge, spec, drawn)[:wanted])
    tiles, f, small = torch.cat(taken), spec.factor, (height // spec.factor, width // spec.factor)
    if f > 1:
        tiles = F.interpolate(tiles, size=small, mode="bilinear", antialias=True)
    grid = tiles.view(classes, ipc, f, f, channels, *small).permute(1, 0, 4, 2, 5, 3, 6)
    return grid.reshape(ipc, classes, *real.shape).contiguous()


def _surest_crops(pool: Tensor, label: int, judge: nn.Module, spec: RecoverSpec, drawn: torch.Generator) -> Tensor:
    """Of each image (n, C, H, W) of a class the crop that `judge` is surest of, those of the wanted difficulty
    first."""
    count, size = len(pool), (pool.shape[-2], pool.shape[-1])
    crops = [
        apply(pool, all_of(("resized_crop",), count, size, drawn, Strength(area=spec.area))) for _ in range(spec.crops)
    ]
    sure = torch.stack([running_logits(judge, crop).softmax(1)[:, label] for crop in crops])  # crops, images
    best = torch.stack(crops)[sure.argmax(0), torch.arange(count, device=pool.device)]
    ranks = {"easy": list(range(count - 1, -1, -1)), "hard": list(range(count)), "medium": medium_first(count)}[
        spec.init
    ]
    return best[sure.amax(0).argsort(stable=True)[torch.tensor(ranks, device=pool.device)]]

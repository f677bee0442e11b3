"""CV-DD: pairs of a committee of networks vote on each recovered image, and all of them label its views by the statistics of the batch itself.

paper: Dataset Distillation via Committee Voting
venue: arXiv 2025
arxiv: 2501.07575
task: classification
family: dataset distillation
use when: several trained networks are at hand, and soft labels of every epoch may be stored
needs: networks with BatchNorm2d, trained on the real data; how good the images of each alone are (`priors`); real images to begin with

Recover: image s of each class is learned under the s-th pair of networks (`pairs`), whose losses (cross-entropy and batch-norm distances, as SRe2L) are
weighted by softmax(prior / 5), priors in percent; it begins as a real crop of medium difficulty (`init: medium`), and each step sees one crop, flip and shift
of the batch. Relabel: batch norms use the statistics of each half batch of views (`statistics: batch`), and logits are weighted by softmax(prior / 10).
Student: AdamW without decay of one-dimensional parameters, gradients of `accumulate` batches, the rate along a stretched cosine (`stretch`: the paper's eta).
`priors: null` measures them, as the authors do: each network alone makes images, the first labels them, a network learns from them and is tested, here on the
real training images, which it has not seen. `voters: 1` is SRe2L++, the baseline. `factor: 2` begins with mosaics of four crops. Departs: mixup labels are of mixed images, where
the release labels the unmixed; running statistics stay as they were; accuracy is the last epoch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.recovery import BatchNormStatistics, clamp_to_pixels
from stillhouse.functional.siamese import Strength, all_of, apply, groups_of
from stillhouse.methods.datasets.cv_dd.learning import CommitteeSet, StretchedTraining, StudentSpec
from stillhouse.methods.datasets.cv_dd.voting import chosen, committee_loss, medium_first, relabelled, running_labels, vote_weights
from stillhouse.randomness import generator
from stillhouse.recipe import Spec, Teacher
from stillhouse.run import Method, Run, Stage
from stillhouse.synthetic.config import DatasetConfig
from stillhouse.synthetic.real import RealImages
from stillhouse.synthetic.relabel import ViewLabels, Views
from stillhouse.synthetic.synthesis import Held, made_by, plan
from stillhouse.synthetic.training import SoftTraining, train
from stillhouse.teachers import Frozen


class RecoverSpec(Spec):
    """How images are recovered."""

    iterations: int = Field(4000, ge=0, description="0 leaves the images as they began.")
    lr: float = Field(0.25, gt=0, description="Adam with betas 0.5, 0.9; falls along a cosine.")
    r_bn: float = Field(0.01, ge=0, description="Weight of the statistics.")
    first: float = Field(10.0, ge=0, description="Factor of the first layer's statistics.")
    jitter: int = Field(4, ge=0, description="Pixels of the random shift; published: 4, and 32 at 224.")
    augment: str = Field("resized_crop_flip", description="Before the shift, one draw a step for the whole batch.")
    area: float = Field(0.08, gt=0, le=1, description="The smallest share of the image that a crop keeps, here and where images begin.")
    init: Literal["easy", "medium", "hard", "noise"] = Field(
        "medium", description="Real crops by how sure the first network is of their class, or noise."
    )
    factor: int = Field(1, ge=1, description="Crops a side of a mosaic; published: 1 up to 64 pixels, 2 at 224.")
    pool: int = Field(300, ge=1, description="Real images a class that are looked at.")
    crops: int = Field(5, ge=1, description="Crops of each, of which the surest is kept.")


class MeasureSpec(Spec):
    """How priors are measured, once for all seeds and budgets."""

    ipc: int = Field(1, ge=1, description="Images a class of each network alone; published: 50 (CIFAR), 10.")
    epochs: int = Field(30, ge=1, description="Of labels and of the network that learns from them; published: 300.")


class Config(DatasetConfig):
    committee: Annotated[list[Teacher], Field(min_length=1)] = Field(description="The networks; published: 5 of different architectures.")
    priors: list[float] | None = Field(None, description="Accuracy in percent of a network trained on the images of each alone; null: measure.")
    measure: MeasureSpec = Field(default_factory=MeasureSpec, description="priors null: how they are measured.")
    voters: int = Field(2, ge=1, description="Networks of one image; 1 is SRe2L++ with the first network alone.")
    vote: Literal["prior", "equal", "random"] = Field("prior", description="Weights of the voters.")
    pairs: Literal["in_turn", "random", "best"] = Field("in_turn", description="Published: best (ipc 1), in_turn (10), random (50).")
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
        teachers = [Stage("teacher", "train the committee (kept, shared)")] if any(t.train for t in config.committee) else []
        priors = [Stage("priors", "measure how good the images of each network alone are (kept, shared)")] if self._measures(config) else []
        steps = config.recover.iterations * config.ipc
        lines = plan(run, config, "recover", f"{config.ipc} times: recover an image of each class by {config.voters} of the networks", steps)
        return [*teachers, *priors, lines[0], Stage("relabel", f"label {config.relabel.epochs} epochs of views by all networks"), *lines[1:]]

    def _measures(self, config: Config) -> bool:
        return config.priors is None and len(config.committee) > 1 and (config.vote == "prior" or config.pairs == "best")

    def run(self, config: Config, run: Run) -> CommitteeSet:
        members = [run.network(f"teacher.{i}", t, config.data).to(run.device).eval().requires_grad_(False) for i, t in enumerate(config.committee)]
        real = RealImages.load(run, config.data)
        priors = config.priors or [50.0] * len(members)
        if self._measures(config):
            priors = [self._prior(config, run, real, members, m) for m in range(len(members))]
        parts, seconds = [], 0.0
        starts = begin(real, members[0], config.recover, config.ipc, generator(run.seed, "begin"))
        for slot, start in enumerate(starts):
            voters = chosen(slot, len(members), config.voters, config.pairs, priors, run.seed)
            weights = vote(config, [priors[m] for m in voters], generator(run.seed, "vote", slot))
            x, spent = recover(
                config.recover, run, f"recover.{slot}", [members[m] for m in voters], weights, start, real, ("recover", run.seed, slot)
            )
            parts.append(x)
            seconds += spent
        images = torch.stack(parts, 1).flatten(0, 1)  # class-major
        shares = vote_weights(priors, config.label_temperature).tolist() if config.vote == "prior" else [1 / len(members)] * len(members)
        made = self._labelled(config, run, real, members, shares, images)
        if config.evaluate.scores and config.evaluate.protocol == "soft":
            made.random = self._labelled(config, run, real, members, shares, real.draw(config.ipc, generator(run.seed, "random"), "images (ipc)"))
        run.record["priors"] = priors
        made.figures = {"distil_seconds": seconds, "distil_iterations": float(config.recover.iterations * config.ipc)}
        made.figures |= {f"prior_{m}": value for m, value in enumerate(priors)} if self._measures(config) else {}
        with torch.no_grad():
            said = torch.stack([w * running_labels(n, images) for w, n in zip(shares, members)]).sum(0)
        made.figures["label_agreement"] = float((said.argmax(1).cpu() == made.labels).double().mean())
        return made

    def _prior(self, config: Config, run: Run, real: RealImages, members: list[nn.Module], m: int) -> float:
        """Accuracy in percent, on the real training images, of a network trained on images of member m alone, labelled by the first member."""
        spec, views = config.measure, config.relabel.model_copy(update={"epochs": config.measure.epochs})

        def make() -> dict[str, float]:
            starts = begin(real, members[0], config.recover, spec.ipc, generator("begin", m))
            each = [recover(config.recover, run, f"alone.{i}", [members[m]], [1.0], x, real, ("alone", m, i))[0] for i, x in enumerate(starts)]
            images = torch.stack(each, 1).flatten(0, 1)
            made = self._set(config, real, images)
            made.views = ViewLabels(views, relabelled(members[:1], [1.0], images, views, config.statistics))
            evaluate = config.evaluate.model_copy(update={"epochs": spec.epochs})
            training = SoftTraining.of(made, evaluate, config.augment, run.device, ("prior", m))
            network = run.model(config.network, config.data, role="prior", seed=0).to(run.device)
            train(run, "student", network, StretchedTraining.like(training, config.student))
            right = running_labels(network, real.images).argmax(1) == real.labels
            return {"prior": 100 * float(right.double().mean())}

        uses = {
            "members": [Frozen(members[0]).fingerprint(), Frozen(members[m]).fingerprint()],
            "recover": config.recover.model_dump(mode="json"),
            "views": views.model_dump(mode="json"),
            "student": [config.student.model_dump(mode="json"), config.network.model_dump(mode="json"), config.statistics],
            "evaluate": config.evaluate.model_dump(mode="json", include={"lr", "weight_decay", "temperature"}),
            "measure": spec.model_dump(mode="json"),
            "data": run.data(config.data).fingerprint,
            "member": m,
        }
        return float(run.stage(f"priors.{m}", make, uses)["prior"])

    def _set(self, config: Config, real: RealImages, images: Tensor) -> CommitteeSet:
        labels = torch.arange(len(real.classes)).repeat_interleave(len(images) // len(real.classes))
        return CommitteeSet(images, labels, real.classes, real.mean, real.std, bounded=True, made_by=made_by(config))

    def _labelled(self, config: Config, run: Run, real: RealImages, members: list[nn.Module], shares: list[float], images: Tensor) -> CommitteeSet:
        made = self._set(config, real, images)
        uses = {
            "images": made.fingerprint,
            "members": [Frozen(network).fingerprint() for network in members],
            "shares": shares,
            "views": config.relabel.model_dump(mode="json"),
            "statistics": config.statistics,
        }
        kept = run.stage("relabel", lambda: {"logits": relabelled(members, shares, images, config.relabel, config.statistics)}, uses)
        made.views = ViewLabels(config.relabel, kept["logits"])
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
    real: RealImages,
    keys: tuple[int | str, ...],
) -> tuple[Tensor, float]:
    """Images (classes, C, H, W) learned from `start`, one of every class, under the weighted losses of the networks, and the seconds that took."""
    x, labels = nn.Parameter(start.clone()), torch.arange(len(start), device=start.device)
    if not spec.iterations:
        return x.detach(), 0.0
    statistics = [BatchNormStatistics(network) for network in networks]
    optimiser = torch.optim.Adam([x], spec.lr, betas=(0.5, 0.9))
    groups, size, strength = groups_of(spec.augment), (x.shape[-2], x.shape[-1]), Strength(area=spec.area)

    def step(i: int) -> dict[str, Tensor]:
        for group in optimiser.param_groups:
            group["lr"] = spec.lr * 0.5 * (1 + math.cos(math.pi * i / spec.iterations))
        drawn = generator(*keys, i)
        seen = apply(x, all_of(groups, 1, size, drawn, strength))
        shift = torch.randint(0, spec.jitter + 1, (2,), generator=drawn).tolist()
        found = committee_loss(networks, statistics, weights, torch.roll(seen, shift, (2, 3)), labels, spec.r_bn, spec.first)
        optimiser.zero_grad()
        found["loss"].backward()
        optimiser.step()
        clamp_to_pixels(x, real.mean, real.std)
        return {k: v.detach() for k, v in found.items()}

    seconds = run.loop(name, {"images": Held(x), "optimiser": optimiser}, step, spec.iterations)
    for each in statistics:
        each.close()
    return x.detach(), seconds


@torch.no_grad()
def begin(real: RealImages, judge: nn.Module, spec: RecoverSpec, ipc: int, drawn: torch.Generator) -> Tensor:
    """How images begin: (ipc, classes, C, H, W), noise clamped to pixels, or mosaics of factor x factor real crops of the wanted difficulty.

    Of each of `pool` images a class the crop that `judge` is surest of is kept; images are ordered by that probability of their class.

    Raises:
        UserError: fewer real images of a class than ipc * factor^2, or sides that `factor` does not divide.
    """
    shape, classes = real.images.shape[1:], len(real.classes)
    if spec.init == "noise":
        x = torch.randn(ipc, classes, *shape, generator=drawn).to(real.images)
        clamp_to_pixels(x.view(-1, *shape), real.mean, real.std)
        return x
    if shape[-2] % spec.factor or shape[-1] % spec.factor:
        raise UserError(f"recover.factor {spec.factor} does not divide images of {shape[-2]} x {shape[-1]} pixels.")
    count, wanted = min(spec.pool, int(real.counts.min())), ipc * spec.factor**2
    if wanted > count:
        raise UserError(
            f"{wanted} real images of each class are needed (ipc * factor^2), but {count} are looked at; raise recover.pool or lower ipc."
        )
    pool = real.draw(count, drawn, "real images (recover.pool)")
    labels = torch.arange(classes, device=pool.device).repeat_interleave(count)
    size = (shape[-2], shape[-1])
    crops = [apply(pool, all_of(("resized_crop",), len(pool), size, drawn, Strength(area=spec.area))) for _ in range(spec.crops)]
    sure = torch.stack([F.softmax(running_labels(judge, c), 1).gather(1, labels[:, None])[:, 0] for c in crops])  # crops, images
    best = torch.stack(crops)[sure.argmax(0), torch.arange(len(pool), device=pool.device)].view(classes, count, *shape)
    ranks = {"easy": list(range(count - 1, -1, -1)), "hard": list(range(count)), "medium": medium_first(count)}[spec.init][:wanted]
    order = sure.amax(0).view(classes, count).argsort(dim=1, stable=True)[:, torch.tensor(ranks)]
    taken = best[torch.arange(classes, device=best.device)[:, None], order]  # classes, wanted, …
    f, small = spec.factor, (size[0] // spec.factor, size[1] // spec.factor)
    tiles = taken.flatten(0, 1) if f == 1 else F.interpolate(taken.flatten(0, 1), size=small, mode="bilinear", antialias=True)
    grid = tiles.view(classes, ipc, f, f, shape[0], *small).permute(1, 0, 4, 2, 5, 3, 6)
    return grid.reshape(ipc, classes, *shape).contiguous()

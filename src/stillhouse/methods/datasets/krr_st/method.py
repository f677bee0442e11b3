"""KRR-ST: a few unlabelled synthetic images with target representations, from which a backbone is pre-trained by plain
regression.

paper: Self-Supervised Dataset Distillation for Transfer Learning
venue: ICLR 2024
arxiv: 2310.06511
task: pretraining
family: dataset distillation
use when: data have no labels, and small backbones of many kinds shall be pre-trained quickly, for other data sets too
needs: unlabelled images; a self-supervised target network (trained here by Barlow Twins where it has no weights);
networks with batch norm

Images X_s and representations Y_s are learned so that ridge regression of Y_s on the features of X_s (a linear kernel,
solved in closed form) predicts the target's representations of real images. Features come from a pool of networks, each
trained a step on (X_s, Y_s) when it is visited. Departs: the kernel system is solved in float64; X_s begins as
normalised pixels, like the real images (`start: raw` is the release's raw pixels); a network at its limit restarts with
its count at 0 (`literal_restart` is the release, which keeps such a slot untrained for good); crops are padded after
the normalisation. Judged by a linear layer on frozen features (`evaluate.probe: finetune` is the paper's), compared
with backbones not pre-trained. `iterations: 0` is the honest baseline: random real images with the target's
representations. On digits (see Evidence) learning lowers the regression's error on unseen images by a fifth, but probes
are not above those of the baseline, which goes three quarters of the way from an untrained backbone to the target
itself; fifty random images in place of twenty lower the error by more, for one point.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config.specs import Data, MethodConfig, Model, Spec
from stillhouse.errors import UserError
from stillhouse.evaluation import cost
from stillhouse.functional.augmentation import apply
from stillhouse.methods.datasets.krr_st.product import RepresentationSet
from stillhouse.methods.datasets.krr_st.ridge import Pool, Regressor, outer_loss, outer_optimizer
from stillhouse.methods.datasets.krr_st.target import TargetSpec, represented, target_network
from stillhouse.methods.datasets.krr_st.transfer import TransferSpec, check_target, judge
from stillhouse.models import build
from stillhouse.randomness import generator, keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.run import Run
from stillhouse.synthetic.config import AugmentSpec
from stillhouse.synthetic.descent import Cost
from stillhouse.synthetic.real import RealImages, unnormalised
from stillhouse.synthetic.synthesis import TensorState
from stillhouse.synthetic.training import augmentation

LAST_RATE = 1e-3  # the share of the outer rate at the end of its linear fall


class PoolSpec(Spec):
    """The networks whose features the outer problem sees."""

    networks: int = Field(10, ge=1)
    limit: int = Field(
        1000,
        ge=1,
        description="Steps until a network is initialised again; at the start each has had a random number of them. "
        "Where it is far below the steps of pre-training, the set suits only young networks.",
    )
    lr: float = Field(0.1, gt=0, description="SGD with momentum 0.9 on all synthetic images.")
    weight_decay: float = Field(1e-3, ge=0)
    literal_restart: bool = Field(
        False, description="As released: a slot at its limit holds a fresh, untrained network at every later visit."
    )


class Config(MethodConfig):
    data: Data
    network: Model = Field(description="The backbone that the set is made for; its classifier is removed.")
    target: TargetSpec
    images: int = Field(100, ge=1, description="m: synthetic images in all.")
    start: Literal["normalised", "raw"] = Field("normalised", description="raw: pixels in [0, 1], as released.")
    iterations: int = Field(1000, ge=0, description="Outer steps; published: 160000. 0: random real images.")
    batch_real: int = Field(1024, ge=1)
    lr: float = Field(
        1e-4,
        gt=0,
        description="Of images and representations: AdamW, falling linearly to a thousandth; published: 1e-4 or 1e-5.",
    )
    clip: float | None = Field(None, gt=0, description="Clip the norm of the outer gradient.")
    ridge: float = Field(1e-6, gt=0, description="lam as a share of the trace of the kernel.")
    augment: AugmentSpec = Field(
        default_factory=lambda: AugmentSpec(groups="", always="crop_flip"),
        description="Of real images, an own draw each; never of synthetic ones.",
    )
    pool: PoolSpec = Field(default_factory=PoolSpec)
    evaluate: TransferSpec = Field(default_factory=TransferSpec)


evaluates(RepresentationSet.kind)(judge)


class SelfSupervisedDistillation(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        spec, target = config.evaluate, config.target
        for data in spec.targets:
            check_target(data, run.data(data), tuple(run.data(config.data).input_shape))
        stages = []
        if target.trained:
            stages.append(
                Stage(
                    "target",
                    "train the target network by Barlow Twins (stored, shared)",
                    {"target": target.network.model},
                )
            )
        if config.iterations:
            stages.append(
                Stage(
                    "pool",
                    f"train {config.pool.networks} networks on the set as it begins",
                    {"network": config.network.model},
                )
            )
        does = (
            f"learn {config.images} images and representations"
            if config.iterations
            else f"take {config.images} random real images"
        )
        networks = (
            f"pre-train {spec.networks} networks on the set, and train them and untrained ones on "
            f"{len(spec.targets) or 1} data sets ({spec.probe})"
        )
        return [*stages, Stage("krr_st", does, steps=config.iterations), Stage("evaluate", networks)]

    def run(self, config: Config, run: Run) -> RepresentationSet:
        real = RealImages.load(run, config.data)
        if config.images > len(real.images):
            raise UserError(
                f"{config.images} synthetic images begin as as many real ones, but the training split has "
                f"{len(real.images)}; take fewer."
            )
        if not bool(real.images.isfinite().all()):
            raise UserError(
                f"The training images of '{config.data.name}' hold NaN or infinite pixels; krr_st learns from every "
                "one of them."
            )
        target = target_network(run, config.target, config.data, real.images)
        rows = torch.randperm(len(real.images), generator=generator(run.seed, "initial"))[: config.images].to(
            real.images.device
        )
        images = nn.Parameter(
            real.images[rows].clone()
            if config.start == "normalised"
            else unnormalised(real.images[rows], real.mean, real.std)
        )
        targets = nn.Parameter(represented(target, real.images[rows]))
        figures = self._learn(config, run, real, target, images, targets) if config.iterations else {}
        made_by = config.model_dump(mode="json", exclude_none=True, exclude={"variants", "groups", "evaluate"})
        return RepresentationSet(images, targets, real.mean, real.std, made_by, figures)

    def _learn(
        self, config: Config, run: Run, real: RealImages, target: nn.Module, images: nn.Parameter, targets: nn.Parameter
    ) -> dict[str, float]:
        """The outer loop; changes images and representations in place."""
        shape, dim = tuple(images.shape[1:]), targets.shape[1]

        def fresh(slot: int, generation: int) -> nn.Module:
            with keyed("krr_st pool", run.seed, slot, generation):
                return Regressor(build(config.network, dim, shape), shape, dim, config.network.embedding).to(
                    images.device
                )

        spec = config.pool
        pool = Pool(fresh, spec.networks, spec.limit, spec.lr, spec.weight_decay, spec.literal_restart)
        self._warm(run, pool, images.detach(), targets.detach())
        optimizer = outer_optimizer(images, targets, config.lr)
        batch = min(config.batch_real, len(real.images))

        def one(i: int) -> dict[str, Tensor]:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * (1 - (1 - LAST_RATE) * i / config.iterations)
            drawn = generator(run.seed, "krr_st", i)
            slot = int(torch.randint(len(pool), (1,), generator=drawn))
            x = real.images[torch.randperm(len(real.images), generator=drawn)[:batch].to(images.device)]
            x = apply(x, augmentation(config.augment, batch, (x.shape[-2], x.shape[-1]), drawn))
            with torch.no_grad():
                wanted = target(x)
            loss = outer_loss(pool.visit(slot), images, targets, x, wanted, config.ridge)["loss"]
            images.grad, targets.grad = torch.autograd.grad(
                loss, [images, targets]
            )  # of these only, not of the network's weights
            if config.clip is not None:
                nn.utils.clip_grad_norm_([images, targets], config.clip)
            optimizer.step()
            inner = pool.learn(slot, images.detach(), targets.detach())
            return {"loss": loss, "inner_loss": inner}

        peak = torch.zeros((), dtype=torch.int64)

        def step(i: int) -> dict[str, Tensor]:
            if i:
                return one(i)
            terms: dict[str, Tensor] = {}
            peak.fill_(cost.peak_of_tensors(lambda: terms.update(one(0)), images.device))
            return terms

        state: dict[str, Any] = {
            "images": TensorState(images),
            "targets": TensorState(targets),
            "optimizer": optimizer,
            "pool": pool,
            "peak": TensorState(peak),
        }
        seconds = run.loop("krr_st", state, step, config.iterations, log_every=10)
        return Cost(seconds, config.iterations, int(peak)).figures()

    def _warm(self, run: Run, pool: Pool, images: Tensor, targets: Tensor) -> None:
        """Train each network of the pool on the set as it begins, for 1 to `limit` steps."""
        drawn = generator(run.seed, "krr_st warm")
        ages = torch.randint(1, pool.limit + 1, (len(pool),), generator=drawn).tolist()

        def step(i: int) -> dict[str, Tensor]:
            return {
                "loss": torch.stack(
                    [pool.learn(slot, images, targets) for slot, age in enumerate(ages) if age > i]
                ).mean()
            }

        run.loop("pool", {"pool": pool}, step, max(ages))

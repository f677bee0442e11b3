"""SRe2L: squeeze the data into a network, recover images from its batch-norm statistics, and label their views by it.

paper: Squeeze, Recover and Relabel: Dataset Condensation at ImageNet Scale From A New Perspective
venue: NeurIPS 2023
arxiv: 2306.13092
task: classification
family: dataset distillation
use when: images are large or classes many, and soft labels may be stored
needs: a network with BatchNorm2d, trained on the real data; no real images after that

Recover: one image of each class at a time is learned from noise, so that the network classifies it and its features
have the running statistics of every batch norm (`r_bn`, the first layer ten times); each step sees one draw for the
whole batch, a random shift (`jitter`) and before it what `augment` names, with a cosine rate, and pixels are clamped to
their range. Relabel: the network's logits of every epoch's crops, flips and mixes are stored in half precision, or
(`relabel: null`) one vector an image. Total variation and the pixels' norm, 0 in the published runs, are `tv` and `l2`.
Crops are drawn from area and aspect as torchvision does, without its retries, and stay differentiable.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Spec, Teacher
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.functional.recovery import BatchNormStatistics, clamp_to_pixels, statistics_loss, total_variation
from stillhouse.randomness import generator
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.run import Run
from stillhouse.synthetic.config import DatasetConfig, Groups
from stillhouse.synthetic.descent import Cost, batch_view, class_batches, descend
from stillhouse.synthetic.product import SyntheticSet
from stillhouse.synthetic.real import RealRows
from stillhouse.synthetic.relabel import ViewLabels, Views, relabel, running_logits
from stillhouse.synthetic.synthesis import made_by, plan


class RecoverSpec(Spec):
    """How images are recovered."""

    iterations: int = Field(1000, ge=1, description="Published: 4000 (ImageNet), 1000 (CIFAR).")
    classes: int | None = Field(
        None, ge=1, description="Classes recovered at a time, which bounds the memory; null: all. Published: 100."
    )
    lr: float = Field(0.25, gt=0, description="Adam with betas 0.5, 0.9; falls along a cosine.")
    r_bn: float = Field(0.01, ge=0, description="Weight of the statistics; published: 0.01 (ImageNet) to 1 (CIFAR).")
    first: float = Field(10.0, ge=0, description="Factor of the first layer's statistics.")
    jitter: int = Field(4, ge=0, description="Pixels of the random shift; published: 32 at 224, 4 at 32.")
    augment: Groups = Field(
        "", description="Before the shift, one draw a step for the whole batch: resized_crop_flip for large images."
    )
    tv: float = Field(0.0, ge=0, description="Weight of the total variation.")
    l2: float = Field(0.0, ge=0, description="Weight of the images' mean norm.")


class Config(DatasetConfig):
    teacher: Teacher = Field(description="The squeezed network; one with `train` is trained first.")
    recover: RecoverSpec | None = Field(
        default_factory=RecoverSpec, description="null: random real images under the same labels, the baseline."
    )
    relabel: Views | None = Field(
        default_factory=Views, description="The views that are labelled; null: one soft label an image."
    )


def recover_loss(
    network: nn.Module, statistics: BatchNormStatistics, x: Tensor, labels: Tensor, spec: RecoverSpec
) -> dict[str, Tensor]:
    """CE(f(x), y) + r_bn (first r_1 + the other r_l) [+ tv TV(x) + l2 mean |x_i|], as `loss`, with its parts.

    Args:
        statistics: of the network, which is in evaluation mode.
        x: augmented images (B, C, H, W); `labels` (B,).
    """
    ce = F.cross_entropy(network(x).float(), labels)
    bn = statistics_loss(statistics.distances(), spec.first)
    loss = ce + spec.r_bn * bn
    if spec.tv:
        loss = loss + spec.tv * total_variation(x)
    if spec.l2:
        loss = loss + spec.l2 * x.flatten(1).norm(dim=1).mean()
    return {"loss": loss, "ce": ce, "bn": bn}


def real_images(config: Config, run: Run) -> Tensor:
    """Random real images, class-major, as many as are recovered."""
    return RealRows.of(run, config.data).draw(config.ipc, generator(run.seed, "initial"), "images (ipc)")


class SqueezeRecoverRelabel(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        teacher = (
            []
            if config.teacher.train is None
            else [Stage("teacher", "squeeze: train the network with batch norm (stored, shared)")]
        )
        does = (
            f"{config.ipc} times: recover an image of each class"
            if config.recover
            else f"take {config.ipc} random real images a class"
        )
        labels = f"label {config.relabel.epochs} epochs of views" if config.relabel else "label the images"
        lines = plan(run, config, "recover", does, config.recover.iterations * config.ipc if config.recover else 0)
        return [*teacher, lines[0], Stage("relabel", labels), *lines[1:]]

    def run(self, config: Config, run: Run) -> SyntheticSet:
        network = run.network("teacher", config.teacher, config.data).to(run.device).eval().requires_grad_(False)
        if config.recover is None:
            return self._labelled(config, run, network, real_images(config, run))
        statistics = BatchNormStatistics(network)
        parts, cost = [], Cost()
        for number in range(config.ipc):
            batches = []
            for classes, end in class_batches(run.data(config.data).num_classes, config.recover.classes):
                x, spent = self._recovered(config, config.recover, run, network, statistics, number, classes, end)
                batches.append(x)
                cost += spent
            parts.append(torch.cat(batches))
        statistics.close()
        made = self._labelled(config, run, network, torch.stack(parts, 1).flatten(0, 1))  # class-major
        if config.evaluate.scores and config.evaluate.protocol == "soft":
            made.random = self._labelled(config, run, network, real_images(config, run))
        made.figures = cost.figures()
        return made

    def _labelled(self, config: Config, run: Run, network: nn.Module, images: Tensor) -> SyntheticSet:
        """Class-major images with the network's labels."""
        bundle = run.data(config.data)
        labels = torch.arange(bundle.num_classes).repeat_interleave(config.ipc)
        classes, mean, std = list(bundle.classes), tuple(bundle.mean), tuple(bundle.std)
        made = SyntheticSet(images, labels, classes, mean, std, bounded=True, made_by=made_by(config))
        if config.relabel is None:
            made.soft = running_logits(network, images).cpu()
        else:
            views = config.relabel
            uses = {"images": made, "teacher": FrozenTeacher(network), "views": views}
            made.views = ViewLabels(
                views,
                run.stage("relabel", lambda: {"logits": relabel([network], images, views).logits}, uses)["logits"],
            )
        made.check()
        return made

    def _recovered(
        self,
        config: Config,
        spec: RecoverSpec,
        run: Run,
        network: nn.Module,
        statistics: BatchNormStatistics,
        number: int,
        classes: slice,
        end: str,
    ) -> tuple[Tensor, Cost]:
        """The `number`-th image of each of these classes, and what it cost; `end` is of the descent's name."""
        bundle = run.data(config.data)
        labels = torch.arange(bundle.num_classes, device=run.device)[classes]
        shape = (len(labels), *bundle.input_shape)
        keys = (run.seed, "recover", number, *([classes.start] if end else []))
        x = nn.Parameter(torch.randn(shape, generator=generator(*keys)).to(run.device))

        def loss(i: int) -> dict[str, Tensor]:
            seen = batch_view(x, spec.augment, spec.jitter, generator(*keys, i))
            return recover_loss(network, statistics, seen, labels, spec)

        def clamp() -> None:
            clamp_to_pixels(x, bundle.mean, bundle.std)

        cost = descend(run, f"recover.{number}{end}", x, spec.lr, spec.iterations, loss, after=clamp)
        return x.detach(), cost

"""The self-supervised target network g of KRR-ST: one with weights of its own, or one trained by Barlow Twins (Zbontar
et al., arXiv 2103.03230)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config.specs import DataSpec, Model, Spec
from stillhouse.functional.augmentation import apply
from stillhouse.functional.precision import full_precision
from stillhouse.methods.datasets.krr_st.ridge import Regressor
from stillhouse.models import build
from stillhouse.randomness import generator, keyed
from stillhouse.runs.products import state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.synthetic.config import AugmentSpec
from stillhouse.synthetic.training import augmentation


class TargetSpec(Spec):
    """The network whose representations the set shall teach: features before its classifier."""

    network: Model = Field(
        description="With a checkpoint or pretrained weights it is taken as it is; else it is trained by Barlow Twins."
    )
    epochs: int = Field(30, ge=1)
    batch_size: int = Field(256, ge=2)
    lr: float = Field(1e-3, gt=0, description="Adam.")
    projector: int = Field(128, ge=1, description="Width of the two layers between features and loss.")
    redundancy: float = Field(5e-3, ge=0, description="Weight of the off-diagonal correlations.")
    augment: AugmentSpec = Field(default_factory=lambda: AugmentSpec(groups="", always="resized_crop_flip_color"))
    seed: int = Field(0, description="Of its training: runs of all seeds share it.")

    @property
    def trained(self) -> bool:
        return self.network.checkpoint is None and not self.network.pretrained


@full_precision
def barlow_twins_loss(a: Tensor, b: Tensor, redundancy: float = 5e-3) -> Tensor:
    """sum_i (1 - C_ii)^2 + redundancy sum_{i != j} C_ij^2, with C the cross-correlation (D, D) of two views'
    projections (B, D)."""
    a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (a, b))
    c = a.T @ b / len(a)
    on = c.diagonal()
    return (1 - on).square().sum() + redundancy * (c.square().sum() - on.square().sum())


def target_network(run: Run, spec: TargetSpec, data: DataSpec, images: Tensor) -> Regressor:
    """g, frozen, in evaluation mode, on the images' device; trained first, as a stage that all recipes share, where it
    has no weights.

    Args:
        images: (N, C, H, W), unlabelled.
    """
    shape = tuple(images.shape[1:])
    with keyed("krr_st target", spec.seed):
        network = Regressor(
            build(spec.network, run.data(data).num_classes, shape), shape, 0, spec.network.embedding
        ).to(images.device)
    if spec.trained:
        uses = {"spec": spec.model_dump(mode="json"), "data": run.data(data).fingerprint}
        network.load_state_dict(run.stage("target", lambda: _train(run, spec, network, images), uses))
    return network.eval().requires_grad_(False)


@torch.no_grad()
def represented(target: nn.Module, images: Tensor, batch: int = 512) -> Tensor:
    """g of images, (N, d)."""
    return torch.cat([target(x) for x in images.split(batch)])


def _train(run: Run, spec: TargetSpec, network: Regressor, images: Tensor) -> dict[str, Tensor]:
    with keyed("krr_st projector", spec.seed):
        width = spec.projector
        projector = nn.Sequential(
            nn.Linear(network.features, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)
        ).to(images.device)
    optimizer = torch.optim.Adam([*network.parameters(), *projector.parameters()], spec.lr)
    size = min(spec.batch_size, len(images))
    each = max(len(images) // size, 1)
    network.train()

    def step(i: int) -> dict[str, Tensor]:
        epoch, at = divmod(i, each)
        order = torch.randperm(len(images), generator=generator(spec.seed, "target order", epoch))
        x = images[order[at * size : (at + 1) * size].to(images.device)]
        drawn = generator(spec.seed, "target views", i)
        a, b = (
            projector(network(apply(x, augmentation(spec.augment, len(x), (x.shape[-2], x.shape[-1]), drawn))))
            for _ in range(2)
        )
        loss = barlow_twins_loss(a, b, spec.redundancy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    state = {"network": network, "projector": projector, "optimizer": optimizer}
    run.loop("target", state, step, spec.epochs * each)
    return state_on_cpu(network)

"""Expert trajectories: networks trained on the real data, their parameters stored after every epoch, each as a stage
that all recipes share.

The first and the last row of a trajectory are a network at its start and trained, which is what methods with a pool of
networks need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import DataSpec, ModelSpec, Spec
from stillhouse.functional.augmentation import apply
from stillhouse.functional.matching import Flat
from stillhouse.randomness import generator, key, permutation
from stillhouse.runs.run import Run
from stillhouse.synthetic.config import AugmentSpec
from stillhouse.synthetic.real import RealImages
from stillhouse.synthetic.synthesis import TensorState
from stillhouse.synthetic.training import augmentation


class ExpertSpec(Spec):
    """How experts are trained on the real data."""

    count: int = Field(3, ge=1, description="Experts; published: 100 (MTT), 20 (NCFM).")
    epochs: int = Field(10, ge=1, description="Each leaves epochs + 1 snapshots; published: 50.")
    batch_size: int = Field(256, ge=1)
    lr: float = Field(0.01, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    drop: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Factor of the rate after half the epochs, where the momentum starts again at 0; 1: none.",
    )
    augment: AugmentSpec | None = Field(None, description="Default: the recipe's `augment`.")
    seed: int = Field(0, description="Of the experts: runs of all seeds share them.")


Loss = Callable[[nn.Module, Tensor, Tensor, Tensor, int], Tensor]
"""(network, images, augmented images, labels, epoch) -> scalar."""


def plain_loss(network: nn.Module, x: Tensor, augmented: Tensor, labels: Tensor, epoch: int) -> Tensor:
    """Cross-entropy on the augmented images."""
    return F.cross_entropy(network(augmented), labels)


def experts(
    run: Run,
    network: ModelSpec,
    data: DataSpec,
    real: RealImages,
    spec: ExpertSpec,
    augment: AugmentSpec,
    loss: Loss = plain_loss,
    uses: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Trajectories, each (epochs + 1, P) on the CPU, in `Flat`'s order. The plan needs a stage `expert`.

    Args:
        loss: of a batch; what it depends on goes into `uses`, under which the experts are stored.
    """
    augment = spec.augment or augment
    found = []
    for number in range(spec.count):
        seed = key(spec.seed, "expert", number) % 2**31
        identity = {
            "network": network.model_dump(mode="json"),
            "training": {**spec.model_dump(mode="json", exclude={"count", "seed"}), "augment": augment.model_dump()},
            "data": run.data(data).fingerprint,
            "whitened": real.whitening is not None,
            "seed": seed,
            **(uses or {}),
        }

        def make(seed: int = seed) -> dict[str, Tensor]:
            return {"trajectory": _train(run, network, data, real, spec, augment, loss, seed)}

        made = run.stage(f"expert.{number}", make, identity)
        found.append(made["trajectory"])
    return found


def _train(
    run: Run,
    network: ModelSpec,
    data: DataSpec,
    real: RealImages,
    spec: ExpertSpec,
    augment: AugmentSpec,
    loss: Loss,
    seed: int,
) -> Tensor:
    model = run.model(network, data, role="expert", seed=seed).to(real.images.device)
    flat = Flat(model)
    optimizer = torch.optim.SGD(model.parameters(), spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)
    size = min(spec.batch_size, len(real.images))
    steps = max(len(real.images) // size, 1)
    snapshots = torch.zeros(spec.epochs + 1, flat.size)
    snapshots[0] = flat.vector()

    def step(i: int) -> dict[str, Tensor]:
        epoch, at = divmod(i, steps)
        if spec.drop < 1 and epoch == spec.epochs // 2 + 2 and not at:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["lr"] = spec.lr * spec.drop
        order = permutation(len(real.images), seed, "expert order", epoch)
        rows = torch.tensor(order[at * size : (at + 1) * size], device=real.images.device)
        x = real.images[rows]
        drawn = generator(seed, "expert augment", i)
        value = loss(
            model,
            x,
            apply(x, augmentation(augment, len(x), (x.shape[-2], x.shape[-1]), drawn)),
            real.labels[rows],
            epoch,
        )
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if at == steps - 1:
            snapshots[epoch + 1] = flat.vector().cpu()
        return {"loss": value}

    run.loop(
        "expert",
        {"network": model, "optimizer": optimizer, "snapshots": TensorState(snapshots)},
        step,
        spec.epochs * steps,
    )
    return snapshots

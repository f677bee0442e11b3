"""How a set of representations is judged: backbones pre-trained on it by regression, and then trained on other data
sets, as are untrained ones.

The head of the regression is dropped: its width is that of the representations, not the number of classes.
"""

from __future__ import annotations

import math
import re
import statistics
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, DataSpec, Model, ModelSpec, Spec
from stillhouse.data import Loader
from stillhouse.errors import UserError
from stillhouse.functional.augmentation import apply
from stillhouse.methods.datasets.krr_st.product import RepresentationSet
from stillhouse.methods.datasets.krr_st.ridge import Regressor, inner_optimizer, inner_step, outer_loss
from stillhouse.methods.datasets.krr_st.target import represented, target_network
from stillhouse.models import build
from stillhouse.randomness import generator, keyed, permutation
from stillhouse.runs.products import state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import evaluating
from stillhouse.synthetic.config import AugmentSpec
from stillhouse.synthetic.real import RealImages
from stillhouse.synthetic.training import augmentation

UNSEEN = 1000  # test images of the source on which the regression itself is judged


class PretrainSpec(Spec):
    """Regression of the targets on the images, by SGD with momentum 0.9."""

    epochs: int = Field(1000, ge=1)
    batch_size: int = Field(256, ge=1)
    lr: float = Field(0.1, gt=0)
    weight_decay: float = Field(1e-3, ge=0)


class TransferSpec(Spec):
    """Networks pre-trained on the set, and what they then learn. Accuracies are those of the last step."""

    targets: list[Data] = Field(
        default_factory=list, description="Labelled data sets to learn then; default: the recipe's data."
    )
    probe: Literal["linear", "finetune"] = Field(
        "linear", description="linear: a linear layer on frozen features; finetune: all weights."
    )
    pretrain: PretrainSpec = Field(default_factory=PretrainSpec)
    iterations: int = Field(5000, ge=1, description="Published: 5000 (linear), 5000 or 10000 (finetune).")
    batch_size: int = Field(256, ge=1)
    lr: float | None = Field(None, gt=0, description="Falls along a cosine; default: 0.2 (linear), 0.01 (finetune).")
    weight_decay: float = Field(5e-4, ge=0)
    networks: int = Field(3, ge=1, description="How many, each from its own initialisation.")
    cross: list[Model] = Field(
        default_factory=list, description="Other architectures, pre-trained and trained the same way, once each."
    )
    augment: AugmentSpec | None = Field(None, description="finetune: default as the recipe's `augment`.")


def check_target(target: DataSpec, bundle: Any, shape: tuple[int, ...]) -> None:
    """Raises `UserError` for a data set that a backbone of images of this (C, H, W) cannot be trained on, or that has
    no test split."""
    if not bundle.has("test"):
        raise UserError(
            f"The data set '{target.name}' has no test split, so that what a network learns of it cannot be judged."
        )
    found = tuple(bundle.input_shape)
    if len(found) != 3 or found[1:] != tuple(shape[1:]) or found[0] not in (1, shape[0]):
        raise UserError(
            f"The images of '{target.name}' have shape {found}, but the backbone sees {tuple(shape)}; "
            f"set image_size: {shape[1]} for that data set, or take one with as many channels."
        )


def judge(product: RepresentationSet, run: Run) -> dict[str, float]:
    """`accuracy` (mean over targets and networks; `accuracy_std` over networks), `accuracy_<data>`, the same of
    backbones that were not pre-trained (`accuracy_scratch`), `test_loss` (the outer loss on unseen images of the
    source, in the pre-trained networks), and the size.

    Raises:
        UserError: a target whose images have another size or more channels, or no test split.
    """
    config: Any = run.config
    spec: TransferSpec = config.evaluate
    judging = _Judging(run, product, spec)
    names = judging.names()
    table = {name: judging.accuracies(config.network, spec.networks, name) for name in ("pretrained", "scratch")}
    out: dict[str, float] = {}
    for how, rows in table.items():
        tail = "" if how == "pretrained" else "_scratch"
        means = [statistics.fmean(row) for row in rows]
        out |= {f"accuracy{tail}": statistics.fmean(means), f"accuracy{tail}_std": statistics.pstdev(means)}
        if len(names) > 1:
            out |= {f"accuracy{tail}_{name}": statistics.fmean(row[t] for row in rows) for t, name in enumerate(names)}
    out["gain_over_scratch"] = out["accuracy"] - out["accuracy_scratch"]
    for model in spec.cross:
        for how, tail in (("pretrained", ""), ("scratch", "_scratch")):
            out[f"accuracy{tail}_{model.model.rpartition(':')[2]}"] = statistics.fmean(
                judging.accuracies(model, 1, how)[0]
            )
    return out | {
        "test_loss": judging.test_loss(),
        "stored_images": float(len(product)),
        "stored_mb": product.bytes / 1e6,
    }


class _Judging:
    """One evaluation: every network and every target is a stage of its own."""

    def __init__(self, run: Run, product: RepresentationSet, spec: TransferSpec) -> None:
        self.run, self.product, self.spec = run, product, spec
        config: Any = run.config
        self.config = config
        self.targets: list[DataSpec] = list(spec.targets) or [config.data]
        self.shape = tuple(product.images.shape[1:])
        self.images, self.labels = product.images.to(run.device), product.targets.to(run.device)

    def names(self) -> list[str]:
        """Of the targets, each once."""
        plain = [re.sub(r"[^A-Za-z0-9]+", "_", t.name.rpartition(":")[2]).strip("_") for t in self.targets]
        return [n if plain.count(n) == 1 else f"{n}{i}" for i, n in enumerate(plain)]

    def network(self, model: ModelSpec, seed: int) -> Regressor:
        """A fresh backbone with the head of the regression."""
        with keyed("krr_st judge", seed):
            fresh = build(model, self.product.targets.shape[1], self.shape)
            return Regressor(fresh, self.shape, self.product.targets.shape[1], model.embedding).to(self.run.device)

    def pretrained(self, model: ModelSpec, seed: int) -> Regressor:
        """The same backbone, pre-trained on the set."""
        network, spec, count = self.network(model, seed), self.spec.pretrain, len(self.images)
        batches = -(-count // spec.batch_size)
        sgd = inner_optimizer(network, spec.lr, weight_decay=spec.weight_decay)

        def step(i: int) -> dict[str, Tensor]:
            epoch, at = divmod(i, batches)
            order = (
                torch.tensor(permutation(count, "krr_st pretrain", seed, epoch))
                .tensor_split(batches)[at]
                .to(self.images.device)
            )
            return {"loss": inner_step(network, sgd, self.images[order], self.labels[order])}

        def make() -> dict[str, Tensor]:
            self.run.loop("pretrain", {"network": network, "optimizer": sgd}, step, spec.epochs * batches)
            return state_on_cpu(network)

        uses = {
            "set": self.product.fingerprint,
            "model": model.model_dump(mode="json"),
            "spec": spec.model_dump(mode="json"),
            "seed": seed,
        }
        network.load_state_dict(self.run.stage(f"evaluate.pretrain.{seed}", make, uses))
        return network

    def accuracies(self, model: ModelSpec, count: int, how: str) -> list[list[float]]:
        """Test accuracies by network and target."""
        out = []
        for number in range(count):
            seed = 1000 * self.run.seed + number
            out.append(
                [self._taught(model, seed, target, name, how) for target, name in zip(self.targets, self.names())]
            )
        return out

    def _taught(self, model: ModelSpec, seed: int, target: DataSpec, name: str, how: str) -> float:
        augment = self.spec.augment or self.config.augment

        def make() -> dict[str, float]:
            network = self.pretrained(model, seed) if how == "pretrained" else self.network(model, seed)
            return {"accuracy": self._teach(network, target, seed, augment)}

        uses: dict[str, Any] = {
            "set": self.product.fingerprint if how == "pretrained" else None,
            "model": model.model_dump(mode="json"),
            "seed": seed,
        }
        uses |= {
            "spec": self.spec.model_dump(mode="json", exclude={"targets", "networks", "cross", "augment"}),
            "shape": list(self.shape),
        }
        uses |= {
            "target": self.run.data(target).fingerprint,
            "augment": augment.model_dump(),
            "dim": self.product.targets.shape[1],
            **({"features": "standardised"} if self.spec.probe == "linear" else {}),
        }
        return float(self.run.stage(f"evaluate.{how}.{name}.{seed}", make, uses)["accuracy"])

    def _teach(self, network: Regressor, target: DataSpec, seed: int, augment: AugmentSpec) -> float:
        """Drop the regression's head, train a classifier on the target's training split, and test it."""
        spec, device = self.spec, self.run.device
        (x, y), (x_test, y_test) = self._split(target, "train"), self._split(target, "test")
        linear = spec.probe == "linear"
        with keyed("krr_st head", seed):
            head = nn.Linear(network.features, self.run.data(target).num_classes).to(device)
        network.head = head
        if linear:
            with evaluating(network):
                x, x_test = (
                    torch.cat([network.embed(part.to(device)) for part in images.split(512)]) for images in (x, x_test)
                )
            x, x_test = standardised(x, x_test)
        learner: nn.Module = head if linear else network
        lr = spec.lr or (0.2 if linear else 0.01)
        sgd = inner_optimizer(learner, lr, weight_decay=spec.weight_decay)
        batches = -(-len(x) // spec.batch_size)
        learner.train()

        def step(i: int) -> dict[str, Tensor]:
            epoch, at = divmod(i, batches)
            for group in sgd.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * i / spec.iterations))
            rows = torch.tensor(permutation(len(x), "krr_st teach", seed, epoch)).tensor_split(batches)[at]
            batch = x[rows.to(x.device)].to(device)
            if not linear:
                drawn = generator("krr_st teach", seed, "augment", i)
                batch = apply(batch, augmentation(augment, len(batch), (batch.shape[-2], batch.shape[-1]), drawn))
            loss = F.cross_entropy(learner(batch), y[rows].to(device))
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            return {"loss": loss}

        self.run.loop("teach", {"learner": learner, "optimizer": sgd}, step, spec.iterations)
        with evaluating(learner):
            predicted = torch.cat([learner(part.to(device)).argmax(1).cpu() for part in x_test.split(512)])
        return float((predicted == y_test).double().mean())

    def _split(self, target: DataSpec, split: str) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) and labels (N,) on the host, grey ones repeated to the backbone's channels."""
        bundle = self.run.data(target)
        check_target(target, bundle, self.shape)
        dataset = bundle.dataset(split, train=False)
        images = torch.cat([batch["input"] for batch in Loader(dataset, 512)])
        return images.expand(-1, self.shape[0], -1, -1), dataset.labels()

    def test_loss(self) -> float:
        """Mean outer loss on unseen images of the source."""
        run, config = self.run, self.config
        if not run.data(config.data).has("test"):
            return math.nan
        real = RealImages.load(run, config.data)
        unseen = self._split(config.data, "test")[0][:UNSEEN].to(run.device)
        wanted = represented(target_network(run, config.target, config.data, real.images), unseen)
        found = []
        for number in range(self.spec.networks):
            network = self.pretrained(config.network, 1000 * run.seed + number).eval()
            with torch.no_grad():
                found.append(float(outer_loss(network, self.images, self.labels, unseen, wanted, config.ridge)["loss"]))
        return statistics.fmean(found)


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, D) and (M, D) with mean 0 and standard deviation 1 over the first: a linear probe would else judge
    their scale, which differs between backbones, and the untrained one above all."""
    mean, std = train.mean(0), train.std(0, correction=0)
    std = torch.where(std > 1e-6 * std.max().clamp_min(1e-12), std, torch.ones_like(std))
    return (train - mean) / std, (test - mean) / std

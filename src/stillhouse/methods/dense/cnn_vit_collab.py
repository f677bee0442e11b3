"""CNN-ViT collaboration: a convolutional network and a transformer train together; where one is better, it teaches.

paper: A Good Student is Cooperative and Reliable: CNN-Transformer Collaborative Learning for Semantic Segmentation
venue: ICCV 2023
arxiv: 2307.12574
task: segmentation
family: online
use when: there is no teacher, and a convolutional network and a transformer of about one quality can be trained at once
needs: images with masks, two networks, and a low and a high layer of each

Heterogeneous feature distillation (HFD) brings the networks' low maps together, each through an adaptor. Bidirectional
selective distillation (BSD) asks the labels who is better, for each region of the high maps and for each pixel of the
prediction: who has the smaller cross-entropy there teaches the other there, and is a constant in that term. BSD begins
after 5 % of the steps, as both losses are noise before. No code was released: the abstract gives the parts, and the
forms here are reconstructions (cosine for HFD and regions, a grid of 8 x 8 regions, temperature 1, weights 0.1, 0.1 and
1). HFD compares maps with maps; passing one network's map through the other's next stage is not built. Both networks
are trained by one optimiser, with a rate of its own for the convolutional one (`cnn_lr`), and both are products.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, MethodConfig, Model, ModelSpec, Spec, TrainSpec
from stillhouse.distillation.objective import Progress
from stillhouse.distillation.teachers import Reader
from stillhouse.errors import UserError
from stillhouse.functional.counting import IGNORED
from stillhouse.functional.feature_maps import map_tap
from stillhouse.functional.precision import full_precision
from stillhouse.methods.distillation import describe
from stillhouse.randomness import keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.judging import check_groups, figures_of
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Product, Student, read_meta
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, Signals, first_samples
from stillhouse.tasks.segmentation import Segmentation
from stillhouse.training.module import TrainingModule

NAMES = ("cnn", "vit")
OTHER = {"cnn": "vit", "vit": "cnn"}
KIND = "stillhouse.methods.dense.cnn_vit_collab:Students"


@full_precision
def pixel_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each pixel, (B, H, W), of logits (B, H, W, K); 0 where the label (B, H, W) is ignored."""
    return F.cross_entropy(logits.movedim(-1, 1), labels, ignore_index=IGNORED, reduction="none")


@full_precision
def feature_loss(adapted: Tensor, other: Tensor) -> Tensor:
    """HFD of one network: mean over positions of 1 - cos(a(f), f'), maps (B, C, h, w); the other's is a constant."""
    return (1 - F.cosine_similarity(adapted, other.detach(), dim=1, eps=1e-8)).mean()


@full_precision
def region_losses(losses: Tensor, valid: Tensor, grid: int) -> Tensor:
    """Mean loss of the valid pixels of each of grid x grid regions, (B, grid, grid); infinite where there are none.

    Args:
        losses: (B, H, W).
        valid: (B, H, W), True where a pixel counts.
    """
    share = F.adaptive_avg_pool2d(valid.float()[:, None], grid)[:, 0]
    mean = F.adaptive_avg_pool2d((losses * valid)[:, None], grid)[:, 0] / share.clamp_min(1e-12)
    return torch.where(share > 0, mean, torch.inf)


@full_precision
def taught(mine: Tensor, other: Tensor, margin: float = 0.0) -> Tensor:
    """Where the other network teaches this one: its loss is smaller by more than `margin`; never at ties."""
    return (other.detach() + margin < mine.detach()) & mine.isfinite()


def descriptors(projected: Tensor, grid: int) -> Tensor:
    """Unit vectors (B, d, grid, grid) of the regions' means, of a map (B, d, h, w)."""
    return F.normalize(F.adaptive_avg_pool2d(projected, grid), dim=1)


@full_precision
def region_transfer(mine: Tensor, other: Tensor, where: Tensor) -> Tensor:
    """Mean of 1 - <q, q'> over the regions in which this network is taught; 0 where there are none.

    Args:
        mine, other: descriptors (B, d, r, r); the other's are a constant.
        where: (B, r, r).
    """
    distance = 1 - (mine * other.detach()).sum(1)
    return (distance * where).sum() / where.sum().clamp_min(1)


@full_precision
def pixel_transfer(mine: Tensor, other: Tensor, where: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 times the mean of KL(p' || p) at T over the pixels (B, H, W) in which this network is taught.

    Args:
        mine, other: logits (B, H, W, K); the other's are a constant.
        where: (B, H, W).
        temperature: T.
    """
    ours = (mine.movedim(-1, 1) / temperature).log_softmax(1)
    theirs = (other.detach().movedim(-1, 1) / temperature).log_softmax(1)
    divergence = (theirs.exp() * (theirs - ours)).sum(1)
    return temperature**2 * (divergence * where).sum() / where.sum().clamp_min(1)


class Layers(Spec):
    """Where a network's maps are taken."""

    low: str = Field("stage:1", description="A map near the image, of stride 4 or 8.")
    high: str = Field("stage:-1", description="A map before the classifier.")


class Config(MethodConfig):
    data: Data
    cnn: Model = Field(description="The convolutional network.")
    vit: Model = Field(description="The transformer.")
    cnn_layers: Layers = Field(default_factory=Layers)
    vit_layers: Layers = Field(default_factory=Layers)
    features: float = Field(0.1, ge=0, description="Weight of HFD; 0 leaves it out.")
    regions: float = Field(0.1, ge=0, description="Weight of region-wise BSD; 0 leaves it out.")
    pixels: float = Field(1.0, ge=0, description="Weight of pixel-wise BSD; 0 leaves it out.")
    select: Literal["better", "all"] = Field("better", description="all: both teach everywhere, as in mutual learning.")
    grid: int = Field(8, ge=1, description="Regions are of a grid of so many rows and columns.")
    width: int = Field(128, ge=1, description="Of the regions' descriptors.")
    temperature: float = Field(1.0, gt=0, description="T of the pixels' divergence.")
    margin: float = Field(0.0, ge=0, description="By how much the teaching loss must be smaller.")
    start: float = Field(0.05, ge=0, lt=1, description="Share of the training after which BSD begins.")
    train: TrainSpec = Field(default_factory=TrainSpec, description="Of both; its rate is the transformer's.")
    cnn_lr: float | None = Field(None, gt=0, description="Rate of the convolutional network.")
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])


def _adaptor(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))


class Collaboration(TrainingModule):
    """Both networks, their adaptors and projectors, and the loss of each; one backward of the sum.

    Args:
        cnn, vit: the networks.
        task: how they are called and read.
        config: layers and weights.
        seed: of the adaptors.
    """

    def __init__(self, cnn: nn.Module, vit: nn.Module, task: Segmentation, config: Config, seed: int = 0) -> None:
        super().__init__()
        if cnn is vit:
            raise UserError("cnn_vit_collab: both students are one network; give two.")
        self.student = nn.ModuleDict({"cnn": cnn, "vit": vit})
        self.adaptors, self.projectors = nn.ModuleDict(), nn.ModuleDict()
        self.config, self.seed = config, seed
        self._layers = {"cnn": config.cnn_layers, "vit": config.vit_layers}
        self._readers = {name: Reader(self.student[name], name, task=task) for name in NAMES}

    def build(self, batch: Batch) -> None:
        """Make the hooks, and the adaptors to size."""
        probe, maps = first_samples(batch, 2), {}
        with torch.no_grad(), keyed("build", self.seed):
            self.student.eval()
            for name, reader in self._readers.items():
                layers = self._layers[name]
                device = next(reader.model.parameters()).device
                seen = {k: v.to(device) for k, v in probe.items() if isinstance(v, Tensor)}
                reader.attach({f"tap:{layers.low}", f"tap:{layers.high}"}, seen)
                maps[name] = reader(seen)
            low = {n: map_tap(maps[n], self._layers[n].low).shape[1] for n in NAMES}
            high = {n: map_tap(maps[n], self._layers[n].high).shape[1] for n in NAMES}
            if self.config.features:
                self.adaptors.update({n: _adaptor(low[n], low[OTHER[n]]) for n in NAMES})
            if self.config.regions:
                self.projectors.update({n: nn.Conv2d(high[n], self.config.width, 1) for n in NAMES})

    def close(self) -> None:
        """Leave no hook on the networks."""
        for reader in self._readers.values():
            reader.close()

    def param_groups(self) -> list[dict[str, Any]]:
        rate = {} if self.config.cnn_lr is None else {"lr": self.config.cnn_lr}
        rest = [*self._readers["vit"].model.parameters(), *self.adaptors.parameters(), *self.projectors.parameters()]
        return [{"params": rest}, {"params": [*self._readers["cnn"].model.parameters()], **rate}]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """`loss`, the unweighted terms of each network, and the shares of pixels and regions in which it is taught."""
        signals = {name: reader(batch) for name, reader in self._readers.items()}
        logits = {name: s.require("logits") for name, s in signals.items()}
        labels: Tensor = batch["label"]
        valid = labels != IGNORED
        losses = {name: pixel_losses(z, labels) for name, z in logits.items()}
        count = valid.sum().clamp_min(1)
        out = {f"{name}_ce": losses[name].sum() / count for name in NAMES}
        total = out["cnn_ce"] + out["vit_ce"]
        config, started = self.config, progress.fraction >= self.config.start
        if config.features:
            total = total + config.features * self._features(signals, out)
        if config.regions and started:
            total = total + config.regions * self._regions(signals, losses, valid, out)
        if config.pixels and started:
            total = total + config.pixels * self._pixels(logits, losses, valid, out)
        return {"loss": total, **out}

    def _features(self, signals: Mapping[str, Signals], out: dict[str, Tensor]) -> Tensor:
        maps = [map_tap(signals[n], self._layers[n].low) for n in NAMES]
        size = [min(m.shape[axis] for m in maps) for axis in (2, 3)]
        cnn, vit = (F.interpolate(m, size, mode="bilinear") if list(m.shape[2:]) != size else m for m in maps)
        out["cnn_features"] = feature_loss(self.adaptors["cnn"](cnn), vit)
        out["vit_features"] = feature_loss(self.adaptors["vit"](vit), cnn)
        return out["cnn_features"] + out["vit_features"]

    def _regions(
        self,
        signals: Mapping[str, Signals],
        losses: Mapping[str, Tensor],
        valid: Tensor,
        out: dict[str, Tensor],
    ) -> Tensor:
        grid = self.config.grid
        of = {n: region_losses(losses[n].detach(), valid, grid) for n in NAMES}
        q = {n: descriptors(self.projectors[n](map_tap(signals[n], self._layers[n].high)), grid) for n in NAMES}
        for mine, other in OTHER.items():
            where = self._taught(of[mine], of[other], of[mine].isfinite())
            out[f"{mine}_regions"] = region_transfer(q[mine], q[other], where)
            out[f"{mine}_regions_taught"] = where.float().mean()
        return out["cnn_regions"] + out["vit_regions"]

    def _pixels(
        self,
        logits: Mapping[str, Tensor],
        losses: Mapping[str, Tensor],
        valid: Tensor,
        out: dict[str, Tensor],
    ) -> Tensor:
        for mine, other in OTHER.items():
            where = self._taught(losses[mine], losses[other], valid) & valid
            out[f"{mine}_pixels"] = pixel_transfer(logits[mine], logits[other], where, self.config.temperature)
            out[f"{mine}_pixels_taught"] = where.sum() / valid.sum().clamp_min(1)
        return out["cnn_pixels"] + out["vit_pixels"]

    def _taught(self, mine: Tensor, other: Tensor, valid: Tensor) -> Tensor:
        return valid if self.config.select == "all" else taught(mine, other, self.config.margin)


@dataclass
class Students(Product):
    """Two products in one folder, `cnn` and `vit`; each loads and predicts alone too.

    Attributes:
        cnn, vit: the trained networks.
        figures: of their training.
    """

    kind: ClassVar[str] = KIND
    cnn: Student
    vit: Student
    figures: dict[str, float] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        for name in NAMES:
            (folder / name).mkdir(parents=True, exist_ok=True)
            getattr(self, name).save(folder / name)
        meta = {"kind": self.kind, "format": 2, "students": list(NAMES)}
        (folder / "product.json").write_text(json.dumps(meta, indent=1))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> Students:
        cnn, vit = (Student.load(folder / name, trust_code) for name in read_meta(folder)["students"])
        return cls(cnn, vit)


@evaluates(KIND)
def evaluate(product: Students, run: Run) -> dict[str, float]:
    """The figures of both networks: `miou_cnn`, `miou_vit`, …"""
    loader, groups = run.loader(*run.judging_data()), getattr(run.config, "evaluate", ["quality", "cost"])
    out: dict[str, float] = {}
    for name in NAMES:
        student = getattr(product, name)
        weights = student.task.weights_file(run.folder / "product" / name)
        figures = figures_of(student.module, student.task, loader, groups, weights)
        out |= {f"{key}_{name}": value for key, value in figures.items()}
    return out


class CollaborativeLearning(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data, Segmentation)
        check_groups(bundle.task, config.evaluate)
        networks = {name: self._network(name, config, run) for name in NAMES}
        probe = next(iter(run.loader(config.data, "train", 2)))
        module = Collaboration(networks["cnn"], networks["vit"], bundle.task, config)
        module.build(probe)
        module.close()
        steps = config.train.epochs * len(run.loader(config.data, "train", config.train.batch_size, train=True))
        named = {name: describe(self._spec(name, config).model, networks[name]) for name in NAMES}
        return [Stage("students", f"train both networks together on {bundle.name}", named, steps=steps)]

    def run(self, config: Config, run: Run) -> Students:
        task = run.data(config.data, Segmentation).task
        networks = {name: self._network(name, config, run) for name in NAMES}
        module = Collaboration(networks["cnn"], networks["vit"], task, config, run.seed)
        loader = run.loader(config.data, "train", config.train.batch_size, train=True)
        evaluate, splits = self._validating(config, run), run.splits(config.data)
        fitted = run.fit("students", module, loader, config.train, evaluate=evaluate, splits=splits)
        module.close()
        cnn, vit = (run.student(networks[name], self._spec(name, config), config.data, {}) for name in NAMES)
        return Students(cnn, vit, {"train_seconds": fitted.seconds})

    @staticmethod
    def _spec(name: str, config: Config) -> ModelSpec:
        return config.cnn if name == "cnn" else config.vit

    def _network(self, name: str, config: Config, run: Run) -> nn.Module:
        return run.model(self._spec(name, config), config.data, name)

    @staticmethod
    def _validating(config: Config, run: Run) -> Any:
        """Figures of both networks over the data that may pick a checkpoint; None where there is none."""
        judge = run.validating(config.data)
        if judge is None:
            return None
        return lambda both, device: {f"{k}_{name}": v for name in NAMES for k, v in judge(both[name], device).items()}

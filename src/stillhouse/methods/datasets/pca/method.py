"""PCA: easy real images of every class, several whole ones stored in each image, and crops that never span two of them;
hard labels only.

paper: Rethinking Large-scale Dataset Compression: Shifting Focus From Labels to Images
venue: ICML 2026
arxiv: 2502.06434
task: classification
family: dataset distillation
use when: few images must be stored, and no teacher and no soft labels may be needed in training
needs: the whole labelled training set, and a short training run on it for the scores

Prune: EL2N of a briefly trained network (mean over `scorer.networks`), the smallest of each class (`hardness`); the
benchmark's other rules are `scorer.score: aum` or `forgetting`, and `hardness: coverage`, which is CCS. Combine: `grid`
x `grid` whole images, made small, in each stored image. Augment: one crop inside one tile, a view of each stored image
and epoch (`confined`). The authors released the benchmark (`protocol.py`: hard labels, or soft ones of a teacher at
T = 20 with CutMix), not PCA: the grid's side, the order of images, the scoring epoch and the number of networks are
choices. `hardness: random, grid: 1` is the benchmark's random subset, which every evaluation also reports. Departs: AUM
and forgetting look at samples at the ends of epochs, without augmentation; accuracy of the last epoch; images at the
size of the data, tested whole, without the resize to 256 and centre crop; stored as tensors, and the training split
lies in memory (the `paper` recipe needs a machine for that). On tiny images (32 px) a grid
costs much detail: compare `grid: 1`.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import Data, MethodConfig, Model, Teacher
from stillhouse.errors import UserError
from stillhouse.evaluation.classification import collect_logits
from stillhouse.methods.datasets.pca.packing import Hardness, combine, select
from stillhouse.methods.datasets.pca.product import PackedSet
from stillhouse.methods.datasets.pca.protocol import ProtocolSpec
from stillhouse.methods.datasets.pca.scores import ScorerSpec, scores
from stillhouse.randomness import generator
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.run import Run
from stillhouse.synthetic.real import RealImages


class Config(MethodConfig):
    data: Data
    network: Model = Field(description="The network that is trained on the set.")
    ipc: int = Field(10, ge=1, description="Stored images per class.")
    hardness: Hardness = Field(
        "easy",
        description="Which images of a class: easy, hard, balanced (evenly spaced ranks), coverage (CCS: evenly over "
        "the range of scores), random.",
    )
    cutoff: float = Field(
        0.3, ge=0, lt=1, description="coverage: share of the hardest images of a class that are left out first."
    )
    strata: int = Field(50, ge=1, description="coverage: parts of the range of scores.")
    grid: int = Field(2, ge=1, description="Tiles a side of a stored image; 1: one image.")
    confined: bool = Field(True, description="Crops stay inside one tile; false: anywhere on the stored image.")
    scorer: ScorerSpec = Field(default_factory=ScorerSpec)
    teacher: Teacher | None = Field(None, description="For evaluate.labels: soft.")
    check: Teacher | None = Field(
        None, description="An independent network, whose mean predictive entropy of the chosen images is reported."
    )
    evaluate: ProtocolSpec = Field(default_factory=ProtocolSpec)


class PruneCombineAugment(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        scorer, spec = config.scorer, config.evaluate
        if spec.labels == "soft" and config.teacher is None:
            raise UserError(
                "evaluate.labels is soft, but the recipe names no teacher; give one, or take evaluate.labels=hard."
            )
        stages = []
        if config.hardness != "random":
            steps = scorer.train.epochs * len(run.loader(config.data, "train", scorer.train.batch_size, train=True))
            named = {"scorer": (scorer.network or config.network).model}
            stages.append(
                Stage(
                    "scorer",
                    f"train {scorer.networks} networks for a short while, to score the samples (stored, shared)",
                    named,
                    steps=steps,
                )
            )
        if any(t is not None and t.train for t in (config.teacher, config.check)):
            stages.append(Stage("teacher", "train the teacher, or the network that checks (stored, shared)"))
        does = f"store {config.ipc} images a class, each of {config.grid**2} {config.hardness} ones"
        return [
            *stages,
            Stage("pack", does),
            Stage("evaluate", f"train {spec.networks} networks on the set and test them ({spec.labels} labels)"),
        ]

    def run(self, config: Config, run: Run) -> PackedSet:
        real = RealImages.load(run, config.data)
        figures: dict[str, float] = {}
        scored = (
            real.images.new_zeros(len(real.images))
            if config.hardness == "random"
            else scores(run, config.data, config.network, config.scorer)
        )
        drawn, count = generator(run.seed, "select"), config.ipc * config.grid**2
        rows = select(scored, real.rows, count, config.hardness, drawn, config.cutoff, config.strata)
        plain = select(scored, real.rows, config.ipc, "random", generator(run.seed, "random images"))
        if config.hardness != "random":
            figures |= {"score_all": float(scored.mean()), "score_chosen": float(scored[rows].mean())}
        if config.check is not None:
            figures |= self._entropies(config.check, config, run, real, {"entropy": rows, "entropy_random": plain})
        made = self._packed(config, real, rows, config.grid)
        made.confined, made.figures = config.confined, figures
        made.random_images = self._packed(config, real, plain, 1)
        return made

    def _packed(self, config: Config, real: RealImages, rows: Tensor, grid: int) -> PackedSet:
        images = combine(real.images[rows.to(real.images.device)], config.ipc, grid)
        labels = torch.arange(len(real.classes)).repeat_interleave(config.ipc)
        made_by = config.model_dump(mode="json", exclude_none=True, exclude={"variants", "groups", "evaluate"})
        size = (real.images.shape[-2], real.images.shape[-1])
        return PackedSet(images, labels, real.classes, real.mean, real.std, True, made_by=made_by, grid=grid, size=size)

    def _entropies(
        self, check: Any, config: Config, run: Run, real: RealImages, rows: dict[str, Tensor]
    ) -> dict[str, float]:
        """Mean predictive entropy, in nats, of whole images by an independent network."""
        network = run.network("check", check, config.data).to(run.device)
        out = {}
        for name, chosen in rows.items():
            images = [
                {"input": real.images[part.to(real.images.device)], "label": real.labels[part.to(real.images.device)]}
                for part in chosen.split(256)
            ]
            log_p = collect_logits(network, images, run.device)[0].log_softmax(-1)
            out[name] = float(-(log_p.exp() * log_p).sum(-1).mean())
        return out

"""MRDD: a small code of what several views share, by masked cross-view prediction, is distilled out of one code a view.

paper: Rethinking Multi-view Representation Learning via Distilled Disentangling
venue: CVPR 2024
arxiv: 2403.10897
task: multi-view representation
family: disentangling
use when: each sample is seen in two or more aligned views without labels, and features for clustering or a classifier
are wanted
needs: two or more views (C, H, W) of one shape in [0, 1]; labels only to judge by

Stage 1 masks every view, reads them with one encoder and rebuilds all whole views from c. Stage 2 freezes it and
trains, for each view, an auto-encoder whose decoder gets [s, c], while an upper bound of I(c; s) is lowered. The
representation is [c, s of the view `best`]. Departures: reconstruction is averaged over the batch and so are its
weights chosen (`reduction: sum` is the paper's scale); c is standardised on the training set before stage 2; the bound
is clamped at 0 (`clamp`); s at evaluation is its mean; the shared encoder normalises over all views at once; the rate
falls once (the script's cosine rises and falls five times). A large `lam` brings the redundancy back, since the encoder
then exploits the estimator's misfit. `specific.loss: released` is what the published code does: the encoder is trained
by the estimator's likelihood alone, so that s predicts c. Its Gumbel-softmax code, which no published setting uses, and
missing views are not offered. `views` names `image` and `edge`, or the keys of inputs that are mappings. For one
process.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.config.specs import Data, MethodConfig, Spec
from stillhouse.errors import UserError
from stillhouse.methods.pretraining.mrdd import evaluation
from stillhouse.methods.pretraining.mrdd.losses import (
    Reduction,
    kl_per_dimension,
)
from stillhouse.methods.pretraining.mrdd.networks import ConsistencyEncoder, NetworkSpec, SpecificEncoder
from stillhouse.methods.pretraining.mrdd.training import (
    ConsistencySpec,
    ConsistencyTraining,
    SpecificSpec,
    SpecificTraining,
)
from stillhouse.methods.pretraining.mrdd.views import ViewMaker
from stillhouse.processes import rank_world
from stillhouse.randomness import keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Product, read_meta, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import evaluating, to_device


class EvaluationSpec(Spec):
    """How the product is judged."""

    cluster: str = Field(
        "test",
        pattern="^(test|train)$",
        description="The split that k-means clusters; published figures cluster the training set.",
    )
    repeats: int = Field(1, ge=1, description="Repetitions of k-means (10 restarts each).")


class Config(MethodConfig):
    data: Data
    views: list[str] = Field(
        default_factory=lambda: ["image", "edge"],
        min_length=2,
        description="image, edge; or keys of inputs that are mappings.",
    )
    network: NetworkSpec = Field(default_factory=NetworkSpec)
    consistency: ConsistencySpec = Field(default_factory=ConsistencySpec)
    specific: SpecificSpec = Field(default_factory=SpecificSpec)
    best: int = Field(0, ge=0, description="The view whose s joins c in the representation.")
    reduction: Reduction = Field(
        "sample", description="Reconstruction over the batch: sample: mean; sum: as published."
    )
    evaluate: EvaluationSpec = Field(default_factory=EvaluationSpec)

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.best >= len(self.views):
            raise ValueError(f"best must be below the number of views, {len(self.views)}; given: {self.best}")
        if len(set(self.views)) < len(self.views):
            raise ValueError("views must be named once each")
        return self


@dataclass
class MultiViewEncoder(Product):
    """The consistency encoder and one encoder a view; called with a loader's input, it gives [c, s_best], (B, c + s).

    Attributes:
        consistent: views -> c.  specific: view -> s, one a view.
        views: a loader's input -> V views.
        network, shape, dims: how the encoders are built again: their options, (C, H, W), and the dimensions of c and s.
        best: the view of s_best.
    """

    kind: ClassVar[str] = "stillhouse.methods.pretraining.mrdd:MultiViewEncoder"
    consistent: ConsistencyEncoder
    specific: nn.ModuleList
    views: ViewMaker
    network: NetworkSpec
    shape: tuple[int, ...]
    dims: tuple[int, int]
    best: int = 0
    figures: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def codes(self, inputs: Any) -> tuple[Tensor, list[Tensor]]:
        """c (B, c_dim) and s of every view (B, s_dim), from a loader's input on the encoders' device."""
        views = self.views(inputs)
        with evaluating(self.consistent), evaluating(self.specific):
            return self.consistent.code(views), [encode(x)[0] for encode, x in zip(self.specific, views)]

    def __call__(self, inputs: Any) -> Tensor:
        c, s = self.codes(inputs)
        return torch.cat([c, s[self.best]], -1)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            state_on_cpu(nn.ModuleDict({"consistent": self.consistent, "specific": self.specific})),
            str(folder / "model.safetensors"),
        )
        meta: dict[str, Any] = {
            "views": self.views.names,
            "mean": self.views.mean,
            "std": self.views.std,
            "network": self.network.model_dump(mode="json"),
        }
        meta |= {"shape": self.shape, "dims": self.dims, "best": self.best}
        (folder / "product.json").write_text(json.dumps({"kind": self.kind, "format": 1, **meta}, indent=1))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> MultiViewEncoder:
        from safetensors.torch import load_file

        meta, network = read_meta(folder), NetworkSpec.model_validate(read_meta(folder)["network"])
        shape, (c, s) = tuple(meta["shape"]), meta["dims"]
        consistent = ConsistencyEncoder(network, len(meta["views"]), shape, c)
        specific = nn.ModuleList([SpecificEncoder(network, shape, s) for _ in meta["views"]])
        both = nn.ModuleDict({"consistent": consistent, "specific": specific})
        both.load_state_dict(load_file(str(Path(folder) / "model.safetensors")))
        both.eval()
        views = ViewMaker(tuple(meta["views"]), tuple(meta["mean"]), tuple(meta["std"]))
        return cls(consistent, specific, views, network, shape, (c, s), meta["best"])


@evaluates(MultiViewEncoder.kind)
def judge(product: MultiViewEncoder, run: Run) -> dict[str, float]:
    """Clustering and classification from c, s_best, [c, s_best] and, to compare, the pixels of all views; redundancy of
    s_best with c.

    `accuracy` is an SVM's on [c, s_best] and `cluster_acc`, `nmi`, `ari` are of [c, s_best]; others carry `_c`, `_s` or
    `_pixels`.
    """
    config: Config = run.config  # type: ignore[assignment]
    device = product.consistent.center.device
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for split in ("train", "test"):
        batches = []
        for batch in run.loader(config.data, split):
            inputs = to_device(batch["input"], device)
            c, s = product.codes(inputs)
            pixels = torch.cat([v.flatten(1) for v in product.views(inputs)], -1)
            batches.append(
                {
                    "c": c,
                    "s": s[product.best],
                    "": torch.cat([c, s[product.best]], -1),
                    "pixels": pixels,
                    "label": batch["label"],
                }
            )
        arrays[split] = {k: torch.cat([b[k].cpu() for b in batches]).numpy() for k in batches[0]}
    train, test = arrays["train"], arrays["test"]
    clustered = arrays[config.evaluate.cluster]
    out: dict[str, float] = {}
    for name in ("", "c", "s", "pixels"):
        end = f"_{name}" if name else ""
        accuracies = evaluation.classification(train[name], train["label"], test[name], test["label"])
        out |= {"accuracy" if (k, name) == ("svm", "") else k + end: v for k, v in accuracies.items()}
        out |= {
            k + end: v
            for k, v in evaluation.clustering(
                clustered[name], clustered["label"], config.seed, config.evaluate.repeats
            ).items()
        }
    return out | evaluation.redundancy(train["s"], train["c"], test["s"], test["c"])


class DistilledDisentangling(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        views = ", ".join(config.views)
        steps = [
            t.epochs * len(run.loader(config.data, "train", t.batch_size, train=True))
            for t in (config.consistency.train, config.specific.train)
        ]
        parts = self._parts(config, run)
        ConsistencyTraining(
            config.consistency, config.network, *parts, config.reduction
        )  # refuses impossible shapes before anything is trained
        ratio, lam = config.consistency.mask_ratio, config.specific.lam
        apart = (
            "by the estimator's likelihood, as released"
            if config.specific.loss == "released"
            else f"with {lam:g} times the bound of I(c; s)"
        )
        return [
            Stage(
                "consistency",
                f"rebuild the views {views} from {ratio:.0%}-masked ones through {config.consistency.dim} numbers",
                steps=steps[0],
            ),
            Stage(
                "specific",
                f"train {len(config.views)} encoders of {config.specific.dim} numbers, {apart}",
                steps=steps[1] * len(config.views),
            ),
        ]

    def run(self, config: Config, run: Run) -> MultiViewEncoder:
        if rank_world()[1] > 1:
            raise UserError(
                "mrdd: the estimator of the information is trained in one process; run it without accelerate's "
                "launcher."
            )
        views, count, shape = self._parts(config, run)
        consistent, figures = self._consistency(config, run)
        specific = nn.ModuleList()
        for v in range(count):
            with keyed("model", "specific", v, run.seed):
                module = SpecificTraining(
                    config.specific,
                    config.network,
                    views,
                    v,
                    shape,
                    consistent,
                    config.consistency.dim,
                    config.reduction,
                )
            train = config.specific.train
            fitted = run.fit(
                f"specific.{v}", module, run.loader(config.data, "train", train.batch_size, train=True), train
            )
            figures["train_seconds"] += fitted.seconds
            figures[f"error_{config.views[v]}"] = module.error(run.loader(config.data, "test"), run.device)
            specific.append(module.student.eval())
        dims = (config.consistency.dim, config.specific.dim)
        return MultiViewEncoder(
            consistent.to(run.device), specific.to(run.device), views, config.network, shape, dims, config.best, figures
        )

    @staticmethod
    def _parts(config: Config, run: Run) -> tuple[ViewMaker, int, tuple[int, ...]]:
        """The views, how many, and the shape (C, H, W) of each."""
        bundle = run.data(config.data)
        views = ViewMaker(tuple(config.views), tuple(bundle.mean), tuple(bundle.std))
        made = views(next(iter(run.loader(config.data, "train", 2)))["input"])
        return views, len(made), tuple(made[0].shape[1:])

    def _consistency(self, config: Config, run: Run) -> tuple[ConsistencyEncoder, dict[str, float]]:
        """Stage 1, shared by all recipes that have the same; figures of its training."""
        parts, spec = self._parts(config, run), config.consistency
        with keyed("model", "consistency", run.seed):
            module = ConsistencyTraining(spec, config.network, *parts, config.reduction)

        def make() -> dict[str, Any]:
            fitted = run.fit(
                "consistency", module, run.loader(config.data, "train", spec.train.batch_size, train=True), spec.train
            )
            codes, divergence, seen = [], torch.zeros(spec.dim), 0
            with evaluating(module):
                for batch in run.loader(config.data, "train"):
                    mean, log_variance = module.student(parts[0](to_device(batch["input"], run.device)))
                    codes.append(mean.cpu())
                    divergence, seen = (
                        divergence + kl_per_dimension(mean, log_variance).cpu() * len(mean),
                        seen + len(mean),
                    )
            module.standardise(torch.cat(codes).to(run.device))
            facts = {"seconds": fitted.seconds, "kl_per_dimension": (divergence / seen).tolist()}
            return {"weights": state_on_cpu(module.student), "figures": facts}

        uses = {
            "consistency": {**spec.model_dump(mode="json"), "train": spec.train.identity()},
            **config.model_dump(mode="json", include={"views", "network", "reduction"}),
            "data": run.data(config.data).fingerprint,
            "augment": config.data.model_dump(mode="json", include={"augment"}),
            "seed": run.seed,
        }
        made = run.stage("consistency", make, uses)
        module.student.load_state_dict(made["weights"])
        run.record["kl_per_dimension"] = made["figures"]["kl_per_dimension"]
        return module.student.to(run.device).eval(), {"train_seconds": made["figures"]["seconds"]}

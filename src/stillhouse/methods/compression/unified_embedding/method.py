"""Unified Embedding: all categorical features of a model share one small table, each through hashes of its own, in
place of a table each.

paper: Unified Embedding: Battle-Tested Feature Representations for Web-Scale ML Systems
venue: NeurIPS 2023
arxiv: 2305.12102
task: tabular classification
family: embedding compression
use when: embedding tables of many categorical features are most of a model, and sizes should not be tuned feature by
feature
needs: categorical columns (integers or words) with labels; no teacher, no vocabulary

Every feature t looks a value v up `chunks` times at Hash(v; t, k) mod M. Values of one feature collide less than in
tables of their own, as M is larger than any share; collisions between features do no harm, as the network weighs
features by different weights, which training turns apart. The paper has no code; chunks go to tables as in TensorFlow
Recommenders' layer, but are joined in numeric order, and the hash is splitmix64 (theirs: SipHash). Beside it, with the
same number of rows: `hashing` (a hashed table each, in proportion to its values), `collisionless`, and, each shared or
split, `sum` (two hashes), `quotient` (quotient and remainder, summed) and `robe` (blocks of numbers at hashed places).
`collisionless` and `quotient` need codes 0 ... n - 1, so a vocabulary of the training split is stored; a value that is
not in it is code 0. `pareto` trains every scheme at every budget.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from stillhouse.config.specs import MethodConfig, OptimizerSpec, Spec, TrainSpec
from stillhouse.data import Loader
from stillhouse.errors import UserError, unknown
from stillhouse.methods.compression.unified_embedding.columns import Columns, TableSpec, load_columns
from stillhouse.methods.compression.unified_embedding.hashing import encode
from stillhouse.methods.compression.unified_embedding.network import Ranking, TableNetwork, class_probs
from stillhouse.methods.compression.unified_embedding.table import Feature, Scheme, UnifiedEmbedding, collisions
from stillhouse.randomness import keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Product, read_meta, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import evaluating

Name = Literal[
    "unified", "hashing", "collisionless", "sum", "sum_split", "quotient", "quotient_split", "robe", "robe_split"
]
SCHEMES: dict[str, tuple[Scheme, bool]] = {
    "unified": ("hash", True),
    "hashing": ("hash", False),
    "collisionless": ("exact", False),
    **{name + tail: (name, not tail) for name in ("sum", "quotient", "robe") for tail in ("", "_split")},
}
"""Name in a recipe -> how a row is found, and whether features share the memory."""


class EmbeddingSpec(Spec):
    """The embeddings of all features."""

    scheme: Name = "unified"
    share: float | None = Field(
        None, gt=0, description="Rows as a share of the distinct values of all features in the training split."
    )
    rows: int | None = Field(None, ge=1, description="Or M, the number of rows (of each of `tables`).")
    dim: int = Field(8, ge=1, description="d: width of a chunk.")
    chunks: int | dict[str, int] = Field(
        1, description="Look-ups of a value: a number for all features, or by feature (others: 1)."
    )
    tables: int = Field(1, ge=1, description="unified: K tables, taken by chunks in turn.")

    @model_validator(mode="after")
    def _fits(self) -> EmbeddingSpec:
        if (self.share is None) == (self.rows is None) and self.scheme != "collisionless":
            raise ValueError("give exactly one of share and rows")
        if any(c < 1 for c in ([self.chunks] if isinstance(self.chunks, int) else self.chunks.values())):
            raise ValueError("chunks must be at least 1")
        return self


class HeadSpec(Spec):
    """The network over the embeddings."""

    cross: int = Field(0, ge=0, description="DCN-V2 cross layers.")
    hidden: list[int] = Field(default_factory=lambda: [64], description="Widths of the perceptron.")


class ParetoSpec(Spec):
    """Further models, for a curve of parameters against AUC (`pareto.html`)."""

    shares: list[float] = Field(min_length=1)
    schemes: list[Name] = Field(min_length=1)


class Config(MethodConfig):
    data: Annotated[TableSpec, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)]
    embedding: EmbeddingSpec
    head: HeadSpec = Field(default_factory=HeadSpec)
    train: TrainSpec = Field(
        default_factory=lambda: TrainSpec(
            epochs=12, batch_size=64, optimizer=OptimizerSpec(name="adam", lr=2e-3, weight_decay=1e-5), best="auc"
        )
    )
    pareto: ParetoSpec | None = None


@dataclass
class EmbeddingModel(Product):
    """A network over categorical columns.

    Attributes:
        network: one or C logits.
        features, embedding, head: how it is build_network again.
        rows: of its memory.
        dense: names of the columns of numbers, with the mean and spread that they are scaled by.
        classes: C.
        vocabularies: sorted codes of each feature, where the scheme needs positions; else empty.
    """

    kind: ClassVar[str] = "stillhouse.methods.compression.unified_embedding:EmbeddingModel"
    network: TableNetwork
    features: list[Feature]
    embedding: EmbeddingSpec
    head: HeadSpec
    rows: int
    dense: dict[str, tuple[float, float]]
    classes: int
    vocabularies: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def probabilities(self, columns: Mapping[str, Sequence[Any]]) -> Tensor:
        """Class probabilities (n, C) of rows given by columns: integers, words or None for features, numbers for dense
        columns; others are not read.

        Raises:
            UserError: a column that is missing, with the nearest that is there.
        """
        for name in [*(f.name for f in self.features), *self.dense]:
            if name not in columns:
                raise unknown("column (which the model needs)", name, columns)
        codes = torch.stack([encode(columns[f.name]) for f in self.features], 1)
        dense = [(torch.as_tensor(columns[n]).float() - m) / s for n, (m, s) in self.dense.items()]
        device = self.network.table.weight.device
        with evaluating(self.network):
            return class_probs(
                self.network(self.known(codes).to(device), torch.stack(dense, 1).to(device) if dense else None)
            ).cpu()

    def known(self, codes: Tensor) -> Tensor:
        """(n, T) codes as the table takes them: positions from 1 in the vocabularies (0: not in it) where there are
        any, else as they are."""
        return positions(codes, [self.vocabularies[f.name] for f in self.features]) if self.vocabularies else codes

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {**state_on_cpu(self.network), **{f"vocabulary:{k}": v for k, v in self.vocabularies.items()}}
        save_file({k: v.contiguous() for k, v in tensors.items()}, str(folder / "model.safetensors"))
        meta = {
            "kind": self.kind,
            "format": 1,
            "features": [[f.name, f.chunks, f.size] for f in self.features],
            "embedding": self.embedding.model_dump(mode="json"),
            "head": self.head.model_dump(mode="json"),
            "rows": self.rows,
            "dense": self.dense,
            "classes": self.classes,
        }
        (folder / "product.json").write_text(json.dumps(meta, indent=1))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> EmbeddingModel:
        from safetensors.torch import load_file

        meta, tensors = read_meta(folder), load_file(str(Path(folder) / "model.safetensors"))
        features = [Feature(*f) for f in meta["features"]]
        embedding, head = EmbeddingSpec.model_validate(meta["embedding"]), HeadSpec.model_validate(meta["head"])
        network = build_network(features, embedding, head, meta["rows"], len(meta["dense"]), meta["classes"])
        vocabularies = {k.partition(":")[2]: tensors.pop(k) for k in sorted(tensors) if k.startswith("vocabulary:")}
        network.load_state_dict(tensors)
        dense = {k: tuple(v) for k, v in meta["dense"].items()}
        return cls(network.eval(), features, embedding, head, meta["rows"], dense, meta["classes"], vocabularies)


def build_network(
    features: Sequence[Feature], embedding: EmbeddingSpec, head: HeadSpec, rows: int, dense: int, classes: int
) -> TableNetwork:
    """A fresh network."""
    scheme, shared = SCHEMES[embedding.scheme]
    table = UnifiedEmbedding(features, rows, embedding.dim, tables=embedding.tables, scheme=scheme, shared=shared)
    return TableNetwork(table, dense, head.cross, head.hidden, classes)


def positions(codes: Tensor, vocabularies: Sequence[Tensor]) -> Tensor:
    """(n, T) codes -> their positions in sorted vocabularies, from 1; 0 where a code is not there."""
    out = torch.zeros_like(codes)
    for t, words in enumerate(vocabularies):
        column = codes[:, t].contiguous()
        at = torch.searchsorted(words, column).clamp_max(len(words) - 1)
        out[:, t] = torch.where(words[at] == column, at + 1, 0)
    return out


class UnifiedEmbeddings(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        data = load_columns(config.data)
        tokens = sum(len(v) for v in data.vocabularies())
        rows = _rows(config.embedding, tokens)
        _features(config.embedding, data)
        steps = config.train.epochs * -(-len(data.split["train"]) // config.train.batch_size)
        does = (
            f"train on {len(data.names)} features with {tokens} values, by '{config.embedding.scheme}' with {rows} "
            f"rows of {config.embedding.dim}"
        )
        stages = [Stage("model", does, steps=steps)]
        if config.pareto is not None:
            p = config.pareto
            does = f"train {len(p.schemes)} schemes at {len(p.shares)} budgets for the curve of parameters against AUC"
            stages.append(Stage("pareto", does, steps=steps * len(p.schemes) * len(p.shares)))
        return stages

    def run(self, config: Config, run: Run) -> EmbeddingModel:
        data = load_columns(config.data)
        product = _fitted(config, config.embedding, data, run, "model")
        if config.pareto is not None:
            points: dict[str, list[tuple[float, float]]] = {}
            for scheme in config.pareto.schemes:
                for share in config.pareto.shares if scheme != "collisionless" else [1.0]:
                    spec = config.embedding.model_copy(update={"scheme": scheme, "share": share, "rows": None})
                    name = f"{scheme}_{share:g}"

                    def make(spec: EmbeddingSpec = spec, name: str = name) -> dict[str, float]:
                        return _judged(_fitted(config, spec, data, run, name), data, run)

                    uses = {"spec": spec.model_dump(mode="json"), "data": data.fingerprint, "seed": config.seed}
                    options = config.model_dump(mode="json", include={"head", "train", "data"})
                    found = run.stage(f"pareto.{name}", make, {**uses, **options}, shared=False)
                    product.figures |= {f"{k}_{name}": found[k] for k in ("auc", "accuracy", "table_parameters")}
                    points.setdefault(scheme, []).append((found["parameters"], found["auc"]))
            draw_pareto(run.folder, points)
        return product


@evaluates(EmbeddingModel.kind)
def judge(product: EmbeddingModel, run: Run) -> dict[str, float]:
    """Test AUC (class 1; with more classes, one against the rest), accuracy and nll, parameters, and how values
    collide."""
    return _judged(product, load_columns(run.config.data), run)  # type: ignore[attr-defined]


def draw_pareto(folder: Path, points: Mapping[str, Sequence[tuple[float, float]]]) -> Path:
    """`pareto.html` in a folder: parameters of the whole model against test AUC, a curve a scheme."""
    from stillhouse.reporting.figures import lines
    from stillhouse.reporting.page import figure, page, section, write

    curves = {name: tuple(zip(*sorted(curve))) for name, curve in points.items()}
    plot = lines(curves, "parameters of the model, log scale", "test AUC")  # type: ignore[arg-type]
    plot.update_xaxes(type="log")
    words = "Test AUC against the parameters of the model, tables and network; up and to the left is better."
    return write(
        folder / "pareto.html",
        page("Parameters against AUC", "", [section("Schemes of embeddings", words, figure(plot, "pareto", words))]),
    )


def _rows(spec: EmbeddingSpec, tokens: int) -> int:
    return spec.rows or max(1, round((spec.share or 1.0) * tokens))


def _features(spec: EmbeddingSpec, data: Columns) -> list[Feature]:
    if isinstance(spec.chunks, dict):
        for name in spec.chunks:
            if name not in data.names:
                raise unknown("feature (embedding.chunks)", name, data.names)
    exact = SCHEMES[spec.scheme][0] in ("exact", "quotient")  # one more value there: the unknown
    sizes = [len(v) + exact for v in data.vocabularies()]
    return [
        Feature(n, spec.chunks if isinstance(spec.chunks, int) else spec.chunks.get(n, 1), s)
        for n, s in zip(data.names, sizes)
    ]


def _fitted(config: Config, spec: EmbeddingSpec, data: Columns, run: Run, name: str) -> EmbeddingModel:
    """A model trained from scratch."""
    features, words = _features(spec, data), data.vocabularies()
    rows = _rows(spec, sum(map(len, words)))
    with keyed("model", config.seed):
        network = build_network(features, spec, config.head, rows, len(data.dense_names), data.classes)
    vocabularies = dict(zip(data.names, words)) if SCHEMES[spec.scheme][0] in ("exact", "quotient") else {}
    product = EmbeddingModel(network, features, spec, config.head, rows, data.scaling(), data.classes, vocabularies)
    train, val = (data.part(s, product.known) for s in ("train", "val"))
    if not len(train):
        raise UserError("unified_embedding: the training split holds no row.")
    before = network.angle()
    loader = Loader(train, min(config.train.batch_size, len(train)), seed=run.seed, shuffle=True, drop_last=True)
    fitted = run.fit(name, Ranking(network), loader, config.train, evaluate=lambda m, d: val.scores(m, d))
    product.figures = {"train_seconds": fitted.seconds, "angle_before": before, "angle_after": network.angle()}
    return product


def _judged(product: EmbeddingModel, data: Columns, run: Run) -> dict[str, float]:
    test = data.part("test", product.known)
    figures = test.scores(product.network, run.device)
    started = time.perf_counter()
    test.scores(product.network, run.device)
    figures["rows_per_second"] = len(test) / (time.perf_counter() - started)
    table = product.network.table
    figures["table_parameters"] = float(table.weight.numel())
    figures["parameters"] = float(sum(p.numel() for p in product.network.parameters()))
    if table.scheme in ("hash", "exact"):
        words = dict(zip(data.names, data.vocabularies()))
        codes = {n: torch.arange(1, len(w) + 1) if product.vocabularies else w for n, w in words.items()}
        counted = collisions(table.cpu(), codes)
        weight = {n: len(w) for n, w in words.items()}
        for which in ("same", "same_expected", "other", "other_expected"):
            figures[f"collisions_{which}"] = sum(counted[n][which] * weight[n] for n in words) / sum(weight.values())
    return figures

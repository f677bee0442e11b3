"""DistillWeighted, DistillNearest: a small model learns a task of few labels from models of the most similar tasks.

paper: Distilling from Similar Tasks for Transfer Learning on a Budget
venue: ICCV 2023
arxiv: 2304.12314
task: classification
family: semi-supervised, several teachers of other tasks
use when: few labels, many unlabelled images, and trained models of other tasks whose data are not at hand
needs: labels, `data.unlabelled`, source models with their own classes

PARC (Bolya et al., NeurIPS 2021) measures how a source's features order pairs of labelled target images as their labels
do: 100 times Spearman's correlation of both distances. Rescaled over the zoo to [0, 1] and raised to `power`, the
similarities become weights. The student learns the labels, and through one linear head for each source, which is
dropped at the end, the sources' class probabilities on unlabelled images, in the sources' own classes. `nearest` takes
the most similar source alone.
No code was released for the training. Reconstructed, as no source says it: the rescaling by minimum and maximum (so the
least similar source counts nothing), the power 12, the weight 0.8 of the labels, heads of one linear layer, temperature
1, the schedule. The published code of PARC computes label distances in floating point, which splits ties at random;
here they are exact. By default the sources see each unlabelled image once, whole (`precompute`); else as the student
does. Other similarities (CKA, RSA) are not here. `pool_loss: fixmatch` and `none` are the baselines without sources,
and `only` takes one source by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.names import folder_name
from stillhouse.config.specs import Data, InputSpec, MethodConfig, Model, ModelSpec, Teacher, TeacherSpec, TrainSpec
from stillhouse.data import DataBundle, Loader
from stillhouse.data.source import find_root, located
from stillhouse.distillation.own_input import OwnInput
from stillhouse.distillation.teachers import FrozenTeacher, Reader
from stillhouse.errors import UserError
from stillhouse.functional.divergences import soft_cross_entropy
from stillhouse.functional.precision import full_precision
from stillhouse.functional.pseudo_labels import confident_pseudo_loss
from stillhouse.methods.distillation import describe
from stillhouse.models import build
from stillhouse.models.sources import published_normalisation
from stillhouse.randomness import keyed, permutation
from stillhouse.runs.judging import check_groups
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, first_samples, to_device
from stillhouse.tasks.classification import Classification
from stillhouse.training.context import Progress
from stillhouse.training.module import TrainingModule

# ---- which sources matter --------------------------------------------------------------------------------------------


def parc(features: np.ndarray, labels: np.ndarray, components: int | None = None) -> float:
    """100 times Spearman's correlation between the distances of features and those of labels, over pairs of samples.

    A distance is 1 less Pearson's correlation of two rows; columns of features are standardised first. Labels of one
    class a sample have two distances only, so that ties are real.

    Args:
        features: (n, D).
        labels: (n,) class ids, or (n, C) of several classes a sample.
        components: reduce the features to so many principal components first; None: all.

    Raises:
        UserError: fewer than three samples, one class, one feature, or a sample whose features are all the same.
    """
    from scipy.stats import rankdata

    features = np.asarray(features, dtype=np.float64)
    if len(features) < 3 or len(features) != len(labels):
        raise UserError(f"PARC needs at least three samples with a label each; given: {len(features)}, {len(labels)}.")
    if components is not None and components < min(features.shape):
        from sklearn.decomposition import PCA

        features = PCA(n_components=components, random_state=0).fit_transform(features)
    deviation = features.std(0)
    scaled = np.where(deviation > 0, (features - features.mean(0)) / np.where(deviation > 0, deviation, 1), 0.0)
    upper = np.triu_indices(len(features), 1)
    ours = _distances(scaled, "features")[upper]
    if np.ndim(labels) == 1:
        theirs = (np.asarray(labels)[:, None] != np.asarray(labels)[None]).astype(np.float64)[upper]
    else:
        theirs = _distances(np.asarray(labels, dtype=np.float64), "labels")[upper]
    if theirs.min() == theirs.max() or ours.min() == ours.max():
        raise UserError("PARC needs samples of at least two classes, and features that differ.")
    return 100 * float(np.corrcoef(rankdata(ours), rankdata(theirs))[0, 1])


def _distances(rows: np.ndarray, what: str) -> np.ndarray:
    """(n, n) 1 - Pearson's correlation of rows (n, D), to ten decimals."""
    centred = rows - rows.mean(1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    constant = np.flatnonzero(norms[:, 0] <= 1e-12)
    if len(constant):
        raise UserError(f"PARC: the {what} of sample {int(constant[0])} are all the same, so they correlate with none.")
    unit = centred / norms
    return np.round(1 - unit @ unit.T, 10)


def source_weights(similarities: Sequence[float], power: float = 12.0, top: int | None = None) -> list[float]:
    """Weights of sources, which sum to 1: similarities rescaled to [0, 1] over the zoo, to this power (0: uniform,
    infinity: the best alone), and of the `top` best only.

    Raises:
        UserError: no source, or a similarity that is no number.
    """
    scores = np.asarray(similarities, dtype=np.float64)
    if not len(scores) or not np.isfinite(scores).all():
        raise UserError(f"Weights need a similarity for each of at least one source; given: {list(similarities)}.")
    spread = scores.max() - scores.min()
    scaled = (scores - scores.min()) / spread if spread > 0 else np.ones_like(scores)
    if math.isinf(power):
        raised = np.zeros_like(scores)
        raised[scores.argmax()] = 1.0
    else:
        raised = scaled**power  # 0^0 = 1
    if top is not None:
        raised[np.argsort(-scores, kind="stable")[top:]] = 0.0
    weights: list[float] = (raised / raised.sum()).tolist()
    return weights


# ---- the student -----------------------------------------------------------------------------------------------------


@full_precision
def source_loss(logits: Tensor, source_logits: Tensor, temperature: float = 1.0, hard: bool = False) -> Tensor:
    """T^2 times the cross-entropy of a head (B, C_s) with the source's probabilities at temperature T, or with its arg
    max."""
    if hard:
        return F.cross_entropy(logits, source_logits.argmax(-1))
    target = (source_logits.detach() / temperature).softmax(-1)
    return temperature**2 * soft_cross_entropy(logits / temperature, target)


class DistillWeighted(TrainingModule):
    """Training module of the student: labels, and the sources through heads that are not part of it.

    Args:
        student: the target model.
        weights: source -> weight; sources of weight below 1e-6 are left out.
        sources: source -> its logits (U, C_s) by the index of unlabelled images, or itself, run in each step.
        label_weight: lambda, of the labels; the rest is of the unlabelled images.
        embedding: the student's classifier submodule, where it is not found by itself.
        pool_loss: sources, fixmatch or none.
        temperature, hard: see `source_loss`.
        threshold, view: of fixmatch.
        seed: of the heads.
    """

    def __init__(
        self,
        student: nn.Module,
        weights: Mapping[str, float],
        sources: Mapping[str, Tensor | FrozenTeacher],
        label_weight: float = 0.8,
        embedding: str | None = None,
        pool_loss: Literal["sources", "fixmatch", "none"] = "sources",
        temperature: float = 1.0,
        hard: bool = False,
        threshold: float = 0.95,
        view: str = "strong",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.student, self.label_weight, self.pool_loss = student, label_weight, pool_loss
        self.temperature, self.hard, self.threshold, self.view, self.seed = temperature, hard, threshold, view, seed
        used = {n: w for n, w in weights.items() if w >= 1e-6} if pool_loss == "sources" else {}
        self.names, self.weights = list(used), list(used.values())
        self._live = {n: s for n in self.names if isinstance(s := sources[n], FrozenTeacher)}
        for i, name in enumerate(self.names):
            if isinstance(given := sources[name], Tensor):
                self.register_buffer(f"outputs_{i}", given, persistent=False)
        self._reader = Reader(student, "student", embedding)
        self.heads = nn.ModuleList()

    @property
    def teachers(self) -> Mapping[str, Any]:
        return dict(self._live)

    def build(self, batch: Batch) -> None:
        """Find the embedding, and make a head for each source."""
        if len(self.heads) or not self.names:
            return
        device = next(self.student.parameters()).device
        probe = to_device(first_samples({"input": batch["input"]}, 2), device)
        mode = self.student.training
        self.student.eval()
        with torch.no_grad():
            self._reader.attach({"embedding"}, probe)
            width = self._reader(probe).require("embedding").shape[-1]
            for source in self._live.values():
                source.to(device)
            outputs = [self._outputs(i, {**probe, "index": torch.zeros(2, dtype=torch.int64)}) for i in self._numbers]
        self.student.train(mode)
        with keyed("heads", self.seed):
            self.heads = nn.ModuleList(nn.Linear(width, logits.shape[-1]) for logits in outputs)

    @property
    def _numbers(self) -> range:
        return range(len(self.names))

    def _outputs(self, number: int, batch: Batch) -> Tensor:
        """(B, C_s) logits of a source on unlabelled images."""
        name = self.names[number]
        if name in self._live:
            return self._live[name](batch).log_probs()
        stored: Tensor = getattr(self, f"outputs_{number}")
        return stored[batch["index"].to(stored.device)]

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        known, pool = len(batch["label"]), batch.get("unlabelled", {})
        images = [batch["input"]]
        if self.pool_loss != "none":
            images.append(pool["input"])
        if self.pool_loss == "fixmatch":
            images.append(pool["views"][self.view])
        signals = self._reader({"input": torch.cat(images)})
        logits = signals.require("logits").float()
        labels = F.cross_entropy(logits[:known], batch["label"])
        if self.pool_loss == "none":
            return {"loss": labels, "labels": labels}
        if self.pool_loss == "fixmatch":
            weak, strong = logits[known:].chunk(2)
            other = confident_pseudo_loss(weak, strong, self.threshold)
            return {"loss": labels + other, "labels": labels, "unlabelled": other}
        embedding = signals.require("embedding")[known:]
        terms = {
            f"source_{name}": source_loss(head(embedding), self._outputs(i, pool), self.temperature, self.hard)
            for i, (name, head) in enumerate(zip(self.names, self.heads))
        }
        other = torch.stack([w * term for w, term in zip(self.weights, terms.values())]).sum()
        loss = self.label_weight * labels + (1 - self.label_weight) * other
        return {"loss": loss, "labels": labels, "unlabelled": other, **terms}

    def close(self) -> None:
        """Leave no hook on the student."""
        self._reader.close()


# ---- the procedure ---------------------------------------------------------------------------------------------------


class Config(MethodConfig):
    data: Data = Field(description="The target: few labels, and `unlabelled`.")
    sources: dict[str, Teacher] = Field(
        description="The zoo, by name: networks with classes of their own, trained on their `data` where they have no "
        "weights."
    )
    student: Model
    weighting: Literal["weighted", "nearest", "worst", "uniform"] = Field(
        "weighted", description="By similarity, the most similar source alone, the least similar alone, all alike."
    )
    only: str | None = Field(None, description="One source, whatever its similarity, which is not measured then.")
    power: float = Field(12.0, ge=0, description="weighted: exponent of the rescaled similarities.")
    top: int | None = Field(None, ge=1, description="weighted: the most similar so many; null: all.")
    probe: int = Field(500, ge=3, description="Labelled images on which similarity is measured, at most.")
    components: int | None = Field(
        None, ge=2, description="Principal components of features for similarity; null: all."
    )
    pool_loss: Literal["sources", "fixmatch", "none"] = Field(
        "sources", description="On unlabelled images: the sources, the student's own confident predictions, nothing."
    )
    label_weight: float = Field(0.8, ge=0, le=1, description="Lambda, of the labels; the rest is of the sources.")
    temperature: float = Field(1.0, gt=0, description="Of the sources and their heads.")
    hard: bool = Field(False, description="Learn the sources' most probable class alone.")
    precompute: bool = Field(
        True,
        description="Run each source once over the whole, unaugmented images; false: in every step, on what the "
        "student sees.",
    )
    threshold: float = Field(0.95, ge=0, le=1, description="fixmatch: the confidence.")
    view: str = Field("strong", description="fixmatch: which of data.views is the strong one.")
    singles: bool = Field(
        False, description="Also train a student from each source alone, to see whether similarity foretells its use."
    )
    train: TrainSpec = Field(default_factory=TrainSpec)
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.data.unlabelled is None:
            raise ValueError("it learns from unlabelled images too: set data.unlabelled, such as {size: 1000}")
        if not self.sources:
            raise ValueError("name at least one source")
        for name, spec in self.sources.items():
            folder_name(name, "sources")
            if spec.model is None or spec.store is not None or spec.view is not None:
                raise ValueError(f"sources.{name} must be one network: `model`, without store and view")
        if self.only is not None and self.only not in self.sources:
            raise ValueError(f"only: there is no source '{self.only}'; there are {', '.join(self.sources)}")
        pool = self.data.unlabelled.data or self.data
        if self.pool_loss == "fixmatch" and self.view not in (pool.views or {}):
            raise ValueError(f"fixmatch needs a strong view: add '{self.view}' to data.views")
        return self

    @property
    def reads_sources(self) -> bool:
        return self.pool_loss == "sources"


SOURCES = Stage("teacher", "train the sources that have no weights (stored, shared)")
SIMILARITY = Stage("similarity", "measure how similar each source's task is (stored, shared)")
OUTPUTS = Stage("outputs", "run the sources over the unlabelled images (stored, shared)")
SINGLE = Stage("single", "train a student from each source alone")
STUDENT = Stage("student", "train the student")


class SimilarTasks(Method[Config]):
    unlabelled = True

    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data, Classification)
        check_groups(bundle.task, config.evaluate)
        student = run.model(config.student, config.data)
        steps = config.train.epochs * len(run.streams(config.data, config.train.batch_size))
        stages = []
        if config.reads_sources:
            models = {name: str(spec.model) for name, spec in config.sources.items()}
            stages = [SOURCES.filled(models=models), SIMILARITY]
            stages += [OUTPUTS] if config.precompute else []
            stages += [SINGLE.filled(steps=steps * len(models))] if config.singles else []
        return [*stages, STUDENT.filled(models={"student": describe(config.student.model, student)}, steps=steps)]

    # -- the zoo

    def source(self, config: Config, run: Run, name: str) -> FrozenTeacher:
        """A frozen source that reads the target's images as its own."""
        spec, task = config.sources[name], run.data(config.data).task
        if spec.train is None and spec.data is None:  # its classes are those of its weights
            if not spec.pretrained and spec.checkpoint is None:
                raise UserError(
                    f"The source '{name}' ({spec.model}) has no weights: give it a `checkpoint`, `pretrained: true`, "
                    "or `data` and `train`."
                )
            options = spec.network.with_classifier("same").model_dump()
            network = ModelSpec.model_validate(located(options, find_root(config.data, run.data_root)))
            with keyed("source", name):
                model = build(network)
            own, size = (published_normalisation(spec.network, model) if spec.pretrained else None), None
        else:
            model = run.network(f"sources.{name}", spec, config.data, as_saved=True)
            its = run.data(spec.data or config.data, Classification).task
            own, size = its.normalisation, tuple(its.input_shape[1:])
            if its.input_shape[0] != task.input_shape[0] != 1:
                raise UserError(
                    f"The source '{name}' reads images of {its.input_shape[0]} channels, but the target's have "
                    f"{task.input_shape[0]}; only grey images can be shown to a network for colour."
                )
        return FrozenTeacher(model, embedding=spec.embedding, name=name, prepare=own_input(task, spec, own, size))

    def similarity(self, config: Config, run: Run, sources: Mapping[str, FrozenTeacher]) -> dict[str, float]:
        """PARC of each source on the labelled images."""
        bundle = run.data(config.data)

        def make() -> dict[str, float]:
            rows = np.sort(
                permutation(len(bundle.dataset("train", train=False)), config.data.seed, "probe")[: config.probe]
            )
            found = {}
            for name, source in sources.items():
                features, labels = features_of(source, run.loader(config.data, "train"), run.device)
                try:
                    found[name] = parc(features[rows], labels[rows], config.components)
                except UserError as error:
                    raise UserError(f"sources.{name}: {error}") from None
            return found

        uses = {
            "sources": dict(sources),
            "data": bundle,
            "probe": config.probe,
            "components": config.components,
            "seed": config.data.seed,
        }
        measured: dict[str, float] = run.stage(SIMILARITY, make, uses)
        return measured

    def outputs(self, config: Config, run: Run, name: str, source: FrozenTeacher) -> Tensor:
        """(U, C_s) logits of a source on the whole unlabelled images."""
        other = config.data.unlabelled
        assert other is not None
        bundle: DataBundle = run.data(config.data)

        def make() -> dict[str, Tensor]:
            loader = Loader(run.unlabelled(config.data, train=False), bundle.evaluation_batch)
            source.to(run.device)
            return {"logits": torch.cat([source(to_device(b, run.device)).log_probs().cpu() for b in loader])}

        pool = run.data(other.data) if other.data is not None else None
        found = run.stage(f"{OUTPUTS}.{name}", make, {"source": source, "data": bundle, "pool": pool})
        logits: Tensor = found["logits"]
        return logits

    # -- the student

    def run(self, config: Config, run: Run) -> Student:
        sources: dict[str, FrozenTeacher] = {}
        figures: dict[str, float] = {}
        weights: dict[str, float] = {}
        known: dict[str, Tensor | FrozenTeacher] = {}
        if config.reads_sources:
            sources = {name: self.source(config, run, name) for name in config.sources}
            needed = config.only is None or config.singles
            scores = self.similarity(config, run, sources) if needed else {}
            weights = chosen(config, scores)
            figures |= {f"parc_{name}": score for name, score in scores.items()}
            figures |= {f"weight_{name}": weight for name, weight in weights.items()}
            used = list(sources) if config.singles else [n for n in sources if weights[n] >= 1e-6]
            known = {n: self.outputs(config, run, n, sources[n]) if config.precompute else sources[n] for n in used}
            if config.singles:
                figures |= self.single_figures(config, run, known, scores)
        student = run.model(config.student, config.data)
        figures["train_seconds"] = self.fit(config, run, str(STUDENT), student, weights, known)
        run.record["weights"] = {name: source.fingerprint() for name, source in sources.items()}
        return run.student(student, config.student, config.data, figures)

    def fit(
        self,
        config: Config,
        run: Run,
        stage: str,
        student: nn.Module,
        weights: Mapping[str, float],
        known: Mapping[str, Tensor | FrozenTeacher],
    ) -> float:
        """Train a student; its seconds."""
        module = DistillWeighted(
            student,
            weights,
            known,
            config.label_weight,
            config.student.embedding,
            config.pool_loss,
            config.temperature,
            config.hard,
            config.threshold,
            config.view,
            run.seed,
        )
        loader = run.streams(config.data, config.train.batch_size)
        evaluate, splits = run.validating(config.data), run.splits(config.data)
        fitted = run.fit(stage, module, loader, config.train, evaluate=evaluate, splits=splits)
        module.close()
        return fitted.seconds

    def single_figures(
        self, config: Config, run: Run, known: Mapping[str, Tensor | FrozenTeacher], scores: Mapping[str, float]
    ) -> dict[str, float]:
        """Accuracy of a student from each source alone, and Spearman's correlation of similarity with it."""
        from scipy.stats import spearmanr

        found = {}
        for name in known:
            student = run.model(config.student, config.data)
            self.fit(config, run, f"{SINGLE}.{name}", student, {name: 1.0}, known)
            device, loader = next(student.parameters()).device, run.loader(*run.judging_data())
            found[name] = run.figures(student, config.data, loader, device, ["accuracy"])["accuracy"]
        out = {f"accuracy_{name}_alone": value for name, value in found.items()}
        if len(found) > 2:
            out["rank_correlation"] = float(spearmanr([scores[n] for n in found], list(found.values())).statistic)
        return out


def chosen(config: Config, scores: Mapping[str, float]) -> dict[str, float]:
    """The weight of each source, as the recipe says."""
    names, values = list(scores), list(scores.values())
    if config.only is not None:
        return {name: float(name == config.only) for name in config.sources}
    if config.weighting == "worst":
        values = [-v for v in values]
    power = {"weighted": config.power, "uniform": 0.0}.get(config.weighting, math.inf)
    return dict(zip(names, source_weights(values, power, config.top if config.weighting == "weighted" else None)))


def own_input(task: Classification, spec: TeacherSpec, own: Any, size: tuple[int, ...] | None) -> OwnInput | None:
    """What makes a source's images of the target's: by its spec, else as those that it was trained on."""
    wanted, given = spec.input or InputSpec(), task.normalisation
    if wanted.mean is not None and wanted.std is not None:
        own = (wanted.mean, wanted.std)
    if wanted.size is not None:
        size = (wanted.size, wanted.size) if isinstance(wanted.size, int) else wanted.size
    if spec.input is None and own in (None, given) and size in (None, tuple(task.input_shape[1:])):
        return None
    sides = None if size is None else (int(size[0]), int(size[1]))
    return OwnInput(given, own or ((), ()), sides, wanted.pool or 1, wanted.interpolation)


@torch.no_grad()
def features_of(source: FrozenTeacher, loader: Any, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (n, D) of a source and labels (n,) of a loader."""
    source.to(device)
    features, labels = [], []
    for number, loaded in enumerate(loader):
        batch = to_device(loaded, device)
        if not number:
            source.attach({"embedding"}, first_samples({"input": batch["input"]}, 2), source.model)
        features.append(source({"input": batch["input"]}).require("embedding").float().cpu())
        labels.append(batch["label"].cpu())
    source.readers()[0].close()
    return torch.cat(features).numpy(), torch.cat(labels).numpy()

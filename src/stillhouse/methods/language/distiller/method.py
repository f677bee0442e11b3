"""Distiller: distillation of text encoders as four choices (augmentation, hidden-state loss, layer mapping, prediction
loss), with MI-alpha among the losses, and a recommender of choices for new data.

paper: Distiller: A Systematic Study of Model Distillation Methods in Natural Language Processing
venue: SustaiNLP at EMNLP 2021
arxiv: 2109.11105
task: classification of text
family: hidden states, attention, mutual information; search over pipelines
use when: a fine-tuned text encoder shall become a smaller one, and it is not known which losses suit the data
needs: a text encoder fine-tuned on the task, a smaller one of the same tokenizer; labels are optional

The loss is w_kd x prediction + w_inter x the sum over matched layers + w_hard x labels. `intermediate.loss` is mse, ce,
cos, pkd, attention_mse, attention_ce, or mi: MI-alpha maximises a bound on the mutual information of teacher and
student states instead of making them equal; alpha 1 is InfoNCE (low variance, at most log(B - 1)), alpha 0 unbiased and
of high variance. Layers are matched by skip, last or emd (all pairs, weighed by the optimal transport between them).
Narrower students get a linear map in each pair, but for mi. Critics and maps are trained with the student and left out
of the product. `augment` adds copies of the texts with tokens swapped, dropped or replaced; `mixup` mixes word
embeddings of both networks alike, after the plain half of each batch.

The released sequence critic mixes up its axes; here it is what it evidently means, with a learned scale [R]. Contextual
substitution and back-translation, the paper's operators, need large models and are replaced by ones that need none.
Extractive question answering is not here. `auto` is AutoDistiller: it tries pipelines on other data sets, learns from
data-set facts and choices how much of the teacher's score is kept (gradient-boosted trees [R]), tries the `top` most
promising on `data`, and keeps the best by validation. Every trial is a stage, shared by all runs and processes, so that
`stillhouse bench -j` over variants with `auto.share` fills the table in parallel.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator
from torch import nn

from stillhouse.config.messages import spell
from stillhouse.config.specs import Data, DataSpec, MethodConfig, Model, Spec, Teacher, TeacherSpec, TrainSpec
from stillhouse.data import Loader
from stillhouse.distillation.objective import Objective
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.methods.distillation import describe
from stillhouse.methods.language.distiller.augmentation import AugmentedTexts, AugmentSpec, MixedDistillation
from stillhouse.methods.language.distiller.objectives import (
    AttentionLoss,
    AttentionMaps,
    Critic,
    HiddenLoss,
    HiddenStates,
    Labels,
    Predictions,
    Strategy,
    TransportedStates,
)
from stillhouse.methods.language.distiller.recommender import Recommender, Trial, importance, leave_one_out
from stillhouse.models.text_layers import attention_taps, heads_of, hidden_taps
from stillhouse.processes import share
from stillhouse.runs.judging import check_groups
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.tasks.tokens import Tokens


class CriticSpec(Spec):
    """mi: what scores pairs of states."""

    kind: Critic | None = Field(None, description="null: first_token for emd, else sequence.")
    hidden: int = Field(512, ge=1, description="first_token: width of the layers between.")
    out: int = Field(64, ge=1, description="first_token: width of what is multiplied.")
    heads: int = Field(8, ge=1, description="sequence: attention heads, which divide both widths.")
    feed_forward: int = Field(512, ge=1, description="sequence: width of the feed-forward layers.")


class IntermediateSpec(Spec):
    """The loss between matched layers."""

    loss: HiddenLoss | AttentionLoss = "mi"
    strategy: Strategy = Field("skip", description="skip | last | emd (mse and mi alone).")
    alpha: float = Field(0.9, ge=0, le=1, description="mi: below 0.5 clip the gradients (train.clip).")
    critic: CriticSpec = Field(default_factory=CriticSpec)


class PredictionSpec(Spec):
    """The loss between predictions."""

    loss: Literal["ce", "mse"] = "ce"
    temperature: float = Field(1.0, gt=0)


class WeightsSpec(Spec):
    """Weights of the three terms. The middle one is a sum over pairs of layers: a deeper student has a larger one."""

    prediction: float = Field(1.0, ge=0)
    intermediate: float = Field(1.0, ge=0)
    labels: float = Field(0.0, ge=0)


class Pipeline(Spec):
    """The four choices."""

    augment: AugmentSpec | None = None
    mixup: float = Field(0.0, ge=0, description="Parameter of the Beta distribution (published: 0.4); 0 is off.")
    intermediate: IntermediateSpec | None = Field(default_factory=IntermediateSpec)
    prediction: PredictionSpec = Field(default_factory=PredictionSpec)
    weights: WeightsSpec = Field(default_factory=WeightsSpec)

    @property
    def facts(self) -> dict[str, Any]:
        """The choices as numbers and words, for the recommender."""
        between, chain = self.intermediate, [] if self.augment is None else self.augment.chain
        return {
            "loss": "none" if between is None else between.loss,
            "alpha": between.alpha if between is not None and between.loss == "mi" else -1.0,
            "strategy": "none" if between is None else between.strategy,
            "prediction": self.prediction.loss,
            "mixup": float(self.mixup > 0),
            "aug_p": 0.0 if self.augment is None else self.augment.p,
            **{name: float(chain.index(name) + 1 if name in chain else 0) for name in ("swap", "delete", "unigram")},
        }


class AutoSpec(Spec):
    """AutoDistiller: pipelines tried elsewhere, and the most promising of them here."""

    data: dict[str, Data] = Field(
        min_length=2, description="Data sets to try pipelines on, by name; not `data` itself."
    )
    space: dict[str, list[Any]] = Field(
        min_length=1,
        description="Keys of the pipeline and their values, such as {intermediate.loss: [mse, mi]}; every combination "
        "that is valid is a candidate.",
    )
    trials: int | None = Field(None, ge=2, description="Candidates tried on each data set, drawn; null: all.")
    train: TrainSpec = Field(default_factory=TrainSpec, description="Of the students of trials.")
    top: int = Field(3, ge=1, description="Recommended pipelines that are tried on `data`.")
    share: tuple[int, int] | None = Field(
        None, description="[i, n]: run trials i, i + n, … alone, to fill the table from n runs at once."
    )


class Config(MethodConfig):
    data: Data = Field(description="Text to be classified.")
    teacher: Teacher = Field(description="Fine-tuned on the task, or with `train`: to be.")
    student: Model
    pipeline: Pipeline = Field(default_factory=Pipeline)
    train: TrainSpec = Field(default_factory=TrainSpec)
    auto: AutoSpec | None = Field(None, description="Choose the pipeline; what `pipeline` says holds for all.")
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])

    @model_validator(mode="after")
    def _something_is_learned(self) -> Config:
        weights = self.pipeline.weights
        between = weights.intermediate if self.pipeline.intermediate is not None else 0.0
        if not weights.prediction and not weights.labels and not between:
            raise ValueError("pipeline.weights: all that is used weighs 0, so there is nothing to learn from")
        return self


class Distiller(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        task = classified(run, config.data)
        check_groups(task, config.evaluate)
        spec, stages = config.teacher, []
        teacher = run.model(spec.network, spec.data or config.data, "teacher", spec.seed or 0)
        student = run.model(config.student, config.data)
        if spec.train is not None and spec.checkpoint is None:
            named = {"teacher": describe(spec.network.model, teacher)}
            stages.append(Stage("teacher", "fine-tune the teacher on each data set (stored, shared)", named))
        candidates = [config.pipeline]
        if config.auto is not None:
            candidates = candidates_of(config.pipeline, config.auto)
            if run.validation(config.data) is None:
                raise UserError("auto chooses by validation data: set data.val to a share above 0.")
            count = len(tried(candidates, config.auto)) * len(config.auto.data)
            stages.append(Stage("trial", f"try pipelines, {count} times in all (stored, shared)"))
            stages.append(Stage("recommend", "learn which pipelines suit which data (stored, shared)"))
        for pipeline in candidates:  # what does not fit is found before anything is trained
            objectives_of(pipeline, student, teacher)
        steps = config.train.epochs * (len(self.loader(config, config.pipeline, config.train, config.data, run)))
        named = {"student": describe(config.student.model, student)}
        return [*stages, Stage("student", f"distil into the student on {config.data.name}", named, steps=steps)]

    def run(self, config: Config, run: Run) -> Student:
        if config.auto is None:
            student = run.model(config.student, config.data)
            teacher = run.teacher("teacher", config.teacher, config.data)
            figures = {"train_seconds": self.distil("student", config, config.pipeline, config.train, config.data,
                                                    run, student, teacher)}  # fmt: skip
            run.record["weights"] = {"teacher": teacher.fingerprint()}
            return run.student(student, config.student, config.data, figures)
        return self.searched(config, config.auto, run)

    @staticmethod
    def loader(config: Config, pipeline: Pipeline, train: TrainSpec, data: DataSpec, run: Run) -> Any:
        """Training batches; with copies of the texts half as many samples are read of each epoch's whole, so that an
        epoch has twice the steps."""
        if pipeline.augment is None:
            return run.loader(data, "train", train.batch_size, train=True)
        dataset = AugmentedTexts(run.data(data).dataset("train", train=True), pipeline.augment)
        return Loader(dataset, train.batch_size, seed=run.seed, shuffle=True, drop_last=True, **share())

    def distil(
        self,
        stage: str,
        config: Config,
        pipeline: Pipeline,
        train: TrainSpec,
        data: DataSpec,
        run: Run,
        student: nn.Module,
        teacher: Any,
    ) -> float:
        """Train a student by a pipeline, in place; the seconds."""
        if not isinstance(teacher, FrozenTeacher):
            raise UserError("distiller: the teacher must be one live network, whose hidden states are read.")
        module = MixedDistillation(
            student,
            teacher,
            objectives_of(pipeline, student, teacher.model),
            seed=run.seed,
            embedding=config.student.embedding,
            task=run.data(data).task,
            mixup=pipeline.mixup,
        )
        loader = self.loader(config, pipeline, train, data, run)
        fitted = run.fit(stage, module, loader, train, evaluate=run.validating(data), splits=run.splits(data))
        module.close()
        return fitted.seconds

    # ---- AutoDistiller -----------------------------------------------------------------------------------------------

    def searched(self, config: Config, auto: AutoSpec, run: Run) -> Student:
        """The best of the recommended pipelines on the data."""
        candidates = candidates_of(config.pipeline, auto)
        own, target = run.data(config.data), config.data.name
        for name, data in auto.data.items():
            classified(run, data)
            if run.data(data).fingerprint == own.fingerprint:
                raise UserError(
                    f"auto.data.{name} is `data` itself: the recommender must not see the scores that it is to predict."
                )
        chosen = tried(candidates, auto)
        pairs = list(itertools.product(auto.data, chosen))
        if auto.share is not None:
            pairs = pairs[auto.share[0] :: auto.share[1]]
        trials = [self.trial(config, auto, name, pipeline, run) for name, pipeline in pairs]
        run.record["trials"] = [vars(t) for t in trials]
        facts, teacher = self.facts(config, config.data, run)

        def recommend() -> dict[str, Any]:
            picked = Recommender(trials, run.seed).best(target, facts, [p.facts for p in chosen], auto.top)
            return {"picked": picked, "figures": leave_one_out(trials, auto.top, run.seed),
                    "importance": importance(trials, seed=run.seed)}  # fmt: skip

        uses = {"trials": [vars(t) for t in trials], "facts": facts, "top": auto.top, "seed": run.seed}
        made = run.stage("recommend", recommend, uses)
        run.record["importance"] = made["importance"]
        best: tuple[float, nn.Module, Pipeline] | None = None
        check = run.validation(config.data)
        for place, index in enumerate(made["picked"]):
            student = run.model(config.student, config.data)
            self.distil(f"student.{place}", config, chosen[index], config.train, config.data, run, student, teacher)
            score = run.figures(student.to(run.device), config.data, check, run.device)["accuracy"]
            if best is None or score > best[0]:
                best = score, student, chosen[index]
        assert best is not None
        run.record["pipeline"] = best[2].model_dump(mode="json")
        figures = {**made["figures"], "accuracy_validation": best[0], "pipelines_tried": float(len(trials))}
        return run.student(best[1], config.student, config.data, figures)

    def trial(self, config: Config, auto: AutoSpec, name: str, pipeline: Pipeline, run: Run) -> Trial:
        """One pipeline on one data set; its student is judged on validation data, on the test split where there is
        none."""
        data = auto.data[name]
        facts, teacher = self.facts(config, data, run)

        def make() -> dict[str, float]:
            student = run.model(config.student, data)
            self.distil("trial", config, pipeline, auto.train, data, run, student, teacher)
            split = next(s for s in ("val", "holdout", "test") if run.data(data).has(s))
            return run.figures(student.to(run.device), data, run.loader(data, split), run.device)

        uses = {"data": run.data(data), "teacher": teacher, "student": config.student, "pipeline": pipeline,
                "train": auto.train, "seed": run.seed}  # fmt: skip
        score = run.stage("trial", make, uses)["accuracy"]
        return Trial(name, facts, pipeline.facts, score / max(facts["teacher"], 1e-9))

    @staticmethod
    def facts(config: Config, data: DataSpec, run: Run) -> tuple[dict[str, float], FrozenTeacher]:
        """What is known of a data set before anything is distilled on it, and its teacher: number of samples and
        classes, length of texts, score of a classifier of word counts, and the teacher's score."""
        spec: TeacherSpec = config.teacher.model_copy(update={"data": data if config.teacher.train else None})
        teacher = run.teacher("teacher", spec, data)
        bundle = run.data(data)
        split = next((s for s in ("val", "holdout", "test") if bundle.has(s)), "train")
        score = run.figures(teacher.model.to(run.device), data, run.loader(data, split), run.device)["accuracy"]
        train, check = bundle.splits["train"], bundle.splits[split]
        found = {
            "samples": float(np.log(len(train.inputs))),
            "classes": float(bundle.num_classes),
            "length": float(train.inputs.lengths.mean()),
            "baseline": bag_of_words(train, check, bundle.task.vocabulary),
            "teacher": score,
        }
        return found, teacher


def classified(run: Run, data: DataSpec) -> Tokens:
    """The task of text to be classified. Raises `UserError` for other data."""
    task: Tokens = run.data(data, Tokens).task
    if task.kind != "classify":
        raise UserError(f"distiller is for text to be classified, but '{data.name}' is {task.kind} text.")
    return task


def bag_of_words(train: Any, check: Any, vocabulary: int) -> float:
    """Accuracy of naive Bayes on token counts."""
    from scipy.sparse import csr_matrix
    from sklearn.naive_bayes import MultinomialNB

    def counts(rows: Any) -> Any:
        values, starts = rows.inputs.values, rows.inputs.starts
        return csr_matrix((np.ones(len(values)), values, starts), shape=(len(starts) - 1, vocabulary))

    return float(MultinomialNB().fit(counts(train), train.classes).score(counts(check), check.classes))


def objectives_of(pipeline: Pipeline, student: nn.Module, teacher: nn.Module) -> list[tuple[Objective, float]]:
    """The weighted losses of a pipeline.

    Raises:
        UserError: networks whose layers cannot be paired so.
    """
    out: list[tuple[Objective, float]] = []
    weights, between = pipeline.weights, pipeline.intermediate
    if weights.prediction:
        out.append((Predictions(pipeline.prediction.loss, pipeline.prediction.temperature), weights.prediction))
    if between is not None and weights.intermediate:
        made: Objective
        if between.loss == "attention_mse" or between.loss == "attention_ce":
            if between.strategy == "emd":
                raise UserError("intermediate: strategy emd is for the losses mse and mi, not for attention maps.")
            taps, heads = (attention_taps(student), attention_taps(teacher)), (heads_of(student), heads_of(teacher))
            made = AttentionMaps(*taps, *heads, between.loss, between.strategy)
        else:
            hidden, critic = (hidden_taps(student), hidden_taps(teacher)), between.critic
            options: dict[str, Any] = {"alpha": between.alpha, **critic.model_dump(exclude={"kind"})}
            if between.strategy == "emd":
                made = TransportedStates(*hidden, between.loss, critic=critic.kind or "first_token", **options)
            else:
                options |= {"strategy": between.strategy, "critic": critic.kind or "sequence"}
                made = HiddenStates(*hidden, between.loss, **options)
        out.append((made, weights.intermediate))
    if weights.labels:
        out.append((Labels(), weights.labels))
    return out


def candidates_of(base: Pipeline, auto: AutoSpec) -> list[Pipeline]:
    """Every valid and distinct combination of the space.

    Raises:
        UserError: a key that is none of the pipeline's, or a space without a valid combination.
    """
    plain, out = base.model_dump(mode="json"), []
    seen = set()
    for values in itertools.product(*auto.space.values()):
        tree = merged(plain, dict(zip(auto.space, values)))
        try:
            made = Pipeline.model_validate(tree)
        except ValidationError as error:
            raise spell(error, Pipeline, "auto.space") from None
        between = made.intermediate
        if between is not None and between.strategy == "emd" and between.loss not in ("mse", "mi"):
            continue
        facts = tuple(sorted(made.facts.items()))
        if facts not in seen:
            seen.add(facts)
            out.append(made)
    if not out:
        raise UserError("auto.space: none of its combinations is valid; strategy emd is for the losses mse and mi.")
    return out


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A tree with dotted keys set; what is null on the way becomes a mapping, except where all that is set is null."""
    out: dict[str, Any] = copy.deepcopy(dict(tree))
    for name, value in changes.items():
        *way, last = name.split(".")
        at = out
        for part in way:
            at[part] = dict(at.get(part) or {})
            at = at[part]
        at[last] = copy.deepcopy(value)
    return out


def tried(candidates: list[Pipeline], auto: AutoSpec) -> list[Pipeline]:
    """The candidates that are tried, the same in every run."""
    if auto.trials is None or auto.trials >= len(candidates):
        return candidates
    return random.Random(0).sample(candidates, auto.trials)

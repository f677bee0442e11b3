"""DisWOT: finds the student architecture that is easiest to distil into, without training any candidate.

paper: DisWOT: Student Architecture Search for Distillation WithOut Training
venue: CVPR 2023
arxiv: 2303.15678
task: classification
family: student architecture search
use when: the student's architecture is open and training many candidates is too dear; its metrics also serve as losses
(`distil`)
needs: a teacher architecture, a space of students, one labelled batch; for the semantic metric, classifiers of one
width

Teacher and candidate are initialised with N(0, 1) and look at one batch in training mode; the score is minus the
distance of their classifier gradients (semantic, in closed form: one forward pass, no backward) minus that of their
relations between samples. As published the score is the sum, in which the semantic term is far the larger; `rank_sum`
[choice] weighs both alike, and `parameters` is the proxy to beat. Scores are means over `repeats` seeds and batches
[choice: the release takes one]. Parents are drawn from the whole population or its best `parents`; the released ageing
script's choice among the worst looks like a mistake and is not followed. Candidates that cannot be built rank last.
`correlate` trains several candidates across the ranking and reports Kendall's tau of score and distilled accuracy;
`space` defaults to the paper's S1. For other last widths the channel loss puts a 1x1 convolution on the student's map.
NAS-Bench and ImageNet spaces are not built in: any model's options can be genes.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config.specs import Data, MethodConfig, ModelSpec, Objectives, ObjectiveSpec, Spec, Teacher, TrainSpec
from stillhouse.data import Loader
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Objective, Progress
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.errors import UserError
from stillhouse.evaluation import cost
from stillhouse.evaluation.classification import evaluate_classifier
from stillhouse.functional import checks
from stillhouse.functional.feature_maps import map_tap
from stillhouse.functional.labels import hard_only
from stillhouse.methods.classification.diswot.search import (
    Candidates,
    Combine,
    Encoding,
    Space,
    SpaceSpec,
    kendall_tau,
    search,
)
from stillhouse.methods.classification.diswot.similarity import (
    View,
    channel_distance,
    relation_distance,
    semantic_distance,
    view,
)
from stillhouse.models import build
from stillhouse.randomness import key
from stillhouse.runs.evaluators import evaluates, evaluator
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, Signals


class SimilarityDistillation(Objective):
    """The metrics as losses on the last stage's maps: relation * D_r + semantic * D_c.

    Args:
        relation, semantic: weights.
    """

    name = "diswot"
    needs = frozenset({"student.logits", "student.tap:stage:-1", "teacher.tap:stage:-1"})

    def __init__(self, relation: float = 1.0, semantic: float = 1.0) -> None:
        super().__init__()
        checks.options("diswot", non_negative={"relation": relation, "semantic": semantic})
        self.relation, self.semantic = relation, semantic
        self.adapter: nn.Module = nn.Identity()

    def build(self, student: Signals, teacher: Signals, batch: Batch) -> None:
        mine, theirs = map_tap(student, "stage:-1").shape[1], map_tap(teacher, "stage:-1").shape[1]
        if self.semantic and mine != theirs:
            self.adapter = nn.Conv2d(mine, theirs, 1, bias=False)

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        mine, theirs = map_tap(student, "stage:-1"), map_tap(teacher, "stage:-1")
        terms = {}
        if self.relation:
            terms["relation"] = self.relation * relation_distance(mine, theirs)
        if self.semantic:
            terms["semantic"] = self.semantic * channel_distance(self.adapter(mine), theirs)
        return terms


class ScoreSpec(Spec):
    """How a candidate is scored."""

    combine: Combine = Field(
        "sum", description="sum, semantic, relation, rank_sum; or parameters, the baseline that takes the largest."
    )
    batch: int = Field(64, ge=2, description="Samples of the batch.")
    repeats: int = Field(3, ge=1, description="Initialisations and batches over which a score is averaged.")


class SearchSpec(Spec):
    """How the space is searched."""

    name: Literal["evolution", "random", "all"] = "evolution"
    evaluations: int = Field(5000, ge=1, description="Candidates scored.")
    population: int = Field(512, ge=1)
    initial: int = Field(10, ge=1, description="Random members to start from.")
    parents: int | None = Field(
        None, ge=1, description="Draw parents from so many of the best; default: the whole population."
    )


class DistilSpec(Spec):
    """Weights of the metrics as losses."""

    relation: float = Field(1.0, ge=0)
    semantic: float = Field(1.0, ge=0)


class Config(MethodConfig):
    data: Data
    teacher: Teacher = Field(
        description="Scores need its architecture alone; with `train` or a checkpoint it teaches the chosen student."
    )
    space: SpaceSpec = Field(default_factory=SpaceSpec)
    score: ScoreSpec = Field(default_factory=ScoreSpec)
    search: SearchSpec = Field(default_factory=SearchSpec)
    objectives: Objectives = Field(
        default_factory=lambda: [
            ObjectiveSpec(name="ce", weight=0.1),
            ObjectiveSpec(name="kd", weight=0.9, temperature=4.0),
        ],
        description="How the chosen student is trained.",
    )
    distil: DistilSpec | None = Field(None, description="Add the metrics as losses.")
    train: TrainSpec = Field(default_factory=TrainSpec)
    correlate: int = Field(
        0,
        ge=0,
        description="Train so many of the scored candidates, spread over the ranking, and report rank correlations; 0 "
        "or 3 and more.",
    )
    evaluate: list[str] = Field(default_factory=lambda: ["accuracy", "calibration", "cost"])


@dataclass
class FoundStudent(Student):
    """A student and the candidates that were scored to find its architecture, best first."""

    kind: ClassVar[str] = "stillhouse.methods.classification.diswot:FoundStudent"
    candidates: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / "candidates.json").write_text(json.dumps(self.candidates, indent=1))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> FoundStudent:
        student = super().load(folder, trust_code)
        assert isinstance(student, cls)
        student.candidates = json.loads((Path(folder) / "candidates.json").read_text())
        return student


@evaluates(FoundStudent.kind)
def judge(product: FoundStudent, run: Run) -> dict[str, float]:
    """As any student."""
    return evaluator("student")(product, run)


class SearchWithoutTraining(Method[Config]):
    searches = True

    def plan(self, config: Config, run: Run) -> list[Stage]:
        if config.teacher.model is None:
            raise UserError("diswot compares networks: give teacher.model.")
        if config.correlate in (1, 2):
            raise UserError("correlate: a rank correlation needs at least 3 candidates (0: none).")
        space, bundle = Space(config.space), run.data(config.data)
        how = {"evolution": "by evolution", "random": "at random", "all": "all of them"}[config.search.name]
        count = len(space) if config.search.name == "all" else min(len(space), config.search.evaluations)
        stages = [
            Stage(
                "search",
                f"score {count} of {len(space)} architectures without training, {how}",
                {"teacher": config.teacher.model},
            )
        ]
        if config.teacher.train is not None:
            stages.append(
                Stage(
                    "teacher",
                    "train the teacher with cross-entropy (stored, shared)",
                    {"teacher": config.teacher.model},
                )
            )
        steps = config.train.epochs * len(run.loader(config.data, "train", config.train.batch_size, train=True))
        also = f", and {config.correlate} others to judge the ranking" if config.correlate else ""
        return [*stages, Stage("student", f"distil the best on {bundle.name}{also} (stored, shared)", steps=steps)]

    def run(self, config: Config, run: Run) -> FoundStudent:
        space = Space(config.space)
        found, best, seconds = self._search(config, run, space)
        scores = found.scores(config.score.combine)
        order = np.argsort(-scores, kind="stable")
        teacher = run.teacher("teacher", config.teacher, config.data)
        trained = {best: self._distilled(config, run, space.model(best), teacher)}
        figures = {
            **trained[best]["figures"],
            "search_seconds": seconds,
            "scored": float(len(order)),
            "not_finite": float(np.isinf(scores).sum()),
        }
        if config.correlate:
            picked = sorted({int(i) for i in np.linspace(0, len(order) - 1, min(config.correlate, len(order))).round()})
            for i in order[picked]:
                trained.setdefault(
                    found.encodings[i], self._distilled(config, run, space.model(found.encodings[i]), teacher)
                )
            figures |= self._correlations(config, found, trained, best)
        students = {e: t["figures"]["test_accuracy"] for e, t in trained.items()}
        candidates = [
            {
                **space.values(found.encodings[i]),
                "score": float(scores[i]) if np.isfinite(scores[i]) else None,
                "semantic": _json(found.semantic[i]),
                "relation": _json(found.relation[i]),
                "parameters": found.parameters[i],
                **({"accuracy": students[found.encodings[i]]} if found.encodings[i] in students else {}),
            }
            for i in order
        ]
        run.record["architecture"] = space.values(best)
        spec = space.model(best)
        network = run.model(spec, config.data)
        network.load_state_dict(trained[best]["weights"])
        network.to(run.device)
        base = run.student(network, spec, config.data, figures)
        return FoundStudent(**{**vars(base), "candidates": candidates})

    # ---- scores ------------------------------------------------------------------------------------------------------

    def _search(self, config: Config, run: Run, space: Space) -> tuple[Candidates, Encoding, float]:
        """All that was scored, the best, and the seconds that it took."""
        bundle, device = run.data(config.data), run.device
        spec = config.teacher.network

        def make() -> dict[str, Any]:
            started = time.monotonic()
            loader = Loader(
                bundle.dataset("train", train=False),
                config.score.batch,
                seed=run.seed,
                shuffle=True,
                drop_last=True,
                workers=config.data.workers,
            )
            batches = [
                {k: v.to(device) for k, v in next(loader.batches(epoch)).items()}
                for epoch in range(config.score.repeats)
            ]
            for batch in batches:
                hard_only("diswot", batch["label"])
            bare = spec.model_copy(update={"checkpoint": None, "pretrained": False})
            teacher = [
                view(
                    partial(self._build, bare, run, config),
                    b,
                    run.seed,
                    "teacher",
                    i,
                    owner="teacher",
                    embedding=spec.embedding,
                )
                for i, b in enumerate(batches)
            ]
            generator = np.random.default_rng(key(run.seed, "search"))
            options = config.search.model_dump(exclude={"name"})
            score = partial(self._score, config, run, space, teacher, batches)
            found, best = search(
                space, score, generator, how=config.search.name, combine=config.score.combine, **options
            )
            return {
                **{k: [_json(x) for x in v] if k != "encodings" else v for k, v in vars(found).items()},
                "best": best,
                "seconds": time.monotonic() - started,
            }

        parts = {"space": config.space, "score": config.score, "search": config.search, "teacher": spec}
        stored = run.stage(
            "search",
            make,
            {**{k: v.model_dump(mode="json") for k, v in parts.items()}, "data": bundle.fingerprint, "seed": run.seed},
        )
        lists = {k: [math.nan if x is None else x for x in stored[k]] for k in ("semantic", "relation", "parameters")}
        return (
            Candidates(encodings=[tuple(e) for e in stored["encodings"]], **lists),
            tuple(stored["best"]),
            stored["seconds"],
        )

    def _score(
        self, config: Config, run: Run, space: Space, teacher: list[View], batches: list[Batch], encoding: Encoding
    ) -> tuple[float, float, float] | None:
        """(semantic, relation, parameters) of a candidate; None over budget; NaN where it cannot be built."""
        spec = space.model(encoding)
        try:
            network = self._build(spec, run, config)
        except UserError:
            return math.nan, math.nan, 0.0
        size = cost.parameters(network)
        if size > (config.space.parameters or math.inf):
            return None
        if (
            config.space.multiply_adds is not None
            and cost.multiply_adds(network, {"input": batches[0]["input"]}) > config.space.multiply_adds
        ):
            return None
        if config.score.combine == "parameters":
            return 0.0, 0.0, float(size)
        semantic, relation = [], []
        for i, (batch, theirs) in enumerate(zip(batches, teacher)):
            mine = view(
                partial(self._build, spec, run, config),
                batch,
                run.seed,
                str(encoding),
                i,
                owner="candidate",
                embedding=config.space.embedding,
            )
            relation.append(-relation_distance(mine.feature, theirs.feature))
            semantic.append(
                -semantic_distance(mine.gradient, theirs.gradient)
                if config.score.combine != "relation"
                else torch.zeros(())
            )
        return float(torch.stack(semantic).mean()), float(torch.stack(relation).mean()), float(size)

    @staticmethod
    def _build(spec: ModelSpec, run: Run, config: Config) -> nn.Module:
        bundle = run.data(config.data)
        return build(spec, bundle.num_classes, bundle.input_shape).to(run.device)

    # ---- trained candidates ------------------------------------------------------------------------------------------

    def _distilled(self, config: Config, run: Run, spec: ModelSpec, teacher: Any) -> dict[str, Any]:
        """A candidate's weights and test accuracy after distillation."""
        data = config.data
        extra = (
            [] if config.distil is None else [SimilarityDistillation(config.distil.relation, config.distil.semantic)]
        )

        def make() -> dict[str, Any]:
            student = run.model(spec, data)
            module = Distillation(
                student,
                teacher,
                [*(objective_from_spec(o) for o in config.objectives), *extra],
                seed=run.seed,
                embedding=spec.embedding,
            )
            loader = run.loader(data, "train", config.train.batch_size, train=True)
            fitted = run.fit(
                "student", module, loader, config.train, evaluate=run.validating(data), splits=run.splits(data)
            )
            module.close()
            accuracy = evaluate_classifier(student, run.loader(data, "test"), run.device, ["accuracy"])["accuracy"]
            return {
                "weights": state_on_cpu(student),
                "figures": {"train_seconds": fitted.seconds, "test_accuracy": accuracy},
            }

        uses = {
            "model": spec.model_dump(mode="json"),
            "train": config.train.identity(),
            "objectives": [o.model_dump(mode="json") for o in config.objectives],
            "distil": None if config.distil is None else config.distil.model_dump(mode="json"),
            "teacher": teacher.fingerprint(),
            "data": run.data(data).fingerprint,
            "seed": run.seed,
        }
        return run.stage("student", make, uses)

    @staticmethod
    def _correlations(
        config: Config, found: Candidates, trained: dict[Encoding, dict[str, Any]], best: Encoding
    ) -> dict[str, float]:
        """Kendall's tau of scores (and of the number of parameters) with distilled accuracy, and what the choice cost
        against the best of those trained."""
        accuracy = [t["figures"]["test_accuracy"] for t in trained.values()]
        at = [found.encodings.index(e) for e in trained]
        alone: dict[Combine, list[Combine]] = {"parameters": ["parameters"], "relation": ["relation", "parameters"]}
        kinds = alone.get(config.score.combine, ["sum", "semantic", "relation", "rank_sum", "parameters"])
        out = {f"tau_{c}": kendall_tau(found.scores(c)[at].tolist(), accuracy) for c in kinds}
        out = {k: v for k, v in out.items() if math.isfinite(v)}
        chosen = trained[best]["figures"]["test_accuracy"]
        return {
            **out,
            "accuracy_over_mean": chosen - float(np.mean(accuracy)),
            "regret": max(accuracy) - chosen,
            "trained": float(len(accuracy)),
        }


def _json(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None

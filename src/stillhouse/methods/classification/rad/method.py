"""RAD: queries a costly, often wrong teacher at the points that teach most even if an adversary chooses which answers
are wrong.

paper: Robust Active Distillation
venue: ICLR 2023
arxiv: 2210.01213
task: classification
family: active distillation
use when: labels are few, the teacher may be queried a limited number of times, and it is often wrong where the student
is unsure
needs: a few labels, an unlabelled pool, a teacher, validation data to estimate how often it is right

Each round the student's outputs give the gain of each pool point; RAD samples the points of large gain with probability
inverse to the gain, which maximises the worst case over all sets of m right answers. There is no public code: the game
is as published, its solution (`game.py`) was derived and checked against a linear program; the gain 1 - (p1 - p2), the
draw of b points at a time, m = round(n * validation accuracy) and retraining from scratch are choices. `marginals:
exact` solves the b-point game by a linear program. The student learns labels and queried answers with equal weight at
temperature 1. Others at the same number of queries: `uniform`, `margin`, `entropy`, `coreset`, `cluster_margin`,
`unixkd` (its mixing rule is a reconstruction). `corrupt` shuffles the teacher's answers among the points it is least
sure of, to make a teacher that is wrong where it matters. The relative game of the paper is in `game.solve_relative`,
not in the loop. The pool's labels are read only to report answer accuracy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.config.specs import Data, MethodConfig, Model, Teacher, TrainSpec
from stillhouse.data import BatchKey, IndexedDataset, Loader
from stillhouse.data.split import balanced
from stillhouse.data.subset import Subset
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.teachers import Reader
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.errors import UserError
from stillhouse.evaluation.classification import collect_logits, evaluate_classifier
from stillhouse.methods.classification.rad.game import gains, guaranteed, solve
from stillhouse.methods.classification.rad.queries import RULES, Pool
from stillhouse.randomness import key
from stillhouse.runs.evaluators import evaluates, evaluator
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, evaluating


class Config(MethodConfig):
    data: Data
    labelled: int = Field(
        ge=1,
        description="Class-balanced training samples whose labels are known; the rest of the training split is the "
        "pool.",
    )
    teacher: Teacher = Field(
        description="A network with a checkpoint, or with `train`: then it is trained on the labelled samples alone."
    )
    student: Model
    train: TrainSpec = Field(default_factory=TrainSpec, description="How the student is trained, each round.")
    query: Literal["rad", "uniform", "margin", "entropy", "coreset", "cluster_margin", "unixkd"] = "rad"
    queries: int = Field(ge=1, description="b: questions a round.")
    rounds: int = Field(5, ge=1)
    gain: Literal["margin", "entropy", "confidence"] = "margin"
    marginals: Literal["capped", "exact"] = Field(
        "capped", description="exact: the b-point game by a linear program (a few thousand points)."
    )
    accuracy: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of right answers to expect; default: the teacher's accuracy on validation data.",
    )
    corrupt: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Shuffle the teacher's answers among this share of the points, those it is least sure of.",
    )
    warm_start: bool = Field(False, description="Go on from the last round's student rather than from scratch.")
    evaluate: list[str] = Field(default_factory=lambda: ["accuracy", "calibration", "cost"])


@dataclass
class QueriedStudent(Student):
    """A student and the training samples at which its teacher was queried, a list a round."""

    kind: ClassVar[str] = "stillhouse.methods.classification.rad:QueriedStudent"
    queried: list[list[int]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / "queried.json").write_text(json.dumps(self.queried))

    @classmethod
    def load(cls, folder: Path, trust_code: bool = False) -> QueriedStudent:
        student = super().load(folder, trust_code)
        assert isinstance(student, cls)
        student.queried = json.loads((Path(folder) / "queried.json").read_text())
        return student


@evaluates(QueriedStudent.kind)
def judge(product: QueriedStudent, run: Run) -> dict[str, float]:
    """As any student."""
    return evaluator("student")(product, run)


class BudgetedTeacher:
    """The teacher behind a budget: it answers queries, and refuses once the budget is spent.

    Args:
        network: the teacher, on the device where it runs.
        images: the training samples as they are evaluated.
        budget: how many questions it takes.
        donors: (N,) whose image each sample is answered for: itself, or another where answers are shuffled.
    """

    def __init__(
        self, network: nn.Module, images: IndexedDataset, budget: int, donors: np.ndarray | None = None
    ) -> None:
        self._network, self._images, self._budget, self._donors, self.asked = network, images, budget, donors, 0

    @torch.no_grad()
    def ask(self, rows: np.ndarray, partners: np.ndarray, share: np.ndarray) -> Tensor:
        """Class probabilities (b, C), on the host, of the samples mixed with that share of their partners.

        Raises `UserError` beyond the budget.
        """
        if self.asked + len(rows) > self._budget:
            raise UserError(
                f"rad: the budget of {self._budget} questions to the teacher is spent ({self.asked} asked, "
                f"{len(rows)} more wanted)."
            )
        self.asked += len(rows)
        own = rows if self._donors is None else self._donors[rows]
        device = next(self._network.parameters()).device
        answers = []
        with evaluating(self._network):
            for part in np.array_split(np.arange(len(rows)), -(-len(rows) // 256)):
                x = mixed(self._images, own[part], partners[part], torch.from_numpy(share[part]).float(), 0, 0)
                answers.append(torch.softmax(self._network(x.to(device)).float(), -1).cpu())
        return torch.cat(answers)


def mixed(
    dataset: IndexedDataset, rows: np.ndarray, partners: np.ndarray, share: Tensor, epoch: int, seed: int
) -> Tensor:
    """Inputs (B, ...) of samples, each with that share (B,) of its partner; partners are read only where a share is
    above 0."""
    x = dataset.batch(BatchKey(epoch, rows, 0, len(rows)), seed)["input"]
    mix = share > 0
    if mix.any():
        other = dataset.batch(BatchKey(epoch, partners[mix.numpy()], 0, int(mix.sum())), seed)["input"]
        x[mix] = torch.lerp(x[mix], other, share[mix].view(-1, *[1] * (x.ndim - 1)))
    return x


class KnownSamples:
    """What a student trains on: samples with class probabilities, one-hot for labels and soft for answers; a data set
    for `Loader`."""

    def __init__(self, dataset: IndexedDataset, rows: np.ndarray, targets: Tensor) -> None:
        self.dataset, self.rows, self.partners, self.share, self.targets = (
            dataset,
            rows,
            rows,
            torch.zeros(len(rows)),
            targets,
        )

    def add(self, rows: np.ndarray, partners: np.ndarray, share: np.ndarray, targets: Tensor) -> None:
        self.rows, self.partners = np.concatenate([self.rows, rows]), np.concatenate([self.partners, partners])
        self.share, self.targets = (
            torch.cat([self.share, torch.from_numpy(share).float()]),
            torch.cat([self.targets, targets]),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def labels(self) -> Tensor:
        """(n,) the most probable class."""
        return self.targets.argmax(-1)

    def batch(self, at: BatchKey, seed: int) -> Batch:
        index = torch.from_numpy(at.indices[at.start : at.stop])
        x = mixed(self.dataset, self.rows[index], self.partners[index], self.share[index], at.epoch, seed)
        return {"input": x, "label": self.targets[index], "index": index}


class Questions:
    """The rounds of questions, and what became of them.

    Args:
        config: the rule, and how many questions a round.
        answering: the teacher.
        known: what the student trains on; answers are added to it.
        pool: (n,) samples that were not queried yet.
        labels: (N,) of all samples, read for figures alone.
        generator: of the rules that draw.
    """

    def __init__(
        self,
        config: Config,
        answering: BudgetedTeacher,
        known: KnownSamples,
        pool: np.ndarray,
        labels: Tensor,
        generator: np.random.Generator,
    ) -> None:
        self.config, self.answering, self.known, self.pool, self.labels, self.generator = (
            config,
            answering,
            known,
            pool,
            labels,
            generator,
        )
        self.queried: list[list[int]] = []
        self._right, self._gain = 0.0, 0.0
        self._bounds: list[float] = []

    def ask(self, view: Pool) -> None:
        """One round, by the student's view of the pool."""
        config = self.config
        chosen = RULES[config.query](view, config.queries, self.generator, config.gain, config.marginals == "exact")
        points, partners = self.pool[chosen.points], self.pool[chosen.partners]
        answers = self.answering.ask(points, partners, chosen.share)
        gain = gains(view.probs, config.gain)
        self._bounds.append(
            solve(gain, view.correct).value
            / max(guaranteed(np.full(len(gain), 1 / len(gain)), gain, view.correct), 1e-12)
        )
        self._right += float((answers.argmax(-1) == self.labels[torch.from_numpy(points)]).sum())
        self._gain += float(gain[chosen.points].sum())
        self.known.add(points, partners, chosen.share, answers)
        self.pool = np.setdiff1d(self.pool, points)
        self.queried.append(points.tolist())

    def figures(self) -> dict[str, float]:
        """Questions, how many were answered rightly, their mean gain, and the guarantee over that of asking evenly."""
        total = self.answering.asked
        counts = {"queries": float(total), "answer_accuracy": self._right / total, "mean_gain": self._gain / total}
        return {**counts, "guarantee_over_uniform": float(np.mean(self._bounds))}


class RobustActiveDistillation(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data)
        pool = len(bundle.dataset("train", train=False)) - config.labelled
        if config.rounds * config.queries > pool:
            raise UserError(
                f"rad: {config.rounds} rounds of {config.queries} queries are more than the {pool} pool samples that "
                f"{config.labelled} labels leave."
            )
        if config.accuracy is None and run.validation(config.data) is None:
            raise UserError(
                "rad estimates how often its teacher is right on validation data: set data.val to a share above 0, or "
                "`accuracy` to a number."
            )
        if config.data.mixup or config.data.cutmix:
            raise UserError("rad trains on soft answers that cannot be mixed: turn data.mixup and data.cutmix off.")
        stages = []
        if config.teacher.train is not None:
            stages.append(
                Stage(
                    "teacher",
                    f"train the teacher on {config.labelled} labels (stored, shared)",
                    {"teacher": config.teacher.model or ""},
                )
            )
        does = (
            f"{config.rounds} times: query the teacher at {config.queries} of {pool} samples by {config.query}, "
            "train the student on all known samples"
        )
        return [*stages, Stage("round", does, {"student": config.student.model})]

    def run(self, config: Config, run: Run) -> QueriedStudent:
        bundle, device = run.data(config.data), run.device
        images, augmented = bundle.dataset("train", train=False), bundle.dataset("train", train=True)
        labels = images.labels()
        labelled = balanced(labels.numpy(), config.labelled, config.data.seed, "labelled")
        pool = np.setdiff1d(np.arange(len(images)), labelled)
        teacher = self._teacher(config, run, labelled).to(device)
        right = self._accuracy(config, run, teacher)
        donors = shuffled(teacher, images, config.corrupt, config.data.seed, pool) if config.corrupt else None
        answering = BudgetedTeacher(teacher, images, config.rounds * config.queries, donors)
        known = KnownSamples(
            augmented,
            labelled,
            torch.nn.functional.one_hot(labels[torch.from_numpy(labelled)], bundle.num_classes).float(),
        )
        questions = Questions(config, answering, known, pool, labels, np.random.default_rng(key(run.seed, "rad")))
        student = run.model(config.student, config.data)
        seconds = 0.0
        curve: dict[str, float] = {}
        for number in range(config.rounds + 1):
            if number:
                questions.ask(self._view(config, run, student, images, questions.pool, known, right))
                if not config.warm_start:
                    student = run.model(config.student, config.data)
            loader = Loader(
                known,
                min(config.train.batch_size, len(known)),
                seed=run.seed,
                shuffle=True,
                drop_last=True,
                workers=config.data.workers,
            )
            module = Distillation(student, None, [objective_from_spec("ce")], seed=run.seed)
            fitted = run.fit(f"round.{number}", module, loader, config.train, evaluate=run.validating(config.data))
            module.close()
            seconds += fitted.seconds
            curve |= {f"val_accuracy_round{number}": v for k, v in fitted.figures.items() if k == "accuracy"}
        figures = {"train_seconds": seconds, **questions.figures(), "expected_accuracy": right, **curve}
        base = run.student(student, config.student, config.data, figures)
        return QueriedStudent(**{**vars(base), "queried": questions.queried})

    def _view(
        self,
        config: Config,
        run: Run,
        student: nn.Module,
        images: IndexedDataset,
        pool: np.ndarray,
        known: KnownSamples,
        right: float,
    ) -> Pool:
        """The student's view of the pool: probabilities and embeddings."""
        reader = Reader(student, "student", config.student.embedding)
        reader.attach({"embedding"}, next(iter(run.loader(config.data, "train", 2))))
        probs, embeddings = [], []
        with evaluating(student):
            rows = Subset(images, np.concatenate([pool, known.rows]))
            for batch in Loader(rows, 256, workers=config.data.workers):
                outputs = reader({**batch, "input": batch["input"].to(run.device)})
                probs.append(torch.softmax(outputs.require("logits").double(), -1).cpu())
                embeddings.append(outputs.require("embedding").float().cpu())
        reader.close()
        p, e, n = torch.cat(probs).numpy(), torch.cat(embeddings).numpy(), len(pool)
        return Pool(p[:n], e[:n], e[n:], int(np.clip(round(right * n), 1, n)))

    def _teacher(self, config: Config, run: Run, labelled: np.ndarray) -> nn.Module:
        """The teacher: with weights of its own, or trained on the labelled samples."""
        spec, data = config.teacher, config.data
        if spec.model is None or spec.data is not None:
            raise UserError(
                "rad queries one network trained on the labelled samples: give teacher.model, and no teacher.data."
            )
        if spec.train is None:
            return run.teacher("teacher", spec, data).model
        seed, train = spec.seed or 0, spec.train
        model = run.model(spec.network, data, role="teacher", seed=seed)
        bundle = run.data(data)

        def make() -> dict[str, Any]:
            with run.seeded(seed):
                known = Subset(bundle.dataset("train", train=True), labelled)
                module = Distillation(model, None, [objective_from_spec("ce")], seed=seed)
                run.fit(
                    "teacher",
                    module,
                    Loader(
                        known,
                        min(train.batch_size, len(known)),
                        seed=seed,
                        shuffle=True,
                        drop_last=True,
                        workers=data.workers,
                    ),
                    train,
                )
                module.close()
                figures = evaluate_classifier(
                    model, run.loader(data, "test"), next(model.parameters()).device, ["accuracy"]
                )
                return {"weights": state_on_cpu(model), "figures": figures}

        uses = {
            "model": spec.network.model_dump(mode="json"),
            "train": train.identity(),
            "data": bundle.fingerprint,
            "labelled": labelled.tolist(),
            "seed": seed,
        }
        trained = run.stage("teacher", make, uses)
        model.load_state_dict(trained["weights"])
        run.record.setdefault("teachers", {})["teacher"] = {"model": spec.model, **trained["figures"]}
        return model

    @staticmethod
    def _accuracy(config: Config, run: Run, teacher: nn.Module) -> float:
        """The share of right answers to expect; corrupted like the pool's answers, where they are."""
        if config.accuracy is not None:
            return config.accuracy
        logits, labels = collect_logits(teacher, run.validation(config.data), run.device)
        answers = logits.argmax(-1)
        if config.corrupt:
            answers = answers[torch.from_numpy(least_sure_shuffled(logits, config.corrupt, config.data.seed))]
        return float((answers == labels).double().mean())


def shuffled(teacher: nn.Module, images: IndexedDataset, share: float, seed: int, pool: np.ndarray) -> np.ndarray:
    """(N,) whose answer each training sample gets, when answers are shuffled among the pool samples of smallest teacher
    margin."""
    logits, _ = collect_logits(teacher, Loader(Subset(images, pool), 256), next(teacher.parameters()).device)
    donors = np.arange(len(images))
    donors[pool] = pool[least_sure_shuffled(logits, share, seed)]
    return donors


def least_sure_shuffled(logits: Tensor, share: float, seed: int) -> np.ndarray:
    """(n,) a permutation of the samples that moves only that share of them whose margin is smallest."""
    unsure = np.argsort(-gains(torch.softmax(logits.double(), -1).numpy()), kind="stable")[: round(share * len(logits))]
    out = np.arange(len(logits))
    out[unsure] = np.random.default_rng(key(seed, "corrupt")).permutation(unsure)
    return out

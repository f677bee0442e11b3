"""SSLD: distil without labels on the target images and many unlabelled ones that the teacher picks, then shortly on the
target images alone.

paper: Beyond Self-Supervision: A Simple Yet Effective Network Distillation Alternative to Improve Backbones
venue: arXiv 2021
arxiv: 2103.05959
task: classification
family: logits, unlabelled data
use when: there is a strong teacher and a pool of images without labels
needs: teacher logits, a pool of unlabelled images; no labels

The pool is cleaned of near-duplicates of test images, the teacher gives a class and a score to each image, and of every
class the `per_class` highest stay. Stage 1 trains on the target images and these, stage 2 (`finetune`) on the target
images with 1/100 of the rate, stage 3 (`fix`, off by default) only the classifier at a larger resolution with test
preprocessing. Labels enter no loss. The loss is the symmetrised KL divergence of the released code (release/2.0, eps
1e-10), though paper and guide call it Jensen-Shannon; `loss: ce` is the soft cross-entropy of its later settings,
`loss: jensen_shannon` the true one, which was not run. `teacher_bn: batch` normalises the teacher by the batch, as the
authors found better, and leaves its running statistics alone. Simplifications: duplicates are found by the correlation
of grey 16x16 thumbnails and their mirror images (the paper matches SIFT features), and those of target images go too,
as the pool may be cut from the same source (a choice); the picking model is the teacher (the paper's is its strongest
teacher). The lower rates per stage for transfer to detection and segmentation are not here. `loss: labels`, without a
pool, is the baseline.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, DataSpec, MethodConfig, Model, Spec, Teacher, TrainSpec
from stillhouse.data import DataBundle, Loader
from stillhouse.data.joined import JoinedDataset, Part, unlabelled
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Objective, Progress
from stillhouse.distillation.teachers import Ensemble, FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.evaluation.classification import evaluate_classifier
from stillhouse.functional import checks
from stillhouse.functional.divergences import kl_divergence, soft_cross_entropy
from stillhouse.functional.precision import full_precision
from stillhouse.models.anatomy import classifier
from stillhouse.objectives.ce import CrossEntropy
from stillhouse.processes import share
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, Signals, to_device

THUMBNAIL = 16


# ---- losses ----------------------------------------------------------------------------------------------------------


@full_precision
def symmetric_kl(student_logits: Tensor, teacher_logits: Tensor, eps: float = 1e-10) -> Tensor:
    """(KL(q || p) + KL(p || q)) / 2 of the softmaxes, batch mean; `JSDivLoss` of release/2.0 (eps 1e-10), `DMLLoss` of
    develop (eps 1e-12).

    Args:
        student_logits, teacher_logits: (B, C); log-probabilities serve as well.
        eps: added to both probabilities inside the logarithm.

    Raises:
        UserError: different shapes.
    """
    checks.same_classes("ssld", student_logits, teacher_logits)
    p, q = F.softmax(student_logits, dim=-1), F.softmax(teacher_logits, dim=-1)
    rows = q * torch.log((q + eps) / (p + eps)) + p * torch.log((p + eps) / (q + eps))
    return 0.5 * rows.sum(-1).mean()


@full_precision
def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, batch mean; at most ln 2. (B, C) and (B, C) -> scalar."""
    checks.same_classes("ssld", student_logits, teacher_logits)
    log_p, log_q = F.log_softmax(student_logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
    log_m = torch.logaddexp(log_p, log_q) - np.log(2)
    return 0.5 * (kl_divergence(log_m, log_p) + kl_divergence(log_m, log_q))


class Agreement(Objective):
    """The student agrees with the teacher's softmax at temperature 1; labels are not read.

    Args:
        loss: `js` (symmetrised KL), `ce` (soft cross-entropy) or `jensen_shannon`.
        eps: of `js`.
    """

    name = "ssld"
    needs = frozenset({"student.logits", "teacher.logits"})

    def __init__(self, loss: Literal["js", "ce", "jensen_shannon"] = "js", eps: float = 1e-10) -> None:
        super().__init__()
        self.loss, self.eps = loss, eps

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        predicted = teacher.log_probs()
        logits = student.require("logits")
        if self.loss == "ce":
            checks.same_classes("ssld", logits, predicted)
            return {"loss": soft_cross_entropy(logits, predicted.exp())}
        return {
            "loss": jensen_shannon(logits, predicted)
            if self.loss == "jensen_shannon"
            else symmetric_kl(logits, predicted, self.eps)
        }


class BatchStatistics(FrozenTeacher):
    """A frozen teacher whose batch normalisation uses the statistics of the batch; its buffers do not move."""

    @torch.no_grad()
    def __call__(self, batch: Batch, student: Signals | None = None) -> Signals:
        if len(batch["input"]) < 2:
            raise UserError("teacher_bn: batch needs batches of at least two samples.")
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        tracked = [m.track_running_stats for m in norms]
        for m in norms:
            m.training, m.track_running_stats = True, False
        try:
            return self._reader(batch)
        finally:
            for m, was in zip(norms, tracked):
                m.training, m.track_running_stats = False, was


# ---- which unlabelled images -----------------------------------------------------------------------------------------


def top_of_each_class(scores: Tensor, classes: Tensor, per_class: int) -> Tensor:
    """Positions, rising, of the `per_class` highest scores of every class (all of a class that has fewer); (N,) and
    (N,) -> (n,)."""
    order = scores.argsort(descending=True, stable=True)
    order = order[classes[order].argsort(stable=True)]
    sizes = classes.bincount()
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(len(order)) - starts[classes[order]]
    return order[rank < per_class].sort().values


def thumbnails(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, D) grey thumbnails, centred, of length one (0 for a constant image): their product is a
    correlation."""
    grey = images.float().mean(1, keepdim=True)
    size = (min(THUMBNAIL, grey.shape[-2]), min(THUMBNAIL, grey.shape[-1]))
    small = F.adaptive_avg_pool2d(grey, size).flatten(1)
    centred = small - small.mean(1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-6)


def near_duplicates(images: Tensor, others: Tensor, similarity: float) -> Tensor:
    """(N,) whether an image or its mirror image correlates at least so much with any of the others.

    Args:
        images: (N, C, H, W).
        others: (M, D) thumbnails of images of the same size.
        similarity: correlation from which two are one.
    """
    twin = torch.zeros(len(images), dtype=torch.bool)
    for mine in (thumbnails(images), thumbnails(images.flip(-1))):
        for part in others.split(8192):
            twin |= (mine @ part.T).amax(1) >= similarity
    return twin


# ---- the procedure ---------------------------------------------------------------------------------------------------


class FinetuneConfig(Spec):
    """Stage 2: on the target images alone."""

    epochs: int = Field(30, ge=0, description="0 leaves the stage out.")
    rate: float = Field(0.01, gt=0, description="Share of stage 1's learning rate.")


class FixConfig(Spec):
    """Stage 3: the classifier alone, at a larger resolution, with test preprocessing."""

    epochs: int = Field(10, ge=1)
    rate: float = Field(0.01, gt=0, description="Share of stage 1's learning rate.")
    image_size: int = Field(ge=4)


class Config(MethodConfig):
    data: Data
    pool: Data | None = Field(None, description="Unlabelled images; their labels, where there are any, are not read.")
    per_class: int | None = Field(4000, ge=1, description="Images of the pool kept of every class; null keeps all.")
    duplicates: float = Field(
        0.98,
        gt=0,
        description="Correlation of thumbnails from which a pool image is a duplicate of a test image; above 1: none "
        "is.",
    )
    teacher: Teacher
    teacher_bn: Literal["eval", "batch"] = "eval"
    student: Model
    loss: Literal["js", "ce", "jensen_shannon", "labels"] = "js"
    eps: float = Field(1e-10, gt=0, description="js: added inside the logarithm.")
    train: TrainSpec = Field(default_factory=TrainSpec)
    finetune: FinetuneConfig = Field(default_factory=FinetuneConfig)
    fix: FixConfig | None = None
    evaluate: list[str] = Field(default_factory=lambda: ["accuracy", "calibration", "cost"])

    @model_validator(mode="after")
    def _labels_only_on_the_target(self) -> Config:
        if self.loss == "labels" and self.pool is not None:
            raise ValueError("loss: labels has no labels for a pool; set pool: null")
        return self


class SSLD(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        target = len(run.data(config.data).dataset("train", train=True))
        stages = [Stage("teacher", "train the teacher with cross-entropy (stored, shared)")]
        if config.pool is not None:
            images = len(run.data(config.pool).dataset("train", train=True))
            stages.append(Stage("selection", f"let the teacher pick from {images} unlabelled images (stored, shared)"))
        stages.append(
            Stage(
                "student", f"train the student on {target} target images" + (" and those picked" if config.pool else "")
            )
        )
        if config.finetune.epochs:
            stages.append(
                Stage(
                    "finetune",
                    "train it on the target images with a lower rate",
                    steps=config.finetune.epochs * (target // config.train.batch_size),
                )
            )
        if config.fix:
            stages.append(Stage("fix", f"train its classifier at {config.fix.image_size} pixels"))
        return stages

    def run(self, config: Config, run: Run) -> Student:
        target = run.data(config.data)
        teacher = run.teacher("teacher", config.teacher, config.data)
        if isinstance(teacher, nn.Module):
            raise UserError("ssld: the teacher must be a trained network or an ensemble.")
        if config.teacher_bn == "batch" and isinstance(teacher, Ensemble):
            raise UserError("teacher_bn: batch is for one network, not for an ensemble.")
        student = run.model(config.student, config.data)
        parts = [target_part(target)]
        figures: dict[str, float] = {}
        if config.pool is not None:
            chosen, figures = self.select(config, run, teacher)
            parts.append(unlabelled(run.data(config.pool), target, chosen, train=True))
        if config.teacher_bn == "batch":
            teacher = BatchStatistics(teacher.model, embedding=config.teacher.embedding)

        seconds = self.fit("student", config, run, student, teacher, JoinedDataset(parts), config.train, config.data)
        if config.finetune.epochs:
            spec = slower(config.train, config.finetune.epochs, config.finetune.rate)
            seconds += self.fit("finetune", config, run, student, teacher, JoinedDataset(parts[:1]), spec, config.data)
        if config.fix:
            larger = config.data.model_copy(update={"image_size": config.fix.image_size, "augment": "plain"})
            spec = slower(config.train, config.fix.epochs, config.fix.rate)
            seconds += self.fit(
                "fix",
                config,
                run,
                student,
                teacher,
                JoinedDataset([target_part(run.data(larger))]),
                spec,
                larger,
                only_classifier=True,
            )
            figures["accuracy_larger"] = evaluate_classifier(
                student, run.loader(larger, "test"), run.device, ["accuracy"]
            )["accuracy"]
        return run.student(student, config.student, config.data, {"train_seconds": seconds, **figures})

    def fit(
        self,
        name: str,
        config: Config,
        run: Run,
        student: nn.Module,
        teacher: Any,
        dataset: JoinedDataset,
        spec: TrainSpec,
        data: DataSpec,
        only_classifier: bool = False,
    ) -> float:
        """One stage of training; the seconds it took."""
        objective = CrossEntropy() if config.loss == "labels" else Agreement(config.loss, config.eps)
        kind = OnlyClassifier if only_classifier else Distillation
        module = kind(
            student,
            None if config.loss == "labels" else teacher,
            [objective],
            seed=run.seed,
            embedding=config.student.embedding,
        )
        loader = Loader(
            dataset, spec.batch_size, seed=run.seed, shuffle=True, drop_last=True, workers=data.workers, **share()
        )
        if isinstance(module, OnlyClassifier):
            module.choose(to_device(next(iter(loader)), next(student.parameters()).device))
        fitted = run.fit(name, module, loader, spec, evaluate=run.validating(data), splits=run.splits(data))
        module.close()
        student.requires_grad_(True)
        return fitted.seconds

    def select(self, config: Config, run: Run, teacher: Any) -> tuple[np.ndarray, dict[str, float]]:
        """Rows of the pool that stay (n,), and what became of the rest."""
        assert config.pool is not None
        pool, target = run.data(config.pool), run.data(config.data)

        def make() -> dict[str, Any]:
            assert config.pool is not None
            teacher.to(run.device)
            judged = [_thumbnails(run.loader(config.data, s)) for s in ("test", "val") if target.has(s)]
            test, own = (
                torch.cat(judged) if judged else torch.zeros(0, 1),
                _thumbnails(run.loader(config.data, "train")),
            )
            scores, classes, in_test, in_target = [], [], [], []
            images = JoinedDataset([unlabelled(pool, target, train=False)])
            for batch in Loader(images, 512, workers=config.pool.workers):
                score, predicted = teacher(to_device(batch, run.device)).log_probs().exp().max(-1)
                scores.append(score.cpu())
                classes.append(predicted.cpu())
                in_test.append(near_duplicates(batch["input"], test, config.duplicates))
                in_target.append(near_duplicates(batch["input"], own, config.duplicates))
            score, predicted, test_twin, target_twin = (torch.cat(v) for v in (scores, classes, in_test, in_target))
            rows = (~(test_twin | target_twin)).nonzero()[:, 0]
            kept = (
                rows
                if config.per_class is None
                else rows[top_of_each_class(score[rows], predicted[rows], config.per_class)]
            )
            if not len(kept):
                raise UserError(
                    "pool: no image is left when duplicates of test and target images are removed; give another pool."
                )
            figures = {
                "pool_images": len(predicted),
                "pool_duplicates_of_test": int(test_twin.sum()),
                "pool_duplicates_of_target": int(target_twin.sum()),
                "pool_chosen": len(kept),
                "pool_empty_classes": int((predicted[kept].bincount(minlength=target.num_classes) == 0).sum()),
            }
            return {"chosen": {"rows": kept}, "figures": figures}

        uses = {
            "pool": pool,
            "data": target,
            "teacher": teacher,
            "per_class": config.per_class,
            "duplicates": config.duplicates,
        }
        found = run.stage("selection", make, uses)
        return found["chosen"]["rows"].numpy(), found["figures"]


class OnlyClassifier(Distillation):
    """A distillation that trains the student's classifier alone; the rest stays in evaluation mode."""

    def choose(self, batch: Batch) -> None:
        """Find the classifier and freeze everything else."""
        name = classifier(self.student, batch)
        self.student.requires_grad_(False)
        self.student.get_submodule(name).requires_grad_(True)

    def train(self, mode: bool = True) -> OnlyClassifier:
        super().train(mode)
        self.student.eval()
        return self


def target_part(bundle: DataBundle) -> Part:
    """All training images of the target with their augmentation; labels ride along for the baseline alone."""
    dataset = bundle.dataset("train", train=True)
    return Part(dataset, np.arange(len(dataset)), labelled=True)


def slower(spec: TrainSpec, epochs: int, rate: float) -> TrainSpec:
    """The same training for fewer epochs at a share of the learning rate, without warm-up."""
    optimizer = spec.optimizer.model_copy(update={"lr": spec.optimizer.lr * rate})
    schedule = spec.schedule.model_copy(update={"warmup_epochs": 0.0, "min_lr": spec.schedule.min_lr * rate})
    return spec.model_copy(update={"epochs": epochs, "optimizer": optimizer, "schedule": schedule})


def _thumbnails(loader: Iterable[Batch]) -> Tensor:
    return torch.cat([thumbnails(batch["input"]) for batch in loader])

"""KD^3: distil without the original data, on web-like images that teacher and student together are sure of, into the
teacher's own classifier.

paper: Distribution Shift Matters for Knowledge Distillation with Webly Collected Images
venue: ICCV 2023
arxiv: 2307.11469
task: classification
family: features, data-free
use when: the teacher's training data are gone, and images of another distribution are at hand
needs: a teacher whose classifier is one linear layer on a pooled map, unlabelled images; no labels

Before each epoch, logits alpha z_t + (1 - alpha) z_s over the whole pool select the images whose confidence exceeds a
threshold of their class; alpha falls over training and is 0 in its second half. The student's last map goes through a
transfer block into the teacher's frozen classifier; the loss is the squared distance to the teacher's map, weighted by
sigmoid of the distance of the logits, plus 0.001 times an NT-Xent contrast with images whose colour statistics are
mixed with another's (MixDistribution). No cross-entropy, no KL. The product holds backbone, transfer block and the
teacher's classifier. The released code is followed, except: alpha's 240 epochs are stretched to the training's
[choice]; selection sees one view without augmentation, so that the teacher looks at the pool once [choice]; images are
normalised as the teacher's data were; the last epoch is kept, not the best on test data; the contrast of the teacher's
features, which trains only an embedding that is thrown away, is left out; an epoch has as many steps as the pool has
batches, selected images coming again as needed [choice]. Where fewer than a batch are selected, the most confident make
one batch. The paper's formulas were not compared with the code's. `loss: kd` is the baseline: distillation of logits
into the student's own classifier, on all images or on those the teacher alone is sure of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, MethodConfig, Model, Teacher, TrainSpec
from stillhouse.data import Loader
from stillhouse.data.joined import JoinedDataset
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Progress
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.functional.gather import gather
from stillhouse.methods.classification.kd3.alignment import (
    aligned,
    contrast,
    disagreement_weights,
    mix_distribution,
    select,
    share_map,
    teacher_share,
)
from stillhouse.methods.classification.kd3.pool import PoolPart, SelectedBatches, pool_images
from stillhouse.methods.classification.kd3.student import SharedClassifier, SharedStudent, make_shared
from stillhouse.objectives.kd import KD
from stillhouse.randomness import keyed
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.runs.shifted import Shifts, shifted_accuracy
from stillhouse.signals import Batch, to_device
from stillhouse.training.module import TrainingModule

EPOCHS = 240  # of the published schedule


class AlignmentTraining(TrainingModule):
    """The training module: selection before each epoch, then alignment and contrast. The teacher stays outside the
    module tree.

    Args:
        student: backbone, transfer block and the teacher's classifier.
        teacher: frozen, with `tap` attached.
        tap: of the teacher's last map.
        images: the pool in the view that selection sees.
        dynamic: select before every epoch; else the mask stays as `selected` was set.
        cutoff, weigh, contrast_weight, tau, mix_alpha: see the recipe.
        width: of the contrast's embedding.
        batch_size: images that selection must leave at least.
        workers: loader processes of selection.
        say: where warnings go.
    """

    student: SharedClassifier
    selected: Tensor

    def __init__(
        self,
        student: SharedClassifier,
        teacher: FrozenTeacher,
        tap: str,
        images: JoinedDataset,
        *,
        dynamic: bool = True,
        cutoff: float = 0.95,
        weigh: bool = True,
        contrast_weight: float = 0.001,
        tau: float = 0.3,
        mix_alpha: float = 0.1,
        width: int = 128,
        batch_size: int = 128,
        workers: int = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        super().__init__()
        self.student, self._teacher, self._tap, self._images = student, [teacher], tap, images
        self.embed = nn.Linear(student.channels[0], width) if contrast_weight else None
        self._dynamic, self._cutoff, self._weigh, self._batch_size, self._say = dynamic, cutoff, weigh, batch_size, say
        self._contrast_weight, self._tau, self._mix_alpha = contrast_weight, tau, mix_alpha
        self._workers = workers
        self.register_buffer("selected", torch.ones(len(images), dtype=torch.bool))
        self.history: list[dict[str, Any]] = []
        self._teacher_logits: Tensor | None = None

    def param_groups(self) -> list[dict[str, Any]]:
        """Backbone, transfer block and embedding."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def begin_epoch(self, ctx: Any) -> None:
        """Select the images of this epoch."""
        if not self._dynamic:
            return
        device = self.selected.device
        if self._teacher_logits is None:
            self._teacher_logits = pool_logits(self._teacher[0], self._images, device, self._workers)
        alpha = teacher_share((ctx.progress.epoch + 1) * EPOCHS / ctx.progress.epochs)
        logits = self._teacher_logits
        if alpha != 1:
            logits = pool_logits(self.student, self._images, device, self._workers)
        chosen, confidence, predicted = select(self._teacher_logits, logits, alpha, self._cutoff)
        mask = at_least(chosen, confidence, self._batch_size, self._say)
        self.selected.copy_(mask)
        counts = predicted[mask].bincount(minlength=logits.shape[1])
        self.history.append(
            {"epoch": ctx.progress.epoch, "alpha": alpha, "selected": int(mask.sum()), "classes": counts.tolist()}
        )

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        x = batch["input"]
        answer = self._teacher[0](batch)
        features = self.student.features(x)
        mine, theirs = share_map(features, answer.taps[self._tap], self.student.transfer)
        _, weights = disagreement_weights(self.student.classify(mine.detach()), answer.require("logits"))
        terms = {"features": aligned(mine, theirs, weights if self._weigh else None)}
        terms["loss"] = terms["features"]
        if self.embed is not None and len(x) > 1:
            alpha = torch.full((), self._mix_alpha, device=x.device)
            beta = torch.distributions.Beta(alpha, alpha, validate_args=False)  # validation would wait for the device
            share = beta.sample((len(x), 1, 1, 1))
            changed = mix_distribution(x, share, torch.randperm(len(x), device=x.device))
            one, other = (
                gather(F.normalize(self.embed(f.mean((2, 3))), dim=1))
                for f in (features, self.student.features(changed))
            )
            terms["contrast"] = contrast(one, other, self._tau)
            terms["loss"] = terms["loss"] + self._contrast_weight * terms["contrast"]
        terms["selected"] = self.selected.float().mean()
        return terms

    def get_extra_state(self) -> dict[str, Any]:
        return {"history": self.history}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.history = list(state["history"])


@torch.no_grad()
def pool_logits(network: Any, images: JoinedDataset, device: torch.device, workers: int = 0) -> Tensor:
    """(N, C) logits of a teacher or a network over the pool, in its order; evaluation mode."""
    batches = Loader(images, 512, workers=workers)
    if isinstance(network, nn.Module):
        training = network.training
        network.eval()
        out = torch.cat([network(to_device(batch, device)["input"]) for batch in batches])
        network.train(training)
        return out.float()
    return torch.cat([network(to_device(batch, device)).log_probs() for batch in batches])


def at_least(chosen: Tensor, confidence: Tensor, count: int, say: Callable[[str], None]) -> Tensor:
    """The mask (N,), or that of the `count` most confident images, with a warning, where it has fewer."""
    if int(chosen.sum()) >= count:
        return chosen
    say(
        f"Only {int(chosen.sum())} images of the pool were selected, fewer than a batch: the {count} most confident "
        "are taken."
    )
    mask = torch.zeros_like(chosen)
    mask[confidence.topk(count).indices] = True
    return mask


class Config(MethodConfig):
    data: Data = Field(
        description="What the teacher was trained for: its classes, its normalisation and the test set; the student "
        "never sees it."
    )
    pool: Annotated[list[PoolPart], Field(min_length=1)] = Field(description="Where the unlabelled images come from.")
    teacher: Teacher
    student: Model
    loss: Literal["features", "kd"] = Field(
        "features", description="kd: the baseline, with the student's own classifier."
    )
    selection: Literal["dynamic", "teacher", "all"] = Field(
        "dynamic", description="teacher: by the teacher alone (alpha = 1), once; all: no selection."
    )
    cutoff: float = Field(0.95, gt=0, lt=1, description="Confidence threshold of the most frequent class.")
    factor: int = Field(2, ge=1, description="The transfer block narrows to the teacher's channels over this.")
    weigh: bool = Field(True, description="Weigh samples by how far the logits are apart.")
    contrast_weight: float = Field(0.001, ge=0, description="Of the contrast with MixDistribution; 0 leaves it out.")
    tau: float = Field(0.3, gt=0, description="Temperature of the contrast.")
    width: int = Field(128, ge=1, description="Of the contrast's embedding.")
    mix_alpha: float = Field(0.1, gt=0, description="MixDistribution's Beta(a, a).")
    temperature: float = Field(2.0, gt=0, description="kd: its temperature.")
    train: TrainSpec = Field(default_factory=TrainSpec)
    shifts: Shifts = Field(
        default_factory=dict,
        description="Test images are changed so, for accuracy_NAME: name -> transforms as in data.augment.",
    )
    evaluate: list[str] = Field(default_factory=lambda: ["accuracy", "calibration", "cost"])

    @property
    def workers(self) -> int:
        """Loader processes of the pool: the most that one of its parts names."""
        return max(part.workers for part in self.pool)

    @model_validator(mode="after")
    def _baseline_has_no_dynamics(self) -> Config:
        if self.loss == "kd" and self.selection == "dynamic":
            raise ValueError("loss: kd is a baseline with selection: all or teacher")
        return self


class KD3(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        count = len(
            pool_images([p.model_copy(update={"style": []}) for p in config.pool], config.data, run, train=False)
        )
        steps = config.train.epochs * (count // config.train.batch_size)
        what = "its teacher's features and classifier" if config.loss == "features" else "logits"
        return [
            Stage("teacher", "train the teacher with cross-entropy (stored, shared)"),
            Stage(
                "student",
                f"train the student by {what} on a pool of {count} images (selection: {config.selection})",
                steps=steps,
            ),
        ]

    def run(self, config: Config, run: Run) -> Student:
        teacher = run.teacher("teacher", config.teacher, config.data)
        if not isinstance(teacher, FrozenTeacher):
            raise UserError("kd3: the teacher must be one frozen network, whose classifier is reused.")
        teacher.to(run.device)
        student = run.model(config.student, config.data)
        still, moving = (pool_images(config.pool, config.data, run, train=t) for t in (False, True))
        mask = torch.ones(len(still), dtype=torch.bool)
        if config.selection == "teacher":
            logits = pool_logits(teacher, still, run.device, config.workers)
            chosen, confidence, _ = select(logits, logits, 1.0, config.cutoff)
            mask = at_least(chosen, confidence, config.train.batch_size, run.live.say).cpu()
        fit = self.align if config.loss == "features" else self.imitate
        product = fit(config, run, teacher, student, still, moving, mask)
        product.figures |= shifted_accuracy(product.module, run, config.data, config.shifts)
        return product

    def align(
        self,
        config: Config,
        run: Run,
        teacher: FrozenTeacher,
        student: nn.Module,
        still: JoinedDataset,
        moving: JoinedDataset,
        mask: Tensor,
    ) -> Student:
        """KD^3 itself."""
        probe = to_device(next(iter(Loader(still, 2))), torch.device("cpu"))
        teacher.to(torch.device("cpu"))
        with keyed("shared", run.seed):
            shared, tap = make_shared(student, teacher.model, probe, config.factor)
            teacher.attach([f"tap:{tap}"], probe, student)
            teacher.to(run.device)
            module = AlignmentTraining(
                shared,
                teacher,
                tap,
                still,
                dynamic=config.selection == "dynamic",
                cutoff=config.cutoff,
                weigh=config.weigh,
                contrast_weight=config.contrast_weight,
                tau=config.tau,
                mix_alpha=config.mix_alpha,
                width=config.width,
                batch_size=config.train.batch_size,
                workers=config.workers,
                say=run.live.say,
            )
        module.selected.copy_(mask)
        fitted = run.fit(
            "student",
            module,
            SelectedBatches(moving, lambda: module.selected, config.train.batch_size, run.seed, config.workers),
            config.train,
        )
        teacher.close()
        run.record["selection"] = module.history
        figures = {"train_seconds": fitted.seconds, "selected": module.selected.float().mean().item()}
        return SharedStudent(shared, config.student, run.data(config.data).task, figures)

    def imitate(
        self,
        config: Config,
        run: Run,
        teacher: FrozenTeacher,
        student: nn.Module,
        still: JoinedDataset,
        moving: JoinedDataset,
        mask: Tensor,
    ) -> Student:
        """The baseline: distillation of logits."""
        module = Distillation(
            student, teacher, [(KD(config.temperature), 1.0)], seed=run.seed, embedding=config.student.embedding
        )
        batches = SelectedBatches(moving, lambda: mask, config.train.batch_size, run.seed, config.workers)
        fitted = run.fit("student", module, batches, config.train)
        module.close()
        figures = {"train_seconds": fitted.seconds, "selected": mask.float().mean().item()}
        return run.student(student, config.student, config.data, figures)

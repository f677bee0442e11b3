"""TinyCLIP: a CLIP that begins as a part of a larger one, and copies its affinities of images and texts, in several
steps of compression.

paper: TinyCLIP: CLIP Distillation via Affinity Mimicking and Weight Inheritance
venue: ICCV 2023
arxiv: 2309.12314
task: image and text
family: relations, weight inheritance
use when: a CLIP with transformers for images and texts is to be made smaller, and pairs are there to train it on
needs: a CLIP of transformers (or stillhouse:clip) as the teacher; images with texts, no labels

In each batch the student copies the teacher's softmax over all cosines of images and texts, in both directions, so that
widths and embeddings may differ: L = 0.5 CE(image to text) + 0.5 CE(text to image) with soft targets, at one fixed
scale (50) on both sides. Over many processes the batch is that of all. `alpha` below 1 mixes in the contrastive loss
with hard targets. `steps` are compressed one after the other, each from what the one before left, always under the
original teacher. Manual inheritance takes layers at equal distances and the leading channels, heads and hidden units.
Automatic inheritance learns masks of channels (shared by the layers), heads and hidden units of both transformers
during `prune`, under one constraint on the expected share of their weights that is gone; then what is masked is cut
off, what is left of the masks is multiplied into the weights, and training resumes with the affinities alone. The
released code multiplies the channels' masks into the last projections too, which the masked network does not do, so
that the cut network differs from it; `scale_projection` does the same, and is off. Baselines: `inherit: none` (a fresh
network of the same shape), `loss: contrastive`, `loss: features` (cosine distance of the embeddings, for equal widths).
Not as in the released code: a loss that is not finite ends training with the last good checkpoint, where the released
loop skips up to 100 such steps. First mask logits of 10 are open in the paper [choice]. Figures: the share of all
parameters that is left; `sparsity`, the share of the transformers' weights that is gone; and `accuracy_before`,
zero-shot, of what the last step began from. The constraint is one-sided: in a short pruning it ends above its target.
The captions of its recipe are written from class labels and masks: what its networks learn is class names, not
language.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.config.specs import Data, MethodConfig, ModelSpec, Spec, Teacher, TrainSpec
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Objective, Progress
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.evaluation import cost
from stillhouse.functional.gather import gather
from stillhouse.functional.precision import full_precision
from stillhouse.methods.image_text.tinyclip.inheritance import fold, inherit
from stillhouse.methods.image_text.tinyclip.masks import MaskLogits, Ramp, Sparsity, prunable
from stillhouse.models.clip import Clip, as_clip
from stillhouse.nn.clip import Masks
from stillhouse.objectives.contrastive import Contrastive, contrastive_loss
from stillhouse.objectives.embeddings import Embeddings
from stillhouse.randomness import keyed
from stillhouse.runs.judging import check_groups
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, Signals
from stillhouse.tasks.image_text import ImageText

# ---- affinity mimicking ----------------------------------------------------------------------------------------------


@full_precision
def affinity_losses(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    student_scale: float = 50.0,
    teacher_scale: float = 50.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies of the student's softmax over a batch's texts with the teacher's, mean over images; and of that
    over its images, mean over texts (eqs. 2 and 3).

    Args:
        student_image, student_text: unit embeddings (B, D).
        teacher_image, teacher_text: unit embeddings (B, D'); detached.
        student_scale, teacher_scale: what cosines are multiplied by.

    Raises:
        UserError: a batch of one pair, whose affinity is 1 whatever the networks are.
    """
    if len(student_image) < 2:
        raise UserError("tinyclip: a batch needs two pairs at least, as affinities are among the samples of a batch.")
    ours = student_scale * student_image @ student_text.T
    theirs = (teacher_scale * teacher_image @ teacher_text.T).detach()

    def direction(z: Tensor, target: Tensor) -> Tensor:
        return -(target.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()

    return direction(ours, theirs), direction(ours.T, theirs.T)


def mimicking_loss(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    alpha: float = 1.0,
    student_scale: float = 50.0,
    teacher_scale: float = 50.0,
) -> dict[str, Tensor]:
    """`soft`, half the sum of the affinity losses, and below an alpha of 1 `hard`, the contrastive loss, with their
    weights in `loss`: alpha * soft + (1 - alpha) * hard."""
    pairs = (student_image, student_text, teacher_image, teacher_text)
    to_text, to_image = affinity_losses(*pairs, student_scale, teacher_scale)
    soft = 0.5 * to_text + 0.5 * to_image
    if alpha == 1:
        return {"loss": soft, "soft": soft}
    hard = contrastive_loss(student_image, student_text, torch.tensor(student_scale, device=soft.device))
    return {"loss": alpha * soft + (1 - alpha) * hard, "soft": soft, "hard": hard}


class Affinity(Objective):
    """Affinity mimicking of a batch.

    Args:
        alpha: share of the soft loss.
        scale: of the cosines, on both sides.
    """

    name = "affinity"
    needs = frozenset({"student.part:image", "student.part:text", "teacher.part:image", "teacher.part:text"})

    def __init__(self, alpha: float = 1.0, scale: float = 50.0) -> None:
        super().__init__()
        self.alpha, self.scale = alpha, scale

    def forward(self, student: Signals, teacher: Signals, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        image, text, their_image, their_text = (
            gather(s.require(f"part:{n}")) for s in (student, teacher) for n in ("image", "text")
        )
        found = mimicking_loss(image, text, their_image, their_text, self.alpha, self.scale, self.scale)
        return {"loss": found["loss"]}


# ---- a masked network ------------------------------------------------------------------------------------------------


class MaskedClip(nn.Module):
    """A CLIP under learned masks: in training a sample of them a forward pass, else what they settle to.

    Args:
        network: the CLIP.
        sparsity: holds the masks, which are no part of this module.
    """

    def __init__(self, network: Clip, sparsity: Sparsity) -> None:
        super().__init__()
        self.network, self._sparsity = network, [sparsity]

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.network.logit_scale

    def masks(self, name: str) -> Masks:
        """Of the transformer `image` or `text`."""
        found = self._sparsity[0].masks[name]
        assert isinstance(found, MaskLogits)
        return found.samples() if self.training else found.settle()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.network.get_image_features(pixel_values, self.masks("image"))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.network.get_text_features(input_ids, attention_mask, self.masks("text"))


# ---- the recipe ------------------------------------------------------------------------------------------------------


class Step(Spec):
    """One compression."""

    inherit: Literal["manual", "auto", "none"] = Field(
        "manual", description="manual: leading parts; auto: by learned masks; none: a fresh network."
    )
    vision: dict[str, Any] | None = Field(
        None, description="manual, none: width, layers, heads and hidden of the image transformer; default: as before."
    )
    text: dict[str, Any] | None = Field(None, description="Likewise of the text transformer.")
    sparsity: float | None = Field(
        None, gt=0, lt=1, description="auto: share of the original's transformer weights that goes."
    )
    prune: TrainSpec | None = Field(None, description="auto: the training with masks.")
    ramp: int | None = Field(
        None, ge=1, description="auto: steps over which the target sparsity rises; default: half of the pruning."
    )
    train: TrainSpec | None = Field(None, description="The training after that; default: the recipe's.")

    @model_validator(mode="after")
    def _fits(self) -> Step:
        if (self.inherit == "auto") != (self.sparsity is not None and self.prune is not None):
            raise ValueError("sparsity and prune are for inherit: auto, which needs both")
        if self.inherit == "auto" and (self.vision or self.text):
            raise ValueError("inherit: auto finds the shape by itself; leave out vision and text")
        return self


class Config(MethodConfig):
    data: Data = Field(description="Images with texts.")
    teacher: Teacher
    steps: list[Step] = Field(min_length=1, description="Compressions, one after the other.")
    loss: Literal["affinity", "contrastive", "features"] = Field(
        "affinity", description="contrastive, features: the baselines without affinities."
    )
    alpha: float = Field(1.0, ge=0, le=1, description="Share of affinity mimicking; the rest is the contrastive loss.")
    scale: float = Field(50.0, gt=0, description="Of the cosines of student and teacher, fixed.")
    mask_lr: float = Field(0.02, gt=0, description="Of mask logits and multipliers.")
    mask_start: float = Field(10.0, description="First mask logits.")
    scale_projection: bool = Field(False, description="Fold masks as the released code does.")
    train: TrainSpec = Field(default_factory=TrainSpec)
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])


TEACHER = Stage("teacher", "train the teacher (stored, shared)")
STEP = Stage("step", "compress")


class TinyClip(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        check_groups(run.data(config.data, ImageText).task, config.evaluate)
        stages = [TEACHER.filled(models={"teacher": str(config.teacher.model)})] if config.teacher.train else []
        words = {"manual": "the leading part", "auto": "what masks leave", "none": "a fresh network"}
        for i, step in enumerate(config.steps):
            fits = [f for f in (step.prune, step.train or config.train) if f is not None]
            batches = sum(f.epochs * len(run.loader(config.data, "train", f.batch_size, train=True)) for f in fits)
            does = f"compress, step {i + 1} of {len(config.steps)}: {words[step.inherit]}, then {config.loss}"
            stages.append(STEP.filled(does=does, steps=batches))
        return stages

    def run(self, config: Config, run: Run) -> Student:
        task = run.data(config.data, ImageText).task
        teacher = run.teacher("teacher", config.teacher, config.data)
        original = as_clip(teacher.model)
        network, figures, seconds = original, {}, 0.0
        reached = 0.0
        uses: dict[str, Any] = {"teacher": teacher, "data": run.data(config.data), "augment": _augment(config)}
        for i, step in enumerate(config.steps):
            made = _Compression(config, run, step, task, original, network, reached)
            uses = {**uses, f"step {i}": step, "loss": _loss_identity(config), "seed": run.seed, "train": config.train}
            found = run.stage(f"{STEP}.{i}", made.make, uses)
            network = Clip(**found["options"], input_shape=(len(task.mean), *task.size))
            network.load_state_dict(found["weights"])
            figures, reached = found["figures"], step.sparsity or reached
            seconds += figures["train_seconds"]
        figures = {**figures, "train_seconds": seconds}
        figures["parameters_share"] = cost.parameters(network) / cost.parameters(original)
        run.record["weights"] = {"teacher": teacher.fingerprint()}
        spec = ModelSpec(model="stillhouse:clip", options=network.options)
        return run.student(network.to(run.device).eval(), spec, config.data, figures)


class _Compression:
    """One step: what is taken over of the network before it, and its training."""

    def __init__(
        self, config: Config, run: Run, step: Step, task: ImageText, original: Clip, network: Clip, reached: float
    ) -> None:
        self.config, self.run, self.step, self.task = config, run, step, task
        self.original, self.network, self.reached = original, network, reached

    def make(self) -> dict[str, Any]:
        seconds = 0.0
        if self.step.inherit == "auto":
            student, seconds = self._pruned()
        else:
            student = self._shaped()
        before = self._accuracy(student)
        seconds += self._fit("student", student, self.step.train or self.config.train).seconds
        figures = {"train_seconds": seconds, **before, "sparsity": 1 - _prunable(student) / _prunable(self.original)}
        return {"weights": state_on_cpu(student), "options": student.options, "figures": figures}

    def _shaped(self) -> Clip:
        """A network of the step's shape, with the leading part of the one before, or fresh."""
        before = self.network.options
        shapes = {}
        for name, given in (("vision", self.step.vision), ("text", self.step.text)):
            shapes[name] = dict(before[name]) if given is None else _reshaped(before[name], given)
        with keyed("student", self.run.seed):
            student = Clip(**{**before, **shapes}, input_shape=self._shape)
        if self.step.inherit == "manual":
            inherit(student, self.network)
        return student

    def _pruned(self) -> tuple[Clip, float]:
        step, prune = self.step, self.step.prune
        assert prune is not None and step.sparsity is not None
        total = _prunable(self.original)
        loader = self.run.loader(self.config.data, "train", prune.batch_size, train=True)
        ramp = Ramp(self.reached, step.sparsity, step.ramp or max(prune.epochs * len(loader) // 2, 1))
        network = Clip(**self.network.options, input_shape=self._shape)
        network.load_state_dict(self.network.state_dict())
        sparsity = Sparsity(network.encoders, total, ramp, self.config.mask_lr, self.config.mask_start)
        masked = MaskedClip(network, sparsity)
        seconds = self._fit("prune", masked, prune, sparsity).seconds
        masks = {name: masked.eval().masks(name) for name in ("image", "text")}
        return fold(network, masks, self._shape, self.config.scale_projection), seconds

    @property
    def _shape(self) -> tuple[int, ...]:
        return (len(self.task.mean), *self.task.size)

    def _fit(self, name: str, student: nn.Module, train: TrainSpec, sparsity: Sparsity | None = None) -> Any:
        config, run = self.config, self.run
        objectives: list[Any] = [_objective(config)]
        if sparsity is not None:
            objectives.append((sparsity, 1.0))
        network = student.network if isinstance(student, MaskedClip) else student
        scale: Any = network.logit_scale
        if config.loss == "affinity":
            with torch.no_grad():
                scale.fill_(torch.tensor(config.scale).log())
            scale.requires_grad_(False)
        teacher = FrozenTeacher(self.original, task=self.task)
        module = Distillation(student, teacher, objectives, seed=run.seed, task=self.task)
        loader = run.loader(config.data, "train", train.batch_size, train=True)
        fitted = run.fit(name, module, loader, train, evaluate=run.validating(config.data))
        module.close()
        scale.requires_grad_(True)
        return fitted

    def _accuracy(self, student: Clip) -> dict[str, float]:
        """Zero-shot accuracy before the training, where there is a test split with classes."""
        bundle = self.run.data(self.config.data)
        if not bundle.has("test") or not self.task.classes:
            return {}
        student = student.to(self.run.device)
        loader = self.run.loader(self.config.data, "test")
        found = self.run.figures(student, self.config.data, loader, self.run.device, ["zero_shot"])
        return {"accuracy_before": found["accuracy"]}


def _prunable(network: Clip) -> int:
    """Weights of both transformers that can go."""
    return sum(prunable(e.shape) for e in network.encoders.values())


def _objective(config: Config) -> Objective:
    if config.loss == "contrastive":
        return Contrastive()
    return Embeddings() if config.loss == "features" else Affinity(config.alpha, config.scale)


def _loss_identity(config: Config) -> dict[str, Any]:
    keys = {"loss", "alpha", "scale", "mask_lr", "mask_start", "scale_projection"}
    return config.model_dump(mode="json", include=keys)


def _augment(config: Config) -> dict[str, Any]:
    return config.data.model_dump(mode="json", include={"augment", "image_size"})


def _reshaped(before: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A new shape, which is as the one before in what the recipe leaves open: hidden units in proportion to the
    width."""
    same = {k: v for k, v in before.items() if k in ("head_dim", "activation", "eps", "patch", "width")}
    shape = {**same, **given}
    shape.setdefault("hidden", max(before["hidden"]) * int(shape["width"]) // int(before["width"]))
    return shape

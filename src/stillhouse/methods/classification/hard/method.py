"""HARD: an augmentor learns, together with the student, images on which teacher and student disagree; the student
learns to agree there too.

paper: HARD: Hard Augmentations for Robust Distillation
venue: arXiv 2023
arxiv: 2305.14890
task: classification
family: logits, adversarial augmentation
use when: the teacher is invariant or robust to what the training images do not show
needs: a live teacher through which gradients flow; no labels

A step: the augmentor (networks in evaluation mode, only its own parameters learn) makes one step of Adam on L_a, then
the student learns D(f_t(x) || f_s(x)) + D(f_t(x~) || f_s(x~)) on fresh, detached x~, with D = T^2 KL of the softmaxes.
There is no released training code and the full text was not at hand; [open] marks a recommendation that is not
confirmed. Form A of L_a is the definition: -D(f_t(x~) || f_s(x~)). Form B, the default [open]: the student's answer
should move and the teacher's not, -lambda_s D(f_s(x) || f_s(x~)) + lambda_t D(f_t(x) || f_t(x~)). Balance [open]: with
m the running mean (0.9) of the loss on x~, the augmentor rests from m > l_max until m < l_min, both times the untrained
student's loss (while it rests its gradient is computed and dropped, to spare a wait for the device). Augmentors:
`affine` (a learned Gaussian over affine maps), `mix` (a learned, content-dependent mask over two images [open]), `vae`
(a hierarchical VAE trained here on the training images, with edits of posteriors, of latents, or all weights; a small
net of our own, not VDVAE), `random` (known rotations and shifts, an upper bound) and `none` (plain distillation).
Learning rates, lambdas, T and balance are [open]. On CUDA, `affine` is not deterministic.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, MethodConfig, Model, OptimizerSpec, Spec, Teacher, TrainSpec
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.methods.classification.hard.augmentors import Augmentor, LearnedAffine, LearnedMix, RandomAffine
from stillhouse.methods.classification.hard.game import Game
from stillhouse.methods.classification.hard.vae import VAE, Edit, VAEAugmentor, VAEFit
from stillhouse.randomness import keyed
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.runs.shifted import Shifts, shifted_accuracy

RATES = {"affine": 2e-2, "mix": 1e-4, "vae": 1e-4}


class AugmentorConfig(Spec):
    """What changes the images; options of other kinds are not read."""

    kind: Literal["affine", "mix", "vae", "random", "none"] = "affine"
    rate: float | None = Field(None, gt=0, description="Adam's; default: 0.02 for affine, 0.0001 for mix and vae.")
    sigma: float = Field(0.1, gt=0, description="affine: standard deviation at the start.")
    covariance: Literal["diagonal", "full"] = Field("diagonal", description="affine: of the six entries of the map.")
    max_area: float = Field(0.75, gt=0, description="affine: bound on |det - 1|; beyond it a sample stays as it is.")
    background: float | None = Field(
        0.0,
        ge=0,
        le=1,
        description="affine, random: grey level outside the image, 0 is black; null repeats the border.",
    )
    patch: int = Field(4, ge=1, description="mix: pixels of one value of the mask.")
    edit: Edit = Field("posterior", description="vae: what is learned.")
    start: int = Field(0, ge=0, description="vae: first level that is edited, coarsest first.")
    end: int | None = Field(None, ge=1, description="vae: levels from here on are drawn from the prior.")
    edited: float = Field(1.0, gt=0, le=1, description="vae, latent: share of the batch that is edited.")
    penalty: float = Field(1e-3, ge=0, description="vae, latent: weight of the penalty on unlikely latents.")
    rotate: float = Field(0.6, ge=0, description="random: radians.")
    shift: float = Field(0.2, ge=0, description="random: share of the image.")


class VAETrain(TrainSpec):
    """How the VAE is fitted: other defaults, for a network that is none of the classifiers."""

    epochs: int = Field(60, ge=1)
    batch_size: int = Field(64, ge=1)
    clip: float | None = Field(1.0, gt=0)
    optimizer: OptimizerSpec = Field(default_factory=lambda: OptimizerSpec(name="adam", lr=2e-3, weight_decay=0.0))


class VAEConfig(Spec):
    """The VAE that is trained for `augmentor.kind: vae`."""

    width: int = Field(32, ge=4)
    latent: int = Field(4, ge=1)
    levels: int = Field(3, ge=1)
    train: VAETrain = Field(default_factory=VAETrain)


class Config(MethodConfig):
    data: Data
    teacher: Teacher
    student: Model
    augmentor: AugmentorConfig = Field(default_factory=AugmentorConfig)
    vae: VAEConfig = Field(default_factory=VAEConfig)
    form: Literal["A", "B"] = Field("B", description="Of the augmentor's loss.")
    lambda_student: float = Field(1.0, ge=0, description="B: on the student's answer, which should move.")
    lambda_teacher: float = Field(3.0, ge=0, description="B: on the teacher's answer, which should not.")
    steps: int = Field(1, ge=1, description="Augmentor steps before each student step.")
    l_min: float = Field(
        0.05, ge=0, description="The augmentor learns again below this share of the untrained student's loss."
    )
    l_max: float = Field(1.0, gt=0, description="The augmentor rests above this share of the untrained student's loss.")
    temperature: float = Field(2.0, gt=0)
    label_weight: float = Field(0.0, ge=0, description="Of the cross-entropy on clean images; 0: labels are not used.")
    train: TrainSpec = Field(default_factory=TrainSpec)
    shifts: Shifts = Field(
        default_factory=dict,
        description="Test images are changed so, for accuracy_NAME: name -> transforms as in data.augment.",
    )
    evaluate: list[str] = Field(default_factory=lambda: ["accuracy", "calibration", "cost"])

    @model_validator(mode="after")
    def _rising(self) -> Config:
        if self.l_min > self.l_max:
            raise ValueError(f"l_min ({self.l_min}) must not exceed l_max ({self.l_max})")
        return self


TEACHER = Stage("teacher", "train the teacher with cross-entropy (stored, shared)")
AUTOENCODER = Stage("vae", "train a VAE on the training images (stored, shared)")
STUDENT = Stage("student", "train the student")


class HARD(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        batches = len(run.loader(config.data, "train", config.train.batch_size, train=True))
        stages = [TEACHER]
        if config.augmentor.kind == "vae":
            stages.append(AUTOENCODER)
        what = "alone" if config.augmentor.kind == "none" else f"against an augmentor ({config.augmentor.kind})"
        return [*stages, STUDENT.filled(does=f"train the student {what}", steps=config.train.epochs * batches)]

    def run(self, config: Config, run: Run) -> Student:
        teacher = run.teacher("teacher", config.teacher, config.data)
        if not isinstance(teacher, FrozenTeacher):
            raise UserError(
                "hard: the teacher must be one live, frozen network, as gradients flow through it to the augmentor."
            )
        student = run.model(config.student, config.data)
        augmentor = self.augmentor(config, run)
        images = next(iter(run.loader(config.data, "train", 8)))["input"].to(run.device)
        start = sample(augmentor, images, run.device)
        module = Game(
            student,
            teacher,
            augmentor,
            rate=config.augmentor.rate or RATES.get(config.augmentor.kind, 1e-4),
            form=config.form,
            temperature=config.temperature,
            lambda_student=config.lambda_student,
            lambda_teacher=config.lambda_teacher,
            steps=config.steps,
            low=config.l_min,
            high=config.l_max,
            label_weight=config.label_weight,
        )
        loader = run.loader(config.data, "train", config.train.batch_size, train=True)
        fitted = run.fit(STUDENT, module, loader, config.train, evaluate=run.validating(config.data))
        if augmentor is not None:
            self.show(config, run, [images, start, sample(augmentor, images, run.device)])
        figures = {"train_seconds": fitted.seconds, **shifted_accuracy(student, run, config.data, config.shifts)}
        figures |= {
            f"teacher_{k}": v for k, v in shifted_accuracy(teacher.model, run, config.data, config.shifts).items()
        }
        return run.student(student, config.student, config.data, figures)

    def augmentor(self, config: Config, run: Run) -> nn.Module | None:
        """The augmentor that the recipe names; a VAE is trained first, as a stage."""
        spec, bundle = config.augmentor, run.data(config.data)
        background = (
            None if spec.background is None else [(spec.background - m) / s for m, s in zip(bundle.mean, bundle.std)]
        )
        if spec.kind == "none":
            return None
        if len(bundle.input_shape) != 3 or not bundle.mean:
            raise UserError(
                f"hard: augmentors are for images; the inputs of '{config.data.name}' have shape "
                f"{tuple(bundle.input_shape)}."
            )
        with keyed("augmentor", run.seed):
            if spec.kind == "affine":
                return LearnedAffine(background, spec.sigma, spec.covariance, spec.max_area)
            if spec.kind == "random":
                return RandomAffine(background, spec.rotate, spec.shift)
            if spec.kind == "mix":
                return LearnedMix(bundle.input_shape[0], spec.patch)
        return VAEAugmentor(self.vae(config, run), spec.edit, spec.start, spec.end, spec.edited, spec.penalty)

    def vae(self, config: Config, run: Run) -> VAE:
        """A VAE of the training images, the same for all seeds of the run."""
        bundle, spec = run.data(config.data), config.vae
        with keyed("vae"):
            vae = VAE(bundle.input_shape, bundle.mean, bundle.std, spec.width, spec.latent, spec.levels)

        def make() -> dict[str, Any]:
            with run.seeded(0):
                loader = run.loader(config.data, "train", spec.train.batch_size, train=True)
                run.fit(AUTOENCODER, VAEFit(vae), loader, spec.train)
            return {"weights": state_on_cpu(vae), "format": 1}

        stored = run.stage(AUTOENCODER, make, {"vae": spec.model_dump(mode="json"), "data": bundle.fingerprint})
        vae.load_state_dict(stored["weights"])
        return vae.to(run.device)

    def show(self, config: Config, run: Run, rows: list[Tensor]) -> None:
        """augmented.png in the run's folder: images, and what the augmentor made of them before and after training."""
        from torchvision.utils import save_image

        bundle = run.data(config.data)
        mean, std = (torch.tensor(v, device=run.device)[:, None, None] for v in (bundle.mean, bundle.std))
        shown = F.interpolate(
            torch.cat(rows) * std + mean, scale_factor=max(64 // bundle.input_shape[-1], 1), mode="nearest"
        )
        save_image(shown, run.folder / "augmented.png", nrow=len(rows[0]))


def sample(augmentor: Augmentor | None, images: Tensor, device: torch.device) -> Tensor:
    """Changed images under fixed noise."""
    if augmentor is None:
        return images
    with torch.no_grad(), keyed("sample"):
        return augmentor.to(device)(images)[0].clamp(-10, 10)  # type: ignore[attr-defined]

"""G2SD: a small ViT first learns hidden features of a large masked autoencoder's decoder, then the task from the
fine-tuned teacher.

paper: Generic-to-Specific Distillation of Masked Autoencoders
venue: CVPR 2023
arxiv: 2302.14771
task: classification; pre-training of vision transformers
family: two stages, masked features and labels
use when: a masked autoencoder with its decoder and few or many labels are at hand, and a small ViT for the task is
wanted
needs: an MAE teacher with its decoder and the student's patches; images; labels for the second stage

Generic stage: one mask serves both networks; the student, with a small decoder and a two-layer head, predicts the
teacher's tokens after block `generic.teacher_block` of its decoder (counted from 1), standardised, at all places
(smooth L1, beta 2). Specific stage: the encoder gets a distillation token with a classifier of its own; the class token
learns the labels and the distillation token the arg max of the fine-tuned teacher, which sees the same augmented
images, half each; their mean predicts. `specific: objectives` fine-tunes a plain encoder by `fine_tune.objectives`
instead: [ce] is plain fine-tuning, [{name: nkd, gamma: 1}] the paper's other form. The authors' token has no position;
here it has one that starts at 0, as timm's has. The teacher is in evaluation mode (the released loop leaves it in
training mode, without effect at its drop path of 0). `start: mae` pre-trains the student by pixels and `scratch` not at
all: the paper's baselines. `accuracy_linear` and `accuracy_knn` probe the encoder before the specific stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import timm
import torch
from pydantic import Field, model_validator
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec, Spec
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.distillation.weighted import objective_from_spec
from stillhouse.errors import UserError
from stillhouse.functional import checks
from stillhouse.functional.labels import check_label
from stillhouse.functional.masking import Masking, random_masking, visible_count
from stillhouse.functional.precision import full_precision
from stillhouse.nn.masked_vit import MaskedDecoder, check_grid, decay_groups, encode, grid_of
from stillhouse.pretraining.encoder import PretrainingConfig, pretrained, pretraining_stage, step_time
from stillhouse.pretraining.mae import (
    MAE,
    DecoderSpec,
    MaskedTeacher,
    fine_tuned_teacher,
    masked_teacher,
    new_decoder,
    new_encoder,
    pixels_of_patch,
    teacher_figures,
    teacher_stages,
)
from stillhouse.pretraining.probing import FineTune, fine_tuned, probed
from stillhouse.randomness import keyed
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch
from stillhouse.tasks.classification import Classification
from stillhouse.training.context import Progress
from stillhouse.training.module import TrainingModule


def generic_target(hidden: Tensor) -> Tensor:
    """The teacher's tokens (B, 1 + L, C), standardised over the width."""
    return F.layer_norm(hidden.detach(), hidden.shape[-1:], eps=1e-6)


@full_precision
def generic_loss(predicted: Tensor, target: Tensor, mask: Tensor | None = None, beta: float = 2.0) -> Tensor:
    """Smooth L1, mean over tokens and width.

    Args:
        predicted, target: (B, 1 + L, C).
        mask: (B, L), 1 where a patch was removed: only those count, class token excluded; None: all tokens.
        beta: the loss is d^2 / (2 beta) below it and |d| - beta / 2 above.

    Raises:
        UserError: shapes that differ.
    """
    if predicted.shape != target.shape:
        raise UserError(
            f"g2sd: predictions have shape {tuple(predicted.shape)} but the teacher's tokens {tuple(target.shape)}.",
        )
    if mask is None:
        return F.smooth_l1_loss(predicted, target, beta=beta)
    errors = F.smooth_l1_loss(predicted[:, 1:], target[:, 1:], reduction="none", beta=beta).mean(-1)
    return (errors * mask).sum() / mask.sum().clamp_min(1)


@full_precision
def specific_loss(
    class_logits: Tensor,
    token_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """`labels`: cross-entropy of the class token with the labels; `teacher`: of the distillation token with the
    teacher's arg max.

    The loss is their mean.

    Args:
        class_logits, token_logits, teacher_logits: (B, C).
        labels: class ids (B,), or soft labels (B, C).
        smoothing: label smoothing of the labels.
    """
    checks.same_classes("g2sd", token_logits, teacher_logits)
    check_label("g2sd", labels, class_logits)
    return {
        "labels": F.cross_entropy(class_logits, labels, label_smoothing=smoothing),
        "teacher": F.cross_entropy(token_logits, teacher_logits.argmax(-1)),
    }


@full_precision
def imitation_losses(
    student: Sequence[tuple[Tensor, Tensor]],
    teacher: Sequence[tuple[Tensor, Tensor]],
    iteration: int,
    weights: tuple[float, float] = (1e-3, 0.1),
    warm_steps: int = 500,
) -> dict[str, Tensor]:
    """Of detectors: `features` and `objectness` where the teacher sees an object, summed over the levels of the
    pyramid.

    Args:
        student: for each level, adapted features (B, C, H, W) and objectness logits (B, A, H, W).
        teacher: the same; detached.
        iteration: both losses grow linearly over the first `warm_steps`.
        weights: of features and objectness.
        warm_steps: see `iteration`.
    """
    features, objectness = [], []
    for (mine, own_scores), (theirs, scores) in zip(student, teacher):
        known = scores.detach().sigmoid()
        where = known.amax(1, keepdim=True)
        total = where.sum().clamp_min(1e-12)
        features.append((where * (theirs.detach() - mine).square()).sum() / total)
        errors = F.binary_cross_entropy_with_logits(own_scores, known, reduction="none")
        objectness.append((where * errors).sum() / total)
    warm = min(iteration / warm_steps, 1.0)
    return {
        "features": weights[0] * warm * torch.stack(features).sum(),
        "objectness": weights[1] * warm * torch.stack(objectness).sum(),
    }


def feature_head(inputs: int, outputs: int) -> nn.Sequential:
    """What maps the student's decoder to the teacher's width: two linear layers with a GELU between."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


class GenericTraining(TrainingModule):
    """Training module of the generic stage; the teacher stays outside the module tree.

    Args:
        student: the encoder.
        decoder: the student's, without prediction of pixels.
        teacher, teacher_decoder: frozen.
        block: how many blocks of the teacher's decoder run.
        mask_ratio: share of the patches that neither encoder sees.
        supervise: all tokens, or masked patches alone.

    Raises:
        UserError: different grids, or a block beyond the teacher's decoder.
    """

    student: VisionTransformer

    def __init__(
        self,
        student: VisionTransformer,
        decoder: MaskedDecoder,
        teacher: VisionTransformer,
        teacher_decoder: MaskedDecoder,
        block: int,
        mask_ratio: float = 0.75,
        supervise: Literal["all", "masked"] = "all",
    ) -> None:
        super().__init__()
        check_grid(student, teacher)
        if not 1 <= block <= len(teacher_decoder.blocks):
            last = len(teacher_decoder.blocks)
            raise UserError(f"generic.teacher_block: the teacher's decoder has blocks 1 to {last}; given: {block}.")
        self.student, self.decoder = student, decoder
        self.head = feature_head(decoder.embed.out_features, teacher_decoder.embed.out_features)
        self.patches = grid_of(student)[0] * grid_of(student)[1]
        visible_count(self.patches, mask_ratio)
        self.mask_ratio, self.block, self.supervise = mask_ratio, block, supervise
        self._teacher = (teacher, teacher_decoder)

    def param_groups(self) -> list[dict[str, Any]]:
        """Matrices with weight decay, vectors without."""
        return decay_groups(self)

    @torch.no_grad()
    def target(self, images: Tensor, masking: Masking) -> Tensor:
        """(B, 1 + L, C) the teacher's standardised tokens; its decoder runs no further than they need."""
        teacher, decoder = self._teacher
        latent = encode(teacher, images, masking.ids_keep).tokens
        return generic_target(decoder.hidden(latent, masking.ids_restore, self.block))

    def predict(self, images: Tensor, masking: Masking) -> Tensor:
        """(B, 1 + L, C) the student's prediction of them."""
        latent = encode(self.student, images, masking.ids_keep).tokens
        return self.head(self.decoder.hidden(latent, masking.ids_restore))

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        images = batch["input"]
        masking = random_masking(torch.rand(len(images), self.patches, device=images.device), self.mask_ratio)
        target = self.target(images, masking)
        mask = masking.mask if self.supervise == "masked" else None
        return {"loss": generic_loss(self.predict(images, masking), target, mask)}


class SpecificTraining(TrainingModule):
    """Training module of the specific stage with hard labels of the teacher.

    Args:
        student: a ViT with class and distillation token, each with its classifier.
        teacher: fine-tuned, frozen.
        smoothing: of the labels.
    """

    def __init__(self, student: VisionTransformerDistilled, teacher: FrozenTeacher, smoothing: float = 0.1) -> None:
        super().__init__()
        student.set_distilled_training(True)  # two outputs in training, their mean in evaluation
        self.student, self._teacher, self.smoothing = student, [teacher], smoothing

    def param_groups(self) -> list[dict[str, Any]]:
        """Matrices with weight decay, vectors without."""
        return decay_groups(self)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        teacher = self._teacher[0](batch).log_probs()
        own, token = self.student(batch["input"])
        terms = specific_loss(own, token, teacher, batch["label"], self.smoothing)
        return {"loss": (terms["labels"] + terms["teacher"]) / 2, **terms}


def add_token(weights: Mapping[str, Tensor], network: VisionTransformerDistilled) -> None:
    """Load a plain encoder's weights into one with a distillation token, which stays as it was made, at position 0;
    classifiers start near 0."""
    state = dict(network.state_dict())
    position = weights["pos_embed"]
    state |= {name: value for name, value in weights.items() if name in state and not name.startswith("head")}
    state["pos_embed"] = torch.cat([position[:, :1], torch.zeros_like(position[:, :1]), position[:, 1:]], 1)
    network.load_state_dict(state)
    for head in (network.head, network.head_dist):
        assert isinstance(head, nn.Linear)
        nn.init.trunc_normal_(head.weight, std=2e-5)
        nn.init.zeros_(head.bias)


class GenericSpec(Spec):
    """The generic stage."""

    decoder: DecoderSpec = Field(
        default_factory=lambda: DecoderSpec(width=256, depth=4, heads=8),
        description="The student's.",
    )
    teacher_block: int = Field(4, ge=1, description="Block of the teacher's decoder, from 1.")
    supervise: Literal["all", "masked"] = Field("all", description="Tokens that count: all, or removed patches.")


class Config(PretrainingConfig):
    teacher: MaskedTeacher
    start: Literal["generic", "mae", "scratch"] = Field(
        "generic", description="How the student is pre-trained: as the paper, by pixels, or not at all."
    )
    generic: GenericSpec = Field(default_factory=GenericSpec)
    mask_ratio: float = Field(0.75, ge=0, lt=1, description="Share of the patches that encoders do not see.")
    specific: Literal["token", "objectives"] = Field(
        "token",
        description="token: hard labels of the teacher to a distillation token; objectives: fine_tune.objectives.",
    )
    smoothing: float = Field(0.1, ge=0, lt=1, description="token: label smoothing.")
    teacher_fine_tune: FineTune = Field(
        default_factory=FineTune,
        description="Labels and training of the teacher before the specific stage.",
    )

    @model_validator(mode="after")
    def _has_two_stages(self) -> Config:
        if self.fine_tune is None:
            raise ValueError("fine_tune is the specific stage, so it cannot be null")
        return self

    @property
    def tune(self) -> FineTune:
        """Labels and training of the specific stage."""
        assert self.fine_tune is not None
        return self.fine_tune

    @property
    def taught(self) -> bool:
        """Whether the specific stage reads the fine-tuned teacher."""
        entries = [objective_from_spec(o) for o in self.tune.objectives]
        reads = any(need.startswith("teacher.") for e in entries for need in e.objective.needs)
        return self.specific == "token" or reads

    @property
    def token_student(self) -> ModelSpec:
        """The student with a distillation token, of the size that its name and options give."""
        with torch.device("meta"):
            plain = timm.create_model(self.student.model.removeprefix("timm:"), **self.student.options)
        assert isinstance(plain, VisionTransformer)
        block: Any = plain.blocks[0]
        size = {
            "patch_size": plain.patch_embed.patch_size[0],
            "embed_dim": plain.embed_dim,
            "depth": len(plain.blocks),
            "num_heads": block.attn.num_heads,
        }
        options = {k: v for k, v in self.student.options.items() if k not in ("global_pool", "fc_norm")}
        options = {**size, **options}
        return ModelSpec(model="timm:deit_tiny_distilled_patch16_224", options={**options, **self.tune.options})


class GenericToSpecific(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        stages = []
        if config.start == "generic" or config.taught:
            stages += teacher_stages(run, config.teacher, config.data)
        if config.start != "scratch":
            whose = f"the teacher's decoder after block {config.generic.teacher_block}"
            what = f"features of {whose}" if config.start == "generic" else "masked autoencoding"
            stages.append(pretraining_stage(run, config, what))
        if config.taught:
            stages.append(Stage("fine_tuned_teacher", "fine-tune the teacher with labels (stored, shared)"))
        labels = config.tune.labels_per_class
        objectives = " + ".join(o.name for o in config.tune.objectives)
        how = "a distillation token" if config.specific == "token" else objectives
        amount = "all labels" if labels is None else f"{labels} labels a class"
        return [*stages, Stage("specific", f"train the student by {how} with {amount}")]

    def run(self, config: Config, run: Run) -> Student:
        bundle = run.data(config.data, Classification)
        figures: dict[str, float] = {}
        teacher = decoder = tutor = None
        if config.start == "generic" or config.taught:
            teacher, decoder = masked_teacher(run, config.teacher, config.data)
            figures |= teacher_figures(run, teacher, config.teacher, config.data, config.probe)
        weights = self._start(config, run, teacher, decoder, figures)
        if config.taught and teacher is not None:
            tutor, figures["teacher_accuracy"] = fine_tuned_teacher(
                run,
                config.teacher,
                teacher,
                config.data,
                config.teacher_fine_tune,
            )
        if config.specific == "objectives" or tutor is None:
            network, tuned = fine_tuned(run, "specific", config.student, weights, config.data, config.tune, tutor)
            figures["fine_tune_seconds"] = tuned["train_seconds"]
            return run.student(network, config.student, config.data, figures)
        student = run.model(config.token_student, config.data, role="specific")
        assert isinstance(student, VisionTransformerDistilled)
        with keyed("specific", run.seed):
            add_token(weights, student)
        few = config.tune.data(config.data, bundle.num_classes)
        loader = run.loader(few, "train", config.tune.train.batch_size, train=True)
        module = SpecificTraining(student, tutor, config.smoothing)
        figures["fine_tune_seconds"] = run.fit("specific", module, loader, config.tune.train).seconds
        return run.student(student, config.token_student, config.data, figures)

    def _start(
        self,
        config: Config,
        run: Run,
        teacher: VisionTransformer | None,
        decoder: MaskedDecoder | None,
        figures: dict[str, float],
    ) -> dict[str, Tensor]:
        """The encoder's weights before the specific stage; adds its figures."""
        if config.start == "scratch":
            return state_on_cpu(new_encoder(run, config.student, config.data, "student"))

        def module() -> GenericTraining | MAE:
            student = new_encoder(run, config.student, config.data, "student")
            outputs = pixels_of_patch(student) if config.start == "mae" else None
            own = new_decoder(run, student, config.generic.decoder, outputs, "student")
            if config.start == "mae":
                return MAE(student, own, config.mask_ratio)
            if teacher is None or decoder is None:
                raise UserError(
                    "g2sd reads the teacher's decoder, so the teacher must be trained here: give teacher.train.",
                )
            with keyed("head", run.seed):
                block, supervise = config.generic.teacher_block, config.generic.supervise
                return GenericTraining(student, own, teacher, decoder, block, config.mask_ratio, supervise)

        generic = config.start == "generic" and teacher is not None and decoder is not None
        uses = {
            **config.model_dump(mode="json", include={"start", "mask_ratio"}),
            "generic": config.generic.model_dump(
                mode="json",
                exclude=set() if generic else {"teacher_block", "supervise"},
            ),
            "teacher": [FrozenTeacher(n).fingerprint() for n in (teacher, decoder) if n is not None]
            if generic
            else None,
        }
        made = pretrained(run, config, module, uses, step_time)
        encoder = run.model(config.student, config.data)
        encoder.load_state_dict(made["weights"])
        figures |= made["figures"]
        figures |= probed(run, encoder.to(run.device), config.data, config.probe, config.student.embedding)
        weights: dict[str, Tensor] = made["weights"]
        return weights

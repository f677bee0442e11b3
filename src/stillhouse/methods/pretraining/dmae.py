"""DMAE: a small masked autoencoder that also copies a hidden layer of a large one, which sees the same few patches and
stops at that layer.

paper: Masked Autoencoders Enable Efficient Knowledge Distillers
venue: CVPR 2023
arxiv: 2208.12256
task: pre-training of vision transformers
family: masked pre-training, features
use when: a large ViT was pre-trained as a masked autoencoder, and a small one is wanted before any fine-tuning
needs: an MAE teacher with the student's patches; images without labels

One random mask an image serves both networks, in one order. The student rebuilds removed patches (mean squared error of
pixels, as MAE), and the tokens after one of its blocks, through a linear projection, match the teacher's after one of
its own: mean |a - b| of unit vectors, class token included. Blocks are counted from 0 and lie at about three quarters
of the depth in both. The released loop runs the whole teacher and its decoder; here it stops at the last aligned block,
with the same numbers. As its vectors are of unit length, the alignment is small beside the pixel loss; that is the
published weight, 1. Without a projection (`none`, for equal widths) the released code compares features as they are.
Its two-layer projection cannot run and is not offered. The product is the encoder with a linear probe as its
classifier; `accuracy` is that probe's. `fine_tune` trains a copy of the encoder on few labels. With `teacher_fine_tune`
the teacher is fine-tuned first and teaches in `fine_tune.objectives`: the baseline that distils after pre-training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Spec
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.errors import UserError
from stillhouse.evaluation.cost import times_in_turns
from stillhouse.functional.masking import Masking, take_tokens
from stillhouse.functional.precision import full_precision
from stillhouse.nn.masked_vit import MaskedDecoder, check_blocks, check_grid, encode
from stillhouse.pretraining.encoder import (
    PretrainingConfig,
    judged,
    pretrained,
    pretraining_stage,
    step_time,
    tuning_stages,
)
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
from stillhouse.pretraining.probing import FineTune
from stillhouse.randomness import keyed
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.signals import Batch
from stillhouse.training.context import Progress

Distance = Literal["l1", "l2"]
Projection = Literal["linear", "mlp"]


@full_precision
def align_loss(student: Tensor, teacher: Tensor, projection: nn.Module | None, distance: Distance = "l1") -> Tensor:
    """Mean distance of projected student tokens from the teacher's, both as unit vectors; over batch, tokens and width.

    Args:
        student: (B, N, Ds) after its aligned block.
        teacher: (B, N, Dt) after its own; detached.
        projection: Ds to Dt; None: compare the tokens as they are, without normalising, as the released code does.
        distance: l1, |a - b|; l2, (a - b)^2.

    Raises:
        UserError: tokens or widths that differ.
    """
    mine, theirs = student, teacher.detach()
    if projection is not None:
        mine, theirs = F.normalize(projection(student), dim=-1), F.normalize(theirs, dim=-1)
    if mine.shape != theirs.shape:
        raise UserError(
            f"dmae: the student's tokens have shape {tuple(mine.shape)} but the teacher's {tuple(theirs.shape)} "
            "(batch, tokens, width); both must see the same patches, and without a projection be of one width."
        )
    return F.l1_loss(mine, theirs) if distance == "l1" else F.mse_loss(mine, theirs)


def projection_head(student_width: int, teacher_width: int, kind: Projection) -> nn.Module:
    """What maps student tokens to the teacher's width: one linear layer, or two with a GELU between."""
    if kind == "linear":
        return nn.Linear(student_width, teacher_width)
    return nn.Sequential(nn.Linear(student_width, teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width))


class DMAE(MAE):
    """Training module: MAE of the student, and its alignment with a frozen teacher, which stays outside the module
    tree.

    Args:
        student, decoder, mask_ratio, normalise_pixels: as of `MAE`.
        teacher: an encoder with the student's grid of patches.
        student_blocks, teacher_blocks: aligned pairs, rising.
        weight: of the alignment, summed over the pairs.
        distance: see `align_loss`.
        projection: see `projection_head`; None: none.

    Raises:
        UserError: different grids, a block that is not there, or lists of different lengths.
    """

    def __init__(
        self,
        student: VisionTransformer,
        decoder: MaskedDecoder,
        teacher: VisionTransformer,
        student_blocks: Sequence[int],
        teacher_blocks: Sequence[int],
        mask_ratio: float = 0.75,
        normalise_pixels: bool = False,
        weight: float = 1.0,
        distance: Distance = "l1",
        projection: Projection | None = "linear",
    ) -> None:
        super().__init__(student, decoder, mask_ratio, normalise_pixels)
        if not student_blocks or len(student_blocks) != len(teacher_blocks):
            raise UserError(
                "align: student_blocks and teacher_blocks must name as many blocks, at least one; "
                f"given: {len(student_blocks)} and {len(teacher_blocks)}."
            )
        check_grid(student, teacher)
        check_blocks(student_blocks, len(student.blocks), "align.student_blocks")
        check_blocks(teacher_blocks, len(teacher.blocks), "align.teacher_blocks")
        self._teacher = [teacher]
        self.student_blocks, self.teacher_blocks = list(student_blocks), list(teacher_blocks)
        self.weight, self.distance = weight, distance
        widths = student.embed_dim, teacher.embed_dim
        self.projections = nn.ModuleList(projection_head(*widths, projection) for _ in student_blocks if projection)

    @torch.no_grad()
    def targets(self, images: Tensor, masking: Masking) -> list[Tensor]:
        """The teacher's tokens (B, 1 + K, Dt) after each of its aligned blocks; it runs no further than the last."""
        return encode(self._teacher[0], images, masking.ids_keep, self.teacher_blocks, stop=True).blocks

    def losses(self, images: Tensor, masking: Masking, targets: list[Tensor]) -> dict[str, Tensor]:
        """`loss`, and its terms `pixel` and `align`."""
        mine = encode(self.student, images, masking.ids_keep, self.student_blocks)
        pixel = self.pixel_loss(mine.tokens, images, masking)
        heads = self.projections or [None] * len(targets)
        aligned = [align_loss(s, t, head, self.distance) for s, t, head in zip(mine.blocks, targets, heads)]
        align = torch.stack(aligned).sum()
        return {"loss": pixel + self.weight * align, "pixel": pixel, "align": align}

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        images = batch["input"]
        masking = self.draw(images)
        return self.losses(images, masking, self.targets(images, masking))


class AlignSpec(Spec):
    """Which tokens match, and how."""

    student_blocks: list[int] = Field([8], description="Blocks of the student, from 0.")
    teacher_blocks: list[int] = Field([17], description="Blocks of the teacher, one for each of the student's.")
    weight: float = Field(1.0, ge=0, description="Of the alignment; 0: MAE alone, without a teacher.")
    distance: Distance = Field("l1", description="Of unit vectors.")
    projection: Projection | None = Field(
        "linear",
        description="To the teacher's width; null: none, and features are compared as they are.",
    )


class Config(PretrainingConfig):
    teacher: MaskedTeacher
    decoder: DecoderSpec = Field(default_factory=DecoderSpec, description="The student's.")
    mask_ratio: float = Field(0.75, ge=0, lt=1, description="Share of the patches that neither network sees.")
    normalise_pixels: bool = Field(False, description="Predict each patch's pixels standardised.")
    align: AlignSpec = Field(default_factory=AlignSpec)
    teacher_fine_tune: FineTune | None = Field(
        None,
        description="Fine-tune the teacher, which then teaches in fine_tune.objectives.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.teacher_fine_tune is not None and self.fine_tune is None:
            raise ValueError("teacher_fine_tune needs fine_tune, in which the teacher teaches")
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether any part of the recipe reads the teacher."""
        return self.align.weight > 0 or self.teacher_fine_tune is not None


class MaskedDistillation(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        stages = teacher_stages(run, config.teacher, config.data) if config.has_teacher else []
        what = "masked autoencoding"
        if config.align.weight:
            pairs = ", ".join(f"{s} to {t}" for s, t in zip(config.align.student_blocks, config.align.teacher_blocks))
            what += f" and alignment of blocks {pairs} with the teacher"
        stages.append(pretraining_stage(run, config, what))
        if config.teacher_fine_tune is not None:
            stages.append(Stage("fine_tuned_teacher", "fine-tune the teacher with labels (stored, shared)"))
        return [*stages, *tuning_stages(config)]

    def run(self, config: Config, run: Run) -> Student:
        teacher, figures = None, {}
        if config.has_teacher:
            teacher, _ = masked_teacher(run, config.teacher, config.data)
            figures = teacher_figures(run, teacher, config.teacher, config.data, config.probe)
        aligned = teacher if config.align.weight else None
        uses = {
            **config.model_dump(mode="json", include={"decoder", "mask_ratio", "normalise_pixels"}),
            "align": None if aligned is None else config.align.model_dump(mode="json"),
            "teacher": None if aligned is None else FrozenTeacher(aligned).fingerprint(),
        }
        made = pretrained(run, config, lambda: self._module(config, run, aligned), uses, step_times)
        figures |= made["figures"]
        tutor = None
        if teacher is not None and config.teacher_fine_tune is not None:
            tutor, figures["teacher_accuracy_fine_tuned"] = fine_tuned_teacher(
                run,
                config.teacher,
                teacher,
                config.data,
                config.teacher_fine_tune,
            )
        return judged(run, config, made["weights"], figures, tutor)

    @staticmethod
    def _module(config: Config, run: Run, teacher: VisionTransformer | None) -> MAE:
        student = new_encoder(run, config.student, config.data, "student")
        decoder = new_decoder(run, student, config.decoder, pixels_of_patch(student), "student")
        ratio, normalise, align = config.mask_ratio, config.normalise_pixels, config.align
        if teacher is None:
            return MAE(student, decoder, ratio, normalise)
        pairs = align.student_blocks, align.teacher_blocks
        with keyed("projection", run.seed):
            return DMAE(
                student,
                decoder,
                teacher,
                *pairs,
                ratio,
                normalise,
                align.weight,
                align.distance,
                align.projection,
            )


def step_times(module: MAE, images: Tensor) -> dict[str, float]:
    """`step_ms`: milliseconds of a pre-training step without the optimiser. Where a teacher is aligned, the same step
    over that if the teacher ran all its blocks on the visible patches (`step_whole_teacher`), or all its blocks on all
    patches (`step_unmasked_teacher`)."""
    if not isinstance(module, DMAE):
        return step_time(module, images)
    aligned = module
    teacher, blocks = aligned._teacher[0], aligned.teacher_blocks

    @torch.no_grad()
    def whole(masking: Masking) -> list[Tensor]:
        return encode(teacher, images, masking.ids_keep, blocks).blocks

    @torch.no_grad()
    def unmasked(masking: Masking) -> list[Tensor]:
        tokens = encode(teacher, images, None, blocks).blocks
        return [torch.cat([t[:, :1], take_tokens(t[:, 1:], masking.ids_keep)], 1) for t in tokens]

    def step(targets: Callable[[Masking], list[Tensor]]) -> Callable[[], None]:
        def work() -> None:
            masking = aligned.draw(images)
            aligned.losses(images, masking, targets(masking))["loss"].backward()
            aligned.zero_grad()

        return work

    early = step(lambda masking: aligned.targets(images, masking))
    seconds = times_in_turns({"early": early, "whole": step(whole), "unmasked": step(unmasked)}, images.device)
    return {
        "step_ms": 1000 * seconds["early"],
        "step_whole_teacher": seconds["whole"] / seconds["early"],
        "step_unmasked_teacher": seconds["unmasked"] / seconds["early"],
    }

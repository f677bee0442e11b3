"""Self-distilled further pre-training: adapt a masked autoencoder, restart, and learn from what it became.

paper: Self-Distillation for Further Pre-training of Transformers
venue: ICLR 2023
arxiv: 2210.02871
task: pre-training of vision transformers
family: masked pre-training, self-distillation
use when: a masked autoencoder is at hand, and the target has few images, on which longer pre-training over-fits
needs: a pre-trained encoder (trained here if it has no weights), images of the target without labels

The start is pre-trained further on the target's images: that is the teacher. The student begins at the untouched start
again, encoder and decoder, and minimises the masked loss plus the squared distance of its features from the teacher's:
the class token after the last norm, of whole images, summed over the width, mean over the batch, weight 1. `rounds`
repeats this with the last student as the teacher, always from the start. It ends nearer to the start than further
pre-training does (`distance`). The paper speaks of the whole representation; the released code, followed here, takes
the class token, and `feature: mean` the mean of all tokens. `rounds: 0` is further pre-training alone, `further: false`
the start as it is: the baselines. Here a published encoder without its decoder begins with a new decoder. The form for
text (masked words, RoBERTa), which was not released, is not here. `accuracy` is a linear probe's,
`accuracy_fine_tuned` that of a copy fine-tuned on few labels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from stillhouse.config.specs import Data, Spec, TrainSpec
from stillhouse.errors import UserError
from stillhouse.functional.precision import full_precision
from stillhouse.nn.masked_vit import MaskedDecoder, check_grid, encode
from stillhouse.pretraining.encoder import PretrainingConfig, judged, pretraining_stage, training_data, tuning_stages
from stillhouse.pretraining.mae import (
    MAE,
    DecoderSpec,
    MaskedTeacher,
    masked_teacher,
    new_decoder,
    pixels_of_patch,
    teacher_stages,
)
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student, state_on_cpu
from stillhouse.runs.run import Run
from stillhouse.signals import Batch
from stillhouse.training.context import Progress

Feature = Literal["class", "mean"]


@full_precision
def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of features (B, D), summed over the width, mean over the batch; the teacher's are constants."""
    return (student - teacher.detach()).square().sum() / len(student)


def feature_of(vit: VisionTransformer, images: Tensor, feature: Feature = "class") -> Tensor:
    """(B, D) of whole images after the final norm: the class token, or the mean of all tokens."""
    tokens = encode(vit, images).tokens
    return tokens[:, 0] if feature == "class" else tokens.mean(1)


class SelfDistillation(MAE):
    """Training module: the masked loss, and the distance from a frozen teacher that sees whole images.

    Args:
        student, decoder, mask_ratio, normalise_pixels: as of `MAE`.
        teacher: an encoder like the student's, outside the module tree.
        weight: of the distance.
        feature: see `feature_of`.

    Raises:
        UserError: different grids, or the student itself as its teacher.
    """

    def __init__(
        self,
        student: VisionTransformer,
        decoder: MaskedDecoder,
        teacher: VisionTransformer,
        mask_ratio: float = 0.75,
        normalise_pixels: bool = True,
        weight: float = 1.0,
        feature: Feature = "class",
    ) -> None:
        super().__init__(student, decoder, mask_ratio, normalise_pixels)
        check_grid(student, teacher)
        mine = {id(p) for p in student.parameters()}
        if any(id(p) in mine for p in teacher.parameters()):
            raise UserError("self_distill_fpt: student and teacher share weights, so there is nothing to learn.")
        self._teacher = [teacher.eval().requires_grad_(False)]
        self.weight, self.feature = weight, feature

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """The teacher's feature (B, D)."""
        return feature_of(self._teacher[0], images, self.feature)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        images = batch["input"]
        pixel = super().forward(batch, progress)["loss"]
        distil = distillation_loss(feature_of(self.student, images, self.feature), self.target(images))
        return {"loss": pixel + self.weight * distil, "pixel": pixel, "distil": distil}


def weight_distance(weights: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Euclidean distance of an encoder's weights from the start's, classifier aside."""
    names = [name for name in start if not name.startswith("head.") and start[name].is_floating_point()]
    squares = [(weights[name].double() - start[name].double()).square().sum() for name in names]
    return float(torch.stack(squares).sum().sqrt())


class StartSpec(Spec):
    """How the start was pre-trained, where the student's network has no weights: once, for every recipe with the same
    start."""

    train: TrainSpec | None = Field(None, description="Its training as a masked autoencoder.")
    data: Data | None = Field(None, description="What it is trained on: another domain than the target's.")
    seed: int = Field(0, description="Of that training.")


class Config(PretrainingConfig):
    data: Data = Field(description="The target: its training images, without labels but for fine-tuning.")
    start: StartSpec = Field(default_factory=StartSpec)
    decoder: DecoderSpec = Field(default_factory=DecoderSpec)
    mask_ratio: float = Field(0.75, ge=0, lt=1, description="Share of the patches that is hidden.")
    normalise_pixels: bool = Field(True, description="Predict each patch's pixels standardised.")
    further: bool = Field(True, description="false: the start as it is, not pre-trained further.")
    rounds: int = Field(1, ge=0, description="Of self-distillation; 0: further pre-training alone.")
    weight: float = Field(1.0, ge=0, description="Of the distance from the teacher's features.")
    feature: Feature = Field("class", description="What is compared: the class token, or the mean of all tokens.")

    @property
    def initial(self) -> MaskedTeacher:
        """The start as the pre-training room trains it."""
        network = self.student.model_dump(include={"model", "checkpoint", "pretrained", "options", "embedding"})
        own = self.model_dump(include={"decoder", "mask_ratio", "normalise_pixels"})
        return MaskedTeacher.model_validate({**network, **own, **self.start.model_dump()})


FURTHER = Stage("further", "pre-train the start further on the target (shared)")
ROUND = Stage("round", "restart, and learn from what it became (shared)")


class SelfDistilledPretraining(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        stages = teacher_stages(run, config.initial, config.data)
        steps = pretraining_stage(run, config, "").steps
        if config.further:
            stages.append(FURTHER.filled(steps=steps))
        if config.further and config.rounds:
            stages.append(ROUND.filled(steps=(steps or 0) * config.rounds))
        return [*stages, *tuning_stages(config)]

    def run(self, config: Config, run: Run) -> Student:
        start, decoder = masked_teacher(run, config.initial, config.data)
        if decoder is None:
            decoder = new_decoder(run, start, config.decoder, pixels_of_patch(start), "student")
        initial = state_on_cpu(start)
        weights, figures = initial, {"train_seconds": 0.0}

        def adapted(stage: str, teacher: VisionTransformer | None) -> dict[str, Any]:
            """A training from the untouched start."""

            def make() -> dict[str, Any]:
                vit, own = copy.deepcopy(start), copy.deepcopy(decoder)
                vit.requires_grad_(True).train()
                own.requires_grad_(True).train()
                assert vit.pos_embed is not None
                vit.pos_embed.requires_grad_(False)
                options = config.mask_ratio, config.normalise_pixels
                module = (
                    MAE(vit, own, *options)
                    if teacher is None
                    else SelfDistillation(vit, own, teacher, *options, config.weight, config.feature)
                )
                loader = run.loader(config.data, "train", config.train.batch_size, train=True)
                seconds = run.fit(stage, module, loader, config.train).seconds
                return {"weights": state_on_cpu(vit), "figures": {"seconds": seconds}}

            uses = {
                "start": [start, decoder],
                "teacher": teacher,
                "options": config.model_dump(mode="json", include={"mask_ratio", "normalise_pixels"}),
                "distil": None if teacher is None else [config.weight, config.feature],
                "train": config.train,
                "seed": run.seed,
                **training_data(run, config.data),
            }
            made: dict[str, Any] = run.stage(stage, make, uses)
            figures["train_seconds"] += made["figures"]["seconds"]
            return made

        if config.further:
            weights = adapted(str(FURTHER), None)["weights"]
            figures["distance_further"] = weight_distance(weights, initial)
            for number in range(1, config.rounds + 1):
                teacher = copy.deepcopy(start)
                teacher.load_state_dict(weights)
                weights = adapted(f"{ROUND}.{number}", teacher)["weights"]
        return judged(run, config, weights, {**figures, "distance": weight_distance(weights, initial)})

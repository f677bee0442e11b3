"""What recipes of data-set distillation share: the budget, how images begin, augmentation, the optimiser of the pixels, and how the set is judged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from stillhouse.recipe import Data, MethodConfig, Model, Spec

STRATEGY = "color_crop_cutout_flip_scale_rotate"


def _check_strategy(value: str) -> str:
    from stillhouse.functional.siamese import groups_of

    groups_of(value)
    return value


class AugmentSpec(Spec):
    """Differentiable augmentation: `always` is applied first, whole, then one of `groups`."""

    groups: str = Field(
        STRATEGY, description="One of these a batch: color, crop, cutout, flip, scale, rotate, joined by _; '' for none. Leave flip out for digits."
    )
    always: str = Field("", description="All of these first, such as flip.")

    _known = field_validator("groups", "always")(_check_strategy)


class EvaluateSpec(Spec):
    """How a synthetic set is judged: networks trained on it from scratch, and tested on real data. Accuracies are those of the last epoch."""

    protocol: Literal["hard", "soft"] = Field(
        "hard", description="hard: cross-entropy to class ids, SGD; soft: KL to the set's stored teacher logits, AdamW."
    )
    network: Model | None = Field(None, description="The network to train; default: the one of the recipe.")
    networks: int = Field(3, ge=1, description="How many, each from its own initialisation: mean and spread are over them.")
    cross: list[Model] = Field(default_factory=list, description="Other architectures, trained the same way, once each.")
    epochs: int = Field(300, ge=1, description="Passes over the set; published: 1000 (hard), 300 (soft).")
    batch_size: int = Field(256, ge=1)
    lr: float | None = Field(None, gt=0, description="Default: 0.01 (hard; or the set's own learned rate), 0.001 (soft).")
    weight_decay: float | None = Field(None, ge=0, description="Default: 5e-4 (hard), 0.01 (soft).")
    augment: AugmentSpec | None = Field(None, description="Of training, an own draw for each image; default: as the recipe's `augment`.")
    temperature: float = Field(20.0, gt=0, description="soft: of both sides; no factor T^2.")
    scores: bool = Field(
        False, description="Also DD-Ranking's scores, which train on random real images, on all real data, and without augmentation."
    )
    full_epochs: int = Field(20, ge=1, description="scores: passes over all real data.")


class DatasetConfig(MethodConfig):
    """Of every method whose product is a synthetic set."""

    data: Data
    network: Model = Field(description="The network that the set is made for.")
    ipc: int = Field(1, ge=1, description="Stored images per class.")
    zca: bool = Field(False, description="Whiten the images (eps 0.1, fitted on training data) instead of normalising them by channel.")
    augment: AugmentSpec = Field(default_factory=AugmentSpec)
    evaluate: EvaluateSpec = Field(default_factory=EvaluateSpec)


class PixelConfig(DatasetConfig):
    """Of methods that learn pixels from the real images of each class."""

    init: Literal["noise", "real", "representative", "mix"] = Field("real", description="How the images begin (see stillhouse.synthetic.initial).")
    iterations: int = Field(1000, ge=0, description="Outer steps; 0 leaves the set as it began.")
    batch_real: int = Field(256, ge=1, description="Real images per class and iteration.")
    lr: float = Field(1.0, gt=0, description="Of the pixels: SGD.")
    momentum: float = Field(0.5, ge=0, lt=1)
    clamp: bool = Field(False, description="Keep pixels in [0, 1] after every step; published code lets them go.")
    mirror: bool = Field(False, description="Learn from every image and its mirror image at once (FYI); not for digits or text.")

    @model_validator(mode="after")
    def _clamps_pixels(self) -> PixelConfig:
        if self.clamp and self.zca:
            raise ValueError("clamp keeps normalised pixels in range, and cannot go with zca")
        return self

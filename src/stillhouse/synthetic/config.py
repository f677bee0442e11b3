"""What recipes of data-set distillation share: the budget, how images begin, augmentation, the optimiser of the pixels,
and how the set is judged."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from stillhouse.config.specs import Data, LRSchedule, MethodConfig, Model, Spec

STRATEGY = "color_crop_cutout_flip_scale_rotate"


def _known(value: str) -> str:
    from stillhouse.functional.augmentation import groups_of

    groups_of(value)
    return value


Groups = Annotated[str, AfterValidator(_known)]
"""Groups of differentiable augmentation, joined by _; '' for none."""


class AugmentSpec(Spec):
    """Differentiable augmentation: `always` is applied first, whole, then one of `groups`."""

    groups: Groups = Field(
        STRATEGY,
        description="One of these a batch: color, crop, cutout, flip, scale, rotate, joined by _; '' for none. Leave "
        "flip out for digits.",
    )
    always: Groups = Field("", description="All of these first, such as flip.")


class ContinualSpec(Spec):
    """Continual learning with the set as memory: classes arrive in steps, and after each a network is trained from
    scratch on their images (GDumb)."""

    steps: int = Field(
        5,
        ge=2,
        description="The classes, in an order drawn by the run's seed, come in so many groups; published: 5 and 10.",
    )


class SearchSpec(Spec):
    """Architecture search with the set: every network of a grid is trained on the set and on all real data, and the two
    rankings are compared."""

    model: str = Field("stillhouse:convnet", description="Whose options the grid varies.")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=lambda: dict[str, list[Any]](
            width=[8, 32], depth=[1, 2], norm=["none", "instance"], act=["relu", "sigmoid"], pool=["avg", "max"]
        ),
        min_length=1,
        description="Option -> its values: all combinations are candidates. Published: 720 (width 32 to 256, depth 1 "
        "to 4, 5 norms, 3 act, 3 pool).",
    )
    networks: int = Field(
        1, ge=1, description="Of each candidate on the set, from an initialisation each; ranked by their mean."
    )
    top: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the candidates, the best on all real data, among which ranks are compared once more.",
    )


class EvaluateSpec(Spec):
    """How a synthetic set is judged: networks trained on it from scratch, and tested on real data.

    Accuracies are those of the last epoch.
    """

    protocol: Literal["hard", "soft"] = Field(
        "hard", description="hard: cross-entropy to class ids, SGD; soft: KL to the set's stored teacher logits, AdamW."
    )
    network: Model | None = Field(None, description="The network to train; default: the one of the recipe.")
    networks: int = Field(
        3, ge=1, description="How many, each from its own initialisation: mean and spread are over them."
    )
    cross: list[Model] = Field(default_factory=list, description="Other architectures, trained the same way.")
    cross_networks: int = Field(1, ge=1, description="How many of each of `cross`.")
    epochs: int = Field(300, ge=1, description="Passes over the set; published: 1000 (hard), 300 (soft).")
    batch_size: int | None = Field(
        None, ge=1, description="Default: 256 (hard), 64 (soft; of views, that in which they were labelled)."
    )
    optimizer: Literal["sgd", "adam", "adamw"] | None = Field(
        None, description="Default: sgd, with momentum 0.9 (hard), adamw (soft)."
    )
    lr: float | None = Field(
        None, gt=0, description="Default: 0.01 (hard; or the set's own learned rate), 0.001 (soft)."
    )
    weight_decay: float | None = Field(None, ge=0, description="Default: 5e-4 (hard), 0.01 (soft).")
    schedule: LRSchedule | None = Field(
        None,
        description="Default: after half the epochs to a tenth, and a fresh optimiser state (hard); cosine to 0, by "
        "epoch (soft).",
    )
    augment: AugmentSpec | None = Field(
        None, description="Of training, an own draw for each image; default: as the recipe's `augment`."
    )
    align_corners: bool = Field(
        True, description="Of the grids that scale and rotate; most published code has true, NCFM's false."
    )
    mixup: float = Field(
        0.0,
        ge=0,
        description="Mixup's alpha; 0 is off. With cutmix also on, each mixed batch takes one of the two at random.",
    )
    cutmix: float = Field(
        0.0, ge=0, description="CutMix's alpha; 0 is off. Not of views, which are mixed when they are labelled."
    )
    mix_probability: float = Field(1.0, gt=0, le=1, description="Share of the batches that are mixed, where they are.")
    temperature: float = Field(20.0, gt=0, description="soft: of both sides; no factor T^2.")
    best_every: int | None = Field(
        None,
        ge=1,
        description="Also report the best of the accuracies after every so many epochs, as published code does: it "
        "chooses by test data.",
    )
    scores: bool = Field(
        False,
        description="Also DD-Ranking's scores, which train on random real images, on all real data, and without "
        "augmentation.",
    )
    rates: list[Annotated[float, Field(gt=0)]] = Field(
        default_factory=list,
        description="scores: each network is trained at each of these rates, and the best test accuracy counts; "
        "published: 0.001, 0.005, 0.01, 0.05, 0.1. Default: the one rate.",
    )
    full_epochs: int = Field(20, ge=1, description="scores, search: passes over all real data.")
    continual: ContinualSpec | None = Field(None, description="Also use the set as the memory of continual learning.")
    search: SearchSpec | None = Field(None, description="Also use the set to choose among architectures.")

    @model_validator(mode="after")
    def _fits(self) -> EvaluateSpec:
        if self.protocol == "soft" and self.continual is not None:
            raise ValueError(
                "continual trains on the images of some classes, and soft labels are of all; take protocol hard"
            )
        if self.rates and not self.scores:
            raise ValueError("rates are tried for scores only; set scores to true, or give the one rate as lr")
        return self


class DatasetConfig(MethodConfig):
    """Of every method whose product is a synthetic set."""

    data: Data
    network: Model = Field(description="The network that the set is made for.")
    ipc: int = Field(1, ge=1, description="Stored images per class.")
    zca: bool = Field(
        False,
        description="Whiten the images (eps 0.1, fitted on training data) instead of normalising them by channel.",
    )
    augment: AugmentSpec = Field(default_factory=AugmentSpec)
    evaluate: EvaluateSpec = Field(default_factory=EvaluateSpec)


class PixelConfig(DatasetConfig):
    """Of methods that learn pixels from the real images of each class."""

    init: Literal["noise", "real", "representative", "mix"] = Field(
        "real", description="How the images begin (see stillhouse.synthetic.initial)."
    )
    iterations: int = Field(1000, ge=0, description="Outer steps; 0 leaves the set as it began.")
    batch_real: int = Field(256, ge=1, description="Real images per class and iteration.")
    lr: float = Field(1.0, gt=0, description="Of the pixels: SGD.")
    momentum: float = Field(0.5, ge=0, lt=1)
    clamp: bool = Field(False, description="Keep pixels in [0, 1] after every step; published code lets them go.")
    mirror: bool = Field(
        False, description="Learn from every image and its mirror image at once (FYI); not for digits or text."
    )

    @model_validator(mode="after")
    def _fits_pixels(self) -> PixelConfig:
        if self.clamp and self.zca:
            raise ValueError("clamp keeps normalised pixels in range, and cannot go with zca")
        if self.evaluate.protocol == "soft" and not self.labels_softly:
            raise ValueError(f"evaluate.protocol is soft, but {self.method} gives its images hard labels; take hard")
        return self

    @property
    def labels_softly(self) -> bool:
        """Whether the set will hold soft labels."""
        return False

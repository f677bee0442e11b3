"""DMJD: two views of an image hide complementary patches, so that every patch is predicted in one step; visible tokens
learn the targets too.

paper: Disjoint Masking with Joint Distillation for Efficient Masked Image Modeling
venue: IEEE TMM 2024
arxiv: 2301.00230
task: pre-training of vision transformers
family: masked image modelling, feature targets
use when: an encoder is pre-trained by masked images and epochs are dear
needs: images without labels; an even grid of patches for block masks; no teacher network

Both views share the crop; only the mask differs. Targets are histograms of oriented gradients of the crop's pixels,
standardised within each cell. A decoder predicts those of hidden patches (squared error), a small head on the encoder's
tokens those of visible ones (smooth L1, beta 2, weight `theta`). With a mask ratio of a half or more and `predict: 1`
the hidden patches of both views cover the image exactly; with less, about `predict` of it. The released loss pairs
visible predictions, which are in the order of the mask, with targets in raster order, so with other patches' targets;
the paper means the same patch, which is done here. `visible_order: released` is that bug, to measure what it costs. The
script's `theta` and `pred_ratio` never reach the released model. The published learning rate is blr * images * (predict
/ mask ratio) / 256. A ViT keeps its class token, which no branch reads; `stillhouse:conv_vit` is the published ConViT.
The product is the encoder with a linear probe as its classifier; `accuracy` is that probe's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError
from stillhouse.functional.hog import hog_targets
from stillhouse.functional.masking import (
    Masking,
    grid_blocks,
    masked_mean,
    masking_of,
    patches_of_blocks,
    random_masking,
    take_tokens,
    visible_count,
)
from stillhouse.functional.precision import full_precision
from stillhouse.models.conv_vit import ConvViT
from stillhouse.nn.masked_vit import MaskedDecoder, decay_groups, encode, grid_of, layer_norm
from stillhouse.pretraining.encoder import (
    PretrainingConfig,
    judged,
    pretrained,
    pretraining_stage,
    step_time,
    tuning_stages,
)
from stillhouse.pretraining.mae import DecoderSpec, new_encoder
from stillhouse.randomness import keyed
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.signals import Batch
from stillhouse.tasks.classification import Classification
from stillhouse.training.context import Progress
from stillhouse.training.module import TrainingModule

Loss = Literal["l2", "smooth_l1"]


def disjoint_masks(
    noise: Tensor,
    mask_ratio: float,
    predict: float,
    perm_visible: Tensor,
    perm_masked: Tensor,
) -> Masking:
    """Two masks an image: the second hides as many patches, first of all those that the first one shows.

    Args:
        noise: (B, L) uniform draws, of which the smallest are visible in the first view.
        mask_ratio: share of the patches that a view hides, m_c.
        predict: share of the patches that the views hide together, m_p, from `mask_ratio` to 1.
        perm_visible: (K,) a permutation of the first view's visible patches, the same for all images.
        perm_masked: (L - K,) of its hidden ones.

    Returns:
        (2B, ·): the first views of all images, then the second views.

    Raises:
        UserError: `predict` below the mask ratio or above 1, or a ratio that leaves no patch.
    """
    if not mask_ratio <= predict <= 1:
        raise UserError(f"masks.predict must lie between the mask ratio, {mask_ratio}, and 1; given: {predict}.")
    length, keep = noise.shape[1], visible_count(noise.shape[1], mask_ratio)
    extra = int(min(predict - mask_ratio, mask_ratio) * length)
    first = noise.argsort(1)
    visible, hidden = first[:, :keep][:, perm_visible], first[:, keep:][:, perm_masked]
    others = length - keep - extra  # hidden again
    second = torch.cat([visible[:, extra:], hidden[:, others:], visible[:, :extra], hidden[:, :others]], 1)
    return masking_of(torch.cat([first, second]), keep)


def block_masks(masking: Masking, columns: int) -> Masking:
    """Masks over 2 x 2 blocks as masks over patches; `columns` is the width of the grid of patches."""
    shuffle = masking.ids_restore.argsort(1)
    keep = masking.ids_keep.shape[1]
    parts = [patches_of_blocks(ids, columns) for ids in (shuffle[:, :keep], shuffle[:, keep:])]
    return masking_of(torch.cat(parts, 1), 4 * keep)


@full_precision
def hidden_loss(predicted: Tensor, target: Tensor, mask: Tensor, kind: Loss = "l2", beta: float = 2.0) -> Tensor:
    """Error of hidden patches: mean over a patch's numbers, then over all hidden ones of V views of B images.

    Args:
        predicted: (V B, L, P) of the decoder, view by view.
        target: (B, L, P).
        mask: (V B, L), 1 where hidden.
        kind: squared error, or smooth L1.
        beta: smooth L1 is d^2 / (2 beta) below it and |d| - beta / 2 above.
    """
    repeated = target.repeat(len(mask) // len(target), 1, 1)
    return masked_mean(_errors(kind, predicted, repeated, beta).mean(-1), mask)


@full_precision
def visible_loss(
    predicted: Tensor,
    target: Tensor,
    ids_keep: Tensor,
    kind: Loss = "smooth_l1",
    beta: float = 2.0,
) -> Tensor:
    """Error of visible patches, mean over all of them and their numbers.

    Args:
        predicted: (V B, K, P) of the visible branch, in the order of `ids_keep`.
        target: (B, L, P).
        ids_keep: (V B, K) positions of the visible patches.
        kind, beta: as of `hidden_loss`.
    """
    repeated = target.repeat(len(ids_keep) // len(target), 1, 1)
    return _errors(kind, predicted, take_tokens(repeated, ids_keep), beta).mean()


def _errors(kind: Loss, predicted: Tensor, target: Tensor, beta: float) -> Tensor:
    if kind == "l2":
        return (predicted - target).square()
    return F.smooth_l1_loss(predicted, target, reduction="none", beta=beta)


class VisibleHead(nn.Module):
    """The visible branch: three linear layers with layer norm (the last without affine) and GELU, then a linear
    predictor.

    Args:
        inputs: width of the encoder's tokens.
        width: of the hidden layers.
        outputs: numbers predicted a patch.
    """

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, width),
            layer_norm(width),
            nn.GELU(),
            nn.Linear(width, width),
            layer_norm(width),
            nn.GELU(),
            nn.Linear(width, width),
            layer_norm(width, elementwise_affine=False),
        )
        self.predictor = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, K, inputs) to (B, K, outputs)."""
        return self.predictor(self.layers(tokens))


class MaskSpec(Spec):
    """What each view hides."""

    kind: Literal["block", "random"] = Field(
        "block",
        description="block: 2 x 2 patches at a time; random: single ones.",
    )
    ratio: float = Field(0.6, ge=0, lt=1, description="Share of the patches that a view hides.")
    views: Literal[1, 2] = Field(2, description="Masks of each image, in one batch.")
    disjoint: bool = Field(True, description="views 2: what one view shows, the other hides first; false: drawn apart.")
    predict: float = Field(1.0, gt=0, le=1, description="disjoint: share of the patches that both views hide together.")

    @model_validator(mode="after")
    def _covers(self) -> MaskSpec:
        if self.disjoint and self.views == 2 and self.predict < self.ratio:
            raise ValueError(f"predict ({self.predict}) must be at least the mask ratio ({self.ratio})")
        return self


class DMJD(TrainingModule):
    """Training module: the encoder, a decoder for hidden patches and a head for visible ones.

    Args:
        student: a plain ViT, or a `ConvViT`.
        decoder: predicts the targets of all patches.
        head: predicts those of visible patches; None: no visible branch.
        masks: how views are masked.
        cells: HOG cells a side of a patch.
        mean, std: the images' normalisation, which is undone for the targets.
        theta: weight of the visible branch.
        released_order: pair visible predictions with targets in raster order, as the released code does.

    Raises:
        UserError: an odd grid with block masks, or a ratio that leaves no patch visible.
    """

    student: VisionTransformer | ConvViT
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        student: VisionTransformer | ConvViT,
        decoder: MaskedDecoder,
        head: VisibleHead | None,
        masks: MaskSpec,
        cells: int,
        mean: Sequence[float],
        std: Sequence[float],
        theta: float = 1.0,
        released_order: bool = False,
    ) -> None:
        super().__init__()
        self.student, self.decoder, self.head = student, decoder, head
        self.masks, self.cells, self.theta, self.released_order = masks, cells, theta, released_order
        self.grid, self.patch = geometry(student)
        self.places = grid_blocks(*self.grid) if masks.kind == "block" else self.grid[0] * self.grid[1]
        visible_count(self.places, masks.ratio)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def param_groups(self) -> list[dict[str, Any]]:
        """Matrices with weight decay, vectors without."""
        return decay_groups(self)

    def draw(self, images: Tensor) -> Masking:
        """Masks of all views, view by view."""
        masks, device = self.masks, images.device
        noise = torch.rand(masks.views * len(images), self.places, device=device)
        if masks.views == 2 and masks.disjoint:
            keep = visible_count(self.places, masks.ratio)
            perms = [torch.randperm(n, device=device) for n in (keep, self.places - keep)]
            made = disjoint_masks(noise[: len(images)], masks.ratio, masks.predict, *perms)
        else:
            made = random_masking(noise, masks.ratio)
        return block_masks(made, self.grid[1]) if masks.kind == "block" else made

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """(B, L, P) HOG of the images' own pixels, whole numbers from 0 to 255."""
        pixels = ((images.float() * self.std + self.mean) * 255).round().clamp(0, 255)
        return hog_targets(pixels, self.patch, self.cells)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        images = batch["input"]
        masking, target = self.draw(images), self.targets(images)
        tokens = visible_tokens(self.student, images.repeat(self.masks.views, 1, 1, 1), masking)
        hidden = hidden_loss(self.decoder(tokens, masking.ids_restore), target, masking.mask)
        if self.head is None:
            return {"loss": hidden, "hidden": hidden}
        order = masking.ids_keep.sort(1).values if self.released_order else masking.ids_keep
        visible = visible_loss(self.head(tokens[:, self.decoder.prefix :]), target, order)
        return {"loss": hidden + self.theta * visible, "hidden": hidden, "visible": visible}


def geometry(encoder: VisionTransformer | ConvViT) -> tuple[tuple[int, int], int]:
    """Rows and columns of patches, and pixels a side of one."""
    if isinstance(encoder, ConvViT):
        return encoder.grid, encoder.patch
    return grid_of(encoder), int(encoder.patch_embed.patch_size[0])


def visible_tokens(encoder: VisionTransformer | ConvViT, images: Tensor, masking: Masking) -> Tensor:
    """(B, prefix + K, D) normalised tokens of the visible patches; of a ViT the class token first."""
    if isinstance(encoder, ConvViT):
        return encoder.encode(images, masking)
    return encode(encoder, images, masking.ids_keep).tokens


class Config(PretrainingConfig):
    decoder: DecoderSpec = Field(
        default_factory=DecoderSpec,
        description="Also its width is that of the visible branch.",
    )
    masks: MaskSpec = Field(default_factory=MaskSpec)
    cells: int = Field(2, ge=1, description="HOG cells a side of a patch; the published patches of 16 pixels have 2.")
    theta: float = Field(1.0, ge=0, description="Weight of the visible branch; 0 leaves it out.")
    visible_order: Literal["aligned", "released"] = Field(
        "aligned", description="released: targets of visible patches in raster order, the released code's bug."
    )


class DisjointMasking(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        masks = config.masks
        kind = "disjoint" if masks.views == 2 and masks.disjoint else f"{masks.views} independent"
        branches = "hidden and visible patches" if config.theta else "hidden patches"
        what = f"HOG of {branches} under {kind} {masks.kind} masks"
        return [pretraining_stage(run, config, what), *tuning_stages(config)]

    def run(self, config: Config, run: Run) -> Student:
        uses = config.model_dump(mode="json", include={"decoder", "masks", "cells", "theta", "visible_order"})
        made = pretrained(run, config, lambda: self._module(config, run), uses, step_time)
        return judged(run, config, made["weights"], made["figures"])

    @staticmethod
    def _module(config: Config, run: Run) -> DMJD:
        bundle = run.data(config.data, Classification)
        student: VisionTransformer | ConvViT
        if config.student.model == "stillhouse:conv_vit":
            model = run.model(config.student, config.data)
            assert isinstance(model, ConvViT)
            student = model
        else:
            student = new_encoder(run, config.student, config.data, "student")
        grid, patch = geometry(student)
        outputs = hog_targets(torch.zeros(1, bundle.input_shape[0], patch, patch), patch, config.cells).shape[-1]
        spec, prefix = config.decoder, 0 if isinstance(student, ConvViT) else 1
        with keyed("decoder", run.seed):
            decoder = MaskedDecoder(student.embed_dim, spec.width, spec.depth, spec.heads, grid, outputs, prefix)
            head = VisibleHead(student.embed_dim, spec.width, outputs) if config.theta else None
        return DMJD(
            student,
            decoder,
            head,
            config.masks,
            config.cells,
            bundle.mean,
            bundle.std,
            theta=config.theta,
            released_order=config.visible_order == "released",
        )

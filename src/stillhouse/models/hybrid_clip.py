"""`hybrid_clip`: a CLIP whose patches are read by the first stages of a network of timm, such as EfficientNet-Lite0
with its published weights, in place of one convolution: what a few thousand captions can train.

Hybrid vision transformers: Dosovitskiy et al., ICLR 2021 (arXiv 2010.11929), section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.pictures import renormalise
from stillhouse.models.clip import Clip
from stillhouse.models.pyramid_detector import load_backbone
from stillhouse.models.registry import register
from stillhouse.models.sources import check_timm


class StemPatches(nn.Module):
    """Maps of a network at one stride, projected: images (B, C, H, W) to (B, width, H / stride, W / stride).

    Args:
        name: of a timm model.
        weights: a file with the state dict of the timm classifier; None: random, as a product is loaded.
        stride: of its maps.
        width: channels of a token.
        normalised: mean and standard deviation per channel of the images that it is given.
        own: its own.
        channels: of an image.
        frozen: the network stays as it is, its batch normalisation included.
    """

    def __init__(
        self,
        name: str,
        weights: str | None,
        stride: int,
        width: int,
        normalised: tuple[Sequence[float], Sequence[float]],
        own: tuple[Sequence[float], Sequence[float]],
        channels: int,
        frozen: bool,
    ) -> None:
        super().__init__()
        check_timm(name)
        whole: Any = timm.create_model(name, in_chans=channels, pretrained=False)
        stages = {f.get("reduction"): (i, int(f["num_chs"])) for i, f in enumerate(getattr(whole, "feature_info", ()))}
        if stride not in stages or not hasattr(whole, "prune_intermediate_layers"):
            raise UserError(f"options.vision.stem: '{name}' gives maps at strides {sorted(stages)}, not at {stride}.")
        self._place, wide = stages[stride]
        whole.prune_intermediate_layers([self._place], prune_norm=True, prune_head=True)
        if weights is not None:
            load_backbone(whole, weights, name)
        self.network = whole.requires_grad_(not frozen)
        self.frozen = frozen
        self.norm = nn.BatchNorm2d(wide, affine=False)
        self.project = nn.Conv2d(wide, width, 1, bias=False)
        self.stride, self._given, self._own = stride, normalised, own
        self.train()

    def train(self, mode: bool = True) -> StemPatches:
        """As `nn.Module.train`; a frozen network stays in evaluation mode."""
        super().train(mode)
        self.network.train(mode and not self.frozen)
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad() if self.frozen else nullcontext():
            x = renormalise(images, self._given, self._own)
            found = self.network.forward_intermediates(
                x, indices=[self._place], norm=False, stop_early=True, intermediates_only=True
            )[0]
        tokens: Tensor = self.project(self.norm(found))
        return tokens

    def dense(self, images: Tensor) -> Tensor:
        """The same at half the stride, (B, width, 2 H / stride, 2 W / stride): of the images moved by a quarter of the
        stride in each direction, interleaved."""
        half = self.stride // 2
        height, width = images.shape[-2:]
        padded = F.pad(images, (half // 2, half, half // 2, half), mode="replicate")
        moved = [self(padded[..., y : y + height, x : x + width]) for y in (0, half) for x in (0, half)]
        rows = [torch.stack(pair, -1).flatten(-2) for pair in (moved[:2], moved[2:])]
        return torch.stack(rows, -2).flatten(-3, -2)


@register({"hybrid_clip": {}})
class HybridClip(Clip):
    """Embeds images and texts into one space.

    Args:
        vision, text: shapes of the two transformers, as of `stillhouse:clip`; of the vision no `patch`, but `stem`: a
            mapping of `model` (of timm), `checkpoint` (a file with its weights), `stride` (of the maps that are its
            patches), `mean` and `std` of its images, and
            `frozen` (default: where there are weights).
        dim: of the embedding.
        vocabulary, context: of the texts.
        normalised: mean and standard deviation per channel of the images that it is given.
        num_classes: not read: it has no classes.
        input_shape: (C, H, W).
    """

    def __init__(
        self,
        vision: Mapping[str, Any],
        text: Mapping[str, Any],
        dim: int = 128,
        vocabulary: int = 49408,
        context: int = 77,
        normalised: tuple[Sequence[float], Sequence[float]] = ((), ()),
        num_classes: int | None = None,
        input_shape: tuple[int, ...] = (3, 64, 64),
    ) -> None:
        stem = dict(vision.get("stem") or {})
        known = {"model", "checkpoint", "stride", "mean", "std", "frozen"}
        if "model" not in stem or set(stem) - known:
            raise UserError(
                f"options.vision.stem needs model, and may have {', '.join(sorted(known - {'model'}))}; given: "
                f"{', '.join(stem) or 'nothing'}."
            )
        stride = int(stem.get("stride", 16))
        super().__init__(
            {**{k: v for k, v in vision.items() if k != "stem"}, "patch": stride},
            text,
            dim,
            vocabulary,
            context,
            input_shape=input_shape,
        )
        weights = stem.get("checkpoint")
        path = weights.get("path") if isinstance(weights, Mapping) else weights
        given = (tuple(normalised[0]), tuple(normalised[1]))
        own = (tuple(stem.get("mean") or given[0]), tuple(stem.get("std") or given[1]))
        name = str(stem["model"]).removeprefix("timm:")
        width = self.image.encoder.shape.width
        stem_patches = StemPatches(
            name, path, stride, width, given, own, input_shape[0], bool(stem.get("frozen", path is not None))
        )
        self.image.patches = stem_patches  # type: ignore[assignment]

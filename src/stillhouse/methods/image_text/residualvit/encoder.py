"""The encoder of videos: key frames are read whole, the frames between them in part, with a token that says what the
key frame was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.functional.motion import block_motion, frame_difference
from stillhouse.functional.pictures import renormalise
from stillhouse.functional.token_merging import merge_tokens
from stillhouse.methods.image_text.residualvit.reduction import (
    Mode,
    centre_patches,
    kept_count,
    moving_patches,
    random_patches,
    square_grid,
    take,
    uniform_patches,
)
from stillhouse.models.clip import Clip
from stillhouse.nn.clip import ImageEncoder, Layer

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Reduction:
    """How frames between key frames are read.

    Attributes:
        mode: which patches are read (random, uniform, centre, exact_centre, motion, residual), or merge (similar tokens
            become one, in every layer) or resolution (a smaller image).
        drop: share of the patches that is not read.
        every: frames between two key frames.
        token: whether there is a residual token.
        layers: of what makes it.
        proportional: merge: whether attention counts what a token was made of.
    """

    mode: Mode = "motion"
    drop: float = 0.85
    every: int = 2
    token: bool = True
    layers: int = 1
    proportional: bool = True


def tokenizer(dim: int, width: int, layers: int = 1) -> nn.Sequential:
    """What makes the residual token (B, width) of a key frame's unit embedding (B, dim)."""
    rest = [part for _ in range(layers - 1) for part in (nn.ReLU(), nn.Linear(width, width))]
    return nn.Sequential(nn.Linear(dim, width), *rest)


class VideoEncoder(nn.Module):
    """A CLIP, which is not trained, and the map to the residual token, which is.

    Images are embedded as the CLIP does; `encode` embeds the frames of a video.

    Args:
        clip: the network.
        reduction: how frames between key frames are read.
        given, own: normalisation of the images that come, and of those that the CLIP was trained on.
    """

    def __init__(
        self,
        clip: Clip,
        reduction: Reduction | None = None,
        given: Normalisation = ((), ()),
        own: Normalisation = ((), ()),
    ) -> None:
        super().__init__()
        self._given, self._own = given, own
        self.clip, self.reduction = clip.requires_grad_(False), reduction or Reduction()
        image = clip.image
        self.residual = tokenizer(image.projection.out_features, image.encoder.shape.width, self.reduction.layers)

    def train(self, mode: bool = True) -> VideoEncoder:
        """As `nn.Module.train`; the CLIP stays in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        return self

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.clip.logit_scale

    @property
    def patch(self) -> int:
        """Pixels of a patch a side."""
        return int(self.clip.image.patches.kernel_size[0])

    @property
    def patches(self) -> int:
        """How many an image has."""
        return len(self.clip.image.positions) - 1

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, D) of whole images."""
        return self.clip.get_image_features(renormalise(pixel_values, self._given, self._own))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.clip.get_text_features(input_ids, attention_mask)

    def forward(self, images: Tensor) -> Tensor:
        return self.get_image_features(images)

    # ---- frames between key frames -----------------------------------------------------------------------------------

    def partial(self, frames: Tensor, key: Tensor | None, kept: Tensor | None = None) -> Tensor:
        """(B, D) of partly read frames (B, C, H, W), not normalised.

        Args:
            key: unit embeddings of their key frames (B, D); None: no residual token.
            kept: (B, K) or (K,) the patches that are read; None: by merging, or of a smaller image.
        """
        image, reduction = self.clip.image, self.reduction
        frames = renormalise(frames, self._given, self._own)
        tokens = self._smaller(frames) if reduction.mode == "resolution" else embedded(image, frames)
        if kept is not None:
            tokens = take(tokens, kept)
        first = 1
        if key is not None:
            tokens = torch.cat([tokens[:, :1], self.residual(key)[:, None], tokens[:, 1:]], 1)
            first = 2
        x = image.norm_before(tokens)
        x = self._merged(x, first) if reduction.mode == "merge" else image.encoder(x)
        found: Tensor = image.projection(image.norm_after(x[:, 0]))
        return found

    def _smaller(self, frames: Tensor) -> Tensor:
        """Tokens of a smaller image with about (1 - drop) of the patches; the positions are those of the whole,
        interpolated."""
        image = self.clip.image
        side = square_grid(self.patches)
        small = max(1, round(side * (1 - self.reduction.drop) ** 0.5))
        resized = F.interpolate(frames, size=(small * self.patch,) * 2, mode="bilinear", antialias=True)
        x = image.patches(resized).flatten(2).transpose(1, 2)
        grid = image.positions[1:].T.reshape(1, -1, side, side)
        places = F.interpolate(grid, size=(small, small), mode="bicubic", antialias=True)[0].flatten(1).T
        x = torch.cat([image.first.expand(len(x), 1, -1), x], 1)
        return x + torch.cat([image.positions[:1], places])

    def _merged(self, x: Tensor, protected: int) -> Tensor:
        """All layers, each of which merges tokens, so that about (1 - drop) of the patches are left after the last."""
        layers = self.clip.image.encoder.layers
        gone = self.patches - kept_count(self.patches, self.reduction.drop)
        size: Tensor | None = None
        for i, layer in enumerate(layers):
            assert isinstance(layer, Layer)
            bias = size.log().transpose(1, 2)[:, None] if size is not None and self.reduction.proportional else None
            mixed, metric = attended(layer, x, bias)
            x, size = merge_tokens(
                x + mixed, metric, gone * (i + 1) // len(layers) - gone * i // len(layers), size, protected
            )
            x = x + layer.fc2(layer._act(layer.fc1(layer.norm2(x))))
        return x

    def kept(self, frames: Tensor, before: Tensor | None, change: Tensor | None, noise: Tensor | None) -> Tensor | None:
        """The patches that are read of frames (B, C, H, W), by the mode, as at inference; None where it drops none.

        Args:
            before: the frame before each, for motion and residual where `change` is not given.
            change: (B, H, W) motion of each pixel, as a codec knows it, or its difference from the frame before.
            noise: (B, P) of random, and what breaks ties of motion.
        """
        mode, count = self.reduction.mode, kept_count(self.patches, self.reduction.drop)
        if mode in ("merge", "resolution"):
            return None
        if mode == "uniform":
            return uniform_patches(self.patches, count).to(frames.device)
        if mode in ("centre", "exact_centre"):
            return centre_patches(square_grid(self.patches), count, mode == "exact_centre").to(frames.device)
        if mode == "random":
            assert noise is not None
            return random_patches(noise, count)
        if change is None:
            if before is None:
                raise UserError(f"residualvit: mode {mode} needs the frames before, or the change of each pixel.")
            change = block_motion(frames, before, self.patch) if mode == "motion" else frame_difference(frames, before)
        if change.shape[-2:] != frames.shape[-2:]:
            raise UserError(
                f"residualvit: the change has {tuple(change.shape[-2:])} pixels, but frames have "
                f"{tuple(frames.shape[-2:])}."
            )
        return moving_patches(change, self.patch, count, None if noise is None or mode == "residual" else 1e-6 * noise)

    # ---- a video -----------------------------------------------------------------------------------------------------

    def key_frames(self, frames: Tensor, cut: float | None = None) -> list[int]:
        """For each frame of a video (T, C, H, W) the number of its key frame: every (every + 1)-th, and with `cut` each
        whose mean absolute difference from the frame before is above it, from which it is counted anew."""
        jumps = [False] * len(frames)
        if cut is not None and len(frames) > 1:
            jumps[1:] = ((frames[1:] - frames[:-1]).abs().flatten(1).mean(1) > cut).tolist()
        found, last = [], 0
        for i, jump in enumerate(jumps):
            if jump or i - last > self.reduction.every:
                last = i
            found.append(last)
        return found

    @torch.no_grad()
    def encode(
        self,
        frames: Tensor,
        cut: float | None = None,
        change: Tensor | None = None,
        generator: torch.Generator | None = None,
        chunk: int = 64,
    ) -> tuple[Tensor, list[int]]:
        """Unit embeddings (T, D) of the frames of a video (T, C, H, W), and the key frame of each.

        Args:
            cut: see `key_frames`.
            change: (T, H, W), see `kept`.
            generator: of what is drawn.
            chunk: frames that are read together.
        """
        keys = self.key_frames(frames, cut)
        out = frames.new_zeros(len(frames), self.clip.image.projection.out_features)
        whole = [i for i, k in enumerate(keys) if i == k]
        rest = [i for i, k in enumerate(keys) if i != k]
        for at in range(0, len(whole), chunk):
            some = whole[at : at + chunk]
            out[some] = F.normalize(self.get_image_features(frames[some]), dim=-1)
        for at in range(0, len(rest), chunk):
            some = rest[at : at + chunk]
            noise = torch.randn(len(some), self.patches, generator=generator).to(frames.device)
            their = None if change is None else change[some]
            kept = self.kept(frames[some], frames[[i - 1 for i in some]], their, noise)
            key = out[[keys[i] for i in some]] if self.reduction.token else None
            out[some] = F.normalize(self.partial(frames[some], key, kept), dim=-1)
        return out, keys


def embedded(image: ImageEncoder, frames: Tensor) -> Tensor:
    """(B, 1 + P, W): the class token and the patches of images, with their positions."""
    x = image.patches(frames).flatten(2).transpose(1, 2)
    return torch.cat([image.first.expand(len(x), 1, -1), x], 1) + image.positions


def attended(layer: Layer, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a layer's attention gives (B, L, W), with a bias (B, 1, 1, L) of the keys; and the mean of its keys over the
    heads, (B, L, head_dim)."""
    attention, norm = layer.attention, layer.norm1(x)
    parts: list[Any] = [attention.query, attention.key, attention.value]
    q, k, v = (f(norm).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for f in parts)
    mixed = F.scaled_dot_product_attention(q, k, v, bias)
    found: Tensor = attention.out(mixed.transpose(1, 2).flatten(2))
    return found, k.mean(1)

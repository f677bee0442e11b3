"""`stillhouse:dit`: a diffusion transformer of images or clips, with a class as its condition (arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.models.registry import register
from stillhouse.nn.dit import DiTBlock, SelfAttention, grid_positions, modulated, step_embedding

ANGLES = 256  # numbers of a step's embedding, before its perceptron


@register({"dit": {}})
class DiT(nn.Module):
    """Patches as tokens, blocks conditioned on the step and the class, and a patch of output for each token.

    A clip's frames are channels of its input: (B, frames * C, H, W), frame by frame. The class `num_classes` is none:
    the unconditional one. The output begins at 0.

    Args:
        width, depth, heads: of the tokens, and how many blocks and attention heads.
        patch: pixels of a token's side.
        frames: of a clip; 1 for images.
        tube: frames of a token.
        ratio: width of the perceptrons over that of the tokens.
        num_classes: C.
        input_shape: (frames * channels, height, width).

    Raises:
        UserError: patches, tubes or heads that do not divide.
    """

    def __init__(
        self,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        patch: int = 2,
        frames: int = 1,
        tube: int = 1,
        ratio: float = 4.0,
        num_classes: int = 10,
        input_shape: tuple[int, ...] = (3, 32, 32),
    ) -> None:
        super().__init__()
        channels, height, breadth = input_shape
        for name, part, whole in (
            ("patch", patch, height),
            ("patch", patch, breadth),
            ("frames", frames, channels),
            ("tube", tube, frames),
        ):
            if part < 1 or whole % part:
                raise UserError(
                    f"A DiT for inputs {tuple(input_shape)}: options.{name} {part} does not divide {whole}."
                )
        self.num_classes, self.patch, self.tube = num_classes, patch, tube
        self.frames, self.channels = frames, channels // frames
        self.grid = (frames // tube, height // patch, breadth // patch)
        numbers = self.channels * tube * patch**2
        self.enter = nn.Linear(numbers, width)
        self.register_buffer("positions", grid_positions(self.grid, width), persistent=False)
        self.step = nn.Sequential(nn.Linear(ANGLES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.label.weight, std=0.02)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, numbers)
        for layer in (self.modulation, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def attentions(self) -> Iterator[SelfAttention]:
        """The attention of each block."""
        for block in self.blocks:
            assert isinstance(block, DiTBlock)
            yield block.attention

    def mix_by(self, mix: nn.Module) -> None:
        """Replace what every attention does with queries, keys and values."""
        for attention in self.attentions:
            attention.mix = mix

    def tokens(self, x: Tensor) -> Tensor:
        """(B, frames * C, H, W) -> (B, L, C * tube * patch * patch), row by row of frame after frame."""
        f, h, w = self.grid
        x = x.view(len(x), f, self.tube, self.channels, h, self.patch, w, self.patch)
        return x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)

    def images(self, tokens: Tensor) -> Tensor:
        """The inverse of `tokens`."""
        f, h, w = self.grid
        x = tokens.view(len(tokens), f, h, w, self.channels, self.tube, self.patch, self.patch)
        return x.permute(0, 1, 5, 4, 2, 6, 3, 7).reshape(
            len(tokens), self.frames * self.channels, h * self.patch, w * self.patch
        )

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Noisy samples (B, frames * C, H, W) at steps (B,) with classes (B,) -> the denoiser's output, shaped as the
        samples."""
        condition = self.step(step_embedding(t, ANGLES)) + self.label(label)
        h = self.enter(self.tokens(x)) + self.positions
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(F.silu(condition)).chunk(2, -1)
        return self.images(self.leave(modulated(self.norm(h), shift, scale)))

    def unconditional(self, label: Tensor) -> Tensor:
        """Labels (B,) that say nothing."""
        return torch.full_like(label, self.num_classes)

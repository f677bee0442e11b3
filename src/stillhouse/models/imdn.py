"""IMDN and its relatives for super-resolution (Hui et al., ACM MM 2019, arXiv 1909.11856): `imdn`, `imdn_as` for images
that were enlarged first, and the small `imdn_rtc` and `imdn_rte` of the authors' challenge entries.

Inputs and outputs are images (B, 3, h, w) of values in [0, 1], neither normalised nor clamped. The published weights
load by their own names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.functional.tiling import any_size
from stillhouse.models.anatomy import quarters
from stillhouse.models.registry import register


def _counted_from_0(name: str) -> Callable[[Any], str]:
    """What replaces a number of the published names, which count from 1."""
    return lambda match: f"{name}.{int(match[1]) - 1}."


OF_A_BLOCK: dict[str, Any] = {
    r"\bc([1-4])\.": _counted_from_0("steps"),
    r"\bc5\.": "fuse.",
    r"\bcca\.": "attention.",
    r"\bconv_du\.0\.": "squeeze.",
    r"\bconv_du\.2\.": "excite.",
}
"""Published names in a block and in its attention, as regular expressions, and ours."""


OF_RTC: dict[str, Any] = {
    r"^model\.0\.": "entry.",
    r"^model\.1\.sub\.(\d+)\.c": r"blocks.\1.c",
    r"^model\.1\.sub\.\d+\.": "smooth.",
    r"^model\.2\.": "expand.",
    **OF_A_BLOCK,
}
OF_RTE: dict[str, Any] = {
    r"^fea_conv\.": "entry.",
    r"^block(\d+)\.": _counted_from_0("blocks"),
    r"\bc([1-6])\.": _counted_from_0("steps"),
    r"\bc7\.": "fuse.",
    r"^LR_conv\.": "smooth.",
    r"^upsampler\.0\.": "expand.",
}


class ContrastAttention(nn.Module):
    """Contrast-aware channel attention (CCA, section 3.3): channels are weighed by the sum of their mean and their
    standard deviation over the image.

    The gradient of a constant channel's deviation, which is infinite, is taken as 0.
    """

    published_names: ClassVar[dict[str, Any]] = OF_A_BLOCK

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        inner = max(channels // reduction, 1)
        self.squeeze = nn.Conv2d(channels, inner, 1)
        self.excite = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        mean = x.mean((2, 3), keepdim=True)
        deviation = torch.linalg.vector_norm(x - mean, dim=(2, 3), keepdim=True) / math.sqrt(x.shape[2] * x.shape[3])
        return x * self.excite(self.squeeze(mean + deviation).relu()).sigmoid()


class DistillationBlock(nn.Module):
    """Information multi-distillation block (IMDB, section 3.2): after each convolution the first channels are done, the
    others are refined further; all that is done is weighed, fused and added to the input.

    Args:
        width: C, channels of input and output.
        done: channels that each step sets aside.
        steps: (inputs, outputs) of each convolution; the last one's outputs are all set aside.
        attention: weighs what was set aside; None: nothing does.
        activation: after each convolution but the last.
        last_active: after the last one too.
        bias: of the convolutions.
    """

    published_names: ClassVar[dict[str, Any]] = OF_A_BLOCK

    def __init__(
        self,
        width: int,
        done: int,
        steps: Sequence[tuple[int, int]],
        attention: nn.Module | None,
        activation: nn.Module,
        last_active: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.done = done
        self.steps = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=bias) for a, b in steps)
        self.activation = activation
        self.last_active = last_active
        self.attention = attention or nn.Identity()
        self.fuse = nn.Conv2d(done * len(steps), width, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        finished, rest = [], x
        for step in self.steps[:-1]:
            refined = self.activation(step(rest))
            done, rest = refined.split((self.done, refined.shape[1] - self.done), 1)
            finished.append(done)
        last = self.steps[-1](rest)
        finished.append(self.activation(last) if self.last_active else last)
        out: Tensor = self.fuse(self.attention(torch.cat(finished, 1))) + x
        return out


class PlainBlock(nn.Module):
    """The ablation without splitting: four convolutions in a row, as narrow as makes as many parameters, then the same
    attention, fusion and residual."""

    def __init__(self, width: int, inner: int, attention: nn.Module | None, activation: nn.Module) -> None:
        super().__init__()
        widths = [width, inner, inner, inner, width]
        self.steps = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.activation = activation
        self.attention = attention or nn.Identity()
        self.fuse = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        inner = x
        for step in self.steps[:-1]:
            inner = self.activation(step(inner))
        out: Tensor = self.fuse(self.attention(self.steps[-1](inner))) + x
        return out


def three_quarter_steps(width: int, done: int) -> list[tuple[int, int]]:
    """The convolutions of an IMDB: three widen what is left to C channels, the fourth ends in `done` of them."""
    rest = width - done
    return [(width, width), (rest, width), (rest, width), (rest, done)]


def six_steps(width: int, done: int) -> list[tuple[int, int]]:
    """The convolutions of an IMDN_RTE block, which from the fourth on do not widen what is left."""
    rest = width - done
    return [
        (width, width),
        (rest, width),
        (rest, width),
        (rest, rest),
        (rest - done, rest - done),
        (done, done),
    ]


def plain_width(width: int, steps: Sequence[tuple[int, int]]) -> int:
    """The inner width of a `PlainBlock` whose convolutions have most nearly as many weights as `steps`."""
    wanted = sum(a * b for a, b in steps)
    return min(range(1, 2 * width), key=lambda inner: abs(2 * width * inner + 2 * inner * inner - wanted))


class UpscalingNet(nn.Module):
    """Convolutions, then a rearrangement of channels into pixels; images whose sides are no multiple of the network's
    own stride go through it in four crops (`stillhouse.functional.tiling`).

    Attributes:
        scale: by how much the output is larger than the input.
        stride: between the input and the maps inside.
    """

    scale: int
    stride: int = 1

    def inner(self, x: Tensor) -> Tensor:
        """The network on images whose sides are multiples of the stride."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, 3, h * scale, w * scale), any h and w."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise UserError(f"This network restores images (B, 3, h, w) in colour; given: {tuple(x.shape)}.")
        if self.stride == 1:
            return self.inner(x)
        return any_size(self.inner, x, multiple=self.stride, scale=self.scale)


@register({"imdn": {"enlarged": False}, "imdn_as": {"enlarged": True, "scale": 1}})
class IMDN(UpscalingNet):
    """Information multi-distillation network; with `enlarged`, IMDN_AS, whose maps have a quarter of the input's size.

    Args:
        scale: 2, 3, 4, …; `imdn_as` gives images of the input's size.
        width: C, channels of the maps (nf).
        blocks: how many IMDBs.
        rate: share of the channels that is set aside after each convolution.
        attention: contrast-aware channel attention in each block.
        splitting: set channels aside; else each block is four plain convolutions with as many parameters.
        reduction: of the channels inside the attention.
        slope: of the leaky ReLUs.

    Raises:
        UserError: a rate that leaves no channels on either side, or a scale or number of blocks below 1.
    """

    published_names: ClassVar[dict[str, Any]] = {
        r"^IMDB(\d+)\.": _counted_from_0("blocks"),
        r"^fea_conv\.": "entry.",
        r"^c\.0\.": "collect.",
        r"^LR_conv\.": "smooth.",
        r"^upsampler\.0\.": "expand.",
        **OF_A_BLOCK,
    }

    def __init__(
        self,
        scale: int = 2,
        width: int = 64,
        blocks: int = 6,
        rate: float = 0.25,
        attention: bool = True,
        splitting: bool = True,
        reduction: int = 16,
        slope: float = 0.05,
        enlarged: bool = False,
    ) -> None:
        super().__init__()
        done = int(width * rate)
        if not 0 < done < width:
            raise UserError(f"options.rate: {rate} of {width} channels leaves {done} set aside; choose another share.")
        if scale < 1 or blocks < 1:
            raise UserError(f"options: scale and blocks must be at least 1; given: {scale} and {blocks}.")
        self.scale, self.stride = scale, 4 if enlarged else 1
        self.activation = nn.LeakyReLU(slope, inplace=True)
        steps = three_quarter_steps(width, done)

        def block() -> nn.Module:
            weighed = done * len(steps) if splitting else width
            weights = ContrastAttention(weighed, reduction) if attention else None
            if splitting:
                return DistillationBlock(width, done, steps, weights, self.activation)
            return PlainBlock(width, plain_width(width, steps), weights, self.activation)

        if enlarged:
            halve = [nn.Conv2d(a, width, 3, stride=2, padding=1) for a in (3, width)]
            self.entry: nn.Module = nn.Sequential(halve[0], nn.LeakyReLU(slope), halve[1])
        else:
            self.entry = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(block() for _ in range(blocks))
        self.collect = nn.Conv2d(blocks * width, width, 1)
        self.smooth = nn.Conv2d(width, width, 3, padding=1)
        self.expand = nn.Conv2d(width, 3 * (scale * self.stride) ** 2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale * self.stride)
        self.stage_names = [f"blocks.{i}" for i in quarters(blocks)]

    def inner(self, x: Tensor) -> Tensor:
        entered = h = self.entry(x)
        outputs = []
        for block in self.blocks:
            h = block(h)
            outputs.append(h)
        gathered = self.activation(self.collect(torch.cat(outputs, 1)))
        out: Tensor = self.shuffle(self.expand(self.smooth(gathered) + entered))
        return out


@register({"imdn_rtc": {"form": "rtc", "scale": 2}, "imdn_rte": {"form": "rte", "scale": 2}})
class SmallIMDN(UpscalingNet):
    """The two small networks of the authors' challenge entries, of scale 2: blocks in a row, without attention and
    without gathering their outputs.

    `rtc`: blocks of four convolutions, width 12. `rte`: a strided entrance, blocks of six convolutions without bias,
    ReLU, width 20.

    Args:
        width: channels of the maps; None: 12 and 20.
        blocks: how many; None: 5 and 6.

    Raises:
        UserError: a width that 4 does not divide.
    """

    def __init__(self, width: int | None = None, blocks: int | None = None, scale: int = 2, form: str = "rtc") -> None:
        super().__init__()
        large = form == "rte"
        width, blocks = width or (20 if large else 12), blocks or (6 if large else 5)
        if width % 4:
            raise UserError(f"options.width: must be a multiple of 4; given: {width}.")
        done = width // 4
        self.scale, self.stride = scale, 2 if large else 1
        steps = (six_steps if large else three_quarter_steps)(width, done)
        activation: nn.Module = nn.ReLU(inplace=True) if large else nn.LeakyReLU(0.05, inplace=True)
        self.published_names = OF_RTE if large else OF_RTC
        if large:
            halve = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
            self.entry: nn.Module = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), halve)
        else:
            self.entry = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(
            *(DistillationBlock(width, done, steps, None, activation, large, bias=not large) for _ in range(blocks))
        )
        self.smooth = nn.Conv2d(width, width, 1, bias=not large)
        self.expand = nn.Conv2d(width, 3 * (scale * self.stride) ** 2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale * self.stride)
        self.stage_names = [f"blocks.{i}" for i in quarters(blocks)]

    def inner(self, x: Tensor) -> Tensor:
        entered = self.entry(x)
        out: Tensor = self.shuffle(self.expand(self.smooth(self.blocks(entered)) + entered))
        return out

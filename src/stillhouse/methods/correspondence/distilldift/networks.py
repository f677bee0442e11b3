"""The teachers, a denoising U-Net and a network by name; and the student's patch features."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import ModelSpec, Spec
from stillhouse.errors import UserError
from stillhouse.functional.feature_maps import as_map
from stillhouse.functional.pictures import normalise
from stillhouse.models import build
from stillhouse.models.anatomy import stages
from stillhouse.nn.denoisers import edm_denoised, edm_loss, edm_sigma
from stillhouse.signals import Taps

Features = Callable[[Tensor], Tensor]
"""uint8 images (B, 3, S, S) -> features (B, C, h, w)."""


class GeometrySpec(Spec):
    """The first teacher: a denoising U-Net, which is trained on the views."""

    side: int = Field(48, ge=16, multiple_of=8, description="Pixels a side of what it denoises.")
    width: int = Field(24, ge=8, multiple_of=8, description="Channels at the full size; 2 and 3 times as many below.")
    levels: list[float] = Field([0.1, 0.25, 0.5], min_length=1, description="Noise levels whose features are averaged.")
    draws: int = Field(2, ge=1, description="Draws of noise a level.")
    steps: int = Field(250, ge=1)
    batch_size: int = Field(16, ge=1)
    lr: float = Field(2e-3, gt=0, description="Of AdamW.")


class SemanticsSpec(Spec):
    """The second teacher: a network by name; without one, the student as it begins."""

    network: ModelSpec | None = None
    tap: str = Field("stage:3", description="A submodule, or stage:N; its output is the feature.")
    side: int | None = Field(None, ge=8, description="Pixels a side of its input; default: the views'.")
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


class Residual(nn.Module):
    """Two convolutions with norms, the level added in between, and the input."""

    def __init__(self, inputs: int, outputs: int, level: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.level = nn.Linear(level, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.level(level)[..., None, None]
        out: Tensor = self.skip(x) + self.conv2(F.silu(self.norm2(h)))
        return out


class DenoisingUNet(nn.Module):
    """A U-Net of three sizes, S / 2, S / 4 and S / 8, whose features are those of its decoder at S / 4.

    Args:
        width: channels; 2 and 3 times as many at the smaller sizes.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        w, level = width, 2 * width
        self.embed = nn.Sequential(nn.Linear(16, level), nn.SiLU(), nn.Linear(level, level), nn.SiLU())
        self.enter = nn.Conv2d(3, w, 4, 2, padding=1)
        self.down = nn.ModuleList([Residual(w, w, level), Residual(2 * w, 2 * w, level), Residual(3 * w, 3 * w, level)])
        self.shrink = nn.ModuleList([nn.Conv2d(w, 2 * w, 2, 2), nn.Conv2d(2 * w, 3 * w, 2, 2)])
        self.up = nn.ModuleList([Residual(5 * w, 2 * w, level), Residual(3 * w, w, level)])
        self.leave = nn.Sequential(nn.GroupNorm(8, w), nn.SiLU(), nn.Conv2d(w, 12, 3, padding=1), nn.PixelShuffle(2))

    def both(self, z: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """The raw output (B, 3, S, S), and the features (B, 2 width, S / 4, S / 4)."""
        angles = level[:, None] * torch.exp(torch.linspace(0, 4, 8, device=z.device))
        c = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        one = self.down[0](self.enter(z), c)
        two = self.down[1](self.shrink[0](one), c)
        three = self.down[2](self.shrink[1](two), c)
        decoded = self.up[0](torch.cat([F.interpolate(three, scale_factor=2), two], 1), c)
        last = self.up[1](torch.cat([F.interpolate(decoded, scale_factor=2), one], 1), c)
        return self.leave(last), decoded

    def loss(self, x: Tensor) -> Tensor:
        """EDM's training loss of images (B, 3, S, S) in [-1, 1], a mean over entries; draws from torch's generator."""
        sigma = edm_sigma(torch.randn(len(x), device=x.device))
        noisy = x + sigma[:, None, None, None] * torch.randn_like(x)
        denoised = edm_denoised(lambda z, level: self.both(z, level)[0], noisy, sigma)
        return edm_loss(denoised, x, sigma) / x[0].numel()

    @torch.no_grad()
    def features(self, x: Tensor, spec: GeometrySpec, noise: Tensor) -> Tensor:
        """(B, 2 width, S / 4, S / 4), the mean over levels and draws of the decoder's features of noised images."""
        found = []
        for sigma in spec.levels:
            scale = math.sqrt(sigma**2 + 0.25)
            level = torch.full((len(x),), math.log(sigma) / 4, device=x.device)
            found += [self.both((x + sigma * n) / scale, level)[1] for n in noise]
        return torch.stack(found).mean(0)


def in_range(images: Tensor, side: int) -> Tensor:
    """uint8 images in [-1, 1], resized to (side, side)."""
    x = images.float() / 127.5 - 1
    same = x.shape[-2:] == (side, side)
    return x if same else F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)


class TappedNetwork:
    """A frozen network by name, whose feature is the output of one of its modules."""

    def __init__(self, spec: SemanticsSpec, network: nn.Module, side: int) -> None:
        self.spec, self.network, self.side = spec, network.eval().requires_grad_(False), spec.side or side
        found = stages(network) if spec.tap.startswith("stage:") else []
        number = int(spec.tap.removeprefix("stage:")) if found else 0
        if found and not 1 <= number <= len(found):
            raise UserError(f"semantics.tap: the network has the stages 1 to {len(found)}; given: {spec.tap}.")
        self.tap = found[number - 1] if found else spec.tap
        self.taps = Taps(network, [self.tap], "semantics network")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = images.float() / 255
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        with self.taps.capture() as found:
            self.network(normalise(x, self.spec.mean, self.spec.std))
        return as_map(found[self.tap], (self.side, self.side))


class StemSpec(Spec):
    """The first blocks of a convolutional network as the student's patches."""

    network: ModelSpec = Field(description="A network of timm with conv_stem, bn1 and blocks, such as an EfficientNet.")
    blocks: int = Field(3, ge=1, description="Blocks that are taken.")


class Stem(nn.Module):
    """The first blocks of a network, and a layer to the transformer's width: (B, 3, S, S) to tokens (B, L, D)."""

    def __init__(self, spec: StemSpec, side: int, width: int) -> None:
        super().__init__()
        network = build(spec.network, None, (3, side, side))
        parts = [getattr(network, name, None) for name in ("conv_stem", "bn1", "blocks")]
        if not all(isinstance(part, nn.Module) for part in parts) or not isinstance(parts[2], nn.Sequential):
            raise UserError(f"student.stem.network '{spec.network.model}' has no conv_stem, bn1 and blocks.")
        self.layers = nn.Sequential(parts[0], parts[1], *parts[2][: spec.blocks])  # type: ignore[arg-type]
        with torch.no_grad():
            channels = self.layers.eval()(torch.zeros(1, 3, side, side)).shape[1]
        self.leave = nn.Linear(channels, width)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.leave(self.layers(images).flatten(2).transpose(1, 2))
        return out

    def train(self, mode: bool = True) -> Stem:
        """Statistics of its norms stay as they are: the batches of pairs are small."""
        super().train(mode)
        self.layers.eval()
        return self


class PatchNetwork(nn.Module):
    """A vision transformer as the student: patch features after its last norm.

    Args:
        spec: of the network; `norm` is its last norm.
        side: pixels a side of its images.
        stem: instead of its layer of patches; on a grid of the same size.
        mean, std: by which it sees images in [0, 1].
    """

    def __init__(
        self,
        spec: ModelSpec,
        side: int,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.25, 0.25, 0.25),
        stem: StemSpec | None = None,
    ) -> None:
        super().__init__()
        self.network = build(spec, 1, (3, side, side))
        if stem is not None:
            self._replace_patches(stem, side)
        if not isinstance(getattr(self.network, "norm", None), nn.Module):
            raise UserError(f"student.model '{spec.model}' has no last norm `norm`; take a vision transformer.")
        self.side, self.mean, self.std = side, mean, std

    def _replace_patches(self, stem: StemSpec, side: int) -> None:
        patches = self.network.patch_embed
        assert isinstance(patches, nn.Module)
        with torch.no_grad():
            before = patches(torch.zeros(1, 3, side, side)).shape
            made = Stem(stem, side, before[-1])
            after = made(torch.zeros(1, 3, side, side)).shape
        if before != after:
            raise UserError(
                f"student.stem gives {after[1]} patches, where the network has {before[1]}; change stem.blocks or the "
                "network's patch."
            )
        self.network.patch_embed = made

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images, or floats in [0, 1], (B, 3, S, S) -> features (B, C, H, W)."""
        if images.shape[-2:] != (self.side, self.side):
            images = images.float() / (255 if images.dtype == torch.uint8 else 1)
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True)
        found: list[Tensor] = []
        norm = self.network.norm
        assert isinstance(norm, nn.Module)
        handle = norm.register_forward_hook(lambda module, given, out: found.append(out))
        try:
            self.network(normalise(images, self.mean, self.std))
        finally:
            handle.remove()
        return as_map(found[0], (self.side, self.side))


def view_invariance(network: PatchNetwork, head: nn.Module, images: Tensor, patch: int, tau: float = 0.1) -> Tensor:
    """A self-supervised loss of patches: two views of each image, in other colours and moved by whole patches, whose
    common patches must find each other among all of the batch (InfoNCE). Draws from torch's generator."""
    x = images.float() / 255
    grid = network.side // patch
    most = max(1, grid // 4)
    shift = torch.randint(-most, most + 1, (2, len(x)), device=x.device)
    rows = torch.arange(grid, device=x.device)
    place = [(rows + s[:, None]) % grid for s in shift]  # where the moved view's patches come from
    pixels = [
        (p[:, :, None] * patch + torch.arange(patch, device=x.device)).flatten(1).clamp(max=network.side - 1)
        for p in place
    ]
    every = torch.arange(len(x), device=x.device)
    moved = x.permute(0, 2, 3, 1)[every[:, None, None], pixels[0][:, :, None], pixels[1][:, None, :]].permute(
        0, 3, 1, 2
    )
    one, two = head(network(_recoloured(x)).permute(0, 2, 3, 1)), head(network(_recoloured(moved)).permute(0, 2, 3, 1))
    same = one[every[:, None, None], place[0][:, :, None], place[1][:, None, :]]
    chosen = torch.randint(len(x) * grid * grid, (min(512, len(x) * grid * grid),), device=x.device)
    a, b = (F.normalize(f.flatten(0, 2)[chosen], dim=-1) for f in (same, two))
    own = torch.arange(len(a), device=x.device)
    scores = a @ b.T / tau
    again = (chosen[:, None] == chosen) & (own[:, None] != own)
    scores = scores.masked_fill(again, -torch.inf)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def _recoloured(x: Tensor) -> Tensor:
    """Images in [0, 1] with each channel scaled and moved, and with noise."""
    scale = 0.6 + 0.8 * torch.rand(len(x), 3, 1, 1, device=x.device)
    move = 0.4 * torch.rand(len(x), 3, 1, 1, device=x.device) - 0.2
    return (x * scale + move + 0.03 * torch.randn_like(x)).clamp(0, 1)

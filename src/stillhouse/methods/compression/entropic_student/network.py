"""A network cut in two: its first part replaced by an encoder, the coder of its latents, and a decoder; and the input
coded as JPEG, which needs no cut."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stillhouse.config.specs import Spec
from stillhouse.errors import UserError, nearest
from stillhouse.functional.pictures import normalise, unnormalise
from stillhouse.methods.compression.entropic_student.coding import FixedCoder, RangeCoder, scan_bytes
from stillhouse.methods.compression.entropic_student.layers import decoder, encoder
from stillhouse.methods.compression.entropic_student.prior import FactorisedPrior, Tables
from stillhouse.signals import Batch, evaluating, first_tensor
from stillhouse.tasks.base import Task

STRIDES = (1, 2, 4)


# ---- codes of latents ------------------------------------------------------------------------------------------------


class Grid(nn.Module):
    """Latents as whole steps from an origin.

    Args:
        low: the origin, (1, C, 1, 1) or one number.
        step: the step.
        top: the last step; symbols are clamped to 0 … top; None: they are not.
    """

    low: Tensor
    step: Tensor

    def __init__(self, low: Tensor, step: Tensor, top: int | None) -> None:
        super().__init__()
        self.register_buffer("low", low.detach().clone())
        self.register_buffer("step", step.detach().clone())
        self.top = top

    def symbols(self, latent: Tensor) -> Tensor:
        """The nearest steps, real numbers."""
        steps = ((latent - self.low) / self.step).round()
        return steps if self.top is None else steps.clamp(0, self.top)

    def values(self, symbols: Tensor) -> Tensor:
        """The latents that symbols stand for."""
        return self.low + symbols * self.step


class LearnedCode(nn.Module):
    """Latents as integers around their medians, under a learned prior.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.prior = FactorisedPrior(channels)
        self.tables: Tables | None = None

    def relaxed(self, latent: Tensor) -> Tensor:
        """y + u, u uniform in [-1/2, 1/2)."""
        return latent + torch.rand_like(latent) - 0.5

    def symbols(self, latent: Tensor) -> Tensor:
        """round(y - median), real numbers."""
        return (latent - self.prior.medians).round()

    def values(self, symbols: Tensor) -> Tensor:
        """The latents that symbols stand for."""
        return symbols + self.prior.medians

    def grid(self) -> Grid:
        """The same rounding without the prior."""
        return Grid(self.prior.medians, torch.ones(()), None)

    def bits(self, latent: Tensor) -> Tensor:
        """(B,) ideal bits of quantised or relaxed latents."""
        bits: Tensor = self.prior(latent)
        return bits

    def settle(self, latents: Tensor) -> None:
        """Make the tables, after the prior was trained."""
        self.tables = self.prior.tables()

    def coder(self) -> RangeCoder:
        """Raises `UserError` before the tables were made."""
        if self.tables is None:
            raise UserError("The prior has no tables yet, so nothing can be coded; call settle() after its training.")
        return RangeCoder(self.tables)

    def extra_tensors(self) -> dict[str, Tensor]:
        """What coding needs besides the weights."""
        assert self.tables is not None
        names = ("cumulative", "lengths", "offsets")
        return {name: torch.from_numpy(getattr(self.tables, name)) for name in names}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take what `extra_tensors` gave."""
        self.tables = Tables(*(tensors[name].numpy() for name in ("cumulative", "lengths", "offsets")))


class FixedCode(nn.Module):
    """Latents between the least and the largest of the training data, in even steps; the baseline.

    Args:
        bits: of each latent number.
    """

    low: Tensor
    step: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.width = bits
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("step", torch.ones(()))

    def relaxed(self, latent: Tensor) -> Tensor:
        """The latents as they are."""
        return latent

    def symbols(self, latent: Tensor) -> Tensor:
        """The nearest steps, real numbers from 0 to 2^bits - 1."""
        return ((latent - self.low) / self.step).round().clamp(0, 2**self.width - 1)

    def values(self, symbols: Tensor) -> Tensor:
        """The latents that symbols stand for."""
        return self.low + symbols * self.step

    def grid(self) -> Grid:
        """The same rounding, for a deployed half."""
        return Grid(self.low, self.step, 2**self.width - 1)

    def bits(self, latent: Tensor) -> Tensor:
        """(B,) as many for every sample."""
        return latent.new_full((len(latent),), float(self.width * latent[0].numel()))

    def settle(self, latents: Tensor) -> None:
        """Take the range of latents of training data."""
        low, high = latents.min(), latents.max()
        self.low.copy_(low)
        self.step.copy_((high - low).clamp_min(1e-12) / (2**self.width - 1))

    def coder(self) -> FixedCoder:
        return FixedCoder(self.width)

    def extra_tensors(self) -> dict[str, Tensor]:
        """Nothing besides the weights."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Nothing to take."""


class Bottleneck(nn.Module):
    """Images to latents, to what is left of them after coding, to features; stands where the teacher's first part
    ended.

    Args:
        encoder, code, decoder: the three.

    Attributes:
        coding: latents are rounded as a string would hold them, and no gradient reaches the encoder.
        rated: the bits are computed too, for whoever taps `code.prior`.
    """

    def __init__(self, encoder: nn.Module, code: LearnedCode | FixedCode, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.code, self.decoder = encoder, code, decoder
        self.coding = self.rated = False

    def forward(self, images: Tensor) -> Tensor:
        latent = self.encoder(images)
        if self.training and not self.coding:
            latent = self.code.relaxed(latent)
        else:
            latent = self.code.values(self.code.symbols(latent)).detach()
        if self.rated:
            self.code.bits(latent)
        features: Tensor = self.decoder(latent)
        return features

    def freeze(self) -> None:
        """Fix encoder and code, so that from now on latents are what strings hold."""
        self.coding, self.rated = True, False
        for part in (self.encoder, self.code):
            part.requires_grad_(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[bytes]:
        """A string for each of the images (B, C, H, W), normalised as the network takes them.

        Raises:
            UserError: a latent that is not finite.
        """
        latent = self.encoder(images)
        if not bool(latent.isfinite().all()):
            raise UserError("A latent is not finite, so it cannot be coded; are the images finite?")
        coder = self.code.coder()
        return [coder.encode(s) for s in self.code.symbols(latent).to("cpu", torch.int64).numpy()]

    @staticmethod
    def length(string: bytes) -> int:
        """Bytes that are sent."""
        return len(string)

    @torch.no_grad()
    def decode(self, strings: Sequence[bytes], shape: Sequence[int]) -> Tensor:
        """Latents (B, C, h, w) of strings.

        Args:
            shape: (C, h, w).
        """
        coder = self.code.coder()
        symbols = np.stack([coder.decode(s, shape) for s in strings])
        return self.code.values(torch.from_numpy(symbols).float().to(next(self.encoder.parameters()).device))


# ---- the cut ---------------------------------------------------------------------------------------------------------


class Split(Spec):
    """How a teacher was cut, by which a product's network is built again.

    `before` names the modules that run before the cut and become identities.
    """

    codec: Literal["learned", "quantised"]
    at: str
    before: list[str]
    images: int
    channels: int
    stride: int
    features: int
    bits: int = 8

    def applied(self, network: nn.Module) -> Bottleneck:
        """Put a new bottleneck into a network, in place."""
        code = LearnedCode(self.channels) if self.codec == "learned" else FixedCode(self.bits)
        parts = encoder(self.images, self.channels, self.stride), code, decoder(self.channels, self.features)
        bottleneck = Bottleneck(*parts).train(network.training)
        replace(network, self.at, self.before, bottleneck)
        return bottleneck


def replace(network: nn.Module, at: str, before: Sequence[str], module: nn.Module) -> None:
    """Put a module at the place `at` of a network, and identities for those before it; in place."""
    for name, new in [*((n, nn.Identity()) for n in before), (at, module)]:
        path, _, last = name.rpartition(".")
        setattr(network.get_submodule(path), last, new)


class _Given(nn.Module):
    """Gives features whatever it is given, which it remembers."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.features


@torch.no_grad()
def cut(network: nn.Module, at: str, task: Task, batch: Batch, channels: int, codec: str, bits: int = 8) -> Split:
    """How to cut a network at a module whose features the decoder is to give.

    What runs before the module must be a chain that starts at the image: then identities take its place, and the module
    is given the image itself. Both are tried out here on the batch.

    Args:
        network: stays as it is.
        at: the module's name.
        task: how the network is called.
        batch: a few samples.
        channels: C of the latents.
        codec: learned or quantised.
        bits: of quantised latents.

    Raises:
        UserError: no such module, one that cannot be replaced so, or features that are no map of a half or a quarter of
            the image.
    """
    modules = dict(network.named_modules())
    if at not in modules or not at:
        close = nearest(at, modules)
        raise UserError(
            f"split: the teacher has no module '{at}'" + (f"; nearest: {', '.join(close)}." if close else ".")
        )
    images = batch["input"]
    with evaluating(network):
        before, features = _run_up_to(network, at, task, batch)
        wanted = _outputs(network, task, batch)
        if features.ndim != 4:
            raise UserError(
                f"split: '{at}' gives {tuple(features.shape)}, not a map (B, C, h, w); name another module."
            )
        parts = at.split(".")
        inside = [".".join(parts[:n]) for n in range(len(parts))]  # what prepares all images, further out, may stay
        chains = [[n for n in before if n.startswith(f"{outer}." if outer else "")] for outer in inside]
        chain = next((c for c in chains if _carries(network, at, c, task, batch, features, wanted)), None)
    if chain is None:
        raise UserError(
            f"split: what runs before '{at}' is no chain of modules that starts at the image, so nothing can take its "
            "place; name an earlier or a later module, such as the first stage of a residual network."
        )
    stride = next((s for s in STRIDES if all(-(-n // s) == m for n, m in zip(images.shape[2:], features.shape[2:]))), 0)
    if not stride:
        raise UserError(
            f"split: '{at}' gives maps of {tuple(features.shape[2:])} from images of {tuple(images.shape[2:])}; the "
            f"encoder and decoder give the size of the image over {', '.join(map(str, STRIDES))}, rounded up."
        )
    facts = {"at": at, "before": chain, "images": images.shape[1], "features": features.shape[1]}
    return Split(codec=codec, channels=channels, stride=stride, bits=bits, **facts)


def _carries(
    network: nn.Module,
    at: str,
    before: Sequence[str],
    task: Task,
    batch: Batch,
    features: Tensor,
    wanted: Sequence[Tensor],
) -> bool:
    """Whether, with identities for `before`, the image itself comes to the cut, and features from there give what they
    gave."""
    tail, given = copy.deepcopy(network), _Given(features)
    replace(tail, at, before, given)
    try:
        same = all(map(torch.equal, _outputs(tail, task, batch), wanted))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    images: Tensor = batch["input"]
    if not same or given.seen is None or given.seen.shape != images.shape:
        return False
    return torch.allclose(given.seen, images, atol=1e-4)  # some networks normalise once more, to the same


def _outputs(network: nn.Module, task: Task, batch: Batch) -> list[Tensor]:
    """All that a network gives for a batch, in one order."""
    signals = task.read(task.call(network, batch), batch)
    logits = [] if signals.logits is None else [signals.logits]
    return [*logits, *(signals.parts[name] for name in sorted(signals.parts))]


def _run_up_to(network: nn.Module, at: str, task: Task, batch: Batch) -> tuple[list[str], Tensor]:
    """The outermost modules that a forward pass completes before it enters `at`, and what that gives."""
    done: list[str] = []
    entered: list[int] = []
    found: list[Tensor] = []

    def watch(name: str, module: nn.Module) -> list[RemovableHandle]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            done.append(name)
            if name == at:
                found.append(first_tensor(output))

        def enter(module: nn.Module, args: Any) -> None:
            if name == at:
                entered.append(len(done))

        return [module.register_forward_hook(leave), module.register_forward_pre_hook(enter)]

    handles = [h for name, module in network.named_modules() if name for h in watch(name, module)]
    try:
        task.call(network, batch)
    finally:
        for handle in handles:
            handle.remove()
    if len(found) != 1:
        raise UserError(f"split: '{at}' runs {len(found)} times in a forward pass; name a module that runs once.")
    before = list(dict.fromkeys(done[: entered[0]]))
    inner = {n for n in before if any(n.startswith(f"{outer}.") for outer in before)}
    return [n for n in before if n not in inner], found[0]


# ---- the deployed halves ---------------------------------------------------------------------------------------------


class DevicePart(nn.Module):
    """Normalised images (B, C, H, W) to symbols (B, c, h, w) int32."""

    def __init__(self, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.encoder, self.grid = bottleneck.encoder, bottleneck.code.grid()

    def forward(self, images: Tensor) -> Tensor:
        return self.grid.symbols(self.encoder(images)).to(torch.int32)


class ServerPart(nn.Module):
    """Symbols (B, c, h, w) int32 to what the task's networks give, for images of one size, on which some networks'
    output depends.

    Args:
        network: with the bottleneck; is copied.
        at: its place.
        image: (C, H, W).
        task: what is predicted.

    Attributes:
        names: of the tensors that it gives.
    """

    def __init__(self, network: nn.Module, at: str, image: Sequence[int], task: Task) -> None:
        super().__init__()
        network, self.image = copy.deepcopy(network), tuple(image)
        bottleneck = network.get_submodule(at)
        assert isinstance(bottleneck, Bottleneck)
        self._received: list[Tensor] = []
        replace(network, at, (), _Receiver(bottleneck, self._received))
        self.network, self.names = task.for_export(network)

    def forward(self, symbols: Tensor) -> Any:
        self._received[:] = [symbols]
        output = self.network(torch.zeros(symbols.shape[0], *self.image, device=symbols.device))
        self._received.clear()
        return output


class _Receiver(nn.Module):
    """The decoder, which takes the symbols that the server was given and not the image that there is not."""

    def __init__(self, bottleneck: Bottleneck, received: list[Tensor]) -> None:
        super().__init__()
        self.grid, self.decoder, self._received = bottleneck.code.grid(), bottleneck.decoder, received

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.decoder(self.grid.values(self._received[0].float()))
        return features


# ---- JPEG ------------------------------------------------------------------------------------------------------------


def jpeg(image: Tensor, quality: int) -> bytes:
    """A uint8 image (1 or 3, H, W) as a baseline JPEG file with the standard tables."""
    pixels = image.cpu().numpy()
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality, optimize=False)
    return out.getvalue()


class JpegInput(nn.Module):
    """A network whose images are coded as JPEG first; the baseline.

    Args:
        network: of normalised images.
        task: how they were normalised.
        quality: of JPEG, 1 to 95.
    """

    def __init__(self, network: nn.Module, task: Task, quality: int) -> None:
        super().__init__()
        self.network, self.quality = network, quality
        self._normalisation = task.normalisation

    def encode(self, images: Tensor) -> list[bytes]:
        """A file for each of the images (B, C, H, W), normalised."""
        return [jpeg(image, self.quality) for image in unnormalise(images, *self._normalisation).cpu()]

    @staticmethod
    def length(string: bytes) -> int:
        """Bytes of a file but for its headers and tables, which a receiver could know."""
        return scan_bytes(string)

    def forward(self, images: Tensor) -> Any:
        """The network's output for the images as they are decoded."""
        mode = "L" if images.shape[1] == 1 else "RGB"
        decoded = [np.array(Image.open(io.BytesIO(s)).convert(mode), ndmin=3) for s in self.encode(images)]
        stacked = torch.from_numpy(np.stack([d if mode == "L" else d.transpose(2, 0, 1) for d in decoded]))
        return self.network(normalise(stacked, *self._normalisation).to(images.device))

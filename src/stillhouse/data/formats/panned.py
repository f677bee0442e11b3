"""`panned:PATH`: short clips from a folder of photographs, over which a window moves: true image content, and a motion
that is known.

The class is the direction in which the window moves. A clip's frames are its channels, (frames, size, size), in grey.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.bundle import KEYS, DataBundle, labelled
from stillhouse.data.images import image_files, open_image
from stillhouse.data.source import Source, existing, in_memory
from stillhouse.errors import UserError
from stillhouse.randomness import generator

__all__ = ["KEYS", "REST", "Options", "load"]
REST = "PATH"
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}


class Options(Spec):
    """data.options of `panned`."""

    size: int = Field(16, ge=8, le=256, description="Pixels a side of a frame.")
    frames: int = Field(8, ge=2, le=256, description="Frames of a clip.")
    zoom: float = Field(2.5, gt=1, description="The photograph's shorter side, in sizes of a frame.")
    speed: float = Field(
        1.5, gt=0, description="Pixels that the window moves from frame to frame, at most; half at least."
    )
    clips: int = Field(10, ge=1, description="Clips of each photograph and direction.")
    test: float = Field(0.2, gt=0, lt=1, description="Share of the photographs whose clips are the test split.")


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> DataBundle:
    """Clips of the photographs under PATH, the same for every seed; no photograph is in both splits.

    Raises:
        UserError: fewer than two photographs, or a path that leads out of them.
    """
    files = image_files(existing(rest, root))
    if len(files) < 2:
        raise UserError(f"panned: '{rest}' holds {len(files)} photographs; clips of two or more are needed.")
    if options.speed * (options.frames - 1) > (options.zoom - 1) * options.size:
        raise UserError(
            f"data.options: a window of {options.size} pixels that moves {options.speed:g} pixels {options.frames - 1} "
            f"times leaves photographs of {options.zoom:g} windows; lower speed or frames, or raise zoom."
        )
    order = torch.randperm(len(files), generator=generator("panned", "test")).tolist()
    tested = max(1, min(round(options.test * len(files)), len(files) - 1))
    parts = []
    for chosen in (sorted(order[tested:]), sorted(order[:tested])):
        clips = torch.cat([_clips(Path(files[i]), i, options) for i in chosen])
        labels = np.tile(np.repeat(np.arange(len(DIRECTIONS)), options.clips), len(chosen)).astype(np.int64)
        parts.append(in_memory(clips, labels))
    pixels = parts[0].pixels(np.arange(len(parts[0]))).float() / 255  # type: ignore[misc]
    mean, std = (round(float(v), 4) for v in (pixels.mean(), pixels.std()))
    shape = (options.frames, options.size, options.size)
    found = Source(
        parts[0],
        list(DIRECTIONS),
        shape,
        test=parts[1],
        mean=(mean,) * options.frames,
        std=(std,) * options.frames,
        flip=False,
    )
    return labelled(found, spec)


def _clips(path: Path, number: int, options: Options) -> Tensor:
    """(4 * clips, frames, size, size) uint8 of one photograph, direction by direction."""
    image = open_image(path).convert("L")
    scale = options.zoom * options.size / min(image.size)
    wide, high = (max(round(side * scale), round(options.zoom * options.size)) for side in image.size)
    pixels = torch.from_numpy(np.array(image.resize((wide, high), Image.Resampling.LANCZOS))).float()
    last = options.size - 1
    out = []
    for name, (across, down) in DIRECTIONS.items():
        uniform = torch.rand(options.clips, 3, generator=generator("panned", number, name))
        way = (0.5 + 0.5 * uniform[:, 2]) * options.speed * (options.frames - 1)
        for (u, v, _), length in zip(uniform.tolist(), way.tolist()):
            left = u * (wide - 1 - last - length * abs(across)) + length * max(-across, 0)
            top = v * (high - 1 - last - length * abs(down)) + length * max(-down, 0)
            shares = torch.linspace(0, 1, options.frames) * length
            x = left + across * shares[:, None, None] + torch.arange(options.size)[None, None, :]
            y = top + down * shares[:, None, None] + torch.arange(options.size)[None, :, None]
            at = torch.stack(torch.broadcast_tensors(2 * x / (wide - 1) - 1, 2 * y / (high - 1) - 1), -1)
            whole = pixels[None, None].expand(options.frames, 1, -1, -1)
            frames = torch.nn.functional.grid_sample(whole, at, align_corners=True)
            out.append(frames[:, 0].round().clamp(0, 255).to(torch.uint8))
    return torch.stack(out)

"""The Free Spoken Digit Dataset: `fsdd`, recordings of spoken digits as spectrograms."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from scipy.io import wavfile
from torch import Tensor

from stillhouse.config.specs import DataSpec, Spec
from stillhouse.data.bundle import KEYS, DataBundle, labelled
from stillhouse.data.source import Source, existing, in_memory
from stillhouse.errors import UserError

__all__ = ["KEYS", "REST", "Options", "load"]
REST = ""
RATE = 8000
WINDOW = 256  # samples of a frame's window, 32 ms
RANGE = 80.0  # decibels from black to white
TESTED = 5  # recordings 0 to 4 of each speaker and digit are the test split, as published
NAME = re.compile(r"(\d)_([a-z]+)_(\d+)\.wav")


class Options(Spec):
    """data.options of `fsdd`."""

    bands: int = Field(32, ge=8, le=128, description="Mel bands, the spectrogram's height.")
    frames: int = Field(32, ge=4, le=400, description="Frames, its width.")
    seconds: float = Field(
        0.8, gt=0, le=10, description="What it shows; longer recordings are cut, shorter ones padded."
    )
    speakers: list[str] | None = Field(None, description="Only recordings of these; null: of all.")


@functools.lru_cache
def mel_filters(bands: int, bins: int, rate: int = RATE) -> np.ndarray:
    """(bands, bins) triangles, evenly spaced on the mel scale from 0 to half the rate, each at least one bin wide."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1) / (rate / 2) * (bins - 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    at = np.arange(bins)[None]
    rise, fall = (at - low) / np.maximum(centre - low, 1.0), (high - at) / np.maximum(high - centre, 1.0)
    filters: np.ndarray = np.clip(np.minimum(rise, fall), 0, None)
    nearest = np.rint(centre[:, 0]).astype(np.int64)
    filters[np.arange(bands), nearest] = np.maximum(filters[np.arange(bands), nearest], 1e-3)
    return filters


def spectrogram(sound: np.ndarray, bands: int = 32, frames: int = 32, seconds: float = 0.8) -> Tensor:
    """The log-mel spectrogram of a recording as an image, uint8 (1, bands, frames), low bands below; the loudest point
    is white and what is 80 dB below it black.

    Args:
        sound: (samples,) at 8 kHz.
        bands, frames, seconds: its height, its width, and what it shows.
    """
    length = round(seconds * RATE)
    held = np.zeros(length + WINDOW, np.float64)
    cut = sound[:length].astype(np.float64)
    held[WINDOW // 2 : WINDOW // 2 + len(cut)] = cut
    starts = np.linspace(0, length, frames, endpoint=False).astype(np.int64)
    windows = held[starts[:, None] + np.arange(WINDOW)] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(windows, 2 * WINDOW)) ** 2
    mel = power @ mel_filters(bands, power.shape[1]).T
    decibels = 10 * np.log10(np.maximum(mel, 1e-10) / max(mel.max(), 1.0))
    image = np.rint(np.clip(1 + decibels / RANGE, 0, 1) * 255).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(image.T[::-1]))[None]


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> DataBundle:
    """`root/fsdd/recordings/DIGIT_SPEAKER_NUMBER.wav` as images of ten classes; the test split is recordings 0 to 4.

    Raises:
        UserError: no such folder, no recording of the speakers, or one that is not of 8 kHz.
    """
    folder = existing("fsdd", root)
    folder = folder / "recordings" if (folder / "recordings").is_dir() else folder
    found = [(path, match) for path in sorted(folder.glob("*.wav")) if (match := NAME.fullmatch(path.name))]
    speakers = sorted({match[2] for _, match in found})
    for speaker in options.speakers or ():
        if speaker not in speakers:
            raise UserError(
                f"data.options.speakers: there is no '{speaker}'; there are: {', '.join(speakers) or 'none'}."
            )
    found = [(path, match) for path, match in found if options.speakers is None or match[2] in options.speakers]
    if not found:
        raise UserError(f"fsdd: '{folder}' holds no recordings DIGIT_SPEAKER_NUMBER.wav.")
    parts = []
    for test in (False, True):
        own = [(path, match) for path, match in found if (int(match[3]) < TESTED) == test]
        if not own:
            raise UserError(f"fsdd: '{folder}' has no recordings {'0 to 4' if test else 'from 5 on'}.")
        pictures = torch.stack([_read(path, options) for path, _ in own])
        parts.append(in_memory(pictures, np.array([int(match[1]) for _, match in own], np.int64)))
    shape = (1, options.bands, options.frames)
    return labelled(Source(parts[0], [str(i) for i in range(10)], shape, test=parts[1], flip=False), spec)


def _read(path: Path, options: Options) -> Tensor:
    try:
        rate, sound = wavfile.read(path)
    except (ValueError, EOFError) as error:
        raise UserError(f"fsdd: cannot read '{path}' ({str(error).rstrip('.')}); replace or remove it.") from None
    if rate != RATE or sound.ndim != 1:
        raise UserError(f"fsdd: '{path}' is of {rate} Hz and {sound.ndim} dimensions; it must be of 8 kHz and mono.")
    return spectrogram(sound, options.bands, options.frames, options.seconds)

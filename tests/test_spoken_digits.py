"""Spoken digits: a tone is a line at its height, splits are those published, and bad recordings are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from stillhouse.config.specs import DataSpec
from stillhouse.data import load
from stillhouse.data.formats.fsdd import RATE, WINDOW, mel_filters, spectrogram
from stillhouse.errors import UserError


def tone(hertz: float, seconds: float = 0.5) -> np.ndarray:
    return (np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE) * 10_000).astype(np.int16)


def test_higher_tones_are_higher_in_the_picture_and_silence_is_black():
    rows = [int(spectrogram(tone(hertz))[0, :, :10].float().mean(1).argmax()) for hertz in (200, 800, 2000, 3500)]
    assert rows == sorted(rows, reverse=True) and len(set(rows)) == 4
    assert spectrogram(np.zeros(100, np.int16)).max() == 0
    assert spectrogram(tone(800))[0, :, -8:].max() == 0, "after the tone"


def test_loudness_does_not_matter_and_every_band_hears_something():
    quiet = (tone(800) // 10).astype(np.int16)
    difference = spectrogram(tone(800)).int() - spectrogram(quiet).int()
    assert difference.abs()[0, :, :16].float().mean() < 8
    for bands in (8, 32, 128):
        assert mel_filters(bands, WINDOW + 1).max(1).min() > 0


def write(folder: Path, speakers: str = "ab", rate: int = RATE) -> Path:
    (folder / "fsdd" / "recordings").mkdir(parents=True)
    for digit in range(10):
        for speaker in speakers:
            for index in range(8):
                wavfile.write(
                    folder / "fsdd" / "recordings" / f"{digit}_{speaker}_{index}.wav", rate, tone(200 + 300 * digit)
                )
    return folder


def test_recordings_0_to_4_are_the_test_split(tmp_path: Path):
    bundle = load(DataSpec(name="fsdd", options={"speakers": ["b"], "frames": 20}), write(tmp_path))
    assert bundle.task.input_shape == (1, 32, 20) and bundle.num_classes == 10
    assert len(bundle.dataset("train", train=False)) == 30 and len(bundle.dataset("test", train=False)) == 50


def test_what_is_wrong_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="fsdd"):
        load(DataSpec(name="fsdd"), tmp_path)
    write(tmp_path, "a", rate=16_000)
    with pytest.raises(UserError, match="16000 Hz"):
        load(DataSpec(name="fsdd"), tmp_path)
    with pytest.raises(UserError, match="no 'c'"):
        load(DataSpec(name="fsdd", options={"speakers": ["c"]}), tmp_path)


def test_the_real_recordings(data_root: Path):
    if not (data_root / "fsdd").is_dir():
        pytest.skip("no spoken digits here")
    bundle = load(DataSpec(name="fsdd"), data_root)
    assert len(bundle.dataset("train", train=False)) == 2700 and len(bundle.dataset("test", train=False)) == 300

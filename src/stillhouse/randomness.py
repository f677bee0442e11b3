"""One way to be random: every draw is a function of keys, so nothing random is ever saved and any point can be
replayed.

Order of samples: (seed, "order", epoch). Augmentation: (seed, "augment", epoch, index). A training step: (seed, stage,
epoch, batch, rank).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def key(*parts: int | str) -> int:
    """A 63-bit seed from any integers and words; the same on every machine and in every process."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator seeded by the keys."""
    return torch.Generator(device=device).manual_seed(key(*parts))


def permutation(n: int, *parts: int | str) -> list[int]:
    """A permutation of range(n) that is a function of the keys."""
    return torch.randperm(n, generator=generator(*parts)).tolist()


def seed_step(*parts: int | str) -> None:
    """Seed torch's default generators (CPU and, where one is in use, the current GPU) for one training step;
    microseconds, no device sync."""
    value = key(*parts)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(value)


@contextmanager
def keyed(*parts: int | str) -> Iterator[None]:
    """Inside, torch (CPU), `random` and NumPy draw as the keys say; outside, their states are as before."""
    value = key(*parts)
    torch_state = torch.default_generator.get_state()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(value)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def uniforms(seed: int, indices: np.ndarray, draws: int) -> np.ndarray:
    """Uniform numbers in [0, 1), shape (len(indices), draws), each a function of (seed, index, draw) alone (splitmix64,
    vectorised).

    For augmentation of a whole batch at once: a sample gets the same numbers whatever batch it is in.
    """
    with np.errstate(over="ignore"):
        x = np.asarray(indices, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15) + np.uint64(
            seed & 0xFFFFFFFFFFFFFFFF
        )
        x = x + (np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03))[None, :]
        for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(multiplier)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / float(1 << 53)

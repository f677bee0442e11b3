"""What torchvision's transforms drew for a sample, listened to while they work: its crop and whether it was
mirrored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

WHOLE = (-1, -1, -1, -1)
"""The crop of a sample that no transform cropped."""


@contextmanager
def listening(transform: Any) -> Iterator[list[tuple[str, Mapping[str, Any]]]]:
    """A list to which every torchvision v2 transform under `transform` adds its name and what it drew, each time that
    it is applied."""
    heard: list[tuple[str, Mapping[str, Any]]] = []
    leaves = [t for t in _leaves(transform) if hasattr(t, "transform")]
    for leaf in leaves:
        leaf.transform = _telling(leaf, heard)
    try:
        yield heard
    finally:
        for leaf in leaves:
            del leaf.transform


def _telling(leaf: Any, heard: list[tuple[str, Mapping[str, Any]]]) -> Any:
    own = leaf.transform

    def transform(image: Any, params: Mapping[str, Any]) -> Any:
        heard.append((type(leaf).__name__, params))
        return own(image, params)

    return transform


def _leaves(transform: Any) -> Iterator[Any]:
    inner = getattr(transform, "transforms", None)
    if inner is None:
        yield transform
    else:
        for t in inner:
            yield from _leaves(t)


def crop_and_flip(heard: list[tuple[str, Mapping[str, Any]]]) -> tuple[tuple[int, int, int, int], bool]:
    """(top, left, height, width) of the first crop in the pixels it was taken from (padding included), and whether
    mirrors left it mirrored."""
    crops = [p for _, p in heard if all(isinstance(p.get(k), int) for k in ("top", "left", "height", "width"))]
    crop = tuple(int(crops[0][k]) for k in ("top", "left", "height", "width")) if crops else WHOLE
    return crop, sum(name == "RandomHorizontalFlip" for name, _ in heard) % 2 == 1  # type: ignore[return-value]


def arrays(drawn: list[tuple[tuple[int, int, int, int], bool]]) -> dict[str, np.ndarray]:
    """`crop` (B, 4) int16 and `flip` (B,) bool of a batch."""
    return {
        "crop": np.array([c for c, _ in drawn], np.int16).reshape(-1, 4),
        "flip": np.array([f for _, f in drawn], bool),
    }

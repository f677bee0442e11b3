"""Two-digit numbers, 100 classes, each image two real scans of handwritten digits side by side; and questions about the
shapes of both digits.

A fine-grained task whose classes share aspects. Training and test numbers are put together from the training and test
scans of `digits`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.config.specs import DataSpec
from stillhouse.data import load
from stillhouse.randomness import generator

CLASSES = [f"{number:02d}" for number in range(100)]
SHAPES = {
    "hold a closed loop": [0, 6, 8, 9],
    "hold two closed loops": [8],
    "hold a loop in its upper half": [8, 9],
    "hold a loop in its lower half": [6, 8],
    "begin with a straight stroke at the top": [5, 7],
    "end with a straight stroke at the bottom": [2],
    "have a long upright stroke": [1, 4, 9],
    "open to the left": [2, 3, 5, 7],
    "open to the right": [2, 5, 6],
    "consist of curves alone": [0, 3, 6, 8],
    "have a sharp corner": [2, 4, 5, 7],
    "look the same in a mirror": [0, 1, 8],
}


class Numbers:
    """(image (1, 8, 16) uint8, number) pairs, `each` of every number."""

    classes = CLASSES

    def __init__(self, split: str, each: int) -> None:
        bundle = load(DataSpec(name="digits", augment="plain"))
        scans = bundle.dataset(split, train=False)
        images = torch.stack([scans[i]["input"] for i in range(len(scans))])
        pixels = ((images * bundle.std[0] + bundle.mean[0]).clamp(0, 1) * 255).round().to(torch.uint8)
        draws = generator("numbers", split)
        self.labels = torch.arange(100).repeat_interleave(each)
        sides = [torch.zeros(100 * each, dtype=torch.long) for _ in range(2)]
        for digit in range(10):
            scans_of_it = (scans.labels() == digit).nonzero().flatten()
            for side, wanted in zip(sides, (self.labels // 10 == digit, self.labels % 10 == digit)):
                side[wanted] = scans_of_it[torch.randint(len(scans_of_it), (int(wanted.sum()),), generator=draws)]
        self.images = torch.cat([pixels[side] for side in sides], dim=3)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i], int(self.labels[i])


def numbers(split: str, each: int = 40) -> Numbers | None:
    """The training or the test numbers."""
    return None if split == "val" else Numbers(split, each if split == "train" else 10)


def answers() -> dict[str, list[str]]:
    """Question -> the numbers for which the answer is yes, as a language model would write them from the class
    names."""
    sides = {"left": lambda number: number // 10, "right": lambda number: number % 10}
    return {
        f"Does the {side} digit {shape}?": [CLASSES[n] for n in range(100) if digit(n) in digits]
        for side, digit in sides.items()
        for shape, digits in SHAPES.items()
    }

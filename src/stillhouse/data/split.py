"""What is drawn once from a data set: class-balanced subsets, stratified splits and label noise, each a function of a
seed."""

from __future__ import annotations

import numpy as np

from stillhouse.errors import UserError
from stillhouse.randomness import key as keys
from stillhouse.randomness import permutation, uniforms


def keep_classes(labels: np.ndarray, classes: list[int], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the samples of these classes, and their labels renumbered in this order.

    Raises:
        UserError: a class id that does not exist, or twice the same.
    """
    wrong = [c for c in classes if not 0 <= c < len(names)]
    if wrong:
        raise UserError(f"data.classes: there is no class {wrong[0]}; the data set has classes 0 to {len(names) - 1}.")
    if len(set(classes)) < len(classes) or not classes:
        raise UserError(f"data.classes: name at least one class, each once; given: {classes}.")
    new = np.full(len(names), -1, dtype=np.int64)
    new[classes] = np.arange(len(classes))
    positions = np.flatnonzero(new[labels] >= 0)
    return positions, new[labels[positions]]


def balanced(labels: np.ndarray, size: int, seed: int, what: str) -> np.ndarray:
    """Sorted positions of a class-balanced subset; a larger subset of the same seed holds the smaller one.

    Each class gives size / C samples, one more for the first classes where that leaves a rest; a class that has fewer
    gives all it has and the others share what is missing.

    Args:
        what: the recipe's key, for the message; also a key of the draw.

    Raises:
        UserError: more samples wanted than there are.
    """
    if size > len(labels):
        raise UserError(
            f"data.{what} is {size}, but the data set holds {len(labels)} such samples; ask for at most that many."
        )
    present, counts = np.unique(labels, return_counts=True)
    quota = np.zeros(len(present), dtype=np.int64)
    while (left := size - quota.sum()) > 0:
        open_ = np.flatnonzero(quota < counts)
        share = np.full(len(open_), left // len(open_), dtype=np.int64)
        share[: left % len(open_)] += 1
        quota[open_] = np.minimum(quota[open_] + share, counts[open_])
    return _first_of_each(labels, present, quota, seed, what)


def stratified(labels: np.ndarray, share: float, seed: int, what: str) -> np.ndarray:
    """Sorted positions of a share of the samples, the same share of every class (largest remainders make the total
    exact; at least one sample)."""
    total = min(max(round(share * len(labels)), 1), len(labels))
    present, counts = np.unique(labels, return_counts=True)
    exact = counts * (total / max(len(labels), 1))
    quota = np.floor(exact).astype(np.int64)
    quota[np.argsort(quota - exact, kind="stable")[: total - quota.sum()]] += 1
    return _first_of_each(labels, present, quota, seed, what)


def _first_of_each(labels: np.ndarray, present: np.ndarray, quota: np.ndarray, seed: int, what: str) -> np.ndarray:
    taken = []
    for label, count in zip(present.tolist(), quota.tolist()):
        members = np.flatnonzero(labels == label)
        taken.append(members[permutation(len(members), seed, what, label)[:count]])
    return np.sort(np.concatenate(taken)) if taken else np.zeros(0, np.int64)


def noisy(labels: np.ndarray, rate: float, classes: int, seed: int) -> np.ndarray:
    """Labels of which exactly round(rate * N), drawn by the seed, are replaced by another class, each other class
    equally likely.

    Raises:
        UserError: a single class, so that there is no other.
    """
    if classes < 2:
        raise UserError("data.label_noise needs at least two classes.")
    out: np.ndarray = labels.copy()
    chosen = np.array(permutation(len(labels), seed, "noise")[: round(rate * len(labels))], dtype=np.int64)
    step = 1 + np.floor(uniforms(keys(seed, "noise class"), chosen, 1)[:, 0] * (classes - 1)).astype(np.int64)
    out[chosen] = (labels[chosen] + step) % classes
    return out

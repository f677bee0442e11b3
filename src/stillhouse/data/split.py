"""What is drawn once from a data set: subsets, held-out splits and label noise, each a function of a seed.

`subsets` and then `held_out` are how every data set is cut, whatever its samples are; `cut` is both. They see samples
as positions with strata: class ids, or zeros where a sample has no class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from stillhouse.config.specs import DataSpec
from stillhouse.errors import UserError
from stillhouse.randomness import key as keys
from stillhouse.randomness import permutation, uniforms

Draw = Callable[[np.ndarray, float, int, str], np.ndarray]
"""(strata (n,), how many samples, seed, what they are for) -> sorted positions; at least one sample, at most all."""


@dataclass(frozen=True)
class Portion:
    """Some samples of a split of the source: `rows` (n,) int64 are positions in it, in order."""

    source: str
    rows: np.ndarray


def subsets(
    strata: Mapping[str, np.ndarray], spec: DataSpec, test: float, draw: Draw, ordered: bool = False
) -> dict[str, Portion]:
    """The splits of a source, cut down as the recipe says.

    In this order: without a test split, `test` of the training samples become one; `size` and `test_size` take
    class-balanced subsets; `long_tail` thins what is left for training; `unlabelled` are training samples that `size`
    left over.

    Args:
        strata: split (train, and test and val where the source has them) -> (n,) int64.
        spec: of which `size`, `long_tail`, `test_size`, `unlabelled` and `seed` are read.
        test: how many samples become the test split.
        draw: how they are drawn.
        ordered: take the last training samples for testing, where neighbours are alike.

    Raises:
        UserError: no training samples, too few for a test split, a subset larger than the whole, or no
            samples left to be unlabelled.
    """
    out = {name: Portion(name, np.arange(len(s))) for name, s in strata.items()}
    train, count = out["train"].rows, len(strata["train"])
    if not count:
        raise UserError(f"The data set '{spec.name}' holds no training samples.")
    if "test" not in out:
        last = np.arange(count - max(int(test), 1), count)
        chosen = last if ordered else draw(strata["train"], test, spec.seed, "test")
        out["test"], train = Portion("train", chosen), np.setdiff1d(train, chosen)
        if not len(train):
            raise UserError(
                f"The data set '{spec.name}' has no test split, and one training sample is too few to take one from."
            )
    if spec.size is not None:
        chosen = balanced(strata["train"][train], spec.size, spec.seed, "size")
        rest, train = np.delete(train, chosen), train[chosen]
        if spec.unlabelled is not None and spec.unlabelled.data is None:
            out["unlabelled"] = Portion("train", rest[_without_labels(len(rest), spec)])
    if spec.long_tail is not None:
        train = train[long_tailed(strata["train"][train], spec.long_tail, spec.seed)]
    if spec.test_size is not None:
        part = out["test"]
        chosen = balanced(strata[part.source][part.rows], spec.test_size, spec.seed, "test_size")
        out["test"] = Portion(part.source, part.rows[chosen])
    return {**out, "train": Portion("train", train)}


def _without_labels(count: int, spec: DataSpec) -> np.ndarray:
    """Sorted positions of the unlabelled samples of known classes, among `count` such."""
    assert spec.unlabelled is not None
    size, foreign = spec.unlabelled.size, spec.unlabelled.foreign
    wanted = count if size is None else round(size * (1 - foreign))
    if not 0 < wanted <= count:
        raise UserError(
            f"data.unlabelled: {wanted} samples of the data set's classes were asked for, but data.size {spec.size} "
            f"leaves {count}; choose other sizes."
        )
    return np.sort(np.array(permutation(count, spec.seed, "unlabelled")[:wanted], np.int64))


def foreign(labels: np.ndarray, spec: DataSpec, known: int) -> np.ndarray:
    """Sorted positions of samples outside `spec.classes`, of which a pool with `known` others has its foreign share.

    Args:
        labels: (n,) of all samples, by the data set's own class ids.
        known: unlabelled samples of the classes.

    Raises:
        UserError: fewer such samples than the share needs.
    """
    share = spec.unlabelled.foreign if spec.unlabelled is not None else 0.0
    outside = np.flatnonzero(~np.isin(labels, spec.classes or []))
    wanted = math.ceil(share * known / (1 - share) - 1e-9)
    if wanted > len(outside):
        raise UserError(
            f"data.unlabelled.foreign {share} needs {wanted} samples outside data.classes beside {known} inside, but "
            f"there are {len(outside)}; set data.unlabelled.size lower."
        )
    return np.sort(outside[permutation(len(outside), spec.seed, "foreign")[:wanted]])


def held_out(strata: np.ndarray, spec: DataSpec, draw: Draw, *, has_val: bool) -> dict[str, np.ndarray]:
    """Positions of the training samples that stay in `train`, and of those held out as `val` and `holdout`.

    Args:
        strata: (n,) of the training samples; true labels, so that label noise does not move the cuts.
        spec: of which `val`, `holdout` and `seed` are read; `val` only without `has_val`.
        draw: how they are drawn.
        has_val: whether the source has a validation split of its own.

    Raises:
        UserError: none is left for training.
    """
    everything = len(strata)
    rest, out = np.arange(everything), {}
    for name, share in (("val", 0.0 if has_val else spec.val), ("holdout", spec.holdout)):
        if share:
            out[name] = rest[draw(strata[rest], share * everything, spec.seed, name)]
            rest = np.setdiff1d(rest, out[name])
        if not len(rest):
            raise UserError(
                f"data.val {spec.val} and data.holdout {spec.holdout} leave none of {everything} samples for training."
            )
    return {"train": rest, **out}


def cut(
    strata: Mapping[str, np.ndarray], spec: DataSpec, test: float, draw: Draw, ordered: bool = False
) -> dict[str, Portion]:
    """`subsets`, then `held_out` of what is left for training."""
    out = subsets(strata, spec, test, draw, ordered)
    train = out["train"].rows
    parts = held_out(strata["train"][train], spec, draw, has_val="val" in out)
    return {**out, **{name: Portion("train", train[rows]) for name, rows in parts.items()}}


def in_proportion(strata: np.ndarray, count: float, seed: int, what: str) -> np.ndarray:
    """A `Draw` of the same share of every class."""
    return stratified(strata, min(count / len(strata), 1.0), seed, what)


def in_balance(strata: np.ndarray, count: float, seed: int, what: str) -> np.ndarray:
    """A `Draw` of equally many samples of every class."""
    return balanced(strata, min(max(round(count), 1), len(strata)), seed, what)


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


def long_tailed(labels: np.ndarray, ratio: float, seed: int) -> np.ndarray:
    """Sorted positions of a subset whose classes are exponentially imbalanced, as CIFAR-LT is.

    With n samples in the largest class, class c of C keeps floor(n * ratio^(c / (C - 1))): at most what it has, at
    least one. A longer tail of the same seed is part of a shorter one.

    Cao et al., NeurIPS 2019 (arXiv 1906.07413), appendix.

    Args:
        labels: (n,) class ids; classes are counted in the order of their ids.
        ratio: samples of the last class to those of the first.
    """
    present, counts = np.unique(labels, return_counts=True)
    shares = ratio ** (np.arange(len(present)) / max(len(present) - 1, 1))
    wanted = np.floor(counts.max() * shares + 1e-9).astype(np.int64)  # 50.000…, not 49.999…
    return _first_of_each(labels, present, np.clip(wanted, 1, counts), seed, "long_tail")


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

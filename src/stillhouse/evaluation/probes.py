"""How good a network's features are without training it further: nearest neighbours, and a linear classifier, by
scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.signals import Batch, to_device


@dataclass
class Features:
    """Features of a split: `x` (n, D) float32 and class ids `y` (n,)."""

    x: Tensor
    y: Tensor


def collect_features(embed: Callable[[Batch], Tensor], loader: Iterable[Batch], device: torch.device) -> Features:
    """Features of every sample of a loader, on the CPU.

    Args:
        embed: a batch on the device -> (B, D), without autograd.
        loader: batches with class ids (B,).
        device: where it runs.

    Raises:
        UserError: soft labels, or an empty loader.
    """
    xs, ys = [], []
    for loaded in loader:
        batch = to_device(loaded, device)
        if batch["label"].ndim != 1:
            raise UserError("Probes need class ids, but these labels are soft; switch data.mixup and data.cutmix off.")
        xs.append(embed(batch).float().cpu())
        ys.append(batch["label"].cpu())
    if not xs:
        raise UserError("Probes need samples, but the loader holds none.")
    return Features(torch.cat(xs), torch.cat(ys))


def knn_accuracy(train: Features, test: Features, neighbours: int = 20) -> float:
    """Share of test samples whose class is the most frequent among their nearest training samples by cosine."""
    from sklearn.neighbors import KNeighborsClassifier

    nearest = KNeighborsClassifier(min(neighbours, len(train.y)), metric="cosine", algorithm="brute")
    return float(nearest.fit(train.x.numpy(), train.y.numpy()).score(test.x.numpy(), test.y.numpy()))


def linear_probe(train: Features, classes: int, penalty: float = 1.0, iterations: int = 1000) -> nn.Linear:
    """A linear classifier by logistic regression on standardised features, which reads the features as they are.

    Args:
        train: features and class ids.
        classes: C; a class without samples is never predicted.
        penalty: scikit-learn's C, the inverse of the L2 penalty's weight.
        iterations: at most so many of L-BFGS.

    Raises:
        UserError: fewer than two classes among the samples.
    """
    from sklearn.linear_model import LogisticRegression

    mean, std = train.x.double().mean(0), train.x.double().std(0, correction=0).clamp_min(1e-8)
    x, y = ((train.x.double() - mean) / std).numpy(), train.y.numpy()
    if len(np.unique(y)) < 2:
        raise UserError("A linear probe needs samples of at least two classes.")
    fitted = LogisticRegression(C=penalty, max_iter=iterations).fit(x, y)
    weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
    if len(weight) == 1:  # of two classes scikit-learn gives the difference
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    probe = nn.Linear(x.shape[1], classes)
    with torch.no_grad():
        probe.weight.zero_()
        probe.bias.fill_(-1e4)
        rows = torch.from_numpy(fitted.classes_)
        probe.weight[rows] = (weight / std).float()
        probe.bias[rows] = (bias - (weight / std) @ mean).float()
    return probe


def probe_accuracy(probe: nn.Linear, test: Features) -> float:
    """Share of test samples that a linear probe gets right."""
    with torch.no_grad():
        return float((probe(test.x).argmax(-1) == test.y).double().mean())

"""scikit-learn's handwritten digits: `digits`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from stillhouse.config.specs import DataSpec
from stillhouse.data.bundle import KEYS, DataBundle, labelled
from stillhouse.data.format import NoOptions as Options
from stillhouse.data.source import Source, in_memory
from stillhouse.data.split import stratified

__all__ = ["KEYS", "REST", "Options", "load"]
REST = ""


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> DataBundle:
    """1,797 handwritten digits, 8x8 pixels; a fixed, stratified 80/20 split into training and test, whatever the
    seed."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = bunch.target.astype(np.int64)
    test = stratified(labels, 0.2, 0, "digits test")
    train = np.setdiff1d(np.arange(len(labels)), test)
    parts = [in_memory(images[torch.from_numpy(p)], labels[p]) for p in (train, test)]
    found = Source(
        parts[0], [str(i) for i in range(10)], (1, 8, 8), test=parts[1], mean=(0.3055,), std=(0.3762,), flip=False
    )
    return labelled(found, spec)

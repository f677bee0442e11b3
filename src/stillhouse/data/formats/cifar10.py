"""CIFAR-10: `cifar10`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from stillhouse.config.specs import DataSpec
from stillhouse.data.bundle import KEYS, DataBundle, labelled
from stillhouse.data.format import NoOptions as Options
from stillhouse.data.parquet import read_splits
from stillhouse.data.source import Source, in_memory
from stillhouse.errors import UserError

__all__ = ["KEYS", "REST", "Options", "load"]
REST = ""


def load(rest: str, spec: DataSpec, options: Options, root: Path) -> DataBundle:
    """CIFAR-10 from `root/cifar10/*.parquet` (the layout of Hugging Face's `uoft-cs/cifar10`), or by torchvision, which
    downloads it.

    Raises:
        UserError: not under the root, and not to be downloaded.
    """
    if list((root / "cifar10").glob("train*.parquet")) and list((root / "cifar10").glob("test*.parquet")):
        found = read_splits(root / "cifar10", "img", "label")
        assert found.test is not None
    else:
        from torchvision.datasets import CIFAR10

        try:
            root.mkdir(parents=True, exist_ok=True)
            sets = [CIFAR10(str(root), train=train, download=True) for train in (True, False)]
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"CIFAR-10 is not under '{root}' (looked for cifar10/train*.parquet and test*.parquet) and could not "
                f"be downloaded ({' '.join(str(error).split()).rstrip('.')}); "
                "name the folder that holds it with --data-root or STILLHOUSE_DATA."
            ) from None
        parts = [
            in_memory(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), np.array(s.targets, dtype=np.int64))
            for s in sets
        ]
        found = Source(parts[0], list(sets[0].classes), (3, 32, 32), test=parts[1])
    found.mean, found.std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return labelled(found, spec)

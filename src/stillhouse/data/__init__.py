"""Data by name: `load(DataSpec)` gives a `DataBundle` with its splits; `Loader` makes batches that are a function of
(seed, epoch, index).

Formats each have a file (`named`, `parquet`, `folder`, `libraries`); `augment` has what is drawn at random, `split`
what is drawn once.
"""

from stillhouse.data.bundle import DataBundle, load
from stillhouse.data.dataset import BatchKey, IndexedDataset
from stillhouse.data.loader import AdaptedLoader, Loader, adapt
from stillhouse.signals import Batch

__all__ = ["AdaptedLoader", "Batch", "BatchKey", "DataBundle", "IndexedDataset", "Loader", "adapt", "load"]

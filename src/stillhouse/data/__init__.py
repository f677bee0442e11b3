"""Data by name: `load(DataSpec)` gives a `DataBundle` with its splits; `Loader` makes batches that are a function of
(seed, epoch, index).

Formats each have a file in `formats/`, which is found by the scheme of `data.name`; `augment` has what is drawn at
random, `split` what is drawn once.
"""

from stillhouse.data.bundle import DataBundle
from stillhouse.data.dataset import BatchKey, IndexedDataset
from stillhouse.data.format import Bundle, load
from stillhouse.data.loader import AdaptedLoader, BatchLoader, Loader, adapt
from stillhouse.data.streams import Streams
from stillhouse.signals import Batch

__all__ = [
    "AdaptedLoader",
    "Batch",
    "BatchKey",
    "BatchLoader",
    "Bundle",
    "DataBundle",
    "IndexedDataset",
    "Loader",
    "Streams",
    "adapt",
    "load",
]

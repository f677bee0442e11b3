"""The signal store: pay for the teacher once, keep what it said, train many students from it (docs/store.md).

`writing` runs a teacher over a data set into shards, `reading` gives rows in any order and batches that replay the
views, `format` is how it lies on disk, `making` writes the store that a recipe names, `server` asks a teacher behind an
OpenAI-compatible HTTP server.
"""

from stillhouse.store.reading import Store, StoredDataset
from stillhouse.store.writing import StoreWriter, cache

__all__ = ["Store", "StoreWriter", "StoredDataset", "cache"]

"""The signal store: run the teacher once, store its outputs, train many students from them (docs/store.md).

`writing` runs a teacher over a data set into shards, `reading` gives rows in any order and batches that replay the
views, `format` is the layout on disk, `server` is a teacher behind an OpenAI-compatible HTTP server,
and `remote` stores its answers for a whole data set.
"""

from stillhouse.store.reading import Store, StoredDataset
from stillhouse.store.writing import StoreWriter, cache

__all__ = ["Store", "StoreWriter", "StoredDataset", "cache"]

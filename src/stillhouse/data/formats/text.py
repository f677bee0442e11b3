"""`text:NAME`: text as batches of tokens, or to be classified (see `stillhouse.data.text`)."""

from stillhouse.data.corpus import TextOptions as Options
from stillhouse.data.text import load

__all__ = ["KEYS", "REST", "Options", "load"]
KEYS: frozenset[str] = frozenset()
REST = "shakespeare, text:sst2, text:crossner, text:PATH or text:hf:NAME"

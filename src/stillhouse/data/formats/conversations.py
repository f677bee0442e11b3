"""`conversations:PATH`: conversations of which only the answers are learned (see `stillhouse.data.conversations`)."""

from stillhouse.data.conversations import ConversationOptions as Options
from stillhouse.data.conversations import load

__all__ = ["KEYS", "REST", "Options", "load"]
KEYS: frozenset[str] = frozenset()
REST = "PATH.json, PATH.jsonl or file:PATH.py:FUNCTION"

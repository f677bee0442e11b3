"""Files that are never torn: written beside and renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stillhouse.errors import UserError


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` when the block ends well: readers see the old file or the new one, never a torn one.

    Raises:
        UserError: where the disk is full; the old file is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield beside
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        if getattr(error, "errno", None) == 28 or "No space left" in str(error) or isinstance(error, RuntimeError) and "write" in str(error).lower():
            raise UserError(f"Could not write {path}: the disk is full. What was there before is kept; free some space and start again.") from error
        raise

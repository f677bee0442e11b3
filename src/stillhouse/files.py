"""Files that are never torn: written beside and renamed. And where what can be made again is kept."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.errors import UserError


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` when the block ends well: readers see the old file or the new one, never a
    torn one.

    Raises:
        UserError: where the disk is full; the old file is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield beside
        if beside.is_file():
            os.chmod(beside, 0o666 & ~_umask())  # some libraries write files that only their owner can read
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if is_full(error):
            raise UserError(
                f"Could not write {path}: the disk is full (or over its quota). What was there before is kept; free "
                "some space and start again."
            ) from error
        raise


def sweep(path: Path) -> None:
    """Remove what writers of this file that were killed on this machine an hour ago or earlier have left."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        owner = left.name.split(".")[-2]
        with suppress(OSError):
            if owner.isdigit() and not _alive(int(owner)) and time.time() - left.stat().st_mtime > 3600:
                left.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _umask() -> int:
    """The user's mask of file modes, which can only be read by setting it."""
    with _MASK:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


_MASK = threading.Lock()


def is_full(error: BaseException) -> bool:
    """Whether an error of any library says that nothing more can be written: no space, a quota, or a limit on file
    size."""
    number = getattr(error, "errno", None)
    text = str(error)
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
        w in text for w in ("No space left", "File too large", "PytorchStreamWriter failed", "unexpected pos")
    )


def cache_folder() -> Path:
    """Where stages and decoded data are kept: STILLHOUSE_CACHE, else `stillhouse` in the user's cache folder."""
    given = os.environ.get("STILLHOUSE_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "stillhouse"


def digest(*parts: Any) -> str:
    """A short hash of arrays and of anything that prints stably."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        h.update(np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        h.update(b"\x1f")
    return h.hexdigest()

"""Files that are never half written, and the folder of cached results."""

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
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` when the block ends without an error: readers see the old file or
    the new one, never a part of one.

    Raises:
        UserError: the disk is full; the old file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        if temporary.is_file():
            os.chmod(temporary, 0o666 & ~_umask())  # some libraries write files that only their owner can read
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_full(error):
            raise UserError(
                f"Could not write {path}: the disk is full (or over its quota). The file that was there is unchanged; "
                "free some space and start again."
            ) from error
        raise


def sweep(path: Path) -> None:
    """Remove the temporary files of `path` whose process is dead, if they are more than an hour old."""
    for file in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        owner = file.name.split(".")[-2]
        with suppress(OSError):
            if owner.isdigit() and not _alive(int(owner)) and time.time() - file.stat().st_mtime > 3600:
                file.unlink()


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
    """The folder of cached stages and decoded data: STILLHOUSE_CACHE, else `stillhouse` in the user's cache folder."""
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

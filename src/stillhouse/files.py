"""Files that are never half written, and the folder of cached results."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
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


@contextmanager
def full_disk_reported(what: str) -> Iterator[None]:
    """Turns the errors of a full disk, whichever library raises them and whatever was being written, into a sentence.

    Args:
        what: the folder that is written to.

    Raises:
        UserError: the disk is full.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise UserError(
            f"The disk is full (or over its quota), so that {getattr(error, 'filename', None) or what} could not be "
            "written. What was stored before is unchanged; free some space and start again to resume."
        ) from error


@contextmanager
def turn(path: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, no other process works on `path`; one that must wait says for whom, and since when that one works.

    Args:
        path: what is worked on; `path`.lock and `path`.owner.json lie next to it.
        what: its name for people.
        say: shows a sentence.
    """
    from filelock import FileLock, Timeout

    lock, owner = FileLock(f"{path}.lock"), path.with_name(f"{path.name}.owner.json")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Waiting for {_owner(owner)}, which works on {what} in {path}.")
        lock.acquire()
    try:
        facts = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        owner.write_text(json.dumps({**facts, "command": " ".join(sys.argv)[:300]}))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner(file: Path) -> str:
    """Which process, and since when; in plain words where it left no readable note."""
    try:
        facts = json.loads(file.read_text())
        command = f" ({facts['command']})" if facts["command"] else ""
        return f"process {facts['pid']} on {facts['host']}{command}, at work since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def file_hash(path: Path) -> str:
    """A hash of a file's bytes."""
    out = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            out.update(chunk)
    return out.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON mapping. Raises `UserError` for one that is not, or is not any more."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise UserError(
            f"{path} is damaged: it holds no JSON mapping; remove it, or the folder that it is in."
        ) from None
    return value


CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Record the hash of every file in a folder, by its path in it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    with atomic_write(folder / CHECKSUMS) as temporary:
        temporary.write_text(json.dumps({str(p.relative_to(folder)): file_hash(p) for p in files}, indent=1))


def damage(folder: Path) -> str | None:
    """What is wrong with a folder by its checksums, such as `model.safetensors was changed or damaged`; None where
    nothing is, and where it has none."""
    record = folder / CHECKSUMS
    if not record.exists():
        return None
    try:
        listed = json.loads(record.read_text())
        pairs = [(str(name), str(found)) for name, found in listed.items()]
    except (OSError, ValueError, AttributeError, RecursionError):
        return f"{CHECKSUMS} is not readable"
    for name, found in pairs:
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{CHECKSUMS} names a file outside"
        if not path.is_file():
            return f"{name} is missing"
        if file_hash(path) != found:
            return f"{name} was changed or damaged"
    return None


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, and nothing that a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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

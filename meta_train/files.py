"""Files that are whole or not there, and directories that one process has at a time."""

from __future__ import annotations

import os
import re
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

if sys.platform != "win32":
    import fcntl


MAX_TEXT = 2**20
"""The largest recipe that is read, in bytes; one has a few thousand."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader or a kill sees either the old one or the whole new one.

    The half-written file has a name that no other file has, so nothing is overwritten and no link is followed.

    Args:
        path: The file.
        data: Its new content.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{time.time_ns()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_text(path: Path) -> str:
    """Read a small file of text, UTF-8 whatever the locale.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        ValueError: If it is no regular file (a pipe would wait for a writer), has more than :data:`MAX_TEXT` bytes or is not
            UTF-8.
        OSError: If it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path} is no regular file; copy its content to one")
    if status.st_size > MAX_TEXT:
        raise ValueError(f"{path} has {status.st_size:,} bytes, and at most {MAX_TEXT:,} are read; is it another file?")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as that") from error


def remove_leftovers(folder: Path, names: Callable[[str], bool]) -> None:
    """Remove files that :func:`write_atomically` or ``write_weights`` had half written when the process was killed.

    Args:
        folder: Where they lie.
        names: Says whether the caller writes files of a given name there; all other files are left alone.
    """
    for path in folder.iterdir():
        leftover = re.fullmatch(r"\.(.+?)(\.\d+)+", path.name)
        if leftover and names(leftover[1]):
            path.unlink(missing_ok=True)


_locked: dict[Path, list[int | None]] = {}
"""Directories that this process has, each with its descriptor as often as it was locked."""


def lock(path: Path) -> None:
    """Keep other processes out of a directory, where the system can; the lock ends with the process, however that ends.

    This process may lock it again, and must then unlock it as often.

    Args:
        path: The directory.

    Raises:
        ValueError: If another process has it.
    """
    held = _locked.setdefault(path.resolve(), [])
    try:
        held.append(held[0] if held else _descriptor(path))
    finally:
        if not held:
            del _locked[path.resolve()]


def unlock(path: Path) -> None:
    """Let other processes into a directory again, once it was unlocked as often as it was locked.

    Args:
        path: The directory.
    """
    held = _locked[path.resolve()]
    descriptor = held.pop()
    if not held:
        del _locked[path.resolve()]
        if descriptor is not None:
            os.close(descriptor)


def _descriptor(path: Path) -> int | None:
    if sys.platform == "win32":
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(f"another process is at work in {path}; wait for its end, or choose another --out") from error
    except OSError:  # Some network file systems lock no directories.
        os.close(descriptor)
        return None
    return descriptor

"""The one way to read a file of which only the name is known, nothing waited for and no more read than asked, and
the one way to write a file that somebody may read meanwhile, or that must not be lost."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from contextlib import suppress
from io import RawIOBase
from pathlib import Path
from typing import Any


def start_of(path: Path, most: int) -> bytes:
    """The first bytes of a file, one more than ``most`` where it has more; nothing is waited for.

    Raises:
        OSError: It is no file that can be read now: a pipe, a device, or one of the kernel's that has nothing to say.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no file")
        data: bytes | None = file.read(most + 1)  # None of a file that would have to be waited for
        if data is None:
            raise OSError("it has nothing to read yet")
        return data


def text_of(path: Path, most: int) -> str:
    """A whole file of at most ``most`` bytes, as UTF-8.

    Raises:
        OSError: As ``start_of``, or it is larger.
        UnicodeDecodeError: It is no UTF-8.
    """
    data = start_of(path, most)
    if len(data) > most:
        raise OSError(f"it has more than {most:,} bytes")
    return data.decode("utf-8")


def append_whole(file: Path, content: str) -> None:
    """Add to a file that others add to as well, all of it or nothing: one write at its end, taken back if cut short.

    Raises:
        OSError: It cannot be written; it is then as it was. A pipe that nobody reads is not waited for.
    """
    data = content.encode("utf-8", "backslashreplace")
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(file, flags, 0o644)
    before, written = os.fstat(handle).st_size, 0
    try:
        while written < len(data):  # a full disk takes a part, and raises at the next
            written += os.write(handle, data[written:])
    except BaseException:
        if os.fstat(handle).st_size == before + written:  # nobody else has added to it
            os.ftruncate(handle, before)
        raise
    finally:
        os.close(handle)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file so that whoever reads it sees the old one or the new one, whole; also after a kill.

    The folder is made if it is not there; a link stays one; the file keeps its mode.

    Raises:
        OSError: It cannot be written, or is a pipe or device, of which a file would take the place; it is then as it
            was.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    target = file.resolve()
    if target.exists() and not target.is_file():
        raise OSError("it is no file")
    target.parent.mkdir(parents=True, exist_ok=True)
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o644
    handle, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with open(handle, "wb") as new:
            new.write(data)
            new.flush()
            os.fsync(new.fileno())
        os.chmod(draft, mode)
        os.replace(draft, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(draft)
        raise


def add_json_line(file: Path, entry: Any) -> None:
    """Add a line of JSON to the end of a file, and see it on the disk before going on.

    A last line without an end is what a kill left: it gets its end where it is whole, and is taken away where it is
    not. Two processes that add to one file have to hold a lock.

    Raises:
        OSError: It cannot be written; the file then has its whole lines.
    """
    data = json.dumps(entry).encode() + b"\n"
    with file.open("r+b", buffering=0) as opened:
        end = _end_of_lines(opened)
        opened.seek(end)
        if is_json(last := opened.read()):
            end, data = end + len(last), b"\n" + data
        opened.truncate(end)
        opened.seek(end)
        try:
            while data:
                data = data[opened.write(data) :]
            os.fsync(opened.fileno())
        except BaseException:
            with suppress(OSError):
                opened.truncate(end)
            raise


def is_json(text: bytes) -> bool:
    """Whether a text is one whole JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _end_of_lines(file: RawIOBase) -> int:
    """Where the last line that has an end ends."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65_536)
        file.seek(start)
        if (last := (file.read(end - start) or b"").rfind(b"\n")) >= 0:
            return start + last + 1
        end = start
    return 0

"""The one way to read a file of which only the name is known: nothing is waited for, and no more is read than asked."""

from __future__ import annotations

import os
import stat
from pathlib import Path


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

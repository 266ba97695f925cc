"""The one way to write a file that somebody may read meanwhile, or that must not be lost."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file so that whoever reads it sees the old one or the new one, whole; also after a kill.

    The folder is made if it is not there; a link stays one; the file keeps its mode.

    Raises:
        OSError: It cannot be written; it is then as it was.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    target = file.resolve()
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

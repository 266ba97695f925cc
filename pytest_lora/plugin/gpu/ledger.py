"""The entries of all processes of a user, in one file behind one lock; those of dead processes are gone.

Nothing in the file is trusted: what is no entry is left out, and a file that cannot be read counts as empty.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import stat
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from filelock import FileLock, Timeout

from pytest_lora.files import append_whole, write_whole
from pytest_lora.plugin.gpu.shares import Entry, State

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = "PYTEST_LORA_GPU_LOCKS"
"""Environment variable: the folder, instead of one for each user in the system's temporary folder."""
LOG = "PYTEST_LORA_GPU_LOG"
"""Environment variable: a file to which each hold and each release is written, one JSON object a line."""

_TICKET = re.compile(r"[0-9a-f]{32}")


class NotSharedError(Exception):
    """The GPUs did not become free in time, or processes cannot meet."""


def folder() -> Path:
    """Where the processes of this user meet; made if it is not there.

    Raises:
        NotSharedError: It cannot be made, or somebody else could write to it.
    """
    given = os.environ.get(FOLDER)
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    home = Path(given) if given else Path(tempfile.gettempdir(), f"pytest-lora-gpu-{user}")
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = home.lstat()
    except OSError as error:
        raise NotSharedError(
            f"{home} cannot be used to share GPUs: {error}; set {FOLDER} to a folder"
        ) from error
    foreign = hasattr(os, "getuid") and (found.st_uid != os.getuid() or bool(found.st_mode & 0o022))
    if not given and (not stat.S_ISDIR(found.st_mode) or foreign):
        raise NotSharedError(
            f"{home} is not a folder that only you can write; remove it, or set {FOLDER} to one"
        )
    return home


@contextmanager
def opened(home: Path, own: set[str]) -> Iterator[list[Entry]]:
    """The entries of those alive, the first come first, to be read and changed by one process at a time.

    Args:
        home: The folder.
        own: Tickets of this process, whose locks cannot be tried from here.
    """
    file = home / "ledger.json"
    with FileLock(home / "ledger.lock"):
        before = _read(file)
        entries = [entry for entry in before if entry.ticket in own or _is_alive(home, entry)]
        yield entries
        if entries != before or not file.exists():
            try:
                write_whole(file, json.dumps([asdict(entry) for entry in entries]))
            except OSError as error:
                raise NotSharedError(f"{file} cannot be written: {error}") from error


def _read(file: Path) -> list[Entry]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    return [entry for entry in map(_entry, found) if entry is not None] if isinstance(found, list) else []


def _entry(data: Any) -> Entry | None:
    if not isinstance(data, dict) or data.keys() != Entry.__dataclass_fields__.keys():
        return None
    texts = all(isinstance(data[name], str) for name in ("ticket", "owner", "who"))
    if not texts or not _TICKET.fullmatch(data["ticket"]) or data["state"] not in get_args(State):
        return None
    return Entry(**data) if _are_sizes(data["shares"]) and _are_sizes(data["needs"]) else None


def _are_sizes(data: Any) -> bool:
    return isinstance(data, dict) and all(type(size) is int and 0 <= size < 2**63 for size in data.values())


def _is_alive(home: Path, entry: Entry) -> bool:
    """Whether the process of an entry lives: it holds its lock."""
    life = FileLock(alive(home, entry.ticket))
    try:
        life.acquire(timeout=0)
    except Timeout:
        return True
    life.release()
    forget(home, entry.ticket)
    if entry.state == "runs":
        log("release", entry)
    return False


def alive(home: Path, ticket: str) -> Path:
    """The file that a process locks as long as it lives."""
    return home / f"{ticket}.alive"


def forget(home: Path, ticket: str) -> None:
    """Remove that file."""
    with suppress(OSError):
        alive(home, ticket).unlink()


def log(event: str, entry: Entry) -> None:
    """Write a line of the log; the ledger's lock is held, so the order of the lines is that of the events."""
    if path := os.environ.get(LOG):
        line = {"event": event, "who": entry.who, "shares": entry.shares, "time": time.time()}
        try:
            append_whole(Path(path), json.dumps(line) + "\n")
        except OSError as error:
            raise NotSharedError(f"{LOG}: {path} cannot be written: {error}") from error

"""Processes of one machine share its GPUs: who holds how much of which, in one file behind one lock.

Nobody holds more of a device than is free, and who came first is served first, so that a test that needs much is
not kept waiting by small ones. What a process held that died is free at once: each holds a lock of its own, which
the system lets go.
"""

from __future__ import annotations

import getpass
import json
import os
import tempfile
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FOLDER = "PYTEST_LORA_GPU_LOCKS"
"""Environment variable: the folder, instead of one for each user in the system's temporary folder."""
LOG = "PYTEST_LORA_GPU_LOG"
"""Environment variable: a file to which each hold and each release is written, one JSON object a line."""

PATIENCE = 3600.0
PAUSE = 0.05

_own: set[str] = set()
"""Tickets of this process, whose locks cannot be tried from here."""


class NotSharedError(Exception):
    """The GPUs did not become free in time."""


def folder() -> Path:
    """Where the processes of this user meet."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    return Path(os.environ.get(FOLDER) or Path(tempfile.gettempdir(), f"pytest-lora-gpu-{user}"))


@contextmanager
def held(
    shares: Mapping[str, int], totals: Mapping[str, int], who: str, patience: float = PATIENCE
) -> Iterator[None]:
    """Hold parts of devices, as soon as they are free.

    Args:
        shares: Bytes of each device, by its key; more than its total counts as all of it.
        totals: Bytes that there are, by key.
        who: Named in the log, and to those who wait in vain.
        patience: Seconds to wait.

    Raises:
        NotSharedError: They did not become free; says who holds them.
    """
    home = folder()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    ticket = uuid.uuid4().hex
    life = FileLock(home / f"{ticket}.alive")
    life.acquire()
    _own.add(ticket)
    asked = {key: min(size, totals[key]) for key, size in shares.items()}
    try:
        _wait(home, ticket, asked, totals, who, patience)
        yield
    finally:
        with _ledger(home) as entries:
            for entry in [entry for entry in entries if entry["ticket"] == ticket]:
                entries.remove(entry)
                if entry["holds"]:
                    _log("release", entry)
        _own.discard(ticket)
        life.release()
        _forget(home, ticket)


def _wait(
    home: Path, ticket: str, asked: dict[str, int], totals: Mapping[str, int], who: str, patience: float
) -> None:
    deadline = time.monotonic() + patience
    with _ledger(home) as entries:
        entries.append({"ticket": ticket, "shares": asked, "who": who, "holds": False})
    while True:
        with _ledger(home) as entries:
            others = before(entries, ticket)
            if all(_taken(others, key) + size <= totals[key] for key, size in asked.items()):
                own = next(entry for entry in entries if entry["ticket"] == ticket)
                own["holds"] = True
                _log("hold", own)
                return
        if time.monotonic() > deadline:
            holders = ", ".join(other["who"] for other in others if other["shares"].keys() & asked.keys())
            raise NotSharedError(f"waited {patience:.0f} s for {', '.join(asked)}, held by {holders}")
        time.sleep(PAUSE)


def before(entries: list[dict[str, Any]], ticket: str) -> list[dict[str, Any]]:
    """Who holds something, and who waits for longer."""
    own = next(i for i, entry in enumerate(entries) if entry["ticket"] == ticket)
    return [entry for i, entry in enumerate(entries) if i < own or (entry["holds"] and i != own)]


def _taken(entries: list[dict[str, Any]], key: str) -> int:
    return sum(int(entry["shares"].get(key, 0)) for entry in entries)


@contextmanager
def _ledger(home: Path) -> Iterator[list[dict[str, Any]]]:
    """The entries of those alive, the first come first, to be read and changed by one process at a time."""
    file = home / "ledger.json"
    with FileLock(home / "ledger.lock"):
        text = file.read_text() if file.exists() else ""
        entries = [entry for entry in json.loads(text or "[]") if _is_alive(home, entry)]
        yield entries
        if (changed := json.dumps(entries)) != text:
            # A process that dies while it writes leaves the old file, not half of the new one.
            draft = home / "ledger.draft"
            draft.write_text(changed)
            draft.replace(file)


def _is_alive(home: Path, entry: dict[str, Any]) -> bool:
    """Whether the process of an entry lives: it holds its lock."""
    ticket = entry["ticket"]
    if ticket in _own:
        return True
    life = FileLock(home / f"{ticket}.alive")
    try:
        life.acquire(timeout=0)
    except Timeout:
        return True
    life.release()
    _forget(home, ticket)
    if entry["holds"]:
        _log("release", entry)
    return False


def _forget(home: Path, ticket: str) -> None:
    with suppress(OSError):
        (home / f"{ticket}.alive").unlink()


def _log(event: str, entry: dict[str, Any]) -> None:
    """Write a line of the log; the ledger's lock is held, so the order of the lines is that of the events."""
    if path := os.environ.get(LOG):
        line = {"event": event, "who": entry["who"], "shares": entry["shares"], "time": time.time()}
        with open(path, "a") as log:
            log.write(json.dumps(line) + "\n")

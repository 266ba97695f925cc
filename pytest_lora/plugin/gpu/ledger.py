"""The entries of all processes of a user, in one file behind one lock, and who may begin beside them.

Those of dead processes are gone. Nothing in the file is trusted: what is no entry is left out, and a file that cannot
be read counts as empty.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from filelock import FileLock, Timeout

from pytest_lora.files import append_whole, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

FOLDER = "PYTEST_LORA_GPU_LOCKS"
"""Environment variable: the folder, instead of one for each user in the system's temporary folder."""
LOG = "PYTEST_LORA_GPU_LOG"
"""Environment variable: a file to which each hold and each release is written, one JSON object a line."""

_TICKET = re.compile(r"[0-9a-f]{32}")

State = Literal["waits", "runs", "keeps"]


@dataclass(frozen=True)
class Entry:
    """What one process asks, takes or keeps.

    Attributes:
        ticket: Its own name.
        owner: The process.
        who: The test, or the worker, for messages.
        state: A test waits or runs; a process keeps memory between its tests, such as a base of session scope.
        shares: Bytes of each device, by its key.
        needs: What of that must be free beside the memory that idle processes keep, by key.
    """

    ticket: str
    owner: str
    who: str
    state: State
    shares: Mapping[str, int]
    needs: Mapping[str, int]


def may_begin(entries: Sequence[Entry], own: Entry, totals: Mapping[str, int]) -> bool:
    """Whether a test that waits may begin.

    Who came first is served first, so that a test that needs much is not kept waiting by small ones. What idle
    processes keep counts too, but no process waits for what it keeps itself, and where every process waits for what
    the others keep, the first goes ahead: waiting longer would free nothing.

    Args:
        entries: All of them, the first come first.
        own: The one that waits.
        totals: Bytes that there are, by key.
    """
    return _finds_its_share(entries, own, totals) or _is_stuck(entries, own, totals)


def _finds_its_share(entries: Sequence[Entry], own: Entry, totals: Mapping[str, int]) -> bool:
    """Whether its share is free beside what runs and who came first, and has room."""
    ahead = [entry for entry in entries[: entries.index(own)] if entry.state == "waits"]
    ahead = [entry for entry in ahead if not _waits_for_owner(entries, entry, own.owner, totals)]
    taken = [*ahead, *(entry for entry in entries if entry.state == "runs")]
    beside = all(_sum(taken, key) + size <= totals.get(key, size) for key, size in own.shares.items())
    return beside and _has_room(entries, own, totals)


def _has_room(entries: Sequence[Entry], own: Entry, totals: Mapping[str, int]) -> bool:
    """Whether a test finds what it needs beside what runs and what idle processes keep."""
    running = [entry for entry in entries if entry.state == "runs"]
    others = [*running, *(keeper for keeper in _idle(entries) if keeper.owner != own.owner)]
    return all(_sum(others, key) + size <= totals.get(key, size) for key, size in own.needs.items())


def _waits_for_owner(entries: Sequence[Entry], own: Entry, owner: str, totals: Mapping[str, int]) -> bool:
    """Whether a test waits, among others, for what a certain process keeps."""
    kept = [
        entry for entry in _idle(entries) if entry.owner == owner and entry.shares.keys() & own.shares.keys()
    ]
    return bool(kept) and not _has_room(entries, own, totals)


def _is_stuck(entries: Sequence[Entry], own: Entry, totals: Mapping[str, int]) -> bool:
    """Whether nothing runs, all that is kept is kept by processes that wait, and none of them finds its share."""
    waiting = [entry for entry in entries if entry.state == "waits"]
    if waiting[0] != own or any(entry.state == "runs" for entry in entries):
        return False
    keepers = {entry.owner for entry in entries if entry.state == "keeps"}
    return keepers <= {entry.owner for entry in waiting} and not any(
        _finds_its_share(entries, entry, totals) for entry in waiting
    )


def _idle(entries: Sequence[Entry]) -> list[Entry]:
    """What is kept by processes in which no test runs: the share of one that runs has it in it."""
    running = {entry.owner for entry in entries if entry.state == "runs"}
    return [entry for entry in entries if entry.state == "keeps" and entry.owner not in running]


def _sum(entries: Sequence[Entry], key: str) -> int:
    return sum(entry.shares.get(key, 0) for entry in entries)


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

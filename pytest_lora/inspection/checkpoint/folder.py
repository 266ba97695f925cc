"""Reading from a folder that nobody vouches for: no links out of it, regular files only, never more than asked for."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from pytest_lora.facts.checkpoint import Entry, EntryKind, FileFault

MAX_ENTRIES = 4096
"""Entries of a folder that are looked at; an adapter has about ten."""


class UnreadableError(Exception):
    """A file cannot be read as what it should be; ``fault`` says why."""

    def __init__(self, fault: FileFault) -> None:
        super().__init__(fault.observed)
        self.fault = fault


class Folder:
    """A folder, and the only way to the files in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.real = Path(os.path.realpath(path))
        self._allowed = (self.real, *_hub_blobs(self.real))

    def entries(self) -> tuple[Entry, ...]:
        """What lies in the folder, by name.

        Raises:
            UnreadableError: The folder cannot be listed.
        """
        found = []
        try:
            with os.scandir(self.real) as listing:
                for number, entry in enumerate(listing):
                    if number >= MAX_ENTRIES:
                        break
                    found.append(self._entry(entry.name))
        except OSError as error:
            raise UnreadableError(
                FileFault(self.path.name, "denied", f"the folder cannot be listed: {_reason(error)}")
            ) from error
        return tuple(sorted(found, key=lambda entry: entry.name))

    def exists(self, name: str) -> bool:
        """Whether there is anything of this name, were it a link to nowhere."""
        return os.path.lexists(self.real / name)

    @contextmanager
    def opened(self, name: str) -> Iterator[tuple[FileIO, int]]:
        """Open a regular file and say its size in bytes.

        Raises:
            UnreadableError: It is a link out of the folder, no file, may not be read, or changed meanwhile.
        """
        target = self._resolved(name)
        try:
            before = os.lstat(target)
            if not stat.S_ISREG(before.st_mode):
                raise UnreadableError(FileFault(name, "kind", f"it is {_kind_in_words(before.st_mode)}"))
            # A pipe that took the file's place since would block without O_NONBLOCK.
            flags = os.O_RDONLY
            for name_of_flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"):
                flags |= getattr(os, name_of_flag, 0)  # Windows has other ones than POSIX
            descriptor = os.open(target, flags)
            with os.fdopen(descriptor, "rb", buffering=0) as raw:
                start = os.fstat(descriptor)
                if not stat.S_ISREG(start.st_mode):
                    raise UnreadableError(FileFault(name, "kind", f"it is {_kind_in_words(start.st_mode)}"))
                yield raw, start.st_size
                end = os.fstat(descriptor)
        except OSError as error:
            raise UnreadableError(
                FileFault(name, "denied", f"it cannot be read: {_reason(error)}")
            ) from error
        if _state(start) != _state(end):
            raise UnreadableError(FileFault(name, "changed", "it changed while it was read"))

    def read(self, name: str, limit: int) -> bytes:
        """The whole of a small file.

        Raises:
            UnreadableError: As ``opened``, or it is larger than ``limit`` bytes.
        """
        with self.opened(name) as (file, size):
            if size > limit:
                raise UnreadableError(
                    FileFault(name, "size", f"it is {size:,} bytes long, and at most {limit:,} are read")
                )
            content = exactly(file, 0, size)
        if len(content) != size:
            raise UnreadableError(FileFault(name, "changed", "it changed while it was read"))
        return content

    def _resolved(self, name: str) -> Path:
        target = Path(os.path.realpath(self.real / name))
        if not any(target.is_relative_to(place) for place in self._allowed):
            raise UnreadableError(
                FileFault(name, "link", "it is a link that leads out of the folder; it was not followed")
            )
        return target

    def _entry(self, name: str) -> Entry:
        try:
            target = self._resolved(name)
            state = os.lstat(target)
        except (UnreadableError, OSError, ValueError):
            return Entry(name, "link", 0)
        kind: EntryKind = "other"
        if stat.S_ISREG(state.st_mode):
            kind = "file"
        elif stat.S_ISDIR(state.st_mode):
            kind = "folder"
        elif stat.S_ISLNK(state.st_mode):
            kind = "link"
        return Entry(name, kind, state.st_size if kind == "file" else 0)


def exactly(file: FileIO, offset: int, count: int) -> bytes:
    """At most ``count`` bytes from ``offset``; fewer only where the file ends before."""
    file.seek(offset)
    parts = []
    while count > 0 and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _hub_blobs(folder: Path) -> Iterator[Path]:
    """Where a snapshot in the hub's cache keeps its files: every file of it is a link to there."""
    for place in folder.parents:
        if place.name == "snapshots" and place.parent.name.startswith("models--"):
            yield place.parent / "blobs"


def _state(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ino


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _kind_in_words(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a link" if stat.S_ISLNK(mode) else "a pipe or device"

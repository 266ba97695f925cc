"""Reading from a folder that nobody vouches for: no links out of it, regular files only, never more than asked for.

JSON is read from it with bounds; a file that is not what its name says is known by its first bytes.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from pytest_lora.facts.checkpoint import Entry, EntryKind, FileFault

MAX_ENTRIES = 4096
"""Entries of a folder that are looked at; an adapter has about ten."""

FIRST = 64
"""Bytes that are enough to tell."""

MAX_COMMAS = 1_000_000
"""Values in one file: each costs up to 150 bytes of memory once it is parsed, so this is a bound on that."""


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


def mistaken(content: bytes, name: str) -> FileFault | None:
    """The fault of a file that begins like something else; None where it does not."""
    start = content[:FIRST].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return FileFault(
            name,
            "pointer",
            "it is a pointer of Git LFS: the text that stands for a file that was not fetched",
        )
    if start.startswith((b"<!doctype html", b"<html")):
        return FileFault(name, "format", "it is an HTML page, as a server sends in place of a file")
    if content.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return FileFault(name, "pickle", "it is a pickle or a zip archive, as torch.save writes them")
    if content.startswith(b"GGUF"):
        return FileFault(name, "format", "it is a GGUF file, as llama.cpp has them")
    return None


def read_object(folder: Folder, name: str, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most ``limit`` bytes.

    Raises:
        UnreadableError: It cannot be read or is no JSON object with distinct names.
    """
    return parse_object(folder.read(name, limit), name)


def parse_object(content: bytes, name: str) -> dict[str, Any]:
    """The JSON object in ``content``; a name that it has twice is an error, as readers differ on which counts.

    Raises:
        UnreadableError: It is none.
    """

    def fault(observed: str) -> UnreadableError:
        return UnreadableError(FileFault(name, "format", observed))

    if content.count(b",") > MAX_COMMAS:
        raise UnreadableError(FileFault(name, "size", f"it holds more than {MAX_COMMAS:,} values"))
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_distinct)
    except UnicodeDecodeError as error:
        raise fault(f"it is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise fault("it is nested too deeply to be read") from error
    except DuplicateError as error:
        raise fault(f"it has the name {_short(str(error))} twice") from error
    except ValueError as error:
        if other := mistaken(content, name):
            raise UnreadableError(other) from error
        if not content.strip():
            raise fault("it is empty") from error
        if b"<<<<<<< " in content and b">>>>>>> " in content:
            raise fault("it is no JSON: Git left the markers of a merge conflict in it (<<<<<<<)") from error
        raise fault(f"it is no JSON: {str(error)[:120]}") from error
    if not isinstance(found, dict):
        raise fault(f"it holds {_in_words(found)} instead of an object")
    return found


class DuplicateError(ValueError):
    """A JSON object has one name twice."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise DuplicateError(name)
            seen.add(name)
    return found


def _in_words(value: Any) -> str:
    if value is None:
        return "null"
    return {list: "a list", str: "a string", bool: "a truth value"}.get(type(value), "a number")


def _short(text: str, limit: int = 120) -> str:
    text = text.encode("utf-8", "replace").decode()
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."

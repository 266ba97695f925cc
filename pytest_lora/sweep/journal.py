"""Trials as they finish, one JSON object a line, so that a sweep that was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from filelock import FileLock

from pytest_lora.files import add_json_line, is_json, write_whole
from pytest_lora.sweep.rows import TrialKey, TrialRow
from pytest_lora.values import in_short

FORMAT = "pytest-lora rank sweep 2"

MOST_BYTES = 64 * 2**20
"""Bytes of a journal; a trial takes about a thousand."""

_STARTS = (b'{"trial": {', b'{"before": {')
"""How every line but the first begins."""


class Journal:
    """The file of a sweep. The first line has the settings; those of another sweep are refused.

    Several sweeps of the same settings may share it, also at once: whoever reads or writes holds a lock, a file beside
    it. Nothing is ever overwritten that is not of such a sweep.

    Ranks, rates and seeds are no settings: a sweep may be widened, and keeps what it has. Trials whose worker died, or
    that raised an error of the user's code, are run again; those that ran out of memory, diverged or gave no metric are
    results.

    Args:
        path: The file; it and its folder are made where they do not exist.
        settings: Readable settings by name, which all trials share.
        unread: What of them cannot be compared; the setting ``version`` has to stand for it.

    Raises:
        ValueError: The file is of another sweep (the message names what differs), or no journal at all; or something
            cannot be compared and there is no version.
        OSError: The file cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], settings: Mapping[str, str], unread: tuple[str, ...] = ()
    ) -> None:
        self.path = Path(path)
        self.settings = dict(settings)
        self.rows: dict[TrialKey, TrialRow] = {}
        self.before: TrialRow | None = None
        if unread and not settings.get("version"):
            raise ValueError(
                f"journal: {', '.join(unread)} cannot be compared with what an earlier sweep had; "
                "say version='1', and change it whenever that changes"
            )
        self._header = {"format": FORMAT, "settings": self.settings, "not compared": list(unread)}
        self._first = b""
        with self._alone():
            self._begin()
            for number, line in enumerate(self._lines(), 2):
                self._take(number, line)

    def add(self, row: TrialRow) -> None:
        """Keep a trial."""
        self._append({"trial": row.to_dict()})

    def add_before(self, row: TrialRow) -> None:
        """Keep the measurement before training."""
        self._append({"before": row.to_dict()})

    def _append(self, entry: dict[str, Any]) -> None:
        with self._alone():
            self._begin()  # the file may have been moved away, or another put in its place
            self._written(lambda: add_json_line(self.path, entry))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock, which the system lets go when a process ends, however it ends."""
        target = self.path.resolve()
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        self._written(lambda: target.parent.mkdir(parents=True, exist_ok=True))
        self._written(lock.acquire)
        try:
            yield
        finally:
            lock.release()

    def _written(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            raise OSError(f"journal: {self.path} cannot be written: {error.strerror or error}") from error

    def _begin(self) -> None:
        """See to it that the file is there and is of this sweep."""
        if not self.path.exists() or (self.path.is_file() and not self.path.stat().st_size):
            self._written(lambda: write_whole(self.path, json.dumps(self._header) + "\n"))
            return
        with self.path.open("rb") if self.path.is_file() else BytesIO() as file:
            line = file.readline(MOST_BYTES)
        if self.path.is_file() and self.path.stat().st_size > MOST_BYTES:
            raise ValueError(f"journal: {self.path} has more than {MOST_BYTES:,} bytes; name another file")
        if not line or line != self._first:
            self._require_same(line)
            self._first = line

    def _lines(self) -> list[bytes]:
        """All lines but the first; without a last one that a kill has cut off, whose place the next line takes."""
        *lines, last = self.path.read_bytes().split(b"\n")[1:]
        was_cut = not is_json(last) and any(last.startswith(start[: len(last)]) for start in _STARTS)
        return lines if was_cut else [*lines, last]

    def _require_same(self, line: bytes) -> None:
        try:
            head = json.loads(line if line.endswith(b"\n") else b"")
            settings = head["settings"] if head["format"] == FORMAT else None
        except (ValueError, KeyError, TypeError, RecursionError):
            settings = None
        if not isinstance(settings, dict):
            raise ValueError(f"journal: {self.path} is no journal of a rank sweep; name another file")
        differing = [
            f"{name} was {settings.get(name, 'not set')} and is now {self.settings.get(name, 'not set')}"
            for name in {**settings, **self.settings}
            if settings.get(name) != self.settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"journal: {self.path} is of another sweep: {'; '.join(differing)}. "
                "Name another file, or delete this one to start anew"
            )

    def _take(self, number: int, line: bytes) -> None:
        try:
            entry = json.loads(line)
            row = TrialRow.from_dict(entry.get("trial") or entry["before"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"journal: line {number} of {self.path} cannot be read: {in_short(error)}"
            ) from error
        if row.failure is not None and row.failure.kind in ("worker died", "error"):
            return
        if "before" in entry:
            self.before = row
        else:
            self.rows[row.key] = row

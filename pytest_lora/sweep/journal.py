"""Trials as they finish, one JSON object a line, so that a sweep that was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_lora.sweep.rows import TrialRow

FORMAT = "pytest-lora rank sweep 1"


class Journal:
    """The file of a sweep. The first line has the settings; those of another sweep are refused.

    Ranks and seeds are no settings: a sweep may be widened, and keeps what it has. Trials whose worker died, or that
    raised an error of the user's code, are run again; those that ran out of memory, diverged or gave no metric are
    results.

    Args:
        path: The file; it and its folder are made where they do not exist.
        settings: Readable settings by name, which all trials share.

    Raises:
        ValueError: The file is of another sweep (the message names what differs), or no journal at all.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, str]) -> None:
        self.path = Path(path)
        self.settings = dict(settings)
        self.rows: dict[tuple[int, int], TrialRow] = {}
        self.before: TrialRow | None = None
        whole = self._read()
        if whole:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._append({"format": FORMAT, "settings": self.settings})

    def add(self, row: TrialRow) -> None:
        """Keep a trial."""
        self._append({"trial": row.to_dict()})

    def add_before(self, row: TrialRow) -> None:
        """Keep the measurement before training."""
        self._append({"before": row.to_dict()})

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> bool:
        """Take what the file has; drop a last line that a kill has cut off. False where there is nothing yet."""
        if not self.path.exists():
            return False
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        lines = data[:end].splitlines()
        if not lines:
            if data and not json.dumps({"format": FORMAT}).encode()[:-1].startswith(data[:20]):
                raise ValueError(f"journal: {self.path} is no journal of a rank sweep; name another file")
            self.path.write_bytes(b"")
            return False
        self._require_same(lines[0])
        for number, line in enumerate(lines[1:], 2):
            self._take(number, line)
        if end < len(data):
            os.truncate(self.path, end)
        return True

    def _require_same(self, line: bytes) -> None:
        try:
            head = json.loads(line)
            settings = head["settings"] if head["format"] == FORMAT else None
        except (ValueError, KeyError, TypeError):
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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"journal: line {number} of {self.path} cannot be read: {error!r}") from error
        if row.failure is not None and row.failure.kind in ("worker died", "error"):
            return
        if "before" in entry:
            self.before = row
        else:
            self.rows[row.rank, row.seed] = row

"""Processes of one machine share its GPUs: nobody takes more of a device than is free."""

from __future__ import annotations

import os
import time
import uuid
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from pytest_lora.plugin.gpu import ledger
from pytest_lora.plugin.gpu.ledger import Entry, NotSharedError, may_begin

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

PATIENCE = 3600.0
PAUSE = 0.05

_own: set[str] = set()
_kept: dict[Path, tuple[str, FileLock]] = {}
"""By folder the ticket of what this process keeps, and the lock that says that the process lives."""


@contextmanager
def held(
    shares: Mapping[str, int | None], totals: Mapping[str, int], who: str, patience: float = PATIENCE
) -> Iterator[None]:
    """Hold parts of devices, as soon as they are free.

    Args:
        shares: Bytes of each device, by its key; None where nobody said how much. Then it takes the device alone, but
            for what idle processes keep, which may be half of it.
        totals: Bytes that there are, by key.
        who: Named in the log, and to those who wait in vain.
        patience: Seconds to wait.

    Raises:
        NotSharedError: They did not become free; says who holds them.
    """
    home = ledger.folder()
    ticket, life = _live(home)
    asked = {key: totals[key] if size is None else min(size, totals[key]) for key, size in shares.items()}
    needs = {key: totals[key] // 2 if shares[key] is None else size for key, size in asked.items()}
    own = Entry(ticket, str(os.getpid()), who, "waits", asked, needs)
    try:
        _wait(home, own, totals, patience)
        yield
    finally:
        try:
            with ledger.opened(home, _own) as entries:
                for entry in [entry for entry in entries if entry.ticket == ticket]:
                    entries.remove(entry)
                    if entry.state == "runs":
                        ledger.log("release", entry)
        finally:  # an entry that could not be taken back is then one of nobody alive
            _end(home, ticket, life)


def keep(shares: Mapping[str, int], who: str) -> None:
    """Say what this process holds of each device between its tests, until it says otherwise or ends.

    Args:
        shares: Bytes, by key.
        who: Named to those who wait in vain.
    """
    home = ledger.folder()
    is_anything = any(shares.values())
    if home not in _kept and not is_anything:
        return
    if home not in _kept:
        _kept[home] = _live(home)
    ticket, life = _kept[home]
    with ledger.opened(home, _own) as entries:
        entries[:] = [entry for entry in entries if entry.ticket != ticket]
        if is_anything:
            entries.append(Entry(ticket, str(os.getpid()), who, "keeps", dict(shares), {}))
    if not is_anything:
        del _kept[home]
        _end(home, ticket, life)


def give_back(item: pytest.Item, held: ExitStack) -> None:
    """Close what was held for a test. What fails then is a warning: to raise outside of a test ends the session."""
    try:
        held.close()
    except (NotSharedError, OSError) as error:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.warn(pytest.PytestWarning(f"GPUs could not be given back: {error}"), stacklevel=1)
        told = {"warning_message": caught[0], "when": "runtest", "nodeid": item.nodeid, "location": None}
        item.ihook.pytest_warning_recorded.call_historic(kwargs=told)


def _live(home: Path) -> tuple[str, FileLock]:
    """A new ticket of this process, and the lock that shows that it lives: the system lets it go with the process."""
    ticket = uuid.uuid4().hex
    life = FileLock(ledger.alive(home, ticket))
    life.acquire()
    _own.add(ticket)
    return ticket, life


def _end(home: Path, ticket: str, life: FileLock) -> None:
    _own.discard(ticket)
    life.release()
    ledger.forget(home, ticket)


def _wait(home: Path, own: Entry, totals: Mapping[str, int], patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        with ledger.opened(home, _own) as entries:
            if own not in entries:  # the first time, or after somebody damaged the file
                entries.append(own)
            if may_begin(entries, own, totals):
                running = replace(own, state="runs")
                entries[entries.index(own)] = running
                ledger.log("hold", running)
                return
            others = [entry for entry in entries if entry != own and entry.shares.keys() & own.shares.keys()]
        if time.monotonic() > deadline:
            holders = ", ".join(dict.fromkeys(entry.who for entry in others))
            raise NotSharedError(f"waited {patience:.0f} s for {', '.join(own.shares)}, held by {holders}")
        time.sleep(PAUSE)

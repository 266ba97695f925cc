"""Who may begin on the GPUs that several processes share, as a decision on plain entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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

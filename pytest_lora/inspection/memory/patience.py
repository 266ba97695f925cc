"""How long an estimate may take: after a while it says what it does, after a minute it gives up."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SPEAKS_AFTER = 8.0
GIVES_UP_AFTER = 50.0
"""Seconds, those of the processor for the second: on a busy machine a step is not longer, it only waits."""

_EVERY = 256
"""Operations between two looks at the clock."""


MOST_EVENTS = 3_000_000
"""Storages made and freed in a whole step up to which it is played in the time that is left."""

_SHORTER = "a loop over time steps, say, runs once a token: ask for a shorter seq_len"


class TooLongError(ValueError):
    """An estimate took too long."""


@dataclass
class Wait:
    """What is waited for, since when, and how much was done meanwhile."""

    what: str
    since: float
    spoken: float
    worked: float
    operations: int = 0


_waits: list[Wait] = []


@contextmanager
def limited(what: str) -> Iterator[Wait]:
    """Watch the time of an estimate; inside another one, that one's counts.

    Raises:
        TooLongError: It took longer than ``GIVES_UP_AFTER`` seconds; the message has what the wait is for, which may
            be told more exactly once it is known.
    """
    now = time.monotonic()
    wait = Wait(what, now, now, time.thread_time())
    if _waits:
        yield wait
        return
    # Building a model runs no operation that is counted, so that a clock says the first word.
    clock = threading.Timer(SPEAKS_AFTER, _speak, (wait, "beginning"))
    clock.daemon = True
    clock.start()
    _waits.append(wait)
    try:
        yield wait
    finally:
        _waits.pop()
        clock.cancel()
        clock.join()


def _speak(wait: Wait, place: str) -> None:
    """Say what is waited for: a run without a word looks like one that hangs."""
    wait.spoken = time.monotonic()
    print(
        f"pytest-lora: estimating {wait.what}: {wait.spoken - wait.since:.0f} s, {wait.operations} operations so far, "
        f"now in the {place}",
        file=sys.stderr,
        flush=True,
    )


def tick(place: str) -> None:
    """One more operation; every so often the clock is looked at."""
    if not _waits:
        return
    wait = _waits[-1]
    wait.operations += 1
    if wait.operations % _EVERY:
        return
    now = time.monotonic()
    if time.thread_time() - wait.worked > GIVES_UP_AFTER:
        raise TooLongError(
            f"base: {wait.what} takes more than {GIVES_UP_AFTER:.0f} s to trace; given up in the {place} after "
            f"{wait.operations} operations; {_SHORTER}"
        )
    if now - wait.spoken > SPEAKS_AFTER:
        _speak(wait, place)


def require_few(what: str, events: int) -> None:
    """Refuse a step that is too long to be played for the whole model.

    Raises:
        TooLongError: It makes and frees more than ``MOST_EVENTS`` storages.
    """
    if events > MOST_EVENTS:
        raise TooLongError(f"base: {what} makes and frees {events:,} storages, too many to play; {_SHORTER}")

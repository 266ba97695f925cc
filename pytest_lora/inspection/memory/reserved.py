"""What CUDA's caching allocator reserves for a step, with the layers that repeat played once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytest_lora.inspection.memory.cuda_allocator import ROUNDING, Pool, is_small, rounded
from pytest_lora.inspection.memory.passage import Passage, played

REMEMBERED = 4
"""Passages kept of one kind of stretch: layers may take turns, two buffers for instance."""

WORTH_REMEMBERING = 24
"""Events of a stretch from which a passage is cheaper than the events."""

ONCE = -1
"""Kind of a stretch that does not repeat."""

Integers = NDArray[np.int64]


class Stretches(NamedTuple):
    """Events in a row, from ``starts[i]`` to the next start.

    Those of one kind make and free storages of the same sizes in the same order: a storage of a stretch is made
    and freed at the same positions in each. Shape (stretches,) each.
    """

    starts: Integers
    kinds: Integers


def max_reserved(
    sizes: Integers,
    instances: Integers,
    frees: NDArray[np.bool_],
    emptied_before: int | None = None,
    stretches: Stretches | None = None,
) -> int:
    """The most bytes reserved in a sequence of events.

    Args:
        sizes: Bytes of each event's storage, shape (events,).
        instances: A number for each storage, shape (events,).
        frees: Whether the event frees the storage, shape (events,).
        emptied_before: The event before which the cache is emptied, if any.
        stretches: What repeats; the result is the same without, but takes longer.
    """
    units = rounded(sizes) // ROUNDING
    small = is_small(units)
    starts, kinds = (np.array([0]), np.array([ONCE])) if stretches is None else stretches
    if emptied_before is not None:
        starts, kinds = _split(starts, kinds, emptied_before)
    total = 0
    for pool, chosen in ((Pool(small=True), small), (Pool(small=False), ~small)):
        before = np.concatenate(([0], np.cumsum(chosen)))
        bounds = [*before[starts].tolist(), int(before[-1])]
        emptied = None if emptied_before is None else int(np.searchsorted(starts, emptied_before))
        events = (units[chosen].tolist(), instances[chosen].tolist(), frees[chosen].tolist())
        _play(pool, events, bounds, kinds.tolist(), emptied)
        total += pool.most
    return total * ROUNDING


def _split(starts: Integers, kinds: Integers, event: int) -> tuple[Integers, Integers]:
    """Let a stretch start at an event; what is cut in two repeats no longer."""
    place = int(np.searchsorted(starts, event))
    if place < len(starts) and starts[place] == event:
        return starts, kinds
    kinds = np.insert(kinds, place, ONCE)
    kinds[place - 1] = ONCE
    return np.insert(starts, place, event), kinds


def _play(
    pool: Pool,
    events: tuple[Sequence[int], Sequence[int], Sequence[bool]],
    bounds: list[int],
    kinds: list[int],
    emptied_before: int | None,
) -> None:
    """Let a pool pass through all stretches."""
    sizes, instances, frees = events
    known: dict[int, list[Passage]] = {}
    for number, kind in enumerate(kinds):
        if number == emptied_before:
            pool.empty_cache()
        low, high = bounds[number], bounds[number + 1]
        if kind == ONCE or high - low < WORTH_REMEMBERING:
            pool.play(sizes[low:high], instances[low:high], frees[low:high])
            continue
        passages = known.setdefault(kind, [])
        storages = instances[low:high]
        if not any(passage.again(pool, storages) for passage in passages):
            passages.insert(0, played(pool, sizes[low:high], storages, frees[low:high]))
            del passages[REMEMBERED:]

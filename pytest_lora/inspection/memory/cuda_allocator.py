"""CUDA's caching allocator: what it reserves for a sequence of allocations.

The rules are those of torch's native allocator (c10/cuda/CUDACachingAllocator.cpp, with default settings):
sizes are rounded to 512 bytes; up to 1 MiB comes from segments of 2 MiB, up to 10 MiB from segments of
20 MiB, more from segments of its own rounded to 2 MiB; the smallest free block that is large enough is
taken, the one at the lowest address first, and split where what remains is worth keeping; a freed block
joins its free neighbours. Segments go back to the device only where the cache is emptied.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

ROUNDING = 512
"""Bytes; all sizes and addresses below are in units of it."""

_MIB = 2**20 // ROUNDING
_SMALL = _MIB
_SMALL_SEGMENT = 2 * _MIB
_MEDIUM = 10 * _MIB
_MEDIUM_SEGMENT = 20 * _MIB
_SEGMENT_ROUNDING = 2 * _MIB
_ADDRESS_BITS = 34
"""A free block is one number, its size above its address: a sorted list of them finds the best fit."""


def rounded(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes that blocks of these sizes take."""
    return np.maximum(1, -(-sizes // ROUNDING)) * ROUNDING


def max_reserved(
    sizes: NDArray[np.int64],
    instances: NDArray[np.int64],
    frees: NDArray[np.bool_],
    emptied_before: int | None = None,
) -> int:
    """The most bytes reserved in a sequence of events.

    Args:
        sizes: Bytes of each event's storage, shape (events,).
        instances: A number for each storage, shape (events,).
        frees: Whether the event frees the storage, shape (events,).
        emptied_before: The event before which the cache is emptied, if any.
    """
    units = rounded(sizes) // ROUNDING
    small = units <= _SMALL
    total = 0
    for pool, smallest_rest in ((small, 1), (~small, _SMALL + 1)):
        emptied = -1 if emptied_before is None else int(np.count_nonzero(pool[:emptied_before]))
        events = (units[pool].tolist(), instances[pool].tolist(), frees[pool].tolist())
        total += _replay(*events, smallest_rest, emptied)
    return total * ROUNDING


def _segment_for(size: int) -> int:
    if size <= _SMALL:
        return _SMALL_SEGMENT
    if size < _MEDIUM:
        return _MEDIUM_SEGMENT
    return -(-size // _SEGMENT_ROUNDING) * _SEGMENT_ROUNDING


def _replay(
    sizes: list[int], instances: list[int], frees: list[bool], smallest_rest: int, emptied_before: int
) -> int:
    """The most units reserved by one pool. The two pools share nothing; a block is split if enough remains."""
    free: list[int] = []
    size_at: dict[int, int] = {}
    before: dict[int, int] = {}
    free_at: dict[int, int] = {}
    address_of: dict[int, int] = {}
    reserved = most = next_address = 0
    mask = (1 << _ADDRESS_BITS) - 1
    for number, (size, instance, is_free) in enumerate(zip(sizes, instances, frees, strict=True)):
        if number == emptied_before:
            whole_segments = [a for a in free_at if before[a] < 0 and a + size_at[a] not in before]
            for address in whole_segments:
                free.remove(free_at.pop(address))
                reserved -= size_at.pop(address)
                del before[address]
        if not is_free:
            position = bisect_left(free, size << _ADDRESS_BITS)
            if position < len(free):
                block = free.pop(position)
                address = block & mask
                whole = block >> _ADDRESS_BITS
                del free_at[address]
            else:
                whole = _segment_for(size)
                address = next_address
                next_address += whole + 1  # a gap keeps blocks of two segments from joining
                reserved += whole
                most = max(most, reserved)
                size_at[address] = whole
                before[address] = -1
            rest = whole - size
            if rest >= smallest_rest:
                after = address + size
                size_at[address] = size
                size_at[after] = rest
                before[after] = address
                if address + whole in before:
                    before[address + whole] = after
                free_at[after] = block = (rest << _ADDRESS_BITS) | after
                insort(free, block)
            address_of[instance] = address
            continue
        address = address_of.pop(instance)
        size = size_at[address]
        after = address + size
        if after in free_at:
            del free[bisect_left(free, free_at.pop(after))]
            size += size_at.pop(after)
            del before[after]
        previous = before[address]
        if previous in free_at:
            del free[bisect_left(free, free_at.pop(previous))]
            size += size_at[previous]
            del size_at[address], before[address]
            address = previous
        size_at[address] = size
        if address + size in before:
            before[address + size] = address
        free_at[address] = block = (size << _ADDRESS_BITS) | address
        insort(free, block)
    return most

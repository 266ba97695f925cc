"""CUDA's caching allocator: what it reserves for a sequence of allocations.

The rules are those of torch's native allocator (c10/cuda/CUDACachingAllocator.cpp, with default settings):
sizes are rounded to 512 bytes; up to 1 MiB comes from segments of 2 MiB, up to 10 MiB from segments of
20 MiB, more from segments of its own rounded to 2 MiB; the smallest free block that is large enough is
taken, the one at the lowest address first, and split where what remains is worth keeping; a freed block
joins its free neighbours. Segments go back to the device only where the cache is emptied.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

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
_SHIFT = 34
"""A block is one number, its size above its address: a sorted list of the free ones finds the best fit."""
_ADDRESS = (1 << _SHIFT) - 1
_NONE = 1 << 62
"""Sorts behind all blocks."""


def rounded(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes that blocks of these sizes take."""
    return np.maximum(1, -(-sizes // ROUNDING)) * ROUNDING


def max_reserved(
    sizes: NDArray[np.int64],
    storages: NDArray[np.int64],
    instances: NDArray[np.int64],
    frees: NDArray[np.bool_],
    emptied_before: int | None = None,
) -> int:
    """The most bytes reserved in a sequence of events.

    Args:
        sizes: Bytes of each storage, shape (storages,).
        storages: Each event's storage, shape (events,).
        instances: Each event's copy of that storage, shape (events,): numbers from 0.
        frees: Whether the event frees the copy, shape (events,).
        emptied_before: The event before which the cache is emptied, if any.
    """
    units = rounded(sizes) // ROUNDING
    of_small = (units <= _SMALL)[storages]
    asked = np.where(frees, 0, units[storages] << _SHIFT)
    places = [0] * (int(instances.max(initial=-1)) + 1)
    total = 0
    for chosen, smallest_rest in ((of_small, 1), (~of_small, _SMALL + 1)):
        pool = _Pool(smallest_rest, places)
        first = 0 if emptied_before is None else int(np.count_nonzero(chosen[:emptied_before]))
        mine, whose = asked[chosen].tolist(), instances[chosen].tolist()
        pool.play(mine[:first], whose[:first])
        pool.empty_cache()
        pool.play(mine[first:], whose[first:])
        total += pool.most
    return total * ROUNDING


def _segment_for(size: int) -> int:
    if size <= _SMALL:
        return _SMALL_SEGMENT
    if size < _MEDIUM:
        return _MEDIUM_SEGMENT
    return -(-size // _SEGMENT_ROUNDING) * _SEGMENT_ROUNDING


class _Pool:
    """Blocks of small storages, or of all others: the two share nothing.

    Attributes:
        most: The most units reserved so far.
    """

    def __init__(self, smallest_rest: int, places: list[int]) -> None:
        """``smallest_rest``: units from which a block is split; ``places``: the block of each copy of a storage."""
        self.most = 0
        self._smallest_rest = smallest_rest << _SHIFT
        self._places = places
        self._free = [_NONE]
        self._starting: dict[int, int] = {}  # the free blocks again, by where they start and where they end
        self._ending: dict[int, int] = {}
        self._segments: dict[int, int] = {}
        self._reserved = 0
        self._next_address = 0

    def play(self, asked: Sequence[int], instances: Sequence[int]) -> None:
        """Make and free blocks; ``asked`` has the size of a new one, shifted, or 0 where one is freed.

        Nearly all the time of a replay is spent here, once an event: hence no calls, and no attributes.
        """
        free, starting, ending, places = self._free, self._starting, self._ending, self._places
        smallest_rest = self._smallest_rest
        for size, instance in zip(asked, instances, strict=True):
            if size:
                block = free.pop(bisect_left(free, size))
                if block == _NONE:
                    free.append(block)
                    block = self._new_segment(size >> _SHIFT)
                address = block & _ADDRESS
                starting.pop(address, None)
                if block - size >= smallest_rest:
                    after = address + (size >> _SHIFT)
                    rest = block - address - size | after
                    starting[after] = ending[after + (rest >> _SHIFT)] = rest
                    insort(free, rest)
                    places[instance] = size | address
                else:
                    ending.pop(address + (block >> _SHIFT), None)
                    places[instance] = block
                continue
            block = places[instance]
            address = block & _ADDRESS
            end = address + (block >> _SHIFT)
            if end in starting:
                joined = starting.pop(end)
                del free[bisect_left(free, joined)]
                block += joined - end
                end += joined >> _SHIFT
            if address in ending:
                joined = ending.pop(address)
                del free[bisect_left(free, joined)]
                block += joined - address
                address = joined & _ADDRESS
            starting[address] = ending[end] = block
            insort(free, block)

    def _new_segment(self, size: int) -> int:
        """A block of its own from the device. Segments lie a unit apart, so that their blocks never join."""
        whole = _segment_for(size)
        address = self._next_address
        self._next_address += whole + 1
        self._segments[address] = whole
        self._reserved += whole
        self.most = max(self.most, self._reserved)
        return whole << _SHIFT | address

    def empty_cache(self) -> None:
        """Give segments that nothing lives in back to the device."""
        for address, block in list(self._starting.items()):
            size = block >> _SHIFT
            if self._segments.get(address) == size:
                self._free.remove(block)
                self._reserved -= self._segments.pop(address)
                del self._starting[address], self._ending[address + size]

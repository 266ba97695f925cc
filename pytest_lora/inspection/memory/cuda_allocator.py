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

ADDRESS_BITS = 34
"""A free block is one number, its size above its address: a sorted list of them finds the best fit."""

ADDRESS = (1 << ADDRESS_BITS) - 1

NEW_SEGMENT = -1
"""What an allocation chose where no free block was large enough."""

_MIB = 2**20 // ROUNDING
_SMALL = _MIB
_SMALL_SEGMENT = 2 * _MIB
_MEDIUM = 10 * _MIB
_MEDIUM_SEGMENT = 20 * _MIB
_SEGMENT_ROUNDING = 2 * _MIB


def rounded(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes that blocks of these sizes take."""
    return np.maximum(1, -(-sizes // ROUNDING)) * ROUNDING


def is_small(units: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rounded sizes, in units, the pool of small blocks serves."""
    found: NDArray[np.bool_] = units <= _SMALL
    return found


def _segment_for(size: int) -> int:
    if size <= _SMALL:
        return _SMALL_SEGMENT
    if size < _MEDIUM:
        return _MEDIUM_SEGMENT
    return -(-size // _SEGMENT_ROUNDING) * _SEGMENT_ROUNDING


class Pool:
    """Blocks of one size class; the two pools of the allocator share nothing.

    Attributes:
        free: The free blocks, sorted; see ``ADDRESS_BITS``.
        free_at: The same by address.
        size_at: Units of every block by address.
        before: Address of the block before, by address; negative at the start of a segment.
        address_of: Address of every allocated storage by its number.
        reserved, most: Units held now, and the most so far.
        next_address: Where the next segment will be. Segments lie a unit apart, so that their blocks never join.
    """

    def __init__(self, *, small: bool) -> None:
        self.free: list[int] = []
        self.free_at: dict[int, int] = {}
        self.size_at: dict[int, int] = {}
        self.before: dict[int, int] = {}
        self.address_of: dict[int, int] = {}
        self.reserved = self.most = self.next_address = 0
        self._smallest_rest = 1 if small else _SMALL + 1

    def play(
        self, sizes: Sequence[int], instances: Sequence[int], frees: Sequence[bool]
    ) -> tuple[list[int], list[int]]:
        """Make and free storages in order; the sequences have one entry an event.

        Returns:
            The free block that each allocation chose, or ``NEW_SEGMENT``; and every change of the free list in
            order, ``block`` where one was added, ``~block`` where one was taken.
        """
        free, free_at, size_at, before = self.free, self.free_at, self.size_at, self.before
        address_of, smallest_rest = self.address_of, self._smallest_rest
        chosen: list[int] = []
        changes: list[int] = []
        for size, instance, is_free in zip(sizes, instances, frees, strict=True):
            if not is_free:
                position = bisect_left(free, size << ADDRESS_BITS)
                if position < len(free):
                    block = free.pop(position)
                    address = block & ADDRESS
                    whole = block >> ADDRESS_BITS
                    del free_at[address]
                    chosen.append(block)
                    changes.append(~block)
                else:
                    whole = _segment_for(size)
                    address = self.add_segment(whole)
                    chosen.append(NEW_SEGMENT)
                rest = whole - size
                if rest >= smallest_rest:
                    after = address + size
                    size_at[address] = size
                    size_at[after] = rest
                    before[after] = address
                    if address + whole in before:
                        before[address + whole] = after
                    free_at[after] = block = (rest << ADDRESS_BITS) | after
                    insort(free, block)
                    changes.append(block)
                address_of[instance] = address
                continue
            address = address_of.pop(instance)
            size = size_at[address]
            after = address + size
            if after in free_at:
                block = free_at.pop(after)
                del free[bisect_left(free, block)]
                changes.append(~block)
                size += size_at.pop(after)
                del before[after]
            previous = before[address]
            if previous in free_at:
                block = free_at.pop(previous)
                del free[bisect_left(free, block)]
                changes.append(~block)
                size += size_at[previous]
                del size_at[address], before[address]
                address = previous
            size_at[address] = size
            if address + size in before:
                before[address + size] = address
            free_at[address] = block = (size << ADDRESS_BITS) | address
            insort(free, block)
            changes.append(block)
        return chosen, changes

    def add_segment(self, size: int) -> int:
        """Take a segment from the device; returns its address, where one block fills it."""
        address = self.next_address
        self.next_address += size + 1
        self.reserved += size
        self.most = max(self.most, self.reserved)
        self.size_at[address] = size
        self.before[address] = -1
        return address

    def empty_cache(self) -> None:
        """Give segments that nothing lives in back to the device."""
        for address, block in list(self.free_at.items()):
            size = self.size_at[address]
            if self.before[address] < 0 and address + size not in self.before:
                self.free.remove(block)
                self.reserved -= size
                del self.free_at[address], self.size_at[address], self.before[address]

"""What a layer did to the allocator, to be done again by the next one without its events."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pytest_lora.inspection.memory.cuda_allocator import ADDRESS, ADDRESS_BITS, NEW_SEGMENT, Pool

FREE = -1
"""In place of a position: the block is free."""

_ANY_SIZE = 1 << 40

Partition = tuple[tuple[int, int], ...]
"""Blocks side by side: units, and ``FREE`` or the position of the event that frees it, or that made it."""


class Region(NamedTuple):
    """A stretch of addresses that changed hands, between blocks that did not.

    Attributes:
        start: Where it was.
        old, new: Its blocks before and after.
        anchor: Offset and position of a block in it that the layer frees; None if it was one free block.
    """

    start: int
    old: Partition
    new: Partition
    anchor: tuple[int, int] | None

    @property
    def size(self) -> int:
        return sum(size for size, _ in self.old)


class Tie(NamedTuple):
    """Free blocks of ``size`` up to an address were ``count``: no other one may be in front of the chosen ones."""

    size: int
    region: int
    offset: int
    count: int


@dataclass(frozen=True)
class Passage:
    """The events of one layer as a change of a pool, and what must hold for the next layer to change it alike.

    Which free block an allocation takes depends on the sizes and the order of the free blocks alone. So the
    next copy of the same events takes the same ones, moved, if the blocks that it frees and those that it
    takes lie in the same surroundings and order, and if no other free block would have been a better choice.

    Attributes:
        regions: What changed hands, by address.
        segments: New segments: units and blocks, in order.
        unwanted: ``(low, high, count)``: of the free blocks with that many units, ``high`` excluded, the layer
            took ``count``, and any other one would have been a better choice for something.
        ties: The same for free blocks of the size that was chosen, at lower addresses.
    """

    regions: tuple[Region, ...]
    segments: tuple[tuple[int, Partition], ...]
    unwanted: tuple[tuple[int, int, int], ...]
    ties: tuple[Tie, ...]

    def again(self, pool: Pool, instances: Sequence[int]) -> bool:
        """Let the pool pass through the next copy; False, and nothing is changed, if that may act otherwise.

        Args:
            pool: The pool before the copy.
            instances: The copy's storages by position.
        """
        starts = self._places(pool, instances)
        if starts is None or not self._chooses_alike(pool, starts):
            return False
        for region, start in zip(self.regions, starts, strict=True):
            if region.old != region.new:
                previous = pool.before[start]
                _clear(pool, start, region.old, instances)
                _fill(pool, start, previous, region.new, instances)
        for size, blocks in self.segments:
            _fill(pool, pool.add_segment(size), -1, blocks, instances)
        return True

    def _places(self, pool: Pool, instances: Sequence[int]) -> list[int] | None:
        """Where the regions are now; None if one has another shape, or they lie in another order."""
        starts: list[int] = [0] * len(self.regions)
        used: set[int] = set()
        for number, region in enumerate(self.regions):
            if region.anchor is None:
                continue
            offset, position = region.anchor
            starts[number] = start = pool.address_of[instances[position]] - offset
            if not _is_like(pool, start, region.old, instances, used):
                return None
        next_of: dict[int, int] = {}
        end = -1
        for number, region in enumerate(self.regions):
            if region.anchor is None:
                size = region.old[0][0]
                index = next_of.get(size, -1)
                if index < 0:
                    index = bisect_left(pool.free, size << ADDRESS_BITS)
                while index < len(pool.free) and pool.free[index] in used:
                    index += 1
                if index == len(pool.free) or pool.free[index] >> ADDRESS_BITS != size:
                    return None
                starts[number] = pool.free[index] & ADDRESS
                next_of[size] = index + 1
            if starts[number] <= end:
                return None
            end = starts[number] + region.size
        return starts

    def _chooses_alike(self, pool: Pool, starts: list[int]) -> bool:
        free = pool.free
        for low, high, count in self.unwanted:
            if bisect_left(free, high << ADDRESS_BITS) - bisect_left(free, low << ADDRESS_BITS) != count:
                return False
        for size, region, offset, count in self.ties:
            first = size << ADDRESS_BITS
            address = (starts[region] if region >= 0 else pool.next_address) + offset
            if bisect_right(free, first | address) - bisect_left(free, first) != count:
                return False
        return True


def played(pool: Pool, sizes: Sequence[int], instances: Sequence[int], frees: Sequence[bool]) -> Passage:
    """Play the events of one layer, and say what they did."""
    made = {instance: i for i, (instance, freed) in enumerate(zip(instances, frees, strict=True)) if not freed}
    foreign = [
        (pool.address_of[instance], i)
        for i, (instance, freed) in enumerate(zip(instances, frees, strict=True))
        if freed and instance not in made
    ]
    touched = [(address, pool.size_at[address], i) for address, i in foreign]
    new_from = pool.next_address
    chosen, changes = pool.play(sizes, instances, frees)
    taken = _initial(changes)
    touched += [(block & ADDRESS, block >> ADDRESS_BITS, FREE) for block in taken]
    kept = {pool.address_of[i]: position for i, position in made.items() if i in pool.address_of}
    regions = tuple(_regions(pool, sorted(touched), kept))
    segments = []
    start = new_from
    while start < pool.next_address:
        blocks = _blocks(pool, start, None, kept)
        size = sum(size for size, _ in blocks)
        segments.append((size, blocks))
        start += size + 1
    requests = [size for size, freed in zip(sizes, frees, strict=True) if not freed]
    choices = list(zip(requests, chosen, strict=True))
    return Passage(
        regions,
        tuple(segments),
        tuple(_unwanted(choices, taken)),
        tuple(_ties(choices, taken, regions, new_from)),
    )


def _initial(changes: Iterable[int]) -> list[int]:
    """The free blocks that were taken and had been there before."""
    added: set[int] = set()
    taken: list[int] = []
    for change in changes:
        if change >= 0:
            added.add(change)
        elif ~change in added:
            added.remove(~change)
        else:
            taken.append(~change)
    return sorted(taken)


def _regions(
    pool: Pool, touched: list[tuple[int, int, int]], kept: dict[int, int]
) -> Iterable[Region]:
    """Runs of touched blocks side by side."""
    low = 0
    for high in range(1, len(touched) + 1):
        address, size, _ = touched[high - 1]
        if high < len(touched) and touched[high][0] == address + size:
            continue
        start = touched[low][0]
        old = tuple((size, position) for _, size, position in touched[low:high])
        anchors = ((a - start, position) for a, _, position in touched[low:high] if position != FREE)
        yield Region(start, old, _blocks(pool, start, address + size, kept), next(anchors, None))
        low = high


def _blocks(pool: Pool, start: int, end: int | None, kept: dict[int, int]) -> Partition:
    """The blocks from an address to another one, or to the end of the segment."""
    found = []
    while start in pool.size_at and (end is None or start < end):
        found.append((pool.size_at[start], FREE if start in pool.free_at else kept[start]))
        start += found[-1][0]
    return tuple(found)


def _unwanted(choices: list[tuple[int, int]], taken: list[int]) -> Iterable[tuple[int, int, int]]:
    """Sizes between what was asked and what was chosen, as ranges that do not overlap."""
    spans = sorted(
        (asked, _ANY_SIZE if block == NEW_SEGMENT else block >> ADDRESS_BITS)
        for asked, block in set(choices)
    )
    low = high = 0
    for start, end in [*spans, (2 * _ANY_SIZE, 2 * _ANY_SIZE)]:
        if start <= high:
            high = max(high, end)
            continue
        if low < high:
            yield low, high, _between(taken, low << ADDRESS_BITS, high << ADDRESS_BITS)
        low, high = start, end


def _ties(
    choices: list[tuple[int, int]], taken: list[int], regions: tuple[Region, ...], new_from: int
) -> Iterable[Tie]:
    starts = [region.start for region in regions]
    last: dict[int, int] = {}
    for _, block in choices:
        if block != NEW_SEGMENT:
            size = block >> ADDRESS_BITS
            last[size] = max(last.get(size, 0), block)
    for size, block in last.items():
        address = block & ADDRESS
        region = -1 if address >= new_from else bisect_right(starts, address) - 1
        offset = address - (new_from if region < 0 else starts[region])
        yield Tie(size, region, offset, _between(taken, size << ADDRESS_BITS, block + 1))


def _between(blocks: list[int], low: int, high: int) -> int:
    return bisect_left(blocks, high) - bisect_left(blocks, low)


def _is_like(pool: Pool, start: int, blocks: Partition, instances: Sequence[int], used: set[int]) -> bool:
    """Whether these blocks lie there, between others that are not free; the free ones are added to ``used``."""
    if pool.before.get(start, -1) in pool.free_at:
        return False
    for size, position in blocks:
        if pool.size_at.get(start) != size:
            return False
        if position == FREE:
            if start not in pool.free_at:
                return False
            used.add(pool.free_at[start])
        elif pool.address_of[instances[position]] != start:
            return False
        start += size
    return start not in pool.free_at


def _clear(pool: Pool, start: int, blocks: Partition, instances: Sequence[int]) -> None:
    """Forget the blocks that lie there."""
    for size, position in blocks:
        del pool.size_at[start], pool.before[start]
        if position == FREE:
            del pool.free[bisect_left(pool.free, pool.free_at.pop(start))]
        else:
            del pool.address_of[instances[position]]
        start += size


def _fill(pool: Pool, start: int, previous: int, blocks: Partition, instances: Sequence[int]) -> None:
    """Put blocks there, after the one at ``previous``."""
    for size, position in blocks:
        pool.size_at[start] = size
        pool.before[start] = previous
        if position == FREE:
            pool.free_at[start] = block = (size << ADDRESS_BITS) | start
            insort(pool.free, block)
        else:
            pool.address_of[instances[position]] = start
        previous = start
        start += size
    if start in pool.before:
        pool.before[start] = previous

"""The allocator's replay in numbers: how sizes are rounded, when little is too much to count, and what comes late."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pytest_lora.inspection.memory.cuda_allocator import _coarseness, _put_off, max_reserved, rounded
from tests.memory.test_allocator import MIB, plainly_reserved, random_trace


def test_blocks_are_multiples_of_512_bytes() -> None:
    assert rounded(np.array([0, 1, 512, 513, 1024])).tolist() == [512, 512, 512, 1024, 1024]


def reserved(*events: tuple[int, int], emptied_before: int | None = None, **more: Any) -> int:
    """Of instances with their sizes; its second event frees it."""
    seen: set[int] = set()
    frees = []
    for instance, _ in events:
        frees.append(instance in seen)
        seen.add(instance)
    sizes = np.zeros(len(seen), dtype=np.int64)
    for instance, size in events:
        sizes[instance] = size or sizes[instance]
    instances = np.array([instance for instance, _ in events])
    return max_reserved(sizes, instances, instances, np.array(frees), emptied_before, **more)


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ([1], 2 * MIB),
        ([MIB], 2 * MIB),
        ([MIB, MIB], 2 * MIB),
        ([MIB, MIB, 512], 4 * MIB),
        ([MIB + 1], 20 * MIB),
        ([10 * MIB - 512], 20 * MIB),
        ([10 * MIB], 10 * MIB),
        ([10 * MIB + 1], 12 * MIB),
        ([9 * MIB, 9 * MIB], 20 * MIB),
        ([9 * MIB, 9 * MIB, 2 * MIB], 20 * MIB),
        ([9 * MIB, 10 * MIB - 512, MIB + 512], 20 * MIB),
        ([9 * MIB, 10 * MIB, MIB + 512], 40 * MIB),
        ([24 * MIB, 512], 26 * MIB),
        ([23 * MIB + 512], 24 * MIB),
    ],
)
def test_what_is_taken_for_blocks_that_stay(sizes: list[int], most: int) -> None:
    assert reserved(*enumerate(sizes)) == most


def test_a_rest_of_a_mebibyte_is_not_split_off() -> None:
    large, other = 19 * MIB, 9 * MIB
    # 20 MiB serve 19 MiB whole, so that its last one is lost.
    assert reserved((0, 20 * MIB), (0, 0), (1, large), (2, MIB + 512)) == 40 * MIB
    assert reserved((0, 20 * MIB), (0, 0), (1, large - 512), (2, MIB + 512)) == 20 * MIB
    # Of small ones every rest is kept.
    assert reserved((0, MIB), (1, MIB - 512), (2, 512)) == 2 * MIB
    # Freed neighbours join, in whatever order.
    for order in ((0, 1), (1, 0)):
        assert reserved((0, other), (1, other), *((i, 0) for i in order), (2, 20 * MIB)) == 20 * MIB
    assert reserved((0, other), (1, other), (0, 0), (2, 20 * MIB)) == 40 * MIB


def test_an_emptied_cache_gives_back_what_is_whole() -> None:
    events = (0, 30 * MIB), (1, 40 * MIB), (0, 0), (2, 32 * MIB)
    assert reserved(*events) == 102 * MIB
    assert reserved(*events, emptied_before=3) == 72 * MIB
    assert reserved(*events, emptied_before=2) == 102 * MIB
    held = (0, 9 * MIB), (1, 9 * MIB), (0, 0), (2, 30 * MIB)
    assert reserved(*held, emptied_before=3) == 50 * MIB  # a part of the segment lives
    # The event is counted among those of its kind.
    assert reserved((0, 512), (1, 30 * MIB), (1, 0), (2, 512), (3, 32 * MIB), emptied_before=3) == 34 * MIB


def test_only_other_streams_are_freed_late() -> None:
    events = (0, 20 * MIB), (0, 0), (1, 20 * MIB)
    for stream, most in ((0, 20 * MIB), (1, 40 * MIB)):
        assert reserved(*events, streams=np.array([stream] * 2), caught_up=3) == most


def test_random_traces_keep_the_rules() -> None:
    for seed in range(25):
        events, emptied_before = random_trace(seed)
        instances = np.array([instance for instance, _, _ in events])
        sizes = np.zeros(60, dtype=np.int64)
        for instance, size, _ in events:
            sizes[instance] = size
        frees = np.array([is_free for _, _, is_free in events])
        assert max_reserved(sizes, instances, instances, frees, emptied_before) == plainly_reserved(
            events, emptied_before
        )


@pytest.mark.parametrize(
    ("units", "coarse"),
    [
        ([], 1),
        ([2**28 - 1], 1),
        ([2**28], 2),
        ([2**29], 4),
        ([2**30], 8),
        ([2**28 - 1] * 8, 1),
        ([2**28 - 1] * 9, 2),
        ([2**28 - 1] * 17, 4),
    ],
)
def test_how_many_units_count_as_one(units: list[int], coarse: int) -> None:
    of_events = np.arange(len(units))
    assert _coarseness(np.array(units, dtype=np.int64), of_events, np.zeros(len(units), dtype=bool)) == coarse
    freed = np.repeat(of_events, 2)
    frees = np.tile([False, True], len(units))
    alone = _coarseness(np.array(units, dtype=np.int64), freed, frees)
    assert alone == max([1, *(2 * (unit >> 28) for unit in units)])


@pytest.mark.parametrize(
    ("frees", "caught_up", "order"),
    [
        ("mmffm", 9, [0, 1, 2, 4, 3]),
        ("mmfm", 9, [0, 1, 3, 2]),
        ("mmfm", 3, [0, 1, 2, 3]),
        ("mmfm", 2, [0, 1, 3, 2]),
        ("mmmfffmm", 9, [0, 1, 2, 3, 6, 4, 7, 5]),
        ("f", 0, [0]),
    ],
)
def test_what_the_device_still_reads_is_freed_late(frees: str, caught_up: int, order: list[int]) -> None:
    assert _put_off(np.array([f == "f" for f in frees]), caught_up).tolist() == order

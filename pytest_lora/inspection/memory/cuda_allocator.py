"""CUDA's caching allocator: what it reserves for a sequence of allocations.

The rules are those of torch's native allocator (c10/cuda/CUDACachingAllocator.cpp, with default settings):
sizes are rounded to 512 bytes; up to 1 MiB comes from segments of 2 MiB, up to 10 MiB from segments of
20 MiB, more from segments of its own rounded to 2 MiB; the smallest free block that is large enough is
taken, the one at the lowest address first, and split where what remains is worth keeping; a freed block
joins its free neighbours. Segments go back to the device only where the cache is emptied. Each stream has
blocks of its own. CUDA and NCCL take memory beside it, which ``nvidia-smi`` counts too.
"""

from __future__ import annotations

import importlib
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_lora.facts.memory_choices import Parallel

Integers = NDArray[np.int64]
Replay = Callable[[Integers, Integers, int, int, int], int]
"""A form of ``replayed``; all forms give the same."""

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
_ROOM_AT_ONCE, _ROOM_OF_ONE = 31, 28
"""Bits: what is reserved, and was given back, takes addresses too; a size and an address together have 62."""
_NONE = 1 << 62
"""Sorts behind all blocks."""
_NEVER = -1

_SIGNATURE = "int64(int64[::1], int64[::1], int64, int64, int64)"

CUDA_CONTEXT = 512 * 2**20
"""Bytes that CUDA's context takes on the device; 0.4 to 0.6 GiB is usual."""

OF_TWO, OF_MORE = 544 * 2**20, 688 * 2**20
"""Bytes that one communicator of NCCL takes on each GPU after its first collective, among two and among more: measured
on A100s with NVLink (NVIDIA/nccl, issue 964). Each connection of each of its 24 channels has a buffer for every
protocol, 12 MiB for both directions (``initTransportsRank``, ``p2pSendSetup`` and ``p2pRecvSetup``). Cards without
NVLink have fewer channels and take less; H100s behind an NVSwitch take up to 1.5 GiB more for each
(``nvlsPerRankSize`` in nvls.cc)."""

COMMUNICATORS = {"device_map": 0, "hsdp": 2, "zero1": 2, "zero2": 2, "zero3": 2}
"""How many a strategy has, where that is not one: layers on several GPUs are one process; ``hsdp`` has one to divide
and one to repeat; DeepSpeed clones the group of all ranks (``_clone_world_group`` in deepspeed/utils/groups.py), and
accelerate waits in the first."""


def rounded(sizes: Integers) -> Integers:
    """Bytes that blocks of these sizes take."""
    return np.maximum(1, -(-sizes // ROUNDING)) * ROUNDING


def plainly_replayed(
    asked: Integers, instances: Integers, copies: int, smallest_rest: int, emptied_before: int
) -> int:
    """``replayed`` in Python, which is quicker over lists."""
    return replayed(asked.tolist(), instances.tolist(), copies, smallest_rest, emptied_before)


def max_reserved(
    sizes: Integers,
    storages: Integers,
    instances: Integers,
    frees: NDArray[np.bool_],
    emptied_before: int | None = None,
    replay: Replay = plainly_replayed,
    streams: Integers | None = None,
    *,
    caught_up: int | None = None,
) -> int:
    """The most bytes reserved in a sequence of events.

    Small storages and all others come from blocks of their own, which share nothing; so do those of each stream.

    Args:
        sizes: Bytes of each storage, shape (storages,).
        storages: Each event's storage, shape (events,).
        instances: Each event's copy of that storage, shape (events,): numbers from 0.
        frees: Whether the event frees the copy, shape (events,).
        emptied_before: The event before which the cache is emptied, if any.
        replay: How the events are replayed.
        streams: The stream in which each storage is made, shape (storages,); None where all are of one.
        caught_up: The event before which the device is done with all before it, where the host is ahead of it
            otherwise and blocks of other streams than 0 are taken again late (``_put_off``); None where they are not.
    """
    units = rounded(sizes) // ROUNDING
    coarse = _coarseness(units, storages, frees)
    units = -(-units // coarse)
    of_small = (units <= _SMALL)[storages]
    asked = np.where(frees, 0, units[storages] << _SHIFT)
    copies = int(instances.max(initial=-1)) + 1
    of_stream = np.zeros(len(storages), dtype=np.int64) if streams is None else streams[storages]
    total = 0
    for stream in np.unique(of_stream) if of_stream.any() else (0,):
        for small, smallest_rest in ((True, 1), (False, _SMALL + 1)):
            chosen = (of_small == small) & (of_stream == stream)
            emptied = _NEVER if emptied_before is None else int(np.count_nonzero(chosen[:emptied_before]))
            order = np.flatnonzero(chosen)
            if caught_up is not None and stream:
                order = order[_put_off(frees[order], int(np.count_nonzero(chosen[:caught_up])))]
            total += replay(asked[order], instances[order], copies, smallest_rest << _SHIFT, emptied) * coarse
    return total * ROUNDING


_IN_FLIGHT = 2
"""Gathers after whose release the host waits (``torch.distributed.fsdp._limiter_utils._FreeEventQueue``)."""


def _put_off(frees: NDArray[np.bool_], caught_up: int) -> Integers:
    """The order in which events take effect where what is freed is still read on the device, shape (events,).

    FSDP1 frees gathered parameters while the layer still runs (``record_stream``). Before it gathers again it waits
    for the oldest release if two are on their way, so that the newest block cannot be taken yet.
    """
    order: list[int] = []
    waiting: deque[int] = deque()
    for event, free in enumerate(frees.tolist()):
        if event == caught_up:
            order += waiting
            waiting.clear()
        if free:
            waiting.append(event)
            continue
        if len(waiting) >= _IN_FLIGHT:
            order.append(waiting.popleft())
        order.append(event)
    return np.array([*order, *waiting], dtype=np.int64)


def _coarseness(units: Integers, of_events: Integers, frees: NDArray[np.bool_]) -> int:
    """How many units count as one, a power of two, so that sizes and addresses have room in a block.

    That is 1 below a terabyte at once; above, the rounding is still below a thousandth of the whole.
    """
    most = int(np.cumsum(np.where(frees, -units[of_events], units[of_events])).max(initial=0))
    excess = max(most >> _ROOM_AT_ONCE, int(units.max(initial=0)) >> _ROOM_OF_ONE)
    return 1 << excess.bit_length()


def replayed(
    asked: Sequence[int] | Integers,
    instances: Sequence[int] | Integers,
    copies: int,
    smallest_rest: int,
    emptied_before: int,
) -> int:
    """The most units reserved while blocks are made and freed.

    Nearly all the time of a replay is spent here: hence no calls of functions of our own, and no attributes.
    It keeps to what numba can compile as it stands.

    Args:
        asked: The size of a new block, shifted, or 0 where one is freed, by event.
        instances: Which copy of a storage the block is for, by event.
        copies: How many there are.
        smallest_rest: From what on the rest of a block is split off, shifted.
        emptied_before: The event before which segments that nothing lives in go back to the device.
    """
    places = [0] * copies  # the block of each copy
    free = [_NONE]
    # The free blocks again, by where they start and where they end, and the size of each segment by where it
    # starts; nothing lies at _NEVER, which tells numba the types.
    starting, ending, segments = {_NEVER: _NEVER}, {_NEVER: _NEVER}, {_NEVER: _NEVER}
    reserved = most = next_address = 0
    for number, size in enumerate(asked):
        if number == emptied_before:
            for block in free[:-1]:
                address, whole = block & _ADDRESS, block >> _SHIFT
                if segments.get(address, 0) == whole:
                    free.pop(bisect_left(free, block))
                    starting.pop(address)
                    ending.pop(address + whole)
                    reserved -= segments.pop(address)
        instance = instances[number]
        if size:
            block = free.pop(bisect_left(free, size))
            if block == _NONE:
                free.append(block)
                whole = size >> _SHIFT
                if whole <= _SMALL:
                    whole = _SMALL_SEGMENT
                elif whole < _MEDIUM:
                    whole = _MEDIUM_SEGMENT
                else:
                    whole = -(-whole // _SEGMENT_ROUNDING) * _SEGMENT_ROUNDING
                block = whole << _SHIFT | next_address
                segments[next_address] = whole
                next_address += whole + 1  # a unit apart, so that blocks of two segments never join
                reserved += whole
                most = max(most, reserved)
            address = block & _ADDRESS
            starting.pop(address, 0)
            if block - size >= smallest_rest:
                after = address + (size >> _SHIFT)
                rest = block - address - size | after
                starting[after] = ending[after + (rest >> _SHIFT)] = rest
                free.insert(bisect_left(free, rest), rest)
                places[instance] = size | address
            else:
                ending.pop(address + (block >> _SHIFT), 0)
                places[instance] = block
            continue
        block = places[instance]
        address = block & _ADDRESS
        end = address + (block >> _SHIFT)
        if end in starting:
            joined = starting.pop(end)
            free.pop(bisect_left(free, joined))
            block += joined - end
            end += joined >> _SHIFT
        if address in ending:
            joined = ending.pop(address)
            free.pop(bisect_left(free, joined))
            block += joined - address
            address = joined & _ADDRESS
        starting[address] = ending[end] = block
        free.insert(bisect_left(free, block), block)
    return most


@cache
def fastest_replay() -> Replay:
    """The same source compiled by numba, some five times as fast, or the plain form where that is missing.

    numba (``pip install 'pytest-lora[fast]'``) keeps what it has compiled beside the source, or in the user's cache
    where it may not write there (``NUMBA_CACHE_DIR`` names another place); where it may write nowhere, each process
    compiles anew.
    """
    try:
        numba: Any = importlib.import_module("numba")
        extending: Any = importlib.import_module("numba.extending")
    except ImportError:
        return plainly_replayed
    extending.overload(bisect_left)(_bisect_left)
    try:
        return _compiled(numba, cached=True)
    except RuntimeError:  # no place to write to
        return _compiled(numba, cached=False)


def _compiled(numba: Any, *, cached: bool) -> Replay:
    compiled: Replay = numba.njit(_SIGNATURE, cache=cached)(replayed)
    return compiled


def _bisect_left(ordered: Any, sought: Any) -> Callable[[Any, Any], int]:
    """What numba lacks to compile the replay; it asks with types, and compiles the answer."""

    def search(ordered: Any, sought: Any) -> int:
        low, high = 0, len(ordered)
        while low < high:
            middle = (low + high) // 2
            if ordered[middle] < sought:
                low = middle + 1
            else:
                high = middle
        return low

    return search


def communication_of(parallel: Parallel | None) -> int:
    """Bytes that NCCL takes on each GPU; 0 with one."""
    if parallel is None or parallel.gpus == 1:
        return 0
    each = OF_TWO if parallel.gpus == 2 else OF_MORE
    return each * COMMUNICATORS.get(parallel.strategy, 1)

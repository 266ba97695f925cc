"""The allocator's replay, compiled where numba is installed: the same source, some five times as fast."""

from __future__ import annotations

import importlib
from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from typing import Any

from pytest_lora.inspection.memory.cuda_allocator import Replay, plainly_replayed, replayed

_SIGNATURE = "int64(int64[::1], int64[::1], int64, int64, int64)"


@cache
def fastest_replay() -> Replay:
    """The compiled form, or the plain one where numba (``pip install 'pytest-lora[fast]'``) is missing.

    numba keeps what it has compiled beside the source, or in the user's cache where it may not write there
    (``NUMBA_CACHE_DIR`` names another place); where it may write nowhere, each process compiles anew.
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

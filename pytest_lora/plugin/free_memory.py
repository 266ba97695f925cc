"""Memory that the C library keeps after it was freed, given back to the system after every so many tests.

A model, its gradients and its moments come and go with each test, in blocks of many sizes. glibc keeps the free ones
between them for itself, and a session of thousands of tests grows by what no test needs. Asking for them back changes
no setting of an allocator, of this process or of anybody else's.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from functools import cache

EVERY = 25
"""Tests from one time to the next: it takes a few milliseconds."""

_tests = 0


def after_a_test() -> None:
    """Count a test that had a model; after ``EVERY`` of them give free memory back."""
    global _tests
    _tests += 1
    if _tests % EVERY == 0:
        _trim()()


@cache
def _trim() -> Callable[[], object]:
    """``malloc_trim`` of glibc (malloc_trim(3)); nothing where there is another C library or allocator."""
    if platform.libc_ver()[0] != "glibc":
        return lambda: None
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return lambda: None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return lambda: trim(0)

"""What is noted of saved numbers as they pass.

Which rows and columns of a factor hold anything, and how many numbers of float16 are zero, or so small that the format
holds few digits of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import numpy as np

from pytest_lora.facts.saved_tensors import Marks

_FACTOR = re.compile(r"\.lora_[AB](\.|$)")

MOST_RANKS = 4096
"""Columns of a factor that are looked at one by one; a rank is never larger."""

_NORMAL, _MAGNITUDE = np.uint16(0x0400), np.uint16(0x7FFF)


class Marking:
    """Marks of matrices of one shape, whose bytes come in parts of whole rows.

    Args:
        shape: Rows and columns.
        width: Bytes of a number.
        count: Matrices.
    """

    def __init__(self, shape: tuple[int, ...], width: int, count: int) -> None:
        self._columns = shape[1]
        self._width = width
        self._rows = [np.zeros((count, 0), bool)]
        self._filled = np.zeros((count, shape[1] if shape[1] <= MOST_RANKS else 0), bool)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self._columns * self._width

    def add(self, raw: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Look at the next rows of each matrix."""
        numbers = raw.view(f"u{self._width}").reshape(len(raw), -1, self._columns)
        self._rows.append(np.asarray(numbers.any(axis=2)))
        if self._columns <= MOST_RANKS:
            self._filled |= numbers.any(axis=1)

    def marks(self) -> Iterator[Marks]:
        """What was seen of each."""
        rows = np.concatenate(self._rows, axis=1)
        if np.array_equal(rows, np.broadcast_to(rows[:1], rows.shape)) and np.array_equal(
            self._filled, np.broadcast_to(self._filled[:1], self._filled.shape)
        ):
            yield from repeat(_marks(rows[0], self._filled[0]), len(rows))
            return
        known: dict[tuple[bytes, bytes], Marks] = {}  # most are alike, and each takes many objects
        for own, filled in zip(rows, self._filled, strict=True):
            key = own.tobytes(), filled.tobytes()
            if key not in known:
                known[key] = _marks(own, filled)
            yield known[key]


def _marks(rows: np.ndarray[Any, np.dtype[np.bool_]], filled: np.ndarray[Any, np.dtype[np.bool_]]) -> Marks:
    zero = int(len(rows) - rows.sum())
    is_block = not rows[:zero].any() or not rows[len(rows) - zero :].any()
    few = len(rows) <= MOST_RANKS
    return Marks(
        rows=tuple(rows.tolist()) if few else (),
        columns=tuple(filled.tolist()),
        zero_rows=zero if is_block else 0,
    )


def is_marked(name: str, shape: tuple[int, ...], width: int, most: int) -> bool:
    """Whether this is a factor whose rows fit into ``most`` bytes."""
    return len(shape) == 2 and 0 < shape[1] * width <= most and _FACTOR.search(name) is not None


class Small:
    """Counts over tensors of one form, a part of each at a time."""

    def __init__(self, count: int) -> None:
        """Begin with nothing seen of ``count`` tensors."""
        self._zeros = np.zeros(count, np.int64)
        self._subnormals = np.zeros(count, np.int64)

    def add(self, raw: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Add the next part of each, shape (tensors, bytes)."""
        bits = raw.view(np.uint16) & _MAGNITUDE
        zeros = np.count_nonzero(bits == 0, axis=1)
        self._zeros += zeros
        self._subnormals += np.count_nonzero(bits < _NORMAL, axis=1) - zeros

    def shares(self, numbers: int) -> list[tuple[float, float]]:
        """Share of zeros, and share of the rest that is below the smallest normal number, of each tensor."""
        return [
            (zeros / max(1, numbers), subnormals / max(1, numbers - zeros))
            for zeros, subnormals in zip(self._zeros.tolist(), self._subnormals.tolist(), strict=True)
        ]

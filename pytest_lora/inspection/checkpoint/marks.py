"""Which rows and columns of a saved factor hold anything."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from pytest_lora.facts.saved_tensors import Marks

_FACTOR = re.compile(r"\.lora_[AB](\.|$)")

MOST_RANKS = 4096
"""Columns of a factor that are looked at one by one; a rank is never larger."""


class Marking:
    """Marks of one matrix whose bytes come in parts of whole rows.

    Args:
        shape: Rows and columns.
        width: Bytes of a number.
    """

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        self._columns = shape[1]
        self._width = width
        self._rows: list[np.ndarray[tuple[Any, ...], np.dtype[np.bool_]]] = []
        self._filled = np.zeros(min(shape[1], MOST_RANKS), bool)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self._columns * self._width

    def add(self, raw: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        """Look at the next rows."""
        numbers = raw.view(f"u{self._width}").reshape(-1, self._columns)
        self._rows.append(np.asarray(numbers.any(axis=1)))
        if self._columns <= MOST_RANKS:
            self._filled |= numbers.any(axis=0)

    def marks(self) -> Marks:
        """What was seen."""
        rows = np.concatenate(self._rows) if self._rows else np.zeros(0, bool)
        zero = int(len(rows) - rows.sum())
        is_block = not rows[:zero].any() or not rows[len(rows) - zero :].any()
        few = len(rows) <= MOST_RANKS
        return Marks(
            rows=tuple(rows.tolist()) if few else (),
            columns=tuple(self._filled.tolist()) if self._columns <= MOST_RANKS else (),
            zero_rows=zero if is_block else 0,
        )


def marking(name: str, shape: tuple[int, ...], width: int, most: int) -> Marking | None:
    """A marking for a factor whose rows fit into ``most`` bytes; None for what is none."""
    if not _FACTOR.search(name) or len(shape) != 2 or not 0 < shape[1] * width <= most:
        return None
    return Marking(shape, width)

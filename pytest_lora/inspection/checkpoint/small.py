"""How many numbers of float16 are zero, or so small that the format holds few digits of them."""

from __future__ import annotations

from typing import Any

import numpy as np

_NORMAL, _MAGNITUDE = np.uint16(0x0400), np.uint16(0x7FFF)


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

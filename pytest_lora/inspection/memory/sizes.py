"""Sizes of all storages as polynomials in batch size, sequence length and rank, fitted to a few traces."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Point = tuple[int, int, int]
"""Batch size, sequence length, rank."""

_FIT_BATCHES = (2, 3)
_FIT_RANKS = (8, 16)
_CHECK_BATCH = 5
_CHECK_RANK = 12
_GRAIN = 64
"""Coefficients are multiples of a small fraction: shapes are whole numbers, and sizes their products."""


class Surface:
    """Bytes of each storage at any point: linear in batch size and rank, quadratic in sequence length.

    A storage is a tensor whose dimensions are each linear in one of the three, or the product of batch size
    and sequence length; only attention over a mask or without a fused kernel is quadratic in the length.
    """

    def __init__(self, points: Sequence[Point], sizes: NDArray[np.int64]) -> None:
        """Fit to sizes of shape (points, storages), as many points as ``grid`` gives."""
        self._powers = [sorted({p[axis] for p in points}) for axis in range(3)]
        basis = np.array([self._monomials(point) for point in points])
        coefficients = np.linalg.solve(basis, sizes.astype(np.float64))
        grained = np.rint(coefficients * _GRAIN) / _GRAIN
        exact = np.array_equal(np.rint(basis @ grained), sizes)
        self._coefficients = grained if exact else coefficients

    def __call__(self, point: Point) -> NDArray[np.int64]:
        """Bytes of each storage, shape (storages,)."""
        sizes: NDArray[np.int64] = np.rint(self._monomials(point) @ self._coefficients).astype(np.int64)
        return sizes

    def _monomials(self, point: Point) -> NDArray[np.float64]:
        batch, length, rank = (
            np.array([float(value) ** power for power in range(len(values))])
            for value, values in zip(point, self._powers, strict=True)
        )
        monomials: NDArray[np.float64] = np.einsum("i,j,k->ijk", batch, length, rank).ravel()
        return monomials


def grid(family: Family) -> list[Point]:
    """The points at which a surface of a family is fitted, those of one rank together."""
    batches = (1,) if family.single_batch else _FIT_BATCHES
    ranks = (1,) if family.rank_one else _FIT_RANKS
    return [(batch, length, rank) for rank in ranks for batch in batches for length in family.lengths[:3]]


def check_point(family: Family) -> Point:
    """A point off the grid, to see whether the surface holds there."""
    batch = 1 if family.single_batch else _CHECK_BATCH
    return batch, family.lengths[3], 1 if family.rank_one else _CHECK_RANK


class Family:
    """Points at which a step makes the same storages, so that only their sizes differ.

    With one sequence, one token, or rank one, some copies are left out; beyond a sliding window a mask is made.

    Args:
        point: One of the points.
        thresholds: Sequence lengths from which something changes.
        shares: Ranks are divided among so many GPUs; those that cannot be are a family for themselves. 0: each rank is.
    """

    def __init__(self, point: Point, thresholds: Sequence[int], shares: int = 1) -> None:
        batch, length, rank = point
        self.single_batch = batch == 1
        self.rank_one = rank == 1
        self.shares = shares
        self.alone = rank if not shares or rank % shares else 0
        low = max((t for t in thresholds if t <= length), default=2) if length > 1 else 1
        high = min((t for t in thresholds if t > length), default=low + 10**6) if length > 1 else 2
        self.between = low, high
        stride = max(1, min(64, (high - low) // 5))
        self.lengths = [low + stride * step for step in range(1, 5)]

    @property
    def reach(self) -> tuple[int, int]:
        """What families have in common whose steps may be alike."""
        return self.between[0], self.alone

    @property
    def key(self) -> tuple[bool, bool, int, int]:
        """What tells it from other families."""
        return self.single_batch, self.rank_one, *self.reach

    def widest(self) -> Family:
        """The family within the same reach with several sequences, and ranks above one."""
        other = copy.copy(self)
        other.single_batch = other.rank_one = False
        return other


def fitted(
    family: Family, sizes_at: Callable[[Point], tuple[Any, NDArray[np.int64]]], tolerance: float
) -> tuple[Any, Surface] | None:
    """A surface through the points of a family, and what all its steps share; None if one does not hold.

    Args:
        family: Where.
        sizes_at: What the step at a point shares with others of its kind, and the sizes of its storages.
        tolerance: Share of all bytes that the surface may miss at a point off the grid.
    """
    points = grid(family)
    shared, first = sizes_at(points[0])
    rows = [first]
    for point in points[1:]:
        other, sizes = sizes_at(point)
        if other != shared:
            return None
        rows.append(sizes)
    surface = Surface(points, np.array(rows))
    other, truth = sizes_at(check_point(family))
    if other != shared or np.abs(surface(check_point(family)) - truth).sum() > tolerance * truth.sum():
        return None
    return shared, surface

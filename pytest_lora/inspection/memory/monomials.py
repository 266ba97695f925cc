"""Sizes as single products of batch size, sequence length and rank, found from two traces; exact or refused."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytest_lora.inspection.memory.sizes import Family, Point

MOST_PARTS = 4096
"""Largest denominator of a coefficient: what is packed or shared among GPUs is a fraction of a product."""

_BATCHES = (37, 41, 43)
_RANKS = (23, 29, 31)
_LENGTHS = (211, 223, 97, 29, 13)
"""Primes that divide no usual width, so that what is found at such a point and another one is no coincidence.

Batches and ranks do not grow in step: at three points a constant beside one of them is none beside the other."""


class _Kind(NamedTuple):
    """A product: powers of batch and rank, and a length; labels that are shifted have one token more or less."""

    batch: int
    length: int
    shift: int
    rank: int

    def at(self, point: Point) -> int:
        batch, length, rank = point
        return int(batch**self.batch * (length + self.shift) ** self.length * rank**self.rank)


_KINDS = tuple(
    _Kind(batch, length, shift, rank)
    for length, shift in ((0, 0), (1, 0), (2, 0), (1, 1), (1, -1))
    for batch in (0, 1)
    for rank in (0, 1)
)


def further_points(
    first: Point, family: Family, avoided: Container[int] = (), ranks: Iterable[int] = ()
) -> Iterator[Point]:
    """Points of a family at which every kind of product can be told from every other, given the first point.

    Args:
        first: The point that is known.
        family: Where.
        avoided: Lengths that mean something else to the model: a tensor as long as the vocabulary is taken for logits.
        ranks: Those that are tried before others, as there are models of them.
    """
    low, high = family.between
    lengths = [n for n in (*_LENGTHS, *(low + n for n in _LENGTHS)) if low <= n < high and n not in avoided]
    lengths = [1] if low == 1 else _others(lengths, first[1])
    if not lengths:
        return
    batches = [1] if family.single_batch else _others(_BATCHES, first[0])
    own = 1 if family.rank_one else family.alone
    known = [rank for rank in ranks if rank > 1 and family.shares and not rank % family.shares]
    ranks = [own] if own else _others((*known, *(family.shares * rank for rank in _RANKS)), first[2])
    steps = max(len(lengths), len(batches), len(ranks))
    for i in range(steps):
        point = batches[i % len(batches)], lengths[i % len(lengths)], ranks[i % len(ranks)]
        moved = [one != other for one, other in zip(first, point, strict=True)]
        fixed = len(batches) == 1, low == 1, len(ranks) == 1
        if any(moved) and all(map(max, moved, fixed)) and _kinds_by_ratio(first, point) is not None:
            yield point


def _others(values: Iterable[int], first: int) -> list[int]:
    """Each value once, but for the one that is known."""
    return [value for value in dict.fromkeys(values) if value != first]


def _kinds_by_ratio(first: Point, second: Point) -> dict[Fraction, _Kind] | None:
    """Kinds by how much they are more at one point than at another; None where two of them are alike in that.

    What does not differ between the points counts as a part of the coefficient.
    """
    known: dict[Fraction, _Kind] = {}
    for kind in _KINDS:
        powers = kind.batch, kind.length, kind.rank
        if any(power and one == other for power, one, other in zip(powers, first, second, strict=True)):
            continue
        here, there = kind.at(first), kind.at(second)
        if not here or not there or Fraction(here, there) in known:
            return None
        known[Fraction(here, there)] = kind
    return known


class NotMonomialError(Exception):
    """A value is no single product of batch size, sequence length and rank."""


class Term(NamedTuple):
    """A coefficient, the product that it multiplies, and a constant beside them."""

    coefficient: Fraction
    kind: _Kind
    beside: int = 0


def products(points: Sequence[Point], values: Sequence[Sequence[int]]) -> list[Term]:
    """Each value as one product, or with a third point as one product and a constant.

    Args:
        points: Two or three points; see ``further_points``.
        values: The values at each of them.

    Raises:
        NotMonomialError: One of the values is nothing of the kind.
    """
    kinds = _kinds_by_ratio(*points[:2]) or {}
    columns = list(zip(*values, strict=True))
    terms = {column: _term(points, column, kinds) for column in dict.fromkeys(columns)}
    return [terms[column] for column in columns]


def _term(points: Sequence[Point], column: tuple[int, ...], kinds: dict[Fraction, _Kind]) -> Term:
    if not any(column):
        return Term(Fraction(0), _KINDS[0])
    kind = kinds.get(Fraction(column[0], column[1])) if column[1] else None
    alone = Term(Fraction(column[0], kind.at(points[0])), kind) if kind is not None else None
    sums = (_with_constant(points, column, kind) for kind in kinds.values()) if len(points) > 2 else ()
    if alone is not None and _holds(alone, points, column):
        return alone
    found = [term for term in sums if term is not None and _holds(term, points, column)]
    if len(found) != 1:
        raise NotMonomialError
    return found[0]


def _with_constant(points: Sequence[Point], column: tuple[int, ...], kind: _Kind) -> Term | None:
    rise = kind.at(points[1]) - kind.at(points[0])
    if not rise:
        return None
    coefficient = Fraction(column[1] - column[0], rise)
    beside = column[0] - coefficient * kind.at(points[0])
    whole = beside.denominator == 1 and beside > 0 and coefficient > 0
    return Term(coefficient, kind, int(beside)) if whole else None


def _holds(term: Term, points: Sequence[Point], column: tuple[int, ...]) -> bool:
    said = (term.coefficient * term.kind.at(point) + term.beside for point in points)
    return term.coefficient.denominator <= MOST_PARTS and tuple(said) == column


class Monomials:
    """Values that are each a coefficient times one product of batch size, sequence length and rank."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self._kinds = list(dict.fromkeys(term.kind for term in terms))
        self._of = np.array([self._kinds.index(term.kind) for term in terms])
        self._times = np.array([term.coefficient.numerator for term in terms], dtype=np.int64)
        self._parts = np.array([term.coefficient.denominator for term in terms], dtype=np.int64)
        self._beside = np.array([term.beside for term in terms], dtype=np.int64)

    def __call__(self, point: Point) -> NDArray[np.int64]:
        """The values at a point, shape (values,)."""
        kinds = np.array([kind.at(point) for kind in self._kinds], dtype=np.int64)
        values: NDArray[np.int64] = self._beside - (-kinds[self._of] * self._times // self._parts)
        return values


class Total:
    """A sum of many such values, each so many times.

    Args:
        terms: The values.
        times: How often each counts.
    """

    def __init__(self, terms: Iterable[Term], times: Iterable[int]) -> None:
        self._sums: dict[_Kind, Fraction] = {}
        for term, count in zip(terms, times, strict=True):
            self._sums[term.kind] = self._sums.get(term.kind, Fraction(0)) + count * term.coefficient
            self._sums[_KINDS[0]] = self._sums.get(_KINDS[0], Fraction(0)) + count * term.beside

    def __call__(self, point: Point) -> int:
        """The sum at a point."""
        return int(sum((total * kind.at(point) for kind, total in self._sums.items()), Fraction(0)))

"""Sizes as single products: where they are looked for, what they are, and what is none; numbers written out."""

from __future__ import annotations

from fractions import Fraction
from itertools import islice
from typing import Any

import pytest

from pytest_lora.inspection.memory.monomials import (
    Monomials,
    NotMonomialError,
    Term,
    Total,
    _Kind,
    further_points,
    products,
)
from pytest_lora.inspection.memory.sizes import Family, Point

OF_RANK, OF_BATCH, NOTHING = _Kind(0, 0, 0, 1), _Kind(1, 0, 0, 0), _Kind(0, 0, 0, 0)


@pytest.mark.parametrize(
    ("first", "thresholds", "shares", "avoided", "points"),
    [
        ((2, 30, 6), (), 1, (), [(37, 211, 23), (41, 223, 29), (43, 97, 31), (37, 29, 23), (41, 13, 29)]),
        ((2, 30, 8), (), 4, (), [(37, 211, 92), (41, 223, 116), (43, 97, 124)]),
        ((2, 30, 6), (), 4, (), [(37, 211, 6), (41, 223, 6), (43, 97, 6)]),
        ((2, 30, 6), (), 0, (), [(37, 211, 6), (41, 223, 6), (43, 97, 6)]),
        ((2, 30, 6), (), 1, (211, 223, 97, 29), [(37, 13, 23), (41, 213, 29), (43, 225, 31)]),
        ((2, 20, 6), (13, 29), 1, (), [(37, 13, 23), (41, 26, 29)]),
        ((2, 20, 6), (14, 18), 1, (211, 223, 97, 29, 31), [(37, 229, 23), (41, 241, 29), (43, 115, 31)]),
        ((2, 30, 6), (29, 31), 1, (), [(37, 29, 23), (41, 29, 29)]),
        ((2, 30, 6), (28, 31), 1, (29,), []),
        ((1, 30, 6), (), 1, (), [(1, 211, 23), (1, 223, 29), (1, 97, 31)]),
        ((2, 30, 1), (), 1, (), [(37, 211, 1), (41, 223, 1), (43, 97, 1)]),
        ((1, 30, 1), (), 1, (), [(1, 211, 1), (1, 223, 1), (1, 97, 1)]),
        ((2, 1, 6), (), 1, (), [(37, 1, 23), (41, 1, 29)]),
        ((1, 1, 1), (), 1, (), []),
        ((37, 223, 23), (), 1, (), [(41, 211, 29), (43, 97, 31), (41, 29, 29), (43, 13, 31)]),
    ],
)
def test_further_points_differ_in_all_that_may_differ(
    first: Point, thresholds: tuple[int, ...], shares: int, avoided: tuple[int, ...], points: list[Point]
) -> None:
    found = list(further_points(first, Family(first, thresholds, shares), avoided))
    assert found[: max(1, len(points))] == points


@pytest.mark.parametrize(
    ("shares", "ranks", "tried"),
    [(1, (1, 2, 8, 12), [2, 8, 23]), (4, (1, 2, 8, 4), [8, 4, 92]), (0, (1, 2, 8), [12, 12, 12])],
)
def test_ranks_of_which_there_are_models_are_tried_first(
    shares: int, ranks: tuple[int, ...], tried: list[int]
) -> None:
    first = (2, 30, 12)
    points = islice(further_points(first, Family(first, (), shares), ranks=ranks), 3)
    assert [rank for _, _, rank in points] == tried


def test_three_points_tell_a_constant_beside_the_rank_from_one_beside_the_batch() -> None:
    """A layer that is gathered as a whole is its base weights and a multiple of the rank."""
    first = (37, 211, 184)
    points = [first, *islice(further_points(first, Family(first, (), 8).widest()), 2)]
    layers, rows = (
        [[10**6 + 7 * rank] for _, _, rank in points],
        [[10**6 + 7 * batch] for batch, _, _ in points],
    )
    assert products(points, layers) == [Term(Fraction(7), OF_RANK, 10**6)]
    assert products(points, rows) == [Term(Fraction(7), OF_BATCH, 10**6)]


def test_a_family_reaches_to_the_next_threshold() -> None:
    assert Family((2, 10, 8), ()).between == (2, 1_000_002)
    assert Family((2, 10, 8), (4, 12)).between == (4, 12)
    assert Family((2, 1, 8), (4, 12)).between == (1, 2)
    assert Family((2, 10, 8), (), 4).key == (False, False, 2, 0)
    assert Family((2, 10, 6), (), 4).key == (False, False, 2, 6)
    assert Family((2, 10, 6), (), 0).alone == 6
    wide = Family((1, 10, 1), ()).widest()
    assert (wide.key, wide.shares) == ((False, False, 2, 0), 1)
    assert Family((2, 10**6, 8), (10,)).between == (10, 10**6 + 10)


THREE = [(4096, 5, 5), (8192, 7, 11), (12288, 19, 13)]


def column(size: Any, points: list[Point]) -> list[list[Any]]:
    return [[size(*point)] for point in points]


@pytest.mark.parametrize(
    ("size", "term"),
    [
        (lambda b, n, r: 0, Term(Fraction(0), NOTHING)),
        (lambda b, n, r: 12, Term(Fraction(12), NOTHING)),
        (lambda b, n, r: 3 * r, Term(Fraction(3), OF_RANK)),
        (lambda b, n, r: b // 4096, Term(Fraction(1, 4096), OF_BATCH)),
        (lambda b, n, r: 6 * b * (n + 1) * r, Term(Fraction(6), _Kind(1, 1, 1, 1))),
        (lambda b, n, r: 6 * b * (n - 1), Term(Fraction(6), _Kind(1, 1, -1, 0))),
        (lambda b, n, r: 2 * n * n * r, Term(Fraction(2), _Kind(0, 2, 0, 1))),
    ],
)
def test_one_product_is_found_from_two_points(size: Any, term: Term) -> None:
    assert products(THREE[:2], column(size, THREE[:2])) == [term]


@pytest.mark.parametrize(
    "size",
    [
        lambda b, n, r: b * r * n + n,
        lambda b, n, r: {4096: 0}.get(b, 7),
        lambda b, n, r: {8192: 0}.get(b, 7),
        lambda b, n, r: r + 3,
    ],
)
def test_what_two_points_do_not_make_a_product_is_none(size: Any) -> None:
    with pytest.raises(NotMonomialError):
        products(THREE[:2], column(size, THREE[:2]))


def test_a_coefficient_has_no_larger_denominator_than_what_is_packed() -> None:
    points = [(8192, 5, 5), (16384, 7, 11)]
    with pytest.raises(NotMonomialError):
        products(points, column(lambda b, n, r: b // 8192, points))


@pytest.mark.parametrize(
    ("size", "term"),
    [
        (lambda b, n, r: 3 * r + 7, Term(Fraction(3), OF_RANK, 7)),
        (lambda b, n, r: 3 * r, Term(Fraction(3), OF_RANK)),
        (lambda b, n, r: b // 4096 + 1, Term(Fraction(1, 4096), OF_BATCH, 1)),
        (lambda b, n, r: (r - 1) // 2 + 4, None),  # half a byte beside
        (lambda b, n, r: 3 * r - 7, None),
        (lambda b, n, r: 100 - 3 * r, None),
        (lambda b, n, r: {5: 10, 11: 13}.get(r, 17), None),  # holds at two points, not at the third
    ],
)
def test_a_constant_beside_needs_a_third_point(size: Any, term: Term | None) -> None:
    if term is None:
        with pytest.raises(NotMonomialError):
            products(THREE, column(size, THREE))
    else:
        assert products(THREE, column(size, THREE)) == [term]


def test_values_at_another_point() -> None:
    terms = [
        Term(Fraction(1, 3), OF_RANK, 5),
        Term(Fraction(2), _Kind(1, 1, -1, 0)),
        Term(Fraction(1, 3), OF_RANK),
        Term(Fraction(0), NOTHING),
    ]
    # Packed bytes are whole: a third of four is two.
    assert Monomials(terms)((6, 11, 4)).tolist() == [7, 120, 2, 0]
    assert Total(terms, [3, 10, 1, 9])((6, 11, 9)) == 3 * (3 + 5) + 10 * 120 + 3
    assert Total(terms, [0, 0, 0, 0])((6, 11, 9)) == 0

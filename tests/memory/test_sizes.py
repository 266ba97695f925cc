"""Sizes of storages as polynomials: exact wherever a storage is a product of what it may depend on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lora.inspection.memory.sizes import Family, Point, Surface, check_point, fitted, grid


def storages(point: Point) -> np.ndarray:
    batch, length, rank = point
    return np.array(
        [4096, 2 * rank * 64, 4 * batch * length * 96, batch * 8 * length**2, batch * length * rank, 7]
    )


@settings(max_examples=25)
@given(st.integers(1, 64), st.integers(3, 5000), st.integers(1, 256))
def test_a_surface_is_exact_at_every_point_of_its_family(batch: int, length: int, rank: int) -> None:
    family = Family((batch, length, rank), ())
    points = grid(family)
    surface = Surface(points, np.array([storages(point) for point in points]))
    for point in ((batch, length, rank), check_point(family)):
        assert surface(point).tolist() == storages(point).tolist()


@pytest.mark.parametrize(
    ("point", "thresholds", "lengths"),
    [
        ((2, 10, 8), (), [66, 130, 194, 258]),
        ((2, 10, 8), (4, 12), [5, 6, 7, 8]),
        ((2, 10, 8), (4, 14), [6, 8, 10, 12]),
        ((2, 12, 8), (4, 12), [76, 140, 204, 268]),
        ((2, 11, 8), (4, 12), [5, 6, 7, 8]),
        ((2, 4096, 8), (1024, 4096), [4160, 4224, 4288, 4352]),
        ((2, 4095, 8), (1024, 4096), [1088, 1152, 1216, 1280]),
        ((2, 3, 8), (4,), [3, 4, 5, 6]),
        ((2, 200, 8), (100, 410), [162, 224, 286, 348]),
    ],
)
def test_lengths_lie_on_one_side_of_every_threshold(
    point: Point, thresholds: tuple[int, ...], lengths: list[int]
) -> None:
    assert Family(point, thresholds).lengths == lengths


def test_one_sequence_and_rank_one_are_families_of_their_own() -> None:
    keys = {
        Family(point, (100,)).key for point in ((1, 50, 1), (1, 50, 2), (2, 50, 1), (2, 50, 2), (2, 100, 2))
    }
    assert len(keys) == 5
    assert Family((9, 99, 64), (100,)).key == Family((2, 3, 2), (100,)).key
    single = Family((1, 50, 1), ())
    assert {(batch, rank) for batch, _, rank in grid(single)} == {(1, 1)}
    assert check_point(single)[::2] == (1, 1)
    several = Family((2, 50, 2), ())
    assert {(batch, rank) for batch, _, rank in grid(several)} == {(2, 8), (2, 16), (3, 8), (3, 16)}
    assert [point[2] for point in grid(several)] == [8] * 6 + [16] * 6
    assert {length for _, length, _ in grid(several)} == set(several.lengths[:3])
    assert check_point(several) == (5, several.lengths[3], 12)


@pytest.mark.parametrize(("missed", "holds"), [(0, True), (9, True), (11, False)])
def test_a_surface_that_misses_more_than_its_share_is_none(missed: int, holds: bool) -> None:
    family = Family((2, 50, 2), ())

    def sizes_at(point: Point) -> tuple[str, np.ndarray]:
        return "alike", np.array([10_000 + missed * (point == check_point(family))])

    found = fitted(family, sizes_at, 0.001)
    assert (found is not None) is holds
    if found is not None:
        assert found[0] == "alike"
        assert found[1]((7, 77, 7)).tolist() == [10_000]


@pytest.mark.parametrize("other", [1, -1])
def test_steps_that_share_nothing_have_no_surface(other: int) -> None:
    family = Family((2, 50, 2), ())
    odd = grid(family)[other] if other > 0 else check_point(family)
    assert fitted(family, lambda point: (point == odd, np.array([1])), 0.5) is None

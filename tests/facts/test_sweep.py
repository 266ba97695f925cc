"""Shares, rates and the frontier of a sweep, at their bounds."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lora.facts.sweep import frontier, is_enough, percent, rate_text, spread_out


@pytest.mark.parametrize(
    ("share", "enough"),
    [(0.95, True), (0.95 - 5e-10, True), (0.95 - 2e-9, False), (1.0, True), (0.9, False)],
)
def test_a_share_is_enough_but_for_rounding(share: float, enough: bool) -> None:
    assert is_enough(share, 0.95) is enough


@pytest.mark.parametrize(
    ("share", "limit", "text"),
    [
        (0.978, None, "97.8 %"),
        (0.97849, None, "97.8 %"),
        (-0.0, None, "0 %"),
        (0.0, None, "0 %"),
        (9.99, None, "999 %"),
        (9.9949, None, "999 %"),
        (9.9951, None, "1000 %"),
        (-12.3456, None, "-1235 %"),
        (0.95, 0.95, "95 %"),
        (0.95 + 4e-10, 0.95, "95 %"),
        (0.94999, 0.95, "94.999 %"),
        (0.95001, 0.95, "95.001 %"),
        (0.94999, None, "95 %"),
        (0.9499999, 0.95, "94.99999 %"),
        (0.90004, 0.95, "90 %"),
    ],
)
def test_a_share_has_as_many_digits_as_show_its_side(share: float, limit: float | None, text: str) -> None:
    assert percent(share, limit) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (3e-4, "3e-4"),
        (2.5e-5, "2.5e-5"),
        (0.1, "0.1"),
        (0.01, "0.01"),
        (0.0099, "9.9e-3"),
        (1e-10, "1e-10"),
        (1.23456e-4, "1.235e-4"),
        (1.0, "1"),
    ],
)
def test_a_rate_is_written_as_people_write_it(rate: float, text: str) -> None:
    assert rate_text(rate) == text
    assert float(text) == pytest.approx(rate, rel=1e-3)


points = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=7)


@settings(max_examples=60)
@given(points, st.booleans())
def test_the_frontier_is_what_no_other_point_beats(given: list[tuple[int, int]], maximise: bool) -> None:
    sign = 1 if maximise else -1
    kept = frontier([(float(price), float(metric)) for price, metric in given], maximise)
    assert [given[n][0] for n in kept] == sorted({given[n][0] for n in kept})
    for price, metric in given:
        beaten = any(p <= price and sign * m >= sign * metric and (p, m) != (price, metric) for p, m in given)
        assert ((price, metric) in [given[n] for n in kept]) is not beaten


@settings(max_examples=60)
@given(st.lists(st.floats(0, 100), max_size=7), st.floats(0.5, 20))
def test_labels_keep_their_gap_and_stay_near(places: list[float], gap: float) -> None:
    found = spread_out(places, gap)
    order = sorted(range(len(places)), key=lambda n: places[n])
    for before, after in pairwise(order):
        assert found[after] - found[before] >= gap * (1 - 1e-9)
    assert sum(found) == pytest.approx(sum(places))
    if all(places[b] - places[a] >= gap for a, b in pairwise(order)):
        assert found == pytest.approx(places)


def test_labels_move_no_more_than_they_have_to() -> None:
    assert spread_out([0.0, 0.0], 2.0) == [-1.0, 1.0]
    assert spread_out([0.0, 2.0], 2.0) == [0.0, 2.0]
    assert spread_out([10.0, 0.0, 1.0], 2.0) == [10.0, -0.5, 1.5]
    assert spread_out([0.0, 1.0, 2.5], 2.0) == pytest.approx([3.5 / 3 - 2, 3.5 / 3, 3.5 / 3 + 2])
    assert math.isclose(sum(spread_out([0.0, 1.0, 1.0, 9.0], 2.0)), 11.0)

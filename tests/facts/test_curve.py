"""The statistics of a curve are what they are said to be: by another way to the same number, and at their bounds."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise, permutations
from statistics import fmean, pstdev

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lora.facts.curve import (
    Jump,
    Level,
    alternation,
    clearest_fall,
    cycles,
    deviations,
    jump,
    level,
    levels,
    noise,
    repetition,
    smoothed,
    swings,
    trend,
    typical,
)
from pytest_lora.facts.curve_shape import curve_facts, wander

curves = st.lists(st.floats(0.2, 20), min_size=10, max_size=90)


def step(size: float, at: int, count: int) -> list[float]:
    """A curve of ones that goes up by ``size`` and stays there."""
    return [1.0 + size * (i >= at) for i in range(count)]


# ------------------------------------------------------------------ running means


def running_mean(width: int, count: int) -> list[float]:
    draw = random.Random(width)
    raw = [draw.gauss(0, 1) for _ in range(count + width)]
    return [fmean(raw[i : i + width]) for i in range(count)]


def test_a_running_mean_strays_as_far_as_its_steps_add_up() -> None:
    walk = running_mean(40, 400)
    steps = [after - before for before, after in pairwise(walk)]
    assert wander(walk, 0) == pytest.approx(typical(steps) * math.sqrt(399))
    assert wander(walk, 200) == pytest.approx(typical(steps[200:]) * math.sqrt(199))
    assert wander(walk, 385) == 0, "too few steps to tell"
    assert wander(walk[:90], 0) == 0
    assert wander(running_mean(1, 400), 0) == 0, "white noise"


def test_a_quiet_fall_before_noise_is_no_running_mean() -> None:
    assert wander([*(9.0 - i / 50 for i in range(400)), *running_mean(1, 100)], 400) == 0


# ------------------------------------------------------------------ trend


def score(values: tuple[int, ...]) -> int:
    """How many pairs rise less how many fall."""
    pairs = [(a, b) for i, a in enumerate(values) for b in values[i + 1 :]]
    return sum(a < b for a, b in pairs) - sum(a > b for a, b in pairs)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 5), min_size=4, max_size=6))
def test_a_trend_is_the_score_in_deviations_over_all_orders(values: list[int]) -> None:
    spread = pstdev(score(order) for order in permutations(values))
    assert trend(values) == pytest.approx(score(tuple(values)) / spread if spread else 0.0)


def test_a_trend_needs_four_values_and_joins_what_is_more_than_two_hundred() -> None:
    assert trend([3, 2, 1]) == 0
    assert trend([4, 3, 2, 1]) < 0
    rng = random.Random(0)
    values = [rng.random() - i / 300 for i in range(402)]
    assert trend(values) == trend([fmean(values[i : i + 3]) for i in range(0, 402, 3)])
    assert trend(values[:201]) == trend([fmean(values[:201][i : i + 2]) for i in range(0, 201, 2)])
    alone = [(b > a) - (b < a) for i, a in enumerate(values[:200]) for b in values[i + 1 : 200]]
    assert trend(values[:200]) == pytest.approx(sum(alone) / math.sqrt(200 * 199 * 405 / 18))


# ------------------------------------------------------------------ levels


@given(curves)
def test_noise_is_of_second_differences(losses: list[float]) -> None:
    bends = numpy.abs(numpy.diff(losses, n=2))
    assert noise(losses) == pytest.approx(1.4826 * numpy.median(bends) / math.sqrt(6))


@given(curves, st.data())
def test_a_level_takes_its_error_from_the_two_dozen_losses_around_it(
    losses: list[float], data: st.DataObject
) -> None:
    count = data.draw(st.integers(3, min(20, len(losses))))
    first = data.draw(st.integers(0, len(losses) - count))
    width = min(len(losses), max(24, 2 * count))
    begin = min(max(0, first + count // 2 - width // 2), len(losses) - width)
    if len(losses) < max(24, 2 * count):
        begin = 0
    found = level(losses, first, count)
    assert found.value == numpy.median(losses[first : first + count])
    around = losses[begin : begin + width]
    assert found.error == pytest.approx(math.sqrt(math.pi / 2) * noise(around) / math.sqrt(count), rel=1e-4)
    assert losses[found.middle] == losses[first + count // 2]


@pytest.mark.parametrize(
    ("count", "size"), [(3, 3), (10, 3), (60, 3), (79, 3), (80, 4), (99, 4), (100, 5), (2000, 100)]
)
def test_levels_are_a_twentieth_and_cover_the_curve(count: int, size: int) -> None:
    known = levels([float(i) for i in range(count)])
    assert {one.count for one in known} == {size}
    assert [one.first for one in known[:-1]] == list(range(0, (len(known) - 1) * size, size))
    assert known[-1].first == count - size
    assert known[-1].first - (known[-2].first if len(known) > 1 else -size) < 2 * size


def test_how_far_a_level_is_above_another() -> None:
    low, high = Level(0, 3, 2.0, 0.3), Level(3, 3, 4.0, 0.4)
    assert high.above(low) == pytest.approx(4.0)
    assert low.above(high) == pytest.approx(-4.0)
    exact = replace(low, error=0.0)
    assert exact.above(exact) == 0
    assert replace(high, error=0.0).above(exact) == math.inf
    assert exact.above(replace(high, error=0.0)) == -math.inf


# ------------------------------------------------------------------ falls, jumps, swings


@pytest.mark.parametrize("at", [3, 5, 10, 20, 33, 50, 66])
def test_a_fall_is_found_where_it_is(at: int) -> None:
    fall = clearest_fall(step(-0.5, at, 100))
    assert (fall.at, fall.size) == (at, pytest.approx(0.5))
    assert (fall.error, fall.resolution) == (0, 0)


@given(curves)
def test_the_error_of_a_fall_is_that_of_two_means(losses: list[float]) -> None:
    fall, count = clearest_fall(losses), len(losses)
    assert fall.size == pytest.approx(fmean(losses[: fall.at]) - fmean(losses[fall.at :]))
    assert fall.error == pytest.approx(noise(losses) * math.sqrt(1 / fall.at + 1 / (count - fall.at)))
    assert fall.resolution == pytest.approx(noise(losses) * math.sqrt(2 / count + 2 / count))


@pytest.mark.parametrize(
    ("at", "count", "seen"),
    [
        (4, 60, False),
        (5, 60, True),
        (18, 200, False),
        (20, 200, True),
        (50, 60, True),
        (52, 60, False),
        (6, 15, False),
        (6, 16, True),
    ],
)
def test_a_jump_lies_after_the_first_tenth_and_is_followed_by_nine_losses(
    at: int, count: int, seen: bool
) -> None:
    found = jump(step(1.0, at, count))
    assert (found is not None) is seen
    if found is not None:
        assert abs(found.at - at) <= 1
        assert (found.before, found.after) == (1.0, 2.0)


@pytest.mark.parametrize(("size", "seen"), [(0.76, True), (0.74, False)])
def test_a_jump_is_three_quarters_of_the_rise(size: float, seen: bool) -> None:
    climb = [1 + size + (1 - size) * i / 30 for i in range(31)]
    losses = [1.0] * 30 + [1 + size] * 6 + climb
    assert (jump([2 * loss for loss in losses]) is not None) is seen


@pytest.mark.parametrize(("outliers", "seen"), [(2, True), (3, False)])
def test_two_outliers_are_no_part_of_the_rise(outliers: int, seen: bool) -> None:
    losses = step(1.0, 30, 100)
    losses[3 : 3 + outliers] = [-3.0] * outliers
    losses[60] = 6.0
    assert (jump(losses) is not None) is seen


@pytest.mark.parametrize(("size", "seen"), [(6.1, True), (5.9, False)])
def test_a_jump_stands_out_of_the_noise(size: float, seen: bool) -> None:
    batches = [2.0, 2.1, 1.9] * 20  # any three in a row have a median of 2
    losses = [loss + size * noise(batches) * (i >= 30) for i, loss in enumerate(batches)]
    assert (jump(losses) is not None) is seen


@pytest.mark.parametrize(
    ("curve", "count"),
    [
        ([1, 2, 1], 1),
        ([1, 1.99, 1], 0),
        ([1, 2, 1.01], 0),
        ([1, 2, 1, 2, 1], 2),
        ([1, 2, 3, 2], 1),
        ([3, 2, 1, 2, 1], 1),
        ([0, 2, 0, -1, 0, -1], 2),
        ([1, 2], 0),
        ([2, 1, 1], 0),
    ],
)
def test_a_swing_goes_up_by_its_height_and_comes_back(curve: list[float], count: int) -> None:
    assert swings(curve, 1.0) == count


@pytest.mark.parametrize(("top", "count"), [(13.0, 1), (12.9, 0)])
def test_a_swing_is_three_tenths_of_the_start(top: float, count: int) -> None:
    up = [10 + (top - 10) * i / 20 for i in range(21)]
    assert curve_facts([10.0] * 5 + up + [top] * 3 + up[::-1] + [10.0] * 5).swings == count


# ------------------------------------------------------------------ what comes again


@given(curves)
def test_running_medians_and_deviations_from_running_means(losses: list[float]) -> None:
    for i, (smooth, share) in enumerate(zip(smoothed(losses, 5), deviations(losses), strict=True)):
        assert smooth == pytest.approx(numpy.median(losses[max(0, i - 2) : i + 3]))
        assert share == pytest.approx(losses[i] / numpy.mean(losses[max(0, i - 4) : i + 5]) - 1, abs=1e-12)
    assert typical(losses) == pytest.approx(1.4826 * numpy.median(losses))
    assert typical([-loss for loss in losses]) == typical(losses)
    assert deviations([0.0] * 9) == [0.0] * 9


@pytest.mark.parametrize(("half", "turns"), [(1, True), (2, True), (4, True), (5, False)])
def test_an_up_and_down_within_four_losses_alternates(half: int, turns: bool) -> None:
    wave = ([1.0] * half + [-1.0] * half) * 12
    assert (alternation(wave) > 0.95) is turns
    assert alternation([0.0] * 20) == alternation([1.0] * 20) == 0


@pytest.mark.parametrize(
    ("period", "count", "comes_again"),
    [(2, 6, True), (2, 5, False), (7, 21, True), (7, 20, False), (64, 192, True), (65, 200, False)],
)
def test_batches_come_again_after_a_third_of_the_losses(period: int, count: int, comes_again: bool) -> None:
    rng = random.Random(period)
    once = [rng.choice((-1, 1)) * rng.uniform(0.5, 1) for _ in range(period)]
    assert cycles([once[i % period] for i in range(count)]) is comes_again


@pytest.mark.parametrize(("share", "same"), [(0.1, True), (0.2, False)])
def test_batches_are_the_same_where_little_of_the_noise_is_left(share: float, same: bool) -> None:
    rng = random.Random(3)
    once = [rng.gauss(0, 1) for _ in range(8)]
    scale = typical(once)
    assert cycles([one + rng.gauss(0, share * scale) for _ in range(30) for one in once]) is same


@pytest.mark.parametrize(
    ("period", "count", "found"),
    [
        (1, 5, 1),
        (1, 4, None),
        (2, 6, 2),
        (2, 5, None),
        (5, 10, 5),
        (5, 9, None),
        (64, 128, 64),
        (65, 130, None),
    ],
)
def test_a_repetition_is_seen_twice_and_in_four_comparisons(
    period: int, count: int, found: int | None
) -> None:
    assert repetition([float(i % period) for i in range(count)]) == found


# ------------------------------------------------------------------ the whole


def test_a_curve_in_facts() -> None:
    rng = random.Random(4)
    losses = [4 * 0.97**i + 0.5 + rng.uniform(0, 0.1) for i in range(80)]
    losses[40:43] = [6.0, 7.0, 6.5]
    found = curve_facts(losses)
    assert found.start == level(losses, 0, 3)
    assert found.levels == levels(losses)
    assert found.end == levels(losses)[-1]
    assert found.lowest.value == min(one.value for one in found.levels)
    assert found.highest.value == max(one.value for one in found.levels)
    assert (found.peak, found.peak_at) == (max(smoothed(losses, 5)), numpy.argmax(smoothed(losses, 5)))
    assert found.trend == trend(losses)
    assert found.later_trend == trend(losses[20:])
    assert found.deviation == typical(deviations(losses))
    assert found.middle == numpy.median([one.value for one in found.levels])


@pytest.mark.parametrize(
    ("at", "z", "explained"),
    [(30, -4.1, False), (31, -4.1, True), (31, -4.0, False), (31, -3.9, False)],
)
def test_other_data_come_after_a_third_and_the_loss_falls_from_there(
    at: int, z: float, explained: bool
) -> None:
    found = curve_facts([2.0 - i / 100 for i in range(90)])
    assert not found.may_have_met_other_data
    assert replace(found, jump=Jump(at, 1.0, 2.0, z)).may_have_met_other_data is explained

"""What pictures are drawn from: places stay on the page, whatever the numbers."""

from __future__ import annotations

import dataclasses
import html
import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pytest_lora.facts.figures import AdapterMap, LossCurve, MemoryBudget, RankTrial, RatePoint, WhatIf
from pytest_lora.facts.sweep import frontier, spread_out
from pytest_lora.findings import Report
from pytest_lora.report.charts import Scale, curve_chart, memory_view, path, sweep_chart
from pytest_lora.report.digest import figures
from pytest_lora.report.map_view import map_view, number
from pytest_lora.report.markdown import markdown_report
from pytest_lora.report.page import _flops, _percent, _seconds, page
from pytest_lora.report.rate_charts import price_chart, rate_chart
from tests.report.sample import BROKEN, BUDGET, FALLING, MAP, SESSION, SWEEP, ran
from tests.report.test_figures import CURVES, SWEEPS, maps

LOSSES = st.floats(0, 1e6) | st.sampled_from([math.nan, math.inf])


@given(st.lists(st.floats(-1e9, 1e9), max_size=6), st.booleans())
@example([0.0, 5e-324], False)
def test_scales_hold_their_values_and_ticks(values: list[float], flip: bool) -> None:
    scale = Scale.over(values, flip=flip)
    assert all(0 <= scale(value) <= 100 for value in values)
    places = [place for place, _ in scale.ticks()]
    assert all(-0.01 <= place <= 100.01 for place in places)
    assert len(places) <= 6
    assert all((a > b) is flip for a, b in pairwise(places))


def test_ticks_are_round() -> None:
    assert [text for _, text in Scale(0.0, 4.3).ticks()] == ["0", "2", "4"]
    assert [text for _, text in Scale(3.91, 3.95).ticks()] == ["3.91", "3.92", "3.93", "3.94", "3.95"]


@given(st.lists(LOSSES, min_size=1, max_size=8))
def test_curves_stay_on_the_chart(losses: list[float]) -> None:
    steps = tuple(range(len(losses)))
    chart = curve_chart(
        dataclasses.replace(
            FALLING, steps=steps, losses=tuple(losses), window=(0, len(losses)), before=losses[0]
        )
    )
    points = [point for line in chart.lines for point in line]
    assert len(points) + len(chart.broken) == len(losses)
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in points)
    assert chart.before is None or 0 <= chart.before <= 100


def test_a_loss_that_is_not_finite_breaks_the_line() -> None:
    chart = curve_chart(BROKEN)
    assert [len(line) for line in chart.lines] == [25, 4]
    assert len(chart.broken) == 1


def test_noise_on_a_flat_curve_looks_flat() -> None:
    flat = dataclasses.replace(
        FALLING, losses=tuple(3.9 + 0.01 * (n % 3) for n in range(20)), before=3.9, after=3.9
    )
    (line,) = curve_chart(flat).lines
    heights = [y for _, y in line]
    assert max(heights) - min(heights) < 6


def test_the_axis_of_a_curve_follows_its_losses() -> None:
    falls = dataclasses.replace(
        FALLING, losses=tuple(2.3 - 0.02 * n for n in range(20)), before=2.3, after=1.92
    )
    (line,) = curve_chart(falls).lines
    heights = [y for _, y in line]
    assert max(heights) - min(heights) > 80


@given(CURVES | SWEEPS)
def test_anything_can_be_drawn(figure: object) -> None:
    if isinstance(figure, LossCurve):
        if len(figure.steps) == len(figure.losses) and len(figure.eval_steps) == len(figure.eval_losses):
            curve_chart(figure)
    else:
        sweep_chart(figure)
        rate_chart(figure)
        price_chart(figure)


def test_ranks_are_one_step_apart_and_failed_ones_have_no_point() -> None:
    chart = sweep_chart(SWEEP)
    assert [(round(x), text) for x, text in chart.x_ticks] == [(17, "4"), (50, "8"), (83, "16")]
    assert [(point.rank, point.chosen, point.spread is None) for point in chart.points] == [
        (4, False, False),
        (8, True, True),
    ]
    assert chart.enough == pytest.approx(Scale.over([0.926, 0.941, 0.894, 0.914], flip=True)(0.894))
    assert sweep_chart(dataclasses.replace(SWEEP, enough=None)).enough is None
    assert path([]) == ""
    assert path([(1, 2)]) == "M1 2L1 2"


def by_rate(rank: int, metrics: tuple[float, ...], flops: float, dropped: int = 0) -> RankTrial:
    points = tuple(
        RatePoint(rate, metric, 0.01 if index >= dropped else None, index >= dropped)
        for index, (rate, metric) in enumerate(zip((1e-4, 3e-4, 1e-3), metrics, strict=True))
    )
    return RankTrial(rank, max(metrics), 0.01, 100.0, flops, None, rank, rate=3e-4, rates=points)


RATED = dataclasses.replace(
    SWEEP,
    trials=(
        by_rate(4, (0.80, 0.85, 0.84), 1.00e15),
        by_rate(8, (0.70, 0.90, 0.84), 1.02e15, dropped=1),
        by_rate(16, (0.82, 0.88, 0.80), 1.05e15),
    ),
)


def test_a_chart_of_rates_has_a_line_a_rank_that_can_be_told_without_colour() -> None:
    chart = rate_chart(RATED)
    assert chart is not None
    assert [text for _, text in chart.x_ticks] == ["1e-4", "3e-4", "1e-3"]
    assert [(line.rank, line.chosen, line.shape) for line in chart.lines] == [
        (4, False, "●"),
        (8, True, "■"),
        (16, False, "▲"),
    ]
    eight = chart.lines[1]
    assert [mark.filled for mark in eight.marks] == [False, True, True]
    assert len(eight.line) == 2
    assert len(eight.band) == 4
    names = sorted(line.name_at for line in chart.lines)
    assert all(b - a >= 7.99 for a, b in pairwise(names))
    assert chart.has_open
    assert rate_chart(SWEEP) is None
    html = page(
        dataclasses.replace(SESSION, tests=(ran("t.py::t", "passed", Report("ranks", figures=(RATED,))),))
    )
    for text in (
        "accuracy by learning rate",
        "■ r=8",
        "l0",
        "l1 chosen",
        "open: dropped after a part of the training",
    ):
        assert text in html


def test_a_chart_of_prices_joins_what_is_worth_its_price() -> None:
    chart = price_chart(RATED)
    assert chart is not None
    assert chart.counted
    assert chart.more == "5 %"
    assert [(one.rank, one.marks[0].filled) for one in chart.marks] == [(4, True), (8, True), (16, False)]
    assert chart.frontier == tuple(one.marks[0].at for one in chart.marks[:2])
    timed = dataclasses.replace(
        RATED, trials=(*RATED.trials[:2], dataclasses.replace(RATED.trials[2], flops=None))
    )
    assert price_chart(timed).counted is False
    assert price_chart(dataclasses.replace(RATED, trials=RATED.trials[:1])) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=7), st.booleans())
def test_the_frontier_has_what_no_other_beats(points: list[tuple[int, int]], maximise: bool) -> None:
    found = [points[place] for place in frontier(points, maximise)]
    sign = 1 if maximise else -1
    for price, metric in points:
        beaten = any(
            p <= price and sign * m >= sign * metric and (p, m) != (price, metric) for p, m in points
        )
        assert beaten is not ((price, metric) in found)
    assert found == sorted(set(found))


@given(st.lists(st.floats(0, 100), max_size=7))
def test_names_keep_their_order_and_their_distance(places: list[float]) -> None:
    spread = spread_out(places, 8.0)
    order = sorted(range(len(places)), key=lambda n: places[n])
    assert all(spread[b] - spread[a] >= 8 - 1e-6 for a, b in pairwise(order))
    if all(places[b] - places[a] > 8 for a, b in pairwise(order)):
        assert spread == places


def test_a_map_has_a_grid_for_each_stack() -> None:
    two = dataclasses.replace(
        MAP, rows=tuple(f"{'encoder' if n < 8 else 'decoder'}.block.{n % 8}" for n in range(16))
    )
    view = map_view(two)
    assert [(stack.name, len(stack.layers)) for stack in view.stacks] == [
        ("encoder.block", 8),
        ("decoder.block", 8),
    ]
    assert [name for name, _ in view.stacks[0].lines] == list(MAP.columns)


def test_a_map_shows_states_shades_and_runs() -> None:
    view = map_view(MAP)
    assert {state: number for state, _, number in view.states} == {
        "dead": 2,
        "missing": 2,
        "frozen": 3,
        "idle": 3,
        "live": 38,
    }
    rank, scaling, gradient, _ = view.planes
    assert (rank.low, rank.high, set(rank.shades)) == ("8", "32", {0.1, 1.0, None})
    assert (scaling.low, scaling.high, set(scaling.shades)) == ("2", "2", {0.6, None})
    assert min(shade for shade in gradient.shades if shade is not None) == 0.0
    assert view.first == 2
    assert [(run.layers, run.state) for run in view.runs if run.module == "self_attn.v_proj"] == [
        ("0", "frozen"),
        ("1", "inactive, disabled or merged"),
        ("2", "trains"),
        ("3", "dead: no gradient reaches it"),
        ("4 to 8", "trains"),
        ("9", "dead: no gradient reaches it"),
        ("10 to 15", "trains"),
    ]


def test_a_saved_adapter_has_words_of_its_own() -> None:
    view = map_view(dataclasses.replace(MAP, gradients=(), saved=True))
    assert [plane.name for plane in view.planes] == ["Rank", "Scaling", "Update"]
    assert view.planes[2].unit == "root mean square of lora_B"
    assert {state: words for state, words, _ in view.states}["dead"] == (
        "holds nothing: a factor is all zero"
    )
    assert "trains" not in {run.state for run in view.runs}
    text = markdown_report(
        dataclasses.replace(SESSION, tests=(ran("t", "passed", Report("a", (), (SAVED,))),))
    )
    assert "saved, 41,943,040 numbers in LoRA factors\n" in text
    assert "| module | layers | state | rank | scaling | update |" in text
    assert "saved, <strong>41,943,040</strong> numbers in LoRA factors</p>" in page(
        dataclasses.replace(SESSION, tests=(ran("t", "passed", Report("a", (), (SAVED,))),))
    )


SAVED = dataclasses.replace(MAP, gradients=(), saved=True, total_parameters=0)


@given(maps())
def test_any_map_can_be_drawn(shown: AdapterMap) -> None:
    view = map_view(shown)
    drawn = [cell for stack in view.stacks for _, cells in stack.lines for cell in cells if cell.state]
    assert len(drawn) == sum(state is not None for state in shown.states)
    assert all(shade is None or 0 <= shade <= 1 for cell in drawn for shade in cell.shades)


@given(
    st.lists(st.integers(0, 2**40), min_size=1, max_size=12),
    st.integers(1, 2**40),
    st.none() | st.integers(0, 2**40),
)
def test_bars_stay_within_their_track(sizes: list[int], limit: int, measured: int | None) -> None:
    budget = MemoryBudget(
        "step",
        tuple((f"part {n}", size) for n, size in enumerate(sizes)),
        sum(sizes),
        sum(sizes),
        limit,
        "forward",
        (WhatIf("less", sizes[0], sizes[0] <= limit),),
        measured,
    )
    view = memory_view(budget)
    assert sum(part.percent for part in view.segments) <= 100.1
    assert [part.size for part in view.segments] == sorted(sizes, reverse=True)
    assert 0 <= view.limit <= 100
    assert all(0 <= place <= 100 for place in (view.peak, view.bars[0].percent, view.measured or 0))
    assert (view.peak <= view.limit) is budget.fits or abs(view.peak - view.limit) < 0.01


def test_the_figures_shows_each_once_and_failing_tests_first() -> None:
    shown = figures(SESSION)
    assert [one.figure for one in shown.curves.shown] == [BROKEN, FALLING]
    (budget,) = shown.budgets.shown
    assert [test.nodeid for test in budget.tests] == ["tests/test_memory.py::test_fits"]
    twice = dataclasses.replace(SESSION, tests=(*SESSION.tests, *SESSION.tests[2:3]))
    assert len(figures(twice).budgets.shown[0].tests) == 2
    many = tuple(
        ran(f"t::{n}", "passed", dataclasses.replace(SESSION.tests[1].reports[0], findings=()))
        for n in range(3)
    )
    assert len(figures(dataclasses.replace(SESSION, tests=many)).maps.shown) == 1


def test_a_measured_peak_joins_the_budget_of_its_test() -> None:
    test = dataclasses.replace(SESSION.tests[2], gpu=SESSION.tests[7].gpu)
    (shown,) = figures(dataclasses.replace(SESSION, tests=(test,))).budgets.shown
    assert shown.figure == dataclasses.replace(BUDGET, measured=36 * 2**30)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (number(None), ""),
        (number(2.0), "2"),
        (number(0.00012345), "0.0001234"),
        (number(math.nan), "nan"),
        (number(12345.6), "12,346"),
        (_percent(0.01), "< 0.1 %"),
        (_percent(4.34), "4.3 %"),
        (_percent(89.2), "89 %"),
        (_flops(3.1e15), "3.10 PFLOP"),
        (_flops(12.0), "12 FLOP"),
        (_seconds(0.4), "0.40 s"),
        (_seconds(141.2), "2 min 21 s"),
    ],
)
def test_numbers_read_well(shown: str, text: str) -> None:
    assert html.unescape(shown).replace("\u00a0", " ") == text

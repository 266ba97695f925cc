"""Where lines, bands and names lie on the two further charts of a sweep: by learning rate, and against the price."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_lora.facts.figures import RankSweep, RankTrial, RatePoint
from pytest_lora.facts.sweep import frontier, percent, rate_text, spread_out
from pytest_lora.report.charts import Point, Scale

SHAPES = "●■▲◆▼✚✖⬟"
"""A mark for each rank, so that ranks can be told without colour; their lines are dashed differently, too."""
NAME = 8.0
"""Height of a name beside a line, in percent of a chart."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A point: its place, and whether it is filled; an open one was dropped early, or is not worth its price."""

    at: Point
    filled: bool


@dataclass(frozen=True, slots=True)
class RankLine:
    """A rank on a chart.

    Attributes:
        rank: The rank.
        chosen: Whether it was chosen.
        index: Its place among the ranks, for shape and dashes.
        marks: Its points.
        line: Those that a line joins.
        band: Upper and lower edge of the spread over seeds, as one closed outline; empty for single seeds.
        name_at: Height of its name at the right.
    """

    rank: int
    chosen: bool
    index: int
    marks: tuple[Mark, ...]
    line: tuple[Point, ...]
    band: tuple[Point, ...]
    name_at: float

    @property
    def shape(self) -> str:
        """Its mark."""
        return SHAPES[self.index % len(SHAPES)]


@dataclass(frozen=True, slots=True)
class RateChart:
    """The metric by learning rate, a line a rank."""

    lines: tuple[RankLine, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]

    @property
    def has_open(self) -> bool:
        """Whether a rate was dropped early."""
        return any(not mark.filled for line in self.lines for mark in line.marks)


def rate_chart(sweep: RankSweep) -> RateChart | None:
    """Lay out a sweep over ranks and rates; None where there are not two rates with a metric."""
    known = {
        trial.rank: [rate for rate in trial.rates if _is_known(rate.metric) and rate.rate > 0]
        for trial in sweep.trials
    }
    rates = sorted({rate.rate for own in known.values() for rate in own if math.isfinite(rate.rate)})
    if len(rates) < 2:
        return None
    x = Scale(math.log(rates[0]), math.log(rates[-1]))
    y = Scale.over([value for own in known.values() for rate in own for value in _ends(rate)], flip=True)
    lines = [
        _line(
            trial, index, trial.rank == sweep.chosen, [r for r in known[trial.rank] if r.rate in rates], x, y
        )
        for index, trial in enumerate(sweep.trials)
    ]
    lines = [line for line in lines if line.marks]
    places = spread_out([line.name_at for line in lines], NAME)
    return RateChart(
        lines=tuple(
            RankLine(one.rank, one.chosen, one.index, one.marks, one.line, one.band, round(place, 2))
            for one, place in zip(lines, places, strict=True)
        ),
        x_ticks=tuple((x(math.log(rate)), rate_text(rate)) for rate in rates),
        y_ticks=y.ticks(),
    )


def _line(
    trial: RankTrial, index: int, chosen: bool, rates: Sequence[RatePoint], x: Scale, y: Scale
) -> RankLine:
    full = [rate for rate in rates if rate.full]
    places = [(x(math.log(rate.rate)), *map(y, _ends(rate))) for rate in full]
    has_band = any(low != high for _, low, high in places)
    return RankLine(
        rank=trial.rank,
        chosen=chosen,
        index=index,
        marks=tuple(Mark((x(math.log(r.rate)), y(r.metric or 0.0)), r.full) for r in rates),
        line=tuple((x(math.log(r.rate)), y(r.metric or 0.0)) for r in full),
        band=tuple([(at, high) for at, _, high in places] + [(at, low) for at, low, _ in reversed(places)])
        if has_band
        else (),
        name_at=y(rates[-1].metric or 0.0) if rates else 0.0,
    )


def _ends(rate: RatePoint) -> tuple[float, float]:
    spread = rate.spread if _is_known(rate.spread) else 0.0
    return (rate.metric or 0.0) - (spread or 0.0), (rate.metric or 0.0) + (spread or 0.0)


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class PriceChart:
    """The metric of each rank against what its training costs.

    Attributes:
        marks: A point a rank; an open one is dearer than a better one.
        frontier: The points that are worth their price, joined.
        counted: Whether the price is operations; else it is seconds.
        more: How much more the dearest rank takes than the cheapest, such as ``"1.6 %"``.
        prices: Places and prices along the axis.
        y_ticks: Places and texts.
    """

    marks: tuple[RankLine, ...]
    frontier: tuple[Point, ...]
    counted: bool
    more: str
    prices: tuple[tuple[float, float], ...]
    y_ticks: tuple[tuple[float, str], ...]


def price_chart(sweep: RankSweep) -> PriceChart | None:
    """Lay out metric against operations, or seconds where not all were counted; None for fewer than two ranks."""
    trials = [(index, trial) for index, trial in enumerate(sweep.trials) if _is_known(trial.metric)]
    counted = all(_is_known(trial.flops) for _, trial in trials)
    points = [
        (index, trial, (trial.flops if counted else trial.seconds) or 0.0, trial.metric or 0.0)
        for index, trial in trials
    ]
    prices = [price for _, _, price, _ in points]
    if len(points) < 2 or not all(0 < price < math.inf for price in prices):
        return None
    low, high = min(prices), max(prices)
    room = 0.1 * (high - low) or 0.1 * high
    x = Scale(low - room, high + 2 * room)  # with room for the name at the right
    y = Scale.over([metric for *_, metric in points], flip=True)
    best = frontier([(price, metric) for _, _, price, metric in points], sweep.maximise)
    marks = tuple(
        RankLine(
            trial.rank,
            trial.rank == sweep.chosen,
            index,
            (Mark((x(price), y(metric)), place in best),),
            (),
            (),
            y(metric),
        )
        for place, (index, trial, price, metric) in enumerate(points)
    )
    return PriceChart(
        marks=marks,
        frontier=tuple(marks[place].marks[0].at for place in best),
        counted=counted,
        more=percent(high / low - 1),
        prices=tuple((x(price), price) for price in dict.fromkeys((low, high))),
        y_ticks=y.ticks(),
    )

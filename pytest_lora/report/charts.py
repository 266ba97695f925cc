"""Where points, ticks, levels and bars lie on a chart, in percent of its width and height from the top left."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pytest_lora.facts.figures import LossCurve, MemoryBudget, RankSweep
from pytest_lora.report.map_view import number

Point = tuple[float, float]

FLATTEST = 0.9
"""The axis of a loss chart follows the losses, and spans a tenth of the highest at least: what moves by less than
that is the noise of batches, which must not look like a landscape."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear scale from numbers to percent; ``flip`` for a vertical one, on which larger is higher."""

    low: float
    high: float
    flip: bool = False

    @classmethod
    def over(cls, values: Iterable[float], *, flip: bool = False) -> Scale:
        """A scale over all finite values; a vertical one with a little air above and below them."""
        known = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(known), max(known)
        if flip or low == high:
            air = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
            low, high = low - air, high + air
        return cls(low, high, flip)

    def __call__(self, value: float) -> float:
        """The place of a value."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(100 * (1 - share if self.flip else share), 2)

    def ticks(self, most: int = 4) -> tuple[tuple[float, str], ...]:
        """Round numbers within the scale: the place and the text of each."""
        rough = (self.high - self.low) / most
        # Below the smallest normal number there are no round ones.
        if not sys.float_info.min <= rough < math.inf:
            return ()
        magnitude = 10.0 ** math.floor(math.log10(rough))
        step = next(magnitude * m for m in (1, 2, 5, 10) if magnitude * m >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        values = [step * n for n in range(first, first + most + 2) if step * n <= self.high + step * 1e-9]
        return tuple((self(value), number(value + 0.0)) for value in values)


@dataclass(frozen=True, slots=True)
class CurveChart:
    """A loss curve, ready to be drawn.

    Attributes:
        lines: Stretches of finite training losses.
        evals: Losses on held-out data.
        broken: Where along the way a loss was not finite.
        x_ticks, y_ticks: Places and texts.
        window: Left and right edge of what was judged.
        before, after: Heights of the levels that were compared; None where there are none.
    """

    lines: tuple[tuple[Point, ...], ...]
    evals: tuple[Point, ...]
    broken: tuple[float, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    window: tuple[float, float]
    before: float | None
    after: float | None


def _finite(value: float | None) -> float | None:
    """A number that can be drawn; None for any other."""
    return value if value is not None and math.isfinite(value) else None


def curve_chart(curve: LossCurve) -> CurveChart:
    """Lay out a loss curve."""
    levels = [level for level in map(_finite, (curve.before, curve.after)) if level is not None]
    x = Scale.over([*curve.steps, *curve.eval_steps, *curve.window])
    known = [loss for loss in (*curve.losses, *curve.eval_losses, *levels) if math.isfinite(loss)]
    y = Scale.over([*known, FLATTEST * max(known, default=0.0)], flip=True)

    def height(level: float | None) -> float | None:
        known = _finite(level)
        return None if known is None else y(known)

    lines: list[list[Point]] = [[]]
    broken: list[float] = []
    for step, loss in zip(curve.steps, curve.losses, strict=True):
        if math.isfinite(loss):
            lines[-1].append((x(step), y(loss)))
        else:
            broken.append(x(step))
            lines.append([])
    evals = zip(curve.eval_steps, curve.eval_losses, strict=True)
    return CurveChart(
        lines=tuple(tuple(line) for line in lines if line),
        evals=tuple((x(step), y(loss)) for step, loss in evals if math.isfinite(loss)),
        broken=tuple(broken),
        x_ticks=tuple(tick for tick in x.ticks(6) if "." not in tick[1]),
        y_ticks=y.ticks(),
        window=(x(curve.window[0]), x(curve.window[1])),
        before=height(curve.before),
        after=height(curve.after),
    )


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """A rank on the chart: its place, the ends of its spread, and whether it was chosen."""

    at: Point
    spread: tuple[float, float] | None
    rank: int
    chosen: bool


@dataclass(frozen=True, slots=True)
class SweepChart:
    """A rank sweep, ready to be drawn: ranks one step apart, whatever their size; ``enough`` as a height."""

    points: tuple[SweepPoint, ...]
    enough: float | None
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def sweep_chart(sweep: RankSweep) -> SweepChart:
    """Lay out a sweep; ranks without a metric have a tick and no point."""
    x = Scale(-0.5, max(1, len(sweep.trials)) - 0.5)
    ends: dict[int, tuple[float, float]] = {}
    for index, trial in enumerate(sweep.trials):
        metric, spread = _finite(trial.metric), _finite(trial.spread) or 0.0
        if metric is not None:
            ends[index] = metric - spread, metric + spread
    enough = _finite(sweep.enough)
    levels = [] if enough is None else [enough]
    y = Scale.over([*(value for pair in ends.values() for value in pair), *levels], flip=True)
    points: list[SweepPoint] = []
    for index, (low, high) in ends.items():
        trial = sweep.trials[index]
        at = x(index), y((low + high) / 2)
        points.append(
            SweepPoint(at, (y(low), y(high)) if high > low else None, trial.rank, trial.rank == sweep.chosen)
        )
    return SweepChart(
        points=tuple(points),
        enough=None if enough is None else y(enough),
        x_ticks=tuple((x(index), str(trial.rank)) for index, trial in enumerate(sweep.trials)),
        y_ticks=y.ticks(),
    )


def path(points: Sequence[Point]) -> str:
    """Points as the data of an SVG path; a single one is a dot where line ends are round."""
    if not points:
        return ""
    (x, y), *others = points
    return f"M{x:g} {y:g}" + ("".join(f"L{x:g} {y:g}" for x, y in others) or f"L{x:g} {y:g}")


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the bar.

    Attributes:
        letter: What it is called in the bar and beside its name; without colour it is the only key.
        name: The category.
        size: Bytes.
        percent: Width in percent of the whole scale.
        share: Percent of the peak.
    """

    letter: str
    name: str
    size: int
    percent: float
    share: float


@dataclass(frozen=True, slots=True)
class Bar:
    """Another setting: what it is, its bytes, its width in percent, whether it fits."""

    change: str
    size: int
    percent: float
    fits: bool


@dataclass(frozen=True, slots=True)
class MemoryView:
    """A memory budget, ready to be drawn; places in percent of the scale."""

    segments: tuple[Segment, ...]
    bars: tuple[Bar, ...]
    peak: float
    limit: float
    measured: float | None


def memory_view(budget: MemoryBudget) -> MemoryView:
    """Lay out a budget: the scale ends where the largest of all bars does, a little beyond the budget at least."""
    largest = max(
        budget.peak_allocated, budget.peak_reserved, budget.measured or 0, *(w.peak for w in budget.what_if)
    )
    scale = max(largest, round(1.04 * budget.budget), 1)

    def percent(size: int) -> float:
        return round(100 * size / scale, 2)

    return MemoryView(
        segments=tuple(
            Segment(
                LETTERS[index % 26], name, size, percent(size), 100 * size / max(1, budget.peak_allocated)
            )
            for index, (name, size) in enumerate(sorted(budget.breakdown, key=lambda part: -part[1]))
        ),
        bars=tuple(Bar(one.change, one.peak, percent(one.peak), one.fits) for one in budget.what_if),
        peak=percent(budget.peak_allocated),
        limit=percent(budget.budget),
        measured=None if budget.measured is None else percent(budget.measured),
    )

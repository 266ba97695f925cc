"""Robust statistics of a loss curve, as pure functions: levels, noise, trends, falls, jumps, swings, repeats."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

BLOCKS = 20
"""Into about so many levels a curve is cut: one level is then the share of a run in which it can turn."""

SMALLEST_BLOCK = 3
"""The fewest losses whose median ignores an outlier."""

NOISE_WINDOW = 24
"""Losses around a level from which its noise is estimated, at least."""

_MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal variable over its median absolute deviation, 1 / 0.6745."""

_MEDIAN_TO_MEAN = 1.2533
"""Standard error of a median over that of a mean under normal noise, sqrt(pi / 2)."""

_LONGEST_CYCLE = 64
"""More batches than this are no "few batches in turn"; and the search stays linear in the number of losses."""

_LONGEST_LAG = 4
"""An up and down of longer period is a swing."""

_SAME_BATCH = 0.15
"""Share of the noise that is left between two visits to the same batch; of unlike batches all of it is."""

_TREND_POINTS = 200
"""Means of neighbouring losses that a trend is read from, at most: it takes the square of them in comparisons."""

_JUMP_NOISE = 6.0
"""A jump is higher than this many standard deviations of the noise; see ``SWING_NOISE`` for what white noise spans."""

_JUMP_DONE = 0.75
"""Share of the way from the lowest loss before to the highest after that a jump makes at once. Losses that blow
up climb over several steps, each by a factor of its own; new data raise the loss with their first batch."""


@dataclass(frozen=True, slots=True)
class Level:
    """Where a curve stood over a few neighbouring losses.

    Attributes:
        first: Index of the first of these losses.
        count: How many they are.
        value: Their median.
        error: Standard error of ``value``, from the noise around it.
    """

    first: int
    count: int
    value: float
    error: float

    @property
    def middle(self) -> int:
        """Index of the loss in the middle."""
        return self.first + self.count // 2

    def above(self, other: Level) -> float:
        """How many standard errors this level is above another."""
        error = math.hypot(self.error, other.error)
        rise = self.value - other.value
        return rise / error if error else math.copysign(math.inf, rise) if rise else 0.0


@dataclass(frozen=True, slots=True)
class Fall:
    """The clearest fall from all losses before some point to all losses after it.

    Attributes:
        at: Index of the first loss after it.
        size: Mean before less mean after.
        error: Standard error of ``size``.
        resolution: Standard error of the difference between the two halves of the curve: what could have
            been seen at all.
    """

    at: int
    size: float
    error: float
    resolution: float


@dataclass(frozen=True, slots=True)
class Jump:
    """The highest step up from one loss to the next that lasts, and makes most of a rise of the curve.

    Attributes:
        at: Index of the first loss after it.
        before: Median of the losses right before it.
        after: Median of the losses right after it.
        trend: What ``trend`` says of all losses from it on.
        again: The next one after it, of what follows it.
    """

    at: int
    before: float
    after: float
    trend: float
    again: Jump | None = None

    @property
    def last(self) -> Jump:
        """The last one of all."""
        return self.again.last if self.again else self


def trend(values: Sequence[float]) -> float:
    """Whether values rise or fall throughout: z of the rank test of Mann and Kendall, negative for a fall.

    Standard normal where there is no trend, whatever the distribution of the noise (Mann, Econometrica 13, 1945;
    Kendall, Rank Correlation Methods, 1975). 0 below four values.
    """
    width = max(1, -(-len(values) // _TREND_POINTS))
    means = [fmean(values[i : i + width]) for i in range(0, len(values), width)]
    count = len(means)
    if count < 4:
        return 0.0
    score = sum((b > a) - (b < a) for i, a in enumerate(means) for b in means[i + 1 :])
    ties = sum(t * (t - 1) * (2 * t + 5) for t in Counter(means).values())
    variance = (count * (count - 1) * (2 * count + 5) - ties) / 18
    return score / math.sqrt(variance) if variance else 0.0


def jump(losses: Sequence[float], since: int = 0) -> Jump | None:
    """The jump of a curve after its first tenth, if it has one: from one loss to the next, and not of a loss alone.

    ``since`` is the index of the first loss in the whole curve.
    """
    count, few = len(losses), SMALLEST_BLOCK
    places = range(max(2 * few, count // 10), count - 3 * few)
    sides = ((i, median(losses[i - few : i]), median(losses[i : i + few])) for i in places)
    found = max(sides, key=lambda side: side[2] - side[1], default=None)
    if found is None:
        return None
    at, before, after = found
    # The index of the highest difference may be one off where the noise is large; nothing depends on it.
    low, high = min(smoothed(losses[:at], few + 2)), max(smoothed(losses[at:], few + 2))
    if after - before < max(_JUMP_NOISE * noise(losses), _JUMP_DONE * (high - low)):
        return None
    return Jump(since + at, before, after, trend(losses[at:]), jump(losses[at:], since + at))


def apart_from_the_start(losses: Sequence[float], at: int) -> tuple[float, ...]:
    """By what shares the losses from an index on differ from those at the start: medians of 3, 3, 6, 12, ... each."""
    found: list[float] = []
    first, last = 0, SMALLEST_BLOCK
    while last <= min(at, len(losses) - at):
        before, after = median(losses[first:last]), median(losses[at + first : at + last])
        found.append(after / before - 1 if before else math.inf)
        first, last = last, 2 * last
    return tuple(found)


def noise(losses: Sequence[float]) -> float:
    """Standard deviation of the noise from loss to loss; neither a trend nor its bend counts. Three losses or more.

    From the median of the second differences, so that single jumps do not count either.
    """
    bends = (abs(a - 2 * b + c) for a, b, c in zip(losses, losses[1:], losses[2:], strict=False))
    return _MAD_TO_DEVIATION * median(bends) / math.sqrt(6)


def level(losses: Sequence[float], first: int, count: int) -> Level:
    """The level over ``count`` losses from index ``first``; at least three losses in all."""
    middle = first + count // 2
    half = max(NOISE_WINDOW // 2, count)
    around = losses[max(0, min(middle - half, len(losses) - 2 * half)) : max(middle + half, 2 * half)]
    error = _MEDIAN_TO_MEAN * noise(around) / math.sqrt(count)
    return Level(first, count, median(losses[first : first + count]), error)


def levels(losses: Sequence[float]) -> tuple[Level, ...]:
    """The levels from start to end, about ``BLOCKS`` of them; the last one holds the last loss."""
    count = min(len(losses), max(SMALLEST_BLOCK, len(losses) // BLOCKS))
    starts = list(range(0, len(losses) - count + 1, count))
    starts[-1] = len(losses) - count
    return tuple(level(losses, start, count) for start in starts)


def clearest_fall(losses: Sequence[float]) -> Fall:
    """Split the curve at several points and take the split with the clearest fall; at least six losses.

    A curve that has learned anything has fallen at one of them, however early or late it did.
    """
    deviation = noise(losses)
    count = len(losses)
    shares = (count // 20, count // 10, count // 5, count // 3, count // 2, 2 * count // 3)
    splits = sorted({max(SMALLEST_BLOCK, split) for split in shares} | {SMALLEST_BLOCK})
    falls = [_fall(losses, split, deviation) for split in splits]
    best = max(falls, key=lambda fall: fall[1] / fall[2] if fall[2] else fall[1])
    return Fall(*best, resolution=2 * deviation / math.sqrt(count))


def _fall(losses: Sequence[float], split: int, deviation: float) -> tuple[int, float, float]:
    before, after = losses[:split], losses[split:]
    error = deviation * math.sqrt(1 / len(before) + 1 / len(after))
    return split, fmean(before) - fmean(after), error


def smoothed(losses: Sequence[float], width: int) -> list[float]:
    """Running median over an odd number of losses, fewer at the ends: single outliers are gone."""
    half = width // 2
    return [median(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]


def swings(curve: Sequence[float], height: float) -> int:
    """How often a curve rose by ``height`` from its low and came down by as much again."""
    return sum(1 for _ in _peaks(curve, height))


def _peaks(curve: Sequence[float], height: float) -> Iterator[float]:
    low = high = curve[0]
    rising = False
    for value in curve:
        if rising:
            high = max(high, value)
            if value <= high - height:
                yield high
                rising, low = False, value
        else:
            low = min(low, value)
            if value >= low + height:
                rising, high = True, value


def deviations(losses: Sequence[float], width: int = 9) -> list[float]:
    """By what share each loss differs from the running mean around it."""
    half = width // 2
    around = [fmean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]
    return [loss / mean - 1 if mean else 0.0 for loss, mean in zip(losses, around, strict=True)]


def typical(values: Sequence[float]) -> float:
    """The median size of values around zero, scaled to a standard deviation."""
    return _MAD_TO_DEVIATION * median(map(abs, values))


def alternation(rest: Sequence[float]) -> float:
    """How strongly deviations turn round within few losses: the most negative autocorrelation, as 0 to 1.

    White noise gives about 0.2, a strict up and down 1.
    """
    power = fmean(r * r for r in rest)
    if not power:
        return 0.0
    return max(0.0, *(-_product(rest, lag) / power for lag in range(1, _LONGEST_LAG + 1)))


def _product(rest: Sequence[float], lag: int) -> float:
    return fmean(a * b for a, b in zip(rest, rest[lag:], strict=False))


def cycles(rest: Sequence[float]) -> bool:
    """Whether the same batches come again and again: deviations one cycle apart differ little."""
    little = _SAME_BATCH * math.sqrt(2) * typical(rest)
    return any(
        typical([after - before for before, after in zip(rest, rest[period:], strict=False)]) < little
        for period in range(2, min(_LONGEST_CYCLE, len(rest) // 3) + 1)
    )


def repetition(losses: Sequence[float]) -> int | None:
    """The period after which the same losses come again to the last digit; 1 if all are equal.

    None if they do not, or if fewer than four comparisons show it.
    """
    count = len(losses)
    for period in range(1, min(_LONGEST_CYCLE, count - 4) + 1):
        if 2 * period <= count and all(a == b for a, b in zip(losses, losses[period:], strict=False)):
            return period
    return None

"""What a curve of losses looks like, put together from its statistics, and how far that of fixed batches went down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from pytest_lora.facts.curve import (
    NOISE_WINDOW,
    Fall,
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
    smoothed,
    swings,
    trend,
    typical,
)

FEWEST_LOSSES = 10
"""From so many losses on a curve has statistics; below, only what one loss shows by itself counts."""

FITS = 0.1
"""At a loss below this, in nats per token, the model fits: each token has a probability of 0.9. Nothing that a
curve does down there is a fault."""

SWING = 0.3
"""A swing is a rise by this share of the starting loss, and beyond the noise, that is taken back again."""

SWING_NOISE = 5.0
"""A swing is higher than this many standard deviations of the noise; 1,000 losses of white noise span 7, and
4.5 after the running median of three under which swings are counted."""

OTHER_DATA, FALLS_AGAIN = 1 / 3, -4.0
"""After this share of the losses the highest rates of usual schedules are past; and z of the trend from a jump
on, one in 30,000 by chance."""


_AVERAGED = 0.55
"""Share of steps that turn round. Over 100 losses that of white noise is 0.66 with a deviation of 0.045, that of
running means 0.5 (simulated)."""

_FEWEST_AVERAGED, _FEWEST_STRAYING = 100, 20
"""Steps of the whole curve, and since an index, from which on these can be told apart."""

STRAYS = 3.0
"""Standard deviations of a random walk. From its lowest point on it is a Rayleigh variable: above 3 in 1 of 90."""


@dataclass(frozen=True, slots=True)
class CurveFacts:
    """What a curve of at least ``FEWEST_LOSSES`` losses looks like.

    Attributes:
        start: Level of the first losses.
        lowest: The lowest level.
        highest: The highest level.
        end: Level of the last losses.
        peak: The highest loss, outliers of one or two steps aside.
        peak_at: Its index.
        fall: The clearest fall anywhere.
        noise: Standard deviation of the noise between neighbouring losses.
        deviation: Typical deviation from the trend, as a share of the loss.
        swings: How often the curve rose widely and came down again.
        alternation: How strongly it goes up and down within few losses, 0 to 1.
        cycles: Whether the same batches come again and again, which alone makes a curve go up and down.
        trend: z of a rank test for a trend over all losses, negative for a fall.
        later_trend: The same without the first quarter, in which most runs learn most.
        jump: The highest step up from one loss to the next that lasts, if one stands out of the noise.
        wander: How far the curve strays by chance from its lowest level on, if it is a running mean of noise; else 0.
        levels: Levels from start to end.
    """

    start: Level
    lowest: Level
    highest: Level
    end: Level
    peak: float
    peak_at: int
    fall: Fall
    noise: float
    deviation: float
    swings: int
    alternation: float
    cycles: bool
    trend: float
    later_trend: float
    jump: Jump | None
    wander: float
    levels: tuple[Level, ...]

    @property
    def may_have_met_other_data(self) -> bool:
        """Whether jumps explain that the loss went up: it did not climb before, and falls from the last one on."""
        count = self.levels[-1].first + self.levels[-1].count
        last = self.jump and self.jump.last
        return last is not None and last.at > OTHER_DATA * count and last.trend < FALLS_AGAIN

    @property
    def middle(self) -> float:
        """The loss at which the curve spent most of its time."""
        return median(one.value for one in self.levels)


def curve_facts(losses: Sequence[float]) -> CurveFacts:
    """The statistics of at least ``FEWEST_LOSSES`` losses, none of them negative."""
    known = levels(losses)
    lowest = min(known, key=lambda one: one.value)
    start = level(losses, 0, 3)
    deviation = noise(losses)
    smooth = smoothed(losses, 5)
    rest = deviations(losses)
    third = max(NOISE_WINDOW, len(losses) // 3)
    # Noise grows with the loss, so that the third in which a curve is high is louder than the whole.
    loudest = max(noise(part) for part in (losses, losses[:third], losses[-third:]))
    peak_at = max(range(len(smooth)), key=smooth.__getitem__)
    return CurveFacts(
        start=start,
        lowest=lowest,
        highest=max(known, key=lambda one: one.value),
        end=known[-1],
        peak=smooth[peak_at],
        peak_at=peak_at,
        fall=clearest_fall(losses),
        noise=deviation,
        deviation=typical(rest),
        swings=swings(smoothed(losses, 3), max(SWING * start.value, SWING_NOISE * loudest)),
        alternation=alternation(rest),
        cycles=cycles(rest),
        trend=trend(losses),
        later_trend=trend(losses[len(losses) // 4 :]),
        jump=jump(losses),
        wander=wander(losses, lowest.middle),
        levels=known,
    )


def wander(losses: Sequence[float], since: int) -> float:
    """How far a running mean of noise strays from an index on by chance, one standard deviation; 0 for other curves.

    Two in three steps of white noise turn round, half of those of a running mean: these add up like those of a random
    walk, with the square root of their number.
    """
    steps = [after - before for before, after in pairwise(losses)]
    later = steps[since:]
    if len(steps) < _FEWEST_AVERAGED or len(later) < _FEWEST_STRAYING:
        return 0.0
    # A quiet fall turns round seldom too, and says nothing of what follows.
    averaged = _turns(steps) < _AVERAGED and _turns(later) < _AVERAGED
    return typical(later) * math.sqrt(len(later)) if averaged else 0.0


def _turns(steps: Sequence[float]) -> float:
    return fmean(before * after < 0 for before, after in pairwise(steps))


@dataclass(frozen=True, slots=True)
class LossDrop:
    """How far the loss of fixed batches went down.

    Attributes:
        before: Mean loss of the batches before training, dropout off, in the unit of the loss (nats per token for
            a language model).
        after: The same after it.
        curve: Loss of each step, dropout as it was.
        lr: Learning rate of the optimizer that was made; None where the user's own ran.
        by: Relative drop that was asked for.
        adapter_learned: Whether a gradient reached any low-rank factor and a step moved it.
    """

    before: float
    after: float
    curve: tuple[float, ...]
    lr: float | None
    by: float
    adapter_learned: bool

    @property
    def drop(self) -> float:
        """Relative drop; NaN where a loss is not finite or there was none."""
        return (self.before - self.after) / self.before if self.before else math.nan

    @property
    def fits_already(self) -> bool:
        """Whether there was nothing left to learn, before and after."""
        return abs(self.before) < FITS and abs(self.after) < FITS

    @property
    def healthy(self) -> bool:
        """Whether the adapter learned, and the loss fell far enough or had nothing left to fall."""
        return self.adapter_learned and (self.drop >= self.by or self.fits_already)

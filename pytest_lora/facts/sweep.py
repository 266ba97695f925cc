"""A locked rank beside the ranks of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

SHARE_TOLERANCE = 1e-9
"""Difference of two shares that is rounding: each is a quotient of differences of doubles."""


def is_enough(share: float, wanted: float) -> bool:
    """Whether a share reaches a threshold; the last digits, which are rounding, do not count."""
    return share >= wanted - SHARE_TOLERANCE


def percent(share: float, limit: float | None = None) -> str:
    """A share in percent, with three digits: ``"97.8 %"``; with as many as show on which side of a limit it is."""
    value = 100 * share + 0.0  # which makes a plain zero of a negative one
    if abs(value) >= 999.5:
        return f"{value:.0f} %"
    digits = 3
    while (
        digits < 12
        and limit is not None
        and _side(float(f"{value:.{digits}g}") / 100, limit) != _side(share, limit)
    ):
        digits += 1
    return f"{value:.{digits}g} %"


def _side(share: float, limit: float) -> int:
    """-1 below a limit, 0 on it but for rounding, 1 above."""
    return 0 if abs(share - limit) <= SHARE_TOLERANCE else (1 if share > limit else -1)


def rate_text(rate: float) -> str:
    """A learning rate as people write it: ``"3e-4"``, ``"2.5e-5"``, ``"0.1"``."""
    if rate >= 0.01:
        return f"{rate:.4g}"
    mantissa, exponent = f"{rate:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def frontier(points: Sequence[tuple[float, float]], maximise: bool) -> tuple[int, ...]:
    """Places of those (price, metric) that are worth their price, the cheapest first.

    No other is at least as good for less, or better for the same.
    """
    best: list[int] = []
    for place in sorted(
        range(len(points)), key=lambda n: (points[n][0], -points[n][1] if maximise else points[n][1])
    ):
        metric, last = points[place][1], points[best[-1]][1] if best else None
        if last is None or (metric > last if maximise else metric < last):
            best.append(place)
    return tuple(best)


def spread_out(places: Sequence[float], gap: float) -> list[float]:
    """Places of labels, each as near to its own as it can be with a gap to its neighbours; their order is kept."""
    order = sorted(range(len(places)), key=lambda n: places[n])
    groups: list[list[int]] = []
    centres: list[float] = []
    for place in order:
        groups.append([place])
        centres.append(places[place])
        while len(groups) > 1 and centres[-1] - centres[-2] < gap * (len(groups[-1]) + len(groups[-2])) / 2:
            last, centre = groups.pop(), centres.pop()
            total = len(groups[-1]) + len(last)
            centres[-1] = (centres[-1] * len(groups[-1]) + centre * len(last)) / total
            groups[-1] += last
    found = [0.0] * len(places)
    for group, centre in zip(groups, centres, strict=True):
        for index, place in enumerate(group):
            found[place] = centre + gap * (index - (len(group) - 1) / 2)
    return found


@dataclass(frozen=True, slots=True)
class MeasuredRank:
    """What a sweep knows of one rank.

    Attributes:
        rank: The rank.
        share: Its share of the best improvement, 0 to 1; None where no share can be given.
        metric: The metric as a report prints it, with its spread; None where no trial has one.
        failures: What its trials failed with.
    """

    rank: int
    share: float | None
    metric: str | None
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LockedRankFacts:
    """A rank that is in use, and what a sweep says of it.

    Attributes:
        metric: Name of the metric.
        rank: The rank in use.
        wanted: The share of the best improvement that is enough, 0 to 1.
        before: The metric before training as a report prints it; None where it is not known.
        ranks: What was measured, by rank.
    """

    metric: str
    rank: int
    wanted: float
    before: str | None
    ranks: tuple[MeasuredRank, ...]

    @property
    def locked(self) -> MeasuredRank:
        """The rank in use."""
        return next(one for one in self.ranks if one.rank == self.rank)

    @property
    def where(self) -> str:
        """The rank and the sweep, in words."""
        return f"r={self.rank} of a sweep over {', '.join(f'r={one.rank}' for one in self.ranks)}"


class Difference(NamedTuple):
    """Something that is not what it was when a rank was locked: its name, then and now, as they are printed."""

    name: str
    locked: str
    now: str


@dataclass(frozen=True, slots=True)
class RankLockFacts:
    """A lock beside what is in use.

    Attributes:
        lock: Name of the file, or ``"the lock"``.
        rank: The locked rank.
        in_use: Where configuration or learning rate differ from it.
        drift: Where data, settings or versions differ from those of its evidence.
    """

    lock: str
    rank: int
    in_use: tuple[Difference, ...]
    drift: tuple[Difference, ...]

    @property
    def where(self) -> str:
        """The lock and its rank, in words."""
        return f"{self.lock}, r={self.rank}"

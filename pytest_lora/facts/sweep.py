"""A locked rank beside the ranks of a sweep."""

from __future__ import annotations

from dataclasses import dataclass

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

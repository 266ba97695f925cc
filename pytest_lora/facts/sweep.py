"""A locked rank beside the ranks of a sweep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SHARE_TOLERANCE = 1e-9
"""Difference of two shares that is rounding: each is a quotient of differences of doubles."""


def is_enough(share: float, wanted: float) -> bool:
    """Whether a share reaches a threshold; the last digits, which are rounding, do not count."""
    return share >= wanted - SHARE_TOLERANCE


def percent(share: float) -> str:
    """A share in percent, with three digits: ``"97.8 %"``."""
    value = 100 * share + 0.0  # which makes a plain zero of a negative one
    return f"{value:.3g} %" if abs(value) < 999.5 else f"{value:.0f} %"


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

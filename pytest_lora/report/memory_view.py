"""A memory budget as bars: what the peak is made of, the budget as a line, other settings below."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_lora.facts.figures import MemoryBudget

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


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

"""From operations to hours and money, by figures that are stated: the card's peak, the utilisation, money an hour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pytest_lora.facts.memory import MemoryEstimate
from pytest_lora.facts.operations import CARDS, StepFlops, card_named, format_flops
from pytest_lora.values import require_number, require_share, require_whole, shown

_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Cost:
    """What so many operations cost.

    Attributes:
        flops: Floating-point operations.
        hours: Of one GPU.
        money: In the currency of ``per_hour``; None where none was given.
        price: The figures behind it.
    """

    flops: int
    hours: float
    money: float | None
    price: Price

    def __str__(self) -> str:
        money = "" if self.money is None else f", {self.money:,.2f}"
        return f"{format_flops(self.flops)}: {format_hours(self.hours)}{money} ({self.price})"


@dataclass(frozen=True, slots=True)
class Price:
    """What an operation costs; ``price()`` makes one.

    Attributes:
        card: Name of the GPU; empty where only its peak is known.
        peak_tflops: Its peak, in 10^12 operations a second.
        utilisation: Share of the peak that training reaches.
        per_hour: Money for an hour of one GPU; None where only time is asked.
        source: Where the peak is from.
    """

    card: str
    peak_tflops: float
    utilisation: float
    per_hour: float | None
    source: str

    def of(self, what: MemoryEstimate | StepFlops | int, *, steps: int = 1) -> Cost:
        """Hours and money of a number of optimizer steps.

        Args:
            what: An estimate of a step, its operations, or whole operations.
            steps: How many of it, at least 1.

        Raises:
            TypeError, ValueError: It is none of these, or ``steps`` is no whole number above 0.
        """
        flops = _flops(what) * require_whole("steps", steps, least=1)
        hours = flops / (self.peak_tflops * 1e12 * self.utilisation) / _HOUR
        return Cost(flops, hours, None if self.per_hour is None else hours * self.per_hour, self)

    def __str__(self) -> str:
        """The figures, none of them hidden."""
        rate = "" if self.per_hour is None else f", {self.per_hour:g} an hour"
        name = self.card or "a card"
        return f"{name} at {100 * self.utilisation:g} % of {self.peak_tflops:g} TFLOP/s{rate}; {self.source}"


def _flops(what: Any) -> int:
    if isinstance(what, MemoryEstimate):
        what = what.flops
    if isinstance(what, StepFlops):
        return what.total
    if isinstance(what, bool) or not isinstance(what, int):
        hint = ""
        if hasattr(what, "trials"):
            hint = "; for a sweep: result.prices(price)"
        elif hasattr(what, "ranks"):
            hint = "; for ranks: rank_prices(config, base, ranks, price=...)"
        raise TypeError(
            f"what must be an estimate of a step or its operations, not {type(what).__name__}{hint}"
        )
    if what < 0:
        raise ValueError(f"what must be at least 0 operations, not {what}")
    return what


def price(
    card: str = "",
    *,
    utilisation: float,
    per_hour: float | None = None,
    peak_tflops: float | None = None,
) -> Price:
    """What an operation costs on a GPU: ``price(card="H100", per_hour=2.5, utilisation=0.4)``.

    Args:
        card: A GPU of ``pytest_lora.facts.operations``, whose maker's peak is taken, or any name beside
            ``peak_tflops``.
        utilisation: Share of the peak that your training reaches, above 0 and at most 1. There is no default, as it
            decides the answer: measure it once, as operations of a step / (seconds of a step * peak).
        per_hour: Money for an hour of one GPU, at least 0.
        peak_tflops: The peak in 10^12 operations a second, where you know better, or the card is not known here.

    Raises:
        TypeError: An argument has the wrong type, or neither card nor peak is given.
        ValueError: It is out of its range, or the card is not known.
    """
    if not isinstance(card, str):
        raise TypeError(f"card must be a name such as 'H100', not {shown(card)}")
    utilisation = require_share("utilisation", utilisation)
    if per_hour is not None:
        per_hour = require_number("per_hour", per_hour, least=0.0)
    if peak_tflops is not None:
        peak = require_number("peak_tflops", peak_tflops, above=0.0)
        return Price(card, peak, utilisation, per_hour, "the peak is yours")
    if not card:
        raise TypeError("price needs card=, such as 'H100', or peak_tflops= of your own")
    found = card_named(card)
    if found is None:
        known = ", ".join(one.name for one in CARDS)
        raise ValueError(
            f"card: there is no peak of {shown(card)} here; give peak_tflops=, or one of {known}"
        )
    checked = "" if found.verified else ", as commonly cited"
    return Price(found.name, found.tflops, utilisation, per_hour, f"{found.source}{checked}, {found.dtype}")


def format_hours(hours: float) -> str:
    """``"2.4 h"``, ``"31 min"``, ``"0.8 s"``."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    if hours * 60 >= 1:
        return f"{hours * 60:.0f} min"
    return f"{hours * _HOUR:.2g} s"

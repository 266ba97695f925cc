"""From operations to hours and money, by figures that are stated: of a step, and of a step at each rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from pytest_lora.facts.memory import MemoryEstimate
from pytest_lora.facts.numbers import format_bytes, markdown_lines, text_lines
from pytest_lora.facts.operations import CARDS, StepFlops, card_named, format_flops
from pytest_lora.memory import StepArguments, names_settings
from pytest_lora.memory.estimate import step_memory
from pytest_lora.memory.frontier import require_counts
from pytest_lora.values import require_number, require_share, require_whole, shown

if TYPE_CHECKING:
    from peft import LoraConfig

    from pytest_lora.memory.estimate import Base

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


@dataclass(frozen=True, slots=True)
class RankPrice:
    """What one rank costs.

    Attributes:
        rank: ``r``.
        flops: Floating-point operations of one optimizer step.
        adapter_bytes: Bytes of the adapter's trained parameters, as they are held while training.
        peak_allocated: Bytes that a step allocates at its peak.
        cost: Hours and money of all steps; None without a price.
    """

    rank: int
    flops: int
    adapter_bytes: int
    peak_allocated: int
    cost: Cost | None = None


@dataclass(frozen=True, slots=True)
class RankPrices:
    """What each rank costs, the smallest first.

    Attributes:
        architecture: Class of the base.
        batch: The batch in words.
        steps: Optimizer steps that hours and money are for.
        price: The figures behind them.
        rows: One a rank.
    """

    architecture: str
    batch: str
    steps: int
    price: Price | None
    rows: tuple[RankPrice, ...]

    @property
    def verdict(self) -> str:
        """The largest rank against the smallest in one sentence; empty with one rank."""
        first, last = self.rows[0], self.rows[-1]
        if first is last:
            return ""
        more = 100 * (last.flops / first.flops - 1)
        said = (
            f"r={last.rank} costs {more:.2g} % more operations than r={first.rank}, "
            f"{format_bytes(last.adapter_bytes - first.adapter_bytes)} more adapter, "
            f"{format_bytes(last.peak_allocated - first.peak_allocated)} more memory"
        )
        cheap = more < _CHEAP and last.peak_allocated < (1 + _CHEAP / 100) * first.peak_allocated
        return f"{said}: the rank is not what costs." if cheap else f"{said}."

    def __str__(self) -> str:
        head = f"a training step of {self.architecture}, {self.batch}"
        return "\n".join(filter(None, (head, *text_lines(self._cells()), self.verdict, self._notes())))

    def to_markdown(self) -> str:
        """The table in Markdown."""
        return "\n".join(
            filter(None, (*markdown_lines(self._cells()), "\n", self.verdict, self._notes()))
        ).replace("\n\n\n", "\n\n")

    def _notes(self) -> str:
        return f"{self.steps:,} steps on {self.price}" if self.price else ""

    def _cells(self) -> list[tuple[str, ...]]:
        head = ("rank", "operations", "against the first", "adapter", "peak")
        first = self.rows[0].flops
        rows = [
            (
                str(row.rank),
                format_flops(row.flops),
                f"{100 * (row.flops / first - 1):+.2g} %",
                format_bytes(row.adapter_bytes),
                format_bytes(row.peak_allocated),
            )
            for row in self.rows
        ]
        if self.price is None:
            return [head, *rows]
        costs = [_in_words(row.cost) for row in self.rows]
        return [(*head, "time", "money"), *((*row, *cost) for row, cost in zip(rows, costs, strict=True))]


_CHEAP = 10.0
"""Percent of operations and of memory up to which the verdict says that the rank is not what costs. A sentence, no
rule: both figures stand in it."""


def _in_words(cost: Cost | None) -> tuple[str, str]:
    if cost is None:
        return "", ""
    return format_hours(cost.hours), "" if cost.money is None else f"{cost.money:,.2f}"


@names_settings
def rank_prices(
    config: LoraConfig,
    base: Base,
    ranks: Iterable[int] | Any,
    *,
    batch_size: int,
    seq_len: int,
    price: Price | None = None,
    steps: int = 1,
    **setting: Unpack[StepArguments],
) -> RankPrices:
    """What training at each rank costs on a base, before any weight is loaded.

    Args:
        config: The adapter, of any rank.
        base: As for ``estimate_memory``.
        ranks: The ranks, such as ``[8, 32]``, or advice that has some (``suggest_rank``).
        batch_size: Sequences in a micro-batch.
        seq_len: Tokens in each, padding included.
        price: ``price(card=..., ...)``, for hours and money.
        steps: Optimizer steps of the run, for hours and money.
        setting: The other arguments of ``estimate_memory``; operations are those of one optimizer step with all its
            ``accumulation`` micro-batches.

    Raises:
        TypeError, ValueError: As ``estimate_memory``; or there are no ranks, or ``price`` is none.
    """
    wanted = sorted(require_counts("ranks", getattr(ranks, "ranks", ranks)))
    if price is not None and not isinstance(price, Price):
        raise TypeError(f"price must be what price(card=..., ...) gives, not {type(price).__name__}")
    require_whole("steps", steps, least=1)
    memory = step_memory(config, base, **setting)
    rows = []
    for rank in wanted:
        estimate = memory.estimate(batch_size, seq_len, rank)
        flops = estimate.flops.total
        cost = None if price is None else price.of(flops, steps=steps)
        rows.append(
            RankPrice(rank, flops, estimate.breakdown.get("adapters", 0), estimate.peak_allocated, cost)
        )
    return RankPrices(estimate.architecture, estimate.batch, steps, price, tuple(rows))

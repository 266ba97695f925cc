"""What the trials of a sweep cost, and the time rule judged twice: on the time that was measured, and on operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_lora.facts.numbers import markdown_lines, text_lines
from pytest_lora.facts.operations import format_flops
from pytest_lora.facts.sweep import is_enough, percent
from pytest_lora.memory.price import Cost, Price, format_hours
from pytest_lora.sweep.choice import METRIC_SHARE, TIME_SHARE
from pytest_lora.values import require_share

if TYPE_CHECKING:
    from pytest_lora.sweep.result import SweepResult
    from pytest_lora.sweep.rows import RankOutcome


@dataclass(frozen=True, slots=True)
class TimeVerdict:
    """The time rule on one measure: the smallest rank with enough of the best metric in little of the largest's time.

    Attributes:
        measure: ``"measured time"`` or ``"operations"``.
        rank: The rank that it names; None where none does, or where it cannot be judged.
        shares: Share of the largest rank's, by rank, of the ranks that were measured.
        judged: Whether there were two ranks to compare.
    """

    measure: str
    rank: int | None
    shares: tuple[tuple[int, float], ...]
    judged: bool

    def __str__(self) -> str:
        if not self.judged:
            return f"by {self.measure}: not judged, there are no two ranks to compare"
        shares = dict(self.shares)
        if self.rank is not None:
            return f"by {self.measure}: r={self.rank}, with {percent(shares[self.rank])} of r={max(shares)}"
        least = min(shares, key=lambda rank: shares[rank])
        return f"by {self.measure}: no rank; the least, r={least}, takes {percent(shares[least])} of r={max(shares)}"


@dataclass(frozen=True, slots=True)
class TrialPrice:
    """What a rank's trial costs, the mean of its seeds.

    Attributes:
        rank: ``r``.
        share: Of the best metric, as the metric rule counts it; None where that means nothing.
        seconds: Wall time of training, as measured.
        flops: Operations of training, as counted.
        cost: Hours and money at the price; None without price or operations.
    """

    rank: int
    share: float | None
    seconds: float | None
    flops: float | None
    cost: Cost | None


@dataclass(frozen=True, slots=True)
class SweepPrices:
    """What a sweep's ranks cost.

    Attributes:
        rows: One a rank, the smallest first.
        time: The time rule on measured time.
        operations: The time rule on operations.
        metric_share, time_share: Its thresholds.
        price: The figures behind hours and money.
        total: Hours and money of all trials that have operations.
    """

    rows: tuple[TrialPrice, ...]
    time: TimeVerdict
    operations: TimeVerdict
    metric_share: float
    time_share: float
    price: Price | None
    total: Cost | None

    @property
    def verdict(self) -> str:
        """Both verdicts side by side, and what it means where they differ."""
        asked = (
            f"{percent(self.metric_share)} of the best metric in under {percent(self.time_share)} of the largest "
            "rank's"
        )
        said = (
            f"{asked} {self.time.measure} and {self.operations.measure}:\n  {self.time}\n  {self.operations}"
        )
        if self.time.judged and self.operations.judged and self.time.rank != self.operations.rank:
            said += (
                "\n  they differ: time that goes with nothing that was computed is waiting (data, start-up, "
                "other jobs), and may be gone on another machine"
            )
        return said

    def __str__(self) -> str:
        return "\n".join(filter(None, (*text_lines(self._cells()), self.verdict, self._notes())))

    def to_markdown(self) -> str:
        """The table in Markdown."""
        return "\n".join((*markdown_lines(self._cells()), "", self.verdict, self._notes())).rstrip()

    def _notes(self) -> str:
        return "" if self.total is None else f"all trials: {self.total}"

    def _cells(self) -> list[tuple[str, ...]]:
        head = ("rank", "of the best", "seconds", "of the largest", "operations", "of the largest")
        shares = [dict(one.shares) for one in (self.time, self.operations)]
        cells = [
            (
                str(row.rank),
                _percent(row.share),
                "-" if row.seconds is None else f"{row.seconds:.3g}",
                _percent(shares[0].get(row.rank)),
                "-" if row.flops is None else format_flops(row.flops),
                _percent(shares[1].get(row.rank)),
            )
            for row in self.rows
        ]
        if self.price is None:
            return [head, *cells]
        costs = [_in_words(row.cost) for row in self.rows]
        return [(*head, "time", "money"), *((*cell, *cost) for cell, cost in zip(cells, costs, strict=True))]


def _percent(share: float | None) -> str:
    return "-" if share is None else percent(share)


def _in_words(cost: Cost | None) -> tuple[str, str]:
    if cost is None:
        return "-", "-"
    return format_hours(cost.hours), "-" if cost.money is None else f"{cost.money:,.2g}"


def sweep_prices(
    result: SweepResult,
    price: Price | None = None,
    *,
    metric_share: float = METRIC_SHARE,
    time_share: float = TIME_SHARE,
) -> SweepPrices:
    """What the ranks of a sweep cost; ``SweepResult.prices`` documents the arguments."""
    if price is not None and not isinstance(price, Price):
        raise TypeError(f"price must be what price(card=..., ...) gives, not {type(price).__name__}")
    metric_share = require_share("metric_share", metric_share)
    time_share = require_share("time_share", time_share)
    shares = result.shares()
    outcomes = [row for row in result.rows if row.metric is not None]
    rows = tuple(
        TrialPrice(row.rank, shares.get(row.rank), row.seconds, row.flops, _cost(row, price))
        for row in outcomes
    )
    enough = [rank for rank, share in shares.items() if is_enough(share, metric_share)]
    counted = sum(row.flops for row in result.trials if row.flops is not None)
    return SweepPrices(
        rows=rows,
        time=_judged("measured time", {row.rank: row.seconds for row in outcomes}, enough, time_share),
        operations=_judged("operations", {row.rank: row.flops for row in outcomes}, enough, time_share),
        metric_share=metric_share,
        time_share=time_share,
        price=price,
        total=price.of(counted) if price is not None and counted else None,
    )


def _cost(row: RankOutcome, price: Price | None) -> Cost | None:
    return None if price is None or row.flops is None else price.of(round(row.flops))


def _judged(
    measure: str, found: dict[int, float | None], enough: list[int], time_share: float
) -> TimeVerdict:
    values = {rank: value for rank, value in found.items() if value is not None}
    if len(values) < 2 or not values[max(values)]:
        return TimeVerdict(measure, None, (), judged=False)
    shares = {rank: value / values[max(values)] for rank, value in values.items()}
    holding = [rank for rank in sorted(shares) if shares[rank] < time_share and rank in enough]
    return TimeVerdict(measure, holding[0] if holding else None, tuple(shares.items()), judged=True)

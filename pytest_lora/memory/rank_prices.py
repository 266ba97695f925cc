"""What each rank costs in training: operations, adapter, memory, hours and money."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from pytest_lora.facts.numbers import format_bytes, markdown_lines, text_lines
from pytest_lora.facts.operations import format_flops
from pytest_lora.memory.arguments import StepArguments, names_settings
from pytest_lora.memory.estimate import step_memory
from pytest_lora.memory.frontier import require_counts
from pytest_lora.memory.price import Cost, Price, format_hours
from pytest_lora.values import require_whole

if TYPE_CHECKING:
    from peft import LoraConfig

    from pytest_lora.memory.estimate import Base


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

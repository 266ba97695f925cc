"""Which GPUs a step fits, by the memory they have, and how large a batch each of them takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from pytest_lora.facts.memory import MemoryEstimate
from pytest_lora.facts.numbers import format_bytes, markdown_lines, text_lines
from pytest_lora.memory import StepArguments, names_settings
from pytest_lora.memory.estimate import step_memory
from pytest_lora.memory.frontier import largest_batch, require_budget
from pytest_lora.values import require_items

if TYPE_CHECKING:
    from peft import LoraConfig

    from pytest_lora.memory.estimate import Base

CARDS = ("16GiB", "24GiB", "40GiB", "48GiB", "80GiB", "141GiB")
"""Memory of T4 and V100; L4, A10 and RTX 4090; A100; L40S and A40; A100 and H100; H200."""


@dataclass(frozen=True, slots=True)
class CardRow:
    """What one size of GPU takes.

    Attributes:
        budget: Bytes.
        fits: Whether the step that was asked fits.
        left: Bytes that it leaves, negative where it does not fit. The CUDA context is not among them.
        batch_size: The largest micro-batch of that length that fits, 0 where not even one sequence does.
    """

    budget: int
    fits: bool
    left: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class CardTable:
    """Which GPUs a step fits.

    Attributes:
        estimate: The step that was asked.
        rows: One a size, in the order that was asked for.
    """

    estimate: MemoryEstimate
    rows: tuple[CardRow, ...]

    def __str__(self) -> str:
        return "\n".join((self._title(), *text_lines(self._cells())))

    def to_markdown(self) -> str:
        """The table in Markdown."""
        return "\n".join((f"{self._title()}:", "", *markdown_lines(self._cells())))

    def _title(self) -> str:
        one = self.estimate
        return (
            f"{one.architecture}, {one.batch}, r={one.rank}: {format_bytes(one.peak_allocated)} at the peak"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            ("GPU memory", "fits", "left", "largest batch"),
            *(
                (
                    format_bytes(row.budget),
                    "yes" if row.fits else "no",
                    format_bytes(row.left),
                    str(row.batch_size),
                )
                for row in self.rows
            ),
        ]


@names_settings
def card_table(
    config: LoraConfig,
    base: Base,
    *,
    batch_size: int,
    seq_len: int,
    cards: Iterable[str | int] = CARDS,
    **setting: Unpack[StepArguments],
) -> CardTable:
    """Which sizes of GPU a step fits, and the largest batch of each.

    Args:
        config: The adapter.
        base: As for ``estimate_memory``.
        batch_size: Sequences in a micro-batch.
        seq_len: Tokens in each, padding included.
        cards: Memory of the GPUs: ``"24GiB"``, or whole bytes. The peak that is allocated must not pass it.
        setting: The other arguments of ``estimate_memory``.

    Raises:
        TypeError, ValueError: As ``estimate_memory``; or a size has no unit, or there are none.
    """
    limits = _budgets(cards)
    memory = step_memory(config, base, **setting)
    estimate = memory.estimate(batch_size, seq_len)
    rows = tuple(
        CardRow(
            limit,
            estimate.fits(limit),
            limit - estimate.peak_allocated,
            largest_batch(memory, limit, seq_len),
        )
        for limit in limits
    )
    return CardTable(estimate, rows)


def _budgets(cards: Any) -> list[int]:
    if isinstance(cards, (str, bytes, int)):
        cards = [cards]
    given = require_items("cards", cards, 'sizes such as ["24GiB", "80GiB"]')
    limits = [require_budget(card, "cards") for card in given]
    if not limits:
        raise ValueError('cards must not be empty; write ["24GiB", "80GiB"]')
    return limits

"""A budget and how far it goes: the largest batch, sequence or rank that fits, and all batches as a table."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Unpack

from pytest_lora.facts.numbers import format_bytes, markdown_lines, parse_bytes, text_lines
from pytest_lora.memory import StepArguments, names_settings
from pytest_lora.memory.estimate import StepMemory, step_memory
from pytest_lora.memory.setting import most_of, require_point
from pytest_lora.values import require_items, require_one_of, require_whole, shown

if TYPE_CHECKING:
    from peft import LoraConfig

    from pytest_lora.memory.estimate import Base

Vary = Literal["batch_size", "seq_len", "r"]

_VARIED = ("batch_size", "seq_len", "r")

_SMALLEST = 2**20

_CARDS = re.compile(r"(\d+)\s*[xX]\s*(\S.*)")


def cards_and_budget(budget: Any, gpus: Any = None) -> tuple[int | None, Any]:
    """How many cards a budget such as ``"8x80GiB"`` names, and the memory of one; None where it names none.

    Raises:
        ValueError: It names another number than ``gpus``, or none at all.
    """
    match = _CARDS.fullmatch(budget.strip()) if isinstance(budget, str) else None
    if match is None:
        return gpus, budget
    count = int(match[1])
    if count < 1:
        raise ValueError(f'budget: {shown(budget)} names no card; write "8x80GiB"')
    if gpus is not None and gpus != count:
        raise ValueError(
            f"budget: {shown(budget)} names {count} cards, and gpus {gpus}; leave one of them out"
        )
    return count, match[2]


def require_budget(budget: Any, name: str = "budget") -> int:
    """Bytes of a budget: a size, or a CUDA device, which is asked for its memory. Errors call it by this name.

    Raises:
        TypeError, ValueError: It is no size, has no unit, or there is no such device.
    """
    if is_device(budget):
        return _device_memory(budget)
    limit = parse_bytes(budget, name)
    if limit < _SMALLEST:
        raise ValueError(f'{name} is {limit} bytes; write "{limit}GiB" for gibibytes')
    return limit


def is_device(budget: Any) -> bool:
    """Whether a budget is a CUDA device, as ``"cuda"``, ``"cuda:0"`` or a ``torch.device``."""
    if isinstance(budget, str):
        return budget.partition(":")[0] == "cuda"
    return type(budget).__name__ == "device" and bool(budget.type == "cuda")


def _device_memory(device: Any) -> int:
    import torch

    known = re.fullmatch(r"cuda(:\d{1,3})?", str(device)) and torch.cuda.is_available()
    if not known or (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f'budget is the device {shown(str(device))}, but there is no such CUDA device here; write "24GiB"'
        )
    size: int = torch.cuda.get_device_properties(device).total_memory
    return size


@names_settings
def largest_that_fits(
    config: LoraConfig,
    base: Base,
    budget: str | int,
    *,
    vary: Vary,
    batch_size: int = 1,
    seq_len: int = 512,
    **setting: Unpack[StepArguments],
) -> int:
    """The largest batch size, sequence length or rank whose step fits a budget, 0 if none does.

    Args:
        config: The adapter.
        base: As for ``estimate_memory``.
        budget: GPU memory: ``"24GiB"``, ``"8x80GiB"``, or whole bytes. The peak that is allocated must not pass it.
        vary: ``"batch_size"``, ``"seq_len"`` or ``"r"``; the others stay as given.
        batch_size: Stays, unless it is varied.
        seq_len: Stays, unless it is varied.
        setting: The other arguments of ``estimate_memory``.

    Raises:
        TypeError, ValueError: As ``estimate_memory``; or the budget has no unit, or holds all that can be counted, or
            ``vary`` is none of these.
    """
    limit = _limit(budget, setting)
    require_one_of("vary", vary, _VARIED)
    require_point(1 if vary == "batch_size" else batch_size, 1 if vary == "seq_len" else seq_len)
    memory = step_memory(config, base, **setting)
    point = {"batch_size": batch_size, "seq_len": seq_len, "r": config.r}

    def fits(value: int) -> bool:
        return memory.most_allocated(**{**point, vary: value}) <= limit

    return _largest(fits, vary, most_of(vary, batch_size, seq_len))


def _limit(budget: Any, setting: StepArguments) -> int:
    """Bytes of one GPU; how many GPUs a budget names goes into the setting."""
    cards, size = cards_and_budget(budget, setting.get("gpus"))
    if cards is not None:
        setting["gpus"] = cards
    return require_budget(size)


def _largest(fits: Callable[[int], bool], vary: str, bound: int) -> int:
    """The largest value that fits, where all smaller ones do.

    Raises:
        ValueError: All up to the bound fit.
    """
    low, high = 0, 1
    while high <= bound and fits(high):
        low, high = high, 2 * high
    high = min(high, bound + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low == bound:
        raise ValueError(
            f"budget holds every {vary} up to {bound:,}, the largest that is counted; take a smaller one"
        )
    return low


@dataclass(frozen=True, slots=True)
class FrontierRow:
    """The largest batch for one sequence length and rank.

    Attributes:
        seq_len: Tokens in each sequence.
        rank: ``r``.
        batch_size: The largest batch that fits, 0 where not even one sequence does.
        peak_allocated: Bytes that a step with this batch allocates at its peak; of batch 1 where none fits.
    """

    seq_len: int
    rank: int
    batch_size: int
    peak_allocated: int


@dataclass(frozen=True, slots=True)
class OomFrontier:
    """How far a budget goes: the largest batch per sequence length and rank.

    Attributes:
        base: Class of the base or of its configuration.
        budget: Bytes.
        rows: By sequence length, then by rank, in the order that was asked for.
    """

    base: str
    budget: int
    rows: tuple[FrontierRow, ...]

    def __str__(self) -> str:
        return "\n".join((self._title(), *text_lines(self._cells())))

    def to_markdown(self) -> str:
        """The table in Markdown."""
        return "\n".join((f"{self._title()}:", "", *markdown_lines(self._cells())))

    def _title(self) -> str:
        return f"Largest batch of {self.base} in {format_bytes(self.budget)}"

    def _cells(self) -> list[tuple[str, ...]]:
        ranks = list(dict.fromkeys(row.rank for row in self.rows))
        found = {(row.seq_len, row.rank): row.batch_size for row in self.rows}
        lengths = dict.fromkeys(row.seq_len for row in self.rows)
        return [
            ("sequence", *(f"r={rank}" for rank in ranks)),
            *((str(length), *(str(found[length, rank]) for rank in ranks)) for length in lengths),
        ]


@names_settings
def oom_frontier(
    config: LoraConfig,
    base: Base,
    budget: str | int,
    *,
    seq_lens: Iterable[int] = (512, 1024, 2048, 4096),
    ranks: Iterable[int] | None = None,
    **setting: Unpack[StepArguments],
) -> OomFrontier:
    """The largest batch that fits a budget, for every sequence length and rank.

    Args:
        config: The adapter.
        base: As for ``estimate_memory``.
        budget: GPU memory: ``"24GiB"``, ``"8x80GiB"``, or whole bytes. The peak that is allocated must not pass it.
        seq_lens: Sequence lengths in tokens.
        ranks: Ranks; by default that of ``config`` alone.
        setting: The other arguments of ``estimate_memory``, ``batch_size`` and ``seq_len`` aside.

    Raises:
        TypeError, ValueError: As ``estimate_memory``; or the budget has no unit, or a list is empty or holds
            something that is no whole number above 0.
    """
    limit = _limit(budget, setting)
    lengths = require_counts("seq_lens", seq_lens)
    wanted = None if ranks is None else require_counts("ranks", ranks)
    memory = step_memory(config, base, **setting)
    rows = tuple(
        _frontier_row(memory, limit, length, rank) for length in lengths for rank in wanted or (memory.rank,)
    )
    return OomFrontier(_named(base), limit, rows)


def largest_batch(memory: StepMemory, limit: int, seq_len: int, r: int | None = None) -> int:
    """The largest micro-batch whose peak stays within so many bytes, 0 if none does."""

    def fits(batch_size: int) -> bool:
        return memory.most_allocated(batch_size, seq_len, r) <= limit

    return _largest(fits, "batch_size", most_of("batch_size", 1, seq_len))


def _frontier_row(memory: StepMemory, limit: int, seq_len: int, rank: int) -> FrontierRow:
    batch_size = largest_batch(memory, limit, seq_len, rank)
    return FrontierRow(seq_len, rank, batch_size, memory.peak_allocated(max(1, batch_size), seq_len, rank))


def _named(base: Any) -> str:
    """What a table calls a base: the class of a model or of its configuration, or the path."""
    return str(base) if isinstance(base, (str, os.PathLike)) else type(base).__name__


def require_counts(name: str, values: Any) -> tuple[int, ...]:
    """Whole numbers above 0, each once, in their order.

    Raises:
        TypeError, ValueError: They are none, or there are none; the message names the argument.
    """
    given = require_items(name, values, "whole numbers such as [512, 1024]")
    counts = tuple(dict.fromkeys(require_whole(name, value, least=1) for value in given))
    if not counts:
        raise ValueError(f"{name} must not be empty")
    return counts

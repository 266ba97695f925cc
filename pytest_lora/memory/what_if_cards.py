"""What else one could do with several GPUs about a step that does not fit: divide the weights, or take more of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_lora.facts.memory import MemoryEstimate
from pytest_lora.facts.memory_choices import SHARDED

MOST_CARDS = 64
"""GPUs up to which more of them are tried, each time twice as many."""

_SHRINKING = ("fsdp1", "fsdp2", "zero3")
"""Strategies under which every further GPU makes the part of each smaller."""

Storage = tuple[str, dict[str, Any]]
"""A change of how something is stored: its words, and the settings that differ."""


def other_sharing(estimate: MemoryEstimate) -> Iterator[Storage]:
    """Strategies that divide the weights, where the one of the step leaves them whole on every GPU."""
    shared = estimate.setting.parallel
    if shared is None or shared.strategy in SHARDED:
        return
    for strategy, words in (("zero3", "zero3"), ("fsdp2", "fsdp")):
        yield f'strategy="{words}"', _of(shared.gpus, strategy)


def more_cards(estimate: MemoryEstimate) -> Iterator[Storage]:
    """Twice as many GPUs, four times as many and so on, with weights divided among them."""
    shared = estimate.setting.parallel
    if shared is None:
        return
    strategy = shared.strategy if shared.strategy in _SHRINKING else "fsdp2"
    words = "" if strategy == shared.strategy else ' with strategy="fsdp"'
    gpus = 2 * shared.gpus
    while gpus <= MOST_CARDS:
        yield f"gpus={gpus}{words}", _of(gpus, strategy)
        gpus *= 2


def _of(gpus: int, strategy: str) -> dict[str, Any]:
    return {"gpus": gpus, "strategy": strategy, "parallel": None}

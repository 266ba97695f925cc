"""From facts to loss curves and memory budgets: what a check has seen anyway, arranged for a reader."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

from pytest_lora.facts.curve_shape import LossDrop
from pytest_lora.facts.figures import LossCurve, MemoryBudget, WhatIf
from pytest_lora.facts.history import HistoryFacts
from pytest_lora.facts.memory import MemoryFacts

POINTS = 400
"""Losses of a curve that are kept: more than a page has pixels for would only be carried around."""


def drop_curve(title: str, drop: LossDrop) -> LossCurve:
    """The steps of ``assert_loss_decreases`` with what it compares: the loss before the first and after the last."""
    return LossCurve(
        title=title,
        steps=tuple(range(len(drop.curve))),
        losses=drop.curve,
        eval_steps=(),
        eval_losses=(),
        window=(0, len(drop.curve)),
        before=drop.before,
        after=drop.after,
        wanted=drop.by,
    )


def history_curve(title: str, facts: HistoryFacts) -> LossCurve:
    """The losses that a run has logged; the levels at start and end are those that the rules look at."""
    kept = list(_thinned(facts.train))
    return LossCurve(
        title=title,
        steps=tuple(facts.step(index) for index in kept),
        losses=tuple(facts.train[index] for index in kept),
        eval_steps=tuple(one.step for one in facts.evals),
        eval_losses=tuple(one.loss for one in facts.evals),
        window=(facts.step(0), max(facts.steps, facts.step(0))),
        before=facts.curve.start.value if facts.curve else None,
        after=facts.curve.end.value if facts.curve else None,
        wanted=None,
    )


def memory_budget(facts: MemoryFacts) -> MemoryBudget:
    """A predicted step against the memory there is."""
    estimate = facts.estimate
    asked = estimate.setting
    words = [
        f"{estimate.architecture}, {estimate.batch}, r={estimate.rank}",
        f"base in {asked.quantization.method if asked.quantization else asked.dtype}",
        asked.optimizer,
        *(["gradient checkpointing"] if asked.gradient_checkpointing else []),
    ]
    return MemoryBudget(
        title=", ".join(words),
        breakdown=tuple((name, size) for name, size in estimate.breakdown.items() if size),
        peak_allocated=estimate.peak_allocated,
        peak_reserved=estimate.peak_reserved,
        budget=facts.budget,
        peak_at=estimate.peak_in_words,
        what_if=tuple(
            WhatIf(one.change, one.peak_allocated, one.peak_allocated <= facts.budget)
            for one in facts.alternatives
        ),
    )


def _thinned(losses: Sequence[float]) -> Iterator[int]:
    """Indices of the losses to keep: of each stretch the lowest and the highest, and all that are not finite there."""
    size = max(1, math.ceil(2 * len(losses) / POINTS))
    if size < 3:
        yield from range(len(losses))
        return
    for _, group in groupby(range(len(losses)), key=lambda index: index // size):
        stretch = list(group)
        finite = [index for index in stretch if math.isfinite(losses[index])]
        ends = {min(finite, key=losses.__getitem__), max(finite, key=losses.__getitem__)} if finite else set()
        yield from sorted(ends | set(sorted(set(stretch) - set(finite))[:1]))

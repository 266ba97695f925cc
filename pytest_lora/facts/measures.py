"""From facts to the numbers that a report carries: those that a baseline compares, loss curves and memory budgets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from pytest_lora.facts.curve_shape import LossDrop
from pytest_lora.facts.figures import LossCurve, MemoryBudget, WhatIf
from pytest_lora.facts.figures.adapter_maps import place
from pytest_lora.facts.history import HistoryFacts
from pytest_lora.facts.memory import MemoryFacts

if TYPE_CHECKING:
    from pytest_lora.facts.checkpoint import CheckpointFacts
    from pytest_lora.facts.config import ConfigFacts
    from pytest_lora.facts.memory import MemoryEstimate
    from pytest_lora.facts.model import ModelFacts


MOST_KINDS = 1_000
"""Kinds of modules whose scalings are told one by one; names of a file without any order are as many kinds."""

Measures = tuple[tuple[str, int | float], ...]
"""Pairs of a name and a number."""


def of_model(facts: ModelFacts) -> Measures:
    """Trainable parameters, and the scaling of every kind of module under every adapter."""
    found: list[tuple[str, int | float]] = []
    for adapter in facts.adapters:
        layers = facts.of(adapter)
        if layers:
            found.append((f"trainable parameters with {adapter}", facts.trainable_parameters))
            found += _scalings(adapter, ((layer.module, layer.scaling) for layer in layers))
    return tuple(found)


def of_config(facts: ConfigFacts) -> Measures:
    """Trainable parameters, and the scaling of every kind of module; none where PEFT refuses the configuration."""
    if not facts.layers:
        return ()
    trainable = (f"trainable parameters with {facts.adapter}", facts.trainable_parameters)
    scalings = _scalings(facts.adapter, ((layer.module, layer.scaling) for layer in facts.layers))
    return (trainable, *scalings)


def of_checkpoint(facts: CheckpointFacts) -> Measures:
    """Saved parameters, and the scaling of every kind of module."""
    if not facts.is_judged or not facts.adapted:
        return ()
    saved = (f"saved parameters with {facts.name}", facts.lora_numbers)
    settings = facts.settings
    if settings is None:
        return (saved,)
    scaled = (
        (one.name.removesuffix(".base_layer"), scaling)
        for one in facts.adapted
        if (scaling := settings.scaling_of(one.name)) is not None
    )
    return (saved, *_scalings(facts.name, scaled))


def of_memory(estimate: MemoryEstimate) -> Measures:
    """The predicted peak, in bytes."""
    return (("predicted peak", estimate.peak_allocated),)


def of_drop(drop: LossDrop) -> Measures:
    """The relative drop of the loss, where it is a number."""
    return ((f"loss drop within {len(drop.curve)} steps", drop.drop),) if math.isfinite(drop.drop) else ()


def _scalings(adapter: str, scaled: Iterable[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """The scaling of each kind of module, the smallest and the largest where they differ; of all at once where there
    are more kinds than anyone compares."""
    kinds: dict[str, set[float]] = {}
    for module, scaling in scaled:
        kinds.setdefault(place(module)[1], set()).add(scaling)
    if len(kinds) > MOST_KINDS:
        kinds = {"all modules": set().union(*kinds.values())}
    for kind, values in kinds.items():
        name = f"scaling of {kind} in {adapter}"
        if len(values) == 1:
            yield name, min(values)
        else:
            yield f"{name}, smallest", min(values)
            yield f"{name}, largest", max(values)


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

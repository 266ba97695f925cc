"""Numbers of one check that a baseline compares: exact, by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from pytest_lora.facts.figures.adapter_maps import place

if TYPE_CHECKING:
    from pytest_lora.facts.checkpoint import CheckpointFacts
    from pytest_lora.facts.config import ConfigFacts
    from pytest_lora.facts.curve_shape import LossDrop
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

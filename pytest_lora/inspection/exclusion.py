"""Which modules PEFT refuses to adapt, and which ``exclude_modules`` lets it take the rest: PEFT itself is asked."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from pytest_lora.facts.config import Refusal
from pytest_lora.facts.settings import Settings, is_named
from pytest_lora.inspection.peft_internals import LoraConfig

_CLASS = re.compile(r"Target module (\w+)\(")
_NAME = re.compile(r"Module '([\w.]+)' is incompatible")


def explained(
    refusal: Refusal,
    config: LoraConfig,
    modules: dict[str, nn.Module],
    try_config: Callable[[LoraConfig], Exception | None],
) -> Refusal:
    """The refusal with the modules that it is about, and an exclusion under which PEFT takes the rest.

    Args:
        refusal: What PEFT raised.
        config: The configuration; it is not changed.
        modules: The modules of the base by name.
        try_config: Lets PEFT make an adapter of a configuration, and returns what it raises.
    """
    settings = Settings.of(config)
    refused = tuple(_refused(refusal.message, settings, modules))
    if not refused:
        return refusal
    for exclusion in _exclusions(refused, settings, modules) if not settings.exclude_modules else ():
        tried: Any = copy.deepcopy(config)
        tried.exclude_modules = exclusion if isinstance(exclusion, str) else set(exclusion)
        if try_config(tried) is None:
            return Refusal(refusal.error, refusal.message, refused, exclusion)
    return Refusal(refusal.error, refusal.message, refused)


def _refused(message: str, settings: Settings, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Modules that a message names, by their class or by the end of their name, and that the targets mean."""
    kind, ending = _CLASS.search(message), _NAME.search(message)
    everything = str(settings.target_modules).lower() == "all-linear"
    for name, module in modules.items():
        is_kind = kind is not None and type(module).__name__ == kind[1] and settings.targets(name)
        is_named_so = ending is not None and is_named(name, ending[1])
        if is_kind or (is_named_so and (everything or settings.targets(name))):
            yield name


def _exclusions(
    refused: tuple[str, ...], settings: Settings, modules: dict[str, nn.Module]
) -> Iterator[tuple[str, ...] | str]:
    """Names of the parts of the base that hold nothing else that is meant; then the modules' own names."""
    others = [name for name in modules if settings.targets(name) and name not in set(refused)]
    parts = {_outermost(name, others) for name in refused}
    if None not in parts:
        leaves = sorted({str(part).rpartition(".")[2] for part in parts})
        yield f".*({'|'.join(leaves)}).*"
    yield tuple(sorted({name.rpartition(".")[2] for name in refused}))


def _outermost(name: str, others: list[str]) -> str | None:
    """The largest part of the model around a module without any of the other targets, if it has a name of its own."""
    steps = name.split(".")
    for depth in range(1, len(steps)):
        part = ".".join(steps[:depth])
        if not any(other.startswith(f"{part}.") for other in others):
            return None if steps[depth - 1].isdigit() else part
    return None

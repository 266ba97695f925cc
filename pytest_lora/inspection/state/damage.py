"""What a test may leave different in a model that others use, and what it may not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True, slots=True)
class Damage:
    """What differs in a way that no test should leave behind: names of tensors or modules, by kind."""

    merged: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    contents: tuple[str, ...] = ()
    differing: frozenset[str] = frozenset()
    """Every tensor that differs, also those where that is no damage."""

    def __bool__(self) -> bool:
        return bool(self.merged or self.layers or self.replaced or self.contents)


def is_peft(value: object) -> bool:
    return _is_in_peft(type(value).__module__)


@cache
def _is_in_peft(module: str) -> bool:
    return module.partition(".")[0] == "peft"


def merged_layers(name: str, layer: Any) -> Iterator[str]:
    if getattr(layer, "merged", False) is True:
        yield name
    for key, child in layer._modules.items():
        if is_peft(child):
            yield from merged_layers(f"{name}.{key}", child)

"""What modules, optimizers and hooks hold beside parameters and children, however deep."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from pytest_lora.inspection.state.attributes import Attributes, elements, is_container, slots_of

_PLAIN = frozenset({int, float, str, bool, bytes, complex, type(None), BuiltinFunctionType})
_STATEFUL = ("to_dict", "state_dict")
_CACHES = "transformers.cache_utils"
"""Keys and values of generation, which some models keep from call to call."""


MOST_NAME = 300
"""Characters of a name: what is linked a hundred thousand times would else have names of gigabytes."""


class Reachable:
    """Objects, containers and tensors that can be reached from some values, each once.

    Followed are containers, configurations (what has ``to_dict``), dataclasses, what has a ``state_dict`` (optimizers,
    schedulers, scalers), what bitsandbytes keeps of a quantized weight and PEFT of an adapter (numbers drawn for later
    steps), caches of transformers, and what functions close over or call by its global name: a hook that steps an
    optimizer holds it so. Modules are not followed, nor objects of other kinds.
    """

    def __init__(self) -> None:
        self.objects: list[Attributes] = []
        self.tensors: dict[int, tuple[str, Tensor]] = {}
        self._containers = SimpleNamespace()
        self._seen: set[int] = set()
        self._alive: list[Any] = []

    def containers(self) -> Attributes:
        """Containers that are no object's own attribute."""
        return Attributes.of("", self._containers)

    def add(self, name: str, value: Any) -> None:
        """Follow a value."""
        waiting = [(name, value)]
        while waiting:
            where, found = waiting.pop()
            if type(found) in _PLAIN or isinstance(found, (type, enum.Enum, ModuleType, nn.Module)):
                continue
            if id(found) not in self._seen:
                self._seen.add(id(found))
                where = where if len(where) <= MOST_NAME else f"{where[:MOST_NAME]}..."
                self._alive.append(found)  # or another object may get its identity
                waiting.extend(self._below(where, found))

    def add_values(self, attributes: Attributes) -> None:
        """Follow the values of an object, and what its containers hold."""
        for key, value in attributes.held():
            if type(value) not in _PLAIN:
                self.add(f"{attributes.name}.{key}", value)

    def _below(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Tensor):
            self.tensors[id(value)] = name, value
            yield from self._attributes(name, value)
        elif is_container(value):
            known = vars(self._containers)
            known[name if name not in known else f"{name} ({id(value):x})"] = value
            yield from elements(name, value)
        elif isinstance(value, (tuple, frozenset)):
            yield from elements(name, value)
        elif isinstance(value, (FunctionType, MethodType, partial)):
            yield from ((name, held) for held in _held_by(value) if _trains(held))
        elif _is_stateful(value):
            yield from self._attributes(name, value)

    def _attributes(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if getattr(value, "__dict__", None) or slots_of(value):
            attributes = Attributes.of(name, value)
            self.objects.append(attributes)
            yield from ((f"{name}.{key}", held) for key, held in attributes.held())


def _is_stateful(value: object) -> bool:
    kind = type(value)
    return (
        any(callable(getattr(kind, method, None)) for method in _STATEFUL)
        or dataclasses.is_dataclass(value)
        or kind.__module__.partition(".")[0] in ("bitsandbytes", "peft")
        or kind.__module__ == _CACHES
    )


def _held_by(function: Any) -> Iterator[Any]:
    """What a function works with beside its arguments."""
    if isinstance(function, partial):
        yield from (function.func, *function.args, *function.keywords.values())
    elif isinstance(function, MethodType):
        yield from (
            function.__func__,
            function.__self__,
            *getattr(function.__self__, "__dict__", {}).values(),
        )
    else:
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # it is still empty
                yield cell.cell_contents
        yield from function.__defaults__ or ()
        known = (function.__globals__.get(name) for name in function.__code__.co_names)
        yield from (value for value in known if not isinstance(value, FunctionType))


def _trains(value: Any, depth: int = 2) -> bool:
    """Whether a value has a state that steps change: an optimizer or the like, a container of such, a function."""
    if isinstance(value, (nn.Module, type)):
        return False
    if isinstance(value, (FunctionType, MethodType, partial)):
        return True
    if is_container(value) or isinstance(value, tuple):
        first = next(iter(value.values() if isinstance(value, Mapping) else value), None)
        return depth > 0 and first is not None and _trains(first, depth - 1)
    return callable(getattr(type(value), "state_dict", None))

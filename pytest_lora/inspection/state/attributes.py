"""The attributes of modules and of other objects, taken, compared and put back."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from operator import is_
from typing import Any

from torch import nn

REGISTRIES = ("_modules", "_parameters", "_buffers")
_TENSOR_REGISTRIES = ("_parameters", "_buffers")
_BUILT_IN = (dict, list, set, deque)
_CONTAINERS = (MutableMapping, MutableSequence, MutableSet)
_PLAIN = frozenset({int, float, str, bool, bytes, type(None)})
_ABSENT = object()


def is_container(value: object) -> bool:
    """Whether a value holds elements that can be put back into it."""
    if type(value) in _PLAIN:
        return False
    if isinstance(value, _BUILT_IN):
        return True
    return isinstance(value, _CONTAINERS) and not isinstance(value, (nn.Module, bytearray))


def _copied(container: Any) -> Any:
    """A container of the same kind with the same elements."""
    if type(container) in (dict, list, OrderedDict, set):
        return container.copy()
    try:
        return copy.copy(container)
    except Exception:  # whatever a class of its own raises: its elements are what counts
        return dict(container.items()) if isinstance(container, MutableMapping) else list(container)


def slots_of(owner: object) -> tuple[str, ...]:
    """The names of what an object keeps outside of ``__dict__``, as its class asks for."""
    kind: Any = type(owner)
    return _slots_of(kind)


@cache
def _slots_of(kind: type) -> tuple[str, ...]:
    return tuple(
        name if not name.startswith("__") else f"_{one.__name__.lstrip('_')}{name}"
        for one in kind.__mro__
        for name in _names(vars(one).get("__slots__", ()))
        if not name.endswith("__")
    )


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def values_of(owner: object) -> dict[str, Any]:
    """All attributes of an object itself, wherever it keeps them."""
    held = dict(getattr(owner, "__dict__", ()))
    for name in slots_of(owner):
        value = getattr(owner, name, _ABSENT)
        if value is not _ABSENT:
            held[name] = value
    return held


@dataclass(frozen=True, slots=True)
class Attributes:
    """The attributes of an object, and what its containers (children, hooks, ...) held."""

    name: str
    owner: Any
    values: dict[str, Any]
    containers: dict[str, Any]

    @classmethod
    def of(cls, name: str, owner: object) -> Attributes:
        values = values_of(owner)
        containers = {key: _copied(value) for key, value in values.items() if is_container(value)}
        return cls(name, owner, values, containers)

    def held(self) -> Iterator[tuple[str, Any]]:
        """Yield the values of attributes and what is in their containers, but no children, parameters and buffers."""
        for key, value in self.values.items():
            if key not in self.containers:
                yield key, value
            elif value and key not in REGISTRIES:
                yield from elements(key, value)

    def same_as(self, other: Attributes) -> bool:
        """Whether all attributes are the same objects, with the same elements."""
        pairs = [
            (self.values, other.values),
            *((c, other.containers.get(k)) for k, c in self.containers.items()),
        ]
        return all(_same_elements(one, two) for one, two in pairs)

    def entry(self, registry: str, key: str) -> Any:
        return self.containers[registry].get(key, _ABSENT)

    def replaced_entries(self, module: nn.Module) -> Iterator[tuple[str, str, Any]]:
        """Yield registry, name and new value of each child, parameter or buffer that is another object now."""
        attributes = vars(module)
        for registry in REGISTRIES:
            before, now = self.containers[registry], attributes[registry]
            if not before and not now:
                continue
            if (
                len(before) == len(now)
                and all(map(is_, before.values(), now.values()))
                and [*before] == [*now]
            ):
                continue
            for key in {**before, **now}:
                value = now.get(key, _ABSENT)
                # Rotary embeddings register their frequencies anew for longer sequences.
                derived = registry == "_buffers" and key in self.containers["_non_persistent_buffers_set"]
                if before.get(key, _ABSENT) is not value and not (derived and value is not _ABSENT):
                    yield registry, key, value

    def restore(self) -> list[str]:
        """Put everything back; gives the names of what refuses."""
        lost: list[str] = []
        now = values_of(self.owner)
        if not _same_elements(now, self.values):
            lost += self._put_back(now)
        for key, before in self.containers.items():
            container = self.values[key]
            if container or before:  # most are hooks, and empty
                try:
                    refill(container, before)
                except Exception:  # whatever such a container raises, the others are put back all the same
                    lost.append(f"{self.name}.{key}".lstrip("."))
        return lost

    def _put_back(self, now: dict[str, Any]) -> list[str]:
        """Give the owner the values that it had; gives the names of slots that refuse."""
        slots, lost = slots_of(self.owner), []
        if held := getattr(self.owner, "__dict__", None):
            held.clear()
        if held is not None:
            held.update({key: value for key, value in self.values.items() if key not in slots})
        for key in slots:
            try:
                if key in self.values:
                    object.__setattr__(self.owner, key, self.values[key])
                elif key in now:
                    object.__delattr__(self.owner, key)
            except (AttributeError, TypeError):
                lost.append(f"{self.name}.{key}".lstrip("."))
        return lost


class AttributeBatch:
    """Attributes of many objects, compared at once: several times faster than one by one."""

    def __init__(self, attributes: list[Attributes]) -> None:
        self.all = attributes
        held = [(a, key, a.values[key], before) for a in attributes for key, before in a.containers.items()]
        # Most containers are for hooks, and empty: to ask for that needs no look at what they held before.
        self._empty = [now for _, _, now, before in held if not before]
        self._owners_of_empty = [a for a, _, _, before in held if not before]
        filled = [entry for entry in held if entry[3]]
        # Tensors are told apart by identity: comparing them by value gives tensors.
        tensors = [(a, now) for a, key, now, _ in filled if key in _TENSOR_REGISTRIES]
        self._owners_of_tensors = [a for a, _ in tensors]
        self._registries = [registry for _, registry in tensors]
        self._registered = list(map(_identities, self._registries))
        others = [(a, now, before) for a, key, now, before in filled if key not in _TENSOR_REGISTRIES]
        # What is in slots has no dict to compare at once.
        self._of_slots = [a for a in attributes if slots_of(a.owner)]
        plain = (a for a in attributes if not slots_of(a.owner))
        dicts = [*((a, vars(a.owner), a.values) for a in plain), *others]
        self._owners = [a for a, _, _ in dicts]
        self._now = [now for _, now, _ in dicts]
        self._before = [before for _, _, before in dicts]

    def changed(self) -> list[Attributes]:
        """Those that are not what they were; one may come twice."""
        registered = list(map(_identities, self._registries))
        changed: list[Attributes] = self._of_slots[:]
        try:
            if any(self._empty):
                changed += [a for a, now in zip(self._owners_of_empty, self._empty, strict=True) if now]
            if self._now != self._before:
                changed += _differing(self._owners, self._now, self._before)
            if registered != self._registered:
                changed += _differing(self._owners_of_tensors, registered, self._registered)
        except (RuntimeError, ValueError):  # a tensor or an array in the place of something else
            return self.all
        return changed


def _differing(owners: list[Attributes], now: list[Any], before: list[Any]) -> list[Attributes]:
    return [owner for owner, one, two in zip(owners, now, before, strict=True) if one != two]


def _identities(registry: dict[str, Any]) -> list[tuple[str, int]]:
    return [(key, id(value)) for key, value in registry.items()]


def elements(name: str, container: Any) -> Iterator[tuple[str, Any]]:
    """Yield the elements of a container, under a name that tells where they are."""
    pairs = container.items() if isinstance(container, MutableMapping) else enumerate(container)
    for key, value in pairs:
        yield f"{name}.{key}" if isinstance(key, (str, int)) else name, value


def _same_elements(one: Any, two: Any) -> bool:
    """Whether two containers hold the same objects under the same keys, in the same order."""
    if two is None or len(one) != len(two) or not all(map(is_, one, two)):
        return False
    return not isinstance(one, MutableMapping) or all(map(is_, one.values(), two.values()))


def refill(container: Any, before: Any) -> None:
    """Put a container's elements back in place, as handles of hooks refer to the container itself.

    Some refuse changes, as the outputs of transformers and the immutable lists of torch do; their class underneath
    does not.
    """
    if _same_elements(container, before):
        return
    own = type(container)
    under = next((kind for kind in _BUILT_IN if isinstance(container, kind)), own)
    for kind in dict.fromkeys((own, under)):
        with suppress(Exception):
            _refill_as(kind, container, before)
        if _same_elements(container, before):
            return
    raise TypeError(f"a {own.__name__} cannot be changed")


def _refill_as(kind: Any, container: Any, before: Any) -> None:
    kind.clear(container)
    if isinstance(container, (MutableMapping, MutableSet)):
        # A set has no method that both kinds know.
        (kind.update if hasattr(kind, "update") else kind.__ior__)(container, before)
    else:
        kind.extend(container, before)

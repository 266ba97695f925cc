"""The attributes of modules and of other objects, taken, compared and put back."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet
from contextlib import suppress
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Attributes:
    """The attributes of an object, and what its containers (children, hooks, ...) held."""

    name: str
    owner: Any
    values: dict[str, Any]
    containers: dict[str, Any]

    @classmethod
    def of(cls, name: str, owner: object) -> Attributes:
        values = dict(vars(owner))
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
        now = vars(self.owner)
        if not _same_elements(now, self.values):
            now.clear()
            now.update(self.values)
        for key, before in self.containers.items():
            container = self.values[key]
            if container or before:  # most are hooks, and empty
                try:
                    refill(container, before)
                except Exception:  # whatever such a container raises, the others are put back all the same
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
        dicts = [*((a, vars(a.owner), a.values) for a in attributes), *others]
        self._owners = [a for a, _, _ in dicts]
        self._now = [now for _, now, _ in dicts]
        self._before = [before for _, _, before in dicts]

    def changed(self) -> list[Attributes]:
        """Those that are not what they were; one may come twice."""
        registered = list(map(_identities, self._registries))
        changed: list[Attributes] = []
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

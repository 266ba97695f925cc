"""The attributes of modules and of other objects, taken, compared and put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet
from dataclasses import dataclass
from operator import is_
from typing import Any

from torch import nn

_REGISTRIES = ("_modules", "_parameters", "_buffers")
_TENSOR_REGISTRIES = ("_parameters", "_buffers")
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Attributes:
    """The attributes of an object, and what its containers (children, hooks, ...) held."""

    owner: Any
    values: dict[str, Any]
    containers: dict[str, Any]

    @classmethod
    def of(cls, owner: object) -> Attributes:
        values = dict(vars(owner))
        containers = {
            key: copy.copy(value)
            for key, value in values.items()
            if isinstance(value, (MutableMapping, MutableSequence, MutableSet))
            and not isinstance(value, nn.Module)
        }
        return cls(owner, values, containers)

    def plain_values(self) -> Iterator[Any]:
        yield from self.values.values()
        for key, container in self.containers.items():
            if isinstance(container, MutableMapping) and key not in _REGISTRIES:
                yield from container.values()

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
        for registry in _REGISTRIES:
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

    def restore(self) -> None:
        now = vars(self.owner)
        if not _same_elements(now, self.values):
            now.clear()
            now.update(self.values)
        for key, before in self.containers.items():
            container = self.values[key]
            if container or before:  # most are hooks, and empty
                refill(container, before)


class AttributeBatch:
    """Attributes of many objects, compared at once: several times faster than one by one."""

    def __init__(self, attributes: list[Attributes]) -> None:
        self._all = attributes
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
            return self._all
        return changed


def _differing(owners: list[Attributes], now: list[Any], before: list[Any]) -> list[Attributes]:
    return [owner for owner, one, two in zip(owners, now, before, strict=True) if one != two]


def _identities(registry: dict[str, Any]) -> list[tuple[str, int]]:
    return [(key, id(value)) for key, value in registry.items()]


def _same_elements(one: Any, two: Any) -> bool:
    """Whether two containers hold the same objects under the same keys, in the same order."""
    if two is None or len(one) != len(two) or not all(map(is_, one, two)):
        return False
    return not isinstance(one, MutableMapping) or all(map(is_, one.values(), two.values()))


def refill(container: Any, before: Any) -> None:
    """Put a container's elements back in place, as handles of hooks refer to the container itself."""
    if _same_elements(container, before):
        return
    container.clear()
    if isinstance(container, MutableMapping):
        container.update(before)
    elif isinstance(container, MutableSequence):
        container.extend(before)
    else:
        for element in before:
            container.add(element)


@dataclass(frozen=True, slots=True)
class ConfigState:
    config: Any
    values: dict[str, Any]

    def restore(self) -> None:
        if _differ(vars(self.config), self.values):
            vars(self.config).clear()
            vars(self.config).update(copy.deepcopy(self.values))


def _differ(now: object, before: object) -> bool:
    try:
        return now != before
    except (RuntimeError, ValueError):  # arrays in them have no truth value
        return True

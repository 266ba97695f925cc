"""The whole step from the trace of a few layers: inner units of a cut stack are played once for every copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytest_lora.inspection.memory.layer_stacks import FIRST_INNER, KEPT, LAST_INNER

Integers = NDArray[np.int64]


class NotRepeatingError(Exception):
    """The inner units of a stack do not do the same, so that one cannot stand for another."""


class Block(NamedTuple):
    """Events ``low`` to ``high`` of a trace, played ``repeat`` times in a row."""

    low: int
    high: int
    repeat: int


@dataclass(frozen=True)
class Timeline:
    """When every storage of the whole model is made and freed.

    Attributes:
        blocks: The stretches of the trace in the order of the whole step.
        weights: For each event of the trace how many storages it makes, or frees if negative.
        index: For each event of the whole step that of the trace which it is a copy of.
        instances: For each event of the whole step a number for the storage that it is about.
        layers: For each event of the whole step the unit of its stack in the whole model, or -1.
    """

    blocks: tuple[Block, ...]
    weights: Integers
    index: Integers
    instances: Integers
    layers: Integers


def expand(
    events: list[int],
    units: list[int],
    copies: dict[int, int],
    like: list[object],
    breaks: Sequence[int] = (),
) -> Timeline:
    """Play the events of a trace for a whole model.

    Args:
        events: ``i`` where storage ``i`` is made, ``~i`` where it is freed.
        units: ``KEPT * stack + i`` for unit ``i`` of a stack, negative outside.
        copies: Inner units of the whole model by stack.
        like: For each storage what two storages must share to stand for one another.
        breaks: Events at which something else begins, be it in the same unit.

    Raises:
        NotRepeatingError: The two inner units that were traced differ, or do not follow one another.
    """
    return _Expansion(events, units, copies, like, breaks).timeline()


class _Expansion:
    def __init__(
        self,
        events: list[int],
        units: list[int],
        copies: dict[int, int],
        like: list[object],
        breaks: Sequence[int],
    ) -> None:
        self.events = np.array(events, dtype=np.int64)
        self.storage = np.where(self.events < 0, ~self.events, self.events)
        self.copies = copies
        changes = sorted({0, *(np.flatnonzero(np.diff(units)) + 1).tolist(), *breaks, len(units)})
        self.segments = [(units[low], low, high) for low, high in pairwise(changes)]
        self.home = np.full(len(like), -1, dtype=np.int64)
        self.units = np.array(units, dtype=np.int64)
        made = self.events >= 0
        self.home[self.events[made]] = self.units[made]
        self.place = np.zeros(len(like), dtype=np.int64)
        self.start: dict[int, int] = {}
        self.inner: dict[int, int] = {}
        self.total = len(like)
        for stack in copies:
            self._number(stack, like)
        outside = self.storage[~made & (self.units < 0)]
        self.left = {stack: self._left_by_the_first(stack, outside) for stack in copies}
        kept = set(units)
        self.before = {stack: len({KEPT * stack, KEPT * stack + 1} & kept) for stack in copies}

    def _number(self, stack: int, like: list[object]) -> None:
        """Give the storages of a stack's inner units their places, and check that they are alike."""
        first, last = (self._made_in(KEPT * stack + role) for role in (FIRST_INNER, LAST_INNER))
        if [like[i] for i in first] != [like[i] for i in last]:
            raise NotRepeatingError(f"inner layers of stack {stack} hold different storages")
        for made in (first, last):
            self.place[made] = np.arange(len(made))
        self.start[stack], self.inner[stack] = self.total, len(first)
        self.total += len(first) * self.copies[stack]

    def _left_by_the_first(self, stack: int, freed_outside: Integers) -> NDArray[np.bool_]:
        """Which storages of the first inner unit, by their places, are freed outside of layers; shape (places,)."""
        left = np.zeros(self.inner[stack], dtype=np.bool_)
        left[self.place[freed_outside[self.home[freed_outside] == KEPT * stack + FIRST_INNER]]] = True
        return left

    def _made_in(self, unit: int) -> Integers:
        made = self.events[self.events >= 0]
        found: Integers = made[self.home[made] == unit]
        return found

    def timeline(self) -> Timeline:
        played = list(self._played())
        blocks = [
            Block(low, high, len(list(group)))
            for (low, high), group in groupby(played, key=lambda stretch: stretch[:2])
        ]
        weights = np.where(self.events < 0, -1, 1)
        parts: list[_Part] = []
        for _, same in groupby(played, key=lambda stretch: (*stretch[:3], stretch.partner)):
            stretches = list(same)
            made = list(self._parts(stretches))
            parts += made
            low, high = stretches[0].low, stretches[0].high
            if len(stretches) == 1 and len(made[0].events) != high - low:
                weights[low:high] *= np.bincount(made[0].events - low, minlength=high - low)
        index, instances, layers = (np.concatenate(column) for column in zip(*parts, strict=True))
        self._check(index, instances)
        return Timeline(tuple(blocks), weights, index, instances, layers)

    def _check(self, index: Integers, instances: Integers) -> None:
        """Every storage is made once, and freed at most once and later."""
        frees = self.events[index] < 0
        made, freed = instances[~frees], instances[frees]
        when_made = np.full(self.total, len(instances), dtype=np.int64)
        when_made[made] = np.flatnonzero(~frees)
        twice = any(np.bincount(ones, minlength=1).max() > 1 for ones in (made, freed))
        if twice or (when_made[freed] > np.flatnonzero(frees)).any():
            raise NotRepeatingError("a layer frees what another one holds")

    def _played(self) -> Iterator[_Stretch]:
        """The stretches of events in the order of the whole step."""
        position = 0
        while position < len(self.segments):
            unit, low, high = self.segments[position]
            if not self._is_inner(unit):
                yield _Stretch(low, high, unit, 0, low)
                position += 1
                continue
            other, next_low, next_high = self._partner(position)
            many = self.copies[unit // KEPT]
            rising = unit % KEPT == FIRST_INNER
            yield _Stretch(low, high, unit, 1 if rising else many, next_low)
            for copy in range(2, many + 1) if rising else range(many - 1, 0, -1):
                yield _Stretch(next_low, next_high, other, copy, low)
            position += 2

    def _partner(self, position: int) -> tuple[int, int, int]:
        """The segment of the other inner unit, which must follow and do the same."""
        unit, low, high = self.segments[position]
        for other, next_low, next_high in self.segments[position + 1 : position + 2]:
            same = unit // KEPT == other // KEPT and high - low == next_high - next_low
            if same and self._is_inner(other) and self._does_the_same(low, high, next_low):
                return other, next_low, next_high
        raise NotRepeatingError("inner layers of a stack do not run one after the other and alike")

    def _does_the_same(self, low: int, high: int, other: int) -> bool:
        """Whether two stretches make and free in the same order, and the same of their own."""
        mine, theirs = (self._done(np.arange(begin, begin + high - low)) for begin in (low, other))
        return np.array_equal(mine, theirs)

    def _done(self, index: Integers) -> Integers:
        """What events do: the place of a storage of their own unit or -1, and whether it is freed: (2, events)."""
        storage = self.storage[index]
        place = np.where(self.home[storage] == self.units[index], self.place[storage], -1)
        return np.stack([place, self.events[index] < 0])

    def _is_inner(self, unit: int) -> bool:
        return unit // KEPT in self.copies and unit % KEPT in (FIRST_INNER, LAST_INNER)

    def _parts(self, stretches: list[_Stretch]) -> Iterator[_Part]:
        """What the same events do in one copy after another: from two of them, as every number rises alike."""
        if len(stretches) < 4:
            yield from map(self._part, stretches)
            return
        moved = [stretch for stretch in stretches if not self._is_original(stretch)]
        first, second = map(self._part, moved[:2])
        times = np.arange(len(moved))[:, None]
        instances, layers = (
            (one + times * (other - one)).ravel()
            for one, other in ((first.instance, second.instance), (first.layer, second.layer))
        )
        together = _Part(np.tile(first.events, len(moved)), instances, layers)
        original = [self._part(stretch) for stretch in stretches if self._is_original(stretch)]
        yield from (*original, together) if self._is_original(stretches[0]) else (together, *original)

    def _part(self, stretch: _Stretch) -> _Part:
        index = np.arange(stretch.low, stretch.high)
        storage = self.storage[index].copy()
        # What belongs to the layer before or after is inner or not by chance of what was kept: where the
        # other inner unit does the same with a storage of an inner unit, that says which one is meant.
        if self._is_inner(stretch.unit) and not self._is_original(stretch):
            partner = self.storage[stretch.partner : stretch.partner + len(index)]
            foreign = ~self._inner_of(storage, stretch.unit // KEPT)
            shifted = foreign & self._inner_of(partner, stretch.unit // KEPT)
            storage[shifted] = partner[shifted]
        else:
            shifted = np.zeros(len(index), dtype=np.bool_)
        home = self.home[storage]
        instance = storage.copy()
        spread: list[_Part] = []
        for stack in self.copies:
            for role in (FIRST_INNER, LAST_INNER):
                mine = home == KEPT * stack + role
                if not mine.any():
                    continue
                if stretch.unit < 0 and role == LAST_INNER:
                    shared = mine.copy()
                    shared[mine] = self.left[stack][self.place[storage[mine]]]
                    spread.append(self._spread(index[shared], stack))
                    mine &= ~shared
                copy = self._copy_of(role, stretch, stack) + shifted[mine] * self._twin_shift(stretch.unit)
                instance[mine] = (
                    self.start[stack] + (copy - 1) * self.inner[stack] + self.place[storage[mine]]
                )
        layer = np.full(len(index), self._layer(stretch))
        part = _Part(index, instance, layer)
        if not spread:
            return part
        kept = ~np.isin(index, np.concatenate([s.events for s in spread]))
        whole = [_Part(index[kept], instance[kept], layer[kept]), *spread]
        merged = _Part(*(np.concatenate(column) for column in zip(*whole, strict=True)))
        order = np.argsort(merged.events, kind="stable")
        return _Part(*(column[order] for column in merged))

    def _is_original(self, stretch: _Stretch) -> bool:
        """Whether a stretch is played in the very place in which it was traced."""
        first = stretch.unit % KEPT == FIRST_INNER
        return stretch.copy == (1 if first else self.copies[stretch.unit // KEPT])

    def _inner_of(self, storages: Integers, stack: int) -> NDArray[np.bool_]:
        home = self.home[storages]
        found: NDArray[np.bool_] = (home == KEPT * stack + FIRST_INNER) | (home == KEPT * stack + LAST_INNER)
        return found

    def _spread(self, index: Integers, stack: int) -> _Part:
        """Outside of layers, what frees a storage of both inner units frees that of each copy between them."""
        many = np.arange(2, self.copies[stack] + 1)
        places = self.place[self.storage[index]]
        first = self.start[stack] + (many[None, :] - 1) * self.inner[stack] + places[:, None]
        repeated = np.repeat(index, len(many))
        return _Part(repeated, first.ravel(), np.full(len(repeated), -1))

    def _copy_of(self, role: int, stretch: _Stretch, stack: int) -> int:
        """Which copy a stretch means by a storage of the inner unit ``role``."""
        if not self._is_inner(stretch.unit) or stretch.unit // KEPT != stack:
            return 1 if role == FIRST_INNER else self.copies[stack]
        return stretch.copy + role - stretch.unit % KEPT

    def _twin_shift(self, unit: int) -> int:
        """From what the other inner unit sees around it to what this one sees."""
        return -1 if unit % KEPT == FIRST_INNER else 1

    def _layer(self, stretch: _Stretch) -> int:
        if stretch.unit < 0:
            return -1
        stack, role = divmod(stretch.unit, KEPT)
        if role < FIRST_INNER:
            return role - (FIRST_INNER - self.before[stack])
        copy = stretch.copy if self._is_inner(stretch.unit) else self.copies[stack] + 1
        return self.before[stack] - 1 + copy


class _Stretch(NamedTuple):
    """Events of one unit, played as its ``copy``; ``partner`` is where the other inner unit's begin."""

    low: int
    high: int
    unit: int
    copy: int
    partner: int


class _Part(NamedTuple):
    events: Integers
    instance: Integers
    layer: Integers

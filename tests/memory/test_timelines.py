"""The whole step from the trace of five layers: it is what a trace of all layers would have been, event by event."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lora.inspection.memory.estimate import FastPeak
from pytest_lora.inspection.memory.layer_stacks import KEPT
from pytest_lora.inspection.memory.timeline import Block, NotRepeatingError, Timeline, expand

Said = tuple[str, bool, int]
"""Name of a storage, whether it is freed, and the layer of its stack that does it, or -1."""


def played(*stacks: int) -> Iterator[tuple[str, bool, int, int]]:
    """A forward, a backward and an optimizer over stacks of so many layers: storage, whether freed, stack, layer."""
    yield "inputs", False, -1, -1
    for stack, layers in enumerate(stacks):
        for i in range(layers):
            yield f"{stack} hidden {i}", False, stack, i
            yield f"{stack} scratch {i}", False, stack, i
            yield f"{stack} kept {i}", False, stack, i
            yield f"{stack} saved {i}", False, stack, i
            yield f"{stack} mark {i}", False, stack, i
            yield f"{stack} held {i}", False, stack, i
            yield f"{stack} scratch {i}", True, stack, i
            if i:
                yield f"{stack} hidden {i - 1}", True, stack, i
        yield f"{stack} end", False, -1, -1
        yield f"{stack} hidden {layers - 1}", True, -1, -1
    for stack, layers in reversed(list(enumerate(stacks))):
        yield f"{stack} end", True, -1, -1
        for i in reversed(range(layers)):
            yield f"{stack} back {i}", False, stack, i
            if i < layers - 1:
                yield f"{stack} back {i + 1}", True, stack, i
            if i:  # what the layer below made and this one saved
                yield f"{stack} saved {i - 1}", True, stack, i
            else:
                yield f"{stack} held {layers - 2}", True, stack, i
            yield f"{stack} kept {i}", True, stack, i
            yield f"{stack} gradient {i}", False, stack, i
        yield f"{stack} back 0", True, -1, -1
    for stack, layers in enumerate(stacks):
        for i in range(layers - 1):
            yield f"{stack} mark {i + 1}", True, stack, i
            yield f"{stack} state {i}", False, stack, i
    for stack, layers in enumerate(stacks):
        for i in range(layers):
            yield f"{stack} gradient {i}", True, -1, -1
    yield "inputs", True, -1, -1
    yield "late", False, -1, -1


Trace = tuple[list[int], list[int], list[object], list[str]]


def traced(*stacks: int) -> Trace:
    """Events, units, what storages share, and their names."""
    names: list[str] = []
    events, units = [], []
    for name, is_freed, stack, layer in played(*stacks):
        if not is_freed:
            names.append(name)
        number = names.index(name)
        events.append(~number if is_freed else number)
        units.append(KEPT * stack + layer if stack >= 0 else -1)
    return events, units, [name.split()[1:2] for name in names], names


def named(line: Timeline, trace: Trace) -> list[tuple[str, bool, int]]:
    """What the whole step does: kind of storage, whether it is freed, and the layer."""
    events, _, _, names = trace
    found = []
    for index, layer in zip(line.index.tolist(), line.layers.tolist(), strict=True):
        event = events[index]
        found.append((names[max(event, ~event)].rstrip("0123456789"), event < 0, layer))
    return found


@settings(max_examples=12, deadline=None)
@given(st.integers(6, 11), st.integers(6, 9))
def test_a_step_of_five_layers_tells_that_of_all(first: int, second: int) -> None:
    trace = traced(KEPT, KEPT)
    events, units, like, _ = trace
    line = expand(events, units, {0: first - 3, 1: second - 3}, like)
    whole = list(played(first, second))
    assert named(line, trace) == [
        (name.rstrip("0123456789"), freed, layer) for name, freed, _, layer in whole
    ]
    # The same storage wherever it is the same in a trace of all layers.
    of: dict[str, int] = {}
    for instance, (name, *_) in zip(line.instances.tolist(), whole, strict=True):
        assert of.setdefault(name, instance) == instance
    assert len(set(of.values())) == len(of)
    # The peak from the blocks alone.
    names = trace[3]
    sizes = np.array([3**number % 101 for number in range(len(names))])
    kinds = dict(zip(names, sizes.tolist(), strict=True))
    for name in names:  # inner layers are alike
        kinds[name] = kinds[name.replace(" 3", " 2")]
    storages = np.array([max(event, ~event) for event in events])
    for late in (1, 10**6):  # a peak amid the step, and one behind all that is freed for many layers at once
        sizes = np.array([late if name == "late" else kinds[name] for name in names])
        changes = np.where(np.array(events)[line.index] < 0, -1, 1) * sizes[storages[line.index]]
        assert FastPeak(line, storages)(sizes) == int(np.cumsum(changes).max())


def played_alike(layers: int) -> Iterator[tuple[str, bool, int]]:
    """A step whose last layer makes and frees what those before it do; what it hands on is freed outside."""
    yield "inputs", False, -1
    for i in range(layers):
        yield f"hidden {i}", False, i
        yield f"kept {i}", False, i
    yield f"back {layers}", False, -1
    yield f"hidden {layers - 1}", True, -1
    for i in reversed(range(layers)):
        yield f"back {i}", False, i
        yield f"back {i + 1}", True, i
        if i:  # the gradient ends in the first layer
            yield f"hidden {i - 1}", True, i
        yield f"kept {i}", True, i
        yield f"gradient {i}", False, i
    yield "back 0", True, -1
    for i in range(layers):
        yield f"gradient {i}", True, -1


@pytest.mark.parametrize("layers", [4, 7])
def test_a_step_of_three_layers_tells_that_of_all(layers: int) -> None:
    names: list[str] = []
    events, units = [], []
    for name, is_freed, layer in played_alike(3):
        names += [] if is_freed else [name]
        events.append(~names.index(name) if is_freed else names.index(name))
        units.append(layer + 1 if layer >= 0 else -1)  # the second unit of five is the first one here
    line = expand(events, units, {0: layers - 1}, [name.split()[0] for name in names])
    whole = list(played_alike(layers))
    assert named(line, (events, units, [], names)) == [
        (name.rstrip("0123456789"), freed, layer) for name, freed, layer in whole
    ]
    of: dict[str, int] = {}
    for instance, (name, *_) in zip(line.instances.tolist(), whole, strict=True):
        assert of.setdefault(name, instance) == instance
    assert len(set(of.values())) == len(of)


def test_something_else_may_begin_in_the_same_unit() -> None:
    """The optimizer ends in the last layer, and its gradient is the first to be freed."""
    events, units = [0, 1, 2, 3, ~1, ~0, ~3, ~2], [2, 3, 2, 3, 3, 2, 3, 2]
    like: list[object] = ["a", "a", "b", "b"]
    with pytest.raises(NotRepeatingError):
        expand(events, units, {0: 3}, like)
    assert expand(events, units, {0: 3}, like, breaks=[4]).layers.tolist() == [
        0,
        1,
        2,
        0,
        1,
        2,
        2,
        1,
        0,
        2,
        1,
        0,
    ]


def test_the_blocks_of_a_step() -> None:
    # Outside, five layers that each make one storage, and the optimizer that frees all of them.
    events = [0, 1, 2, 3, 4, 5, ~1, ~2, ~3, ~4, ~5, ~0]
    units = [-1, 0, 1, 2, 3, 4, -1, -1, -1, -1, -1, -1]
    line = expand(events, units, {0: 4}, [None] * 6)
    assert line.blocks == (
        Block(0, 1, 1),
        Block(1, 2, 1),
        Block(2, 3, 1),
        Block(3, 4, 1),
        Block(4, 5, 3),
        Block(5, 6, 1),
        Block(6, 12, 1),
    )
    assert line.weights.tolist() == [1, 1, 1, 1, 1, 1, -1, -1, -1, -3, -1, -1]
    assert line.index.tolist() == [0, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 9, 9, 9, 10, 11]
    assert line.layers.tolist() == [-1, 0, 1, 2, 3, 4, 5, 6, *[-1] * 8]
    assert line.instances.tolist() == [0, 1, 2, 6, 7, 8, 9, 5, 1, 2, 6, 7, 8, 9, 5, 0]


def test_a_step_of_inner_layers_alone() -> None:
    line = expand([0, 1, ~0, ~1], [2, 3, -1, -1], {0: 3}, [None] * 2)
    assert line.instances.tolist() == [2, 3, 4, 2, 3, 4]
    assert line.weights.tolist() == [1, 1, -1, -2]
    assert line.layers.tolist() == [0, 1, 2, -1, -1, -1]


@pytest.mark.parametrize(
    ("events", "units", "copies", "like"),
    [
        pytest.param([0, 1], [2, 3], {0: 4}, ["a", "b"], id="other storages"),
        pytest.param([0, 1, ~1], [2, 3, 3], {0: 4}, ["a", "a"], id="one frees, one does not"),
        pytest.param([0, 1], [2, -1], {0: 4}, ["a", "a"], id="one alone"),
        pytest.param(
            [0, 1, ~1, 2, 3, ~2], [2, 2, 2, 3, 3, 3], {0: 4}, ["a"] * 4, id="frees another of its own"
        ),
        pytest.param(
            [9, 0, 1, ~9, 2, ~2, 3][1:], [2, 2, -1, 3, 3, 3], {0: 4}, ["a"] * 10, id="in another order"
        ),
        pytest.param([0, 1, 2], [2, -1, 3], {0: 4}, ["a", "b", "a"], id="something between"),
        pytest.param([0, 1, 2, 3], [2, 8, 3, 7], {0: 4, 1: 4}, ["a"] * 4, id="of two stacks"),
        pytest.param([0, 1], [3, 2], {0: 4}, ["a", "b"], id="other storages, falling"),
        pytest.param([2, 0, 1, ~2, ~2], [-1, 2, 3, 2, 3], {0: 4}, ["a"] * 3, id="freed by each copy"),
        pytest.param([0, 1, ~1, ~0], [2, 3, 2, 3], {0: 4}, ["a"] * 2, id="freed the other way round"),
        pytest.param([~0, ~1, 0, 1], [2, 3, 2, 3], {0: 4}, ["a"] * 2, id="freed before it is made"),
    ],
)
def test_layers_that_do_not_repeat_are_refused(
    events: list[int], units: list[int], copies: dict[int, int], like: list[object]
) -> None:
    with pytest.raises(NotRepeatingError):
        expand(events, units, copies, like)

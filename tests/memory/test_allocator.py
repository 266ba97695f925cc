"""The caching allocator's replay, against one that says the rules in the plainest way."""

from __future__ import annotations

import importlib
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_lora.facts.memory import StepSetting
from pytest_lora.inspection.memory import cuda_allocator, predictor
from pytest_lora.inspection.memory.cuda_allocator import fastest_replay, max_reserved, plainly_replayed
from tests.memory.test_estimate import adapter, small

KIB, MIB = 2**10, 2**20
Block = list[Any]
"""Size, and whether it is free; a segment is a list of them."""


def plainly_reserved(events: list[tuple[int, int, bool]], emptied_before: int | None) -> int:
    """Segments as lists of blocks, searched from end to end; events are instance, bytes, and whether it is freed."""
    total = 0
    for of_small in (True, False):
        segments: list[list[Block]] = []
        of: dict[int, Block] = {}
        most = 0
        for number, (instance, size, is_free) in enumerate(events):
            if number == emptied_before:
                segments = [s for s in segments if len(s) > 1 or not s[0][1]]
            size = max(512, -(-size // 512) * 512)
            if (size <= MIB) is not of_small:
                continue
            if is_free:
                of.pop(instance)[1] = True
                segments = [joined(segment) for segment in segments]
                continue
            fitting = [
                (block[0], s, b)
                for s, segment in enumerate(segments)
                for b, block in enumerate(segment)
                if block[1] and block[0] >= size
            ]
            if not fitting:
                whole = (
                    2 * MIB if of_small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
                )
                segments.append([[whole, True]])
                fitting = [(whole, len(segments) - 1, 0)]
            whole, s, b = min(fitting)
            rest = whole - size
            taken = [whole, False]
            segments[s][b : b + 1] = [taken]
            if rest >= 512 if of_small else rest > MIB:
                taken[0] = size
                segments[s].insert(b + 1, [rest, True])
            of[instance] = taken
            most = max(most, sum(block[0] for segment in segments for block in segment))
        total += most
    return total


def joined(segment: list[Block]) -> list[Block]:
    found: list[Block] = []
    for block in segment:
        if found and found[-1][1] and block[1]:
            found[-1][0] += block[0]
        else:
            found.append(block)
    return found


SIZES = [512, 300 * KIB, MIB, MIB + 1, 3 * MIB, 10 * MIB - 512, 10 * MIB, 11 * MIB, 40 * MIB]


def random_trace(seed: int) -> tuple[list[tuple[int, int, bool]], int | None]:
    """Storages of a few sizes, made and freed in any order; long enough that blocks are split and joined often."""
    pick = random.Random(seed)
    sizes = [pick.choice([*SIZES, pick.randint(1, 24 * MIB)]) for _ in range(4)]
    events: list[tuple[int, int, bool]] = []
    live: list[tuple[int, int]] = []
    for instance in range(60):
        live.append((instance, pick.choice(sizes)))
        events.append((*live[-1], False))
        while live and pick.random() < 0.45:
            events.append((*live.pop(pick.randrange(len(live))), True))
    return events, pick.choice([None, pick.randint(0, len(events))])


@pytest.fixture(params=["plain", "compiled"])
def replay(request: pytest.FixtureRequest) -> Any:
    if request.param == "plain":
        return plainly_replayed
    assert fastest_replay() is not plainly_replayed, "numba, of the extra pytest-lora[fast], is missing"
    return fastest_replay()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_the_replay_keeps_the_rules(replay: Any, seed: int) -> None:
    events, emptied_before = random_trace(seed)
    instances = np.array([instance for instance, _, _ in events], dtype=np.int64)
    sizes = np.zeros(60, dtype=np.int64)
    for instance, size, _ in events:
        sizes[instance] = size
    frees = np.array([is_free for _, _, is_free in events], dtype=np.bool_)
    fast = max_reserved(sizes, instances, instances, frees, emptied_before, replay)
    assert fast == plainly_reserved(events, emptied_before)


def test_nothing_reserves_nothing(replay: Any) -> None:
    nothing = np.zeros(0, dtype=np.int64)
    assert max_reserved(nothing, nothing, nothing, np.zeros(0, dtype=np.bool_), None, replay) == 0


def test_it_is_compiled_only_where_many_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def as_if_compiled(*arguments: Any) -> int:
        used.append("compiled")
        return plainly_replayed(*arguments)

    monkeypatch.setattr(predictor, "fastest_replay", lambda: as_if_compiled)
    monkeypatch.setattr(predictor, "COMPILE_AFTER", 1)
    monkeypatch.setattr(predictor.Predictor, "_replays", 0)
    memory = predictor.Predictor(small(), adapter(), StepSetting(1, 1))
    first = memory.estimate(2, 32, 8)
    assert not used
    assert memory.peak_reserved(2, 32, 8) == first.peak_reserved
    assert used == ["compiled", "compiled"]  # small storages and the others


def test_without_numba_or_a_place_to_write_it_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = importlib.import_module("numba")

    def refuse(signature: str, *, cache: bool) -> Any:
        if cache:
            raise RuntimeError("cannot cache function 'replayed': no locator available for file '<zip>'")
        return lambda function: "compiled anew"

    monkeypatch.setattr(numba, "njit", refuse)
    assert fastest_replay.__wrapped__() == "compiled anew"

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(cuda_allocator.importlib, "import_module", missing)
    assert fastest_replay.__wrapped__() is plainly_replayed


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 2**50), st.booleans()), min_size=1, max_size=30))
def test_steps_of_many_terabytes_are_reserved_for_too(blocks: list[tuple[int, bool]]) -> None:
    """Sizes and addresses have to share 62 bits: what is above is counted more coarsely, and never wrongly."""
    sizes = np.array([size for size, _ in blocks], dtype=np.int64)
    events = [(number, False) for number in range(len(blocks))]
    events += [(number, True) for number, (_, is_freed) in enumerate(blocks) if is_freed]
    storages = np.array([number for number, _ in events])
    frees = np.array([is_free for _, is_free in events])
    reserved = max_reserved(sizes, storages, storages, frees)
    held = sum(size for size, _ in blocks)
    assert held <= reserved <= held * 1.02 + len(blocks) * 20 * MIB

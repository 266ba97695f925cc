"""The exhibits of a session: each distinct one once, those of failing tests first, no more than anybody looks at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from pytest_lora.facts.figures import AdapterMap, Exhibit, LossCurve, MemoryBudget, RankSweep
from pytest_lora.report.session import RanTest, Session

E = TypeVar("E", bound=Exhibit)


@dataclass(frozen=True, slots=True)
class Shown(Generic[E]):
    """An exhibit and the tests that have it."""

    exhibit: E
    tests: tuple[RanTest, ...]

    @property
    def failed(self) -> bool:
        """Whether a test that has it found an error."""
        return any(test.verdict == "error" for test in self.tests)


@dataclass(frozen=True, slots=True)
class Room(Generic[E]):
    """The exhibits of a kind, and how many more there are."""

    shown: tuple[Shown[E], ...]
    more: int


@dataclass(frozen=True, slots=True)
class Gallery:
    """Everything to look at."""

    maps: Room[AdapterMap]
    curves: Room[LossCurve]
    budgets: Room[MemoryBudget]
    sweeps: Room[RankSweep]


def gallery(session: Session) -> Gallery:
    """Arrange the exhibits of a session."""
    by_kind: dict[type[Any], dict[Any, list[RanTest]]] = {}
    for test in session.tests:
        for exhibit in dict.fromkeys(one for report in test.reports for one in report.exhibits):
            if isinstance(exhibit, MemoryBudget) and test.gpu and exhibit.measured is None:
                exhibit = replace(exhibit, measured=test.gpu.peak_bytes)
            by_kind.setdefault(type(exhibit), {}).setdefault(exhibit, []).append(test)
    return Gallery(
        _room(by_kind.get(AdapterMap, {}), 12, lambda one: "dead" not in one.states),
        _room(by_kind.get(LossCurve, {}), 24, _went_down),
        _room(by_kind.get(MemoryBudget, {}), 12, lambda one: one.fits),
        _room(by_kind.get(RankSweep, {}), 6, lambda one: one.chosen is not None),
    )


def _went_down(curve: LossCurve) -> bool:
    finite = all(map(math.isfinite, curve.losses))
    return finite and curve.drop is not None and curve.drop >= (curve.wanted or 0.0)


def _room(found: dict[E, list[RanTest]], most: int, is_fine: Callable[[E], bool]) -> Room[E]:
    every = [Shown(exhibit, tuple(tests)) for exhibit, tests in found.items()]
    every.sort(key=lambda one: (not one.failed, is_fine(one.exhibit)))
    return Room(tuple(every[:most]), len(every[most:]))

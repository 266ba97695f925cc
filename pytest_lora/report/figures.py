"""The figures of a session: each distinct one once, those of failing tests first, no more than anybody looks at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from pytest_lora.facts.figures import AdapterMap, Figure, LossCurve, MemoryBudget, RankSweep
from pytest_lora.facts.figures.recipes import RecipeCard
from pytest_lora.report.session import RanTest, Session

E = TypeVar("E", bound=Figure)


@dataclass(frozen=True, slots=True)
class Shown(Generic[E]):
    """A figure and the tests that have it."""

    figure: E
    tests: tuple[RanTest, ...]

    @property
    def failed(self) -> bool:
        """Whether a test that has it found an error."""
        return any(test.verdict == "error" for test in self.tests)


@dataclass(frozen=True, slots=True)
class Selection(Generic[E]):
    """The figures of a kind, and how many more there are."""

    shown: tuple[Shown[E], ...]
    more: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything to look at."""

    maps: Selection[AdapterMap]
    curves: Selection[LossCurve]
    budgets: Selection[MemoryBudget]
    sweeps: Selection[RankSweep]
    recipes: Selection[RecipeCard]


def figures(session: Session) -> Figures:
    """Arrange the figures of a session."""
    by_kind: dict[type[Any], dict[Any, list[RanTest]]] = {}
    for test in session.tests:
        for figure in dict.fromkeys(one for report in test.reports for one in report.figures):
            if isinstance(figure, MemoryBudget) and test.gpu and figure.measured is None:
                figure = replace(figure, measured=test.gpu.peak_bytes)
            by_kind.setdefault(type(figure), {}).setdefault(figure, []).append(test)
    return Figures(
        _selection(by_kind.get(AdapterMap, {}), 12, lambda one: "dead" not in one.states),
        _selection(by_kind.get(LossCurve, {}), 24, _went_down),
        _selection(by_kind.get(MemoryBudget, {}), 12, lambda one: one.fits),
        _selection(by_kind.get(RankSweep, {}), 6, lambda one: one.chosen is not None),
        _selection(by_kind.get(RecipeCard, {}), 40, lambda one: one.fits is not False),
    )


def _went_down(curve: LossCurve) -> bool:
    finite = all(map(math.isfinite, curve.losses))
    return finite and curve.drop is not None and curve.drop >= (curve.wanted or 0.0)


def _selection(found: dict[E, list[RanTest]], most: int, is_fine: Callable[[E], bool]) -> Selection[E]:
    every = [Shown(figure, tuple(tests)) for figure, tests in found.items()]
    every.sort(key=lambda one: (not one.failed, is_fine(one.figure)))
    return Selection(tuple(every[:most]), len(every[most:]))

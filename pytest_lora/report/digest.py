"""The findings of a session by rule and its figures, each distinct one once, what is gravest first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from pytest_lora.facts.figures import AdapterMap, Figure, LossCurve, MemoryBudget, RankSweep
from pytest_lora.facts.figures.recipes import RecipeCard
from pytest_lora.findings import SEVERITIES, Finding, Severity, counted
from pytest_lora.report.session import RanTest, Session, counted_tests

E = TypeVar("E", bound=Figure)


@dataclass(slots=True)
class FoundIn:
    """A finding and the tests that have it."""

    finding: Finding
    tests: list[RanTest] = field(default_factory=list)


@dataclass(slots=True)
class RuleGroup:
    """What one rule found.

    Attributes:
        code: Its code.
        title: Its name as words.
        found: Each distinct finding, the gravest first.
    """

    code: str
    title: str
    found: list[FoundIn]

    @property
    def severity(self) -> Severity:
        """The gravest."""
        return min((one.finding.severity for one in self.found), key=SEVERITIES.index)

    @property
    def count(self) -> str:
        """How many findings in how many tests."""
        severities = [one.finding.severity for one in self.found for _ in one.tests]
        number = len(severities)
        several = f"{number} finding{'' if number == 1 else 's'}"
        findings = several if len(set(severities)) == 1 else counted(severities)
        return (
            f"{findings} in {counted_tests(len({test.nodeid for one in self.found for test in one.tests}))}"
        )


def rule_groups(session: Session) -> list[RuleGroup]:
    """The groups of a session, errors first, then by code."""
    groups: dict[str, dict[Finding, FoundIn]] = {}
    for test in session.tests:
        for finding in dict.fromkeys(test.findings):
            found = groups.setdefault(finding.code, {}).setdefault(finding, FoundIn(finding))
            found.tests.append(test)
    made = [
        RuleGroup(
            code,
            next(iter(found)).title,
            sorted(found.values(), key=lambda one: SEVERITIES.index(one.finding.severity)),
        )
        for code, found in groups.items()
    ]
    return sorted(made, key=lambda group: (SEVERITIES.index(group.severity), group.code))


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

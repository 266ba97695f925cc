"""Baselines: what tests measured, kept as JSON, and compared with what they measure now. Plain data only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from pytest_lora.values import json_text, printable, shown

MOST = 2**63
"""Of a quantity, whose unit may be bytes."""

SCHEMA = 1
"""Version of the file's form."""

Verdict = Literal["regression", "improved", "same", "new"]
Value = int | float | tuple[str, ...]
Measurements = Mapping[str, Mapping[str, Value]]
"""Quantities by the id of the test, values by the name of the quantity."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a quantity may move before it counts.

    Attributes:
        relative: Fraction of the baseline.
        absolute: In the quantity's own unit; the larger of both bounds counts.
        worse: The direction that is a regression: ``"up"``, ``"down"`` or ``"either"``.
    """

    relative: float
    absolute: float
    worse: Literal["up", "down", "either"]

    def allows(self, before: float) -> float:
        """The largest move from this baseline that counts as none."""
        return max(self.relative * abs(before), self.absolute)

    def __str__(self) -> str:
        parts = [f"{100 * self.relative:g} %"] if self.relative else []
        parts += [f"{self.absolute:g}"] if self.absolute else []
        return " or ".join(parts) or "exact"


TOLERANCES = {
    "trainable parameters": Tolerance(0.0, 0.0, "either"),
    "scaling": Tolerance(1e-6, 0.0, "either"),
    "predicted peak": Tolerance(0.02, 0.0, "up"),
    "measured peak": Tolerance(0.05, 0.0, "up"),
    "loss drop": Tolerance(0.1, 0.01, "down"),
    "findings": Tolerance(0.0, 0.0, "up"),
}
"""By the first words of a quantity's name.

Parameters are counted, and a scaling is exact but for rounding. A predicted peak changes with the libraries
whose code is traced; 2 % is the bound of its own error. A measured one also varies with the allocator, so
it has 5 %. The drop of a loss is a fraction of that loss, and differs a little between machines and
versions: 10 % of it, or a hundredth of the loss.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One quantity of one test, beside its baseline.

    Attributes:
        test: Id of the test.
        quantity: Name of the quantity.
        before: The baseline; None where there is none.
        now: What was measured; None where nothing was.
        verdict: ``"regression"`` alone fails.
    """

    test: str
    quantity: str
    before: Value | None
    now: Value | None
    verdict: Verdict

    @property
    def cells(self) -> tuple[str, ...]:
        """Test, quantity, baseline, now, tolerance and verdict, as words."""
        tolerance = str(_tolerance(self.quantity))
        return (
            _in_line(self.test),
            _in_line(self.quantity),
            _shown(self.before),
            _shown(self.now),
            tolerance,
            self.verdict,
        )


class BaselineError(ValueError):
    """A file is no baseline; the message says what to do."""


def compare(before: Measurements, now: Measurements) -> list[Row]:
    """Every quantity of the tests that ran, beside its baseline, sorted by test and quantity.

    Tests that did not run are left out: a part of the tests may be compared alone.
    """
    return [
        Row(test, quantity, old, new, verdict(quantity, old, new))
        for test in sorted(now)
        for quantity in sorted({*before.get(test, {}), *now[test]})
        for old, new in [(before.get(test, {}).get(quantity), now[test].get(quantity))]
    ]


def verdict(quantity: str, before: Value | None, now: Value | None) -> Verdict:
    """How a quantity stands to its baseline.

    What is measured no more is a regression, because nobody would notice; what was never measured is new.
    """
    if before is None:
        return "new"
    if now is None:
        return "regression"
    if isinstance(before, tuple) or isinstance(now, tuple):
        return _of_codes(_codes(before), _codes(now))
    tolerance = _tolerance(quantity)
    moved = now - before
    if moved != moved:
        return "regression"
    if abs(moved) <= tolerance.allows(before):
        return "same"
    upwards = moved > 0
    if tolerance.worse == "either" or upwards == (tolerance.worse == "up"):
        return "regression"
    return "improved"


def merged(before: Measurements, now: Measurements) -> dict[str, dict[str, Value]]:
    """The new baseline: tests that ran as they are now, the others as they were; sorted."""
    both = {**before, **now}
    return {test: dict(sorted(both[test].items())) for test in sorted(both) if both[test]}


def to_json(measurements: Measurements) -> str:
    """A baseline as a file: one quantity a line, sorted, so that a diff of it is readable."""
    tests = []
    for test, found in sorted(measurements.items()):
        lines = ",\n".join(
            f"   {json_text(name)}: {json_text(value)}" for name, value in sorted(found.items())
        )
        tests.append(f"  {json_text(test)}: {{\n{lines}\n  }}")
    body = ",\n".join(tests)
    return f'{{\n "pytest-lora baseline": {SCHEMA},\n "tests": {{\n{body}\n }}\n}}\n'


def from_json(text: str) -> dict[str, dict[str, Value]]:
    """The measurements that ``to_json`` wrote.

    Raises:
        BaselineError: It is no JSON, no baseline, of another version, or has a value that is none.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BaselineError(
            f"is no JSON ({error}); restore it, or delete it and write it anew with --lora-update-baseline"
        ) from error
    version = data.get("pytest-lora baseline") if isinstance(data, dict) else None
    if version is None:
        raise BaselineError("is no baseline of pytest-lora; name another file, or delete this one")
    if version != SCHEMA:
        raise BaselineError(
            f"has version {shown(version)}, and this pytest-lora reads {SCHEMA}; delete it and write it anew with "
            "--lora-update-baseline"
        )
    tests = data.get("tests")
    if not isinstance(tests, dict) or not all(isinstance(found, dict) for found in tests.values()):
        raise BaselineError('has no "tests" with quantities; restore it, or delete it and write it anew')
    return {test: {name: _value(test, name, v) for name, v in found.items()} for test, found in tests.items()}


def table(rows: Iterable[Row]) -> list[str]:
    """Rows side by side, each test's id once."""
    lines: list[tuple[str, ...]] = [("test", "quantity", "baseline", "now", "tolerance", "verdict")]
    for _, of_test in groupby(rows, key=lambda row: row.test):
        for number, row in enumerate(of_test):
            lines.append(("" if number else row.cells[0], *row.cells[1:]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def diff(before: Measurements, after: Measurements) -> Iterator[str]:
    """What an update changes, a line a quantity: ``test  quantity: before -> after``."""
    for test in sorted({*before, *after}):
        old, new = before.get(test, {}), after.get(test, {})
        for quantity in sorted({*old, *new}):
            if old.get(quantity) != new.get(quantity):
                change = f"{_shown(old.get(quantity))} -> {_shown(new.get(quantity))}"
                yield f"{_in_line(test)}  {_in_line(quantity)}: {change}"


def _of_codes(before: tuple[str, ...], now: tuple[str, ...]) -> Verdict:
    if set(now) - set(before):
        return "regression"
    return "improved" if set(before) - set(now) else "same"


def _codes(value: Value) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else (str(value),)


def _tolerance(quantity: str) -> Tolerance:
    for name, tolerance in TOLERANCES.items():
        if quantity.startswith(name):
            return tolerance
    return Tolerance(0.0, 0.0, "either")


def _in_line(name: str) -> str:
    return " ".join(printable(name).split())


def _shown(value: Value | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return " ".join(value) or "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _value(test: str, name: str, value: Any) -> Value:
    if isinstance(value, list) and all(isinstance(code, str) for code in value):
        return tuple(value)
    if isinstance(value, float) or (type(value) is int and abs(value) <= MOST):
        return value
    raise BaselineError(
        f"has {shown(value)} as {shown(name)} of {shown(test)}, which is neither a number that is measured nor a list "
        "of codes"
    )

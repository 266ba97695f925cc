"""``--lora-baseline``: the session's measurements beside a file's; imported only where one is given.

The reports of all tests come together in the controller, also under xdist, and it alone compares and writes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_lora.files import text_of, write_whole
from pytest_lora.plugin.gpu import report as gpu_report
from pytest_lora.plugin.summary import reports_by_test
from pytest_lora.report.baseline import (
    BaselineError,
    Row,
    Value,
    compare,
    diff,
    from_json,
    merged,
    table,
    to_json,
)
from pytest_lora.values import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pytest_lora.findings import Report

MOST_BYTES = 64 * 2**20
"""Of a baseline; 10,000 tests of ten values each take about 10 MB."""

MANY = 8
"""Values of one quantity that a test may have; of a test that draws hundreds, none is a measure of it."""

_COMPARED = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)


def read(path: Path, *, update: bool) -> dict[str, dict[str, Value]]:
    """The baseline in a file; empty where there is none yet and it is to be written.

    Raises:
        pytest.UsageError: The file is missing or no baseline.
    """
    if not path.exists():
        if update:
            return {}
        raise pytest.UsageError(f"--lora-baseline: there is no {path}; --lora-update-baseline writes it")
    try:
        return from_json(text_of(path, MOST_BYTES))
    except (OSError, UnicodeDecodeError) as error:
        raise pytest.UsageError(f"--lora-baseline: {path} cannot be read: {error}") from error
    except BaselineError as error:
        raise pytest.UsageError(f"--lora-baseline: {path} {error}") from error


class BaselineGate:
    """Compares when the session is over, and fails it where something regressed."""

    def __init__(self, path: Path, *, update: bool) -> None:
        self._path, self._update = path, update
        self._before = read(path, update=update)
        self._reports: list[pytest.TestReport] = []
        self._rows: list[Row] = []
        self._changes: list[str] = []
        self._trouble = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what was measured."""
        self._reports.append(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Compare, or write the file anew."""
        if session.exitstatus not in _COMPARED:
            return
        now = measurements(self._reports)
        if self._update:
            after = merged(self._before, now)
            self._changes = list(diff(self._before, after))
            if self._changes or not self._path.exists():
                try:
                    write_whole(self._path, to_json(after))
                except OSError as error:
                    self._trouble = f"not written, and as it was before: {error}"
                    session.exitstatus = pytest.ExitCode.TESTS_FAILED
            return
        self._rows = compare(self._before, now)
        if any(row.verdict == "regression" for row in self._rows):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Write the section "LoRA baseline"."""
        terminalreporter.ensure_newline()
        terminalreporter.section("LoRA baseline")
        lines = (
            self._update_lines()
            if self._update
            else self._comparison(terminalreporter.config.get_verbosity() > 0)
        )
        for line in map(printable, lines):
            terminalreporter.write_line(line, red=line.endswith("regression"))

    def _update_lines(self) -> Iterator[str]:
        yield from self._changes or ["nothing changed"]
        if self._trouble:
            yield f"ERROR: {self._path} is {self._trouble}"
            return
        yield f"written to {self._path}" if self._changes else f"{self._path} stays as it is"

    def _comparison(self, whole: bool) -> Iterator[str]:
        """Rows that differ, all of them with -v, and how many there are of each kind."""
        shown = [row for row in self._rows if whole or row.verdict != "same"]
        if shown:
            yield from table(shown)
        count = Counter(row.verdict for row in self._rows)
        tests = len({row.test for row in self._rows})
        numbers = ", ".join(f"{number} {verdict}" for verdict, number in sorted(count.items()))
        total = f"{len(self._rows)} quantities of {tests} tests beside {self._path}"
        yield (
            f"{total}: {numbers}"
            if numbers
            else f"nothing was measured that could be compared with {self._path}"
        )
        if count["regression"]:
            verb = "quantity has" if count["regression"] == 1 else "quantities have"
            yield (
                f"FAILED: {count['regression']} {verb} regressed; "
                "if this is meant, --lora-update-baseline writes it to the file"
            )
        elif count["new"]:
            yield "if this is meant, --lora-update-baseline writes it to the file"


def measurements(reports: Iterable[pytest.TestReport]) -> dict[str, dict[str, Value]]:
    """What each test that ran has measured."""
    kept = list(reports)
    found: dict[str, dict[str, Value]] = {
        report.nodeid: {} for report in kept if report.when == "call" and report.outcome != "skipped"
    }
    for nodeid, judged in reports_by_test(kept).items():
        if judged:
            found.setdefault(nodeid, {}).update(of_reports(judged))
    for test, use in gpu_report.uses(kept).items():
        if use.peak_bytes is not None:
            found.setdefault(test, {})["measured peak"] = use.peak_bytes
    return found


def of_reports(reports: Iterable[Report]) -> dict[str, Value]:
    """The quantities of one test, each distinct value once."""
    kept = list(reports)
    values: defaultdict[str, list[Value]] = defaultdict(list)
    for report in kept:
        for name, value in report.measured:
            if value not in values[name]:
                values[name].append(value)
    found: dict[str, Value] = {}
    for name, several in values.items():
        if len(several) <= MANY:
            found |= {f"{name} #{n}" if n > 1 else name: value for n, value in enumerate(several, 1)}
    codes = {f.code for report in kept for f in (*report.errors, *report.warnings)}
    return {**found, "findings": tuple(sorted(codes))}

"""What is said of GPU tests at the end: in the terminal, and in Markdown for GitHub's job summary."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from pytest_lora.byte_sizes import format_bytes
from pytest_lora.plugin.options import GPU_PROPERTY
from pytest_lora.plugin.session_options import options_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

COLUMNS = ("test", "devices", "peak", "limit", "predicted", "seconds")
NONE = "-"


@dataclass(frozen=True)
class Row:
    """One GPU test of the session, as its last report tells; sizes in bytes."""

    test: str
    told: dict[str, Any]

    @property
    def cells(self) -> tuple[str, ...]:
        """The columns, a dash where nothing is known."""
        sizes = [self.told[f"{name}_bytes"] for name in ("peak", "limit", "predicted")]
        seconds = self.told["seconds"]
        return (
            self.test,
            ", ".join(self.told["devices"]),
            *(NONE if size is None else format_bytes(size) for size in sizes),
            NONE if seconds is None else f"{seconds:.2f}",
        )


def rows(reports: Iterable[pytest.TestReport]) -> list[Row]:
    """The GPU tests of the session in the order in which they ended; of several tries the last."""
    last: dict[str, Row] = {}
    for report in sorted(reports, key=lambda report: report.start):
        for name, value in report.user_properties:
            if name == GPU_PROPERTY:
                last.pop(report.nodeid, None)
                last[report.nodeid] = Row(report.nodeid, json.loads(str(value)))
    return list(last.values())


def write(terminal: pytest.TerminalReporter, reports: Iterable[pytest.TestReport]) -> None:
    """Write the section "GPU tests": with ``--lora-gpu-report`` all of them, and always what went wrong unseen."""
    if hasattr(terminal.config, "workerinput"):  # a worker has a terminal of its own, which nobody sees
        return
    found = rows(reports)
    options = options_of(terminal.config)
    lines = [*(_listing(found) if options.gpu_report else ()), *_troubles(found)]
    if lines:
        terminal.section("GPU tests")
        for line in lines:
            terminal.write_line(line)
    if options.gpu_report and options.step_summary:
        with open(options.step_summary, "a", encoding="utf-8") as summary:
            summary.write("\n".join(markdown(found)) + "\n")


def _ran(found: list[Row]) -> list[Row]:
    return [row for row in found if not row.told["skipped"] and row.told["devices"]]


def _skipped(found: list[Row]) -> dict[str, list[str]]:
    """The tests that did not run, by why."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for row in found:
        if row.told["skipped"]:
            groups[row.told["skipped"]].append(row.test)
    return groups


def _listing(found: list[Row]) -> Iterator[str]:
    table = [COLUMNS, *(row.cells for row in _ran(found))]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(COLUMNS))]
    for cells in table if len(table) > 1 else ():
        numbers = (f"{cell:>{width}}" for cell, width in zip(cells[2:], widths[2:], strict=True))
        yield "  ".join((f"{cells[0]:<{widths[0]}}", f"{cells[1]:<{widths[1]}}", *numbers))
    for reason, tests in _skipped(found).items():
        yield f"skipped: {reason}"
        yield from (f"  {test}" for test in tests)


def _troubles(found: list[Row]) -> Iterator[str]:
    """Yield what no single test shows: memory left behind, and tests that could not run as CUDA was broken."""
    for row in found:
        if size := row.told["left_bytes"]:
            where = ", ".join(row.told["devices"])
            yield f"{row.test} left {format_bytes(size)} ({size} bytes) allocated on {where}"
    broken = Counter(row.told["broken_by"] for row in found if row.told["broken_by"])
    for test, number in broken.items():
        were = "1 GPU test was" if number == 1 else f"{number} GPU tests were"
        yield f"{test} broke CUDA: {were} not run after it in that process"


def markdown(found: list[Row]) -> Iterator[str]:
    """Yield the report in GitHub's Markdown."""
    yield "### GPU tests"
    yield ""
    if ran := _ran(found):
        yield f"| {' | '.join(COLUMNS)} |"
        yield "| --- | --- | ---: | ---: | ---: | ---: |"
        for row in ran:
            test, *others = row.cells
            yield f"| `{_escaped(test)}` | {' | '.join(others)} |"
        yield ""
    for reason, tests in _skipped(found).items():
        yield f"- skipped: {_escaped(reason)}"
        yield from (f"  - `{_escaped(test)}`" for test in tests)
    for trouble in _troubles(found):
        yield f"- {_escaped(trouble)}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


class RequireGpu:
    """``--lora-require-gpu``: hooks of the process that decides how the session ends."""

    def __init__(self) -> None:
        self._ran = 0
        self._not_run = 0
        self._verdict = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the GPU tests that ran, and those that could not any more."""
        told = [json.loads(str(value)) for name, value in report.user_properties if name == GPU_PROPERTY]
        if not told:
            return
        if report.when == "call" and (not report.skipped or hasattr(report, "wasxfail")):
            self._ran += 1
        if report.when == "setup" and told[0]["broken_by"]:
            self._not_run += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a session in which no GPU test ran, or not all could."""
        if session.config.option.collectonly:
            return
        if not self._ran:
            self._verdict = "--lora-require-gpu: no GPU test ran"
        elif self._not_run:
            self._verdict = f"--lora-require-gpu: {self._not_run} not run, as CUDA was broken"
        if self._verdict and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say why the session failed."""
        if self._verdict:
            terminalreporter.write_line(f"ERROR: {self._verdict}", red=True, bold=True)

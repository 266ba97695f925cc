"""What is said of GPU tests at the end, and that there were any."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from pytest_lora.plugin.options import GPU_PROPERTY, recorded
from pytest_lora.plugin.session_options import options_of
from pytest_lora.report.session import (
    GPU_COLUMNS,
    GPU_TEXT_COLUMNS,
    GpuUse,
    gpu_cells,
    gpu_troubles,
    ran_on_gpu,
    skipped_on_gpu,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def uses(reports: Iterable[pytest.TestReport]) -> dict[str, GpuUse]:
    """The GPU tests of the session in the order in which they ended; of several tries the last."""
    last: dict[str, GpuUse] = {}
    for report in sorted(reports, key=lambda report: report.start):
        for text in recorded(report, GPU_PROPERTY):
            with suppress(
                ValueError, LookupError, TypeError, RecursionError
            ):  # a test may record what it likes
                data = json.loads(text)
                use = GpuUse(**{**data, "devices": tuple(data["devices"])})
                last.pop(report.nodeid, None)
                last[report.nodeid] = use
    return last


def write(terminal: pytest.TerminalReporter, reports: Iterable[pytest.TestReport]) -> None:
    """Write the section "GPU tests": with ``--lora-gpu-report`` all of them, and always what went wrong unseen."""
    if hasattr(terminal.config, "workerinput"):  # a worker has a terminal of its own, which nobody sees
        return
    found = uses(reports)
    listing = _listing(found) if options_of(terminal.config).gpu_report else ()
    lines = [*listing, *gpu_troubles(found)]
    if lines:
        terminal.section("GPU tests")
        for line in lines:
            terminal.write_line(line)


def _listing(found: dict[str, GpuUse]) -> Iterator[str]:
    table = [GPU_COLUMNS, *(gpu_cells(test, use) for test, use in ran_on_gpu(found).items())]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(GPU_COLUMNS))]
    texts = GPU_TEXT_COLUMNS
    for cells in table if len(table) > 1 else ():
        words = (f"{cell:<{width}}" for cell, width in zip(cells[:texts], widths, strict=False))
        numbers = (f"{cell:>{width}}" for cell, width in zip(cells[texts:], widths[texts:], strict=True))
        yield "  ".join((*words, *numbers))
    for reason, tests in skipped_on_gpu(found).items():
        yield f"skipped: {reason}"
        yield from (f"  {test}" for test in tests)


class RequireGpu:
    """``--lora-require-gpu``: hooks of the process that decides how the session ends."""

    def __init__(self) -> None:
        self._ran = 0
        self._not_run = 0
        self._verdict = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the GPU tests that ran, and those that could not any more."""
        use = uses([report]).get(report.nodeid)
        if use is None:
            return
        if report.when == "call" and (not report.skipped or hasattr(report, "wasxfail")):
            self._ran += 1
        if report.when == "setup" and use.broken_by:
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

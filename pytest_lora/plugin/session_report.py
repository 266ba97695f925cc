"""``--lora-report``: what the tests of a session report, gathered by the process that runs it and written to files.

The files are written again and again while the session goes on, so that something can be read when its process is
killed.
"""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from pytest_lora.files import write_whole
from pytest_lora.plugin import summary
from pytest_lora.plugin.gpu import report as gpu_report
from pytest_lora.plugin.options import GPU_PROPERTY, recorded
from pytest_lora.report.session import GpuUse, RanTest, Session, State

PACKAGES = (
    "pytest-lora",
    "pytest",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "safetensors",
)

WAIT = 2.0
"""Seconds from one write to the next while the session goes on, at least."""

REST = 20.0
"""How many times as long as a write took there is none after it."""

_OUTCOMES = ("failed", "error", "passed", "skipped", "xfailed", "xpassed", "rerun")


class Gathered:
    """What the reports of a session say, one after another.

    Args:
        config: That of the session.
        began: When that began, in seconds since the epoch; by default now.
    """

    def __init__(self, config: pytest.Config, began: float | None = None) -> None:
        self.state: State = "running"
        self.problem = ""
        self.collected = 0
        self._config = config
        self._began = time.time() if began is None else began
        self._outcomes: dict[str, str] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._failures: dict[str, tuple[str, int | None, str]] = {}
        self._places: dict[str, tuple[str, int | None]] = {}
        self._reporting: dict[str, pytest.TestReport] = {}
        self._failed_parts: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, report: pytest.TestReport) -> None:
        """Take in the report of a phase of a test."""
        nodeid = report.nodeid
        if report.when == "setup":  # of another try, perhaps
            for part in self._failed_parts.pop(nodeid, ()):
                del self._outcomes[part], self._failures[part]
        if _is_subtest(report):
            self._add_part(report)
            return
        outcome = _outcome(report)
        if outcome is not None:
            self._outcomes[nodeid] = outcome
        self._seconds[nodeid] += report.duration
        if report.outcome != "passed" and not report.skipped:
            self._failures[nodeid] = _failure(report)
        elif report.when == "call":
            self._failures.pop(nodeid, None)  # of an earlier try
            if parts := self._failed_parts.get(nodeid):  # pytest itself says so later, to the terminal alone
                self._outcomes[nodeid] = "failed"
                self._failures[nodeid] = report.location[0], None, f"contains {len(parts)} failed subtests"
        if any(any(recorded(report, name)) for name in (summary.PROPERTY, GPU_PROPERTY)):
            self._reporting[nodeid] = report
            file, line, _ = report.location
            self._places[nodeid] = file, None if line is None else line + 1

    def _add_part(self, report: Any) -> None:
        """Take in a subtest that failed, as a test of its own; the others are parts of theirs."""
        if not report.failed:
            return
        name, parts = f"{report.nodeid} {report._sub_test_description()}", self._failed_parts[report.nodeid]
        again = sum(part == name or part.startswith(f"{name} #") for part in parts)
        name += f" #{again + 1}" if again else ""
        parts.append(name)
        self._outcomes[name] = "failed"
        self._failures[name] = _failure(report)

    def add_broken_file(self, report: pytest.CollectReport) -> None:
        """Take in a file that could not be collected."""
        if report.failed:
            self._outcomes[report.nodeid] = "error"
            self._failures[report.nodeid] = report.nodeid, None, _first_line(report.longreprtext, last=True)

    def close(self, session: pytest.Session, stopped: State | None = None) -> None:
        """Note how the session ended: as is known, or before its last test because something asked for that."""
        why = session.shouldstop or session.shouldfail
        if stopped is None and why and self.session().done < self.collected:
            stopped, self.problem = "interrupted", str(why)
        self.state = stopped or "finished"

    def session(self) -> Session:
        """The session as far as it has come."""
        judged = summary.reports_by_test(self._reporting.values())
        gpu = gpu_report.uses(self._reporting.values())
        shown = [n for n in self._outcomes if n in self._reporting or n in self._failures]
        config = self._config
        return Session(
            name=config.rootpath.name or "session",
            state=self.state,
            problem=self.problem,
            started=datetime.fromtimestamp(self._began).astimezone().isoformat(timespec="seconds"),
            seconds=time.time() - self._began,
            collected=max(self.collected, len(self._outcomes)),
            counts=_counts(self._outcomes.values()),
            folder=str(config.invocation_params.dir),
            command=shlex.join(["pytest", *map(str, config.invocation_params.args)]),
            versions=tuple(_versions()),
            seeds=tuple(_seeds(config)),
            tests=tuple(self._ran(nodeid, judged.get(nodeid, []), gpu.get(nodeid)) for nodeid in shown),
            root=str(config.rootpath),
            top=str(_top(config.rootpath)),
        )

    def _ran(self, nodeid: str, reports: list[Any], gpu: GpuUse | None) -> RanTest:
        file, line = self._places.get(nodeid, ("", None))
        failed_in, failed_at, message = self._failures.get(nodeid, ("", None, ""))
        if failed_at is not None and failed_in == file:
            line = failed_at
        outcome = self._outcomes[nodeid]
        return RanTest(
            nodeid, outcome, round(self._seconds[nodeid], 4), file, line, message, tuple(reports), gpu
        )


class SessionReport:
    """Hooks of the process that runs a session, and the files that it writes."""

    def __init__(self, config: pytest.Config, files: Iterable[Path]) -> None:
        self.gathered = Gathered(config)
        self._files = tuple(files)
        self._write_at = time.monotonic() + WAIT
        self._trouble = ""
        self._stopped: State | None = None

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note how many tests there are, and write that much: the first test may take the process with it."""
        self.gathered.collected = max(self.gathered.collected, len(session.items))
        self._write()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """The same, of a worker of pytest-xdist."""
        if not self.gathered.collected:
            self.gathered.collected = len(ids)
            self._write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a file that cannot be collected."""
        self.gathered.add_broken_file(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what a test reports."""
        self.gathered.add(report)
        if time.monotonic() >= self._write_at:
            self._write()

    def pytest_internalerror(self, excrepr: object) -> None:
        """Note that pytest itself, or a plugin, came to grief."""
        self._stopped = "crashed"
        self.gathered.problem = _first_line(str(excrepr), last=True)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Note that somebody stopped the session."""
        self._stopped = "interrupted"
        self.gathered.problem = excinfo.exconly()

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the whole."""
        self.gathered.close(session, self._stopped)
        self._write()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say where the report is."""
        for file in self._files:
            terminalreporter.write_line(f"LoRA report: {file}")
        if self._trouble:
            terminalreporter.write_line(f"LoRA report: {self._trouble}", red=True)

    def _write(self) -> None:
        from pytest_lora.report import rendered

        began = time.monotonic()
        session = self.gathered.session()
        try:
            for file in self._files:
                write_whole(file, rendered(session, file.name))
            self._trouble = ""
        except OSError as error:
            self._trouble = f"not written: {error}"
        took = time.monotonic() - began
        self._write_at = time.monotonic() + max(WAIT, REST * took)


def _is_subtest(report: object) -> bool:
    """Whether a report is one of a part of a test: of unittest's ``subTest`` or pytest's ``subtests``."""
    return any(kind.__name__.lower() == "subtestreport" for kind in type(report).__mro__)


def _outcome(report: pytest.TestReport) -> str | None:
    """What a phase makes of its test; None where it decides nothing."""
    if str(report.outcome) == "rerun":  # pytest-rerunfailures: it will be tried again
        return "rerun"
    if report.failed:
        return "error" if report.when in ("setup", "teardown") else "failed"
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "xpassed"
    if report.skipped:
        return "skipped"
    return "passed" if report.when == "call" else None


def _failure(report: pytest.TestReport) -> tuple[str, int | None, str]:
    """File, line and first line of a failure."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return report.location[0], None, _first_line(str(report.longrepr))
    # Where the traceback leaves the test: what it called is hidden, or is no place to mend anything.
    file, line = report.location[0], None
    for entry in getattr(getattr(report.longrepr, "reprtraceback", None), "reprentries", ()):
        place = getattr(entry, "reprfileloc", None)
        if place is not None and str(place.path).endswith(Path(file).name):
            line = place.lineno
    return file, line, _first_line(crash.message)


def _first_line(text: str, *, last: bool = False) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1 if last else 0][:300] if lines else ""


def _top(root: Path) -> Path:
    """The top of the sources that a file belongs to: the checkout of a CI job, or of git; else where pytest is."""
    for name in ("GITHUB_WORKSPACE", "CI_PROJECT_DIR"):
        checkout = os.environ.get(name)
        if checkout and root.is_relative_to(checkout):
            return Path(checkout)
    return next((folder for folder in (root, *root.parents) if (folder / ".git").exists()), root)


def _counts(outcomes: Iterable[str]) -> tuple[tuple[str, int], ...]:
    counts = Counter(outcomes)
    return tuple((outcome, counts[outcome]) for outcome in _OUTCOMES if counts[outcome])


def _versions() -> Iterable[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
    yield "Python", platform.python_version()
    yield "on", platform.platform(terse=True)


def _seeds(config: pytest.Config) -> Iterable[tuple[str, str]]:
    """Seeds that plugins know, by the option that sets them, and that of hashes."""
    for plugin, option in (("pytest-randomly", "randomly_seed"), ("Hypothesis", "--hypothesis-seed")):
        value = config.getoption(option, None)
        if value is not None:
            yield plugin, str(value)
    if "PYTHONHASHSEED" in os.environ:
        yield "PYTHONHASHSEED", os.environ["PYTHONHASHSEED"]

"""On GitHub: findings in the job summary, and as annotations on the lines of the tests that have them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pytest_lora.files import append_whole
from pytest_lora.findings import Severity
from pytest_lora.plugin.session_options import options_of
from pytest_lora.plugin.session_report import Gathered, SessionReport
from pytest_lora.report.markdown import gpu_section, markdown_report
from pytest_lora.values import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_lora.report.session import RanTest, Session

MOST = 10
"""Annotations of a severity that GitHub shows of one step."""

_OTHERS: dict[Severity, tuple[str, ...]] = {
    "error": ("annotate_errors", "torch-github-annotations"),
    "warning": ("annotate_warnings",),
}
"""Plugins that annotate every failing test, or every warning: those of pytest-github-actions-annotate-failures and of
pytest-torch. Their messages hold our findings, and two annotations on a line say no more than one."""


class Annotation(NamedTuple):
    """What is said at a line."""

    severity: Severity
    file: str
    line: int | None
    title: str
    message: str

    def __str__(self) -> str:
        place = [f"file={_property(self.file)}", *([f"line={self.line}"] if self.line else [])]
        return f"::{self.severity} {','.join(place)},title={_property(self.title)}::{_data(self.message)}"


def tell(terminal: pytest.TerminalReporter, status: int) -> None:
    """Add to the job summary where there is one, and annotate where this is a job of GitHub Actions."""
    config = terminal.config
    if hasattr(config, "workerinput"):
        return
    session = _session(terminal, status)
    options = options_of(config)
    if options.step_summary:
        try:
            append_whole(Path(options.step_summary), _summary(session, gpu_asked=options.gpu_report))
        except OSError as error:
            terminal.ensure_newline()
            terminal.write_line(f"LoRA: the job summary is not written: {error}")
    if os.environ.get("GITHUB_ACTIONS") == "true":
        silent = [s for s, names in _OTHERS.items() if any(map(config.pluginmanager.has_plugin, names))]
        terminal.ensure_newline()
        for annotation in annotated(session, config.rootpath):
            if annotation.severity not in silent:
                terminal.write_line(str(annotation))


def _session(terminal: pytest.TerminalReporter, status: int) -> Session:
    """What ``--lora-report`` has gathered; without it, what the terminal shows."""
    plugins = terminal.config.pluginmanager
    writer: SessionReport | None = plugins.get_plugin("lora-session-report")
    if writer is not None:
        return writer.gathered.session()
    reports = [one for group in terminal.stats.values() for one in group if hasattr(one, "user_properties")]
    reports.sort(key=lambda one: getattr(one, "start", 0.0))
    gathered = Gathered(terminal.config, began=next((one.start for one in reports), None))
    for report in reports:
        gathered.add(report)
    session: Any = plugins.get_plugin("session")
    gathered.collected = session.testscollected
    gathered.close(session, "interrupted" if status == pytest.ExitCode.INTERRUPTED else None)
    return gathered.session()


def _summary(session: Session, *, gpu_asked: bool) -> str:
    """The whole where a LoRA set-up was judged; else GPU tests alone, and those only where they are asked for."""
    if session.judged:
        return markdown_report(session, gpu_open=gpu_asked)
    return gpu_section(session) if gpu_asked else ""


def annotated(session: Session, root: Path) -> Iterator[Annotation]:
    """Errors of tests that failed by them, and warnings of tests that did not fail; at a line each rule once."""
    annotated: set[tuple[str, int | None, str]] = set()
    count = {"error": 0, "warning": 0}
    for test in session.judged:
        severity: Severity = "error" if test.failed else "warning"
        warnings = [f for f in test.findings if f.severity == "warning" and test.outcome == "passed"]
        for finding in test.decisive or warnings:
            line = finding.line or test.line
            place = test.file, line, finding.code
            if place in annotated or count[severity] == MOST:
                continue
            annotated.add(place)
            count[severity] += 1
            yield Annotation(
                severity,
                _in_workspace(test, root),
                line,
                f"{finding.code} {finding.title}",
                f"{finding.where}: {finding.observed}. Fix: {finding.fix.partition(chr(10))[0]}",
            )


def _in_workspace(test: RanTest, root: Path) -> str:
    """The file of a test as GitHub knows it."""
    path = root / test.file
    workspace = os.environ.get("GITHUB_WORKSPACE")
    if workspace and path.is_relative_to(workspace):
        return path.relative_to(workspace).as_posix()
    return test.file


def _data(text: str) -> str:
    """A text as the message of a workflow command, on one line."""
    return " ".join(printable(text, 1000).split()).replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")

"""What the demo says at its end, and its exit status."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_lora.plugin.summary import reports_by_test

DIAGNOSES = {
    "test_healthy_adapter": None,
    "test_half_of_the_targets_match_nothing": "LORA104",
    "test_alpha_was_left_over_from_another_rank": "LORA127",
    "test_the_adapter_was_frozen": "LORA201",
    "test_the_percentage_counts_packed_weights": "LORA218",
    "test_the_loaded_adapter_holds_nothing": "LORA225",
}
"""The tests, and the code that each has to fail with; None for the one that passes."""


def went_as_meant(terminal: pytest.TerminalReporter) -> bool:
    """Whether the healthy adapter passed and each broken one failed for its own reason."""
    passed, failed = terminal.stats.get("passed", []), terminal.stats.get("failed", [])
    found = {
        nodeid.rpartition("::")[2]: {f.code for report in reports for f in report.findings}
        for nodeid, reports in reports_by_test([*passed, *failed]).items()
    }
    healthy = {report.nodeid.rpartition("::")[2] for report in passed if report.when == "call"}
    meant = {name: {code} if code else set() for name, code in DIAGNOSES.items()}
    return found == meant and healthy == {name for name, code in DIAGNOSES.items() if code is None}


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Succeed where the broken adapters failed."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    well = terminal is not None and went_as_meant(terminal)
    session.exitstatus = pytest.ExitCode.OK if well else pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how it went, and what to do next."""
    terminalreporter.section("demo")
    if not went_as_meant(terminalreporter):
        terminalreporter.write_line("Something went otherwise than it should: see above.", red=True)
        return
    lines = ["As it should be: the healthy adapter passed, five broken ones failed, each with its diagnosis."]
    reports = terminalreporter.config.getoption("lora_report")
    lines += [f"report:  {path}" for path in reports if Path(path).is_file()]
    lines += [
        f"tests:   {terminalreporter.config.rootpath / 'test_demo.py'}",
        "a rule:  pytest --lora-explain LORA104",
    ]
    for line in lines:
        terminalreporter.write_line(line)

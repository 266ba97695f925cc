"""Reports: in the terminal, under xdist, in JUnit XML, as warnings and as errors."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from pytest_lora.findings import Report
from pytest_lora.plugin.summary import SHOWN_FIGURES
from tests.plugin.sessions import MODES, run, session

REPORTS = """
import pytest
from pytest_lora.assertions import demand
from pytest_lora.findings import Finding, Report

NAMES = {"LORA203": "adapter_left_merged", "LORA107": "alpha_damps_the_adapter", "LORA109": "odd_but_fine"}

def report(*found):
    return Report("model", tuple(Finding(c, NAMES[c], s, w, "seen", "wanted", "mend") for c, s, w in found))

def assert_healthy(*found):
    __tracebackhide__ = True
    return demand(report(*found))

@pytest.fixture
def judged():
    assert_healthy(("LORA107", "warning", "in set-up"))
    yield
    assert_healthy(("LORA107", "warning", "in teardown"))

def test_fails():
    assert_healthy(("LORA203", "error", "a"), ("LORA203", "error", "b"), ("LORA109", "info", "c"))

def test_fails_too():
    assert_healthy(("LORA203", "error", "a"), ("LORA203", "warning", "b"))

def test_passes_with_a_warning(judged):
    for _ in range(3):
        assert_healthy(("LORA107", "warning", "same"))

def test_passes_with_an_info():
    assert_healthy(("LORA109", "info", "c"))

def test_many():
    assert_healthy(*[("LORA203", "error", f"module {n}") for n in range(13)])

def test_healthy():
    assert_healthy()

def test_asks_for_nothing(): ...
"""


def section(lines: list[str]) -> list[str]:
    start = next(i for i, line in enumerate(lines) if " LoRA health " in line)
    end = next(i for i, line in enumerate(lines) if i > start and line.startswith("="))
    return lines[start + 1 : end]


@MODES
def test_reports_are_counted_by_rule_worst_first_and_are_in_junit_xml(
    pytester: pytest.Pytester, mode: str
) -> None:
    pytester.makepyfile(test_it=REPORTS)
    result = session(pytester, mode, "--junit-xml=out.xml", workers=2)
    result.assert_outcomes(passed=4, failed=3, warnings=4)
    assert section(result.outlines) == [
        "model: healthy in 2 of 6 tests",
        "LORA203 error   adapter left merged      16 errors, 1 warning in 3 tests",
        "LORA107 warning alpha damps the adapter  3 findings in 1 test",
    ]
    assert "E       ... 3 more (-v shows all)" in result.outlines
    result.stdout.no_fnmatch_line("*LoRA report*")
    found = {
        case.get("name"): [
            Report.from_json(prop.get("value", ""))
            for prop in case.iter("property")
            if prop.get("name") == "lora_report"
        ]
        for case in ET.parse(pytester.path / "out.xml").iter("testcase")
    }
    assert [len(report.findings) for report in found["test_fails"]] == [3]
    assert [report.findings[0].where for report in found["test_passes_with_a_warning"]] == [
        "in set-up",
        "same",
        "in teardown",
    ]
    assert found["test_healthy"] == [Report("model")]
    assert found["test_asks_for_nothing"] == []


@MODES
def test_verbose_shows_infos_and_whole_reports(pytester: pytest.Pytester, mode: str) -> None:
    pytester.makepyfile(test_it=REPORTS)
    result = session(pytester, mode, "-v")
    assert section(result.outlines)[-1] == "LORA109 info    odd but fine             2 findings in 2 tests"
    lines = result.outlines
    many = next(i for i, line in enumerate(lines) if "___ test_many ___" in line)
    whole = next(i for i, line in enumerate(lines) if i > many and "--- LoRA report ---" in line)
    assert lines[whole + 1] == "model: 13 errors"
    assert sum(line.startswith("  --> module ") for line in lines[whole:][: 13 * 6 + 2]) == 13
    assert sum("--- LoRA report ---" in line for line in lines) == 3


def test_a_healthy_session_says_what_was_checked(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=REPORTS)
    result = run(pytester, "-k", "healthy or with_an_info or nothing")
    result.assert_outcomes(passed=3, deselected=4)
    assert section(result.outlines)[-1] == "model: healthy in 2 of 2 tests"


def test_nothing_is_printed_when_nothing_was_checked(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=REPORTS)
    result = run(pytester, "-k", "nothing")
    result.assert_outcomes(passed=1, deselected=6)
    result.stdout.no_fnmatch_line("*LoRA health*")


def test_a_test_tried_again_counts_once(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        from _pytest.runner import runtestprotocol

        def pytest_runtest_protocol(item, nextitem):
            for _ in range(2):
                for report in runtestprotocol(item, nextitem=nextitem, log=False):
                    item.ihook.pytest_runtest_logreport(report=report)
            return True
        """
    )
    pytester.makepyfile(
        test_it=REPORTS
        + "\ntries = []\ndef test_flaky():\n    tries.append(1)\n"
        + "    assert_healthy(('LORA107', 'warning', f'try {len(tries)}'))\n"
    )
    result = run(pytester, "-k", "test_flaky or test_fails_too")
    assert section(result.outlines) == [
        "model: healthy in 0 of 2 tests",
        "LORA203 error   adapter left merged      1 error, 1 warning in 1 test",
        "LORA107 warning alpha damps the adapter  1 finding in 1 test",
    ]


def test_reports_of_collection_are_of_no_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=REPORTS + "\ndemand(report(('LORA107', 'warning', 'at import')))\n")
    result = run(pytester, "-k", "healthy")
    assert section(result.outlines) == ["model: healthy in 1 of 1 test"]


def test_warnings_point_at_the_line_of_the_test(pytester: pytest.Pytester) -> None:
    """Also from an assertion that calls another: a module in the package stands for it."""
    pytester.makepyfile(
        test_it="""
        from pytest_lora import Finding, Report
        from pytest_lora import assertions

        REPORT = Report("model", (Finding("LORA107", "alpha_damps", "warning", "here", "a", "b", "c"),))
        nested = {"__name__": "pytest_lora.made_up", "demand": assertions.demand}
        exec("def inner(r): return demand(r)\\ndef outer(r): return inner(r)", nested)

        def test_it():
            nested["outer"](REPORT)
        """
    )
    result = run(pytester)
    result.stdout.fnmatch_lines(["*/test_it.py:9: LoraHealthWarning: warning[[]LORA107[]]: alpha damps"])


@pytest.mark.parametrize("how", [["-W", "error::pytest_lora.LoraHealthWarning"], ["-c", "strict.ini"]])
def test_strict_mode(pytester: pytest.Pytester, how: list[str]) -> None:
    pytester.makefile(".ini", strict="[pytest]\nfilterwarnings = error::pytest_lora.LoraHealthWarning")
    pytester.makepyfile(
        test_it=REPORTS
        + "\ndef test_two_warnings():\n"
        + "    assert_healthy(('LORA107', 'warning', 'first'), ('LORA107', 'warning', 'second'))\n"
    )
    result = pytester.runpytest_subprocess(*how, "-k", "fails_too or with_an_info or two_warnings")
    result.assert_outcomes(failed=2, passed=1, deselected=5)
    result.stdout.fnmatch_lines(
        [
            "E * pytest_lora.LoraHealthError: LORA203: model: 1 error, 1 warning",
            "E * pytest_lora.findings.LoraHealthWarning: warning[[]LORA107[]]: alpha damps the adapter",
            "E * --> first",
            "E * --> second",
        ]
    )


@pytest.mark.parametrize("asked", [False, True])
def test_figures_travel_only_where_somebody_looks(pytester: pytest.Pytester, asked: bool) -> None:
    pytester.makepyfile(
        test_it="""
        from pytest_lora.assertions import demand
        from pytest_lora.facts.figures import LossCurve
        from pytest_lora.findings import Report

        def test_many_times():
            for n in range(TIMES):
                demand(Report("model", (), (LossCurve(f"run {n}", (), (), (), (), (0, 1), 2.0, 1.0, None),)))
        """.replace("TIMES", str(SHOWN_FIGURES + 5))
    )
    pytester.runpytest_inprocess("--junit-xml=out.xml", *(["--lora-report=out.json"] if asked else []))
    values = [p.get("value", "") for p in ET.parse(pytester.path / "out.xml").iter("property")]
    shown = [
        one.title for value in values for one in Report.from_json(value).figures if hasattr(one, "title")
    ]
    assert shown == ([f"run {n}" for n in range(5, SHOWN_FIGURES + 5)] if asked else [])
    assert len(values) == (SHOWN_FIGURES + 1 if asked else 1)


STRANGE = """
import pytest
from pytest_lora import LoraHealthError, Report, diagnose_history

class Reportless(Exception):
    @property
    def report(self): raise RuntimeError("no report")

class Untold(LoraHealthError):
    def __str__(self): raise RuntimeError("no text")

class OwnReport(Report):
    def __str__(self): raise RuntimeError("no text")

def test_reportless(): raise Reportless
def test_untold(): raise Untold(Report("x"))
def test_own_report(): raise LoraHealthError(OwnReport("x"))

@pytest.mark.parametrize("name", ["lora_report", "lora_gpu"])
@pytest.mark.parametrize("value", ["A100", None, 1, "[1]", '{"devices": 3}', "[" * 9000])
def test_own_property(record_property, name, value): record_property(name, value)

@pytest.mark.parametrize("entry", ["one", 3, None, (["x"], 1), ("lora_report",), (1, 2, 3)])
def test_no_property(request, entry): request.node.user_properties.append(entry)

def test_last(request):
    request.node.user_properties.append(None)
    pytest_lora.assert_history_healthy([1.0, 2.0])
"""


@MODES
def test_errors_and_properties_of_a_test_that_are_none_of_ours_end_no_session(
    pytester: pytest.Pytester, mode: str
) -> None:
    pytester.makepyfile(test_it=STRANGE.replace("import pytest\n", "import pytest, pytest_lora\n"))
    options = ("--lora-require-gpu", "--lora-report=out.json", "--lora-report=out.html", "-v")
    result = session(pytester, mode, *options, "--lora-baseline=b.json", "--lora-update-baseline")
    result.assert_outcomes(failed=3, passed=19)
    for name in ("out.json", "b.json"):
        assert (pytester.path / name).exists()
    for word in ("*INTERNALERROR*", "*Traceback*"):
        result.stdout.no_fnmatch_line(word)
    assert not result.errlines
    lines = section(result.outlines)
    assert [line for line in lines if "healthy" in line] == [
        "history of 2 training losses: healthy in 1 of 1 test"
    ]

"""On GitHub: the job summary, and annotations that do not repeat what other plugins annotate."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from pytest_lora.findings import Report
from pytest_lora.plugin.github import MOST, Annotation, annotated
from tests.forked import run_forked
from tests.plugin.test_session_report import ALLOWED, TESTS
from tests.report.sample import MERGED, SCALING, SESSION, ran

LINE = 1 + TESTS.splitlines().index('    judge(finding("error", "<b>&"))')
WARNS = 1 + TESTS.splitlines().index("def test_warns():")
ERROR = f"::error file=test_it.py,line={LINE},title=LORA203 adapter left merged::<b>&: seen. Fix: mend"
WARNING = f"::warning file=test_it.py,line={WARNS},title=LORA203 adapter left merged::here: seen. Fix: mend"


def commands(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if line.startswith("::")]


def test_findings_are_annotated_and_summed_up(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "summary.md"))
    (pytester.path / "summary.md").write_text("before\n")
    pytester.makepyfile(test_it=TESTS + "\ndef test_slow():\n    import time; time.sleep(0.3)\n")
    result = pytester.runpytest_inprocess(*ALLOWED)
    assert commands(result) == [ERROR, WARNING]
    summary = (pytester.path / "summary.md").read_text()
    assert summary.startswith("before\n## LoRA report: ")
    assert "❌ **2 of 4 tests found errors**" in summary
    assert "<details><summary>Losses</summary>" in summary
    assert summary.count("## LoRA report") == 1
    assert float(re.findall(r", took ([\d.]+) s", summary)[0]) > 0.3


STOPS = "def test_that_is_stopped():\n    raise KeyboardInterrupt\n\n"


@pytest.mark.parametrize(
    ("tests", "arguments", "told"),
    [
        (TESTS, (), None),
        (TESTS, ("-x",), "**This session was interrupted** after 1 of 7 tests: stopping after 1 failures"),
        (TESTS + "\n" + STOPS, (), "**This session was interrupted** after 7 of 8 tests"),
        (TESTS + "\n" + STOPS, ("-n1",), "**This session was interrupted** after "),
    ],
    ids=["whole", "first failure", "interrupted", "interrupted, xdist"],
)
def test_a_session_that_did_not_end_says_so(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    tests: str,
    arguments: tuple[str, ...],
    told: str | None,
) -> None:
    summary = pytester.path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    pytester.makepyfile(test_it=tests)
    run_forked(pytester, *ALLOWED, *arguments)
    if told is None:
        assert "This session" not in summary.read_text()
    else:
        assert told in summary.read_text()


def test_elsewhere_there_is_neither(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=TESTS)
    assert commands(pytester.runpytest_inprocess()) == []


def test_a_session_without_lora_is_left_alone(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "summary.md"))
    pytester.makepyfile(test_it="def test_plain():\n    assert 0\n")
    assert commands(pytester.runpytest_inprocess()) == []
    assert not (pytester.path / "summary.md").exists()


@pytest.mark.parametrize(
    ("other", "left"),
    [
        ("annotate_errors", [WARNING]),
        ("torch-github-annotations", [WARNING]),
        ("annotate_warnings", [ERROR]),
    ],
)
def test_what_another_plugin_annotates_is_left_to_it(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, other: str, left: list[str]
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    pytester.makeconftest(
        f"def pytest_configure(config):\n    config.pluginmanager.register(object(), {other!r})\n"
    )
    pytester.makepyfile(test_it=TESTS)
    assert commands(pytester.runpytest_inprocess(*ALLOWED)) == left


def test_paths_are_those_of_the_workspace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    (first, *_) = annotated(SESSION, tmp_path / "python")
    assert str(first).startswith(
        "::error file=python/tests/test_adapter.py,line=18,title=LORA203 adapter left merged::"
    )
    (first, *_) = annotated(SESSION, Path("/elsewhere"))
    assert first.file == "tests/test_adapter.py"


def test_at_a_line_each_rule_is_told_once_and_no_more_than_github_shows() -> None:
    tests = tuple(ran(f"tests/t.py::test[{n}]", "failed", Report("m", (MERGED, SCALING))) for n in range(50))
    assert len(list(annotated(dataclasses.replace(SESSION, tests=tests), Path()))) == 1
    tests = tuple(dataclasses.replace(test, line=n + 1) for n, test in enumerate(tests))
    told = list(annotated(dataclasses.replace(SESSION, tests=tests), Path()))
    assert [one.severity for one in told] == ["error"] * MOST


def test_a_warning_that_is_made_an_error_is_told_as_one() -> None:
    message = "pytest_lora.findings.LoraHealthWarning: warning[LORA127]: scaling differs from expected"
    strict = ran("tests/t.py::test", "failed", Report("m", (SCALING,)), message=message)
    session = dataclasses.replace(SESSION, tests=(strict,))
    assert [(one.severity, one.title) for one in annotated(session, Path())] == [
        ("error", "LORA127 scaling differs from expected")
    ]
    assert not strict.fails_otherwise
    other = dataclasses.replace(strict, message="assert 1 == 2")
    assert other.fails_otherwise
    assert list(annotated(dataclasses.replace(SESSION, tests=(other,)), Path())) == []


def test_expected_failures_are_no_news() -> None:
    passed = ran("tests/t.py::test_raises", "passed", Report("m", (MERGED,)))
    expected = ran("tests/t.py::test_xfails", "xfailed", Report("m", (MERGED, SCALING)))
    assert list(annotated(dataclasses.replace(SESSION, tests=(passed, expected)), Path())) == []


def test_nothing_breaks_out_of_an_annotation() -> None:
    hostile = "a%b\r\n::error::c\x1b[31m,d:e"
    told = str(Annotation("error", hostile, 3, hostile, hostile))
    assert told == (
        r"::error file=a%25b \x3a%3Aerror%3A%3Ac\x1b[31m%2Cd%3Ae,line=3,"
        r"title=a%25b \x3a%3Aerror%3A%3Ac\x1b[31m%2Cd%3Ae::a%25b \x3a:error::c\x1b[31m,d:e"
    )
    assert str(Annotation("warning", "f", None, "t", "m")) == "::warning file=f,title=t::m"

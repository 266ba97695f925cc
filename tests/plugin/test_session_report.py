"""``--lora-report``: written whole however the session ends, plain and under xdist."""

from __future__ import annotations

import html
import json
import os
import stat
import sys
from typing import Any

import pytest

from pytest_lora.findings import Report
from tests.forked import run_forked
from tests.plugin.sessions import MODES, session

ALLOWED = ("-W", "always::pytest_lora.LoraHealthWarning")
"""Our own suite makes errors of them, and a session within it inherits that."""

TESTS = """import os
import pytest
from pytest_lora.assertions import demand
from pytest_lora.facts.figures import LossCurve
from pytest_lora.findings import Finding, Report

def finding(severity, where="here"):
    return Finding("LORA203", "adapter_left_merged", severity, where, "seen", "wanted", "mend")

def judge(*found):
    __tracebackhide__ = True
    return demand(Report("model", found, (LossCurve("run", (0,), (1.0,), (), (), (0, 1), 2.0, 1.0, 0.01),)))

def test_errs():
    x = 1
    judge(finding("error", "<b>&"))

def test_warns():
    judge(finding("warning"))

@pytest.mark.parametrize("text", ["<script>alert(1)</script>"])
def test_is_healthy(text):
    judge()

def test_fails_otherwise():
    assert 1 == 2

def test_plain(): ...

@pytest.mark.skip
def test_skipped(): ...

@pytest.mark.xfail(strict=True)
def test_xfails():
    judge(finding("error"))
"""


def told(pytester: pytest.Pytester, name: str = "out.json") -> Any:
    return json.loads((pytester.path / name).read_text())


def by_name(data: Any) -> dict[str, Any]:
    return {test["nodeid"].partition("::")[2]: test for test in data["tests"]}


@MODES
def test_every_format_is_written(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "summary.md"))
    pytester.makepyfile(test_it=TESTS)
    args = ["--lora-report=deep/er/out.html", "--lora-report", "out.md", "--lora-report=out.json"]
    result = session(pytester, mode, *args, *ALLOWED, workers=2)
    assert result.ret == 1
    folder = pytester.path
    assert [line for line in result.outlines if line.startswith("LoRA report: ")] == [
        f"LoRA report: {folder / name}" for name in ("deep/er/out.html", "out.md", "out.json")
    ]
    data = told(pytester)
    assert (data["state"], data["problem"], data["collected"]) == ("finished", "", 7)
    assert data["counts"] == {"failed": 2, "passed": 3, "skipped": 1, "xfailed": 1}
    assert data["folder"] == str(folder)
    assert data["command"].startswith("pytest ")
    assert "--lora-report=out.json" in data["command"]
    assert data["versions"].keys() >= {"pytest-lora", "pytest", "torch", "peft", "Python"}
    found = by_name(data)
    assert {name: test["outcome"] for name, test in found.items()} == {
        "test_errs": "failed",
        "test_warns": "passed",
        "test_is_healthy[<script>alert(1)</script>]": "passed",
        "test_fails_otherwise": "failed",
        "test_xfails": "xfailed",
    }
    line = 1 + TESTS.splitlines().index('    judge(finding("error", "<b>&"))')
    assert (found["test_errs"]["file"], found["test_errs"]["line"]) == ("test_it.py", line)
    assert found["test_fails_otherwise"]["message"] == "assert 1 == 2"
    (report,) = (Report.from_json(json.dumps(one)) for one in found["test_errs"]["reports"])
    assert report.findings[0].where == "<b>&"
    assert report.figures
    page = (folder / "deep/er/out.html").read_text()
    assert "2 of 4 tests found errors" in page
    assert "&lt;b&gt;&amp;" in page
    assert "<script>alert" not in page
    assert (folder / "out.md").read_text().startswith("## LoRA report: ")
    assert (folder / "summary.md").read_text().count("## LoRA report: ") == 1
    assert sum(line.startswith("::") for line in result.outlines) == 2
    assert sorted(os.listdir(folder / "deep/er")) == ["out.html"]
    if sys.platform != "win32":
        assert stat.S_IMODE(os.stat(folder / "out.json").st_mode) == 0o644


def test_the_report_of_a_killed_process_tells_how_far_it_came(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        "from pytest_lora.plugin import session_report\nsession_report.WAIT = session_report.REST = 0\n"
    )
    pytester.makepyfile(test_it=TESTS + "\ndef test_kills():\n    os._exit(9)\n")
    result = run_forked(pytester, "--lora-report=out.json", "--lora-report=out.html")
    assert result.ret == 9
    data = told(pytester)
    assert (data["state"], data["collected"]) == ("running", 8)
    assert "test_errs" in by_name(data)
    assert "This session has not ended" in (pytester.path / "out.html").read_text()


def test_a_process_that_dies_in_its_first_test_leaves_a_report(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it="import os\ndef test_kills():\n    os._exit(9)\n")
    assert run_forked(pytester, "--lora-report=out.json").ret == 9
    data = told(pytester)
    assert (data["state"], data["collected"], data["counts"]) == ("running", 1, {})


def test_a_worker_that_dies_is_a_failure(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=TESTS + "\ndef test_kills():\n    os._exit(9)\n")
    run_forked(pytester, "--lora-report=out.json", "-n", "1")
    found = by_name(told(pytester))
    assert found["test_kills"]["outcome"] == "failed"
    assert "crashed while running" in found["test_kills"]["message"]
    assert found["test_errs"]["reports"]


@pytest.mark.parametrize(
    ("code", "state", "problem"),
    [
        ("raise KeyboardInterrupt", "interrupted", "KeyboardInterrupt"),
        ("pytest.exit('enough')", "interrupted", "_pytest.outcomes.Exit: enough"),
    ],
)
def test_an_interrupted_session_says_so(
    pytester: pytest.Pytester, code: str, state: str, problem: str
) -> None:
    pytester.makepyfile(test_it=f"{TESTS}\ndef test_stops():\n    {code}\ndef test_after(): ...\n")
    pytester.runpytest_inprocess("--lora-report=out.json", no_reraise_ctrlc=True)
    data = told(pytester)
    assert (data["state"], data["problem"], data["collected"]) == (state, problem, 9)
    assert len(data["tests"]) == 5


def test_an_internal_error_is_told(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        "def pytest_runtest_logfinish(nodeid):\n    if 'test_plain' in nodeid: raise OSError('disk is gone')\n"
    )
    pytester.makepyfile(test_it=TESTS)
    pytester.runpytest_inprocess("--lora-report=out.json")
    data = told(pytester)
    assert (data["state"], data["problem"]) == ("crashed", "OSError: disk is gone")
    assert "test_errs" in by_name(data)


def test_a_session_that_stops_at_the_first_failure(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=TESTS)
    pytester.runpytest_inprocess("--lora-report=out.json", "-x")
    data = told(pytester)
    assert (data["state"], data["problem"], data["counts"]) == (
        "interrupted",
        "stopping after 1 failures",
        {"failed": 1},
    )


def test_a_file_that_cannot_be_collected_is_a_failure(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_bad="import nonsense_that_is_not_there")
    pytester.runpytest_inprocess("--lora-report=out.json")
    (test,) = told(pytester)["tests"]
    assert (test["nodeid"], test["outcome"]) == ("test_bad.py", "error")
    assert test["message"] == "E   ModuleNotFoundError: No module named 'nonsense_that_is_not_there'"


def test_a_failing_set_up_and_a_second_try(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        from _pytest.runner import runtestprotocol

        def pytest_runtest_protocol(item, nextitem):
            for _ in range(2):
                item._initrequest()
                for report in runtestprotocol(item, nextitem=nextitem, log=False):
                    item.ihook.pytest_runtest_logreport(report=report)
            return True
        """
    )
    pytester.makepyfile(
        test_it=TESTS
        + "\n@pytest.fixture\ndef broken():\n    judge(finding('error'))\n\ndef test_set_up(broken): ...\n"
        + "\nTRIES = []\ndef test_flaky():\n    TRIES.append(1)\n    judge(*[finding('error')][len(TRIES) - 1:])\n"
    )
    pytester.runpytest_inprocess("--lora-report=out.json", "-k", "set_up or flaky")
    found = by_name(told(pytester))
    assert (found["test_set_up"]["outcome"], found["test_flaky"]["outcome"]) == ("error", "passed")
    assert [len(one["findings"]) for one in found["test_flaky"]["reports"]] == [0]
    assert found["test_flaky"]["message"] == ""


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("out.pdf", "--lora-report: 'out.pdf' must end in .html, .json, .md, .sarif, .sarif.json"),
        ("folder.html", "--lora-report: 'folder.html' is a folder; name a file"),
    ],
)
def test_a_bad_path_is_refused_before_anything_runs(pytester: pytest.Pytester, given: str, why: str) -> None:
    pytester.mkdir("folder.html")
    pytester.makepyfile(test_it="def test_plain(): ...")
    result = pytester.runpytest_inprocess(f"--lora-report={given}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {why}" in result.errlines


def test_a_report_that_cannot_be_written_fails_no_test(pytester: pytest.Pytester) -> None:
    pytester.makefile(".txt", blocked="a file where a folder should be")
    pytester.makepyfile(test_it="def test_plain(): ...")
    result = pytester.runpytest_inprocess("--lora-report=blocked.txt/out.json")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["LoRA report: not written: *blocked.txt*"])


def test_seeds_are_told(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "3")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:randomly")  # with the plugin of Hypothesis
    pytester.makepyfile(test_it="def test_plain(): ...")
    pytester.runpytest_subprocess("--lora-report=out.json", "--hypothesis-seed=7")
    assert told(pytester)["seeds"] == {"Hypothesis": "7", "PYTHONHASHSEED": "3"}


def test_findings_are_in_the_page_of_pytest_html(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pytest_html")
    monkeypatch.delenv("PYTEST_ADDOPTS")  # which leaves pytest-html out
    pytester.makepyfile(test_it=TESTS)
    run_forked(pytester, "--html=page.html", "--self-contained-html", "-n", "1")
    page = (pytester.path / "page.html").read_text()
    data = json.loads(html.unescape(page.partition('data-jsonblob="')[2].partition('"')[0]))
    told = {
        name.partition("::")[2]: [extra["content"] for extra in tries[0]["extras"]]
        for name, tries in data["tests"].items()
    }
    (extra,) = told["test_errs"]
    assert extra.startswith(
        '<pre class="lora-report">model: 1 error\n\nerror[LORA203]: adapter left merged\n'
    )
    assert "--&gt; &lt;b&gt;&amp;\n" in extra
    assert told["test_plain"] == []


def test_collecting_alone_leaves_an_earlier_report_as_it_is(pytester: pytest.Pytester) -> None:
    pytester.makefile(".json", out="earlier")
    pytester.makepyfile(test_it="def test_plain(): ...")
    assert pytester.runpytest_inprocess("--lora-report=out.json", "--collect-only").ret == 0
    assert (pytester.path / "out.json").read_text() == "earlier"

"""``pytest --lora-demo``: what it shows, what it leaves alone, and when it fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pytest_lora.findings import Finding, Report
from pytest_lora.plugin.demo.conftest import DIAGNOSES, went_as_meant
from pytest_lora.plugin.summary import PROPERTY
from tests.forked import run_forked


@pytest.mark.lora_slow
def test_demo_shows_five_diagnoses_and_touches_nothing_here(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, place = pytester.mkdir("scratch"), pytester.mkdir("place")
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.chdir(place)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k nothing_of_this_name")
    theirs = {
        "conftest.py": "raise SystemExit('not to be imported')",
        "test_theirs.py": "raise SystemExit('not to be collected')",
        "pytest.ini": "[pytest]\naddopts = -x --strict-config\npython_functions = nothing\n",
    }
    for name, text in theirs.items():
        (place / name).write_text(text)
    result = run_forked(pytester, "--lora-demo")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "test_demo.py::test_healthy_adapter PASSED*",
            "test_demo.py::test_half_of_the_targets_match_nothing FAILED*",
            "E   error[[]LORA104[]]: target matches nothing",
            "E   error[[]LORA127[]]: scaling differs from expected",
            "E   error[[]LORA201[]]: no adapter is trainable",
            "E * warning[[]LORA218[]]: reported percent is wrong",
            "E   error[[]LORA225[]]: adapter holds no update",
            "As it should be: the healthy adapter passed, five broken ones failed, each with its diagnosis.",
            "*= 5 failed, 1 passed* =*",
        ]
    )
    assert {path.name for path in place.iterdir()} == set(theirs)
    (report,) = scratch.glob("*/*")
    result.stdout.fnmatch_lines([f"report:  {report}"])
    assert "LORA104" in report.read_text()


def stats(**changes: str | None) -> Any:
    """A terminal that saw the tests end as they should, changes aside: the code that a test fails with instead."""
    groups: dict[str, list[Any]] = {"passed": [], "failed": []}
    for name, code in (DIAGNOSES | changes).items():
        findings = (Finding(code, "a_rule", "error", "", "", "", ""),) if code else ()
        report = SimpleNamespace(
            nodeid=f"test_demo.py::{name}",
            when="call",
            start=0.0,
            user_properties=[(PROPERTY, Report("model", findings).to_json())],
        )
        groups["failed" if code else "passed"].append(report)
    return SimpleNamespace(stats=groups)


def test_it_fails_unless_each_goes_as_it_should() -> None:
    assert went_as_meant(stats())
    assert not went_as_meant(stats(test_healthy_adapter="LORA104"))
    assert not went_as_meant(stats(test_the_adapter_was_frozen=None))
    assert not went_as_meant(stats(test_the_adapter_was_frozen="LORA203"))
    assert not went_as_meant(SimpleNamespace(stats={}))

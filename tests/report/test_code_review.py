"""SARIF and GitLab's code quality report: they hold to their schemas, and a viewer can show them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from pytest_lora.findings import Finding, Report
from pytest_lora.report import format_of, rendered
from pytest_lora.report.session import Session
from tests.report.sample import MERGED, SESSION, ran, worded
from tests.report.sarif_reduced import GITLAB, SARIF

HOSTILE = '<b>&[x](javascript:1) "\\ \u202e \ud800 %s\n'


def recipe(line: int) -> Finding:
    return Finding(
        "LORA610",
        "quantization_does_not_happen",
        "error",
        f"asks.yml:{line}: load_in_4bit",
        "Axolotl quantizes nothing here",
        "4-bit weights",
        "write adapter: qlora",
        file="/repo/bot/configs/asks.yml",
        line=line,
    )


def session(line: int = 9, **fields: Any) -> Session:
    """The sample, a recipe and a saved adapter, in a subfolder of a checkout."""
    tests = (
        *(dataclasses.replace(test, line=test.line and test.line + line) for test in SESSION.tests),
        ran("configs/asks.yml::recipe", "failed", Report("recipe", (recipe(line),)), line=None),
        ran("adapters/a b/adapter_config.json::keys", "failed", Report("adapter", (MERGED,)), line=None),
        ran("tests/test_it.py::test_known", "xfailed", Report("model", (MERGED,))),
    )
    made = dataclasses.replace(SESSION, tests=tests, root="/repo/bot", top="/repo", folder="/repo/bot")
    return dataclasses.replace(made, **fields)


def validated(text: str, schema: Any) -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    data = json.loads(text)
    checker = jsonschema.Draft7Validator(schema, format_checker=jsonschema.FormatChecker())
    assert [f"{list(e.absolute_path)}: {e.message}" for e in checker.iter_errors(data)] == []
    return data


def sarif(made: Session) -> Any:
    text = rendered(made, "findings.sarif")
    if official := os.environ.get("SARIF_SCHEMA"):
        validated(text, json.loads(Path(official).read_text()))
    return validated(text, SARIF)


def shown(log: Any) -> list[str]:
    """What a viewer lists: level, place, rule and first line of the message, each reference followed."""
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    lines = []
    for result in run["results"]:
        rule = rules[result["ruleIndex"]]
        assert rule["id"] == result["ruleId"]
        assert result["message"]["text"].endswith(".")
        assert rule["shortDescription"]["text"].endswith(".")
        (place,) = (one["physicalLocation"] for one in result["locations"])
        file = place["artifactLocation"]
        base = run["originalUriBaseIds"][file["uriBaseId"]]["uri"] if "uriBaseId" in file else ""
        assert not base or base.endswith("/")
        path = unquote(base + file["uri"]).removeprefix("file://")
        struck = " (suppressed)" if result.get("suppressions") else ""
        first = result["message"]["text"].partition("\n")[0]
        lines.append(f"{result['level']} {path}:{place['region']['startLine']} {rule['id']}{struck} {first}")
    return lines


def test_sarif_holds_to_its_schema_and_a_viewer_shows_every_finding_at_its_place() -> None:
    lines = shown(sarif(session()))
    merged = "16 modules: model.layers.*.self_attn.q_proj: adapter 'default' is merged into the base weights."
    assert f"error /repo/bot/tests/test_adapter.py:27 LORA203 Adapter left merged: {merged}" in lines
    assert f"error /repo/bot/tests/test_it.py:18 LORA203 (suppressed) Adapter left merged: {merged}" in lines
    assert (
        f"error /repo/bot/adapters/a b/adapter_config.json:1 LORA203 Adapter left merged: {merged}" in lines
    )
    assert (
        "error /repo/bot/configs/asks.yml:9 LORA610 Quantization does not happen: asks.yml:9: load_in_4bit: "
        "Axolotl quantizes nothing here." in lines
    )
    assert {line.partition(" ")[0] for line in lines} == {"error", "warning", "note"}
    (run,) = sarif(session())["runs"]
    rule = next(one for one in run["tool"]["driver"]["rules"] if one["id"] == "LORA610")
    assert "## Use instead" in rule["help"]["markdown"]
    assert rule["defaultConfiguration"] == {"level": "error"}
    assert rule["properties"] == {"tags": ["lora", "recipe"], "problem.severity": "error"}
    told = run["invocations"][0]["toolExecutionNotifications"]
    assert [one["message"]["text"] for one in told] == [
        "tests/test_data.py::test_tokens: AssertionError: assert 3 == 4"
    ]


def test_fingerprints_survive_a_moved_line_and_differ_within_a_report() -> None:
    def prints(made: Session) -> list[str]:
        return [
            r["partialFingerprints"]["primaryLocationLineHash"] for r in sarif(made)["runs"][0]["results"]
        ]

    def gitlab_prints(made: Session) -> list[str]:
        return [one["fingerprint"] for one in json.loads(rendered(made, "gl-code-quality-report.json"))]

    for read in (prints, gitlab_prints):
        before = read(session(9))
        assert before == read(session(31))
        assert len(set(before)) == len(before) == 8
        moved = dataclasses.replace(session(9), root="/repo/other", folder="/repo/other")
        assert not set(before) & set(read(dataclasses.replace(moved, tests=moved.tests[:5])))


def test_the_report_for_gitlab_holds_to_its_format() -> None:
    issues = validated(rendered(session(), "gl-code-quality-report.json"), GITLAB)
    (one,) = (issue for issue in issues if issue["check_name"] == "LORA610")
    assert one["severity"] == "major"
    assert one["location"] == {"path": "bot/configs/asks.yml", "lines": {"begin": 9}}
    assert one["description"].splitlines()[-1] == "Fix: write adapter: qlora."
    assert {issue["severity"] for issue in issues} == {"major", "minor", "info"}


@pytest.mark.parametrize("state", ["running", "crashed", "interrupted"])
def test_a_session_that_did_not_end_says_so(state: Any) -> None:
    (run,) = sarif(session(state=state, problem="OSError: disk is gone", started="unknown"))["runs"]
    (invocation,) = run["invocations"]
    assert not invocation["executionSuccessful"]
    assert "OSError: disk is gone" in invocation["toolExecutionNotifications"][0]["message"]["text"]


def test_texts_from_outside_stay_text() -> None:
    made = dataclasses.replace(worded(HOSTILE), root="/repo", top="/repo", folder="/repo")
    log = sarif(made)
    assert shown(log)
    for result in log["runs"][0]["results"]:
        assert r"\[x\](javascript" in result["message"]["text"]
        assert "[x](" not in result["message"]["text"]
    validated(rendered(made, "gl-code-quality.json"), GITLAB)


def test_files_outside_of_the_checkout_and_an_empty_session() -> None:
    away = dataclasses.replace(recipe(3), file="/elsewhere/x y.yaml")
    made = session(tests=(ran("x::recipe", "failed", Report("recipe", (away,)), line=None),))
    assert shown(sarif(made))[0].startswith("error /elsewhere/x y.yaml:3 LORA610 ")
    empty = session(tests=())
    assert sarif(empty)["runs"][0]["results"] == []
    assert json.loads(rendered(empty, "gl-code-quality.json")) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.SARIF", "SARIF"),
        ("a.sarif.json", "SARIF"),
        ("gl-code-quality-report.json", "GitLab"),
        ("gl-code-quality.html", "HTML"),
        ("a.json", "JSON"),
        ("a.pdf", ""),
        ("sarif", ""),
    ],
)
def test_the_name_of_a_file_says_the_format(name: str, kind: str) -> None:
    assert format_of(name) == kind

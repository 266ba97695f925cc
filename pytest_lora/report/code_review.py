"""Findings where code is reviewed: SARIF 2.1.0 for code scanning, and GitLab's code quality report.

SARIF is https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html; what GitHub reads of it is
https://docs.github.com/en/code-security/code-scanning/integrating-with-code-scanning/sarif-support-for-code-scanning.
GitLab's format is https://docs.gitlab.com/ci/testing/code_quality/#code-quality-report-format.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pytest_lora.findings import Finding, Severity
from pytest_lora.report.digest import rule_groups
from pytest_lora.report.session import RanTest, Session
from pytest_lora.report.text import without_margin
from pytest_lora.rules import Rule, catalogue
from pytest_lora.values import json_text, printable

ROOT = "%SRCROOT%"
"""What SARIF calls the top of the sources, by custom."""

LEVELS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "note"}
GITLAB_SEVERITIES: dict[Severity, str] = {"error": "major", "warning": "minor", "info": "info"}

_LINE = re.compile(r":\d+(?=:|$)")
_LINK = re.compile(r"[\[\]\\]")


@dataclass(frozen=True, slots=True)
class Located:
    """A finding at its place.

    Attributes:
        finding: What was found.
        test: The first test that has it.
        path: Its file, from the top of the sources; absolute outside of them.
        line: Its line, from 1; the first where it is about the whole file.
        fingerprint: The same in the next session, also where lines moved.
    """

    finding: Finding
    test: RanTest
    path: str
    line: int
    fingerprint: str


def located(session: Session) -> Iterator[Located]:
    """Every finding at its place, each once: where it says that it is, or else where its test is."""
    seen: Counter[str] = Counter()
    known: set[tuple[Finding, str, int]] = set()
    for test in session.tests:
        for finding in test.findings:
            path = _from_top(session, finding.file or test.file)
            line = finding.line or (None if finding.file else test.line) or 1
            if not path or (finding, path, line) in known:
                continue
            known.add((finding, path, line))
            # An item is named after its file; other tests of a file are told apart by their names.
            name = "" if finding.file else test.nodeid
            where = _LINE.sub("", finding.where)
            same = _hash("\0".join((finding.code, path, name, where)))
            seen[same] += 1
            yield Located(finding, test, path, line, f"{same}:{seen[same]}")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:32]


def _from_top(session: Session, file: str) -> str:
    """The path of a file from the top of the sources, with slashes."""
    if not file:
        return ""
    path = Path(session.root or session.folder, file)
    top = Path(session.top or session.root or session.folder)
    return printable((path.relative_to(top) if path.is_relative_to(top) else path).as_posix())


def gitlab_report(session: Session) -> str:
    """The findings as GitLab's code quality report: a JSON list."""
    issues = [
        {
            "description": _message(one.finding),
            "check_name": one.finding.code,
            "fingerprint": _hash(one.fingerprint),
            "severity": GITLAB_SEVERITIES[one.finding.severity],
            "location": {"path": one.path, "lines": {"begin": one.line}},
        }
        for one in located(session)
    ]
    return json_text(issues, indent=1) + "\n"


def sarif_report(session: Session) -> str:
    """The findings as one run in SARIF 2.1.0."""
    rules = {rule.code: rule for rule in catalogue()}
    groups = rule_groups(session)
    order = {group.code: index for index, group in enumerate(groups)}
    descriptors = [_descriptor(group.code, group.title, rules.get(group.code)) for group in groups]
    top = Path(session.top or session.root or session.folder)
    driver = {
        "name": "pytest-lora",
        "rules": descriptors,
        "version": dict(session.versions).get("pytest-lora", "0"),
    }
    run = {
        "tool": {"driver": driver},
        "automationDetails": {"id": "pytest-lora/"},
        "columnKind": "unicodeCodePoints",
        "originalUriBaseIds": {ROOT: {"uri": f"{_uri(top)}/" if top.is_absolute() else "./"}},
        "invocations": [_invocation(session)],
        "results": [_result(one, order[one.finding.code]) for one in located(session)],
    }
    log = {
        "$schema": "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json",
        "version": "2.1.0",
        "runs": [run],
    }
    return json_text(log, indent=1) + "\n"


def _descriptor(code: str, title: str, rule: Rule | None) -> dict[str, Any]:
    """A rule: one of the catalogue with its documentation, another one with its name."""
    code, words = printable(code), printable(title.replace("_", " "))
    plain = {"id": code, "name": "".join(part.capitalize() for part in words.split()) or code}
    if rule is None:
        return {**plain, "shortDescription": {"text": _sentence(words or code)}}
    body = rule.doc.partition("\n")[2].strip()
    return {
        **plain,
        "shortDescription": {"text": _sentence(rule.summary)},
        "fullDescription": {"text": _sentence(rule.summary)},
        "help": {"text": f"{rule.summary}\n\n{body}", "markdown": f"# {rule.summary}\n\n{body}"},
        "defaultConfiguration": {"level": LEVELS[rule.severity]},
        "properties": {
            "tags": ["lora", rule.stage],
            "problem.severity": "recommendation" if rule.severity == "info" else rule.severity,
        },
    }


def _result(one: Located, index: int) -> dict[str, Any]:
    finding = one.finding
    absolute = Path(one.path).is_absolute()
    place = {"uri": _uri(Path(one.path))} if absolute else {"uri": _uri(Path(one.path)), "uriBaseId": ROOT}
    result: dict[str, Any] = {
        "ruleId": finding.code,
        "ruleIndex": index,
        "level": LEVELS[finding.severity],
        "message": {"text": _LINK.sub(r"\\\g<0>", _message(finding))},
        "locations": [
            {
                "physicalLocation": {"artifactLocation": place, "region": {"startLine": one.line}},
                "logicalLocations": [{"fullyQualifiedName": printable(one.test.nodeid), "kind": "function"}],
            }
        ],
        # GitHub follows a finding from one analysis to the next by the second name only.
        "partialFingerprints": {
            "loraFinding/v1": one.fingerprint,
            "primaryLocationLineHash": one.fingerprint,
        },
    }
    if one.test.outcome == "xfailed":
        result["suppressions"] = [{"kind": "inSource", "justification": "the test is marked xfail"}]
    return result


def _invocation(session: Session) -> dict[str, Any]:
    """How the session went; failures without a finding are what a reader of the findings would else miss."""
    told = [f"The session {session.state}: {session.problem}"] if session.state != "finished" else []
    told += [f"{test.nodeid}: {test.message}" for test in session.tests if test.fails_otherwise]
    began: dict[str, str] = {}
    try:
        moment = datetime.fromisoformat(session.started).astimezone(UTC)
        began["startTimeUtc"] = moment.strftime("%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        pass
    return {
        "executionSuccessful": session.state == "finished",
        "commandLine": printable(session.command),
        "workingDirectory": {"uri": _uri(Path(session.folder))},
        **began,
        "toolExecutionNotifications": [
            {"level": "error", "message": {"text": printable(text)}} for text in told
        ],
    }


def _message(finding: Finding) -> str:
    """The finding in sentences, as a reviewer reads it beside the line."""
    parts = (
        f"{finding.title.capitalize()}: {finding.where}: {finding.observed}",
        f"Expected: {finding.expected}",
        f"Fix: {without_margin(finding.fix)}",
    )
    return "\n".join(_sentence(printable(part)) for part in parts)


def _sentence(text: str) -> str:
    text = text.rstrip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _uri(path: Path) -> str:
    # Not Path.as_uri, which raises where a name is no Unicode.
    posix = path.as_posix()
    root = "file://" if posix.startswith("/") else "file:///" if path.is_absolute() else ""
    return root + quote(posix, safe="/:" if root else "/", errors="backslashreplace")

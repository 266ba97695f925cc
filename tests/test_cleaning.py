"""Whatever a stranger names, nothing that we say of it does anything to a terminal or to a CI service."""

from __future__ import annotations

import json
from dataclasses import asdict

from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lora import Expect, Finding, Report
from pytest_lora.plugin.file_nodes import wrapped
from pytest_lora.rules import Violation, catalogue
from pytest_lora.values import file_id, printable

SPARKS = (
    *("\x1b[31m", "\x1b]0;title\x07", "\r", "\r\n", "\n", "\t", "\x00", "\x85", "\u2028", "\u00a0", " "),
    *(
        "::add-mask::",
        "::",
        ":",
        "::error file=a::",
        "##[add-mask]",
        "##vso[task.setvariable]",
        "###",
        "[",
        "]",
    ),
    *("\u202e", "\u2066", "\u200b", "\ufeff", "\u061c", "\U000e0041", "\ud800", "\udcff", "\\", "%3A", "%"),
)
strange = st.lists(st.sampled_from(SPARKS) | st.text(max_size=3), max_size=8).map("".join)


def obeyed(line: str) -> bool:
    """Whether a runner takes a line for a command (``ActionCommand`` in actions/runner, Azure's ``##vso[``)."""
    return line.strip().startswith("::") or "##[" in line or "##vso[" in line


def is_harmless(text: str) -> bool:
    return all(line.isprintable() and not obeyed(line) for line in text.split("\n"))


@settings(deadline=None)
@given(strange)
def test_what_is_printable_does_nothing_and_stays_as_it_is(text: str) -> None:
    shown = printable(text)
    assert is_harmless(shown)
    assert printable(shown) == shown
    if is_harmless(text) and " ::" not in text:
        assert shown == text


@settings(deadline=None)
@given(st.lists(strange, max_size=9).map(" ".join), st.integers(20, 60))
def test_no_line_begins_a_command_where_a_long_one_is_broken(text: str, width: int) -> None:
    lines = list(wrapped(printable(text), width))
    assert not [line for line in lines if obeyed(line.strip())]


@settings(deadline=None)
@given(st.text("ab::\n\x1b", min_size=150, max_size=400))
def test_what_is_too_long_is_cut_once(text: str) -> None:
    shown = printable(text, 100)
    assert len(shown) <= 100
    assert is_harmless(shown)
    assert printable(shown, 100) == shown


@settings(deadline=None)
@given(strange, strange, strange, strange, strange)
def test_no_finding_and_no_report_says_anything_else(
    where: str, observed: str, expected: str, fix: str, subject: str
) -> None:
    first = catalogue()[0]
    violation = Violation(where, observed, expected, fix)
    made = type(first)(*("X1", "x", "error", object, "config", ".", lambda *_: iter([violation])))
    (finding,) = made(object(), Expect())
    report = Report(subject, (finding,))
    for text in (*map(str, asdict(finding).values()), report.subject, str(report), str(finding)):
        assert is_harmless(text), text
    assert Report.from_json(report.to_json()) == report
    assert is_harmless("\n".join(Report.from_json(json.dumps({"subject": subject, "findings": []})).lines()))


def test_the_line_of_a_finding_is_one_of_its_file() -> None:
    found = Finding("A1", "a", "error", "w", "o", "e", "f", file="recipes/\x1b[1m::x.yaml", line=3)
    assert found.file == r"recipes/\x1b[1m::x.yaml"


@settings(deadline=None)
@given(strange, strange)
def test_two_names_are_two_ids_in_which_pytest_reads_nothing(one: str, other: str) -> None:
    assert (file_id(one) == file_id(other)) == (one == other)
    assert file_id(one).isprintable()
    assert not {*"[]\\"} & {*file_id(one)}
    assert "::" not in f"a{file_id(one)}::{file_id(other)}b".replace("::", "", 1)


def test_the_ids_of_ordinary_names_are_these_names() -> None:
    for name in ("adapter", "r=8 (50%)", "チェックポイント-1", "a:b", "über.v2", "#1"):
        assert file_id(name) == name

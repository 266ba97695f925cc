"""Checks: inspect, judge, report. Each returns a Report and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Iterable

from pytest_lora.expect import Expect
from pytest_lora.facts.figures import Figure
from pytest_lora.facts.measures import Measures
from pytest_lora.findings import Finding, Report
from pytest_lora.rules import judge, number_of_rules
from pytest_lora.rules.selection import selected

NotJudged = tuple[tuple[str, str], ...]
"""Pairs: why something could not be judged, and what."""

NAMES_A_BASE = "base=, --lora-base or ini lora_bases names one"
"""What to do where a base is not known."""


def rules_of(stage: str) -> str:
    """How many rules a stage has, in words: ``"41 training rules"``."""
    return f"{number_of_rules(stage)} {stage} rules"


def report_on(
    subject: str,
    facts: Iterable[object],
    expect: Expect,
    select: Iterable[str],
    ignore: Iterable[str],
    figures: tuple[Figure, ...] = (),
    measured: Measures = (),
    not_judged: NotJudged = (),
) -> Report:
    """What the rules say of facts, as far as it is selected."""
    return reported(subject, judge(facts, expect), select, ignore, figures, measured, not_judged)


def reported(
    subject: str,
    findings: Iterable[Finding],
    select: Iterable[str],
    ignore: Iterable[str],
    figures: tuple[Figure, ...] = (),
    measured: Measures = (),
    not_judged: NotJudged = (),
) -> Report:
    """A report on findings, as far as they are selected."""
    return Report(subject, tuple(selected(findings, select, ignore)), figures, measured, not_judged)

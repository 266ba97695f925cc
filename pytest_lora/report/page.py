"""The report as one HTML file: no network, no framework, and nothing from outside ever becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.resources import files
from shlex import quote
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from pytest_lora.facts.figures import AdapterMap, to_plain
from pytest_lora.facts.figures.recipes import RecipeCard
from pytest_lora.facts.numbers import format_bytes
from pytest_lora.facts.sweep import rate_text
from pytest_lora.findings import Finding
from pytest_lora.report.charts import curve_chart, memory_view, path, sweep_chart
from pytest_lora.report.digest import FoundIn, RuleGroup, Shown, figures, rule_groups
from pytest_lora.report.map_view import map_view, number, words_of
from pytest_lora.report.rate_charts import price_chart, rate_chart
from pytest_lora.report.session import RanTest, Session, counted_tests, gpu_troubles
from pytest_lora.report.text import rule_doc, without_margin
from pytest_lora.rules import catalogue
from pytest_lora.values import printable

MOST_CHARACTERS = 900_000
"""Characters that findings may take in full. A page stays under 2 MB, which opens at once; the rest is counted, and
whole in the report as JSON."""

LISTED_TESTS = 1000
"""Rows of the table of tests, the gravest first."""

NAMED_TESTS = 12
"""Tests that are named under one finding."""


@dataclass(frozen=True, slots=True)
class _ShownGroup:
    """A rule on the page: its group and documentation, the findings that are shown in full, and how many are not.

    There is no documentation of a property that an assertion looks at without a rule.
    """

    group: RuleGroup
    doc: str
    shown: tuple[FoundIn, ...]
    more: int


def page(session: Session) -> str:
    """The report on a session as HTML."""
    shown = figures(session)
    others = [test for test in session.tests if test.fails_otherwise]
    return (
        _environment()
        .get_template("page.html")
        .render(
            session=session,
            started=_when(session.started),
            groups=_within(rule_groups(session)),
            maps=shown.maps,
            curves=shown.curves,
            budgets=shown.budgets,
            sweeps=shown.sweeps,
            recipes=shown.recipes,
            gpu=[test for test in session.tests if test.gpu is not None],
            gpu_troubles=list(gpu_troubles({t.nodeid: t.gpu for t in session.tests if t.gpu is not None})),
            first_failure=next((test for test in session.tests if test.failed), None),
            tests=session.judged[:LISTED_TESTS],
            more_tests=len(session.judged[LISTED_TESTS:]),
            others=others[:LISTED_TESTS],
            more_others=len(others[LISTED_TESTS:]),
            style=Markup(_asset("style.css")),
            script=Markup(_asset("script.js")),
            script_hash=_hash(_asset("script.js")),
        )
    )


def _within(groups: list[RuleGroup]) -> list[_ShownGroup]:
    """Cut the groups to what the page may hold; of every rule something is shown."""
    docs = {rule.code: rule.doc for rule in catalogue()} if groups else {}
    left = MOST_CHARACTERS
    cut: list[_ShownGroup] = []
    for group in groups:
        shown: list[FoundIn] = []
        for one in group.found:
            finding = one.finding
            texts = (finding.where, finding.observed, finding.expected, finding.fix)
            named = sum(len(test.nodeid) for test in one.tests[:NAMED_TESTS])
            left -= sum(min(len(text), 4000) for text in texts) + 2 * named + 500
            if shown and left < 0:
                break
            shown.append(one)
        cut.append(_ShownGroup(group, docs.get(group.code, ""), tuple(shown), len(group.found) - len(shown)))
    return cut


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    made.filters |= {
        "bytes": format_bytes,
        "number": number,
        "path": path,
        "seconds": _seconds,
        "planes": _planes,
        "percent": _percent,
        "flops": _flops,
        "rate": rate_text,
        "printable": printable,
        "breakable": _breakable,
        "without_margin": without_margin,
    }
    made.globals |= {
        "map_view": map_view,
        "curve_chart": curve_chart,
        "sweep_chart": sweep_chart,
        "rate_chart": rate_chart,
        "price_chart": price_chart,
        "memory_view": memory_view,
        "rule_doc": rule_doc,
        "counted_tests": counted_tests,
        "named_tests": NAMED_TESTS,
        "rerun": _rerun,
        "findings_of": _findings_of,
        "bar_width": _bar_width,
    }
    return made


def _findings_of(one: Shown[RecipeCard]) -> list[Finding]:
    """What was found in the reports that have this card."""
    found = (f for test in one.tests for r in test.reports if one.figure in r.figures for f in r.findings)
    return list(dict.fromkeys(found))


def _bar_width(size: int, beside: int) -> float:
    """A size in percent of the larger of two."""
    return round(100 * size / max(size, beside, 1), 2)


def _asset(name: str) -> str:
    return (files("pytest_lora.report") / "templates" / name).read_text("utf-8")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _planes(shown: AdapterMap) -> Any:
    """What the script reads of a map, as JSON inside of an element."""
    plain = to_plain(shown)
    kept = {
        name: plain[name]
        for name in ("rows", "columns", "states", "ranks", "scalings", "gradients", "updates")
    }
    for name in ("rows", "columns"):
        kept[name] = [printable(one) for one in kept[name]]
    kept["words"] = {state: words.partition(":")[0] for state, words in words_of(shown).items()}
    text = json.dumps(kept, separators=(",", ":"))
    # Inside of <script> only these could end the element or begin a comment.
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _breakable(text: str) -> Markup:
    """The id of a test, which may go on in the next line after a part of it."""
    return Markup(re.sub(r"(::|[/_])(?=[^/_:])", r"\1<wbr>", str(escape(printable(text)))))


def _when(started: str) -> str:
    try:
        return datetime.fromisoformat(started).strftime("%-d %B %Y, %H:%M %Z").strip()
    except ValueError:
        return started


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    if value < 100:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s"


def _percent(value: float) -> Markup:
    """A share, as exact as anybody looks, in one line."""
    text = f"{value:.0f} %" if value >= 9.95 else f"{value:.1f} %" if value >= 0.05 else "< 0.1 %"
    return Markup("&nbsp;").join(text.split(" "))


def _flops(value: float | None) -> str:
    """Floating-point operations with the prefix that fits."""
    if value is None:
        return ""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:,.2f} {prefix}FLOP"
    return f"{value:,.0f} FLOP"


def _rerun(test: RanTest) -> str:
    return f"pytest {quote(printable(test.nodeid))}"

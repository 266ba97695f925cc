"""What ``-vv`` adds to the terminal: for each subject seconds, numbers and, of a recipe, the effective setting."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from typing import TYPE_CHECKING

from pytest_lora.facts.figures.recipes import RecipeCard
from pytest_lora.plugin.recipe_table import setting_lines
from pytest_lora.values import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import pytest

    from pytest_lora.findings import Report

MOST_NUMBERS = 12
"""Numbers that are listed of a subject."""


def cut(text: str, width: int) -> str:
    """A text in at most so many characters, without its middle where it is longer."""
    if len(text) <= width:
        return text
    head = max(width - 3, 2) * 2 // 3
    return f"{text[:head]}...{text[len(text) - max(width - 3 - head, 1) :]}"


def lines(judged: dict[str, list[Report]], tests: Iterable[pytest.TestReport], width: int) -> Iterator[str]:
    """The lines of every subject, the slowest first; what is too long for the terminal goes on in the next line.

    Args:
        judged: What was judged, by node id.
        tests: The reports of pytest, which know how long each phase took.
        width: Of the terminal.
    """
    for line in map(printable, _lines(judged, tests, width)):
        margin = " " * (len(line) - len(line.lstrip()))
        # A broken word could begin a line with what a CI service takes for a command.
        whole = textwrap.TextWrapper(
            width, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False
        )
        yield from whole.wrap(line) if len(line) > width else [line]


def _lines(judged: dict[str, list[Report]], tests: Iterable[pytest.TestReport], width: int) -> Iterator[str]:
    took: defaultdict[str, float] = defaultdict(float)
    for test in tests:
        took[test.nodeid] += test.duration
    subjects: defaultdict[str, dict[str, list[Report]]] = defaultdict(dict)
    for nodeid, reports in judged.items():
        for report in reports:
            subjects[report.subject].setdefault(nodeid, []).append(report)

    def seconds(subject: str) -> float:
        return sum(took[nodeid] for nodeid in subjects[subject])

    for subject in sorted(subjects, key=seconds, reverse=True):
        own = subjects[subject]
        several = f"{len(own)} test{'' if len(own) == 1 else 's'}"
        told = f": {seconds(subject):.2f} s in {several}"
        yield ""
        yield cut(subject, width - len(told)) + told
        reports = [report for of_test in own.values() for report in of_test]
        for nodeid in own if len(own) > 1 else ():
            yield f"  {took[nodeid]:6.2f} s  {cut(nodeid, width - 12)}"
        yield from _numbers(reports)
        cards = dict.fromkeys(one for r in reports for one in r.figures if isinstance(one, RecipeCard))
        for card in cards:
            yield from setting_lines(card)
            yield from (f"  {name}: {value}" for name, value in card.steps)


def _numbers(reports: Iterable[Report]) -> Iterator[str]:
    """What was measured, each number once."""
    known = dict.fromkeys(pair for report in reports for pair in report.measured)
    for name, value in list(known)[:MOST_NUMBERS]:
        yield f"  {name}: {value:,}" if isinstance(value, int) else f"  {name}: {value:g}"
    if len(known) > MOST_NUMBERS:
        yield f"  ... and {len(known) - MOST_NUMBERS} more numbers"

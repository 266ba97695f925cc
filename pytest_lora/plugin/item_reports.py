"""How the items of saved adapters and recipes tell what was found: warnings, failures, and their text."""

from __future__ import annotations

import linecache
import textwrap
from typing import TYPE_CHECKING

from pytest_lora.assertions import LoraHealthError, delivered
from pytest_lora.findings import LoraHealthWarning
from pytest_lora.plugin.file_nodes import is_strict
from pytest_lora.rules.selection import in_force
from pytest_lora.values import LONGEST_OF_A_FINDING, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

    from pytest_lora.findings import Report

SHOWN_SOURCE = 100
"""Characters of a line of a file that pytest prints under a warning; a saved configuration may be one line."""

_HEADS = ("  --> ", "  observed: ", "  expected: ", "  fix:      ")
"""How the lines of a finding begin; what is too long goes on under what is said after that."""


def deliver(report: Report, place: str) -> None:
    """Hand a report in, warn of its warnings at a place, and raise if it has errors.

    Args:
        report: What was found.
        place: Path of a file whose lines pytest may show under a warning, or anything in brackets.

    Raises:
        LoraHealthError: There are errors, or warnings in a session that is strict.
        LoraHealthWarning: There are warnings, and a filter makes them errors.
    """
    delivered.append(report)
    if report.warnings and not place.startswith("<"):
        _cut_lines(place)
    strict = [str(finding) for finding in report.warnings if is_strict(finding, place)]
    if not report.ok or (in_force().strict and report.warnings):
        raise LoraHealthError(report)
    if strict:
        raise LoraHealthWarning("\n\n".join(strict))


def _cut_lines(file: str) -> None:
    """Let Python, which prints the line under a warning, know of a file no more than the beginnings of its lines."""
    known = linecache.getlines(file)
    lines = [line if len(line) <= SHOWN_SOURCE else f"{line[:SHOWN_SOURCE].rstrip()} ...\n" for line in known]
    linecache.cache[file] = (sum(map(len, lines)), None, lines, file)


def failure_text(excinfo: pytest.ExceptionInfo[BaseException], config: pytest.Config) -> str | None:
    """The report alone, no wider than the terminal, where that is what failed."""
    if not isinstance(excinfo.value, (LoraHealthError, LoraHealthWarning, ValueError)):
        return None
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    width = 80 if terminal is None else terminal._tw.fullwidth
    return "\n".join(wrapped(printable(str(excinfo.value), LONGEST_OF_A_FINDING), width))


def wrapped(text: str, width: int) -> Iterator[str]:
    """The lines of a report, of which those that are too long go on under what they say.

    A word is never broken, and neither is code between backticks, which somebody may copy.
    """
    for line in text.splitlines():
        if len(line) <= width:
            yield line
            continue
        kept = "`".join(
            part.replace(" ", "\0") if number % 2 else part for number, part in enumerate(line.split("`"))
        )
        further = " " * next((len(head) for head in _HEADS if line.startswith(head)), 2)
        parts = textwrap.wrap(
            kept, width, subsequent_indent=further, break_long_words=False, break_on_hyphens=False
        )
        first = len(line) - len(line.lstrip())
        for number, part in enumerate(parts):
            yield (line[:first] + part.lstrip() if number == 0 else part).replace("\0", " ")

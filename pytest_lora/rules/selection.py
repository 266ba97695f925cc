"""Which findings count: ``select``, ``ignore`` and ``strict``, of a call and of the session that it is in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from pytest_lora.findings import Finding
from pytest_lora.rules import catalogue
from pytest_lora.values import require_items, shown


@dataclass(frozen=True, slots=True)
class Selection:
    """What a session, a marker or a call looks at.

    Attributes:
        select: Codes, or starts of codes, that count; all when empty.
        ignore: Codes, or starts of codes, that are left out.
        strict: Whether warnings fail an assertion as errors do.
    """

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    strict: bool = False

    def keeps(self, code: str) -> bool:
        """Whether findings of this code count."""
        return (not self.select or code.startswith(self.select)) and not code.startswith(
            self.ignore or ("\0",)
        )


EVERYTHING = Selection()
"""Nothing left out, and warnings only warn."""

_in_force: ContextVar[Selection] = ContextVar("selection", default=EVERYTHING)


def in_force() -> Selection:
    """The selection of the session or test that is running; that of everything outside of pytest."""
    return _in_force.get()


@contextmanager
def applied(selection: Selection) -> Iterator[None]:
    """Let every check within look at this selection only, beside what is asked of it itself."""
    token = _in_force.set(selection)
    try:
        yield
    finally:
        _in_force.reset(token)


def selected(findings: Iterable[Finding], select: Iterable[str], ignore: Iterable[str]) -> Iterator[Finding]:
    """Keep the findings that a call selects and does not ignore, nor the session that it is in.

    Raises:
        TypeError: ``select`` or ``ignore`` is a string, or holds something else.
        ValueError: A prefix fits no code of the catalogue, so that it would silently do nothing.
    """
    asked = Selection(codes("select", select), codes("ignore", ignore))
    session = in_force()
    for finding in findings:
        if asked.keeps(finding.code) and session.keeps(finding.code):
            yield finding


def codes(argument: str, prefixes: Any) -> tuple[str, ...]:
    """Starts of codes as they are now, for those that a rule had before too.

    Raises:
        TypeError: They are no list of strings.
        ValueError: One fits no code; the message names the argument and suggests another.
    """
    found: list[str] = []
    for prefix in require_items(argument, prefixes, "a list of codes such as ['LORA1']"):
        if not isinstance(prefix, str):
            raise TypeError(
                f"{argument} must be a list of codes such as ['LORA1'], but holds {shown(prefix)}"
            )
        fitting = [rule for rule in catalogue() if any(code.startswith(prefix) for code in rule.codes)]
        if not fitting or not prefix:
            raise ValueError(
                f"{argument}: {shown(prefix)} is no code or start of a code; {_nearest(prefix[:40])}"
            )
        found.append(prefix)
        found += [rule.code for rule in fitting if not rule.code.startswith(prefix)]
    return tuple(found)


def _nearest(prefix: str) -> str:
    known = {key: rule.code for rule in catalogue() for key in (*rule.codes, rule.name)}
    # A letter in a number is what a mistyped code most often is.
    asked = prefix.upper().translate(str.maketrans("OI", "01")) if prefix[:4].upper() == "LORA" else prefix
    asked = "LORA" + asked[4:] if asked.startswith("L0RA") else asked
    for word in (asked, prefix.lower().replace("-", "_").replace(" ", "_")):
        if close := difflib.get_close_matches(word, known, n=1, cutoff=0.6):
            return f"did you mean {known[close[0]]!r}? --lora-rules lists them"
    return "--lora-rules lists them"

"""What a rule says of facts that were made by hand."""

from __future__ import annotations

from pytest_lora import Expect, Finding
from pytest_lora.rules import find


def told(rule: str, facts: object, expect: Expect | None = None) -> list[Finding]:
    judge = find(rule)
    assert judge is not None
    return list(judge(facts, expect or Expect()))


def says(rule: str, facts: object, *all_words: str, expect: Expect | None = None) -> None:
    """Hold what a rule says to a severity and words of what it sees or advises (``"error: rank 8"``), in order; to
    nothing where there are none."""
    found = told(rule, facts, expect)
    assert len(found) == len(all_words), found
    for one, expected in zip(found, all_words, strict=True):
        severity, _, words = expected.partition(": ")
        assert one.severity == severity, str(one)
        assert any(words in text for text in (one.where, one.observed, one.expected, one.fix)), str(one)

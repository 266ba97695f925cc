"""Rules of the stage recipe: what only the file that describes a run can show; and where in the file something is."""

from __future__ import annotations

from pytest_lora.facts.recipe import RecipeFacts, Value
from pytest_lora.rules import Violation


def at(facts: RecipeFacts, line: int | None, key: str = "") -> str:
    """Where something is: the file, the line and the key."""
    place = facts.name if line is None else f"{facts.name}:{line}"
    return f"{place}: {key}" if key else place


def about(facts: RecipeFacts, value: Value, observed: str, expected: str, fix: str) -> Violation:
    """A violation at the line that decides a value."""
    return Violation(at(facts, value.line, value.key), observed, expected, fix, line=value.line)

"""What ``--lora-rules`` and ``--lora-explain`` print."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import pytest

from pytest_lora.bases.examples import runnable
from pytest_lora.rules import Rule, catalogue

if TYPE_CHECKING:
    from collections.abc import Iterator


def show(config: pytest.Config) -> int:
    """Print what was asked for.

    Returns:
        The exit status.

    Raises:
        pytest.UsageError: There is no such rule.
    """
    lines = listing() if config.getoption("lora_rules") else page(config.getoption("lora_explain"))
    print("\n".join(lines))
    return int(pytest.ExitCode.OK)


def listing() -> Iterator[str]:
    """One line a rule, ordered by code."""
    rules = catalogue()
    width = max(len(rule.name) for rule in rules)
    for rule in rules:
        yield f"{rule.code}  {rule.severity:<7}  {rule.name:<{width}}  {rule.summary}"


def page(wanted: str) -> Iterator[str]:
    """The documentation of the rule with this code or name."""
    rule = _find(wanted)
    yield f"{rule.code} {rule.name} ({rule.severity})"
    yield ""
    yield runnable(rule.doc)


def _find(wanted: str) -> Rule:
    known = {key: rule for rule in catalogue() for key in (rule.code.lower(), rule.name)}
    asked = wanted.lower().replace("-", "_")
    if asked in known:
        return known[asked]
    # A letter in a number is what a mistyped code most often is.
    digits = "lora" + asked[4:].translate(str.maketrans("oil", "011"))
    keys = [key for key in known if key.startswith("lora") == asked.startswith("lora")]
    close = [digits] if digits in known else difflib.get_close_matches(asked, keys, cutoff=0.5)
    names = [known[key].code if key.startswith("lora") else key for key in close]
    hint = f"did you mean {', '.join(names)}? " if close else ""
    raise pytest.UsageError(f"--lora-explain: there is no rule {wanted!r}; {hint}--lora-rules lists them all")

"""Whether the regular expressions of a configuration can be tried at all: one can be written to take for ever."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

MAX_LENGTH = 20_000
"""Characters of one expression."""

MAX_DEPTH = 50
"""Groups within groups: Python's parser of expressions calls itself for each, and where the stack ends is chance."""

MAX_TRIALS = 200_000
"""Keys of a pattern times names to match: about half a second of work."""

PATIENCE_S = 1.0
"""Seconds that trying the doubtful expressions of one adapter may take; real ones need a few milliseconds."""

_HARMLESS = re.compile(r"[^*+{]*(?:(?<!\))[*+][^*+{]*)?")
"""Expressions with at most one repetition, not of a group, take time quadratic in the name at most."""

_TRY = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for form in (pattern, r"(.*\\.)?(%s)$" % pattern, r".*\\.[^.]*\\.%s\\.(\\d+)\\." % pattern):
        try:
            expression = re.compile(form)
        except re.error:
            continue
        for name in names:
            expression.match(name)
            expression.fullmatch(name)
"""


def refusal(config: dict[str, Any], names: Iterable[str]) -> str | None:
    """Why the expressions of a configuration are not to be tried on these names; None if they may be.

    Doubtful ones are tried in a process of their own first, as a match cannot be stopped.
    """
    patterns = list(dict.fromkeys(_expressions(config)))
    known = list(dict.fromkeys(names))
    keys = sum(
        len(value)
        for field in ("rank_pattern", "alpha_pattern")
        if isinstance(value := config.get(field), dict)
    )
    if keys * len(known) > MAX_TRIALS:
        return f"rank_pattern and alpha_pattern have {keys:,} keys for {len(known):,} modules"
    doubtful = []
    for pattern in patterns:
        if len(pattern) > MAX_LENGTH:
            return f"a pattern is {len(pattern):,} characters long"
        if _depth(pattern) > MAX_DEPTH:
            return f"a pattern has groups nested more than {MAX_DEPTH} deep"
        if _HARMLESS.fullmatch(pattern):
            continue
        try:
            re.compile(pattern)
        except re.error:
            continue
        except (OverflowError, RecursionError, MemoryError) as error:
            return f"a pattern cannot be compiled: {type(error).__name__}"
        doubtful.append(pattern)
    if doubtful and not _end_in_time(doubtful, known):
        return f"matching {doubtful[0][:100]!r} does not end within {PATIENCE_S:g} s"
    return None


def _depth(pattern: str) -> int:
    """How deep groups are nested at most; brackets that stand for themselves count too."""
    deepest = depth = 0
    for character in pattern:
        depth += (character == "(") - (character == ")" and depth > 0)
        deepest = max(deepest, depth)
    return deepest


def _end_in_time(patterns: list[str], names: list[str]) -> bool:
    try:
        tried = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRY],
            input=json.dumps([patterns, names]).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return tried.returncode == 0


def _expressions(config: dict[str, Any]) -> Iterator[str]:
    """Every string that PEFT or a rule may take for a regular expression."""
    for field in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = config.get(field)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                yield text
    for field in ("rank_pattern", "alpha_pattern", "trainable_token_indices"):
        value = config.get(field)
        if isinstance(value, dict):
            yield from value

"""What the expressions of a configuration mean to PEFT.

An expression can be written to take for ever. Those of strangers are matched in a process whose time is limited, which
tells here what it found; they are not compiled in this one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, NamedTuple

Kind = Literal["pattern", "key"]
"""A pattern means the whole name of a module; a key of ``rank_pattern`` or ``alpha_pattern`` the end of one."""

MOST = 10_000
"""Expressions of which is kept what was found; then all are forgotten."""


class _Found(NamedTuple):
    names: frozenset[str]
    meant: frozenset[str]
    is_sound: bool


_found: dict[Kind, dict[str, _Found]] = {"pattern": {}, "key": {}}


def learn(kind: Kind, text: str, names: frozenset[str], meant: Iterable[str], is_sound: bool) -> None:
    """Keep what was found in another process.

    Args:
        kind: What the text is.
        text: The expression.
        names: Modules that it was matched with.
        meant: Those of them that it means.
        is_sound: Whether the text alone is an expression.
    """
    known = _found[kind]
    before = known.get(text)
    if before is not None:
        names, meant = names | before.names, before.meant.union(meant)
    elif len(known) >= MOST:
        known.clear()
    known[text] = _Found(names, frozenset(meant), is_sound)


def deciding_key(keys: Iterable[str], module: str) -> str | None:
    """The first key of a rank or alpha pattern that matches a module (``peft.utils.get_pattern_key``)."""
    known = _found["key"]
    for key in keys:
        found = known.get(key)
        if found is not None and module in found.names:
            if module in found.meant:
                return key
            continue
        expression = _of_end(key)
        if expression is not None and expression.match(module):
            return key
    return None


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern means a module."""
    found = _found["pattern"].get(pattern)
    if found is not None and module in found.names:
        return module in found.meant
    expression = _compiled(pattern)
    return expression is not None and expression.fullmatch(module) is not None


def is_expression(key: str) -> bool:
    """Whether a key of a rank or alpha pattern alone is a regular expression."""
    found = _found["key"].get(key)
    return found.is_sound if found is not None else _compiled(key) is not None


@lru_cache(maxsize=4096)
def _of_end(key: str) -> re.Pattern[str] | None:
    return _compiled(rf"(.*\.)?({key})$")


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str] | None:
    """A regular expression of a configuration; None where it is none, and so can match nothing."""
    try:
        with warnings.catch_warnings():  # of what another version of Python may read otherwise
            warnings.simplefilter("ignore")
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return None

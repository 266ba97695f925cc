"""Whether what a configuration has matched can be matched at all: an expression can be written to take for ever."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pytest_lora.inspection.limited.process import SECONDS, LimitError, limited
from pytest_lora.inspection.limited.worker import CACHE, KEPT

FIELDS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_pattern",
    "trainable_token_indices",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
)
"""Fields whose texts PEFT matches with names of modules."""

_NAME = re.compile(r"[\w.-]*")
"""Expressions without any choice: matching one takes a step for each character of the name, or of the expression."""

FEW = 512
"""Expressions that Python keeps compiled (``re._MAXCACHE``)."""

PATTERN_S = SECONDS / 2
"""Of a processor, for one pattern: PEFT matches it again, and so do rules."""

STEPS = 5_000_000
"""Characters of names times plain expressions: about a twentieth of a second."""


def unmatchable(config: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """Why what a configuration names is not to be matched with these modules; None if it may be.

    Plain names, where there are not many, take a time that is known. All else is matched in a limited process first.
    """
    known = list(dict.fromkeys(names))
    left = SECONDS
    for field in FIELDS:
        value = _texts(config.get(field))
        if _is_short_work(value, known):
            continue
        most = min(left, PATTERN_S) if isinstance(value, str) else left
        try:
            _, took = limited.do("rehearse", field, value, known, seconds=most)
        except LimitError as error:
            return f"{field}: matching {_in_words(value)} with {len(known):,} modules is not tried: {error}"
        left = max(left - took, SECONDS / 100)
    return None


@contextmanager
def patterns_kept() -> Iterator[None]:
    """Let Python keep every expression compiled for a while.

    PEFT matches each module with each key of ``rank_pattern`` in turn, so that a map of more than ``FEW`` keys is
    compiled anew for every module: 25 s for 560 keys on 560 modules, in place of a tenth of a second.
    """
    before = getattr(re, CACHE, None)
    if before is None:
        yield
        return
    setattr(re, CACHE, KEPT)
    try:
        yield
    finally:
        setattr(re, CACHE, before)
        if len(getattr(re, "_cache", ())) > before:
            re.purge()


def require_matchable(config: Any, names: Iterable[str]) -> None:
    """Refuse a configuration whose patterns are not to be tried on these modules.

    Raises:
        ValueError: They are not; the message names the field.
    """
    if why := unmatchable(vars(config), names):
        raise ValueError(f"config: {why}; write plain names of modules")


def _texts(value: Any) -> str | list[str]:
    """What PEFT or a rule may match of a field."""
    if isinstance(value, str):
        return value
    members = value if isinstance(value, (list, tuple, set, frozenset, dict)) else ()
    return [text for text in members if isinstance(text, str)]


def _is_short_work(value: str | list[str], names: list[str]) -> bool:
    texts = [value] if isinstance(value, str) else value
    if len(texts) > FEW or len(texts) * sum(len(name) + 20 for name in names) > STEPS:
        return not texts
    return all(len(text) < 1000 and _NAME.fullmatch(text) for text in texts)


def _in_words(value: str | list[str]) -> str:
    if isinstance(value, list) and len(value) > 1:
        return f"its {len(value):,} names"
    text = value if isinstance(value, str) else value[0]
    return repr(text if len(text) <= 100 else f"{text[:100]}...")

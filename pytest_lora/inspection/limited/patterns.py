"""Whether what a configuration has matched can be matched at all: an expression can be written to take for ever."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pytest_lora.inspection.limited import SECONDS, LimitError, limited
from pytest_lora.inspection.limited.worker import CACHE, KEPT
from pytest_lora.patterns import learn

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

KEYS = ("rank_pattern", "alpha_pattern")
"""Those whose texts are matched with the ends of names."""

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
            asked = _with_ends(value) if field in KEYS else value
            found, took = limited.do("rehearse", field, asked, known, seconds=most)
        except LimitError as error:
            return f"{field}: matching {_in_words(value)} with {len(known):,} modules is not tried: {error}"
        left = max(left - took, SECONDS / 100)
        _learn(field, asked, known, found)
    return None


def _learn(field: str, asked: str | list[str], names: list[str], found: list[tuple[list[int], bool]]) -> None:
    """Let the rules have what the process found."""
    if not isinstance(asked, str) and field not in KEYS:
        return
    distinct = frozenset(names)
    texts = [asked] if isinstance(asked, str) else asked
    for text, (places, is_sound) in zip(texts, found, strict=True):
        learn("key" if field in KEYS else "pattern", text, distinct, (names[at] for at in places), is_sound)


def _with_ends(keys: str | list[str]) -> list[str]:
    """Keys, and those that begin with ``^`` without it, as it lets a key of PEFT's match nothing deeper."""
    known = [keys] if isinstance(keys, str) else keys
    return list(dict.fromkeys([*known, *(key.lstrip("^") for key in known)]))


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

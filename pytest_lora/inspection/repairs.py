"""What the patterns of a configuration would have to be: tried in the limited process, as they are a stranger's."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pytest_lora.facts.base import BaseFacts
from pytest_lora.facts.config import NameMatch, Repairs
from pytest_lora.facts.settings import Settings
from pytest_lora.inspection.limited.process import SECONDS, LimitError, WorkError, limited

MOST = 20
"""Patterns that are looked at: what is said of more is read by nobody."""

REPAIR_S = SECONDS / 4
"""Of a processor, for each of two questions; without an answer the rule says less."""


def repairs(written: Settings, names: Iterable[NameMatch], base: BaseFacts, *, refused: bool) -> Repairs:
    """Which pattern is none, where PEFT refused a configuration, and which forms of lost ones fit the base."""
    is_text = isinstance(written.target_modules, str)
    unmatched = (match for match in names if match.field == "target_modules" and not match.modules)
    lost = [match.name for match in unmatched if is_text or match.is_pattern]
    texts = list(_expressions(written))[:MOST] if refused else []
    broken = mended = None
    if texts:
        forms = [[text, _as_expression(text)] for _, text in texts]
        found = _asked("expressions", forms)
        at = next((number for number, sound in enumerate(found) if not sound[0]), None)
        if at is not None:
            broken, mended = texts[at], forms[at][1] if found[at][1] else None
    fitting: dict[str, str] = {}
    if lost:
        linear = [module.name for module in base.modules if module.is_linear]
        forms = [_forms(text) for text in lost[:MOST]]
        found = _asked("fitting", forms, list(base.module_names), linear)
        fitting = {text: form for text, form in zip(lost, found, strict=False) if form is not None}
    return Repairs(broken, mended, tuple(fitting.items()))


def _asked(work: str, *arguments: object) -> list[Any]:
    try:
        found: list[Any] = limited.do(work, *arguments, seconds=REPAIR_S)[0]
    except (LimitError, WorkError):
        return []
    return found


def _expressions(written: Settings) -> Iterable[tuple[str, str]]:
    """Field and text of all that PEFT compiles."""
    for field in ("rank_pattern", "alpha_pattern"):
        yield from ((field, key) for key, _ in getattr(written, field))
    for field in ("target_modules", "exclude_modules"):
        value = getattr(written, field)
        if isinstance(value, str):
            yield field, value


def _as_expression(text: str) -> str:
    """A text with ``*``, as in names of files, as a regular expression."""
    return re.sub(r"(?<!\.)\*", ".*", text)


def _forms(text: str) -> list[str]:
    """A pattern in forms that fit whole names."""
    core = text.strip("^$").removeprefix("base_model.model.").removeprefix(r"base_model\.model\.")
    return [core, rf"(.*\.)?({core})", rf"({core})\w*", rf".*({core})", rf".*({core})\w*"]

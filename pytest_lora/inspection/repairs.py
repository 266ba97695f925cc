"""What a configuration would have to say instead, where PEFT refuses its modules or its patterns match none.

PEFT itself is asked which modules to exclude; patterns are tried in the limited process, as they are a stranger's.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from pytest_lora.facts.base import BaseFacts
from pytest_lora.facts.config import NameMatch, Refusal, Repairs
from pytest_lora.facts.settings import Settings, is_named
from pytest_lora.inspection.limited import SECONDS, LimitError, WorkError, limited
from pytest_lora.inspection.peft_internals import LoraConfig

MOST = 20
"""Patterns that are looked at: what is said of more is read by nobody."""

REPAIR_S = SECONDS / 4
"""Of a processor, for each of two questions; without an answer the rule says less."""

_CLASS = re.compile(r"Target module (\w+)\(")
_NAME = re.compile(r"Module '([\w.]+)' is incompatible")


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


def explained(
    refusal: Refusal,
    config: LoraConfig,
    modules: dict[str, nn.Module],
    try_config: Callable[[LoraConfig], Exception | None],
) -> Refusal:
    """The refusal with the modules that it is about, and an exclusion under which PEFT takes the rest.

    Args:
        refusal: What PEFT raised.
        config: The configuration; it is not changed.
        modules: The modules of the base by name.
        try_config: Lets PEFT make an adapter of a configuration, and returns what it raises.
    """
    settings = Settings.of(config)
    refused = tuple(_refused(refusal.message, settings, modules))
    if not refused:
        return refusal
    for exclusion in _exclusions(refused, settings, modules) if not settings.exclude_modules else ():
        tried: Any = copy.deepcopy(config)
        tried.exclude_modules = exclusion if isinstance(exclusion, str) else set(exclusion)
        if try_config(tried) is None:
            return Refusal(refusal.error, refusal.message, refused, exclusion)
    return Refusal(refusal.error, refusal.message, refused)


def _refused(message: str, settings: Settings, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Modules that a message names, by their class or by the end of their name, and that the targets mean."""
    kind, ending = _CLASS.search(message), _NAME.search(message)
    everything = str(settings.target_modules).lower() == "all-linear"
    for name, module in modules.items():
        is_kind = kind is not None and type(module).__name__ == kind[1] and settings.targets(name)
        is_named_so = ending is not None and is_named(name, ending[1])
        if is_kind or (is_named_so and (everything or settings.targets(name))):
            yield name


def _exclusions(
    refused: tuple[str, ...], settings: Settings, modules: dict[str, nn.Module]
) -> Iterator[tuple[str, ...] | str]:
    """Names of the parts of the base that hold nothing else that is meant; then the modules' own names."""
    others = [name for name in modules if settings.targets(name) and name not in set(refused)]
    parts = {_outermost(name, others) for name in refused}
    if None not in parts:
        leaves = sorted({str(part).rpartition(".")[2] for part in parts})
        yield f".*({'|'.join(leaves)}).*"
    yield tuple(sorted({name.rpartition(".")[2] for name in refused}))


def _outermost(name: str, others: list[str]) -> str | None:
    """The largest part of the model around a module without any of the other targets, if it has a name of its own."""
    steps = name.split(".")
    for depth in range(1, len(steps)):
        part = ".".join(steps[:depth])
        if not any(other.startswith(f"{part}.") for other in others):
            return None if steps[depth - 1].isdigit() else part
    return None

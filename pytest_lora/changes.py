"""Changes of settings that a fix asks for, as data beside its sentence.

A rule writes ``fix=advise(change("set", lora_alpha=16.0), ", which gives a scaling of 2")``. The sentence says
``set lora_alpha=16, which gives a scaling of 2``, and the finding has the change too: a recipe shows it in the notation
of its tool, and a program can apply it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Change:
    """Settings that get other values together: one way to mend what a finding tells.

    Attributes:
        settings: The new values by name, as a call takes them: fields of ``LoraConfig``, or arguments of
            ``estimate_memory``. None leaves a field out.
        said: How the sentence says it, a part of the fix: ``"set lora_alpha=16"``.
        is_noun: Whether the sentence takes it for a thing, as in "take a smaller batch or ``quantization='nf4'``", and
            says elsewhere what to do with it.
    """

    settings: Mapping[str, Any]
    said: str
    is_noun: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", _plain(self.settings))

    def __str__(self) -> str:
        return self.said


@dataclass(frozen=True, slots=True)
class Advice:
    """A sentence, and the changes of settings that it says, in their order there."""

    text: str
    changes: tuple[Change, ...] = ()


def change(verb: str = "", /, **settings: object) -> Change:
    """Settings to change, said as in a call of ``LoraConfig``, with a verb before them unless the sentence has one.

    An empty tuple stands for a list that is to go, and becomes None. A ``range`` of rows, alone or as the last of a
    tuple, is said as one.
    """
    return Change(_without_empty(settings), f"{verb} {assigned(**settings)}".lstrip())


def noun(**settings: object) -> Change:
    """The same for a sentence that has its verb elsewhere: "with ``r=8``"."""
    return Change(_without_empty(settings), assigned(**settings), is_noun=True)


def advise(*parts: str | Change | Advice) -> Advice:
    """A fix of several parts."""
    return Advice("".join(_text(part) for part in parts), tuple(_changes(parts)))


def advise_any(ways: Iterable[str | Change | Advice], between: str = " or ") -> Advice:
    """A fix of several ways."""
    parts = [part for way in ways for part in (between, way)]
    return advise(*parts[1:])


def assigned(**settings: object) -> str:
    """``"r=8, target_modules=['q_proj']"``: settings as they are written in a call of ``LoraConfig``."""
    return ", ".join(f"{name}={_written(value)}" for name, value in settings.items())


def _text(part: str | Change | Advice) -> str:
    return part.text if isinstance(part, Advice) else str(part)


def _changes(parts: Iterable[str | Change | Advice]) -> Iterator[Change]:
    for part in parts:
        if isinstance(part, Change):
            yield part
        elif isinstance(part, Advice):
            yield from part.changes


def _without_empty(settings: Mapping[str, object]) -> dict[str, object]:
    return {name: None if value == () else value for name, value in settings.items()}


def _written(value: object) -> str:
    if isinstance(value, range):
        return f"list(range({value.start}, {value.stop}))"
    if isinstance(value, tuple):
        if value and isinstance(value[-1], range):
            return f"{list(value[:-1])} + {_written(value[-1])}"
        value = list(value) or None
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_written(found)}" for key, found in value.items()) + "}"
    return f"{value:.10g}" if isinstance(value, float) else repr(value)


def _plain(value: Any) -> Any:
    """The value as it is said: numbers with ten digits, and lists."""
    if isinstance(value, float):
        return float(f"{value:.10g}")
    if isinstance(value, Mapping):
        return {str(name): _plain(found) for name, found in value.items()}
    if isinstance(value, (list, tuple, range)):
        runs = [item if isinstance(item, range) else (item,) for item in value]
        return [_plain(item) for run in runs for item in run]
    return value

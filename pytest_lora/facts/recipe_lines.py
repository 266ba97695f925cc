"""Facts about the lines of a recipe: what is no YAML, and keys and values that do not do what they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FlawKind = Literal["syntax", "tab", "limit", "tag", "unreadable"]
"""Why a file is no YAML that a tool could load: its syntax, a tab among it, its size, depth or aliases, a tag that asks
for an object to be made, or the file itself."""

UnknownKind = Literal["unknown", "removed", "renamed", "dropped", "block"]
"""Why nothing reads a key: the tool has none of this name, has it no more, calls it otherwise, drops it on the way to
where it would be read, or reads no nested blocks."""


@dataclass(frozen=True, slots=True)
class Flaw:
    """Where a file stops being YAML; ``message`` is the parser's."""

    kind: FlawKind
    line: int
    message: str


@dataclass(frozen=True, slots=True)
class Repeated:
    """A key that stands twice in one mapping; the last one counts."""

    key: str
    first: int
    last: int
    first_text: str
    last_text: str


@dataclass(frozen=True, slots=True)
class UnknownKey:
    """A key that nothing reads.

    Attributes:
        key: As written.
        line: Where.
        text: The line as written.
        kind: Why.
        meant: The key that was meant, or None.
        since: The version that removed it, or where alone a key that is dropped is read; else empty.
        stops: Whether the tool stops at it, instead of dropping it without a word.
    """

    key: str
    line: int
    text: str
    kind: UnknownKind
    meant: str | None
    since: str
    stops: bool


@dataclass(frozen=True, slots=True)
class WrongKind:
    """A value that is not of the kind that its key takes.

    Attributes:
        key: As written.
        line: Where.
        written: The value as written.
        became: What a tool gets, in words.
        wanted: What the key takes, in words.
        mended: The value as it would be right; empty where it cannot be told.
        stops: Whether the run stops at it.
    """

    key: str
    line: int
    written: str
    became: str
    wanted: str
    mended: str
    stops: bool


@dataclass(frozen=True, slots=True)
class Clash:
    """Two keys that the tool does not take beside each other, or one that it does not take without another.

    Attributes:
        key: The one that is to go.
        line: Where.
        other: The one that stays.
        why: What the tool does.
        stops: Whether it stops at them, instead of leaving one out without a word.
        needed: Keys of which the first one lacks each; empty where two are beside each other.
    """

    key: str
    line: int
    other: str
    why: str
    stops: bool
    needed: tuple[str, ...] = ()

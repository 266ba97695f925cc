"""JSON from a file that nobody vouches for."""

from __future__ import annotations

import json
from typing import Any

from pytest_lora.facts.checkpoint import FileFault
from pytest_lora.inspection.checkpoint.folder import Folder, UnreadableError
from pytest_lora.inspection.checkpoint.other_contents import mistaken

MAX_COMMAS = 1_000_000
"""Values in one file: each costs up to 150 bytes of memory once it is parsed, so this is a bound on that."""


def read_object(folder: Folder, name: str, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most ``limit`` bytes.

    Raises:
        UnreadableError: It cannot be read or is no JSON object with distinct names.
    """
    return parse_object(folder.read(name, limit), name)


def parse_object(content: bytes, name: str) -> dict[str, Any]:
    """The JSON object in ``content``; a name that it has twice is an error, as readers differ on which counts.

    Raises:
        UnreadableError: It is none.
    """

    def fault(observed: str) -> UnreadableError:
        return UnreadableError(FileFault(name, "format", observed))

    if content.count(b",") > MAX_COMMAS:
        raise UnreadableError(FileFault(name, "size", f"it holds more than {MAX_COMMAS:,} values"))
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_distinct)
    except UnicodeDecodeError as error:
        raise fault(f"it is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise fault("it is nested too deeply to be read") from error
    except DuplicateError as error:
        raise fault(f"it has the name {_short(str(error))} twice") from error
    except ValueError as error:
        if other := mistaken(content, name):
            raise UnreadableError(other) from error
        if not content.strip():
            raise fault("it is empty") from error
        if b"<<<<<<< " in content and b">>>>>>> " in content:
            raise fault("it is no JSON: Git left the markers of a merge conflict in it (<<<<<<<)") from error
        raise fault(f"it is no JSON: {str(error)[:120]}") from error
    if not isinstance(found, dict):
        raise fault(f"it holds {_in_words(found)} instead of an object")
    return found


class DuplicateError(ValueError):
    """A JSON object has one name twice."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise DuplicateError(name)
            seen.add(name)
    return found


def _in_words(value: Any) -> str:
    if value is None:
        return "null"
    return {list: "a list", str: "a string", bool: "a truth value"}.get(type(value), "a number")


def _short(text: str, limit: int = 120) -> str:
    text = text.encode("utf-8", "replace").decode()
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."

"""Text of strangers, made harmless: names of tensors, files and folders, and what libraries say of them."""

from __future__ import annotations

import json
import re

LONGEST = 4000
"""Characters of one text where a page shows many; what is longer is cut in the middle."""

LONGEST_OF_A_FINDING = 20_000
"""Characters of one field of a finding: a fix may spell out a few hundred target modules."""

_ROOM = 40
"""Characters that the words in the place of a cut take at most."""

_COMMAND = re.compile(r"(^|(?<= )):(?=:)|#(?=#\w*\[)", re.MULTILINE)
"""What the runners of CI services obey when it stands in a log: a line that begins with ``::``, after space, is a
command of GitHub Actions (``ActionCommand.TryParseV2`` in actions/runner); ``##[command]`` (``TryParse`` there) and
``##vso[command]`` (Azure Pipelines) are obeyed anywhere in a line. Where there is space a line may be broken later."""

_OF_AN_ID = re.compile(r"[\[\]\\]|:(?=:)|^:|:$|%(?=[0-9A-Fa-f]{2})|#(?=#)")
"""What means something to pytest in a node id, and what would make two names one id."""


def printable(text: str, longest: int = LONGEST) -> str:
    """A text that shows all that is in it and does nothing: lines are kept.

    Control, invisible and direction characters, lone surrogates and other space than ``" "`` become the escapes of
    Python's strings (``str.isprintable``); so does the first character of what a CI service would take for a command.
    Cleaning what is clean changes nothing.
    """
    text = text.replace("\r\n", "\n")
    if not text.isprintable():
        text = "\n".join(line if line.isprintable() else _escaped(line) for line in text.split("\n"))
    text = _disarmed(text)
    if len(text) > longest:
        half = (longest - _ROOM) // 2
        text = _disarmed(f"{text[:half]} ... {len(text) - 2 * half} more characters ... {text[-half:]}")
    return text


def json_text(value: object, *, indent: int | None = None, allow_nan: bool = True) -> str:
    """JSON that does nothing where a log shows it, and reads as what it was: only ASCII, and no ``##[command]``."""
    return json.dumps(value, indent=indent, allow_nan=allow_nan).replace("##", "#\\u0023")


def file_id(name: str) -> str:
    """The name of a file or folder as part of a node id, in which two names are never one.

    What pytest reads in ids (``::``, brackets, backslashes) and what is not printable is written as in a URL: ``%5B``.
    """
    name = _OF_AN_ID.sub(lambda found: _in_hex(found[0]), name)
    return name if name.isprintable() else "".join(c if c.isprintable() else _in_hex(c) for c in name)


def _in_hex(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode(errors="surrogatepass"))


def _escaped(line: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _disarmed(text: str) -> str:
    if "::" not in text and "##" not in text:
        return text
    return _COMMAND.sub(lambda found: "\\x3a" if found[0] == ":" else "\\x23", text)

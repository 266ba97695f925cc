"""Plain values that users give, refused by the argument's name where they are wrong and shown in few words, and text of
strangers, made harmless: names of tensors, files and folders, and what libraries say of them."""

from __future__ import annotations

import difflib
import errno
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

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


MOST_SHOWN = 80
"""Characters of a value in a message."""

MOST_QUOTED = 300
"""Characters of what a library says, in a message."""

MOST_ITEMS = 10_000
"""Of a list of ranks, codes or names: one without an end must not be waited for."""

MOST_LOSSES = 10_000_000
"""Of a list of losses: longer than any run has steps."""

MOST_WHOLE = 2**40
"""Of batch, sequence, steps: beyond, products of them leave the 64 bits in which sizes are counted."""


PLAIN = (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, range, type, type(None))
"""Classes of values of which nothing is the user's own but what they hold."""


class _Short(reprlib.Repr):
    """Texts of any object that are short, also where it has none of its own or contains itself."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = MOST_SHOWN
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 6
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        digits = int(x.bit_length() * math.log10(2)) + 1
        return repr(x) if digits < 40 else f"a whole number of about {digits} digits"


_short = _Short()


def shown(value: Any) -> str:
    """A value as a message shows it, on one line that can be printed: itself where it is plain, else its class."""
    if not isinstance(value, PLAIN):
        return in_short(type(value).__name__, MOST_SHOWN)
    try:
        text = _short.repr(value)
    except Exception:  # whatever a class of its own in it raises: the message is about the argument
        text = type(value).__name__
    return in_short(text, MOST_SHOWN)


def in_short(text: object, most: int = MOST_QUOTED) -> str:
    """What a library says, on one line that can be printed."""
    try:
        line = printable(" ".join(str(text).split()))
    except Exception:  # of a class of its own
        line = f"a {type(text).__name__}"
    return line if len(line) <= most else f"{line[: most - 3]}..."


def require_real(name: str, value: Any) -> float:
    """Any number.

    Raises:
        TypeError, ValueError: It is none, or more than a float holds; the message has the name.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a finite number, not {shown(value)}") from None


def require_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    finite: bool = True,
) -> float:
    """A number within these bounds.

    Raises:
        TypeError, ValueError: It is none; the message has the name.
    """
    number = require_real(name, value)
    within = least <= number <= most and number > above
    if not within or (finite and math.isinf(number)):
        kind = "a finite number" if finite else "a number"
        raise ValueError(f"{name} must be {kind}{_bounds(least, most, above)}, not {shown(value)}")
    return number


def _bounds(least: float, most: float, above: float) -> str:
    parts = [f"above {above:g}"] if above > -math.inf else []
    parts += [f"at least {least:g}"] if least > -math.inf else []
    parts += [f"at most {most:g}"] if most < math.inf else []
    return f" {' and '.join(parts)}" if parts else ""


def require_share(name: str, value: Any) -> float:
    """A number above 0 and at most 1.

    Raises:
        TypeError, ValueError: It is none; the message has the name.
    """
    return require_number(name, value, above=0.0, most=1.0)


def require_whole(name: str, value: Any, *, least: int | None = None, most: int = MOST_WHOLE) -> int:
    """A whole number within these bounds.

    Raises:
        TypeError, ValueError: It is none; the message has the name.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {shown(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, not {shown(value)}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, not {shown(value)}")
    return value


def require_flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        TypeError: It is neither; the message has the name.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {shown(value)}")
    return value


def require_flag_or_none(name: str, value: Any) -> bool | None:
    """True, False, or None for neither.

    Raises:
        TypeError: It is something else; the message has the name.
    """
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} must be True, False or None, not {shown(value)}")
    return value


def require_one_of(name: str, value: Any, known: Sequence[str]) -> str:
    """One of some texts; another is answered with the nearest.

    Raises:
        TypeError, ValueError: It is none; the message has the name.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(known)}, not {shown(value)}")
    if value not in known:
        near = difflib.get_close_matches(value[:MOST_SHOWN], known, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {shown(value)}{meant}")
    return value


def require_text(name: str, value: Any) -> str:
    """A text.

    Raises:
        TypeError: It is something else; the message has the name.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, not {shown(value)}")
    return value


def require_items(
    name: str,
    values: Any,
    kind: str,
    one: Callable[[str, Any], Any] | None = None,
    *,
    most: int = MOST_ITEMS,
) -> tuple[Any, ...]:
    """What an iterable gives, each checked by ``one``.

    Args:
        name: The argument.
        values: What was given for it.
        kind: What it must be, in words.
        one: Raises unless an element is right.
        most: How many there may be.

    Raises:
        TypeError, ValueError: It is no iterable, raises, or has no end; the message has the name.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be {kind}, not {shown(values)}")
    try:
        found = tuple(islice(values, most + 1))
    except Exception as error:  # a generator raises what it likes, and a tensor of one number has no elements
        raise TypeError(f"{name} must be {kind}, not {shown(values)}: {in_short(error)}") from error
    if len(found) > most:
        raise ValueError(f"{name} must have at most {most:,} elements")
    return found if one is None else tuple(one(name, element) for element in found)


def require_path(name: str, value: Any) -> Path:
    """A path that the system can look at, whether or not there is something.

    Raises:
        TypeError, ValueError: It is none; the message has the name.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, not {shown(value)}")
    try:
        path = Path(value)
        stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise ValueError(f"{name}: {shown(str(value))} cannot be looked at: {error.strerror}") from error
    except (TypeError, ValueError) as error:  # a NUL, half of a surrogate pair, a path of bytes
        raise ValueError(f"{name}: {shown(value)} is no path: {in_short(error)}") from error
    return path

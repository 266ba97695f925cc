"""Text from outside, made harmless to look at."""

from __future__ import annotations

import re
from textwrap import dedent
from unicodedata import category

LONGEST = 4000
"""Characters of one text; what is longer is cut in the middle."""

_SUSPECT = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
_FOR_MARKDOWN = re.compile(r"([\\`*\[\]<>#|~&$]|(?<![^\W_])_|_(?![^\W_]))")


def printable(text: str, longest: int = LONGEST) -> str:
    """A text that shows all that is in it: control, invisible and direction characters as escapes, lines kept."""
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} ... {len(text) - 2 * half} more characters ... {text[-half:]}"
    return _SUSPECT.sub(_escaped, text.replace("\r\n", "\n"))


def _escaped(found: re.Match[str]) -> str:
    char = found[0]
    if category(char) == "Cc":
        return f"\\x{ord(char):02x}"
    return f"\\u{ord(char):04x}"


def without_margin(text: str) -> str:
    """A text of several lines without the margin that the lines after the first have in a terminal."""
    first, newline, rest = text.partition("\n")
    return first + newline + dedent(rest)


def markdown(text: str) -> str:
    """A text as Markdown that shows it literally, on one line, also in a cell of a table."""
    return _FOR_MARKDOWN.sub(r"\\\1", " ".join(printable(text).split()))


def markdown_block(text: str, indent: str) -> str:
    """A text of several lines as a block of code in Markdown, indented as part of a list."""
    shown = printable(without_margin(text))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return "\n".join(f"{indent}{line}" for line in (f"{fence}text", *shown.splitlines(), fence))


def markdown_code(text: str, *, in_table: bool = False) -> str:
    """A text as code in Markdown, on one line; in the cell of a table even code may not hold a bare ``|``."""
    shown = printable(text).replace("\n", " ")
    if in_table:
        shown = shown.replace("|", "\\|")
    if not shown.strip():
        return ""
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{shown}{space}{fence}"

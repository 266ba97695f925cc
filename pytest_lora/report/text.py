"""Text from outside as Markdown."""

from __future__ import annotations

import re
from textwrap import dedent

from pytest_lora.values import printable

_FOR_MARKDOWN = re.compile(r"([\\`*\[\]<>#|~&$]|(?<![^\W_])_|_(?![^\W_]))")


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

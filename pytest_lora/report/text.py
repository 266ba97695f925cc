"""Text as markup: anything from outside as Markdown, and the documentation of a rule as HTML."""

from __future__ import annotations

import re
from textwrap import dedent

from markupsafe import Markup, escape

from pytest_lora.values import printable

_FOR_MARKDOWN = re.compile(r"([\\`*\[\]<>#|~&$]|(?<![^\W_])_|_(?![^\W_]))")

_FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`[^`]+`)")
_LINK = re.compile(r"(https?://[^\s<>()]+[^\s<>().,;:])")


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


def rule_doc(doc: str) -> Markup:
    """The documentation, less its first line, which is the summary."""
    html = Markup()
    for index, part in enumerate(_FENCE.split(doc.partition("\n")[2])):
        html += Markup("<pre tabindex='0'><code>{}</code></pre>").format(part) if index % 2 else _blocks(part)
    return html


def _blocks(text: str) -> Markup:
    html = Markup()
    for block in re.split(r"\n\s*\n", text.strip()):
        heading, _, rest = block.partition("\n") if block.startswith("## ") else ("", "", block)
        if heading:
            html += Markup("<h3>{}</h3>").format(heading.removeprefix("## "))
        if rest.startswith("- "):
            items = re.split(r"^- ", rest, flags=re.MULTILINE)[1:]
            html += Markup("<ul>{}</ul>").format(
                Markup().join(Markup("<li>{}</li>").format(_inline(i)) for i in items)
            )
        elif rest.strip():
            html += Markup("<p>{}</p>").format(_inline(rest))
    return html


def _inline(text: str) -> Markup:
    html = Markup()
    for index, part in enumerate(_CODE.split(text)):
        if index % 2:
            html += Markup("<code>{}</code>").format(part[1:-1])
            continue
        for place, piece in enumerate(_LINK.split(part)):
            html += (
                Markup('<a href="{0}" rel="noreferrer">{0}</a>').format(piece) if place % 2 else escape(piece)
            )
    return html

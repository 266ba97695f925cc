"""The documentation of a rule as HTML: headings, paragraphs, lists, code, and nothing else."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

_FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`[^`]+`)")
_LINK = re.compile(r"(https?://[^\s<>()]+[^\s<>().,;:])")


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

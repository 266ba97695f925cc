"""Tables of numbers under a head, for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

Cells = Sequence[tuple[str, ...]]
"""The head, then the rows, all of one length."""


def text_lines(cells: Cells) -> list[str]:
    """A line a row, the columns flush right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]


def markdown_lines(cells: Cells) -> list[str]:
    """The same in Markdown."""
    head, *rows = (f"| {' | '.join(row)} |" for row in cells)
    return [head, f"|{' ---: |' * len(cells[0])}", *rows]

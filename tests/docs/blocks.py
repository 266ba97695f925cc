"""Code blocks of README.md and docs/, with what the HTML comment above each says of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

_REMARK = re.compile(r"<!-- (skip|fails)(?:: (.+?))? -->")
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: The file, relative to the repository.
        line: Number of the first line of code, from 1.
        language: Its info word; empty for output.
        title: The file that the reader is to save it as, or empty.
        remark: ``"skip"`` (not executed), ``"fails"`` (its test fails), or empty.
        about: The reason for a skip.
    """

    page: str
    line: int
    language: str
    title: str
    remark: str
    about: str
    code: str

    @property
    def name(self) -> str:
        """Page and line, as a test is called."""
        return f"{Path(self.page).stem}_{self.line}"


def blocks() -> Iterator[Block]:
    """Every block, page by page."""
    for page in PAGES:
        yield from blocks_of(page.relative_to(ROOT).as_posix(), page.read_text())


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """The blocks of one page."""
    comment = ""
    for token in MarkdownIt().parse(text):
        if token.type == "html_block":
            comment = token.content
        elif token.type == "fence":
            assert token.map is not None
            remark = _REMARK.search(comment)
            words = token.info.split()
            yield Block(
                page=page,
                line=token.map[0] + 2,
                language=words[0] if words else "",
                title=found[1] if (found := _TITLE.search(token.info)) else "",
                remark=remark[1] if remark else "",
                about=(remark[2] or "") if remark else "",
                code=token.content,
            )
            comment = ""
        elif token.nesting >= 0:
            comment = ""
